// The tile's numbers that the recurrence needs, as f32.
#pragma once
#include "scan_tiles.cuh"

// What a walk reads of a token: for the PER channels of a lane their steps delta, then their inputs.
template <typename F> struct Inputs {
    // The last words that are free keep apart two tokens that eight threads share.
    static constexpr int LAST = F::CHANNELS < 64 ? 0 : 4;
    static constexpr int TOKEN = spot(2 * F::CHANNELS) - LAST, SIZE = F::TILE * TOKEN;
    // A token's row of what there is one of for every channel.
    static constexpr int ROW = spot(F::CHANNELS) - LAST;

    // The place of a lane's channels in a token's row.
    static __device__ __forceinline__ int place(int own) { return spot(own * 2 * F::PER); }
    // Where channel k of a pack has its step among the pack's numbers; its input is PER further.
    static __device__ __forceinline__ constexpr int mixed(int k) { return k / F::PER * 2 * F::PER + k % F::PER; }
};

// What stands beside the steps: inputs, or gradients, or inputs with the gradients apart.
enum Beside { INPUTS, GRADIENTS, BOTH };

// delta after bias and softplus, and beside it delta * u or dy (times SiLU(z) if there is z); of BOTH, the latter into
// `gradients`. Zero at padding and beyond the end.
template <Beside BESIDE, bool WHOLE, typename E, typename F>
__device__ __forceinline__ void prepare(const Scan &p, const Place<F> &at, const Tile<E, F> &own, const E *u,
                                        const E *delta, const E *z, const E *dy, float *inputs, float *gradients,
                                        const float *bias, const uint8_t *marks, int start) {
    using T = Tile<E, F>;
    constexpr int W = T::WIDTH;
    float shift[W];
    load_floats(shift, bias + own.channel);
#pragma unroll
    for (int v = 0; v < T::OWN; ++v) {
        if (!WHOLE && !own.has(v)) break;
        int token = own.token + v * T::ROWS;
        float *to = inputs + token * Inputs<F>::TOKEN, *to_gradients = gradients + token * Inputs<F>::ROW;
        if (!WHOLE && (!own.live || start + token >= at.end || (p.marks && marks[token] == PAD))) {
            float none[2 * W] = {}, no_gradients[W] = {};
            store_floats(to + spot(2 * own.channel), none);
            if (BESIDE == BOTH) store_floats(to_gradients + spot(own.channel), no_gradients);
            continue;
        }
        float d[W], g[W], mixed[2 * W];
        widen(d, T::get(delta, v));
#pragma unroll
        for (int k = 0; k < W; ++k) d[k] += shift[k];
        if (WHOLE || p.softplus)
#pragma unroll
            for (int k = 0; k < W; ++k) d[k] = softplus_for<E>(d[k]);
        if (BESIDE != INPUTS) {
            widen(g, T::get(dy, v));
            if (WHOLE || p.z.data) {
                float gate[W];
                widen(gate, T::get(z, v));
#pragma unroll
                for (int k = 0; k < W; ++k) g[k] *= silu(gate[k]);
            }
            if (BESIDE == BOTH) store_floats(to_gradients + spot(own.channel), g);
        }
        if (BESIDE != GRADIENTS) {
            float x[W];
            widen(x, T::get(u, v));
#pragma unroll
            for (int k = 0; k < W; ++k) mixed[Inputs<F>::mixed(k) + F::PER] = d[k] * x[k];
        } else {
#pragma unroll
            for (int k = 0; k < W; ++k) mixed[Inputs<F>::mixed(k) + F::PER] = g[k];
        }
#pragma unroll
        for (int k = 0; k < W; ++k) mixed[Inputs<F>::mixed(k)] = d[k];
        store_floats(to + spot(2 * own.channel), mixed);
    }
}

// The block's marks of the tokens from `start`; padding beyond the end. Whether this thread saw a beginning.
template <typename F>
__device__ bool load_marks(const Scan &p, const Place<F> &at, uint8_t *marks, int start) {
    if (!p.marks || threadIdx.x >= F::TILE) return false;
    int t = start + threadIdx.x;
    marks[threadIdx.x] = t < at.end ? p.marks[int64_t(at.row) * p.length + t] : PAD;
    return marks[threadIdx.x] == START;
}

template <typename F> __device__ void load_bias(const Scan &p, const Place<F> &at, float *bias) {
    for (int c = threadIdx.x; c < F::CHANNELS; c += THREADS)
        bias[c] = p.bias && c < at.count ? p.bias[at.first + c] : 0.0f;
}

// Defines the kernel NAME_E_<PER>x<STATES>x<SPLIT> from FUNCTION<E, Form>, with its dynamic shared memory beside it, for
// BLOCKS of them on a multiprocessor.
#define SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, P, N, S)                                                        \
    extern "C" {                                                                                                       \
    __constant__ unsigned NAME##_##E##_##P##x##N##x##S##_memory = sizeof(MEMORY<E, Form<P, N, S>>);                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        NAME##_##E##_##P##x##N##x##S(const __grid_constant__ Scan p) { take_turn(); FUNCTION<E, Form<P, N, S>>(p); }
