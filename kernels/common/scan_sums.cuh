// How the lanes of a warp add up what each of them has a share of.
#pragma once
#include "scan.cuh"

constexpr __host__ __device__ int at_least_one(int x) { return x < 1 ? 1 : x; }

// Which places of four numbers change with each other in a copy of B and C, and between lanes: by the bits of `copy`.
__device__ __forceinline__ constexpr int turned(int copy) { return copy % 2 * 2 + copy / 2 % 2; }

// Adds up COUNT numbers of every lane over the lanes that differ in the bits from STEP up to END. At each bit a lane gives one
// half of its numbers to the other lane and adds what it gets to the half it keeps; the last one goes both ways. A lane in
// whose numbers the halves are `turned` by the bits below TURNED already always keeps the first.
template <int COUNT, int STEP, int END, int TURNED = 1>
__device__ __forceinline__ void share_out(float (&sums)[at_least_one(COUNT * STEP / END)], const float (&x)[COUNT]) {
    constexpr unsigned ALL = ~0u;
    if constexpr (STEP >= END) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[i] = x[i];
    } else if constexpr (COUNT > 1) {
        constexpr int HALF = COUNT / 2;
        bool second = STEP >= TURNED && threadIdx.x & STEP;
        float half[HALF];
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            float give = second ? x[i] : x[i + HALF], keep = second ? x[i + HALF] : x[i];
            half[i] = keep + __shfl_xor_sync(ALL, give, STEP);
        }
        share_out<HALF, 2 * STEP, END, TURNED>(sums, half);
    } else {
        float sum[1] = {x[0] + __shfl_xor_sync(ALL, x[0], STEP)};
        share_out<1, 2 * STEP, END, TURNED>(sums, sum);
    }
}

// The first of the COUNT numbers that a lane has the sums of then.
template <int COUNT, int STEP, int END> __device__ __forceinline__ int share(int lane) {
    int first = 0;
#pragma unroll
    for (int step = STEP, half = COUNT / 2; step < END && half; step *= 2, half /= 2) first += lane & step ? half : 0;
    return first;
}
