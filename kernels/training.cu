// The passes over memory that training makes beside the model; src/train has the formulas.
//
//   cross_entropy        log(sum exp) and loss of every row of logits, then their sum in order
//   cross_entropy_grad   (softmax - [v = target]) scale, straight into the gradient
//   sum_of_squares       of all gradients of a model
//   adamw                one step of all parameters of a model
//
// cross_entropy: a block a row, maximum and sum in one pass. sum_of_squares and adamw: blocks of CHUNK elements over all
// tensors; a block finds its tensor by halving. Sums of blocks are added up in f64 in one order: no atomics.
// Bytes: logits once forward, twice backward; adamw 16 bytes read and 12 written an f32 parameter; memory
// is the floor. One H100 at ncu's clocks: 16,384 x 50,280 logits in bf16 0.55 ms (3.0 TB/s) forward, 1.21 (2.7) backward;
// adamw of 129M parameters in bf16 with masters 1.57 (2.3), their squares 0.28.
#include "common/types.cuh"

constexpr int LANES = 32;
constexpr int THREADS = 256;
constexpr int CHUNK = 16 * THREADS;
constexpr unsigned IGNORE = ~0u;

struct CrossEntropy {
    const void *logits;      // [rows, V], rows in steps of `step`
    const unsigned *targets; // [rows]; IGNORE: none
    float *log_sums, *losses; // [rows]
    float *total;            // [1]
    const float *scale;      // [1]: the gradient of the total
    void *gradient;          // [rows, V]
    int64_t step, rows;
    int size; // V
};

// The sum of a block's numbers, in every thread.
template <typename T> __device__ T block_sum(T x) {
    __shared__ T shares[THREADS / LANES];
#pragma unroll
    for (int d = LANES / 2; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    __syncthreads();
    if (threadIdx.x % LANES == 0) shares[threadIdx.x / LANES] = x;
    __syncthreads();
    x = 0;
#pragma unroll
    for (int w = 0; w < THREADS / LANES; ++w) x += shares[w];
    return x;
}
__device__ float block_max(float x) {
    __shared__ float shares[THREADS / LANES];
#pragma unroll
    for (int d = LANES / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    if (threadIdx.x % LANES == 0) shares[threadIdx.x / LANES] = x;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < THREADS / LANES; ++w) x = fmaxf(x, shares[w]);
    return x;
}
// What exponents are taken from: a maximum of nothing but -inf would make NaNs of zeros.
__device__ float base(float largest) { return largest == -INFINITY ? 0.0f : largest; }

template <typename E, int WIDTH> __device__ void cross_entropy(const CrossEntropy &p) {
    int64_t row = blockIdx.x;
    unsigned target = p.targets[row];
    if (target == IGNORE) {
        if (threadIdx.x == 0) p.log_sums[row] = p.losses[row] = 0.0f;
        return;
    }
    const E *x = static_cast<const E *>(p.logits) + row * p.step;
    float largest = -INFINITY, sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x * WIDTH; i < p.size; i += THREADS * WIDTH) {
        Pack<E, WIDTH> v = *reinterpret_cast<const Pack<E, WIDTH> *>(x + i);
        float most = largest;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) most = fmaxf(most, widen(v.at[k]));
        if (most > largest) {
            sum *= exp2_fast((base(largest) - base(most)) * LOG2E);
            largest = most;
        }
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) sum += exp2_fast((widen(v.at[k]) - base(largest)) * LOG2E);
    }
    float all = block_max(largest);
    sum = block_sum(sum * exp2_fast((base(largest) - base(all)) * LOG2E));
    if (threadIdx.x == 0) {
        float log_sum = base(all) + logf(sum);
        p.log_sums[row] = log_sum;
        p.losses[row] = log_sum - widen(x[target]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_total(const __grid_constant__ CrossEntropy p) {
    take_turn();
    double sum = 0.0;
    for (int64_t row = threadIdx.x; row < p.rows; row += THREADS) sum += p.losses[row];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *p.total = float(sum);
}

template <typename E, int WIDTH> __device__ void cross_entropy_grad(const CrossEntropy &p) {
    int64_t row = blockIdx.x;
    unsigned target = p.targets[row];
    const E *x = static_cast<const E *>(p.logits) + row * p.step;
    E *y = static_cast<E *>(p.gradient) + row * p.size;
    float log_sum = p.log_sums[row], scale = *p.scale;
#pragma unroll 4
    for (int i = threadIdx.x * WIDTH; i < p.size; i += THREADS * WIDTH) {
        Pack<E, WIDTH> v = *reinterpret_cast<const Pack<E, WIDTH> *>(x + i);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) {
            float z = widen(v.at[k]) - log_sum;
            float share = i + k == target ? expm1f(z) : exp2_fast(z * LOG2E);
            v.at[k] = narrow<E>(target == IGNORE ? 0.0f : share * scale);
        }
        *reinterpret_cast<Pack<E, WIDTH> *>(y + i) = v;
    }
}

#define KERNEL(E, WIDTH)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        cross_entropy_##E##_##WIDTH(const __grid_constant__ CrossEntropy p) {                                          \
        take_turn();                                                                                                   \
        cross_entropy<E, WIDTH>(p);                                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        cross_entropy_grad_##E##_##WIDTH(const __grid_constant__ CrossEntropy p) {                                     \
        take_turn();                                                                                                   \
        cross_entropy_grad<E, WIDTH>(p);                                                                               \
    }
KERNEL(float, 1)
KERNEL(float, 4)
KERNEL(bf16, 1)
KERNEL(bf16, 8)
KERNEL(f16, 1)
KERNEL(f16, 8)

enum Kind { F32, BF16, F16 };

// A gradient among those of a model, and the first of its blocks.
struct Part {
    const void *gradient;
    int64_t length;
    int first, kind;
};
struct Parts {
    const Part *parts;
    double *sums; // one a block, then their sum
    int count, blocks;
};
struct Parameter {
    Part part;
    void *weight;
    float *master, *first, *second; // the master where the weight is narrower
    float keep, size;               // 1 - rate decay; rate / (1 - beta1^t)
    int kind;
};
struct AdamW {
    const Parameter *parameters;
    int count;
    float scale, beta1, beta2, epsilon, root_scale;
};

// The tensor of this block.
template <typename P, typename First> __device__ const P &of_block(const P *all, int count, First first) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (first(all[middle]) <= int(blockIdx.x))
            low = middle;
        else
            high = middle;
    }
    return all[low];
}
__device__ float read(const void *x, int kind, int64_t i) {
    if (kind == F32) return static_cast<const float *>(x)[i];
    return kind == BF16 ? widen(static_cast<const bf16 *>(x)[i]) : widen(static_cast<const f16 *>(x)[i]);
}
__device__ void write(void *x, int kind, int64_t i, float value) {
    if (kind == F32)
        static_cast<float *>(x)[i] = value;
    else if (kind == BF16)
        static_cast<bf16 *>(x)[i] = narrow<bf16>(value);
    else
        static_cast<f16 *>(x)[i] = narrow<f16>(value);
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares(const __grid_constant__ Parts p) {
    take_turn();
    const Part part = of_block(p.parts, p.count, [](const Part &part) { return part.first; });
    int64_t begin = int64_t(blockIdx.x - part.first) * CHUNK + threadIdx.x;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < CHUNK; k += THREADS)
        if (begin + k < part.length) {
            float x = read(part.gradient, part.kind, begin + k);
            sum = fmaf(x, x, sum);
        }
    double total = block_sum(double(sum));
    if (threadIdx.x == 0) p.sums[blockIdx.x] = total;
}
extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares_total(const __grid_constant__ Parts p) {
    take_turn();
    double sum = 0.0;
    for (int i = threadIdx.x; i < p.blocks; i += THREADS) sum += p.sums[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) p.sums[p.blocks] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) adamw(const __grid_constant__ AdamW p) {
    take_turn();
    const Parameter own = of_block(p.parameters, p.count, [](const Parameter &p) { return p.part.first; });
    const Part &part = own.part;
    int64_t begin = int64_t(blockIdx.x - part.first) * CHUNK + threadIdx.x;
#pragma unroll 4
    for (int k = 0; k < CHUNK; k += THREADS) {
        int64_t i = begin + k;
        if (i >= part.length) return;
        float g = read(part.gradient, part.kind, i) * p.scale;
        float m = fmaf(p.beta1, own.first[i], (1.0f - p.beta1) * g);
        float v = fmaf(p.beta2, own.second[i], (1.0f - p.beta2) * g * g);
        float w = own.master ? own.master[i] : read(own.weight, own.kind, i);
        w = fmaf(-own.size, m / fmaf(sqrtf(v), p.root_scale, p.epsilon), w * own.keep);
        own.first[i] = m;
        own.second[i] = v;
        if (own.master) own.master[i] = w;
        write(own.weight, own.kind, i, w);
    }
}
