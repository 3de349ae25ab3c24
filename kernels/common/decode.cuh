// What the phases of decoding share: a block's warps, and words that carry activations from block to block.
#pragma once
#include "types.cuh"

constexpr int LANES = 32;
constexpr int WARPS = 8;   // that multiply
constexpr int COPIERS = 4; // warps that copy weights for them, or say what will be needed
constexpr int THREADS = WARPS * LANES;
constexpr int MOST_ROWS = 8;

// n / d for n < 2^22.
struct Divide {
    float inverse;
    __device__ explicit Divide(int d) : inverse(reciprocal(d)) {}
    __device__ int operator()(int n) const { return int((n + 0.5f) * inverse); }
};

// A number that is known.
template <int N> struct Is {
    static constexpr int value = N;
    __device__ constexpr operator int() const { return N; }
};
// f(Is<n>()), n being of FIRST to LAST. By halves: a jump through a table waits for the table.
template <int FIRST, int LAST, typename F> __device__ __forceinline__ void among(int n, F &&f) {
    if constexpr (FIRST == LAST)
        f(Is<FIRST>());
    else if (n <= (FIRST + LAST) / 2)
        among<FIRST, (FIRST + LAST) / 2>(n, f);
    else
        among<(FIRST + LAST) / 2 + 1, LAST>(n, f);
}

// A number found here, before a phase's inputs are there, and not where it is needed, when they are.
__device__ __forceinline__ void known(int &x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void known(uint32_t &x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void known(float &x) { asm volatile("" : "+f"(x)); }
// A place in shared memory, found once: else every use of it asks where the block's memory begins, which takes longer than
// to read there.
template <typename T> __device__ __forceinline__ T *found(T *x) {
    asm volatile("" : "+l"(x));
    __builtin_assume(__isShared(x));
    return x;
}

// Where warps can have as many registers as they need (sm_90a), one row's products are finished by warps of their own.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <bool MANY> constexpr int FINISHERS_OF = MANY ? 0 : 4;
#else
template <bool MANY> constexpr int FINISHERS_OF = 0;
#endif
template <bool MANY> constexpr int BLOCK_THREADS = (WARPS + FINISHERS_OF<MANY> + COPIERS) * LANES;

// Barriers of a block: `count` threads come, of which those that only arrive do not wait.
enum { MULTIPLIERS = 1, FINISHERS_ALONE, BOTH, READY, FREE = READY + 2 };
__device__ __forceinline__ void meet(int barrier, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(int barrier, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ int lane_of() { return threadIdx.x % LANES; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / LANES; }
// All warps that multiply.
__device__ __forceinline__ void meet() { meet(MULTIPLIERS, THREADS); }

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
constexpr int COPIES = 4;
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

// Which pairs of words of a row are a warp's: `each` of every piece of the row, which all warps share.
struct Pairs {
    int first, each, count; // of all pieces
    Divide by;

    __device__ Pairs(int each, int pieces) : first(warp_of() * each), each(each), count(pieces * each), by(each) {}
    // Where its pair i lies in the row.
    __device__ int operator()(int i) const { return first + i + by(i) * (WARPS - 1) * each; }
};

// What becomes of a pair of words, row `row`'s `at`th, on its way: nothing. `begin` is called while the first of them are.
struct Unchanged {
    __device__ void begin() {}
    __device__ uint2 operator()(int, int, uint2 pair) const { return pair; }
};
constexpr int AT_ONCE = 5;    // pairs of a row that a lane has in registers
constexpr int NEAR_PAIRS = 2; // of a lane, which have code of their own

// Pairs of words as soon as all of them are there; those that are not asked for mean nothing.
template <int COUNT>
__device__ __forceinline__ void await(Words (&w)[COUNT], const Word *const (&from)[COUNT], const bool (&has)[COUNT],
                                      uint32_t mark) {
    bool missing[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) missing[m] = has[m];
    for (bool some = true; some;) {
        some = false;
#pragma unroll
        for (int m = 0; m < COUNT; ++m)
            if (missing[m]) w[m] = peek_two(from[m]);
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
            missing[m] = missing[m] && (mark_of(w[m].at[0]) != mark || mark_of(w[m].at[1]) != mark);
            some = some || missing[m];
        }
    }
}

// some(Is<n>(), start) for n pairs of a lane from its `start` on, until all of the warp's are done.
template <typename F> __device__ __forceinline__ void by_columns(const Pairs &pairs, F &&some) {
    if (pairs.count <= NEAR_PAIRS * LANES)
        some(Is<NEAR_PAIRS>(), lane_of());
    else
#pragma unroll 1
        for (int start = lane_of(); start - lane_of() < pairs.count; start += AT_ONCE * LANES) some(Is<AT_ONCE>(), start);
}
// The warp's pairs of a row of words, of `end` in all, the eight bytes of each pair to their place in shared memory; zeros
// behind the end of the row.
template <typename F>
__device__ __forceinline__ void receive(const Word *row, const Pairs &pairs, int end, uint32_t mark, char *to, F &&change) {
    auto some = [&](auto most, int start) {
        constexpr int MOST = decltype(most)::value;
        Words w[MOST];
        const Word *from[MOST];
        bool has[MOST];
#pragma unroll
        for (int m = 0; m < MOST; ++m) {
            int i = start + m * LANES, at = pairs(i);
            from[m] = row + 2 * at, has[m] = i < pairs.count && at < end;
        }
        if (start == lane_of()) change.begin();
        await(w, from, has, mark);
#pragma unroll
        for (int m = 0; m < MOST; ++m) {
            int i = start + m * LANES;
            uint2 pair = {};
            if (has[m]) pair = change(0, pairs(i), {uint32_t(w[m].at[0]), uint32_t(w[m].at[1])});
            if (i < pairs.count) *reinterpret_cast<uint2 *>(to + i * 8) = pair;
        }
    };
    by_columns(pairs, some);
}
// The same of several rows, whose words are `apart` from each other, to rows `pitch` bytes apart. A lane has the same columns
// of all of them. Waiting for all of their words at once would keep L2 busy: one is a good sign that the others are close.
template <typename F>
__device__ __forceinline__ void receive_rows(const Word *first, int apart, int rows, const Pairs &pairs, int end, uint32_t mark,
                                             char *to, int pitch, F &&change) {
    auto some = [&](auto most, int start) {
        constexpr int MOST = decltype(most)::value, TOGETHER = 2;
        const Word *from[MOST];
        int at[MOST];
#pragma unroll
        for (int m = 0; m < MOST; ++m) {
            int i = start + m * LANES;
            at[m] = i < pairs.count ? pairs(i) : end;
            from[m] = first + 2 * min(at[m], end - 1); // what is not asked for is there as well
        }
        while (mark_of(peek(from[0])) != mark) {}
#pragma unroll 1
        for (int row = 0; row < rows; row += TOGETHER) {
            Words w[TOGETHER][MOST];
            int next = row + 1 < rows ? apart : 0; // the last row in the place of one that is not there
            for (uint32_t wrong = 1; wrong;) {
                wrong = 0;
#pragma unroll
                for (int m = 0; m < TOGETHER * MOST; ++m)
                    w[m / MOST][m % MOST] = peek_two(from[m % MOST] + m / MOST * next);
#pragma unroll
                for (int m = 0; m < TOGETHER * MOST; ++m) {
                    const Words &own = w[m / MOST][m % MOST];
                    wrong |= (mark_of(own.at[0]) ^ mark) | (mark_of(own.at[1]) ^ mark);
                }
            }
#pragma unroll
            for (int m = 0; m < MOST; ++m) {
                from[m] += TOGETHER * apart;
                if (start + m * LANES >= pairs.count) continue;
#pragma unroll
                for (int t = 0; t < TOGETHER; ++t) {
                    uint2 pair = {uint32_t(w[t][m].at[0]), uint32_t(w[t][m].at[1])};
                    pair = at[m] < end ? change(row + t, at[m], pair) : uint2{};
                    if (row + t < rows) *reinterpret_cast<uint2 *>(to + (row + t) * pitch + (start + m * LANES) * 8) = pair;
                }
            }
        }
    };
    change.begin();
    by_columns(pairs, some);
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
