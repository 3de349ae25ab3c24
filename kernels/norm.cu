// RMS norm and layer norm, plain, with a residual sum or a gate, forward and backward; src/ops/norm has the formulas.
//
// A team (a warp, or a block of 256 threads for wide groups) normalises one group of channels of one row after another,
// the row's values in registers: WIDTH neighbouring channels ITEMS times. Grid (teams over blocks, groups). Team t takes
// rows t, t + teams, ..; backward adds up its shares of dweight and dbias over them, and norm_sum those of all teams in
// order.
//
// Bytes: every tensor once, forward and backward; memory is the floor. Shared memory: 8 floats for a block's sums.
// Registers: 36 to 171 forward, 48 to 255 backward, by ITEMS. One H100, B8 L2048 D768, bf16, calls in a row: rms_norm 0.056 ms
// (30% of 3.02 TB/s), 0.18 with backward; add_norm 0.080 and 0.24. A block has one row on its way at a time, and that binds:
// rows of D768 in a warp each would take 150 registers, or spill.
#include "common/types.cuh"

constexpr int LANES = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;

// Rows of a tensor: row r at (r / inner) * outer_step + (r % inner) * inner_step elements.
struct Rows {
    void *data;
    int64_t outer_step, inner_step;
};

struct Norm {
    Rows x, residual, z, y, sum, dy, dsum, dx, dresidual, dz;
    const float *weight, *bias;
    float *shares; // [teams, 2, D]
    int64_t rows;
    int inner, channels, group, layer, outside, rounds, gate_after;
    float eps;
};

template <typename E, typename R, int WIDTH, int ITEMS, bool BLOCK> struct Team {
    static constexpr int SIZE = BLOCK ? THREADS : LANES;
    static constexpr int PER_BLOCK = THREADS / SIZE;
    using Values = float[ITEMS][WIDTH];
    const Norm &p;
    int member, first; // first channel of the group
    int64_t team, teams;

    __device__ explicit Team(const Norm &p) : p(p) {
        member = threadIdx.x % SIZE;
        first = blockIdx.y * p.group;
        team = int64_t(blockIdx.x) * PER_BLOCK + threadIdx.x / SIZE;
        teams = int64_t(gridDim.x) * PER_BLOCK;
    }
    // Channel of item `i` within the group.
    __device__ int place(int i) const { return (i * SIZE + member) * WIDTH; }

    template <typename T> __device__ T *at(const Rows &r, int64_t row, int i) const {
        int outer = int(row) / p.inner, inner = int(row) - outer * p.inner; // rows fit an int
        return static_cast<T *>(r.data) + outer * r.outer_step + inner * r.inner_step + first + place(i);
    }
    template <typename T> __device__ void load(Values &to, const Rows &r, int64_t row) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            Pack<T, WIDTH> v = {};
            if (place(i) < p.group) v = *reinterpret_cast<const Pack<T, WIDTH> *>(at<T>(r, row, i));
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) to[i][k] = widen(v.at[k]);
        }
    }
    template <typename T> __device__ void store(const Rows &r, int64_t row, const Values &from) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            Pack<T, WIDTH> v;
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) v.at[k] = narrow<T>(from[i][k]);
            if (place(i) < p.group) *reinterpret_cast<Pack<T, WIDTH> *>(at<T>(r, row, i)) = v;
        }
    }
    __device__ void parameter(Values &to, const float *from, float missing) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
#pragma unroll
            for (int k = 0; k < WIDTH; ++k)
                to[i][k] = from && place(i) < p.group ? from[first + place(i) + k] : missing;
    }

    // The sum over the team, the same for all its members.
    __device__ float total(float x) const {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
        if (BLOCK) {
            __shared__ float sums[WARPS];
            __syncthreads();
            if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = x;
            __syncthreads();
            x = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) x += sums[w];
        }
        return x;
    }

    // What the norm is taken of; writes the residual sum if asked.
    __device__ void gather(Values &s, Values &gate, int64_t row, bool write) const {
        load<E>(s, p.x, row);
        if (p.residual.data) {
            Values r;
            load<R>(r, p.residual, row);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) s[i][k] = widen(narrow<R>(s[i][k] + r[i][k]));
            if (write) store<R>(p.sum, row, s);
        }
        if (p.z.data) {
            load<E>(gate, p.z, row);
            if (!p.gate_after)
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) s[i][k] *= silu(gate[i][k]);
        }
    }

    // Mean and reciprocal deviation; s loses its mean.
    __device__ float normalise(Values &s) const {
        float sum = 0.0f;
        if (p.layer) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) sum += s[i][k];
            float mean = total(sum) / p.group;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) s[i][k] = place(i) < p.group ? s[i][k] - mean : 0.0f;
            sum = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) sum = fmaf(s[i][k], s[i][k], sum);
        float mean = total(sum) / p.group;
        return 1.0f / (p.outside ? sqrtf(mean) + p.eps : sqrtf(mean + p.eps));
    }

    __device__ float rounded(float n) const { return p.rounds ? widen(narrow<E>(n)) : n; }

    __device__ void forward() const {
        for (int64_t row = team; row < p.rows; row += teams) {
            Values s, gate, weight, bias;
            gather(s, gate, row, true);
            float scale = normalise(s);
            parameter(weight, p.weight, 1.0f);
            parameter(bias, p.bias, 0.0f);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) {
                    s[i][k] = fmaf(rounded(s[i][k] * scale), weight[i][k], bias[i][k]);
                    if (p.z.data && p.gate_after) s[i][k] *= silu(gate[i][k]);
                }
            store<E>(p.y, row, s);
        }
    }

    __device__ void backward() const {
        Values dweight = {}, dbias = {};
        for (int64_t row = team; row < p.rows; row += teams) {
            Values s, gate, weight, h = {};
            gather(s, gate, row, false);
            float scale = normalise(s);
            if (p.dy.data) load<E>(h, p.dy, row);
            parameter(weight, p.weight, 1.0f);
            if (p.z.data && p.gate_after) {
                Values dz, bias;
                parameter(bias, p.bias, 0.0f);
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) {
                        float z = gate[i][k], g = sigmoid(z);
                        dz[i][k] = h[i][k] * fmaf(s[i][k] * scale, weight[i][k], bias[i][k]) * silu_slope(z, g);
                        h[i][k] *= z * g;
                    }
                store<E>(p.dz, row, dz);
            }
            float mean = 0.0f, product = 0.0f;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) {
                    float n = rounded(s[i][k] * scale);
                    dweight[i][k] = fmaf(h[i][k], n, dweight[i][k]);
                    dbias[i][k] += h[i][k];
                    h[i][k] *= place(i) < p.group ? weight[i][k] : 0.0f;
                    mean += h[i][k];
                    product = fmaf(h[i][k], n, product);
                }
            product = total(product) / p.group;
            mean = p.layer ? total(mean) / p.group : 0.0f;
            // what the deviation, as a function of s, gives back
            float root = 1.0f / scale - p.eps;
            float slope = !p.outside ? scale * product : root > 0.0f ? product / root : 0.0f;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) h[i][k] = scale * (h[i][k] - mean - s[i][k] * slope);
            if (p.dsum.data) {
                load<R>(s, p.dsum, row);
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) h[i][k] += s[i][k];
            }
            if (p.residual.data) store<R>(p.dresidual, row, h);
            if (p.z.data && !p.gate_after) {
                load<E>(s, p.x, row);
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) {
                        float z = gate[i][k], g = sigmoid(z);
                        s[i][k] *= h[i][k] * silu_slope(z, g);
                        h[i][k] *= z * g;
                    }
                store<E>(p.dz, row, s);
            }
            store<E>(p.dx, row, h);
        }
        float *shares = p.shares + team * 2 * p.channels + first;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
#pragma unroll
            for (int k = 0; k < WIDTH; ++k)
                if (place(i) < p.group) {
                    shares[place(i) + k] = dweight[i][k];
                    shares[p.channels + place(i) + k] = dbias[i][k];
                }
    }
};

// out[i] = the sum of `count` shares of `size` numbers, in order. Block: 32 columns, 8 rows that take turns.
extern "C" __global__ void norm_sum(float *out, const float *shares, int count, int size) {
    __shared__ float sums[WARPS][LANES];
    int lane = threadIdx.x % LANES, turn = threadIdx.x / LANES, i = blockIdx.x * LANES + lane;
    float sum = 0.0f;
    if (i < size)
#pragma unroll 8
        for (int j = turn; j < count; j += WARPS) sum += shares[int64_t(j) * size + i];
    sums[turn][lane] = sum;
    __syncthreads();
    if (turn || i >= size) return;
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[w][lane];
    out[i] = sum;
}

#define KERNELS(E, R, WIDTH, ITEMS, TEAM, BLOCK)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        norm_fwd_##E##_##R##_##WIDTH##_##ITEMS##_##TEAM(const __grid_constant__ Norm p) {                              \
        Team<E, R, WIDTH, ITEMS, BLOCK>(p).forward();                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        norm_bwd_##E##_##R##_##WIDTH##_##ITEMS##_##TEAM(const __grid_constant__ Norm p) {                              \
        Team<E, R, WIDTH, ITEMS, BLOCK>(p).backward();                                                                 \
    }
#define ITEMS_OF(E, R, WIDTH)                                                                                          \
    KERNELS(E, R, WIDTH, 2, warp, false)                                                                               \
    KERNELS(E, R, WIDTH, 4, warp, false)                                                                               \
    KERNELS(E, R, WIDTH, 1, block, true)                                                                               \
    KERNELS(E, R, WIDTH, 2, block, true)                                                                               \
    KERNELS(E, R, WIDTH, 3, block, true)                                                                               \
    KERNELS(E, R, WIDTH, 5, block, true)                                                                               \
    KERNELS(E, R, WIDTH, 8, block, true)
#define WIDTHS(E, R) ITEMS_OF(E, R, 1) ITEMS_OF(E, R, 4)
WIDTHS(float, float)
WIDTHS(bf16, bf16)
WIDTHS(bf16, float)
WIDTHS(f16, f16)
WIDTHS(f16, float)
