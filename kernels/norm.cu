// RMS norm and layer norm, plain, with a residual sum or a gate, forward and backward; src/ops/norm has the formulas.
//
// A team (8 to 256 threads of a block of 256, by how wide a group is) normalises one group of channels of one row after
// another: see common/norm.cuh. Grid (teams over blocks, groups); team t takes rows t, t + teams, .. Backward adds up its
// shares of dweight and dbias over them, then those of a block in order, and norm_sum those of all blocks in order.
//
// Bytes: every tensor once, forward and backward; memory is the floor. Shared memory: 16 bytes of each tensor a thread and
// item, twice in backward where that fits 80 KB.
// Registers: up to 64 forward, mostly 128 backward, without spills on Hopper. One H200, calls in a row over more data
// than its L2 cache holds, share of the speed of a copy of as many bytes in the same run (of a copy of 512 MB, 4.19
// TB/s): B8 L2048 D768, bf16, rms_norm 0.0172 ms, 85% (70%), layer_norm 0.0194, add_norm 0.0288, 92% (83%), gated_norm
// 0.0227, 91% (79%); f32 rms_norm 0.0287, 93% (84%). Backward alone, bf16 0.0358 (50%), 0.061 (59%) and 0.051 (59%), f32
// 0.056 (65%): its instructions bind, which 16 warps issue every other clock. Faster still: kernels without the shares of
// a bias that is not there.
#include "common/norm.cuh"

template <typename E, typename R, int WIDTH, int ITEMS, int TEAM>
__device__ void Team<E, R, WIDTH, ITEMS, TEAM>::forward() {
    using Stage = typename Own::Forward;
    auto ask = [&](Stage &to, int64_t row) {
        load(to.x, p.x, row);
        if (summed) load(to.second, p.residual, row);
        if (gated) load(to.z(), p.z, row);
    };
    each<Stage>(ask, [&](Stage &stage) {
        Values s;
        gather(s, stage);
        if (summed)
#pragma unroll
            for (int j = 0; j < ROWS; ++j)
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) store<R>(p.sum, j, i, s[j] + i * WIDTH);
        float scale[ROWS];
        normalise(s, scale);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            float y[ROWS][WIDTH];
#pragma unroll
            for (int j = 0; j < ROWS; ++j) normal(y[j], s[j] + i * WIDTH, scale[j]);
            if (p.weight) {
                auto weight = parameter(p.weight, i);
#pragma unroll
                for (int j = 0; j < ROWS; ++j)
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) y[j][k] *= weight.at[k];
            }
            if (p.bias) {
                auto bias = parameter(p.bias, i);
#pragma unroll
                for (int j = 0; j < ROWS; ++j)
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) y[j][k] += bias.at[k];
            }
#pragma unroll
            for (int j = 0; j < ROWS; ++j) {
                if (gated && p.gate_after) {
                    float z[WIDTH];
                    stage.z().widened(z, j, i);
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) y[j][k] *= silu(z[k]);
                }
                store<E>(p.y, j, i, y[j]);
            }
        }
    });
}

template <typename E, typename R, int WIDTH, int ITEMS, int TEAM>
__device__ void Team<E, R, WIDTH, ITEMS, TEAM>::backward() {
    using Stage = typename Own::Backward;
    float dweight[COUNT] = {}, dbias[COUNT] = {};
    auto ask = [&](Stage &to, int64_t row) {
        load(to.x, p.x, row);
        if (summed) load(to.second, p.residual, row);
        if (gated) load(to.z(), p.z, row);
        if (p.dy.data) load(to.dy, p.dy, row);
    };
    bool after = gated && p.gate_after;
    each<Stage>(ask, [&](Stage &stage) {
        Values s;
        gather(s, stage);
        float scale[ROWS];
        normalise(s, scale);
        float sums[2 * ROWS] = {}; // of the products with n, and of the gradients
#pragma unroll
        for (int j = 0; j < ROWS; ++j)
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                float d[WIDTH] = {}, n[WIDTH];
                if (p.dy.data) stage.dy.widened(d, j, i);
                normal(n, s[j] + i * WIDTH, scale[j]);
                if (after) {
                    float z[WIDTH], dz[WIDTH];
                    stage.z().widened(z, j, i);
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) dz[k] = n[k];
                    weigh(dz, i);
                    if (p.bias) {
                        auto bias = parameter(p.bias, i);
#pragma unroll
                        for (int k = 0; k < WIDTH; ++k) dz[k] += bias.at[k];
                    }
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) {
                        float g = sigmoid(z[k]);
                        dz[k] *= d[k] * silu_slope(z[k], g);
                        d[k] *= z[k] * g;
                    }
                    store<E>(p.dz, j, i, dz);
                }
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) {
                    dweight[i * WIDTH + k] = fmaf(d[k], n[k], dweight[i * WIDTH + k]);
                    dbias[i * WIDTH + k] += d[k];
                }
                weigh(d, i);
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) {
                    sums[j] = fmaf(d[k], n[k], sums[j]);
                    sums[ROWS + j] += d[k];
                }
            }
        total(sums);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            float product = sums[j] / p.group, mean = p.layer ? sums[ROWS + j] / p.group : 0.0f;
            // what the deviation, as a function of s, gives back
            float slope = scale[j] * product;
            if (p.outside) {
                float root = 1.0f / scale[j] - p.eps;
                slope = root > 0.0f ? product / root : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                // once more: registers would not hold them
                float d[WIDTH] = {};
                if (p.dy.data) stage.dy.widened(d, j, i);
                if (after) {
                    float z[WIDTH];
                    stage.z().widened(z, j, i);
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) d[k] *= silu(z[k]);
                }
                weigh(d, i);
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) d[k] = scale[j] * fmaf(-slope, s[j][i * WIDTH + k], d[k] - mean);
                if (summed) {
                    if (p.dsum.data && lives(row, j) && exists(i)) {
                        float sum[WIDTH];
                        auto from = at<R>(p.dsum, row + j * teams) + i * TEAM * WIDTH;
                        widen(sum, *reinterpret_cast<const Pack<R, WIDTH> *>(from));
#pragma unroll
                        for (int k = 0; k < WIDTH; ++k) d[k] += sum[k];
                    }
                    store<R>(p.dresidual, j, i, d);
                }
                if (gated && !after) {
                    float z[WIDTH], x[WIDTH];
                    stage.z().widened(z, j, i);
                    stage.x.widened(x, j, i);
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) {
                        float g = sigmoid(z[k]);
                        x[k] *= d[k] * silu_slope(z[k], g);
                        d[k] *= z[k] * g;
                    }
                    store<E>(p.dz, j, i, x);
                }
                store<E>(p.dx, j, i, d);
            }
        }
    });
    share(dweight, 0);
    share(dbias, 1);
}

// The block's share of a parameter's gradient: its teams' in order.
template <typename E, typename R, int WIDTH, int ITEMS, int TEAM>
__device__ void Team<E, R, WIDTH, ITEMS, TEAM>::share(const float (&own)[COUNT], int which) const {
    float *to = p.shares + (int64_t(blockIdx.x) * 2 + which) * p.channels + blockIdx.y * p.group;
    // no row is on its way any more, and three tensors' took more room
    extern __shared__ __align__(16) char bytes[];
    auto all = reinterpret_cast<float *>(bytes);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all[i * THREADS + threadIdx.x] = own[i];
    __syncthreads();
    for (int at = threadIdx.x; at < COUNT * TEAM; at += THREADS) {
        int i = at / TEAM, thread = at % TEAM, channel = (i / WIDTH * TEAM + thread) * WIDTH + i % WIDTH;
        float sum = 0.0f;
#pragma unroll
        for (int team = 0; team < TEAMS; ++team) sum += all[i * THREADS + team * TEAM + thread];
        if (channel < p.group) to[channel] = sum;
    }
}

// out[i] = the sum of `count` shares of `size` numbers, in order. Block: 32 columns, 32 rows that take turns.
extern "C" __global__ void norm_sum(float *out, const float *shares, int count, int size) {
    take_turn();
    __shared__ float sums[LANES][LANES];
    int lane = threadIdx.x % LANES, turn = threadIdx.x / LANES, i = blockIdx.x * LANES + lane;
    float sum = 0.0f;
    if (i < size)
#pragma unroll 8
        for (int j = turn; j < count; j += LANES) sum += shares[int64_t(j) * size + i];
    sums[turn][lane] = sum;
    __syncthreads();
    if (turn || i >= size) return;
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < LANES; ++w) sum += sums[w][lane];
    out[i] = sum;
}

// Blocks of a multiprocessor at least, backward by a thread's numbers: as many as registers hold without a spill.
constexpr int FORWARD_BLOCKS = 4;
constexpr int backward_blocks(int numbers) { return numbers > 24 ? 1 : 2; }

#define KERNEL(PASS, FUNCTION, STAGE, BLOCKS, E, R, WIDTH, ITEMS, TEAM)                                                \
    extern "C" {                                                                                                       \
    __constant__ unsigned norm_##PASS##_##E##_##R##_##WIDTH##_##ITEMS##_##TEAM##_memory =                              \
        Shape<E, R, WIDTH, ITEMS, TEAM>::MEMORY<Shape<E, R, WIDTH, ITEMS, TEAM>::STAGE>;                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        norm_##PASS##_##E##_##R##_##WIDTH##_##ITEMS##_##TEAM(const __grid_constant__ Norm p) {                         \
        take_turn();                                                                                                   \
        Team<E, R, WIDTH, ITEMS, TEAM>(p).FUNCTION();                                                                  \
    }
#define KERNELS(E, R, WIDTH, ITEMS, TEAM)                                                                              \
    KERNEL(fwd, forward, Forward, FORWARD_BLOCKS, E, R, WIDTH, ITEMS, TEAM)                                            \
    KERNEL(bwd, backward, Backward, backward_blocks(WIDTH *ITEMS), E, R, WIDTH, ITEMS, TEAM)
#define FORMS(E, R, WIDTH)                                                                                             \
    KERNELS(E, R, WIDTH, 1, 8)                                                                                         \
    KERNELS(E, R, WIDTH, 1, 16)                                                                                        \
    KERNELS(E, R, WIDTH, 1, 32)                                                                                        \
    KERNELS(E, R, WIDTH, 2, 32)                                                                                        \
    KERNELS(E, R, WIDTH, 3, 32)                                                                                        \
    KERNELS(E, R, WIDTH, 2, 64)                                                                                        \
    KERNELS(E, R, WIDTH, 3, 64)                                                                                        \
    KERNELS(E, R, WIDTH, 2, 128)                                                                                       \
    KERNELS(E, R, WIDTH, 3, 128)                                                                                       \
    KERNELS(E, R, WIDTH, 2, 256)                                                                                       \
    KERNELS(E, R, WIDTH, 3, 256)                                                                                       \
    KERNELS(E, R, WIDTH, 4, 256)                                                                                       \
    KERNELS(E, R, 1, 4, 32)                                                                                            \
    KERNELS(E, R, 1, 2, 256)                                                                                           \
    KERNELS(E, R, 1, 8, 256)
FORMS(float, float, 4)
FORMS(bf16, bf16, 8)
FORMS(bf16, float, 8)
FORMS(f16, f16, 8)
FORMS(f16, float, 8)
