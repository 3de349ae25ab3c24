// What the kernels of the selective scan share: arguments, the shape of a block, tiles of tokens in shared memory.
//
// A block owns CHANNELS neighbouring channels of one row of the batch and walks through tiles of TILE tokens. A state of
// N numbers is spread over SPLIT lanes with STATES numbers each, in registers; a lane carries PAIR channels, so that
// what it reads of B and C serves both. Lanes of a warp: the SPLIT parts of one pair of channels, then the next pair.
#pragma once
#include "types.cuh"

constexpr int STATES = 8;
constexpr int PAIR = 2;
constexpr int THREADS = 128;
constexpr int TILE = 16;
constexpr int LANES = 32;

// Marks of a token, as src/ops/segments.rs has them.
constexpr uint8_t START = 1;
constexpr uint8_t PAD = 2;

// A carried state whose weight has fallen to 2^-NEGLIGIBLE counts as forgotten; f32 keeps 24 bits.
constexpr float NEGLIGIBLE = 48.0f;

// A [B, L, D] tensor; steps in elements.
struct Sequence {
    void *data;
    int64_t row, token;
};

// B or C, [B, L, G, N]; steps in elements. `width` channels share a group. Wide: f32, else of the sequences' type.
struct Coefficient {
    const void *data;
    int64_t row, token, group;
    int width, wide;
};

// Pointers of what a call lacks are null. Fields a kernel does not use are not set.
struct Scan {
    Sequence u, delta, z, y, dy, du, ddelta, dz;
    Coefficient b, c;
    const float *a, *d, *bias, *initial; // [D, N], [D], [D], [B, D, N]
    const uint8_t *marks;                // [B, L]
    float *state;                        // final state or its gradient, [B, D, N]
    float *kept;                         // states before every tile, [B, tiles, D, N]
    float *carried;                      // states before (behind, going back) every chunk, [B, chunks, D, N]
    float *span;                         // sum of delta over the chunk as far as it counts, [B, chunks, D]
    float *sums;                         // shares of dB and dC, [blocks, B, L, 2N]
    float *da, *dd, *dbias;              // shares of the gradients, [B, chunks, D, N], [B, chunks, D] each
    int batch, length, channels, states;
    int part;      // channels that share their groups of B and of C; blocks lie within one part
    int blocks;    // blocks in a part
    int chunk;     // tokens in a chunk of time, a multiple of TILE
    int softplus;
    int aligned;   // whether rows of all sequences can be read and written in 16-byte pieces
    int aligned_coefficients;
    // Steps only, both or neither: where the rows' states lie in a pool [slots, D, N], read and written in place, below
    // zero for an idle row; and how many tokens of a row count (null: all).
    const int *slots, *counts;
};

// Which channels, row and chunk a block has: grid (parts * blocks, batch, chunks or one less).
template <int SPLIT> struct Place {
    static constexpr int CHANNELS = THREADS / SPLIT * PAIR;
    int first, count, row, chunk, chunks, begin, end;
    // `skipped` chunks have no blocks.
    __device__ Place(const Scan &p, int skipped = 0) {
        int part = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
        first = part * p.part + block * CHANNELS;
        count = min(CHANNELS, (part + 1) * p.part - first);
        row = blockIdx.y;
        chunk = blockIdx.z + skipped;
        chunks = (p.length + p.chunk - 1) / p.chunk;
        begin = chunk * p.chunk;
        end = min(begin + p.chunk, p.length);
    }
};

// One raw tile of a sequence in shared memory: [TILE, CHANNELS], in vectors of WIDTH channels; a thread has the vectors
// threadIdx.x, + THREADS, .. , all of the same channels.
template <typename E, int SPLIT> struct Tile {
    static constexpr int CHANNELS = Place<SPLIT>::CHANNELS;
    static constexpr int SIZE = TILE * CHANNELS;
    static constexpr int WIDTH = Vector<E>::SIZE;
    static constexpr int COLUMNS = CHANNELS / WIDTH;
    static constexpr int VECTORS = SIZE / WIDTH;
    static constexpr int ROWS = THREADS / COLUMNS;
    static constexpr int OWN = VECTORS < THREADS ? 1 : VECTORS / THREADS;

    int token, channel; // of this thread's first vector
    bool live;          // whether its channels exist
    __device__ explicit Tile(const Place<SPLIT> &at)
        : token(threadIdx.x / COLUMNS), channel(threadIdx.x % COLUMNS * WIDTH), live(channel < at.count) {}
    __device__ bool has(int v) const { return VECTORS >= THREADS || threadIdx.x < VECTORS; }

    // Where this thread's first vector is at token `start`.
    __device__ E *place(const Sequence &s, const Place<SPLIT> &at, int start) const {
        return static_cast<E *>(s.data) + at.row * s.row + (start + token) * s.token + at.first + channel;
    }

    // Asks for tokens `start..` of the block's channels. Vectors beyond them are left as they are; channels beyond them
    // in a vector become zero.
    __device__ void fetch(E *tile, const Sequence &s, const Place<SPLIT> &at, int start, int aligned) const {
        const E *from = place(s, at, start);
        if (aligned) {
#pragma unroll
            for (int v = 0; v < OWN; ++v)
                if (has(v) && live && start + token + v * ROWS < at.end)
                    copy_async(tile + (threadIdx.x + v * THREADS) * WIDTH, from + v * ROWS * s.token);
        } else {
            for (int v = 0; v < OWN; ++v)
                for (int k = 0; k < WIDTH; ++k)
                    if (has(v) && start + token + v * ROWS < at.end)
                        tile[(threadIdx.x + v * THREADS) * WIDTH + k] =
                            channel + k < at.count ? from[v * ROWS * s.token + k] : narrow<E>(0.0f);
        }
    }

    // Writes this thread's vector `v` of the tile that begins at `start`.
    __device__ void store(const Sequence &s, const Place<SPLIT> &at, int start, int v, const Vector<E> &x,
                          int aligned) const {
        E *to = place(s, at, start) + v * ROWS * s.token;
        if (aligned) {
            *reinterpret_cast<Vector<E> *>(to) = x;
        } else {
#pragma unroll
            for (int k = 0; k < WIDTH; ++k)
                if (channel + k < at.count) to[k] = x.at[k];
        }
    }
};

// WIDTH numbers between shared memory and registers.
template <int WIDTH> __device__ __forceinline__ void load_floats(float (&to)[WIDTH], const float *from) {
#pragma unroll
    for (int q = 0; q < WIDTH / 4; ++q) {
        float4 v = reinterpret_cast<const float4 *>(from)[q];
        to[4 * q] = v.x, to[4 * q + 1] = v.y, to[4 * q + 2] = v.z, to[4 * q + 3] = v.w;
    }
}
template <int WIDTH> __device__ __forceinline__ void store_floats(float *to, const float (&from)[WIDTH]) {
#pragma unroll
    for (int q = 0; q < WIDTH / 4; ++q)
        reinterpret_cast<float4 *>(to)[q] = make_float4(from[4 * q], from[4 * q + 1], from[4 * q + 2], from[4 * q + 3]);
}

// B or C of a block: raw tiles in shared memory on their way to f32 ones [TILE, STATES * SPLIT], zero beyond N.
template <typename E, int SPLIT> struct CoefficientTile {
    static constexpr int WIDTH = STATES * SPLIT;
    static constexpr int SIZE = TILE * WIDTH;
    static constexpr int OWN = SIZE / THREADS;
    // Wide states leave no room to stage their numbers.
    static constexpr bool STAGED = SPLIT <= 8;
    static constexpr int RAW = STAGED ? SIZE : 8;
    const char *from;
    int64_t step;
    int n, wide, pieces;      // pieces of 16 bytes in a token's numbers; 0: read one by one
    int token, piece, passes; // this thread's first piece
    // `turn` spreads the work of several tiles over the threads.
    __device__ CoefficientTile(const Coefficient &x, const Place<SPLIT> &at, int n, int aligned, int turn)
        : n(n), wide(x.wide) {
        int size = x.wide ? 4 : sizeof(E);
        from = static_cast<const char *>(x.data) + (at.row * x.row + at.first / x.width * x.group) * size;
        step = x.token * size;
        pieces = STAGED && aligned && size == sizeof(E) ? n * size / 16 : 0;
        int first = (threadIdx.x + turn * (THREADS / 2)) % THREADS;
        token = pieces ? first / pieces : TILE;
        piece = pieces ? first % pieces : 0;
        passes = pieces ? (TILE * pieces + THREADS - 1) / THREADS : 0;
    }
    __device__ void fetch(E *raw, const Place<SPLIT> &at, int start) const {
        int t = token, k = piece;
        for (int pass = 0; pass < passes; ++pass) {
            if (t < TILE && start + t < at.end)
                copy_async(reinterpret_cast<char *>(raw) + (t * pieces + k) * 16, from + (start + t) * step + k * 16);
            if (pass + 1 < passes) t += (k + THREADS) / pieces, k = (k + THREADS) % pieces;
        }
    }
    __device__ void widen_tile(float *tile, const E *raw, const Place<SPLIT> &at, int start) const {
#pragma unroll
        for (int v = 0; v < OWN; ++v) {
            int i = threadIdx.x + v * THREADS, token = i / WIDTH, k = i % WIDTH;
            float value = 0.0f;
            if (start + token < at.end && k < n) {
                const char *source = pieces ? reinterpret_cast<const char *>(raw) : from + (start + token) * step;
                int place = pieces ? token * n + k : k;
                value = wide ? reinterpret_cast<const float *>(source)[place]
                             : widen(reinterpret_cast<const E *>(source)[place]);
            }
            tile[i] = value;
        }
    }
};

// What a lane knows of its channels.
template <int SPLIT> struct Lane {
    int pair, part, channel, live; // pair of channels in the block, part of the state, first channel, live channels
    __device__ Lane(const Place<SPLIT> &at) {
        pair = threadIdx.x / SPLIT;
        part = threadIdx.x % SPLIT;
        channel = at.first + pair * PAIR;
        live = max(0, min(PAIR, at.count - pair * PAIR));
    }
    // This lane's part of row `channel + k` of a [.., D, N] tensor; zero where there is none.
    __device__ void load(float (&to)[PAIR][STATES], const float *from, int n, float scale) const {
#pragma unroll
        for (int k = 0; k < PAIR; ++k) {
            const float *row = from + int64_t(channel + k) * n + part * STATES;
#pragma unroll
            for (int q = 0; q < STATES; q += 4) {
                int s = part * STATES + q;
                float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (n % 4 == 0) {
                    if (k < live && s < n) v = *reinterpret_cast<const float4 *>(row + q);
                } else if (k < live) {
                    if (s < n) v.x = row[q];
                    if (s + 1 < n) v.y = row[q + 1];
                    if (s + 2 < n) v.z = row[q + 2];
                    if (s + 3 < n) v.w = row[q + 3];
                }
                to[k][q] = scale * v.x, to[k][q + 1] = scale * v.y;
                to[k][q + 2] = scale * v.z, to[k][q + 3] = scale * v.w;
            }
        }
    }
    __device__ void store(float *to, const float (&from)[PAIR][STATES], int n) const {
#pragma unroll
        for (int k = 0; k < PAIR; ++k) {
            float *row = to + int64_t(channel + k) * n + part * STATES;
#pragma unroll
            for (int q = 0; q < STATES; q += 4) {
                int s = part * STATES + q;
                if (n % 4 == 0) {
                    if (k < live && s < n)
                        *reinterpret_cast<float4 *>(row + q) =
                            make_float4(from[k][q], from[k][q + 1], from[k][q + 2], from[k][q + 3]);
                } else if (k < live) {
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (s + i < n) row[q + i] = from[k][q + i];
                }
            }
        }
    }
};

// STATES numbers of B or C at one token.
__device__ __forceinline__ void load_states(float (&to)[STATES], const float *from) {
    const float4 *vectors = reinterpret_cast<const float4 *>(from);
#pragma unroll
    for (int q = 0; q < STATES / 4; ++q) {
        float4 v = vectors[q];
        to[4 * q] = v.x, to[4 * q + 1] = v.y, to[4 * q + 2] = v.z, to[4 * q + 3] = v.w;
    }
}

// Sums over the SPLIT lanes of a pair; lane part 0 has channel 0's, part SPLIT / 2 channel 1's (SPLIT 1: both).
template <int SPLIT> __device__ __forceinline__ void sum_parts(float (&x)[PAIR], int part) {
    if (SPLIT > 1) {
        bool upper = part >= SPLIT / 2;
        float sent = upper ? x[0] : x[1];
        float own = upper ? x[1] : x[0];
        own += __shfl_xor_sync(~0u, sent, SPLIT / 2);
#pragma unroll
        for (int step = SPLIT / 4; step > 0; step /= 2) own += __shfl_xor_sync(~0u, own, step);
        x[0] = own;
    }
}
// Writes what sum_parts left to the two neighbouring places `to`.
template <int SPLIT> __device__ __forceinline__ void put_parts(float *to, const float (&x)[PAIR], int part) {
    if (SPLIT == 1)
        *reinterpret_cast<float2 *>(to) = make_float2(x[0], x[1]);
    else if (part % (SPLIT > 1 ? SPLIT / 2 : 1) == 0)
        to[part ? 1 : 0] = x[0];
}
