// The rest of a step of decoding, for up to 8 rows (8 tokens of one sequence, or one of 8, or between).
//
//   embed    rows of the embedding as the beginning of the residual stream
//   state    the projection of dt, softplus, the recurrence through the pool's states, skip weight and gate
//   filter   the causal convolution through the pool's states, for any number of rows
//   argmax   the most probable token of every row, the lowest id of equals; NONE if a logit is NaN or infinity
//
// state: grid (channels over blocks), 128 threads; a state of N numbers over SPLIT lanes with four numbers each. What the
// mixer's second projection selected (dt, B and C) is widened, and normed where the model asks for it, in shared memory. The
// lanes of a channel share the row of dt's weights. Bytes: states read and written, D (rank + ..) weights: 2 us at most.
#include "common/decode.cuh"

constexpr int THREADS = 128;
constexpr int NUMBERS = 4;
constexpr int MOST_ROWS = 8;
constexpr unsigned NONE = ~0u;

struct Embed {
    const void *embedding; // [V, K]
    void *x;               // [R, K], f32 if `wide`
    const unsigned *ids;   // [R]
    int width, wide;
    float scale;
};

template <typename E> __device__ void embed(const Embed &p) {
    wait_for_previous();
    let_next_begin();
    int row = blockIdx.y;
    const E *from = static_cast<const E *>(p.embedding) + int64_t(p.ids[row]) * p.width;
    for (int k = blockIdx.x * THREADS + threadIdx.x; k < p.width; k += gridDim.x * THREADS) {
        E x = from[k];
        if (p.scale != 1.0f) x = narrow<E>(widen(x) * p.scale);
        int64_t i = int64_t(row) * p.width + k;
        if (p.wide)
            static_cast<float *>(p.x)[i] = widen(x);
        else
            static_cast<E *>(p.x)[i] = x;
    }
}

struct State {
    const void *u, *z;          // [R, D] each, z in steps of z_step
    int64_t z_step;
    const void *selected;       // [R, rank + 2 N]
    void *kept;                 // the same after its norms, or null
    const void *dt;             // [D, rank]; null: `delta` is read, and the states move on by `counts` tokens, nothing else
    void *delta;                // [R, D]: dt's projection; or null
    const float *a, *d, *bias;  // [D, N], [D], [D]
    const float *weights[3];    // of the norms of dt, B and C; null: ones
    float *state;               // [slots, D, N]
    void *y;                    // [R, D]
    const int *slots, *counts;  // [R / T] each
    int rows, tokens, channels, states, rank, keep, normed;
    float eps;
};

// The selected numbers, f32, in shared memory: [R, rank + 2 N].
template <typename E> __device__ void select(const State &p, float *to) {
    int width = p.rank + 2 * p.states, lane = threadIdx.x % LANES;
    for (int i = threadIdx.x; i < p.rows * width; i += THREADS) to[i] = widen(static_cast<const E *>(p.selected)[i]);
    __syncthreads();
    if (!p.normed) return;
    for (int task = threadIdx.x / LANES; task < p.rows * 3; task += THREADS / LANES) {
        int kind = task % 3, size = kind ? p.states : p.rank;
        float *x = to + task / 3 * width + (kind == 0 ? 0 : p.rank + (kind - 1) * p.states), sum = 0.0f;
        for (int i = lane; i < size; i += LANES) sum = fmaf(x[i], x[i], sum);
        float scale = 1.0f / sqrtf(warp_sum(sum) / size + p.eps);
        for (int i = lane; i < size; i += LANES) {
            float n = widen(narrow<E>(x[i] * scale));
            x[i] = widen(narrow<E>(p.weights[kind] ? n * p.weights[kind][i] : n));
        }
    }
    __syncthreads();
}

template <typename E, int SPLIT> __device__ void state(const State &p) {
    constexpr int WIDTH = Vector<E>::SIZE;
    extern __shared__ __align__(16) char bytes[];
    float *selected = reinterpret_cast<float *>(bytes);
    let_next_begin();
    int part = threadIdx.x % SPLIT, channel = blockIdx.x * (THREADS / SPLIT) + threadIdx.x / SPLIT;
    bool live = channel < p.channels;
    if (!live) channel = p.channels - 1;
    // numbers from the lane's first on; not clamped to its four, see selective_scan_step.cu
    int n = p.states, width = p.rank + 2 * n, own = n - part * NUMBERS;
    bool whole = n % NUMBERS == 0 && own > 0;
    auto load = [&](float (&to)[NUMBERS], const float *from) {
        if (whole) {
            float4 v = *reinterpret_cast<const float4 *>(from);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i) to[i] = i < own ? from[i] : 0.0f;
        }
    };
    int64_t place = int64_t(channel) * n + part * NUMBERS, row_states = int64_t(p.channels) * n;
    float a[NUMBERS], h[NUMBERS] = {};
    load(a, p.a + place);
    float bias = p.bias[channel], skip = p.d[channel];
    const E *weights = static_cast<const E *>(p.dt) + int64_t(channel) * p.rank;
    bool vectors = p.dt && p.rank % WIDTH == 0;
    Vector<E> first = {};
    if (vectors && part * WIDTH < p.rank) first = reinterpret_cast<const Vector<E> *>(weights)[part];
    wait_for_previous();
    int sequences = p.rows / p.tokens, slot = p.slots[0];
    if (slot >= 0) load(h, p.state + slot * row_states + place);
    select<E>(p, selected);
    if (p.kept && blockIdx.x == 0)
        for (int i = threadIdx.x; i < p.rows * width; i += THREADS) static_cast<E *>(p.kept)[i] = narrow<E>(selected[i]);
    // dt's projection, its inputs spread over the lanes
    float delta[MOST_ROWS] = {};
    if (vectors) {
        for (int k = part * WIDTH; k < p.rank; k += SPLIT * WIDTH) {
            Vector<E> w = k == part * WIDTH ? first : *reinterpret_cast<const Vector<E> *>(weights + k);
#pragma unroll
            for (int r = 0; r < MOST_ROWS; ++r) {
                if (r >= p.rows) break;
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) delta[r] = fmaf(widen(w.at[i]), selected[r * width + k + i], delta[r]);
            }
        }
    } else if (p.dt) {
        for (int k = part; k < p.rank; k += SPLIT)
#pragma unroll
            for (int r = 0; r < MOST_ROWS; ++r)
                if (r < p.rows) delta[r] = fmaf(widen(weights[k]), selected[r * width + k], delta[r]);
    }
#pragma unroll
    for (int r = 0; r < MOST_ROWS; ++r)
#pragma unroll
        for (int lanes = SPLIT / 2; lanes > 0; lanes /= 2) delta[r] += __shfl_xor_sync(~0u, delta[r], lanes);
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) a[i] *= LOG2E;
    for (int s = 0; s < sequences; ++s) {
        if (s > 0) {
            slot = p.slots[s];
            if (slot >= 0) load(h, p.state + slot * row_states + place);
        }
        int count = p.dt ? p.tokens : min(p.tokens, p.counts[s]);
        for (int t = 0; t < count; ++t) {
            int row = s * p.tokens + t;
            int64_t i = int64_t(row) * p.channels + channel;
            float dt = 0.0f;
#pragma unroll
            for (int r = 0; r < MOST_ROWS; ++r)
                if (r == row) dt = delta[r];
            E rounded = p.dt ? narrow<E>(dt) : static_cast<const E *>(p.delta)[i];
            if (p.dt && p.delta && live && part == 0) static_cast<E *>(p.delta)[i] = rounded;
            float u = widen(static_cast<const E *>(p.u)[i]);
            const float *b = selected + row * width + p.rank + part * NUMBERS, *c = b + n;
            dt = softplus(widen(rounded) + bias);
            float y = 0.0f;
#pragma unroll
            for (int k = 0; k < NUMBERS; ++k)
                if (k < own) {
                    h[k] = fmaf(exp2_fast(dt * a[k]), h[k], dt * u * b[k]);
                    y = fmaf(h[k], c[k], y);
                }
            if (!p.dt) continue;
#pragma unroll
            for (int lanes = SPLIT / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(~0u, y, lanes);
            float gate = silu(widen(static_cast<const E *>(p.z)[row * p.z_step + channel]));
            y = slot < 0 ? 0.0f : fmaf(skip, u, y) * gate;
            if (live && part == 0) static_cast<E *>(p.y)[i] = narrow<E>(y);
        }
        if (!live || slot < 0 || !p.keep) continue;
        float *to = p.state + slot * row_states + place;
        if (whole) {
            *reinterpret_cast<float4 *>(to) = make_float4(h[0], h[1], h[2], h[3]);
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i)
                if (i < own) to[i] = h[i];
        }
    }
}

struct Filter {
    const void *x;             // [R, D] in steps of x_step
    int64_t x_step;
    const float *taps, *shift; // [D, K], [D] or null
    float *window;             // [slots, D, K - 1]
    void *u;                   // [R, D], or null where only the states are to move
    const int *slots, *counts; // [R / T]; how many tokens count, or null: all
    int tokens, channels, filter, keep;
};

// Grid (channels over blocks, sequences).
template <typename E> __device__ void filter(const Filter &p) {
    constexpr int TAPS = 4;
    int channel = blockIdx.x * THREADS + threadIdx.x, sequence = blockIdx.y, slot = p.slots[sequence];
    if (channel >= p.channels) return;
    float tap[TAPS], window[TAPS - 1], shift = p.shift ? p.shift[channel] : 0.0f;
    int missing = TAPS - p.filter;
    float *place = p.window + (int64_t(slot) * p.channels + channel) * (p.filter - 1);
#pragma unroll
    for (int k = 0; k < TAPS; ++k) {
        tap[k] = k >= missing ? p.taps[int64_t(channel) * p.filter + k - missing] : 0.0f;
        if (k + 1 < TAPS) window[k] = k >= missing && slot >= 0 ? place[k - missing] : 0.0f;
    }
    int count = p.counts ? min(p.counts[sequence], p.tokens) : p.tokens;
    for (int t = 0; t < p.tokens; ++t) {
        int64_t row = int64_t(sequence) * p.tokens + t;
        float x = widen(static_cast<const E *>(p.x)[row * p.x_step + channel]);
        if (p.u) {
            float sum = fmaf(tap[TAPS - 1], x, shift);
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) sum = fmaf(tap[k], window[k], sum);
            static_cast<E *>(p.u)[row * p.channels + channel] = narrow<E>(silu(sum));
        }
        if (t >= count) continue;
#pragma unroll
        for (int k = 0; k + 2 < TAPS; ++k) window[k] = window[k + 1];
        window[TAPS - 2] = x;
    }
    if (slot < 0 || !p.keep) return;
#pragma unroll
    for (int k = 0; k + 1 < TAPS; ++k)
        if (k >= missing) place[k - missing] = window[k];
}

// One block of 1024 threads a row.
struct Argmax {
    const void *logits; // [R, V]
    unsigned *ids;      // [R]
    int size;
};

template <typename E> __device__ void argmax(const Argmax &p) {
    constexpr int WARPS = 32;
    __shared__ float values[WARPS];
    __shared__ unsigned places[WARPS];
    wait_for_previous();
    int size = p.size;
    const E *row = static_cast<const E *>(p.logits) + int64_t(blockIdx.x) * size;
    float best = -INFINITY;
    unsigned place = NONE;
    bool bad = false;
#pragma unroll 4
    for (int i = threadIdx.x; i < size; i += WARPS * LANES) {
        float x = widen(row[i]);
        bad = bad || !(x < INFINITY);
        if (x > best) best = x, place = i;
    }
    auto merge = [&](float x, unsigned i) {
        if (x > best || (x == best && i < place)) best = x, place = i;
    };
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        merge(__shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, place, step));
    if (threadIdx.x % LANES == 0) values[threadIdx.x / LANES] = best, places[threadIdx.x / LANES] = place;
    bad = __syncthreads_or(bad);
    if (threadIdx.x >= LANES) return;
    best = values[threadIdx.x], place = places[threadIdx.x];
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        merge(__shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, place, step));
    if (threadIdx.x == 0) p.ids[blockIdx.x] = bad ? NONE : place;
}

#define STATE(E, S)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        decode_state_##E##_##S(const __grid_constant__ State p) { state<E, S>(p); }
#define KERNELS(E)                                                                                                      \
    STATE(E, 1) STATE(E, 2) STATE(E, 4) STATE(E, 8) STATE(E, 16) STATE(E, 32)                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_embed_##E(const __grid_constant__ Embed p) {           \
        embed<E>(p);                                                                                                    \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_filter_##E(const __grid_constant__ Filter p) {         \
        filter<E>(p);                                                                                                   \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(1024) decode_argmax_##E(const __grid_constant__ Argmax p) {            \
        argmax<E>(p);                                                                                                   \
    }
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
