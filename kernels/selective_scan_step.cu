// A few tokens of the selective scan through a state: the step of generation.
//
// Grid (channels over blocks, rows in turns), 128 threads. A state of N numbers is spread over SPLIT lanes with four numbers each,
// in registers; neighbouring lanes read neighbouring numbers, 16 bytes at a time where N is a multiple of four. No shared
// memory. The lanes of a channel share its inputs, which are few.
//
// Bytes: the state, read and written once (8 B D N); all else is small. That is the floor: 0.11 ms at B 512, D 5120, N 16
// on an H100; measured 0.17 ms and more. Faster: more bytes of state in flight a thread, and the state in place.
#include "common/scan.cuh"

constexpr int NUMBERS = 4;

// Four numbers from `place` on, of which `n` exist.
__device__ void load_four(float (&to)[NUMBERS], const float *from, int64_t place, int n, bool whole) {
    if (whole) {
        float4 v = *reinterpret_cast<const float4 *>(from + place);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) to[i] = i < n ? from[place + i] : 0.0f;
    }
}

// Four numbers of B or C, as load_four.
template <typename E>
__device__ void load_coefficients(float (&to)[NUMBERS], const Coefficient &x, int64_t place, int n, bool whole) {
    if (x.wide) {
        load_four(to, static_cast<const float *>(x.data), place, n, whole);
        return;
    }
    struct alignas(sizeof(E) * NUMBERS) Four {
        E at[NUMBERS];
    };
    const E *from = static_cast<const E *>(x.data) + place;
    Four v = {};
    if (whole) v = *reinterpret_cast<const Four *>(from);
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) to[i] = whole ? widen(v.at[i]) : i < n ? widen(from[i]) : 0.0f;
}

template <typename E, int SPLIT> __device__ void step(const Scan &p) {
    int part = threadIdx.x % SPLIT, channel = blockIdx.x * (THREADS / SPLIT) + threadIdx.x / SPLIT;
    bool live = channel < p.channels;
    if (!live) channel = p.channels - 1;
    int own = max(0, min(NUMBERS, p.states - part * NUMBERS));
    bool whole = p.states % NUMBERS == 0 && own == NUMBERS;
    float a[NUMBERS];
    load_four(a, p.a, int64_t(channel) * p.states + part * NUMBERS, own, whole);
    float bias = p.bias ? p.bias[channel] : 0.0f, skip = p.d ? p.d[channel] : 0.0f;
    int64_t first_b = channel / p.b.width * p.b.group + part * NUMBERS;
    int64_t first_c = channel / p.c.width * p.c.group + part * NUMBERS;
    for (int row = blockIdx.y; row < p.batch; row += gridDim.y) {
        int64_t state = (int64_t(row) * p.channels + channel) * p.states + part * NUMBERS;
        float h[NUMBERS] = {};
        if (p.initial) load_four(h, p.initial, state, own, whole);
        for (int t = 0; t < p.length; ++t) {
            auto at = [&](const Sequence &s) {
                return static_cast<E *>(s.data) + row * s.row + t * s.token + channel;
            };
            uint8_t mark = p.marks ? p.marks[int64_t(row) * p.length + t] : 0;
            float y = 0.0f;
            if (mark != PAD) {
                float u = widen(*at(p.u)), delta = widen(*at(p.delta)) + bias, bt[NUMBERS], ct[NUMBERS];
                float gate = p.z.data ? silu(widen(*at(p.z))) : 1.0f;
                bool vectors = whole && p.aligned_coefficients;
                load_coefficients<E>(bt, p.b, row * p.b.row + t * p.b.token + first_b, own, vectors);
                load_coefficients<E>(ct, p.c, row * p.c.row + t * p.c.token + first_c, own, vectors);
                if (p.softplus) delta = softplus(delta);
#pragma unroll
                for (int i = 0; i < NUMBERS; ++i) {
                    float decay = mark == START ? 0.0f : exp2_fast(LOG2E * delta * a[i]);
                    h[i] = fmaf(decay, h[i], delta * u * bt[i]);
                    y = fmaf(h[i], ct[i], y);
                }
#pragma unroll
                for (int lanes = SPLIT / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(~0u, y, lanes);
                y = fmaf(skip, u, y) * gate;
            }
            if (live && part == 0) *at(p.y) = narrow<E>(y);
        }
        if (!live) continue;
        if (whole) {
            *reinterpret_cast<float4 *>(p.state + state) = make_float4(h[0], h[1], h[2], h[3]);
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i)
                if (i < own) p.state[state + i] = h[i];
        }
    }
}

#define KERNEL(E, S)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        selective_scan_step_##E##_##S(const __grid_constant__ Scan p) { step<E, S>(p); }
#define SPLITS(E) KERNEL(E, 1) KERNEL(E, 2) KERNEL(E, 4) KERNEL(E, 8) KERNEL(E, 16) KERNEL(E, 32)
SPLITS(float)
SPLITS(bf16)
SPLITS(f16)
