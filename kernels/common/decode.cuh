// What the kernels of decoding share.
#pragma once
#include "types.cuh"

constexpr int LANES = 32;

// Programmatic launch: a kernel may begin while the one before it still runs, and waits here for all of its results.
// Without that attribute of the launch, or before Hopper, both do nothing.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// 16 bytes that are read once.
template <typename E> __device__ __forceinline__ Vector<E> load_streaming(const E *from) {
    int4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return *reinterpret_cast<Vector<E> *>(&v);
}
