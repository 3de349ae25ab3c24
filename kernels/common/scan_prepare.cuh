// The tile's numbers that the recurrence needs, as f32.
#pragma once
#include "scan.cuh"

// delta after bias and softplus, and of what else is asked for (not null): delta * u, and dy (times SiLU(z) if z is not
// null). Zero at padding and beyond the end.
template <typename E, int SPLIT>
__device__ void prepare(const Scan &p, const Place<SPLIT> &at, const Tile<E, SPLIT> &own, const E *u, const E *delta,
                        const E *z, const E *dy, float *step, float *input, float *slope, const float *bias,
                        const uint8_t *marks, int start) {
    using T = Tile<E, SPLIT>;
    float shift[T::WIDTH];
    load_floats(shift, bias + own.channel);
#pragma unroll
    for (int v = 0; v < T::OWN; ++v) {
        if (!own.has(v)) break;
        int i = threadIdx.x + v * THREADS, token = own.token + v * T::ROWS;
        bool live = own.live && start + token < at.end && !(p.marks && marks[token] == PAD);
        float d[T::WIDTH] = {}, x[T::WIDTH] = {};
        if (!live) {
            store_floats(step + i * T::WIDTH, d);
            if (input) store_floats(input + i * T::WIDTH, x);
            if (slope) store_floats(slope + i * T::WIDTH, x);
            continue;
        }
        Vector<E> dv = reinterpret_cast<const Vector<E> *>(delta)[i];
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k) d[k] = widen(dv.at[k]) + shift[k];
        if (p.softplus)
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) d[k] = softplus(d[k]);
        store_floats(step + i * T::WIDTH, d);
        if (input) {
            Vector<E> uv = reinterpret_cast<const Vector<E> *>(u)[i];
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) x[k] = d[k] * widen(uv.at[k]);
            store_floats(input + i * T::WIDTH, x);
        }
        if (slope) {
            Vector<E> gv = reinterpret_cast<const Vector<E> *>(dy)[i];
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) x[k] = widen(gv.at[k]);
            if (p.z.data) {
                Vector<E> zv = reinterpret_cast<const Vector<E> *>(z)[i];
#pragma unroll
                for (int k = 0; k < T::WIDTH; ++k) x[k] *= silu(widen(zv.at[k]));
            }
            store_floats(slope + i * T::WIDTH, x);
        }
    }
}

// The block's marks of the tokens from `start`; padding beyond the end. Whether this thread saw a beginning.
template <int SPLIT>
__device__ bool load_marks(const Scan &p, const Place<SPLIT> &at, uint8_t *marks, int start) {
    if (!p.marks || threadIdx.x >= TILE) return false;
    int t = start + threadIdx.x;
    marks[threadIdx.x] = t < at.end ? p.marks[int64_t(at.row) * p.length + t] : PAD;
    return marks[threadIdx.x] == START;
}

template <int SPLIT> __device__ void load_bias(const Scan &p, const Place<SPLIT> &at, float *bias) {
    for (int c = threadIdx.x; c < Place<SPLIT>::CHANNELS; c += THREADS)
        bias[c] = p.bias && c < at.count ? p.bias[at.first + c] : 0.0f;
}

// Defines the kernels NAME_E_S from FUNCTION<E, S>, with their dynamic shared memory beside them, for every element type
// and split.
#define SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, S)                                                               \
    extern "C" {                                                                                                        \
    __constant__ unsigned NAME##_##E##_##S##_memory = sizeof(MEMORY<E, S>);                                             \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                       \
        NAME##_##E##_##S(const __grid_constant__ Scan p) { FUNCTION<E, S>(p); }
#define SCAN_SPLITS(NAME, FUNCTION, MEMORY, BLOCKS, E)                                                                  \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, 1)                                                                   \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, 2)                                                                   \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, 4)                                                                   \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, 8)                                                                   \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, 16)                                                                  \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, E, 32)
#ifdef SCAN_ONLY_2
#define SCAN_KERNELS(NAME, FUNCTION, MEMORY, BLOCKS)                                                                    \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, float, 2)                                                               \
    SCAN_KERNEL(NAME, FUNCTION, MEMORY, BLOCKS, bf16, 2)
#else
#define SCAN_KERNELS(NAME, FUNCTION, MEMORY, BLOCKS)                                                                    \
    SCAN_SPLITS(NAME, FUNCTION, MEMORY, BLOCKS, float)                                                                  \
    SCAN_SPLITS(NAME, FUNCTION, MEMORY, BLOCKS, bf16)                                                                   \
    SCAN_SPLITS(NAME, FUNCTION, MEMORY, BLOCKS, f16)
#endif
