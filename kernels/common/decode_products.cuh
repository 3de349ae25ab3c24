// Products of a block's share of the weights, as they lie in the ring's slots, with the rows of activations.
#pragma once
#include "decode_stream.cuh"
#include <type_traits>

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ uint32_t load_word(uint32_t from) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
    return v;
}

template <typename T> __device__ __forceinline__ void store_shared(uint32_t to, const T &x) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    const uint32_t *bits = reinterpret_cast<const uint32_t *>(&x);
    if constexpr (sizeof(T) == 4)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(bits[0]) : "memory");
    else
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(bits[0]), "r"(bits[1]) : "memory");
}

// A warp's inputs of a phase in shared memory, rows `pitch` apart.
struct Input {
    uint32_t at;
    int pitch;
};

// Sums of a tile: outputs times rows.
//
// A lane's 16 bytes of weights are the operand A of one product of tensor cores as they lie: its rows are the tile's outputs
// twice, with the first and third and with the second and fourth word of 16 bytes. B has a column of the same words for
// each row of activations and half, so that four rows take one product, and D's other columns mean nothing. Lane 4 g + t has
// output g in rows t and 4 + t.
template <typename E, bool MANY> struct Tile {
    static constexpr int HALVES = MANY ? 2 : 1; // of the rows
    uint32_t x[HALVES];                         // the lane's words of activations
    bool both;
    float c[HALVES][2][4];

    __device__ Tile() {}
    __device__ Tile(uint32_t at, int pitch, int rows) : both(MANY && rows > 4) {
        int row = MANY ? lane_of() / 8 : 0;
        at += lane_of() % 4 * UNIT + lane_of() / 4 % 2 * 4;
        x[0] = at + (row < rows ? row : 0) * pitch;
        if (MANY) x[HALVES - 1] = at + (row + 4 < rows ? row + 4 : 0) * pitch;
    }
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 8 * HALVES; ++i) c[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }
#define MULTIPLY(KIND)                                                                                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(a.x), "r"(a.y))
    static __device__ void mma(float (&c)[4], const uint4 &w, const uint2 &a) {
        if constexpr (std::is_same_v<E, bf16>)
            MULTIPLY("bf16");
        else
            MULTIPLY("f16");
    }
#undef MULTIPLY
    // N groups of some tiles; `done` bytes of the activations are.
    template <int N, int COUNT> static __device__ void multiply(Tile (&tile)[COUNT], const uint32_t (&slot)[COUNT], int done) {
        uint4 w[COUNT][N];
        uint2 a[N];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) w[i][j] = load_shared(slot[i] + j * GROUP);
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
            if (half && !tile[0].both) break;
            uint32_t from = tile[0].x[half] + done;
#pragma unroll
            for (int j = 0; j < N; ++j) a[j] = {load_word(from + j * GROUP), load_word(from + j * GROUP + 8)};
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int i = 0; i < COUNT; ++i) mma(tile[i].c[half][j % 2], w[i][j], a[j]);
        }
    }
    __device__ void store(float *to, int rows) {
        int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            if (t + 4 * half < rows)
                to[(t + 4 * half) * WARPS * TILE + g] =
                    (c[half][0][0] + c[half][0][3]) + (c[half][1][0] + c[half][1][3]);
    }
};
// Lane 4 g + t has a quarter of the sum of output g.
template <bool MANY> struct Tile<float, MANY> {
    static constexpr int ROWS = MANY ? MOST_ROWS : 1;
    uint32_t x;
    int pitch, rows;
    float c[ROWS];

    __device__ Tile() {}
    __device__ Tile(uint32_t at, int pitch, int rows) : x(at + lane_of() % 4 * UNIT), pitch(pitch), rows(rows) {}
    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) c[r] = 0.0f;
    }
    template <int N, int COUNT> static __device__ void multiply(Tile (&tile)[COUNT], const uint32_t (&slot)[COUNT], int done) {
        static_assert(COUNT == 1, "one at a time");
        tile[0].multiply<N>(slot[0], done);
    }
    template <int N> __device__ void multiply(uint32_t slot, int done) {
#pragma unroll 1
        for (int j = 0; j < N; ++j) {
            uint4 w = load_shared(slot + j * GROUP);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (r < rows) {
                    uint4 a = load_shared(x + done + r * pitch + j * GROUP);
                    c[r] = fmaf(__uint_as_float(w.x), __uint_as_float(a.x), c[r]);
                    c[r] = fmaf(__uint_as_float(w.y), __uint_as_float(a.y), c[r]);
                    c[r] = fmaf(__uint_as_float(w.z), __uint_as_float(a.z), c[r]);
                    c[r] = fmaf(__uint_as_float(w.w), __uint_as_float(a.w), c[r]);
                }
        }
    }
    __device__ void store(float *to, int rows) {
        int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < rows) {
                c[r] += __shfl_xor_sync(~0u, c[r], 1);
                c[r] += __shfl_xor_sync(~0u, c[r], 2);
                if (t == 0) to[r * WARPS * TILE + g] = c[r];
            }
    }
};

// N groups in a slot, COUNT slots at once, of a tile each.
template <int N, int COUNT, typename T>
__device__ __forceinline__ void multiply_slots(Ring &ring, T (&tile)[COUNT], uint32_t own, int done) {
    Ring ahead = ring;
    uint32_t slot[COUNT];
    bool full = true;
#pragma unroll
    for (int i = 0; i < COUNT; ++i, ahead.turn()) slot[i] = ahead.slot() + own, full = ahead.is_full() && full;
    if (!full) {
        ahead = ring;
#pragma unroll 1
        for (int i = 0; i < COUNT; ++i, ahead.turn()) ahead.wait_full();
    }
    T::template multiply<N>(tile, slot, done);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) ring.release();
}
// A phase's products: what of them does not depend on its inputs, which they will be with.
template <typename E, bool MANY> struct Product {
    Tile<E, MANY> tile[1];
    int groups, size, bytes; // of a slot, bytes of the warp's part of it, and of all slots of a tile
    uint32_t own;            // where the lane's part begins in a slot

    __device__ Product(const Share &share, const Input &x, int rows)
        : tile{{x.at, x.pitch, rows}}, groups(share.size), size(share.size * GROUP), bytes(share.groups * GROUP) {
        own = lane_of() / 4 * pitch_of(WARPS * share.size) + warp_of() * size + lane_of() % 4 * UNIT;
        known(groups), known(size), known(bytes), known(own);
    }
    // Of some tiles: sums [tiles, rows, WARPS, TILE] of the warps that have a part. A number of groups in a slot has code of
    // its own.
    __device__ __forceinline__ void multiply(Ring &ring, int rows, int tiles, float *sums) {
        sums += warp_of() * TILE;
        among<1, MOST_GROUPS>(groups, [&](auto n) {
            constexpr int N = decltype(n)::value, AT_ONCE = MANY || sizeof(E) == 4 ? 1 : N <= 3 ? 4 : 2;
            if constexpr (AT_ONCE > 1) {
                // their slots must all be there
#pragma unroll 1
                for (; tiles >= AT_ONCE && size == bytes && ring.size >= AT_ONCE; tiles -= AT_ONCE) {
                    Tile<E, MANY> some[AT_ONCE];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i) some[i] = tile[0], some[i].clear();
                    multiply_slots<N>(ring, some, own, 0);
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i, sums += WARPS * TILE) some[i].store(sums, 1);
                }
            }
#pragma unroll 1
            for (; tiles > 0; --tiles, sums += rows * WARPS * TILE) {
                tile[0].clear();
#pragma unroll 1
                for (int done = 0; done < bytes; done += size) multiply_slots<N>(ring, tile, own, done);
                tile[0].store(sums, rows);
            }
        });
    }
};
