// A few tokens of retention through states: of the rows themselves, or of a pool, where they lie; src/ops/retention has the
// formula, its pool/ what a pool is.
//
// Grid (slices of 32 values, batch * heads), a thread for 8 keys and 4 values, which keeps its part of the state in registers
// through all tokens. Tokens go in batches: their queries, keys and values are copied into shared memory as they are, the state
// takes one after another, and what the warps add up of the outputs meets in shared memory, so that a batch costs two barriers.
// All that a batch needs is asked for, and the state too, before any of it is waited for. Shared memory: 17 KB (f32: 25).
//
// A row may owe its state some tokens, which lie in a buffer: they are taken first, in registers, so that outputs are the same
// to the bit, but the state is written only when the buffer has no room for the call's own tokens, which otherwise join the
// others. A draft's tokens leave state and buffer as they are.
//
// Bytes: the state, read and written once (8 B H K V in f32; with a buffer 4 and a share); all else is small. On an H200 (a
// copy: 4.27 TB/s), B 64, H 8, K 256, V 512, bf16, in a graph: 0.150 ms, 84 % of the rate of a copy; B 1 0.0044. On an H100 of a
// version that waited once more for its tokens: 242 us with a state written at every step, 146 + 7 a waiting token where it is
// only read: 180 on average of eight, 160 with states of bf16.
#include "common/retention.cuh"

constexpr int WIDTH = 4;
constexpr int ACROSS = 8;
constexpr int SLICE = ACROSS * WIDTH;
constexpr int ROWS = 8;
constexpr int RESIDENT = 1024; // threads of a multiprocessor, at least

// The layout of a block for up to KEYS keys.
template <int KEYS> struct Layout {
    static constexpr int THREADS = KEYS / ROWS * ACROSS;
    static constexpr int WARPS = THREADS / LANES;
    static constexpr int BATCH = KEYS > 256 ? 4 : 8; // tokens
};

// Where states lie, and what they have yet to take.
struct Pool {
    const int *slots;    // [B]: a row's place in the pool, -1 for an idle row; null: each row has its own state
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

    // Rows as they are, with nothing between that would wait for them; numbers one by one where there are no whole quads.
    template <typename F, typename G> __device__ __forceinline__ void each(const Retention &p, F &&whole, G &&single) {
        if (p.values % WIDTH == 0 && count > 0) {
            each_row(p, [&](int n, int64_t place) { whole(at[n], place); });
        } else {
            each_row(p, [&](int n, int64_t place) {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i)
                    if (i < count) single(at[n][i], place + i);
            });
        }
    }
    template <typename F> __device__ __forceinline__ void each_row(const Retention &p, F &&f) {
        int first = threadIdx.x / ACROSS * ROWS;
        int64_t place = int64_t(first) * p.values + value;
#pragma unroll
        for (int n = 0; n < ROWS; ++n)
            if (first + n < p.keys) f(n, place + int64_t(n) * p.values);
    }
    __device__ __forceinline__ void load(const Retention &p, const S *from) {
        auto whole = [&](float (&x)[WIDTH], int64_t place) {
            Quad<S> quad = *reinterpret_cast<const Quad<S> *>(from + place);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) x[i] = widen(quad.at[i]);
        };
        each(p, whole, [&](float &x, int64_t place) { x = widen(from[place]); });
    }
    __device__ __forceinline__ void store(const Retention &p, S *to) {
        auto whole = [&](float (&x)[WIDTH], int64_t place) {
            Quad<S> quad;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) quad.at[i] = narrow<S>(x[i]);
            *reinterpret_cast<Quad<S> *>(to + place) = quad;
        };
        each(p, whole, [&](float &x, int64_t place) { to[place] = narrow<S>(x); });
    }
    // S = decay S + key^T x
    template <typename E> __device__ __forceinline__ void take(float decay, const Vector<E> *keys, const E *values) {
        float x[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) x[i] = widen(values[i]);
        rows(keys, [&](int n, float key) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) at[n][i] = fmaf(decay, at[n][i], key * x[i]);
        });
    }
    // o += query S
    template <typename E> __device__ __forceinline__ void read(float (&o)[WIDTH], const Vector<E> *queries) {
        rows(queries, [&](int n, float query) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) o[i] = fmaf(query, at[n][i], o[i]);
        });
    }
    template <typename E, typename F> __device__ __forceinline__ void rows(const Vector<E> *numbers, F &&f) {
#pragma unroll
        for (int n = 0; n < ROWS; n += Vector<E>::SIZE) {
            Vector<E> x = numbers[n / Vector<E>::SIZE];
#pragma unroll
            for (int i = 0; i < Vector<E>::SIZE; ++i) f(n + i, widen(x.at[i]));
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
    E *keys = nullptr, *values = nullptr; // of the buffer, if there is one
    float *decays = nullptr;
    int64_t key_step = 0, value_step = 0;
    bool owns_keys = false, owns_values = false; // whether this is the first of the heads that share them
    bool aligned;
    __device__ Tokens(const Step &all, const Place &at, const Row &row) : p(all.p), at(at), before(row.before) {
        // shares as 32 bits, whose divisions are short
        int key_head = at.head / int(p.k.share), value_head = at.head / int(p.v.share);
        q = static_cast<E *>(p.q.data) + at.row * p.q.row + at.head / int(p.q.share) * p.q.head;
        k = static_cast<E *>(p.k.data) + at.row * p.k.row + key_head * p.k.head;
        v = static_cast<E *>(p.v.data) + at.row * p.v.row + value_head * p.v.head + at.first_value;
        // so that the buffer's rows begin on 16 bytes, too
        aligned = p.aligned && p.keys % Vector<E>::SIZE == 0 && p.values % Vector<E>::SIZE == 0;
        if (all.pool.room == 0) return;
        int64_t first = int64_t(row.slot) * all.pool.room;
        key_step = p.heads / int(p.k.share) * p.keys, value_step = p.heads / int(p.v.share) * p.values;
        keys = static_cast<E *>(all.pool.keys) + first * key_step + key_head * p.keys;
        values = static_cast<E *>(all.pool.values) + first * value_step + value_head * p.values + at.first_value;
        decays = all.pool.decays + first * p.heads + at.head;
        owns_keys = key_head * int(p.k.share) == at.head, owns_values = value_head * int(p.v.share) == at.head;
    }
    __device__ uint8_t mark(int n) const { return n < before ? 0 : at.mark(p, n - before); }
    __device__ const E *key(int n) const {
        return n < before ? keys + n * key_step : k + (n - before) * p.k.token;
    }
    __device__ const E *value(int n) const {
        return n < before ? values + n * value_step : v + (n - before) * p.v.token;
    }
    __device__ const E *query(int n) const { return q + (n - before) * p.q.token; }
    __device__ const float *log_decay(int n) const {
        if (!p.per_token) return p.log_decay + at.head;
        if (n < before) return decays + n * p.heads;
        return p.log_decay + (int64_t(at.row) * p.length + n - before) * p.heads + at.head;
    }
    // Asks for a piece of 16 bytes of a row that has `width` numbers; what does not exist becomes zero.
    __device__ __forceinline__ void ask(Vector<E> *to, const E *row, int first, int width, bool exists) const {
        int count = exists ? max(0, min(Vector<E>::SIZE, width - first)) : 0;
        if (aligned) {
            copy_async(shared_address(to), count ? row + first : k, count * int(sizeof(E)));
            return;
        }
        Vector<E> x;
#pragma unroll
        for (int i = 0; i < Vector<E>::SIZE; ++i) x.at[i] = i < count ? row[first + i] : narrow<E>(0.0f);
        *to = x;
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

// A decay from its logarithm, as retention.cuh has it.
__device__ __forceinline__ float factor(float log, bool starts) {
    if (log > 0.0f) log = __int_as_float(0x7fffffff);
    Decay decay;
    decay.resets = starts || log < LEAST_LOGARITHM;
    if (!decay.resets) decay.log = double(log) * 1.4426950408889634;
    return decay.factor();
}

// Some tokens in shared memory.
template <typename E, int KEYS> struct Batch {
    using L = Layout<KEYS>;
    static constexpr int PIECES = KEYS / Vector<E>::SIZE, VALUE_PIECES = SLICE / Vector<E>::SIZE;
    Vector<E> queries[L::BATCH][PIECES], keys[L::BATCH][PIECES], values[L::BATCH][VALUE_PIECES];
    float sums[L::BATCH][L::WARPS][SLICE], decays[L::BATCH];
    bool lives[L::BATCH];

    // Asks for tokens; returns the logarithm of the decay of the thread's own, if it has one.
    __device__ __forceinline__ float ask(const Tokens<E> &tokens, int first, int count, int left, bool outputs) {
        float log = 0.0f;
        if (threadIdx.x < count) log = *tokens.log_decay(first + threadIdx.x);
        for (int i = threadIdx.x; i < count * PIECES; i += L::THREADS) {
            int n = i / PIECES, piece = i % PIECES, column = piece * Vector<E>::SIZE, token = first + n;
            bool live = tokens.mark(token) != PAD;
            tokens.ask(&keys[n][piece], tokens.key(token), column, tokens.p.keys, live);
            if (outputs && token >= tokens.before)
                tokens.ask(&queries[n][piece], tokens.query(token), column, tokens.p.keys, live);
        }
        for (int i = threadIdx.x; i < count * VALUE_PIECES; i += L::THREADS) {
            int n = i / VALUE_PIECES, piece = i % VALUE_PIECES, token = first + n;
            bool live = tokens.mark(token) != PAD;
            tokens.ask(&values[n][piece], tokens.value(token), piece * Vector<E>::SIZE, left, live);
        }
        commit_copies();
        return log;
    }
    __device__ __forceinline__ void arrive(const Tokens<E> &tokens, int first, int count, float log) {
        if (threadIdx.x < count) {
            uint8_t mark = tokens.mark(first + threadIdx.x);
            decays[threadIdx.x] = factor(log, mark == START);
            lives[threadIdx.x] = mark != PAD;
        }
        wait_copies<0>();
        __syncthreads();
    }
};

template <typename E, typename S, int KEYS> __device__ void step(const Step &all) {
    using L = Layout<KEYS>;
    __shared__ Batch<E, KEYS> batch;
    const Retention &p = all.p;
    Place at(p, SLICE);
    Row row(all, at.row);
    int count = row.count(p.length), across = threadIdx.x % ACROSS, own = threadIdx.x / ACROSS * (ROWS / Vector<E>::SIZE);
    int left = min(SLICE, p.values - at.first_value);
    E *o = static_cast<E *>(p.o.data) + at.row * p.o.row + at.head * p.o.head + at.first_value;
    if (row.slot < 0) {
        for (int i = threadIdx.x; row.outputs && i < p.length * left; i += L::THREADS)
            o[i / left * p.o.token + i % left] = narrow<E>(0.0f);
        return;
    }
    int64_t state = (int64_t(row.slot) * p.heads + at.head) * p.keys * p.values;
    Tokens<E> tokens(all, at, row);
    Slice<S> s;
    s.value = at.first_value + across * WIDTH, s.count = p.values - s.value;
    float log = batch.ask(tokens, 0, min(L::BATCH, count), left, row.outputs);
    if (p.initial && count > 0) s.load(p, reinterpret_cast<const S *>(p.initial) + state);
    for (int first = 0; first < count; first += L::BATCH) {
        int now = min(L::BATCH, count - first);
        if (first > 0) {
            __syncthreads();
            log = batch.ask(tokens, first, now, left, row.outputs);
        }
        batch.arrive(tokens, first, now, log);
#pragma unroll 1
        for (int n = 0; n < now; ++n) {
            Quad<E> x = reinterpret_cast<const Quad<E> *>(batch.values[n])[across];
            float o[WIDTH] = {};
            if (batch.lives[n]) s.take(batch.decays[n], &batch.keys[n][own], x.at);
            if (!row.outputs || first + n < row.before) continue;
            if (batch.lives[n]) s.read(o, &batch.queries[n][own]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
#pragma unroll
                for (int lanes = ACROSS; lanes < LANES; lanes *= 2) o[i] += __shfl_xor_sync(~0u, o[i], lanes);
                if (threadIdx.x % LANES < ACROSS) batch.sums[n][threadIdx.x / LANES][across * WIDTH + i] = o[i];
            }
        }
        if (row.folds && first + now == count) s.store(p, reinterpret_cast<S *>(p.state) + state);
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
    if (!row.folds) tokens.keep(row.stay, left);
}

#define KERNEL(E, S, KEYS)                                                                                             \
    extern "C" __global__ void __launch_bounds__(Layout<KEYS>::THREADS, RESIDENT / Layout<KEYS>::THREADS)              \
        retention_step_##E##_##S##_##KEYS(const __grid_constant__ Step all) { take_turn(); step<E, S, KEYS>(all); }
#define WIDTHS(E, S) KERNEL(E, S, 64) KERNEL(E, S, 128) KERNEL(E, S, 256) KERNEL(E, S, 512)
#define KERNELS(E) WIDTHS(E, float) WIDTHS(E, bf16)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
