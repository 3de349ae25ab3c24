// What the kernels of retention share: arguments, decays within a chunk, loading, states and results.
//
// A block has one head of one row, one segment of time and VALUES of the head's values. It walks the segment in chunks of
// C tokens, forwards or backwards: token `position` of the walk is begin + position or end - 1 - position, and all the
// rest is the same either way. Its warps hold the state transposed, 16 values by KW keys each, in fragments C.
#pragma once
#include "mma.cuh"

constexpr int LANES = 32;

// Marks of a token, as src/ops/segments.rs has them.
constexpr uint8_t START = 1;
constexpr uint8_t PAD = 2;

// Decays with a logarithm below are zeros in f32.
constexpr float LEAST_LOGARITHM = -103.0f;
// A state whose weight has fallen to 2^-NEGLIGIBLE counts as forgotten; f32 keeps 24 bits.
constexpr float NEGLIGIBLE = 48.0f;

// A [B, T, Hx, width] tensor; steps in elements; `share` heads share one of it.
struct Heads {
    void *data;
    int64_t row, token, head;
    int64_t share;
    template <typename E> __device__ E *at(int row_, int head_) const {
        return static_cast<E *>(data) + row_ * row + head_ / share * head;
    }
};

// Pointers of what a call lacks are null. States are [K, V] matrices of f32; the steps from key to key and from value to
// value let a call take them transposed.
struct Retention {
    Heads q, k, v, o;
    const float *log_decay;       // [H], or [B, T, H]
    const uint8_t *marks;         // [B, T]
    const float *initial;         // [B, H], before the walk's first token
    float *state;                 // [B, H], after its last
    float *carried;               // [B, H, segments], before each segment of the walk
    float *factors;               // [B, H, segments], decay through each segment
    int64_t key_step, value_step; // of states
    float inner, outer;           // S takes inner k^T v; o = outer q S
    int length, heads, keys, values;
    int segment, segments;        // tokens in a segment, a multiple of C
    int per_token, backwards;
    int aligned;                  // whether rows of q, k, v and o can be read and written in 16-byte pieces
};

// Which segment, head, row and values a block has: grid (slices of values, batch * heads, segments of time).
struct Place {
    int row, head, segment, begin, tokens, first_value;
    __device__ Place(const Retention &p, int values)
        : row(blockIdx.y / p.heads), head(blockIdx.y % p.heads), segment(blockIdx.z), begin(segment * p.segment),
          tokens(min(p.segment, p.length - begin)), first_value(blockIdx.x * values) {}
    __device__ int token(const Retention &p, int position) const {
        return p.backwards ? begin + tokens - 1 - position : begin + position;
    }
    __device__ uint8_t mark(const Retention &p, int token) const {
        return p.marks ? p.marks[int64_t(row) * p.length + token] : 0;
    }
    __device__ int64_t state(const Retention &p) const { return int64_t(blockIdx.y) * p.keys * p.values; }
    __device__ int64_t carried(const Retention &p) const {
        return (int64_t(blockIdx.y) * p.segments + segment) * p.keys * p.values;
    }
};

// The decay of a token: its logarithm to base 2, or a reset.
struct Decay {
    double log = 0.0;
    int resets = 0;
    __device__ Decay() {}
    __device__ Decay(const Retention &p, const Place &at, int token) {
        uint8_t mark = at.mark(p, token);
        if (mark == PAD) return;
        float x = p.log_decay[p.per_token ? (int64_t(at.row) * p.length + token) * p.heads + at.head : at.head];
        if (x > 0.0f) x = __int_as_float(0x7fffffff); // no decay: NaN, as the caller is told
        resets = mark == START || x < LEAST_LOGARITHM;
        if (!resets) log = double(x) * 1.4426950408889634;
    }
    // Followed by another.
    __device__ void then(const Decay &next) { log += next.log, resets += next.resets; }
    __device__ float factor() const { return resets ? 0.0f : exp2_fast(float(log)); }
};

// The decays of a chunk. From column j to row i: zero if their counts of resets differ (those of padding always do), else
// 2 to the difference of the sums, which are kept in two parts so that the difference of large ones is exact.
template <int C> struct alignas(16) Decays {
    float high[C], low[C];
    int row[C], column[C];
    float start[C]; // outer times the decay from before the chunk to after the token
    float end[C];   // inner times the decay from the token to the chunk's end
    float whole;    // through the chunk

    __device__ float between(int i, int j) const {
        float log = (high[i] - high[j]) + (low[i] - low[j]);
        return i >= j && row[i] == column[j] ? exp2_fast(log) : 0.0f;
    }

    // One warp fills them; returns the decay through the chunk. Backwards, a token's decay lies behind it.
    __device__ Decay fill(const Retention &p, const Place &at, int first) {
        constexpr int OWN = C / LANES;
        int lane = threadIdx.x % LANES;
        Decay sum[OWN];
        bool live[OWN];
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            int position = first + lane * OWN + i;
            live[i] = position < at.tokens;
            if (i > 0) sum[i] = sum[i - 1];
            if (!live[i]) continue;
            int token = at.token(p, position);
            live[i] = at.mark(p, token) != PAD;
            if (!p.backwards || position > 0) sum[i].then(Decay(p, at, token + p.backwards));
        }
        Decay before = sum[OWN - 1];
#pragma unroll
        for (int lanes = 1; lanes < LANES; lanes *= 2) {
            Decay other;
            other.log = __shfl_up_sync(~0u, before.log, lanes);
            other.resets = __shfl_up_sync(~0u, before.resets, lanes);
            if (lane >= lanes) before.then(other);
        }
        Decay all;
        all.log = __shfl_sync(~0u, before.log, LANES - 1);
        all.resets = __shfl_sync(~0u, before.resets, LANES - 1);
        before.log -= sum[OWN - 1].log, before.resets -= sum[OWN - 1].resets;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            int token = lane * OWN + i;
            sum[i].then(before);
            high[token] = float(sum[i].log);
            low[token] = float(sum[i].log - double(high[token]));
            row[token] = live[i] ? sum[i].resets : -1;
            column[token] = live[i] ? sum[i].resets : -2;
            start[token] = live[i] ? p.outer * sum[i].factor() : 0.0f;
            Decay rest;
            rest.log = all.log - sum[i].log, rest.resets = all.resets - sum[i].resets;
            end[token] = live[i] ? p.inner * rest.factor() : 0.0f;
        }
        if (lane == 0) whole = all.factor();
        return all;
    }
};

// Asks for 16 bytes, of which the first `bytes` exist; the rest become zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Asks for the C tokens from `first` on of a sequence, COLUMNS of them of which `columns` exist; zeros for all that does
// not exist, padding included.
template <typename E, int C, int COLUMNS, int THREADS, int UNROLL = C>
__device__ __forceinline__ void fetch(uint32_t tile, const E *from, int64_t step, int columns, const Retention &p,
                                      const Place &at, int first) {
    using T = Tile<E, C, COLUMNS>;
    constexpr int PIECES = COLUMNS / T::WIDTH;
#pragma unroll UNROLL
    for (int i = threadIdx.x; i < C * PIECES; i += THREADS) {
        int row = i / PIECES, column = i % PIECES * T::WIDTH;
        int position = first + row;
        int count = position < at.tokens ? max(0, min(T::WIDTH, columns - column)) : 0;
        int token = count ? at.token(p, position) : at.begin;
        if (p.marks && at.mark(p, token) == PAD) count = 0;
        const E *source = from + token * step + (count ? column : 0);
        uint32_t to = tile + T::place(row, column);
        if (p.aligned) {
            copy_async(to, source, count * int(sizeof(E)));
        } else {
            Vector<E> piece;
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) piece.at[k] = k < count ? source[k] : narrow<E>(0.0f);
            uint4 bits = *reinterpret_cast<uint4 *>(&piece);
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                         "r"(bits.w)
                         : "memory");
        }
    }
}

// A warp's part of a transposed state: values from `value` on by keys from `key` on.
template <int TILES> struct State {
    C16x8 at[TILES];

    template <typename F> __device__ __forceinline__ void each(const Retention &p, int key, int value, F &&f) {
        int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int k = key + 8 * n + 2 * t + i % 2, v = value + g + i / 2 * 8;
                if (k < p.keys && v < p.values) f(at[n].at[i], k * p.key_step + v * p.value_step);
            }
    }
    __device__ void load(const float *from, const Retention &p, int key, int value) {
        each(p, key, value, [&](float &x, int64_t place) { x = from[place]; });
    }
    __device__ void store(float *to, const Retention &p, int key, int value, float factor) {
        each(p, key, value, [&](float &x, int64_t place) { to[place] = factor * x; });
    }
};

// Four registers each in the lanes of a quad, transposed.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t other = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t other = __shfl_xor_sync(~0u, high ? x[i] : x[i + 2], 2);
        (high ? x[i] : x[i + 2]) = other;
    }
}
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Writes outputs, transposed: 16 values from `value` on by 8 TILES tokens from `first` on.
template <typename E, int TILES>
__device__ __forceinline__ void put_outputs(const Retention &p, const Place &at, E *to, const C16x8 *o, int first,
                                            int value) {
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
    if constexpr (sizeof(E) == 2) {
        if (p.aligned && value + 16 <= p.values) {
#pragma unroll
            for (int n = 0; n < TILES; n += 2) {
                uint32_t x[4] = {};
#pragma unroll
                for (int i = 0; i < 2 && n + i < TILES; ++i) {
                    x[2 * i] = transpose_matrix(pack<E>(o[n + i].at[0], o[n + i].at[1]));
                    x[2 * i + 1] = transpose_matrix(pack<E>(o[n + i].at[2], o[n + i].at[3]));
                }
                transpose_quad(x);
                int position = first + 8 * n + t / 2 * 8 + g;
                if (position < at.tokens && (n + 1 < TILES || t < 2)) {
                    E *place = to + at.token(p, position) * p.o.token + value + t % 2 * 8;
                    *reinterpret_cast<uint4 *>(place) = make_uint4(x[0], x[1], x[2], x[3]);
                }
            }
            return;
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int position = first + 8 * n + 2 * t + i % 2, v = value + g + i / 2 * 8;
            if (position < at.tokens && v < p.values)
                to[at.token(p, position) * p.o.token + v] = narrow<E>(o[n].at[i]);
        }
}
