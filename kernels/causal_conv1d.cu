// Depthwise causal convolution, forward and backward; src/ops/causal_conv1d has the formula.
//
// Grid (vectors of channels over blocks, batch, strips of tokens), 128 threads. A thread owns WIDTH neighbouring channels and
// walks a strip of tokens with the last TAPS inputs in registers; a filter of fewer taps has zeros in front. A walk begins a few
// tokens before its strip, so that nothing waits for the window; where padding lies within a sequence, it looks back by the
// marks instead. Backward, each warp of a block has a strip of its own.
//
// Bytes: forward reads x and writes y once, plus a few tokens before each strip; backward reads x and dy and writes dx, some
// tokens on both sides more. No atomics: the shares of dweight and dbias of a block's strips are added up in order, those of
// all blocks by causal_conv1d_sum.
// Tokens are on their way through shared memory (12 of a thread forward, 16 KB a block; 8 backward, 24 KB, in bf16), which
// registers could not hold. Registers (4 taps): forward 72, 7 blocks a multiprocessor, backward 143, 3 blocks.
// One H200 (a copy of 4 GB: 4.27 TB/s), K 4, bf16, calls in a row, each of which begins while the one ahead ends: 130m 0.0294 ms,
// 80%, 2.8b-8k 0.0877, 90% (one behind the other 0.0319 and 0.0903). Over more data than its L2 cache holds, in a harness, share
// of the speed of a copy of as many bytes in the same run (of a copy of 512 MB, 4.17 TB/s), one behind the other: 0.0326 ms, 82%
// (74%), 0.0905, 90% (89%); backward 0.0577 (63%) and 0.180 (67%). Without SiLU 0.033 and 0.090: arithmetic does not bind. Strips of 16 to 128 tokens are within 5% of each other, and a last
// wave of shorter strips gained nothing. Slower: 16-byte accesses (0.038 and 0.101).
#include "common/conv.cuh"

// Filters the tokens of a strip.
template <bool MARKED, typename E, int TAPS, int WIDTH>
__device__ __forceinline__ void filter_strip(Walk<E, TAPS, WIDTH> &walk, Ring<E, WIDTH, 4> &ring) {
    constexpr int AHEAD = ring.AHEAD, DEPTH = ring.DEPTH;
    using Elements = Pack<E, WIDTH>;
    const Conv &p = walk.p;
    bool before = !MARKED && walk.begin > 0;
    int first = walk.begin - (before ? walk.HALO : 0), left = walk.end - first;
    const E *from = walk.at(p.x, first);
    E *to = walk.at(p.y, walk.begin);
    auto ask = [&](int slot) {
        ring.ask(slot, from, p.x.token, left);
        left -= AHEAD;
        commit_copies();
    };
    // COUNT tokens from `t`: filters first, then what they go through, so that all of them are under way together
    auto use = [&](auto &in, int t) {
        constexpr int COUNT = sizeof(in) / sizeof(Elements);
        float y[COUNT][WIDTH] = {};
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            uint8_t m = MARKED ? walk.mark(t + j) : 0;
            if (MARKED && m == PAD) continue;
            if (MARKED && m == START) walk.clear();
            walk.push(in[j]);
            walk.filter(y[j]);
        }
        if (p.silu)
#pragma unroll
            for (int j = 0; j < COUNT; ++j)
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) y[j][i] = silu(y[j][i]);
#pragma unroll
        for (int j = 0; j < COUNT; ++j, to += p.y.token) {
            Elements out;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) out.at[i] = narrow<E>(y[j][i]);
            *reinterpret_cast<Elements *>(to) = out;
        }
    };
    unsigned slot = 0;
    // the next group, another one asked for in its place
    auto next = [&](Elements(&now)[AHEAD]) {
        if (DEPTH == 1) ask(0);
        wait_copies<DEPTH == 1 ? 0 : DEPTH - 2>();
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) now[j] = ring.at[slot][j][threadIdx.x];
        if (DEPTH > 1) ask((slot + DEPTH - 1) % DEPTH);
        slot = (slot + 1) % DEPTH;
    };
#pragma unroll
    for (int slot = 0; slot + 1 < DEPTH; ++slot) ask(slot);
    // while they are on their way
    walk.parameters();
    Elements now[AHEAD];
    if (before) {
#pragma unroll
        for (int group = 0; group < walk.HALO; group += AHEAD) {
            next(now);
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) walk.push(now[j]);
        }
    } else {
        walk.look_back();
    }
    int t = walk.begin;
    for (; t + AHEAD <= walk.end; t += AHEAD) {
        next(now);
        use(now, t);
    }
    if (DEPTH == 1) ask(0);
    wait_copies<0>();
#pragma unroll 1
    for (int j = 0; t < walk.end; ++j, ++t) {
        Elements last[1] = {ring.at[slot][j][threadIdx.x]};
        use(last, t);
    }
}

template <typename E, int TAPS, int WIDTH> __device__ void forward(const Conv &p) {
    Walk<E, TAPS, WIDTH> walk(p, blockIdx.x * THREADS + threadIdx.x, blockIdx.z);
    if (!walk.live) return;
    __shared__ Ring<E, WIDTH, 4> ring;
    if (p.marks)
        filter_strip<true>(walk, ring);
    else
        filter_strip<false>(walk, ring);
    if (walk.end < p.length) return;
    // slots 1.. of the next token's window, were there one
#pragma unroll
    for (int k = 1; k < TAPS; ++k)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            int64_t place = walk.slot(k, i);
            if (place >= 0) p.final[place] = walk.window[k][i];
        }
}

// Groups of tokens and gradients on their way; behind them, the shares of a block's strips.
template <typename E, int TAPS, int WIDTH> union BackwardMemory {
    struct {
        Ring<E, WIDTH, sizeof(E) == 4 ? 2 : 3> x, dy;
    };
    float shares[TAPS + 1][WIDTH][THREADS];
};

// Walks a strip back: gradients of its inputs and of what lies before the row, and the strip's share of dweight and dbias.
template <bool MARKED, typename E, int TAPS, int WIDTH>
__device__ __forceinline__ void walk_strip(Walk<E, TAPS, WIDTH> &walk, BackwardMemory<E, TAPS, WIDTH> &m,
                                           float (&dweight)[TAPS][WIDTH], float (&dbias)[WIDTH]) {
    const Conv &p = walk.p;
    constexpr int AHEAD = m.x.AHEAD, DEPTH = m.x.DEPTH;
    // tokens beyond the strip add to the gradients of its last inputs
    bool before = !MARKED && walk.begin > 0;
    int first = walk.begin - (before ? walk.HALO : 0);
    int stop = MARKED ? p.length : min(walk.end + TAPS - 1, p.length), left = stop - first;
    const E *x = walk.at(p.x, first), *dy = walk.at(p.dy, first);
    auto ask = [&](int slot) {
        m.x.ask(slot, x, p.x.token, left);
        m.dy.ask(slot, dy, p.dy.token, left);
        left -= AHEAD;
        commit_copies();
    };
#pragma unroll
    for (int slot = 0; slot + 1 < DEPTH; ++slot) ask(slot);
    walk.parameters();
    if (!before) walk.look_back();
    constexpr int NONE = -1000000;
    // the gradients of the window's inputs so far, and whose they are: a token, or slot k of the initial state as -k
    float pending[TAPS][WIDTH] = {};
    int owner[TAPS];
#pragma unroll
    for (int k = 0; k < TAPS; ++k) owner[k] = walk.begin == 0 && k > 0 && walk.slot(k, 0) >= 0 ? -k : NONE;
    auto give = [&](int k) {
        if (owner[k] >= 0) {
            walk.store(p.dx, owner[k], pending[k]);
        } else if (owner[k] != NONE && p.dinitial) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) p.dinitial[walk.slot(-owner[k], i)] = pending[k][i];
        }
        owner[k] = NONE;
    };
    int waiting = TAPS - 1; // tokens to come that may add to an input of this strip
    bool over = false;
    unsigned slot = 0;
    for (int t = first; !over && t < stop; slot = (slot + 1) % DEPTH) {
        if (DEPTH == 1) ask(0);
        wait_copies<DEPTH == 1 ? 0 : DEPTH - 2>();
        if (DEPTH > 1) ask((slot + DEPTH - 1) % DEPTH);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j, ++t) {
            if (over || t >= stop) break;
            uint8_t mark = MARKED ? walk.mark(t) : 0;
            if (MARKED && mark == PAD) {
                float none[WIDTH] = {};
                if (t < walk.end) walk.store(p.dx, t, none);
                continue;
            }
            if (MARKED && mark == START) {
#pragma unroll
                for (int k = 1; k < TAPS; ++k) give(k);
                walk.clear();
#pragma unroll
                for (int k = 0; k < TAPS; ++k)
#pragma unroll
                    for (int i = 0; i < WIDTH; ++i) pending[k][i] = 0.0f;
            }
            if (MARKED && t >= walk.end && (mark == START || waiting-- == 0)) {
                over = true;
                break;
            }
            walk.push(m.x.at[slot][j][threadIdx.x]);
            if (t < walk.begin) continue;
            float g[WIDTH];
            widen(g, m.dy.at[slot][j][threadIdx.x]);
            if (p.silu) {
                float s[WIDTH];
                walk.filter(s);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) g[i] *= silu_slope(s[i], sigmoid(s[i]));
            }
#pragma unroll
            for (int k = 0; k + 1 < TAPS; ++k) {
                owner[k] = owner[k + 1];
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) pending[k][i] = pending[k + 1][i];
            }
            bool own = t < walk.end;
            owner[TAPS - 1] = own ? t : NONE;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                pending[TAPS - 1][i] = 0.0f;
                float counted = own ? g[i] : 0.0f;
#pragma unroll
                for (int k = 0; k < TAPS; ++k) {
                    pending[k][i] = fmaf(g[i], walk.weight[k][i], pending[k][i]);
                    dweight[k][i] = fmaf(counted, walk.window[k][i], dweight[k][i]);
                }
                dbias[i] += counted;
            }
            give(0);
        }
    }
    wait_copies<0>();
    if (!over && stop == p.length) {
        // the last inputs of the row are its final state
#pragma unroll
        for (int k = 1; k < TAPS; ++k) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                int64_t place = walk.slot(k, i);
                if (p.dfinal && place >= 0) pending[k][i] += p.dfinal[place];
            }
            give(k);
        }
    }
#pragma unroll
    for (int k = 0; k < TAPS; ++k) give(k);
}

template <typename E, int TAPS, int WIDTH> __device__ void backward(const Conv &p) {
    __shared__ BackwardMemory<E, TAPS, WIDTH> m;
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    Walk<E, TAPS, WIDTH> walk(p, blockIdx.x * LANES + lane, blockIdx.z * WARPS + warp);
    float dweight[TAPS][WIDTH] = {}, dbias[WIDTH] = {};
    if (walk.live) {
        if (p.marks)
            walk_strip<true>(walk, m, dweight, dbias);
        else
            walk_strip<false>(walk, m, dweight, dbias);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k <= TAPS; ++k)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) m.shares[k][i][threadIdx.x] = k < TAPS ? dweight[k][i] : dbias[i];
    __syncthreads();
    float *shares = p.shares + (int64_t(walk.row) * gridDim.z + blockIdx.z) * (p.taps + 1) * p.channels;
    for (int k = warp; k <= p.taps; k += WARPS) {
        int tap = k == p.taps ? TAPS : k + TAPS - p.taps;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += m.shares[tap][i][w * LANES + lane];
            if (walk.channel < p.channels) shares[int64_t(k) * p.channels + walk.channel + i] = sum;
        }
    }
}

// dweight [D, K] and dbias [D] from `count` shares [K + 1, D], in order. Block: 32 columns, 4 rows that take turns.
extern "C" __global__ void causal_conv1d_sum(float *dweight, float *dbias, const float *shares, int count, int channels,
                                             int taps) {
    take_turn();
    __shared__ float sums[4][32];
    int lane = threadIdx.x % 32, turn = threadIdx.x / 32;
    int i = blockIdx.x * 32 + lane, size = (taps + 1) * channels;
    float sum = 0.0f;
    if (i < size)
#pragma unroll 8
        for (int j = turn; j < count; j += 4) sum += shares[int64_t(j) * size + i];
    sums[turn][lane] = sum;
    __syncthreads();
    if (turn || i >= size) return;
    sum = sums[0][lane] + sums[1][lane] + sums[2][lane] + sums[3][lane];
    if (i < taps * channels)
        dweight[int64_t(i % channels) * taps + i / channels] = sum;
    else
        dbias[i - taps * channels] = sum;
}

#define KERNELS(E, TAPS, WIDTH)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        causal_conv1d_fwd_##E##_##TAPS##_##WIDTH(const __grid_constant__ Conv p) {                                     \
        take_turn();                                                                                                   \
        forward<E, TAPS, WIDTH>(p);                                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        causal_conv1d_bwd_##E##_##TAPS##_##WIDTH(const __grid_constant__ Conv p) {                                     \
        take_turn();                                                                                                   \
        backward<E, TAPS, WIDTH>(p);                                                                                   \
    }
#define WIDTHS(E, TAPS) KERNELS(E, TAPS, 1) KERNELS(E, TAPS, 4)
#define ELEMENTS(TAPS) WIDTHS(float, TAPS) WIDTHS(bf16, TAPS) WIDTHS(f16, TAPS)
ELEMENTS(2)
ELEMENTS(4)
ELEMENTS(8)
