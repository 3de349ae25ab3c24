// A few tokens of the selective scan through a state: the step of generation.
//
// Grid (channels over blocks, rows in turns), 128 threads. A state of N numbers is spread over SPLIT lanes with four
// numbers each, in registers; neighbouring lanes read neighbouring numbers, 16 bytes at a time where N is a multiple of
// four. A lane takes ROWS rows at a time, whose states and first tokens are all on their way before the first is used. No
// shared memory. The lanes of a channel share its inputs, which are few. The usual call, one token in whole vectors, has a
// kernel of its own, which takes half the registers.
//
// Bytes: the state, read and written once (8 B D N); all else is small. On an H200, D 5120, N 16, bf16, in a graph: B 512
// 0.0904 ms, 93 % of the rate of a copy; B 64 0.0112, 94 %; B 1 0.0015 to 0.0016, of which an empty kernel takes 0.0007. The
// kernel alone for one row, us: 1.64 with divisions in 32 bits and loads where their numbers are used, 1.58 without, 1.53
// with all loads ahead (B 512: 96.3, 92.2, 89.8); 0.3 less where nothing is allocated in between and it is launched early.
#include "common/scan.cuh"

constexpr int NUMBERS = 4;

// Four numbers from `place` on, of which `n` exist.
__device__ __forceinline__ void load_four(float (&to)[NUMBERS], const float *from, int64_t place, int n, bool whole) {
    if (whole) {
        float4 v = *reinterpret_cast<const float4 *>(from + place);
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) to[i] = i < n ? from[place + i] : 0.0f;
    }
}

// Four numbers of B or C, as load_four.
template <typename E>
__device__ __forceinline__ void load_coefficients(float (&to)[NUMBERS], const Coefficient &x, int64_t place, int n,
                                                  bool whole) {
    if (x.wide) {
        load_four(to, static_cast<const float *>(x.data), place, n, whole);
        return;
    }
    struct alignas(sizeof(E) * NUMBERS) Four {
        E at[NUMBERS];
    };
    const E *from = static_cast<const E *>(x.data) + place;
    Four v = {};
    if (whole) v = *reinterpret_cast<const Four *>(from);
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) to[i] = whole ? widen(v.at[i]) : i < n ? widen(from[i]) : 0.0f;
}

// What one token brings to a lane.
struct Token {
    float u, delta, z, b[NUMBERS], c[NUMBERS];
    uint8_t mark;
};

template <typename E, int SPLIT, int ROWS> __device__ void step(const Scan &p) {
    int part = threadIdx.x % SPLIT, channel = blockIdx.x * (THREADS / SPLIT) + threadIdx.x / SPLIT;
    bool live = channel < p.channels;
    if (!live) channel = p.channels - 1;
    // Numbers from the lane's first on. Not clamped to its four: ptxas 13.0 takes `n % 4 == 0 && max(0, min(4, n)) == 4` for
    // true at n = 0, and a lane without numbers would write into the next channel's.
    int own = p.states - part * NUMBERS;
    bool whole = p.states % NUMBERS == 0 && own > 0, vectors = whole && p.aligned_coefficients;
    int64_t first_b = channel / p.b.width * p.b.group + part * NUMBERS;
    int64_t first_c = channel / p.c.width * p.c.group + part * NUMBERS;
    auto at = [&](const Sequence &s, int row, int t) {
        return static_cast<E *>(s.data) + row * s.row + t * s.token + channel;
    };
    auto load = [&](Token &token, int row, int t) {
        token.mark = p.marks ? p.marks[int64_t(row) * p.length + t] : 0;
        token.u = widen(*at(p.u, row, t));
        token.delta = widen(*at(p.delta, row, t));
        token.z = p.z.data ? widen(*at(p.z, row, t)) : 0.0f;
        load_coefficients<E>(token.b, p.b, row * p.b.row + t * p.b.token + first_b, own, vectors);
        load_coefficients<E>(token.c, p.c, row * p.c.row + t * p.c.token + first_c, own, vectors);
    };
    float a[NUMBERS];
    load_four(a, p.a, int64_t(channel) * p.states + part * NUMBERS, own, whole);
#pragma unroll
    for (int i = 0; i < NUMBERS; ++i) a[i] *= LOG2E;
    float bias = p.bias ? p.bias[channel] : 0.0f, skip = p.d ? p.d[channel] : 0.0f;
    for (int first = blockIdx.y * ROWS; first < p.batch; first += gridDim.y * ROWS) {
        float h[ROWS][NUMBERS];
        int64_t place[ROWS];
        Token token[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int row = min(first + r, p.batch - 1);
            place[r] = (int64_t(row) * p.channels + channel) * p.states + part * NUMBERS;
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i) h[r][i] = 0.0f;
            if (p.initial) load_four(h[r], p.initial, place[r], own, whole);
            load(token[r], row, 0);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int row = first + r;
            if (row >= p.batch) break;
            for (int t = 0; t < p.length; ++t) {
                if (t > 0) load(token[r], row, t);
                float y = 0.0f;
                if (token[r].mark != PAD) {
                    float u = token[r].u, delta = token[r].delta + bias;
                    if (p.softplus) delta = softplus_for<E>(delta);
#pragma unroll
                    for (int i = 0; i < NUMBERS; ++i) {
                        float decay = token[r].mark == START ? 0.0f : exp2_fast(delta * a[i]);
                        h[r][i] = fmaf(decay, h[r][i], delta * u * token[r].b[i]);
                        y = fmaf(h[r][i], token[r].c[i], y);
                    }
#pragma unroll
                    for (int lanes = SPLIT / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(~0u, y, lanes);
                    y = fmaf(skip, u, y) * (p.z.data ? silu(token[r].z) : 1.0f);
                }
                if (p.y.data && live && part == 0) *at(p.y, row, t) = narrow<E>(y);
            }
            if (!live) continue;
            if (whole) {
                *reinterpret_cast<float4 *>(p.state + place[r]) = make_float4(h[r][0], h[r][1], h[r][2], h[r][3]);
            } else {
#pragma unroll
                for (int i = 0; i < NUMBERS; ++i)
                    if (i < own) p.state[place[r] + i] = h[r][i];
            }
        }
    }
}

// One token without a mark, states in whole vectors, B and C of the sequences' type, rows for as many blocks as there are,
// places that 32 bits count. What is before the loads counts for one row as much as what is behind them: so arguments are
// few, offsets short, and nothing that a call may lack is asked for on a condition.
struct OneToken {
    const void *u, *delta, *z, *b, *c; // rows of D or N elements; z: u where there is no gate
    void *y;
    const float *a, *d, *bias, *initial; // [D, N], [D], [D], [B, D, N]; a where there is none
    float *state;
    int rows[6];          // elements from row to row of u, delta, z, b, c and y
    int initial_row;      // the same of the initial state; zero where there is none
    int groups[2];        // elements from group to group of b and c
    unsigned inverses[2]; // 2^31 over the channels that share a group, rounded up
    int batch, channels, states, has;
};
// Bits of `has`.
constexpr int GATE = 1, SKIP = 2, BIAS = 4, INITIAL = 8, SOFTPLUS = 16;
template <typename E, int SPLIT, int ROWS> __device__ void step_once(const OneToken &p) {
    struct alignas(sizeof(E) * NUMBERS) Four {
        E at[NUMBERS];
    };
    int part = threadIdx.x % SPLIT, channel = blockIdx.x * (THREADS / SPLIT) + threadIdx.x / SPLIT;
    bool live = channel < p.channels && part * NUMBERS < p.states;
    channel = min(channel, p.channels - 1);
    int own = min(part * NUMBERS, p.states - NUMBERS), first = blockIdx.y * ROWS;
    // channel / width: division itself takes longer than all else before the loads
    auto group = [&](int side) { return int(__umulhi(2 * channel, p.inverses[side])) * p.groups[side]; };
    int first_b = group(0) + own, first_c = group(1) + own, numbers = channel * p.states + own;
    float4 h[ROWS];
    E u[ROWS], delta[ROWS], z[ROWS];
    Four b[ROWS], c[ROWS];
    float4 a = *reinterpret_cast<const float4 *>(p.a + numbers);
    float bias = p.bias[channel], skip = p.d[channel];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        int row = ROWS == 1 ? first : min(first + r, p.batch - 1);
        h[r] = *reinterpret_cast<const float4 *>(p.initial + (row * p.initial_row + numbers));
        delta[r] = static_cast<const E *>(p.delta)[row * p.rows[1] + channel];
        u[r] = static_cast<const E *>(p.u)[row * p.rows[0] + channel];
        z[r] = static_cast<const E *>(p.z)[row * p.rows[2] + channel];
        b[r] = *reinterpret_cast<const Four *>(static_cast<const E *>(p.b) + (row * p.rows[3] + first_b));
        c[r] = *reinterpret_cast<const Four *>(static_cast<const E *>(p.c) + (row * p.rows[4] + first_c));
    }
    __syncwarp(); // or some of them would be asked for where they are used, behind others' arrival
    if (!(p.has & BIAS)) bias = 0.0f;
    if (!(p.has & SKIP)) skip = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        int row = first + r;
        if (ROWS > 1 && row >= p.batch) break;
        float dt = widen(delta[r]) + bias, x = widen(u[r]);
        if (p.has & SOFTPLUS) dt = softplus_for<E>(dt);
        if (!(p.has & INITIAL)) h[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float step = LOG2E * dt, input = dt * x;
        h[r].x = fmaf(exp2_fast(step * a.x), h[r].x, input * widen(b[r].at[0]));
        h[r].y = fmaf(exp2_fast(step * a.y), h[r].y, input * widen(b[r].at[1]));
        h[r].z = fmaf(exp2_fast(step * a.z), h[r].z, input * widen(b[r].at[2]));
        h[r].w = fmaf(exp2_fast(step * a.w), h[r].w, input * widen(b[r].at[3]));
        float y = h[r].x * widen(c[r].at[0]);
        y = fmaf(h[r].y, widen(c[r].at[1]), y);
        y = fmaf(h[r].z, widen(c[r].at[2]), y);
        y = fmaf(h[r].w, widen(c[r].at[3]), y);
        if (part * NUMBERS >= p.states) y = 0.0f;
#pragma unroll
        for (int lanes = SPLIT / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(~0u, y, lanes);
        y = fmaf(skip, x, y) * (p.has & GATE ? silu(widen(z[r])) : 1.0f);
        if (!live) continue;
        if (part == 0) static_cast<E *>(p.y)[row * p.rows[5] + channel] = narrow<E>(y);
        *reinterpret_cast<float4 *>(p.state + (row * p.channels * p.states + numbers)) = h[r];
    }
}

#define KERNEL(E, S, R)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        selective_scan_step_##E##_##S##_##R(const __grid_constant__ Scan p) { take_turn(); step<E, S, R>(p); }         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        selective_scan_step_once_##E##_##S##_##R(const __grid_constant__ OneToken p) { take_turn(); step_once<E, S, R>(p); }
#define ROWS(E, S) KERNEL(E, S, 1) KERNEL(E, S, 4)
#define SPLITS(E) ROWS(E, 1) ROWS(E, 2) ROWS(E, 4) ROWS(E, 8) ROWS(E, 16) ROWS(E, 32)
SPLITS(float)
SPLITS(bf16)
SPLITS(f16)
