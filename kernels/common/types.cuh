// Element types and the few scalar functions that the kernels share. Arithmetic is f32 throughout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

using bf16 = __nv_bfloat16;
using f16 = __half;

// The first thing that every kernel does: if it was launched before the one ahead of it has ended, it waits for that and for
// what it wrote; and it lets the next one's blocks come once its own are all there, so that the end of one and the beginning
// of the next may overlap (Launch::run_early in src/backend/cuda/launch.rs).
__device__ __forceinline__ void take_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

// Neighbouring elements that are read and written at once, as far as an access of 16 bytes goes.
__host__ __device__ constexpr int access(int bytes) { return bytes < 16 ? bytes : 16; }
template <typename E, int WIDTH> struct alignas(access(sizeof(E) * WIDTH)) Pack {
    E at[WIDTH];
};

// The elements of a pack; two bf16 of a word by a shift and a mask.
template <int COUNT, typename E> __device__ __forceinline__ void widen(float (&to)[COUNT], Pack<E, COUNT> from) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = widen(from.at[i]);
}
template <int COUNT> __device__ __forceinline__ void widen(float (&to)[COUNT], Pack<bf16, COUNT> from) {
#pragma unroll
    for (int i = 0; i + 1 < COUNT; i += 2) {
        uint32_t both;
        memcpy(&both, from.at + i, sizeof(both));
        to[i] = __uint_as_float(both << 16), to[i + 1] = __uint_as_float(both & 0xffff0000u);
    }
    if (COUNT % 2) to[COUNT - 1] = widen(from.at[COUNT - 1]);
}

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
// The same for numbers of type E: relative error 6e-5 where those have no more than 11 bits.
template <typename E> __device__ __forceinline__ float softplus_for(float x) {
    float e = exp2_fast(-LOG2E * fabsf(x));
    float q = 0.041347283f;
    q = fmaf(q, e, -0.157427167f);
    q = fmaf(q, e, 0.306300904f);
    q = fmaf(q, e, -0.496977800f);
    q = fmaf(q, e, 0.999943278f);
    return fmaf(q, e, fmaxf(x, 0.0f));
}
template <> __device__ __forceinline__ float softplus_for<float>(float x) { return softplus(x); }

// The derivative of softplus, sigmoid(x) = 1 - e^-y, from y = softplus(x), for numbers of type E: the first terms of a
// series where the difference would cancel.
template <typename E> __device__ __forceinline__ float softplus_slope(float y) {
    return y < 0.01f ? fmaf(-0.5f * y, y, y) : 1.0f - exp2_fast(-LOG2E * y);
}
template <> __device__ __forceinline__ float softplus_slope<float>(float y) {
    float q = -1.0f / 720;
    q = fmaf(q, y, 1.0f / 120);
    q = fmaf(q, y, -1.0f / 24);
    q = fmaf(q, y, 1.0f / 6);
    q = fmaf(q, y, -0.5f);
    q = fmaf(q, y, 1.0f);
    return y < 0.3f ? q * y : 1.0f - exp2_fast(-LOG2E * y);
}

// Asynchronous copy of 8 or 16 bytes from global to shared memory.
template <int BYTES = 16> __device__ __forceinline__ void copy_async(void *to, const void *from) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
