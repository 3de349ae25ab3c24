// Activations and gates, elementwise, forward and backward; src/ops/activation has the formulas.
//
// Rows of `width` numbers each, which lie apart where they are slices of wider ones; a thread takes 16 bytes of every
// tensor (one number where rows do not begin on 16 bytes) and goes on a grid further. Bytes: every tensor once; memory is
// the floor.
#include "common/activation.cuh"

constexpr int THREADS = 256;

// A matrix, its rows `step` numbers apart.
struct Matrix {
    void *data;
    int64_t step;
};

// y = act(x) or, with z, x act(z); backward dx and dz of dy.
struct Call {
    Matrix x, z, y, dy, dx, dz;
    unsigned pieces, count; // of a row, of all rows
    int width;
};

template <int KIND> __device__ __forceinline__ float slope(float x) {
    if (KIND == SILU) return silu_slope(x, sigmoid(x));
    if (KIND == GELU)
        return fmaf(0.3989422804f * x, exp2_fast(-0.5f * LOG2E * x * x), 0.5f * (1.0f + erff(0.70710678f * x)));
    if (KIND == GELU_TANH) {
        float t = tanhf(0.7978845608f * fmaf(0.044715f * x * x, x, x));
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608f * fmaf(3.0f * 0.044715f * x, x, 1.0f);
    }
    if (KIND == RELU) return x > 0.0f ? 1.0f : 0.0f;
    return 1.0f;
}

template <typename E, int W> struct alignas(W * sizeof(E)) Piece {
    E at[W];
};

template <typename E, int W, typename F> __device__ __forceinline__ void each(const Call &p, F &&f) {
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < p.count; i += gridDim.x * THREADS) {
        unsigned row = i / p.pieces, column = (i - row * p.pieces) * W;
        auto at = [&](const Matrix &m) {
            return reinterpret_cast<Piece<E, W> *>(static_cast<E *>(m.data) + row * m.step + column);
        };
        f(at);
    }
}

template <typename E, int W, int KIND> __device__ void forward(const Call &p) {
    each<E, W>(p, [&](auto &at) {
        Piece<E, W> x = *at(p.x), z = {};
        if (p.z.data) z = *at(p.z);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float own = widen(x.at[k]);
            x.at[k] = narrow<E>(p.z.data ? own * value<KIND>(widen(z.at[k])) : value<KIND>(own));
        }
        *at(p.y) = x;
    });
}

template <typename E, int W, int KIND> __device__ void backward(const Call &p) {
    each<E, W>(p, [&](auto &at) {
        Piece<E, W> x = *at(p.x), d = *at(p.dy), z = {};
        if (p.z.data) z = *at(p.z);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            float own = widen(x.at[k]), gate = widen(z.at[k]), dy = widen(d.at[k]);
            if (p.z.data) z.at[k] = narrow<E>(dy * own * slope<KIND>(gate));
            x.at[k] = narrow<E>(dy * (p.z.data ? value<KIND>(gate) : slope<KIND>(own)));
        }
        *at(p.dx) = x;
        if (p.z.data) *at(p.dz) = z;
    });
}

#define KERNELS(E, W, WIDTH, KIND)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        activation_fwd_##E##_##WIDTH##_##KIND(const __grid_constant__ Call p) { take_turn(); forward<E, W, KIND>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        activation_bwd_##E##_##WIDTH##_##KIND(const __grid_constant__ Call p) { take_turn(); backward<E, W, KIND>(p); }
#define KINDS(E, W, WIDTH)                                                                                             \
    KERNELS(E, W, WIDTH, SILU)                                                                                         \
    KERNELS(E, W, WIDTH, GELU)                                                                                         \
    KERNELS(E, W, WIDTH, GELU_TANH)                                                                                    \
    KERNELS(E, W, WIDTH, RELU)                                                                                         \
    KERNELS(E, W, WIDTH, IDENTITY)
#define WIDTHS(E) KINDS(E, 16 / sizeof(E), pieces) KINDS(E, 1, singles)
WIDTHS(float)
WIDTHS(bf16)
WIDTHS(f16)
