// A few tokens of retention through a state: the step of generation; src/ops/retention has the formula.
//
// Grid (slices of 32 values, batch * heads), a thread for 8 keys and 4 values, which keeps its part of the state in registers
// through all tokens. Tokens go in batches: their queries, keys and values are widened into shared memory, the state takes one
// after another, and what the warps add up of the outputs meets in shared memory, so that a batch costs two barriers. All that
// a batch needs is asked for before any of it is waited for. Shared memory: 25 KB.
//
// States may lie in a pool, and be moved on in place. There a row may owe its state some tokens, which lie in a buffer: they
// are taken first, in registers, so that outputs are the same to the bit, but the state is written only when the buffer has
// no room for the call's own tokens, which otherwise join the others. A draft's tokens leave state and buffer as they are.
//
// Bytes: the state, read and written once (8 B H K V in f32; with a buffer 4 and a share); all else is small.
#include "common/retention.cuh"

#ifndef RES
#define RES 1024
#endif
#ifndef RW
#define RW 8
#endif
#ifndef UN
#define UN 1
#endif
constexpr int WIDTH = 4;
constexpr int ACROSS = 8;
constexpr int SLICE = ACROSS * WIDTH;
constexpr int ROWS = RW, UNROLL = UN;
constexpr int RESIDENT = RES; // threads of a multiprocessor, at least

// The layout of a block for up to KEYS keys.
template <int KEYS> struct Layout {
    static constexpr int THREADS = KEYS / ROWS * ACROSS;
    static constexpr int WARPS = THREADS / LANES;
    static constexpr int BATCH = KEYS > 256 ? 4 : 8; // tokens
};

// Where states lie, and what they have yet to take. Without slots row b has the b-th state.
struct Pool {
    const int *slots;    // [B]: a row's place in the pool, -1 for an idle row
    const int *buffered; // [B]: tokens that a row's state has yet to take; null: none
    const int *taken;    // [B]: how many of the call's tokens stay; null: all
    void *keys, *values; // [slots, room, Hk, K], [slots, room, Hv, V]: the buffer, of the call's elements
    float *decays;       // [slots, room, H], where every token has its own
    int room, mode;
};

// Of a draft no token stays; and a state may take all that it has yet to, whatever the room.
enum Mode { STEP, DRAFT, FOLD };

// With no place for outputs the tokens that stay are taken, and nothing else is done.
struct Step {
    Retention p;
    Pool pool;
};

template <typename S> struct alignas(WIDTH * sizeof(S)) Quad {
    S at[WIDTH];
};

// A block's part of a state, in the lanes of its threads.
template <typename S> struct Slice {
    float at[ROWS][WIDTH] = {};
    int value, count; // the first of a thread's values, and how many of them exist: not clamped, see selective_scan_step.cu

    template <typename F> __device__ __forceinline__ void each(const Retention &p, F &&f) {
#pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            int key = threadIdx.x / ACROSS * ROWS + n;
            if (key < p.keys) f(at[n], int64_t(key) * p.values + value);
        }
    }
    __device__ __forceinline__ bool whole(const Retention &p) const { return p.values % WIDTH == 0 && count > 0; }
    __device__ __forceinline__ void load(const Retention &p, const S *from) {
        bool all = whole(p);
        each(p, [&](float (&x)[WIDTH], int64_t place) {
            Quad<S> quad = {};
            if (all) quad = *reinterpret_cast<const Quad<S> *>(from + place);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) x[i] = all ? widen(quad.at[i]) : i < count ? widen(from[place + i]) : 0.0f;
        });
    }
    __device__ __forceinline__ void store(const Retention &p, S *to) {
        bool all = whole(p);
        each(p, [&](float (&x)[WIDTH], int64_t place) {
            Quad<S> quad;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                quad.at[i] = narrow<S>(x[i]);
                if (!all && i < count) to[place + i] = quad.at[i];
            }
            if (all) *reinterpret_cast<Quad<S> *>(to + place) = quad;
        });
    }
    // S = decay S + key^T x
    __device__ __forceinline__ void take(float decay, const float4 *keys, float4 x) {
        float values[WIDTH] = {x.x, x.y, x.z, x.w};
        rows(keys, [&](int n, float key) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) at[n][i] = fmaf(decay, at[n][i], key * values[i]);
        });
    }
    // o += query S
    __device__ __forceinline__ void read(float (&o)[WIDTH], const float4 *queries) {
        rows(queries, [&](int n, float query) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) o[i] = fmaf(query, at[n][i], o[i]);
        });
    }
    template <typename F> __device__ __forceinline__ void rows(const float4 *numbers, F &&f) {
#pragma unroll
        for (int n = 0; n < ROWS; n += 4) {
            float4 four = numbers[n / 4];
            f(n, four.x), f(n + 1, four.y), f(n + 2, four.z), f(n + 3, four.w);
        }
    }
};

// What a row of the pool is to do.
struct Row {
    int slot, before, stay;
    bool outputs, folds;
    __device__ Row(const Step &step, int row) {
        const Pool &pool = step.pool;
        slot = pool.slots ? pool.slots[row] : row;
        before = pool.buffered ? pool.buffered[row] : 0;
        stay = pool.mode == DRAFT ? 0 : pool.taken ? min(pool.taken[row], step.p.length) : step.p.length;
        outputs = step.p.o.data;
        folds = before + stay > (pool.mode == FOLD ? 0 : pool.room);
    }
    // Tokens to go through, those of the buffer first.
    __device__ int count(int length) const { return outputs ? before + length : folds ? before + stay : 0; }
};

// The tokens of one head: those of the buffer, then those of the call.
template <typename E> struct Tokens {
    const Retention &p;
    const Place &at;
    int before;              // tokens of the buffer
    const E *q, *k, *v;      // of the call, v from the block's first value on
    E *keys, *values;        // of the buffer
    float *decays;
    int64_t key_step, value_step;
    bool owns_keys, owns_values, aligned; // whether this is the first of the heads that share them
    __device__ Tokens(const Step &all, const Place &at, const Row &row) : p(all.p), at(at), before(row.before) {
        q = p.q.at<E>(at.row, at.head), k = p.k.at<E>(at.row, at.head);
        v = p.v.at<E>(at.row, at.head) + at.first_value;
        int64_t first = int64_t(row.slot) * all.pool.room;
        key_step = p.heads / p.k.share * p.keys, value_step = p.heads / p.v.share * p.values;
        keys = static_cast<E *>(all.pool.keys) + first * key_step + at.head / p.k.share * p.keys;
        values = static_cast<E *>(all.pool.values) + first * value_step + at.head / p.v.share * p.values + at.first_value;
        decays = all.pool.decays + first * p.heads + at.head;
        owns_keys = at.head % p.k.share == 0, owns_values = at.head % p.v.share == 0;
        aligned = p.aligned && p.keys % Vector<E>::SIZE == 0;
    }
    __device__ bool live(int n) const { return n < before || at.mark(p, n - before) != PAD; }
    __device__ const E *key(int n) const {
        return n < before ? keys + n * key_step : k + (n - before) * p.k.token;
    }
    __device__ const E *value(int n) const {
        return n < before ? values + n * value_step : v + (n - before) * p.v.token;
    }
    __device__ Decay decay(int n) const {
        return n < before && p.per_token ? Decay(decays[n * p.heads]) : Decay(p, at, max(n - before, 0));
    }
    // Numbers of a key or query from `first` on.
    __device__ __forceinline__ Vector<E> piece(const E *from, int first, bool exists) const {
        Vector<E> x = {};
        if (exists && aligned && first < p.keys) return *reinterpret_cast<const Vector<E> *>(from + first);
#pragma unroll
        for (int i = 0; i < Vector<E>::SIZE; ++i)
            if (exists && first + i < p.keys) x.at[i] = from[first + i];
        return x;
    }
    // The call's tokens join the buffer.
    __device__ void keep(int count, int left) const {
        for (int n = 0; n < count; ++n) {
            int own = before + n;
            for (int i = threadIdx.x; owns_values && i < left; i += blockDim.x)
                values[own * value_step + i] = v[n * p.v.token + i];
            if (blockIdx.x > 0) continue;
            for (int i = threadIdx.x; owns_keys && i < p.keys; i += blockDim.x)
                keys[own * key_step + i] = k[n * p.k.token + i];
            if (p.per_token && threadIdx.x == 0)
                decays[own * p.heads] = p.log_decay[(int64_t(at.row) * p.length + n) * p.heads + at.head];
        }
    }
};

// Some tokens in shared memory, f32.
template <int KEYS> struct Batch {
    using L = Layout<KEYS>;
    float4 queries[L::BATCH][KEYS / 4], keys[L::BATCH][KEYS / 4];
    float values[L::BATCH][SLICE], sums[L::BATCH][L::WARPS][SLICE], decays[L::BATCH];
    bool lives[L::BATCH];

    template <typename E>
    __device__ __forceinline__ void fetch(const Tokens<E> &tokens, int first, int count, int left, bool outputs) {
        constexpr int W = Vector<E>::SIZE, PIECES = KEYS / W, ROUNDS = (L::BATCH * PIECES + L::THREADS - 1) / L::THREADS;
        constexpr int VALUES = (L::BATCH * SLICE + L::THREADS - 1) / L::THREADS;
        Vector<E> key[ROUNDS], query[ROUNDS];
        E value[VALUES];
        Decay decay;
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            int place = threadIdx.x + i * L::THREADS, n = first + place / PIECES, column = place % PIECES * W;
            bool exists = n < first + count && tokens.live(n), asks = exists && outputs && n >= tokens.before;
            key[i] = tokens.piece(exists ? tokens.key(n) : nullptr, column, exists);
            query[i] = tokens.piece(asks ? tokens.q + (n - tokens.before) * tokens.p.q.token : nullptr, column, asks);
        }
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            int place = threadIdx.x + i * L::THREADS, n = first + place / SLICE, column = place % SLICE;
            value[i] = narrow<E>(0.0f);
            if (n < first + count && column < left && tokens.live(n)) value[i] = tokens.value(n)[column];
        }
        if (threadIdx.x < count) {
            decay = tokens.decay(first + threadIdx.x);
            lives[threadIdx.x] = tokens.live(first + threadIdx.x);
        }
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            int place = threadIdx.x + i * L::THREADS, n = place / PIECES, column = place % PIECES * (W / 4);
            if (n >= count) continue;
#pragma unroll
            for (int j = 0; j < W; j += 4) {
                auto four = [&](const Vector<E> &x) {
                    return make_float4(widen(x.at[j]), widen(x.at[j + 1]), widen(x.at[j + 2]), widen(x.at[j + 3]));
                };
                keys[n][column + j / 4] = four(key[i]);
                if (outputs) queries[n][column + j / 4] = four(query[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            int place = threadIdx.x + i * L::THREADS;
            if (place < count * SLICE) values[place / SLICE][place % SLICE] = widen(value[i]);
        }
        if (threadIdx.x < count) decays[threadIdx.x] = decay.factor();
    }
};

template <typename E, typename S, int KEYS> __device__ void step(const Step &all) {
    using L = Layout<KEYS>;
    __shared__ Batch<KEYS> batch;
    const Retention &p = all.p;
    Place at(p, SLICE);
    Row row(all, at.row);
    E *o = p.o.at<E>(at.row, at.head) + at.first_value;
    int left = min(SLICE, p.values - at.first_value);
    if (row.slot < 0) {
        for (int i = threadIdx.x; row.outputs && i < p.length * left; i += L::THREADS)
            o[i / left * p.o.token + i % left] = narrow<E>(0.0f);
        return;
    }
    Tokens<E> tokens(all, at, row);
    int count = row.count(p.length), across = threadIdx.x % ACROSS, own = threadIdx.x / ACROSS * (ROWS / 4);
    int64_t state = (int64_t(row.slot) * p.heads + at.head) * p.keys * p.values;
    Slice<S> s;
    s.value = at.first_value + across * WIDTH, s.count = p.values - s.value;
    if (p.initial && count > 0) s.load(p, reinterpret_cast<const S *>(p.initial) + state);
    for (int first = 0; first < count; first += L::BATCH) {
        int now = min(L::BATCH, count - first);
        if (first > 0) __syncthreads();
        batch.fetch(tokens, first, now, left, row.outputs);
        __syncthreads();
#pragma unroll UNROLL
        for (int n = 0; n < now; ++n) {
            float4 x = *reinterpret_cast<const float4 *>(&batch.values[n][across * WIDTH]);
            float o[WIDTH] = {};
            if (batch.lives[n]) s.take(batch.decays[n], &batch.keys[n][own], x);
            if (!row.outputs || first + n < row.before) continue;
            if (batch.lives[n]) s.read(o, &batch.queries[n][own]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
                for (int lanes = ACROSS; lanes < LANES; lanes *= 2) o[i] += __shfl_xor_sync(~0u, o[i], lanes);
                if (threadIdx.x % LANES < ACROSS) batch.sums[n][threadIdx.x / LANES][across * WIDTH + i] = o[i];
            }
        }
        if (!row.outputs) continue;
        __syncthreads();
        for (int place = threadIdx.x; place < now * SLICE; place += L::THREADS) {
            int n = place / SLICE, i = place % SLICE, token = first + n - row.before;
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < L::WARPS; ++warp) sum += batch.sums[n][warp][i];
            if (token >= 0 && i < left) o[token * p.o.token + i] = narrow<E>(p.outer * sum);
        }
    }
    if (row.folds)
        s.store(p, reinterpret_cast<S *>(p.state) + state);
    else
        tokens.keep(row.stay, left);
}

#define KERNEL(E, S, KEYS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(Layout<KEYS>::THREADS, RESIDENT / Layout<KEYS>::THREADS)               \
        retention_step_##E##_##S##_##KEYS(const __grid_constant__ Step all) { step<E, S, KEYS>(all); }
#define WIDTHS(E, S) KERNEL(E, S, 64) KERNEL(E, S, 128) KERNEL(E, S, 256) KERNEL(E, S, 512)
#define KERNELS(E) WIDTHS(E, float) WIDTHS(E, bf16)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
