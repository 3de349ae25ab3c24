// A team of TEAM neighbouring threads normalises ROWS groups of channels at a time, WIDTH channels ITEMS times in a thread.
//
// Rows come through shared memory, where each thread uses what it has asked for itself, without barriers: as many registers
// would leave fewer warps. Parameters are read again for every row, from the L1 cache.
#pragma once
#include "types.cuh"
#include <type_traits>

constexpr int LANES = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / LANES;
// Bytes of a block's rows, backward, in use and on their way; where they do not fit, rows are asked for as the last are done.
constexpr int MOST_BYTES = 80 * 1024;

// Rows of a tensor: row r at (r / inner) * outer_step + (r % inner) * inner_step elements.
struct Rows {
    void *data;
    int64_t outer_step;
    int inner_step;
};

// A residual or a gate, not both.
struct Norm {
    Rows x, residual, z, y, sum, dy, dsum, dx, dresidual, dz;
    const float *weight, *bias;
    float *shares; // [blocks, 2, D]
    int64_t rows;
    int inner, channels, group, layer, outside, rounds, gate_after;
    float eps;
};

// Asks for a pack, or writes zeros where it does not exist.
template <typename T> __device__ __forceinline__ void ask(T *to, const T *from, bool exists) {
    if constexpr (sizeof(T) < 4) {
        *to = exists ? *from : T{};
    } else {
        constexpr int BYTES = access(sizeof(T));
        uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
#pragma unroll
        for (int i = 0; i < int(sizeof(T)); i += BYTES) {
            auto piece = reinterpret_cast<const char *>(from) + i;
            if constexpr (BYTES == 16)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address + i), "l"(piece),
                             "r"(exists ? 16 : 0) : "memory");
            else
                asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address + i), "l"(piece), "n"(BYTES),
                             "r"(exists ? BYTES : 0) : "memory");
        }
    }
}

template <typename E, typename R, int WIDTH, int ITEMS, int TEAM> struct Shape {
    static constexpr int TEAMS = THREADS / TEAM, COUNT = ITEMS * WIDTH;
    static constexpr int ROWS = WIDTH > 1 && ITEMS == 1 ? 2 : 1; // at a time: narrow ones in pairs
    template <typename T> struct Packs {
        Pack<T, WIDTH> at[ROWS][ITEMS][THREADS];
        __device__ __forceinline__ void widened(float (&to)[WIDTH], int j, int i) const {
            widen(to, at[j][i][threadIdx.x]);
        }
    };
    // Rows on their way; a gate lies where a residual would.
    struct Forward {
        Packs<E> x;
        Packs<R> second;
        __device__ Packs<E> &z() { return reinterpret_cast<Packs<E> &>(second); }
    };
    struct Backward : Forward {
        Packs<E> dy;
    };
    // Forward has enough blocks, as a rule with one iteration each, to keep memory busy.
    template <typename Stage>
    static constexpr int DEPTH = std::is_same_v<Stage, Backward> && 2 * sizeof(Stage) <= MOST_BYTES ? 2 : 1;
    template <typename Stage> static constexpr unsigned MEMORY = DEPTH<Stage> * sizeof(Stage);
};

template <typename E, typename R, int WIDTH, int ITEMS, int TEAM> struct Team : Shape<E, R, WIDTH, ITEMS, TEAM> {
    using Own = Shape<E, R, WIDTH, ITEMS, TEAM>;
    using Own::COUNT, Own::ROWS, Own::TEAMS;
    using Values = float[ROWS][COUNT];
    const Norm &p;
    int member, first; // first channel of the group, and of this thread's
    int row, teams;    // the first row of an iteration; rows fit an int
    int turn = 0;
    bool summed, gated, whole; // whether the group fills the team

    __device__ explicit Team(const Norm &p) : p(p) {
        member = threadIdx.x % TEAM;
        first = blockIdx.y * p.group + member * WIDTH;
        row = blockIdx.x * TEAMS + threadIdx.x / TEAM;
        teams = gridDim.x * TEAMS;
        summed = p.residual.data, gated = p.z.data, whole = p.group == TEAM * COUNT;
    }
    // Whether item `i` of this thread lies in the group; a pack exists whole or not at all.
    __device__ bool exists(int i) const { return (i * TEAM + member) * WIDTH < p.group; }
    __device__ bool lives(int64_t row, int j) const { return row + int64_t(j) * teams < p.rows; }

    // This thread's first pack of a row.
    template <typename T> __device__ __forceinline__ T *at(const Rows &r, int row) const {
        auto data = static_cast<T *>(r.data) + first;
        if (p.inner >= p.rows) return data + int64_t(row) * r.inner_step;
        int outer = unsigned(row) / unsigned(p.inner);
        return data + outer * r.outer_step + int64_t(row - outer * p.inner) * r.inner_step;
    }
    template <typename T>
    __device__ __forceinline__ void load(typename Own::template Packs<T> &to, const Rows &r, int64_t row) const {
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            bool there = lives(row, j);
            const T *from = at<T>(r, there ? row + j * teams : 0);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
                ask(&to.at[j][i][threadIdx.x], reinterpret_cast<const Pack<T, WIDTH> *>(from + i * TEAM * WIDTH),
                    there && exists(i));
        }
    }
    // Item `i` of row `j`.
    template <typename T>
    __device__ __forceinline__ void store(const Rows &r, int j, int i, const float *from) const {
        Pack<T, WIDTH> v;
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) v.at[k] = narrow<T>(from[k]);
        if (lives(row, j) && exists(i))
            *reinterpret_cast<Pack<T, WIDTH> *>(at<T>(r, row + j * teams) + i * TEAM * WIDTH) = v;
    }
    // Parameters of the channels of item `i`. The barrier is the compiler's: it would read those of all items at once.
    __device__ __forceinline__ Pack<float, WIDTH> parameter(const float *from, int i) const {
        asm volatile("" ::: "memory");
        return exists(i) ? *reinterpret_cast<const Pack<float, WIDTH> *>(from + first + i * TEAM * WIDTH) : Pack<float, WIDTH>{};
    }

    // Numbers of item `i` times its weights.
    __device__ __forceinline__ void weigh(float (&x)[WIDTH], int i) const {
        if (!p.weight) return;
        auto weight = parameter(p.weight, i);
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) x[k] *= weight.at[k];
    }

    // Sums over the team, the same for all its members.
    template <int N> __device__ __forceinline__ void total(float (&x)[N]) {
#pragma unroll
        for (int step = (TEAM < LANES ? TEAM : LANES) / 2; step > 0; step /= 2)
#pragma unroll
            for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(~0u, x[i], step);
        if constexpr (TEAM > LANES) {
            // two of them in turns: who writes one again has met all others since they read it
            __shared__ float sums[2][N][WARPS];
            constexpr int OWN = TEAM / LANES;
            int warp = threadIdx.x / LANES, mine = warp / OWN * OWN;
            if (threadIdx.x % LANES == 0)
#pragma unroll
                for (int i = 0; i < N; ++i) sums[turn][i][warp] = x[i];
            __syncthreads();
#pragma unroll
            for (int i = 0; i < N; ++i) {
                x[i] = 0.0f;
#pragma unroll
                for (int w = 0; w < OWN; ++w) x[i] += sums[turn][i][mine + w];
            }
            turn ^= 1;
        }
    }

    // Calls `f` with the rows of one iteration after another, those of the next on their way where there is room.
    template <typename Stage, typename Load, typename F> __device__ __forceinline__ void each(Load &&load, F &&f) {
        constexpr int DEPTH = Own::template DEPTH<Stage>;
        extern __shared__ __align__(16) char bytes[];
        auto stages = reinterpret_cast<Stage *>(bytes);
        int64_t next = row, step = int64_t(ROWS) * teams;
        // lanes of a warp, and warps that meet, take part as long as one of their teams has a row left
        constexpr int TOGETHER = TEAM > LANES ? THREADS : LANES;
        auto left = [&] { return next - threadIdx.x % TOGETHER / TEAM < p.rows; };
        load(stages[0], next);
        commit_copies();
        for (int slot = 0; left(); slot ^= DEPTH - 1) {
            row = next;
            next += step;
            if (DEPTH > 1) load(stages[slot ^ (DEPTH - 1)], next), commit_copies();
            wait_copies<DEPTH - 1>();
            f(stages[slot]);
            if (DEPTH == 1 && left()) load(stages[0], next), commit_copies();
        }
        wait_copies<0>();
    }

    // What the norm is taken of.
    template <typename Stage> __device__ __forceinline__ void gather(Values &s, Stage &stage) const {
#pragma unroll
        for (int j = 0; j < ROWS; ++j)
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                float x[WIDTH], other[WIDTH];
                stage.x.widened(x, j, i);
                if (summed) {
                    stage.second.widened(other, j, i);
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) x[k] = widen(narrow<R>(x[k] + other[k]));
                }
                if (gated && !p.gate_after) {
                    stage.z().widened(other, j, i);
#pragma unroll
                    for (int k = 0; k < WIDTH; ++k) x[k] *= silu(other[k]);
                }
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) s[j][i * WIDTH + k] = x[k];
            }
    }

    // Reciprocal deviations; s loses its mean.
    __device__ __forceinline__ void normalise(Values &s, float (&scale)[ROWS]) {
        float part = 1.0f / p.group;
        if (p.layer) {
            float mean[ROWS] = {};
#pragma unroll
            for (int j = 0; j < ROWS; ++j)
#pragma unroll
                for (int i = 0; i < COUNT; ++i) mean[j] += s[j][i];
            total(mean);
#pragma unroll
            for (int j = 0; j < ROWS; ++j)
#pragma unroll
                for (int i = 0; i < COUNT; ++i) s[j][i] -= mean[j] * part;
            if (!whole)
#pragma unroll
                for (int j = 0; j < ROWS; ++j)
#pragma unroll
                    for (int i = 0; i < COUNT; ++i)
                        if (!exists(i / WIDTH)) s[j][i] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            scale[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) scale[j] = fmaf(s[j][i], s[j][i], scale[j]);
        }
        total(scale);
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            float mean = scale[j] * part;
            scale[j] = p.outside ? 1.0f / (sqrtf(mean) + p.eps) : rsqrtf(mean + p.eps);
        }
    }

    // n, rounded where it is a number of its own.
    __device__ __forceinline__ void normal(float (&n)[WIDTH], const float *s, float scale) const {
#pragma unroll
        for (int k = 0; k < WIDTH; ++k) n[k] = s[k] * scale;
        if (sizeof(E) < 4 && p.rounds)
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) n[k] = widen(narrow<E>(n[k]));
    }

    __device__ void forward();
    __device__ void backward();
    __device__ void share(const float (&own)[COUNT], int which) const;
};
