// Retention between its segments of time, and the gradient of the decay.
//
// `retention_carry`: from the states that segments end in, begun from zero, to those they begin with, in place. One thread
// a number of a state; grid (blocks of K V numbers, batch * heads). Bytes: the states read and written once.
//
// With G the gradient of the state, D[t] = <decay[t] S[t-1], G[t]> is that of log_decay[t], and
//     D[t+1] = D[t] + v[t] . dv[t] - o[t] . do[t]
// so that a segment needs one product of whole states, at its beginning, and two short ones a token; segments are kept short
// where decays learn, for the sum's rounding. `retention_beginnings` has the former, a block for a segment; and
// `retention_tokens` the latter, a warp a token and head; `retention_decay` sums them, a thread a segment; grids
// (blocks of them, batch).
#include "common/retention.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    retention_carry(float *carried, const float *factors, const float *initial, int64_t numbers, int segments,
                    int backwards) {
    take_turn();
    int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = blockIdx.y;
    if (i >= numbers) return;
    float state = initial ? initial[row * numbers + i] : 0.0f;
    for (int step = 0; step < segments; ++step) {
        int64_t segment = row * segments + (backwards ? segments - 1 - step : step);
        // the last one's own state begins nothing, and nobody computed it
        float own = step + 1 < segments ? carried[segment * numbers + i] : 0.0f;
        carried[segment * numbers + i] = state;
        if (step + 1 < segments) state = fmaf(factors[segment], state, own);
    }
}

// D at the first token of each segment: `states` before the segments, `gradients` behind them, which enter the one before.
// Grid (segments, batch * heads).
extern "C" __global__ void __launch_bounds__(THREADS)
    retention_beginnings(float *to, const float *states, const float *gradients, const float *initial,
                         const float *dinitial, int64_t numbers, int segments) {
    take_turn();
    __shared__ double sums[THREADS / LANES];
    int64_t segment = blockIdx.x, row = blockIdx.y, place = (row * segments + segment) * numbers;
    const float *s = segment ? states + place : initial ? initial + row * numbers : nullptr;
    const float *g = segment ? gradients + place - numbers : dinitial + row * numbers;
    double sum = 0.0;
    if (s)
        for (int64_t i = threadIdx.x; i < numbers; i += THREADS) sum += double(s[i]) * g[i];
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < THREADS / LANES; ++i) sum += sums[i];
        to[row * segments + segment] = float(sum);
    }
}

// v . dv - o . do; q, k, v and o of the arguments are v, dv, o and do.
template <typename E> __device__ void tokens(const Retention &p, float *to) {
    int64_t warp = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / LANES;
    if (warp >= int64_t(p.heads) * p.length) return;
    int lane = threadIdx.x % LANES, head = warp % p.heads;
    int64_t token = warp / p.heads, row = blockIdx.y;
    auto at = [&](const Heads &x) { return x.at<E>(row, head) + token * x.token; };
    const E *v = at(p.q), *dv = at(p.k), *o = at(p.v), *d = at(p.o);
    float sum = 0.0f;
    for (int i = lane; i < p.values; i += LANES) sum += widen(v[i]) * widen(dv[i]) - widen(o[i]) * widen(d[i]);
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane == 0) to[(row * p.length + token) * p.heads + head] = sum;
}
#define TOKENS(E)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        retention_tokens_##E(const __grid_constant__ Retention p, float *to) { take_turn(); tokens<E>(p, to); }
TOKENS(float)
TOKENS(bf16)
TOKENS(f16)

// From the tokens' differences to D, in place.
extern "C" __global__ void __launch_bounds__(THREADS)
    retention_decay(const __grid_constant__ Retention p, float *tokens, const float *beginnings) {
    take_turn();
    int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= int64_t(p.heads) * p.segments) return;
    int head = i % p.heads;
    int64_t segment = i / p.heads, row = blockIdx.y;
    double sum = beginnings[(row * p.heads + head) * p.segments + segment];
    int begin = segment * p.segment, end = min(begin + p.segment, p.length);
    for (int token = begin; token < end; ++token) {
        int64_t place = (row * p.length + token) * p.heads + head;
        float difference = tokens[place];
        uint8_t mark = p.marks ? p.marks[row * p.length + token] : 0;
        if (mark == PAD) {
            tokens[place] = 0.0f;
            continue;
        }
        float log = p.log_decay[p.per_token ? place : head];
        if (mark == START || log < LEAST_LOGARITHM) sum = 0.0;
        tokens[place] = float(sum);
        sum += difference;
    }
}
