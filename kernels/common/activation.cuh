// The activations of feed-forward layers and gates.
#pragma once
#include "types.cuh"

// The kinds of src/ops/activation, in its order.
enum Activation { SILU, GELU, GELU_TANH, RELU, IDENTITY };

template <int KIND> __device__ __forceinline__ float value(float x) {
    if (KIND == SILU) return silu(x);
    if (KIND == GELU) return 0.5f * x * (1.0f + erff(0.70710678f * x));
    if (KIND == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608f * fmaf(0.044715f * x * x, x, x)));
    if (KIND == RELU) return fmaxf(x, 0.0f);
    return x;
}
// The one that a call names.
__device__ __forceinline__ float activated(int kind, float x) {
    switch (kind) {
    case SILU: return value<SILU>(x);
    case GELU: return value<GELU>(x);
    case GELU_TANH: return value<GELU_TANH>(x);
    case RELU: return value<RELU>(x);
    default: return x;
    }
}
