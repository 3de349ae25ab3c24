// What the phases of decoding share: a block's warps, and words that carry activations from block to block.
#pragma once
#include "types.cuh"
#include <type_traits>

constexpr int LANES = 32;
constexpr int WARPS = 8;   // that multiply
constexpr int COPIERS = 4; // warps that copy weights for them
constexpr int THREADS = WARPS * LANES;
constexpr int MOST_ROWS = 8;

// n / d for n < 2^22.
struct Divide {
    float inverse;
    __device__ explicit Divide(int d) : inverse(reciprocal(d)) {}
    __device__ int operator()(int n) const { return int((n + 0.5f) * inverse); }
};

__device__ __forceinline__ int lane_of() { return threadIdx.x % LANES; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / LANES; }
// All warps that multiply.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// A word is four bytes of activations and the mark of the phase that wrote them, stored and loaded at once: who finds the
// mark has the activations, without a barrier, a fence or a second way to memory. Marks never come again.
using Word = uint64_t;

__device__ __forceinline__ uint32_t mark_of(Word w) { return uint32_t(w >> 32); }
// Words have copies, so that not all blocks ask for the same lines of L2.
constexpr int COPIES = 2;
struct Copies {
    int apart; // words

    __device__ void publish(Word *to, uint32_t data, uint32_t mark) const {
#pragma unroll
        for (int i = 0; i < COPIES; ++i, to += apart)
            asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(Word(mark) << 32 | data) : "memory");
    }
    // The one that the block reads.
    __device__ const Word *own(const Word *from) const { return from + blockIdx.x % COPIES * apart; }
};
__device__ __forceinline__ Word peek(const Word *from) {
    Word w;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(w) : "l"(from) : "memory");
    return w;
}
struct Words {
    Word at[2];
};
__device__ __forceinline__ Words peek_two(const Word *from) {
    Words w;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(w.at[0]), "=l"(w.at[1])
                 : "l"(from)
                 : "memory");
    return w;
}

// The lanes of a warp share the rows: a lane takes part in one.
struct Rows {
    int lanes, own, begin; // of a row; the lane's row, and its place in it
    bool live;
    __device__ explicit Rows(int rows) : lanes(LANES) {
        int bits = 5;
        for (int most = 1; most < rows; most *= 2) lanes /= 2, --bits;
        own = lane_of() >> bits, begin = lane_of() & (lanes - 1);
        live = own < rows;
    }
};

// What becomes of a pair of words on its way: nothing. `begin` is called while the first of them are.
struct Unchanged {
    __device__ void begin() {}
    __device__ uint2 operator()(int, uint2 pair) const { return pair; }
};
// A row's pairs of words from the `first` on, the eight bytes of each pair to their place in shared memory, as soon as
// both are there; zeros behind the end of the row. SIGN: they may be far.
template <int COUNT, bool SIGN = true, typename F = Unchanged>
__device__ __forceinline__ void receive(const Word *row, const Rows &rows, int pairs, int end, uint32_t mark, char *to,
                                        F &&change = F()) {
    if (!rows.live) pairs = end = 0;
    // one word is as good a sign as many that its neighbours are close, and waiting for all would keep L2 busy
    if (SIGN && end > 0)
        while (mark_of(peek(row)) != mark) {}
    Words w[COUNT];
    auto ask = [&](int start) {
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            int i = start + m * rows.lanes;
            if (i < end) w[m] = peek_two(row + 2 * i);
        }
    };
    constexpr bool FEW = COUNT <= 5;
    if (FEW) ask(rows.begin);
    change.begin();
#pragma unroll 1
    for (int start = rows.begin; start < pairs; start += COUNT * rows.lanes) {
        if (!FEW || start > rows.begin) ask(start);
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            int i = start + m * rows.lanes;
            if (i < end)
                while (mark_of(w[m].at[0]) != mark || mark_of(w[m].at[1]) != mark) {
                    // many that ask again and again would keep L2 busy
                    if (COUNT > 5) __nanosleep(100);
                    w[m] = peek_two(row + 2 * i);
                }
            uint2 pair = {};
            if (i < end) pair = change(i, {uint32_t(w[m].at[0]), uint32_t(w[m].at[1])});
            if (i < pairs) *reinterpret_cast<uint2 *>(to + i * 8) = pair;
        }
    }
}
// Activations in a word: two of 16 bits, or one of 32. `next` is the second.
template <typename E> constexpr int PACK = 4 / sizeof(E);
__device__ __forceinline__ uint32_t pack(bf16 x, bf16 next) {
    return __bfloat16_as_ushort(x) | uint32_t(__bfloat16_as_ushort(next)) << 16;
}
__device__ __forceinline__ uint32_t pack(f16 x, f16 next) {
    return __half_as_ushort(x) | uint32_t(__half_as_ushort(next)) << 16;
}
__device__ __forceinline__ uint32_t pack(float x, float) { return __float_as_uint(x); }
// Words of a row of so many elements: whole pairs.
template <typename E> __device__ __forceinline__ int words_of(int width) {
    return ((width + PACK<E> - 1) / PACK<E> + 1) / 2 * 2;
}
