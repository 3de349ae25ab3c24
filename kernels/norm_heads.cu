// The way out of a head: RMS norm or layer norm of its values, weight, bias and a SiLU gate in one pass, forward and backward.
//
// With n the norm of x, y = (n weight + bias) SiLU(z); src/ops/norm has the formulas. Rows are contiguous. TEAM lanes share a
// row, ITEMS times 16 bytes of each tensor in a lane's registers, and the next row's are on their way while this one is
// computed. Grid: as many blocks as are resident; team t takes rows t, t + teams, ... Backward adds up a team's shares of
// dweight and dbias, then those of a block in order, for norm_sum of norm.cu to add up.
//
// Bytes: x, z and y once; backward x, z, dy, dx and dz once: memory is the floor. Shared memory: 16 KB at most, backward.
// On an H100, 65,536 heads of 512 bf16: 84 to 97 us forward (67 at 3 TB/s), backward 121 (112), with a weight 148; norm.cu
// takes 205 and 560.
#include "common/types.cuh"

constexpr int THREADS = 256;
constexpr int LANES = 32;
constexpr int BLOCKS = 2; // on a multiprocessor, at least, backward

struct HeadNorm {
    const void *x, *z, *dy;
    void *y, *dx, *dz;
    const float *weight, *bias; // [D] or null
    float *shares;              // [blocks, 2, D]
    int64_t rows;
    int width, layer, outside;
    float eps;
};

// AFFINE: 1 with a weight, 2 with a weight or a bias.
template <typename E, int TEAM, int ITEMS, int AFFINE> struct Team {
    static constexpr int W = Vector<E>::SIZE, N = W * ITEMS, TEAMS = THREADS / TEAM;
    struct Row {
        Vector<E> at[ITEMS];
        __device__ __forceinline__ void widened(float (&to)[N]) const {
#pragma unroll
            for (int i = 0; i < N; ++i) to[i] = widen(at[i / W].at[i % W]);
        }
    };
    const HeadNorm &p;
    int lane = threadIdx.x % TEAM;
    int64_t first = int64_t(blockIdx.x) * TEAMS + threadIdx.x / TEAM, step = int64_t(gridDim.x) * TEAMS;
    float weight[N], bias[N];

    __device__ explicit Team(const HeadNorm &p) : p(p) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            weight[i] = AFFINE && p.weight && exists(i) ? p.weight[place(i)] : 1.0f;
            bias[i] = AFFINE > 1 && p.bias && exists(i) ? p.bias[place(i)] : 0.0f;
        }
    }
    // The channel of a lane's number i; a vector exists whole or not at all.
    __device__ int place(int i) const { return (i / W * TEAM + lane) * W + i % W; }
    __device__ bool exists(int i) const { return place(i) < p.width; }

    __device__ __forceinline__ void load(Row &to, const void *from, int64_t row) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            to.at[i] = {};
            if (row < p.rows && exists(i * W))
                to.at[i] = *reinterpret_cast<const Vector<E> *>(static_cast<const E *>(from) + row * p.width + place(i * W));
        }
    }
    __device__ __forceinline__ void store(void *to, int64_t row, const float (&from)[N]) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            Vector<E> v;
#pragma unroll
            for (int k = 0; k < W; ++k) v.at[k] = narrow<E>(from[i * W + k]);
            if (row < p.rows && exists(i * W))
                *reinterpret_cast<Vector<E> *>(static_cast<E *>(to) + row * p.width + place(i * W)) = v;
        }
    }
    static __device__ __forceinline__ float total(float x) {
#pragma unroll
        for (int lanes = TEAM / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
        return x;
    }

    // The reciprocal deviation; s loses its mean, for a layer norm.
    __device__ __forceinline__ float normalise(float (&s)[N]) const {
        float sum = 0.0f;
        if (p.layer) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum += s[i];
            float mean = total(sum) / p.width;
#pragma unroll
            for (int i = 0; i < N; ++i) s[i] = exists(i) ? s[i] - mean : 0.0f;
            sum = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) sum = fmaf(s[i], s[i], sum);
        float mean = total(sum) / p.width;
        return 1.0f / (p.outside ? sqrtf(mean) + p.eps : sqrtf(mean + p.eps));
    }

    // Rows of a team, one after another; all lanes of a warp take part as long as one of its teams has one left.
    template <int COUNT, typename F> __device__ __forceinline__ void each(const void *const (&from)[COUNT], F &&f) const {
        Row next[COUNT], now[COUNT];
        int64_t row = first;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) load(next[i], from[i], row);
        while (row - threadIdx.x % LANES / TEAM < p.rows) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                now[i] = next[i];
                load(next[i], from[i], row + step);
            }
            f(row, now);
            row += step;
        }
    }

    __device__ void forward() const {
        each<2>({p.x, p.z}, [&](int64_t row, const Row (&rows)[2]) {
            float s[N], z[N];
            rows[0].widened(s);
            rows[1].widened(z);
            float scale = normalise(s);
#pragma unroll
            for (int i = 0; i < N; ++i) s[i] = (AFFINE ? fmaf(s[i] * scale, weight[i], bias[i]) : s[i] * scale) * silu(z[i]);
            store(p.y, row, s);
        });
    }

    __device__ void backward() const {
        float dweight[N] = {}, dbias[N] = {};
        each<3>({p.x, p.z, p.dy}, [&](int64_t row, const Row (&rows)[3]) {
            float s[N], z[N], h[N], mean = 0.0f, product = 0.0f;
            rows[0].widened(s);
            rows[1].widened(z);
            rows[2].widened(h);
            float scale = normalise(s);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float n = s[i] * scale, gate = sigmoid(z[i]), d = h[i];
                h[i] = d * z[i] * gate;
                z[i] = d * (AFFINE ? fmaf(n, weight[i], bias[i]) : n) * silu_slope(z[i], gate);
                if (AFFINE) {
                    dweight[i] = fmaf(h[i], n, dweight[i]);
                    if (AFFINE > 1) dbias[i] += h[i];
                    h[i] *= weight[i];
                }
                mean += h[i];
                product = fmaf(h[i], n, product);
            }
            store(p.dz, row, z);
            product = total(product) / p.width;
            mean = p.layer ? total(mean) / p.width : 0.0f;
            // what the deviation, as a function of s, gives back
            float root = 1.0f / scale - p.eps;
            float slope = !p.outside ? scale * product : root > 0.0f ? product / root : 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) h[i] = scale * (h[i] - mean - s[i] * slope);
            store(p.dx, row, h);
        });
        if (!AFFINE) return;
        __shared__ float shares[THREADS * N];
        sum(shares, dweight, 0);
        if (AFFINE > 1) sum(shares, dbias, 1);
    }
    __device__ void sum(float *shares, const float (&own)[N], int which) const {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) shares[i * THREADS + threadIdx.x] = own[i];
        __syncthreads();
        // numbers of a lane, over the teams
        for (int i = threadIdx.x; i < N * TEAM; i += THREADS) {
            int number = i / TEAM, lane = i % TEAM, channel = (number / W * TEAM + lane) * W + number % W;
            float sum = 0.0f;
            for (int team = 0; team < TEAMS; ++team) sum += shares[number * THREADS + team * TEAM + lane];
            if (channel < p.width) p.shares[(int64_t(blockIdx.x) * 2 + which) * p.width + channel] = sum;
        }
    }
};

#define KERNELS(E, TEAM, ITEMS, NAME, AFFINE)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        norm_heads_fwd_##E##_##TEAM##_##ITEMS##_##NAME(const __grid_constant__ HeadNorm p) {                           \
        take_turn();                                                                                                   \
        Team<E, TEAM, ITEMS, AFFINE>(p).forward();                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        norm_heads_bwd_##E##_##TEAM##_##ITEMS##_##NAME(const __grid_constant__ HeadNorm p) {                           \
        take_turn();                                                                                                   \
        Team<E, TEAM, ITEMS, AFFINE>(p).backward();                                                                    \
    }
#define BOTH(E, TEAM, ITEMS)                                                                                           \
    KERNELS(E, TEAM, ITEMS, plain, 0) KERNELS(E, TEAM, ITEMS, weight, 1) KERNELS(E, TEAM, ITEMS, affine, 2)
#define TEAMS_OF(E) BOTH(E, 8, 1) BOTH(E, 16, 1) BOTH(E, 32, 1) BOTH(E, 32, 2)
TEAMS_OF(float)
BOTH(float, 32, 4)
TEAMS_OF(bf16)
TEAMS_OF(f16)
