// What lets the chunks of a scan run side by side, forward and backward, and the sums over blocks.
//
// selective_scan_summary / back_summary: grid as the scan's, with pieces for chunks, without those of the chunk that hands
// nothing on. A piece's own contribution to the state behind it is a sum over its tokens with weights 2^(a R), R the steps in
// between: it is taken from the piece's end, and ends early: a warp does once all its weights are below 2^-NEGLIGIBLE, a
// block once its warps have; the slowest channel of a block decides. Where states decay within a hundred tokens it costs
// little. At worst the special functions bind: going back over 8/9 of 2.8b-8k it takes 0.42 ms, where their rate would allow
// 0.38, a quarter of what the scan itself takes. A block needs some 45 ns a token, so pieces are short enough that several
// waves of blocks share them out (half of 130m whole 0.125 ms, in pieces of 128 tokens 0.081, going back; all of one H200).
// No spills; one tile ahead by asynchronous copies, one barrier a tile.
// selective_scan_carry: one thread a number of the state goes through the pieces in order, 8 loads ahead.
// The rest adds up shares in a fixed order. All of these are bound by memory.
#include "common/scan_prepare.cuh"

template <typename E, typename F> struct SummaryMemory {
    using T = Tile<E, F>;
    E delta[T::SIZE], x[T::SIZE], z[T::SIZE], raw[Coefficients<E, F, 1>::RAW];
    float inputs[2][Inputs<F>::SIZE], coefficient[2][F::TILE * F::WIDTH], bias[F::CHANNELS];
    uint8_t marks[3][F::TILE];
};

// What a piece hands on from a carried state of zero, and the sum of its steps, as far as weights are not negligible.
//   FORWARD   h = sum_t 2^(a R_t) delta_t u_t B_t, R_t the sum of the steps behind t; walked from the end
//   back      h = sum_t 2^(a S_t) dy_t C_t, S_t the sum of the steps up to and with t; walked from the beginning
template <typename E, typename F, bool FORWARD> __device__ void summary(const Scan &p) {
    using T = Tile<E, F>;
    constexpr int PER = F::PER, STATES = F::STATES, TILE = F::TILE;
    extern __shared__ __align__(16) char bytes[];
    auto &m = *reinterpret_cast<SummaryMemory<E, F> *>(bytes);
    Place<F> at(p, p.chunk / p.pieces, FORWARD ? 0 : p.pieces); // the last chunk hands nothing on
    Lane<F> lane(at);
    int n = p.states;
    int64_t row_states = int64_t(p.channels) * n, slot = int64_t(at.row) * p.slots + blockIdx.z + (FORWARD ? 0 : 1);
    typename F::States a, h = {};
    float slowest[PER], sum[PER] = {};
    lane.load(a, p.a, n, LOG2E);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
        slowest[k] = -INFINITY;
#pragma unroll
        for (int i = 0; i < STATES; ++i)
            if (k < lane.live && lane.part * STATES + i < n) slowest[k] = fmaxf(slowest[k], a[k][i]);
    }
    load_bias(p, at, m.bias);
    T own(at);
    bool aligned = (FORWARD && STATES == 4) || p.aligned; // as the kernels that follow
    int tiles = (at.end - at.begin + TILE - 1) / TILE;
    auto beginning = [&](int i) { return at.begin + (FORWARD ? tiles - 1 - i : i) * TILE; };
    const Sequence &sequence = FORWARD ? p.u : p.dy;
    const Coefficient &read = FORWARD ? p.b : p.c;
    Coefficients<E, F, 1> coefficient(read, read, at, beginning(0), n, p.aligned_coefficients);
    Walker<E, F> delta(p.delta, at, own, beginning(0)), x(sequence, at, own, beginning(0)), z(p.z, at, own, beginning(0));
    // whether tiles are whole, but for their tokens
    bool whole = STATES == 4 && T::PACKS >= THREADS && aligned && at.count == F::CHANNELS && coefficient.whole &&
                 p.softplus && (FORWARD || p.z.data) && !p.marks;
    // One buffer does: a thread asks for what it has just read itself.
    auto fetch = [&](int start) {
        constexpr int NEXT = FORWARD ? -1 : 1;
        int left = at.end - start;
        if (whole && left >= TILE) {
            delta.fetch(m.delta), x.fetch(m.x), coefficient.template fetch<true>(m.raw, left);
            if (!FORWARD) z.fetch(m.z);
        } else {
            delta.fetch(m.delta, at, own, left, aligned);
            x.fetch(m.x, at, own, left, aligned);
            if (!FORWARD && p.z.data) z.fetch(m.z, at, own, left, aligned);
            coefficient.template fetch<false>(m.raw, left);
        }
        commit_copies();
        delta.move(p.delta, NEXT), x.move(sequence, NEXT), z.move(p.z, NEXT), coefficient.move(NEXT);
    };
    fetch(beginning(0));
    bool found = load_marks(p, at, m.marks[0], beginning(0)), reset = false, over = false, idle = false;
    __syncthreads();
    // A tile has one barrier, so slow warps may still walk through the tile before: what they read has other buffers.
    for (int i = 0; i < tiles; ++i) {
        int start = beginning(i), buffer = i % 2;
        uint8_t *marks = m.marks[i % 3];
        wait_copies<0>();
        constexpr Beside BESIDE = FORWARD ? INPUTS : GRADIENTS;
        if (whole && start + TILE <= at.end) {
            coefficient.template widen_tile<true>(m.coefficient[buffer], m.raw, read, read, at, start);
            prepare<BESIDE, true, E, F>(p, at, own, m.x, m.delta, m.z, m.x, m.inputs[buffer], nullptr, m.bias, marks, start);
        } else {
            coefficient.template widen_tile<false>(m.coefficient[buffer], m.raw, read, read, at, start);
            prepare<BESIDE, false, E, F>(p, at, own, m.x, m.delta, m.z, m.x, m.inputs[buffer], nullptr, m.bias, marks, start);
        }
        bool here = found;
        if (i + 1 < tiles) fetch(beginning(i + 1)), found = load_marks(p, at, m.marks[(i + 1) % 3], beginning(i + 1));
        if (__syncthreads_and(over)) break;
        if (p.marks) reset = __syncthreads_or(here);
        auto use = [&](int t) {
            float ct[STATES], in[2 * PER];
            load_floats(in, m.inputs[buffer] + t * Inputs<F>::TOKEN + Inputs<F>::place(lane.own));
            load_floats(ct, m.coefficient[buffer] + t * F::WIDTH + lane.part * STATES);
#pragma unroll
            for (int k = 0; k < PER; ++k) {
                if (!FORWARD) sum[k] += in[k];
#pragma unroll
                for (int s = 0; s < STATES; ++s) h[k][s] = fmaf(exp2_fast(sum[k] * a[k][s]), in[PER + k] * ct[s], h[k][s]);
                if (FORWARD) sum[k] += in[k];
            }
        };
        if (reset) {
#pragma unroll 1
            for (int j = 0; j < TILE; ++j) {
                int t = FORWARD ? TILE - 1 - j : j;
                if (!FORWARD && marks[t] == START) break;
                use(t);
                if (FORWARD && marks[t] == START) break;
            }
        } else if (!idle) { // a warp that is done waits for the block's others
#pragma unroll 4
            for (int j = 0; j < TILE; ++j) use(FORWARD ? TILE - 1 - j : j);
        }
        if (reset) break;
        over = true;
#pragma unroll
        for (int k = 0; k < PER; ++k) over = over && (slowest[k] == -INFINITY || slowest[k] * sum[k] < -NEGLIGIBLE<E>);
        idle = __all_sync(~0u, over);
    }
    wait_copies<0>();
    lane.store(p.carried + slot * row_states, h, n);
    // a piece in which a sequence begins hands nothing on
#pragma unroll
    for (int k = 0; k < PER; ++k)
        if (lane.part == 0 && k < lane.live) p.span[slot * p.channels + lane.channel + k] = reset ? -1.0f : sum[k];
}

// From the ends of the pieces to the states before them (behind them, going back), in place. A negative span cuts.
extern "C" __global__ void selective_scan_carry(float *carried, const float *span, const float *a, const float *initial,
                                                int batch, int slots, int channels, int states, int back) {
    take_turn();
    int64_t size = int64_t(channels) * states, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    int row = blockIdx.y, channel = int(i) / states;
    float decay = LOG2E * a[i];
    float h = initial ? initial[row * size + i] : 0.0f;
    constexpr int AHEAD = 8;
    for (int first = 0; first < slots; first += AHEAD) {
        float end[AHEAD], rest[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            int k = back ? slots - 1 - first - j : first + j;
            if (first + j + 1 < slots) {
                end[j] = carried[(int64_t(row) * slots + k) * size + i];
                rest[j] = span[(int64_t(row) * slots + k) * channels + channel];
            }
        }
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            int k = back ? slots - 1 - first - j : first + j;
            if (first + j < slots) {
                carried[(int64_t(row) * slots + k) * size + i] = h;
                if (first + j + 1 < slots) h = rest[j] < 0.0f ? end[j] : fmaf(exp2_fast(decay * rest[j]), h, end[j]);
            }
        }
    }
}

// dB or dC [B, L, G, N] from the shares of the blocks, in their order: `per` blocks a group, `side` 0 for dB, N for dC.
template <typename E>
__device__ void reduce_coefficients(void *out, const float *sums, int per, int side, int64_t tokens, int n, int groups) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= tokens * n) return;
    int64_t token = i < UINT32_MAX ? uint32_t(i) / uint32_t(n) : i / n; // the latter takes as long as all else
    int k = i - token * n, group = blockIdx.y;
    const float *from = sums + int64_t(group) * per * tokens * 2 * n + token * 2 * n + side + k;
    float sum = 0.0f;
#pragma unroll 8
    for (int j = 0; j < per; ++j) sum += from[j * tokens * 2 * n];
    static_cast<E *>(out)[(token * groups + group) * n + k] = narrow<E>(sum);
}

// dB or dC [D, N] where constant in time, from the shares of the channels' blocks: grid (N, D), a block adds up one.
template <typename E> __device__ void reduce_constant(void *out, const float *sums, int side, int64_t tokens, int n) {
    __shared__ float shares[THREADS];
    const float *from = sums + blockIdx.y * tokens * 2 * n + side + blockIdx.x;
    float sum = 0.0f;
    for (int64_t t = threadIdx.x; t < tokens; t += THREADS) sum += from[t * 2 * n];
    shares[threadIdx.x] = sum;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) shares[threadIdx.x] += shares[threadIdx.x + step];
    }
    if (threadIdx.x == 0) static_cast<E *>(out)[blockIdx.y * n + blockIdx.x] = narrow<E>(shares[0]);
}

// dA, dD and the gradient of the bias from the shares of `count` chunks, out[i] = sum_j shares[j, i], in order.
extern "C" __global__ void selective_scan_sums(float *a, const float *a_shares, float *d, const float *d_shares, float *bias,
                                               const float *bias_shares, int states, int channels, int count) {
    take_turn();
    int64_t size = int64_t(channels) * states, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size + 2 * channels) return;
    float *out = a;
    const float *shares = a_shares;
    if (i >= size) {
        i -= size, size = channels;
        bool second = i >= channels;
        out = second ? bias : d, shares = second ? bias_shares : d_shares;
        i -= second ? channels : 0;
    }
    float sum = 0.0f;
#pragma unroll 8
    for (int j = 0; j < count; ++j) sum += shares[j * size + i];
    out[i] = sum;
}

#define REDUCE(E)                                                                                                      \
    extern "C" __global__ void selective_scan_coefficients_##E(void *out, const float *sums, int per, int side,        \
                                                               int64_t tokens, int n, int groups) {                    \
        take_turn();                                                                                                   \
        reduce_coefficients<E>(out, sums, per, side, tokens, n, groups);                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_constant_##E(                                 \
        void *out, const float *sums, int side, int64_t tokens, int n) {                                               \
        take_turn();                                                                                                   \
        reduce_constant<E>(out, sums, side, tokens, n);                                                                \
    }
REDUCE(float)
REDUCE(bf16)
REDUCE(f16)

template <typename E, typename F> __device__ void summary_forward(const Scan &p) { summary<E, F, true>(p); }
template <typename E, typename F> __device__ void summary_back(const Scan &p) { summary<E, F, false>(p); }

// Forward and back take the forms of the kernels that they prepare.
#define FORWARD(BLOCKS, E, P, N, S)                                                                                    \
    SCAN_KERNEL(selective_scan_summary, summary_forward, SummaryMemory, BLOCKS, E, P, N, S)
#define BACK(BLOCKS, E, P, N, S)                                                                                       \
    SCAN_KERNEL(selective_scan_back_summary, summary_back, SummaryMemory, BLOCKS, E, P, N, S)
#define SUMMARIES(E)                                                                                                   \
    FORWARD(4, E, 1, 4, 4)                                                                                             \
    FORWARD(4, E, 2, 4, 4)                                                                                             \
    FORWARD(2, E, 2, 8, 1)                                                                                             \
    FORWARD(3, E, 2, 8, 2)                                                                                             \
    FORWARD(4, E, 2, 8, 4)                                                                                             \
    FORWARD(4, E, 2, 8, 8)                                                                                             \
    FORWARD(4, E, 2, 8, 16)                                                                                            \
    FORWARD(4, E, 2, 8, 32)                                                                                            \
    BACK(4, E, 2, 4, 1)                                                                                                \
    BACK(5, E, 2, 4, 2)                                                                                                \
    BACK(5, E, 2, 4, 4)                                                                                                \
    BACK(5, E, 2, 4, 8)                                                                                                \
    BACK(5, E, 2, 4, 16)                                                                                               \
    BACK(5, E, 2, 4, 32)                                                                                               \
    BACK(4, E, 1, 8, 32)
SUMMARIES(float)
SUMMARIES(bf16)
SUMMARIES(f16)
