// Rotary position embedding of one or two sequences, queries and keys, in one pass; src/ops/rotary has the formula.
//
// Grid (tokens), 256 threads. A block finds the sines and cosines of its token once for all heads, in shared memory, and then
// turns 16 bytes of pairs at a time (single pairs where rows do not begin on 16 bytes). An angle is a
// number of turns in 64-bit fixed point, position times turns a position, of which whole turns fall off by overflow: exact at
// any position, without f64. A sequence may also be divided by the root of its head's sum of decays, s_t of RetNet.
//
// Bytes: every sequence read and written once; memory is the floor: 53 us of 45 for 8192 tokens of 8 heads of 256
// channels, bf16, on an H100. Shared memory: 3 KB.
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int MOST_PAIRS = 256;
constexpr int MOST_HEADS = 256;

// [B, L, H, K]; steps in elements, `to` is contiguous. An empty one has no heads.
struct Sequence {
    const void *from;
    void *to;
    int64_t row, token, head;
    int64_t heads;
};

struct Rotary {
    Sequence sequences[2];
    const int64_t *positions; // [B, L], or [L] if `shared`; null: `first` and so on in every row
    const float *log_decay;   // [H]: the first one is divided; or null
    int64_t first;
    int length, width, pairs; // L, K
    int shared, back;         // whether to turn back
    uint64_t turns[MOST_PAIRS]; // of a position, times 2^64
};

// The root of 1 + g + .. + g^position, reciprocal.
__device__ float divisor(float log, int64_t position) {
    float count = float(position + 1);
    return rsqrtf(log == 0.0f ? count : expm1f(count * log) / expm1f(log));
}

template <typename E, int W, bool INTERLEAVED> struct Turn {
    // Pairs of one access: neighbours lie in one vector, halves in two.
    static constexpr int PAIRS = INTERLEAVED && W > 1 ? W / 2 : W, VECTORS = INTERLEAVED && W > 1 ? 1 : 2;
    struct alignas(W * sizeof(E)) Part {
        E at[W];
    };

    static __device__ __forceinline__ void turn(E &a, E &b, float cos, float sin, float scale) {
        float x = scale * widen(a), y = scale * widen(b);
        a = narrow<E>(x * cos - y * sin);
        b = narrow<E>(x * sin + y * cos);
    }

    // Piece `i` of a head: pairs, or what lies behind them.
    static __device__ __forceinline__ void piece(const Rotary &p, const E *from, E *to, int i, const float2 *angles,
                                                 float scale) {
        int pieces = p.pairs / PAIRS;
        Part x[VECTORS];
        if (i >= pieces) {
            int place = 2 * p.pairs + (i - pieces) * W;
            x[0] = *reinterpret_cast<const Part *>(from + place);
#pragma unroll
            for (int k = 0; k < W; ++k) x[0].at[k] = narrow<E>(scale * widen(x[0].at[k]));
            *reinterpret_cast<Part *>(to + place) = x[0];
            return;
        }
        int pair = i * PAIRS, places[2] = {pair, pair + p.pairs};
        if (INTERLEAVED) places[0] = 2 * pair, places[1] = 2 * pair + 1;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) x[v] = *reinterpret_cast<const Part *>(from + places[v]);
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
            float2 angle = angles[pair + k];
            if (VECTORS == 1)
                turn(x[0].at[2 * k % W], x[0].at[(2 * k + 1) % W], angle.x, angle.y, scale);
            else
                turn(x[0].at[k], x[VECTORS - 1].at[k], angle.x, angle.y, scale);
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Part *>(to + places[v]) = x[v];
    }

    static __device__ void run(const Rotary &p) {
        __shared__ float2 angles[MOST_PAIRS];
        __shared__ float divisors[MOST_HEADS];
        int64_t token = blockIdx.x, row = token / p.length, place = token - row * p.length;
        int64_t position = p.positions ? p.positions[p.shared ? place : token] : p.first + place;
        for (int pair = threadIdx.x; pair < p.pairs; pair += THREADS) {
            // signed half turns, of which 32 bits are as exact as an f32 can tell
            int phase = int(uint64_t(position) * p.turns[pair] >> 32);
            float sin, cos;
            sincospif(float(phase) * 4.656612873077393e-10f, &sin, &cos); // 2^-31
            angles[pair] = make_float2(cos, p.back ? -sin : sin);
        }
        if (p.log_decay)
            for (int head = threadIdx.x; head < p.sequences[0].heads; head += THREADS)
                divisors[head] = divisor(p.log_decay[head], position);
        __syncthreads();
        int pieces = p.pairs / PAIRS + (p.width - 2 * p.pairs) / W;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const Sequence &s = p.sequences[n];
            const E *from = static_cast<const E *>(s.from) + row * s.row + place * s.token;
            E *to = static_cast<E *>(s.to) + token * s.heads * p.width;
            for (int i = threadIdx.x; i < s.heads * pieces; i += THREADS) {
                int head = i / pieces;
                float scale = n == 0 && p.log_decay ? divisors[head] : 1.0f;
                piece(p, from + head * s.head, to + head * p.width, i - head * pieces, angles, scale);
            }
        }
    }
};

#define KERNEL(E, NAME, W, STYLE, INTERLEAVED)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS) rotary_##E##_##NAME##_##STYLE(const __grid_constant__ Rotary p) {\
        take_turn();                                                                                                   \
        Turn<E, W, INTERLEAVED>::run(p);                                                                               \
    }
#define KERNELS(E)                                                                                                     \
    KERNEL(E, pieces, 16 / sizeof(E), half, false)                                                                     \
    KERNEL(E, pieces, 16 / sizeof(E), interleaved, true)                                                               \
    KERNEL(E, pairs, 1, half, false)                                                                                   \
    KERNEL(E, pairs, 1, interleaved, true)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
