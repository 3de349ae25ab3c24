// The parts of retention_hopper.cuh: layout of shared memory, loads, decays and stores of a chunk.
#pragma once
#include "retention.cuh"
#include "wgmma.cuh"

constexpr int GROUP = 128; // threads of a warpgroup
constexpr int ROWS = 64;   // of a product: values of a warpgroup
constexpr int SLOTS = 3;   // decays of chunks

template <int N> struct Constant {
    static constexpr int value = N;
};

// f16 holds a state only up to 65504.
template <typename E> constexpr float SHRINK = 1.0f;
template <> constexpr float SHRINK<f16> = 1.0f / 64;

// The decays of a chunk, and where they are moderate and nothing resets, as products of a row's and a column's factor.
constexpr float MODERATE = -60.0f;
template <int C> struct Factors : Decays<C> {
    float up[C], down[C];
    int moderate;

    __device__ Decay fill(const Retention &p, const Place &at, int first) {
        Decay all = Decays<C>::fill(p, at, first);
        __syncwarp();
        bool good = true;
#pragma unroll
        for (int token = threadIdx.x % LANES; token < C; token += LANES) {
            float log = this->high[token];
            good &= log > MODERATE && this->row[token] == 0;
            up[token] = p.inner * p.outer * exp2_fast(log);
            down[token] = exp2_fast(-log);
        }
        moderate = __all_sync(~0u, good);
        return all;
    }

    // Scores of a warp's tokens row, row + 8 and columns column.., as pairs of what they count.
    template <typename E, int TILES>
    __device__ __forceinline__ void count(uint32_t (&to)[TILES][2], const C16x8 (&s)[TILES], const Retention &p, int row,
                                          int column) const {
        float factor = p.inner * p.outer;
        if (moderate) {
            float rows[2] = {up[row], up[row + 8]};
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                float2 columns = *reinterpret_cast<const float2 *>(&down[column + 8 * n]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int later = row + 8 * half - (column + 8 * n);
                    float low = s[n].at[2 * half] * (rows[half] * columns.x);
                    float high = s[n].at[2 * half + 1] * (rows[half] * columns.y);
                    to[n][half] = pack<E>(later >= 0 ? low : 0.0f, later > 0 ? high : 0.0f);
                }
            }
            return;
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                asm volatile("" ::: "memory"); // one after another: registers are scarce
                float low = factor * this->between(row + 8 * half, column + 8 * n);
                float high = factor * this->between(row + 8 * half, column + 8 * n + 1);
                // where there is no decay there is nothing, whatever the product
                to[n][half] = pack<E>(low == 0.0f ? 0.0f : low * s[n].at[2 * half],
                                      high == 0.0f ? 0.0f : high * s[n].at[2 * half + 1]);
            }
    }
};

// Four 8 x 8 matrices of a warp to shared memory, as they are or transposed; lane 8 m + r gives the place of row r of
// matrix m.
__device__ __forceinline__ void put4(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}
__device__ __forceinline__ void put4_transposed(uint32_t to, const uint32_t (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

// KW keys and 64 values for each of WK WV warpgroups; so many chunks of keys and values, and of queries, in shared memory.
template <typename E, int KW_, int WK_, int WV_, int STAGES_, int QUERIES_> struct Shape {
    static constexpr int KW = KW_, WK = WK_, WV = WV_, STAGES = STAGES_, QUERIES = QUERIES_, C = 64;
    static constexpr bool OUTPUTS = QUERIES > 0;
    // Chunks asked for ahead. States alone leave the last product running, and its chunk in use.
    static constexpr int AHEAD = OUTPUTS ? STAGES - 1 : STAGES - 2;
    static constexpr int GROUPS = WK * WV, THREADS = GROUPS * GROUP, KEYS = KW * WK, VALUES = ROWS * WV;
    using Keys = Tile<E, C, KEYS>;
    using Values = Tile<E, C, VALUES>;
    using Scores = Tile<E, C, C>;
    using Results = Tile<E, C, ROWS>;
    static constexpr int PANEL = C * 128;
    // Bytes of shared memory.
    static constexpr int KEY_BYTES = Keys::SIZE * sizeof(E), VALUE_BYTES = Values::SIZE * sizeof(E);
    static constexpr int STAGE = KEY_BYTES + VALUE_BYTES, FIRST_QUERY = STAGES * STAGE;
    static constexpr int SCORES = FIRST_QUERY + QUERIES * KEY_BYTES;
    static constexpr int RESULTS = SCORES + (OUTPUTS ? Scores::SIZE * sizeof(E) : 0);
    // Groups that share values add up, and write from, where the keys have been.
    static constexpr bool OWN_RESULTS = OUTPUTS && WK == 1;
    static constexpr int RESULT_BYTES = WV * Results::SIZE * sizeof(E), SHARE_BYTES = (WK - 1) * WV * ROWS * C * 4;
    static_assert(OWN_RESULTS || !OUTPUTS || RESULT_BYTES + SHARE_BYTES <= KEY_BYTES);
    static constexpr int DECAYS = RESULTS + (OWN_RESULTS ? RESULT_BYTES : 0);
    static constexpr int MEMORY = DECAYS + SLOTS * sizeof(Factors<C>) + 1024;
};

// As fetch(), where all C tokens and COLUMNS exist and pieces are aligned: a thread has the same columns of every few rows.
template <typename E, int C, int COLUMNS, int THREADS>
__device__ __forceinline__ void fetch_whole(uint32_t tile, const E *from, int64_t step, const Retention &p, const Place &at,
                                            int first) {
    using T = Tile<E, C, COLUMNS>;
    constexpr int PIECES = COLUMNS / T::WIDTH, DOWN = THREADS / PIECES;
    static_assert(THREADS % PIECES == 0 && C % DOWN == 0);
    int row = threadIdx.x / PIECES, column = threadIdx.x % PIECES * T::WIDTH;
    int64_t down = p.backwards ? -DOWN * step : DOWN * step;
    const E *source = from + at.token(p, first + row) * step + column;
    uint32_t to = tile + T::place(row, column);
#pragma unroll
    for (int pass = 0; pass < C / DOWN; ++pass, source += down) {
        if (DOWN % 8) to = tile + T::place(row + pass * DOWN, column);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(DOWN % 8 ? to : to + pass * DOWN * 128),
                     "l"(source)
                     : "memory");
    }
}

// A walk's chunks on their way into shared memory, and their decays.
template <typename E, typename S> struct Chunks {
    const Retention &p;
    const Place &at;
    uint32_t base;
    Factors<S::C> *decays;
    const E *q, *k, *v;
    int columns, count, first;
    bool constant, plain;

    __device__ Chunks(const Retention &p, const Place &at, char *bytes)
        : p(p), at(at), base(shared_address(bytes)), decays(reinterpret_cast<Factors<S::C> *>(bytes + S::DECAYS)),
          q(S::OUTPUTS ? p.q.at<E>(at.row, at.head) : nullptr), k(p.k.at<E>(at.row, at.head)),
          v(p.v.at<E>(at.row, at.head) + at.first_value), columns(p.values - at.first_value),
          count((at.tokens + S::C - 1) / S::C), first(0), constant(!p.per_token && !p.marks),
          plain(p.aligned && !p.marks) {}

    __device__ bool whole(int chunk) const { return (chunk + 1) * S::C <= at.tokens; }
    template <int COLUMNS>
    __device__ __forceinline__ void ask(uint32_t to, const E *from, int64_t step, int columns, int chunk) const {
        if (plain && columns >= COLUMNS && whole(chunk))
            fetch_whole<E, S::C, COLUMNS, S::THREADS>(to, from, step, p, at, chunk * S::C);
        else
            fetch<E, S::C, COLUMNS, S::THREADS, 1>(to, from, step, columns, p, at, chunk * S::C);
    }
    __device__ uint32_t values(int stage) const { return base + stage * S::STAGE; }
    __device__ uint32_t keys(int stage) const { return values(stage) + S::VALUE_BYTES; }
    __device__ uint32_t queries(int chunk) const {
        return base + S::FIRST_QUERY + (S::QUERIES > 1 ? chunk % S::QUERIES : 0) * S::KEY_BYTES;
    }
    __device__ __forceinline__ void ask_queries(int chunk) const {
        ask<S::KEYS>(queries(chunk), q, p.q.token, p.keys, chunk);
    }
    // A chunk's values and keys, and its queries if they come as early.
    __device__ __forceinline__ void ask(int stage, int chunk) const {
        if (chunk < count) {
            ask<S::VALUES>(values(stage), v, p.v.token, columns, chunk);
            ask<S::KEYS>(keys(stage), k, p.k.token, p.keys, chunk);
            if (S::OUTPUTS && S::QUERIES == S::STAGES) ask_queries(chunk);
        }
        commit_copies();
    }
    // With constant decays all whole chunks but the first are alike.
    __device__ int slot(int chunk) const { return !constant ? chunk % 2 : whole(chunk) ? chunk > first : 2; }
    // The last warp finds the decays of a chunk.
    __device__ __forceinline__ void prepare(int chunk, Decay &through) const {
        bool filled = constant && chunk > first + 1 && whole(chunk);
        if (chunk >= count || filled || threadIdx.x / LANES != S::THREADS / LANES - 1) return;
        Decay all = decays[slot(chunk)].fill(p, at, chunk * S::C);
        if (!S::OUTPUTS && !constant) through.then(all);
    }
};

// Outputs of a warp's 16 values from row `value` of a group's tile on, to the tile, whose rows are tokens.
template <typename E, typename S, int TOKENS>
__device__ __forceinline__ void stage_outputs(uint32_t tile, const C16x8 *o, int first, int value) {
    int lane = threadIdx.x % LANES;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
        int token = first + 8 * n + lane / 16 * 8 + lane % 8, own = value + lane / 8 % 2 * 8;
        put4_transposed(tile + S::Results::place(token, own),
                        {pack<E>(o[n].at[0], o[n].at[1]), pack<E>(o[n].at[2], o[n].at[3]),
                         pack<E>(o[n + 1].at[0], o[n + 1].at[1]), pack<E>(o[n + 1].at[2], o[n + 1].at[3])});
    }
}

// A group's tile to memory: tokens from `first` of a chunk on, values from `value` on.
template <typename E, typename S, int TOKENS>
__device__ __forceinline__ void write_outputs(const Retention &p, const Place &at, E *to, const char *tile, int chunk,
                                              int first, int value) {
    int column = threadIdx.x % 8 * 8, left = p.values - (value + column);
#pragma unroll
    for (int i = 0; i < TOKENS / 16; ++i) {
        int token = first + i * 16 + threadIdx.x % GROUP / 8, position = chunk * S::C + token;
        if (position >= at.tokens) continue;
        auto x = *reinterpret_cast<const Vector<E> *>(tile + S::Results::place(token, column));
        E *place = to + at.token(p, position) * p.o.token + value + column;
        if (p.aligned && left >= 8) {
            *reinterpret_cast<Vector<E> *>(place) = x;
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (e < left) place[e] = x.at[e];
        }
    }
}

template <int THREADS> __device__ __forceinline__ void barrier(int name) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}
