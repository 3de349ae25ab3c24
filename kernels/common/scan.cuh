// What the kernels of the selective scan share: arguments, the shape of a block, tiles of tokens in shared memory.
//
// A block owns CHANNELS neighbouring channels of one row of the batch and walks through tiles of TILE tokens. A state of
// N numbers is spread over SPLIT lanes with STATES numbers each, in registers; a lane carries PER channels, and what it
// reads of B and C serves all of them. Lanes of a warp: its channels with the first part of their states, then the next.
// Many numbers in a lane take the fewest instructions, few numbers the most lanes: a form is chosen by how many channels
// there are, see src/ops/selective_scan/cuda/plan.rs.
#pragma once
#include "types.cuh"

constexpr int THREADS = 128;
// Tokens of a tile at least, and between the states that forward keeps for backward.
constexpr int KEPT = 16;
constexpr int LONGEST_TILE = 2 * KEPT;
constexpr int LANES = 32;

// Marks of a token, as src/ops/segments.rs has them.
constexpr uint8_t START = 1;
constexpr uint8_t PAD = 2;

// A carried state whose weight has fallen to 2^-NEGLIGIBLE counts as forgotten: what f32 keeps and two bits more, what f16
// (11) and bf16 (8) keep and nine more.
template <typename E> constexpr float NEGLIGIBLE = 26.0f;
template <> constexpr float NEGLIGIBLE<f16> = 20.0f;
template <> constexpr float NEGLIGIBLE<bf16> = 17.0f;

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
    float *kept;                         // states before every KEPT tokens, [B, L / KEPT, D, N]
    float *carried;                      // states before (behind, going back) every piece, [B, slots, D, N]
    float *span;                         // sum of delta over the piece as far as it counts, [B, slots, D]
    float *sums;                         // shares of dB and dC, [blocks, B, L, 2N]
    float *da, *dd, *dbias;              // shares of the gradients, [B, chunks, D, N], [B, chunks, D] each
    int *handed;                         // whether a chain's state lies in `carried`, [B, blocks of all parts], zero at first
    int batch, length, channels, states;
    int part;      // channels that share their groups of B and of C; blocks lie within one part
    int blocks;    // blocks in a part
    int chunk;     // tokens in a chunk of time, a multiple of every TILE
    int pieces;    // of a chunk, of as many whole tiles each: what the walks that chain chunks have a block for
    int slots;     // pieces that hand something on, those of all chunks but the last (first, going back), and one more
    int share;     // tokens of a block where blocks take shares of all chains, whole longest tiles
    int softplus;
    int aligned;   // whether rows of all sequences can be read and written in 16-byte pieces
    int aligned_coefficients;
    // y before the gate, [B, L, D] of the sequences' type, contiguous: what backward needs of y where there is z.
    void *ungated;
};

// How the numbers of a state lie in lanes.
template <int PER_, int STATES_, int SPLIT_> struct Form {
    static constexpr int PER = PER_, STATES = STATES_, SPLIT = SPLIT_;
    static constexpr int OWNERS = LANES / SPLIT;           // lanes of a part in a warp
    static constexpr int CHANNELS = THREADS / SPLIT * PER; // of a block
    static constexpr int WIDTH = STATES * SPLIT;           // numbers of a state, with those beyond N
    static constexpr int TILE = PER * STATES <= 4 ? LONGEST_TILE : KEPT;
    using States = float[PER][STATES];
};

// Which channels, row and chunk a block has: grid (parts * blocks, batch, chunks); or which piece, with `skipped` before it.
template <typename F> struct Place {
    int first, count, row, chunk, chunks, begin, end;
    __device__ Place(const Scan &p) : Place(p, p.chunk, 0) {}
    __device__ Place(const Scan &p, int tokens, int skipped) {
        int part = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
        first = part * p.part + block * F::CHANNELS;
        count = min(F::CHANNELS, (part + 1) * p.part - first);
        row = blockIdx.y;
        chunk = blockIdx.z + skipped;
        chunks = (p.length + tokens - 1) / tokens;
        begin = chunk * tokens;
        end = min(begin + tokens, p.length);
    }
    // Of a chain, the channels of a block in one row of all `columns`, from one token to another.
    __device__ Place(const Scan &p, int columns, int chain, int begin, int end) : chunk(0), chunks(1), begin(begin), end(end) {
        row = chain / columns;
        int part = chain % columns / p.blocks, block = chain % columns % p.blocks;
        first = part * p.part + block * F::CHANNELS;
        count = min(F::CHANNELS, (part + 1) * p.part - first);
    }
    // The slot of the state before the chunk, or behind it, going back.
    __device__ int64_t slot(const Scan &p) const { return int64_t(row) * p.slots + chunk * p.pieces; }
};

// COUNT numbers between shared memory and registers, in pieces of up to 16 bytes.
template <int COUNT> __device__ __forceinline__ void load_floats(float (&to)[COUNT], const float *from) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int q = 0; q < COUNT / 4; ++q) {
            float4 v = reinterpret_cast<const float4 *>(from)[q];
            to[4 * q] = v.x, to[4 * q + 1] = v.y, to[4 * q + 2] = v.z, to[4 * q + 3] = v.w;
        }
    } else if constexpr (COUNT == 2) {
        float2 v = *reinterpret_cast<const float2 *>(from);
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = from[0];
    }
}
template <int COUNT> __device__ __forceinline__ void store_floats(float *to, const float (&from)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int q = 0; q < COUNT / 4; ++q)
            reinterpret_cast<float4 *>(to)[q] =
                make_float4(from[4 * q], from[4 * q + 1], from[4 * q + 2], from[4 * q + 3]);
    } else if constexpr (COUNT == 2) {
        *reinterpret_cast<float2 *>(to) = make_float2(from[0], from[1]);
    } else {
        to[0] = from[0];
    }
}

// Where the numbers of neighbouring channels lie in a row of f32 in shared memory: four words are free behind every 32, so
// that threads that write or read eight channels each, and lanes that read one or two, meet in different banks.
__device__ __forceinline__ constexpr int spot(int channel) { return channel + channel / 32 * 4; }

// What a lane knows of its channels.
template <typename F> struct Lane {
    int own, part, channel, live; // place among the block's lanes of a part, part of the state, first channel, live channels
    __device__ Lane(const Place<F> &at) {
        own = threadIdx.x / LANES * F::OWNERS + threadIdx.x % F::OWNERS;
        part = threadIdx.x % LANES / F::OWNERS;
        channel = at.first + own * F::PER;
        live = at.count - own * F::PER;
    }
    // This lane's part of row `channel + k` of a [.., D, N] tensor; zero where there is none.
    __device__ void load(typename F::States &to, const float *from, int n, float scale) const {
#pragma unroll
        for (int k = 0; k < F::PER; ++k) {
            const float *row = from + int64_t(channel + k) * n + part * F::STATES;
#pragma unroll
            for (int q = 0; q < F::STATES; q += 4) {
                int s = part * F::STATES + q;
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
    __device__ void store(float *to, const typename F::States &from, int n) const {
#pragma unroll
        for (int k = 0; k < F::PER; ++k) {
            float *row = to + int64_t(channel + k) * n + part * F::STATES;
#pragma unroll
            for (int q = 0; q < F::STATES; q += 4) {
                int s = part * F::STATES + q;
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
