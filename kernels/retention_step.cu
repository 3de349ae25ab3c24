// A few tokens of retention through a state: the step of generation; src/ops/retention has the formula.
//
// Grid (slices of 32 values, batch * heads), 512 threads: eight threads share a row of the slice, 64 rows are read at once,
// and a thread keeps its 4 values of ROWS keys in registers through all tokens. Queries and keys are widened into shared
// memory once a token; outputs are summed over keys by shuffles and 2 KB of shared memory.
//
// Bytes: the state, read and written once (8 B H K V); all else is small. That is the floor: 178 us at B 64, H 8, K 256,
// V 512 on an H100, of which this takes 197 (184 with slices of 128 values, which leave a batch of 1 without blocks).
#include "common/retention.cuh"

constexpr int THREADS = 512;
constexpr int BLOCKS = 2; // on a multiprocessor, at least
constexpr int WIDTH = 4;
constexpr int ACROSS = 8;
constexpr int DOWN = THREADS / ACROSS;
constexpr int SLICE = ACROSS * WIDTH;
constexpr int WARPS = THREADS / LANES;

template <typename E, int KEYS> __device__ void step(const Retention &p) {
    constexpr int ROWS = KEYS / DOWN;
    __shared__ float sums[WARPS][SLICE], queries[KEYS], keys[KEYS];
    int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS, warp = threadIdx.x / LANES;
    Place at(p, SLICE);
    int value = at.first_value + across * WIDTH, count = p.values - value; // not clamped, see selective_scan_step.cu
    bool whole = p.values % WIDTH == 0 && count > 0;
    const float *initial = p.initial ? p.initial + at.state(p) : nullptr;
    float s[ROWS][WIDTH] = {};
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
        int key = down + n * DOWN;
        if (!initial || key >= p.keys) continue;
        const float *from = initial + int64_t(key) * p.values + value;
        if (whole) {
            float4 x = *reinterpret_cast<const float4 *>(from);
            s[n][0] = x.x, s[n][1] = x.y, s[n][2] = x.z, s[n][3] = x.w;
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) s[n][i] = i < count ? from[i] : 0.0f;
        }
    }
    for (int token = 0; token < p.length; ++token) {
        const E *q = p.q.at<E>(at.row, at.head) + token * p.q.token;
        const E *k = p.k.at<E>(at.row, at.head) + token * p.k.token;
        const E *v = p.v.at<E>(at.row, at.head) + token * p.v.token + value;
        bool live = at.mark(p, token) != PAD;
        if (threadIdx.x < KEYS) {
            bool exists = live && threadIdx.x < p.keys;
            queries[threadIdx.x] = exists ? widen(q[threadIdx.x]) : 0.0f;
            keys[threadIdx.x] = exists ? widen(k[threadIdx.x]) : 0.0f;
        }
        float o[WIDTH] = {}, x[WIDTH], decay = Decay(p, at, token).factor();
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) x[i] = live && i < count ? widen(v[i]) : 0.0f;
        __syncthreads();
        if (live) {
#pragma unroll
            for (int n = 0; n < ROWS; ++n) {
                float a = keys[down + n * DOWN], b = queries[down + n * DOWN];
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    s[n][i] = fmaf(decay, s[n][i], a * x[i]);
                    o[i] = fmaf(b, s[n][i], o[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
            for (int lanes = ACROSS; lanes < LANES; lanes *= 2) o[i] += __shfl_xor_sync(~0u, o[i], lanes);
            if (threadIdx.x % LANES < ACROSS) sums[warp][across * WIDTH + i] = o[i];
        }
        __syncthreads();
        if (threadIdx.x < SLICE && at.first_value + threadIdx.x < p.values) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < WARPS; ++i) sum += sums[i][threadIdx.x];
            E *to = p.o.at<E>(at.row, at.head) + token * p.o.token + at.first_value + threadIdx.x;
            *to = narrow<E>(p.outer * sum);
        }
        if (token + 1 < p.length) __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < ROWS; ++n) {
        int key = down + n * DOWN;
        if (key >= p.keys) continue;
        float *to = p.state + at.state(p) + int64_t(key) * p.values + value;
        if (whole) {
            *reinterpret_cast<float4 *>(to) = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
                if (i < count) to[i] = s[n][i];
        }
    }
}

#define KERNEL(E, KEYS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        retention_step_##E##_##KEYS(const __grid_constant__ Retention p) { take_turn(); step<E, KEYS>(p); }
#define KERNELS(E) KERNEL(E, 64) KERNEL(E, 128) KERNEL(E, 256) KERNEL(E, 512)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
