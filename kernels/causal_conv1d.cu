// Depthwise causal convolution, forward and backward; src/ops/causal_conv1d has the formula.
//
// Grid (strips of tokens, vectors of channels over blocks, batch), 128 threads. A thread owns WIDTH neighbouring channels
// and walks a strip of tokens with the last TAPS inputs in registers; a filter of fewer taps has zeros in front. Where
// padding lies within a sequence, a walk looks back by the marks for the inputs before its strip.
//
// Bytes: forward reads x and writes y once, plus TAPS - 1 tokens before each strip; backward reads x and dy and writes
// dx, TAPS - 1 tokens on both sides more. No atomics: the shares of dweight and dbias of each strip are added up by
// causal_conv1d_sum in order.
// Forward keeps 12 tokens of a thread on their way through shared memory (16 KB a block in bf16), which registers could not
// hold, and strips are as long as lets all blocks run at once: launches and last waves cost as much as memory else.
// Registers (4 taps): forward 75, 6 blocks a multiprocessor, backward 158. One H100, K 4, bf16, beside a copy of as many
// bytes in the same run: 130m 0.045 ms (84% of the copy's speed), 2.8b-8k 0.129 (89%). 16-byte accesses with the next four
// tokens in registers, 159 of them, took 0.167; the next four of 8 bytes in registers 0.144. Faster still: backward's shares
// summed within a block first.
#include "common/types.cuh"

constexpr int THREADS = 128;
constexpr uint8_t START = 1;
constexpr uint8_t PAD = 2;

struct Sequence {
    void *data;
    int64_t row, token;
};

struct Conv {
    Sequence x, y, dy, dx;
    const void *weight, *bias;                     // [D, K], [D]: f32 where wide, else of the sequences' type
    const float *initial, *dfinal;                 // [B, D, K - 1] twice
    float *final, *dinitial, *shares;              // [B, D, K - 1] twice, [B, strips, K + 1, D]
    const uint8_t *marks;                          // [B, L]
    int length, channels, taps, strip, silu, wide_weight, wide_bias;
};

// A thread's place and its walk: the inputs of the window, oldest first.
template <typename E, int TAPS, int WIDTH> struct Walk {
    const Conv &p;
    int channel, row, begin, end, live;
    float window[TAPS][WIDTH], weight[TAPS][WIDTH], bias[WIDTH];

    __device__ explicit Walk(const Conv &p) : p(p) {
        channel = (blockIdx.y * THREADS + threadIdx.x) * WIDTH;
        live = channel < p.channels;
        row = blockIdx.z;
        begin = blockIdx.x * p.strip;
        end = min(begin + p.strip, p.length);
        if (!live) return;
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                int tap = k - (TAPS - p.taps);
                weight[k][i] = tap >= 0 ? parameter(p.weight, int64_t(channel + i) * p.taps + tap, p.wide_weight) : 0.0f;
                window[k][i] = 0.0f;
            }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) bias[i] = p.bias ? parameter(p.bias, channel + i, p.wide_bias) : 0.0f;
    }

    static __device__ float parameter(const void *from, int64_t i, int wide) {
        return wide ? static_cast<const float *>(from)[i] : widen(static_cast<const E *>(from)[i]);
    }

    __device__ uint8_t mark(int t) const { return p.marks ? p.marks[int64_t(row) * p.length + t] : 0; }

    __device__ void load(float (&to)[WIDTH], const Sequence &s, int t) const {
        auto from = static_cast<const E *>(s.data) + row * s.row + t * s.token + channel;
        Pack<E, WIDTH> v = *reinterpret_cast<const Pack<E, WIDTH> *>(from);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) to[i] = widen(v.at[i]);
    }

    __device__ void store(const Sequence &s, int t, const float (&from)[WIDTH]) const {
        Pack<E, WIDTH> v;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v.at[i] = narrow<E>(from[i]);
        auto to = static_cast<E *>(s.data) + row * s.row + t * s.token + channel;
        *reinterpret_cast<Pack<E, WIDTH> *>(to) = v;
    }

    // Place of slot `k >= 1` of the window in a [B, D, K - 1] state; below zero: not part of it.
    __device__ int64_t slot(int k, int i) const {
        int column = k - 1 - (TAPS - p.taps);
        return column < 0 ? -1 : (int64_t(row) * p.channels + channel + i) * (p.taps - 1) + column;
    }

    // The window before token `begin`: slots 1.. hold the last inputs of its sequence.
    __device__ void look_back() {
        int t = begin - 1, k = TAPS - 1;
        for (; k >= 1 && t >= 0; --t) {
            uint8_t m = mark(t);
            if (m == PAD) continue;
#pragma unroll
            for (int j = 1; j < TAPS; ++j)
                if (j == k) load(window[j], p.x, t);
            --k;
            if (m == START) return;
        }
        if (!p.initial) return;
        // slots still empty: the latest inputs of the initial state
#pragma unroll
        for (int j = 1; j < TAPS; ++j)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                int64_t place = j <= k ? slot(j + TAPS - 1 - k, i) : -1;
                if (place >= 0) window[j][i] = p.initial[place];
            }
    }

    __device__ void clear() {
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) window[k][i] = 0.0f;
    }

    __device__ void push(const float (&x)[WIDTH]) {
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) window[k][i] = window[k + 1][i];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) window[TAPS - 1][i] = x[i];
    }

    // The filter's result for the newest input, before SiLU.
    __device__ void filter(float (&sum)[WIDTH]) const {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            sum[i] = bias[i];
#pragma unroll
            for (int k = 0; k < TAPS; ++k) sum[i] = fmaf(weight[k][i], window[k][i], sum[i]);
        }
    }
};

// Groups of tokens on their way through shared memory; a thread uses what it has asked for itself.
template <typename E, int WIDTH> struct Ring {
    static constexpr int AHEAD = 4, DEPTH = WIDTH == 1 ? 1 : 4;
    Pack<E, WIDTH> at[DEPTH][AHEAD][THREADS];
};

// Filters the tokens of a strip.
template <bool MARKED, typename E, int TAPS, int WIDTH>
__device__ __forceinline__ void filter_strip(Walk<E, TAPS, WIDTH> &walk, Ring<E, WIDTH> &ring) {
    constexpr int AHEAD = Ring<E, WIDTH>::AHEAD, DEPTH = Ring<E, WIDTH>::DEPTH;
    using Elements = Pack<E, WIDTH>;
    const Conv &p = walk.p;
    auto from = static_cast<const E *>(p.x.data) + walk.row * p.x.row + walk.begin * p.x.token + walk.channel;
    auto to = static_cast<E *>(p.y.data) + walk.row * p.y.row + walk.begin * p.y.token + walk.channel;
    auto use = [&](const Elements &in, int t) {
        uint8_t m = MARKED ? walk.mark(t) : 0;
        float x[WIDTH], y[WIDTH] = {};
        if (!MARKED || m != PAD) {
            if (MARKED && m == START) walk.clear();
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) x[i] = widen(in.at[i]);
            walk.push(x);
            walk.filter(y);
            if (p.silu)
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) y[i] = silu(y[i]);
        }
        Elements out;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) out.at[i] = narrow<E>(y[i]);
        *reinterpret_cast<Elements *>(to) = out;
        to += p.y.token;
    };
    int t = walk.begin;
    if constexpr (WIDTH == 1) {
        walk.look_back();
        for (; t < walk.end; ++t, from += p.x.token) use(*reinterpret_cast<const Elements *>(from), t);
    } else {
        int left = walk.end - t;
        auto ask = [&](int slot) {
#pragma unroll
            for (int j = 0; j < AHEAD; ++j, from += p.x.token)
                if (j < left) copy_async<sizeof(Elements)>(&ring.at[slot][j][threadIdx.x], from);
            left -= AHEAD;
            commit_copies();
        };
#pragma unroll
        for (int slot = 0; slot + 1 < DEPTH; ++slot) ask(slot);
        walk.look_back();
        int slot = 0;
        for (; t + AHEAD <= walk.end; t += AHEAD, slot = (slot + 1) % DEPTH) {
            wait_copies<DEPTH - 2>();
            Elements now[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) now[j] = ring.at[slot][j][threadIdx.x];
            ask((slot + DEPTH - 1) % DEPTH);
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) use(now[j], t + j);
        }
        wait_copies<0>();
#pragma unroll 1
        for (int j = 0; t < walk.end; ++j, ++t) use(ring.at[slot][j][threadIdx.x], t);
    }
}

template <typename E, int TAPS, int WIDTH> __device__ void forward(const Conv &p) {
    Walk<E, TAPS, WIDTH> walk(p);
    if (!walk.live) return;
    __shared__ Ring<E, WIDTH> ring;
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

template <typename E, int TAPS, int WIDTH> __device__ void backward(const Conv &p) {
    Walk<E, TAPS, WIDTH> walk(p);
    if (!walk.live) return;
    walk.look_back();
    constexpr int NONE = -1000000;
    // the gradients of the window's inputs so far, and whose they are: a token, or slot k of the initial state as -k
    float pending[TAPS][WIDTH] = {}, dweight[TAPS][WIDTH] = {}, dbias[WIDTH] = {};
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
    constexpr int AHEAD = 4;
    int waiting = TAPS - 1; // tokens to come that may add to an input of this strip
    bool over = false;
    int t = walk.begin;
    while (!over && t < p.length) {
        float x[AHEAD][WIDTH], g[AHEAD][WIDTH];
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (t + j < p.length) walk.load(x[j], p.x, t + j), walk.load(g[j], p.dy, t + j);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            if (over || t == p.length) break;
            uint8_t m = walk.mark(t);
            if (m == PAD) {
                float none[WIDTH] = {};
                if (t < walk.end) walk.store(p.dx, t, none);
                ++t;
                continue;
            }
            if (m == START) {
#pragma unroll
                for (int k = 1; k < TAPS; ++k) give(k);
                walk.clear();
#pragma unroll
                for (int k = 0; k < TAPS; ++k)
#pragma unroll
                    for (int i = 0; i < WIDTH; ++i) pending[k][i] = 0.0f;
            }
            if (t >= walk.end && (m == START || waiting-- == 0)) {
                over = true;
                break;
            }
            walk.push(x[j]);
            if (p.silu) {
                float s[WIDTH];
                walk.filter(s);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) g[j][i] *= silu_slope(s[i], sigmoid(s[i]));
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
                float counted = own ? g[j][i] : 0.0f;
#pragma unroll
                for (int k = 0; k < TAPS; ++k) {
                    pending[k][i] = fmaf(g[j][i], walk.weight[k][i], pending[k][i]);
                    dweight[k][i] = fmaf(counted, walk.window[k][i], dweight[k][i]);
                }
                dbias[i] += counted;
            }
            give(0);
            ++t;
        }
    }
    if (!over) {
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
    float *shares = p.shares + (int64_t(walk.row) * gridDim.x + blockIdx.x) * (p.taps + 1) * p.channels + walk.channel;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            int tap = k - (TAPS - p.taps);
            if (tap >= 0) shares[int64_t(tap) * p.channels + i] = dweight[k][i];
        }
        shares[int64_t(p.taps) * p.channels + i] = dbias[i];
    }
}

// dweight [D, K] and dbias [D] from `count` shares [K + 1, D], in order. Block: 32 columns, 4 rows that take turns.
extern "C" __global__ void causal_conv1d_sum(float *dweight, float *dbias, const float *shares, int count, int channels,
                                             int taps) {
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
        causal_conv1d_fwd_##E##_##TAPS##_##WIDTH(const __grid_constant__ Conv p) { forward<E, TAPS, WIDTH>(p); }       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        causal_conv1d_bwd_##E##_##TAPS##_##WIDTH(const __grid_constant__ Conv p) { backward<E, TAPS, WIDTH>(p); }
#define WIDTHS(E, TAPS) KERNELS(E, TAPS, 1) KERNELS(E, TAPS, 4)
#define ELEMENTS(TAPS) WIDTHS(float, TAPS) WIDTHS(bf16, TAPS) WIDTHS(f16, TAPS)
ELEMENTS(2)
ELEMENTS(4)
ELEMENTS(8)
