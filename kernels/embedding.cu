// The gradient of a table of embeddings; src/ops/embedding has the formula.
//
// Grid (ids that occur, columns over blocks), 128 threads. A thread adds up one column of the tokens of one id, in their
// order; a warp reads their rows side by side. Rows of other ids stay as they are (zero).
// Bytes: the tokens' gradients once. A token that fills a batch is one chain of loads, eight of them on their way.
#include "common/types.cuh"

constexpr int THREADS = 128;

struct Embedding {
    const void *dy;                      // [T, D], rows in steps of `step`
    void *gradient;                      // [V, D]
    const unsigned *order, *ids, *starts; // [T]: tokens by id; [ids], [ids + 1]
    int64_t step;
    int width; // D
};

__device__ __forceinline__ double widen(double x) { return x; }

template <typename E, typename Sum> __device__ void embedding_grad(const Embedding &p) {
    int column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= p.width) return;
    unsigned begin = p.starts[blockIdx.x], end = p.starts[blockIdx.x + 1];
    const E *dy = static_cast<const E *>(p.dy) + column;
    Sum sum = 0;
#pragma unroll 8
    for (unsigned i = begin; i < end; ++i) sum += widen(dy[int64_t(p.order[i]) * p.step]);
    E *to = static_cast<E *>(p.gradient) + int64_t(p.ids[blockIdx.x]) * p.width + column;
    if constexpr (sizeof(E) == sizeof(double))
        *to = sum;
    else
        *to = narrow<E>(sum);
}

#define KERNEL(E, Sum)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS) embedding_grad_##E(const __grid_constant__ Embedding p) {    \
        take_turn();                                                                                                   \
        embedding_grad<E, Sum>(p);                                                                                     \
    }
KERNEL(float, float)
KERNEL(double, double)
KERNEL(bf16, float)
KERNEL(f16, float)
