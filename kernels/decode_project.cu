// The products of one step of decoding: up to 8 rows against a matrix of weights, [O, K], read once.
//
//   project       y = x W^T + bias
//   normed        the same of x = norm(residual + update), the sum left in `sum`
// and, where `taps` are given (the mixer's first projection), the causal convolution with SiLU of the first D outputs as
// soon as they are there, through a pool of states: row r is token r % T of sequence r / T, whose state is slots[r / T].
//
// Grid: OUT outputs for every `split` warps, 8 warps a block. Lanes go through K in steps of 16 bytes; `split` warps share
// one output's K where there are few outputs. normed: every block takes the norm for itself, from L2, into shared memory
// (R K elements), while its first weights are on their way. A block lets the next kernel begin at once (programmatic
// launch): what comes before wait_for_previous() reads nothing that another kernel wrote.
//
// Bytes: O K weights, once; all else is small and in L2. Registers: 40 to 120.
#include "common/decode.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;
constexpr int TAPS = 4;

struct Project {
    const void *x;                     // [R, K]; normed: the residual stream, f32 if `wide`
    const void *update;                // normed: [R, K], added to it; or null
    void *sum;                         // normed: [R, K] as the stream; or null
    const float *norm, *norm_bias;     // normed: [K] each; the bias may be null
    const void *weight, *bias;         // [O, K], [O] or null
    void *y;                           // [R, O]
    const float *taps, *shift;         // [D, taps], [D] or null
    float *window;                     // [slots, D, taps - 1]
    void *u;                           // [R, D]
    const int *slots;                  // [R / T]; below zero: idle
    int rows, inputs, outputs, split;
    int wide, layer, outside;
    float eps;
    int channels, filter, tokens, keep; // D, taps, T, whether the states move on
};

// Sums of ROWS numbers over the block.
template <int ROWS> __device__ void block_sums(float (&x)[ROWS], float (*shares)[WARPS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] = warp_sum(x[r]);
    __syncthreads();
    if (threadIdx.x % LANES == 0)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) shares[r][threadIdx.x / LANES] = x[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        x[r] = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) x[r] += shares[r][w];
    }
}

// norm(residual + update) of all rows, as elements, into `to`.
template <typename E, int ROWS> __device__ void take_norm(const Project &p, E *to) {
    __shared__ float shares[ROWS][WARPS];
    auto value = [&](int r, int k) {
        int64_t i = int64_t(r) * p.inputs + k;
        float x = p.wide ? static_cast<const float *>(p.x)[i] : widen(static_cast<const E *>(p.x)[i]);
        if (p.update) x += widen(static_cast<const E *>(p.update)[i]);
        return p.wide ? x : widen(narrow<E>(x));
    };
    float mean[ROWS] = {}, square[ROWS] = {};
    if (p.layer) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < p.rows)
                for (int k = threadIdx.x; k < p.inputs; k += THREADS) mean[r] += value(r, k);
        block_sums<ROWS>(mean, shares);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) mean[r] /= p.inputs;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
        if (r < p.rows)
#pragma unroll 4
            for (int k = threadIdx.x; k < p.inputs; k += THREADS) {
                float x = value(r, k);
                // the block's first turn through the numbers is the one that leaves the sum
                if (p.sum && blockIdx.x == 0) {
                    int64_t i = int64_t(r) * p.inputs + k;
                    if (p.wide)
                        static_cast<float *>(p.sum)[i] = x;
                    else
                        static_cast<E *>(p.sum)[i] = narrow<E>(x);
                }
                x -= mean[r];
                square[r] = fmaf(x, x, square[r]);
            }
    block_sums<ROWS>(square, shares);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (r >= p.rows) break;
        float variance = square[r] / p.inputs;
        float scale = 1.0f / (p.outside ? sqrtf(variance) + p.eps : sqrtf(variance + p.eps));
#pragma unroll 4
        for (int k = threadIdx.x; k < p.inputs; k += THREADS) {
            float n = (value(r, k) - mean[r]) * scale;
            if (!p.layer) n = widen(narrow<E>(n));
            to[r * p.inputs + k] = narrow<E>(fmaf(n, p.norm[k], p.norm_bias ? p.norm_bias[k] : 0.0f));
        }
    }
    __syncthreads();
}

// What the lane of one output and one sequence has of the convolution.
struct Filter {
    float tap[TAPS], window[TAPS - 1], shift;
    int slot;
    bool live;

    __device__ void load_taps(const Project &p, int channel, bool any) {
        live = any && p.taps && channel < p.channels;
        if (!live) return;
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            int own = k - (TAPS - p.filter);
            tap[k] = own >= 0 ? p.taps[int64_t(channel) * p.filter + own] : 0.0f;
        }
        shift = p.shift ? p.shift[channel] : 0.0f;
    }
    __device__ float *place(const Project &p, int channel) const {
        return p.window + (int64_t(slot) * p.channels + channel) * (p.filter - 1);
    }
    __device__ void load_window(const Project &p, int channel, int sequence) {
        if (!live) return;
        slot = p.slots[sequence];
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k) {
            int own = k - (TAPS - p.filter);
            window[k] = own >= 0 && slot >= 0 ? place(p, channel)[own] : 0.0f;
        }
    }
    __device__ float next(float x) {
        float sum = fmaf(tap[TAPS - 1], x, shift);
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k) sum = fmaf(tap[k], window[k], sum);
#pragma unroll
        for (int k = 0; k + 2 < TAPS; ++k) window[k] = window[k + 1];
        window[TAPS - 2] = x;
        return silu(sum);
    }
    __device__ void store_window(const Project &p, int channel) const {
        if (!live || slot < 0) return;
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k) {
            int own = k - (TAPS - p.filter);
            if (own >= 0) place(p, channel)[own] = window[k];
        }
    }
};

template <typename E, int ROWS, bool NORMED> __device__ void project(const Project &p) {
    // outputs of a warp, and 16-byte pieces of each on their way at once
    constexpr int OUT = ROWS == 1 ? 1 : ROWS <= 4 ? 2 : 4;
    constexpr int AHEAD = ROWS == 1 ? 4 : ROWS <= 4 ? 2 : 1;
    constexpr int WIDTH = Vector<E>::SIZE;
    extern __shared__ __align__(16) char bytes[];
    __shared__ float shares[WARPS][OUT * ROWS];
    E *normed = reinterpret_cast<E *>(bytes);
    let_next_begin();
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, part = warp % p.split;
    int first = ((blockIdx.x * WARPS + warp) / p.split) * OUT;
    int step = p.split * LANES * WIDTH, begin = (part * LANES + lane) * WIDTH;
    const E *weight = static_cast<const E *>(p.weight) + int64_t(first) * p.inputs;
    Vector<E> w[AHEAD][OUT];
    auto fetch = [&](int k) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
            for (int j = 0; j < OUT; ++j) {
                bool there = k + a * step < p.inputs && first + j < p.outputs;
                w[a][j] = there ? load_streaming(weight + int64_t(j) * p.inputs + k + a * step) : Vector<E>{};
            }
    };
    fetch(begin);
    // the lane of output lane / sequences and sequence lane % sequences
    int sequences = p.tokens ? p.rows / p.tokens : 1, own = lane / sequences, sequence = lane % sequences;
    Filter filter;
    filter.load_taps(p, first + own, own < OUT && first + own < p.outputs && part == 0);
    wait_for_previous();
    filter.load_window(p, first + own, sequence);
    if (NORMED) take_norm<E, ROWS>(p, normed);
    const E *x = NORMED ? normed : static_cast<const E *>(p.x);
    float sums[OUT][ROWS] = {};
    for (int k = begin; k < p.inputs; k += AHEAD * step) {
        if (k != begin) fetch(k);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            if (k + a * step >= p.inputs) break;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (r >= p.rows) break;
                Vector<E> v = *reinterpret_cast<const Vector<E> *>(x + int64_t(r) * p.inputs + k + a * step);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    float value = widen(v.at[i]);
#pragma unroll
                    for (int j = 0; j < OUT; ++j) sums[j][r] = fmaf(widen(w[a][j].at[i]), value, sums[j][r]);
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < OUT; ++j)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[j][r] = warp_sum(sums[j][r]);
    if (p.split > 1) {
        if (lane == 0)
#pragma unroll
            for (int j = 0; j < OUT; ++j)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) shares[warp][j * ROWS + r] = sums[j][r];
        __syncthreads();
        if (part) return;
#pragma unroll
        for (int j = 0; j < OUT; ++j)
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                sums[j][r] = 0.0f;
                for (int s = 0; s < p.split; ++s) sums[j][r] += shares[warp + s][j * ROWS + r];
            }
    }
    if (own >= OUT || first + own >= p.outputs) return;
    int output = first + own, tokens = p.tokens ? p.tokens : p.rows;
    float bias = p.bias ? widen(static_cast<const E *>(p.bias)[output]) : 0.0f;
    for (int t = 0; t < tokens; ++t) {
        int row = sequence * tokens + t;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < OUT; ++j)
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (j == own && r == row) sum = sums[j][r];
        E y = narrow<E>(sum + bias);
        static_cast<E *>(p.y)[int64_t(row) * p.outputs + output] = y;
        if (filter.live) static_cast<E *>(p.u)[int64_t(row) * p.channels + output] = narrow<E>(filter.next(widen(y)));
    }
    if (p.keep) filter.store_window(p, output);
}

#define KERNEL(E, ROWS)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        decode_project_##E##_##ROWS(const __grid_constant__ Project p) { project<E, ROWS, false>(p); }                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        decode_normed_##E##_##ROWS(const __grid_constant__ Project p) { project<E, ROWS, true>(p); }
#define KERNELS(E) KERNEL(E, 1) KERNEL(E, 2) KERNEL(E, 4) KERNEL(E, 8)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
