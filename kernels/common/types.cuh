// Element types and the few scalar functions that the kernels share. Arithmetic is f32 throughout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <typename E> __device__ __forceinline__ E narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { return __float2half_rn(x); }

// 16 bytes of elements.
template <typename E> struct alignas(16) Vector {
    static constexpr int SIZE = 16 / sizeof(E);
    E at[SIZE];
};

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// 2^x by the special function unit: relative error below 2^-22, zero below 2^-126.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / (1 + e^-x)
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-LOG2E * x)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// The derivative of SiLU, s being sigmoid(x).
__device__ __forceinline__ float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|; log1p(e) / e by a polynomial on (0, 1], relative error 2e-7.
__device__ __forceinline__ float softplus(float x) {
    float e = exp2_fast(-LOG2E * fabsf(x));
    float q = 0.005232623778f;
    q = fmaf(q, e, -0.029504956678f);
    q = fmaf(q, e, 0.078225493431f);
    q = fmaf(q, e, -0.136632069945f);
    q = fmaf(q, e, 0.191059887409f);
    q = fmaf(q, e, -0.248429775238f);
    q = fmaf(q, e, 0.333190947771f);
    q = fmaf(q, e, -0.499994933605f);
    q = fmaf(q, e, 0.999999940395f);
    return fmaf(q, e, fmaxf(x, 0.0f));
}
// Its derivative, sigmoid(x), from y = softplus(x).
__device__ __forceinline__ float softplus_slope(float x, float y) { return exp2_fast(LOG2E * (x - y)); }

// Asynchronous copy of 16 bytes from global to shared memory.
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
