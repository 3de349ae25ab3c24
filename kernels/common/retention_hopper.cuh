// Chunkwise retention on Hopper's tensor cores: the algorithm of retention_walk.cuh for elements of 16 bits.
//
// A warpgroup holds the state of 64 values, transposed, as the sums of its products: 64 x KW in f32, up to 128 registers
// a thread. Per chunk of 64 tokens, M, c and e as in retention_walk.cuh:
//     P   = outer inner M (q k^T)        a share of the columns for each group; decayed in registers, then shared memory
//     o^T = c (S^T q^T) outer            S^T from registers as A, q from shared memory
//         + v^T P^T                      both from shared memory, v across
//     S^T = whole S^T + inner (e v)^T k  e v from registers as A, k from shared memory, across
// The products of P and the first of o run while the next chunk is asked for and the last one's outputs are written; those
// of S while this one's outputs are staged. Two groups share the values of heads of 512 keys and add up their o.
// With `Shape::OUTPUTS` false there are states alone, whose products follow one another without a wait where decays are
// constant: v is then decayed to the segment's end at once.
//
// Grid (slices of 64 WV values, batch * heads, segments), 128 WV WK threads, one block a multiprocessor.
// Bytes: q, k, v read and o written once (q and k once a slice, from L2); with several segments k and v once more.
// Measured on an H100, bf16, kernels in a graph (floor): h96 0.286 ms (0.267), d256 0.50 (0.36), retnet-1.3b 0.27 (0.13).
// What is between is the chain of a chunk's steps, which one block does not hide: faster needs two blocks' worth of
// registers, or warps of their own for loads and decays.
//
// Rotary on load, and a head's norm and gate on the way out, were tried here on an H200 (B8 T2048 H8 K256 V512, bf16, 0.269 ms
// without): turning queries and keys where they have arrived adds 0.065 ms, where a pass of rotary.cu takes 0.079 once for all
// walks, those of backward too; reading the gate and scaling as outputs leave adds 0.306, without the sums that the four blocks
// of a head would have to exchange, where a pass of norm_heads.cu takes 0.133. Both are passes of their own. (Clusters of a
// head's four blocks fit on 120 of 132 multiprocessors.)
#pragma once
#include "retention_hopper_parts.cuh"

// e v of a chunk, times `later`, as A.
template <typename E, typename S>
__device__ __forceinline__ void weigh(typename Fragments<E>::A (&to)[S::C / 16], uint32_t values, int value,
                                      const float *end, float later) {
    using F = Fragments<E>;
    int t = threadIdx.x % 4;
#pragma unroll
    for (int token = 0; token < S::C; token += 16) {
        auto &a = to[token / 16];
        a = F::template a_transposed<typename S::Values>(values, token, value);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float2 w = *reinterpret_cast<const float2 *>(end + token + half * 8 + 2 * t);
            w.x *= later, w.y *= later;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float2 x = unpack<E>(a.at[2 * half + i]);
                a.at[2 * half + i] = pack<E>(x.x * w.x, x.y * w.y);
            }
        }
    }
}

// S^T += (e v)^T k
template <typename E, typename S>
__device__ __forceinline__ void add(State<S::KW / 8> &state, const typename Fragments<E>::A (&weighted)[S::C / 16],
                                    uint32_t keys) {
    begin_products();
#pragma unroll
    for (int token = 0; token < S::C; token += 16)
        Products<E, S::KW>::template multiply<true>(state.at, weighted[token / 16].at,
                                                    describe(keys, S::PANEL) + token * 8, true);
    commit_products();
}

template <int TILES> __device__ __forceinline__ void scale(State<TILES> &state, float factor) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.at[n].at[i] *= factor;
}

// This thread's warpgroup, known to be the same for a warp; its keys, and its values and those of the warp in the slice.
template <typename S> struct Part {
    int group = __shfl_sync(~0u, threadIdx.x / GROUP, 0), part = group / S::WV, values = group % S::WV;
    int row = threadIdx.x / LANES % 4 * 16, value = values * ROWS + row, key = part * S::KW;
    static constexpr int PANELS = S::KW / 64;
    // The panel of its values in a tile of values, and of its first keys in one of keys.
    __device__ uint32_t own_values(uint32_t tile) const { return tile + values * S::PANEL; }
    __device__ uint32_t own_keys(uint32_t tile) const { return tile + part * PANELS * S::PANEL; }
};

template <typename E, typename S> __device__ __forceinline__ void states(const Retention &p) {
    constexpr int C = S::C;
    extern __shared__ char unaligned[];
    char *bytes = unaligned + (-shared_address(unaligned) & 1023);
    Place at(p, S::VALUES);
    if (at.segment == (p.backwards ? 0 : p.segments - 1)) return; // nothing begins with the walk's end
    Part<S> own;
    Chunks<E, S> chunks(p, at, bytes);
    Decay through, one;
    int chunk = 0;
    if (chunks.constant) {
        one = Decay(p, at, at.begin);
        through.log = one.log * at.tokens, through.resets = one.resets;
        // what decays make negligible by the segment's end need not be read; a decay of 1 makes nothing so
        float counting = one.resets ? 0.0f : NEGLIGIBLE / fabsf(float(one.log * C));
        if (counting < float(chunks.count)) chunk = chunks.count - 1 - min(chunks.count - 1, int(counting) + 1);
    }
    chunks.first = chunk;
    State<S::KW / 8> state;
#pragma unroll
    for (int i = 0; i < S::AHEAD; ++i) chunks.ask(i, chunk + i);
    chunks.prepare(chunk, through);
    int stage = 0;
    auto advance = [&](auto constant, auto &weighted) {
        wait_copies<S::AHEAD - 1>();
        publish();
        __syncthreads();
        const Factors<C> &d = chunks.decays[chunks.slot(chunk)];
        chunks.ask((stage + S::AHEAD) % S::STAGES, chunk + S::AHEAD);
        chunks.prepare(chunk + 1, through);
        float later = 1.0f;
        if (decltype(constant)::value) {
            int rest = at.tokens - (chunk + 1) * C;
            if (rest > 0) later = one.resets ? 0.0f : exp2_fast(float(one.log * rest));
        }
        weigh<E, S>(weighted, chunks.values(stage), own.value, d.end, later);
        if (!decltype(constant)::value) scale(state, d.whole);
        add<E, S>(state, weighted, own.own_keys(chunks.keys(stage)));
        wait_products<decltype(constant)::value>();
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
        ++chunk;
    };
    typename Fragments<E>::A even[C / 16], odd[C / 16];
    if (chunks.constant) {
        while (chunk < chunks.count) {
            advance(Constant<1>(), even);
            if (chunk == chunks.count) break;
            advance(Constant<1>(), odd);
        }
    } else {
        while (chunk < chunks.count) advance(Constant<0>(), even);
    }
    wait_products<0>();

    // backwards, the first token's own decay comes last
    Decay last;
    if (p.backwards) last = Decay(p, at, at.begin);
    state.store(p.carried + at.carried(p), p, own.key, at.first_value + own.value, last.factor());
    if (threadIdx.x == S::THREADS - 1 && blockIdx.x == 0) {
        if (!chunks.constant) through.then(last);
        p.factors[int64_t(blockIdx.y) * p.segments + at.segment] = through.factor();
    }
}

template <typename E, typename S> __device__ __forceinline__ void walk(const Retention &p) {
    using F = Fragments<E>;
    constexpr int C = S::C, KW = S::KW, STEPS = KW / 16, COLUMNS = C / S::GROUPS;
    // Registers are scarce where the state takes half of them: fewer steps at once, and nothing held across others.
    constexpr bool SCARCE = KW == 256;
    constexpr int BATCH = SCARCE ? 2 : S::GROUPS == 1 && STEPS > 4 ? 4 : STEPS;
    extern __shared__ char unaligned[];
    char *bytes = unaligned + (-shared_address(unaligned) & 1023);
    int lane = threadIdx.x % LANES, t = lane % 4;
    Place at(p, S::VALUES);
    Part<S> own;
    Chunks<E, S> chunks(p, at, bytes);
    E *o = p.o.at<E>(at.row, at.head);
    const int first_value = at.first_value + own.values * ROWS;

    State<KW / 8> state;
    if (p.segments > 1)
        state.load(p.carried + at.carried(p), p, own.key, at.first_value + own.value);
    else if (p.initial)
        state.load(p.initial + at.state(p), p, own.key, at.first_value + own.value);
    Decay through;
#pragma unroll
    for (int i = 0; i < S::AHEAD; ++i) chunks.ask(i, i);
    if (S::QUERIES < S::STAGES) chunks.ask_queries(0), commit_copies();
    chunks.prepare(0, through);
    int stage = 0;
    char *results = bytes + S::RESULTS + own.values * S::PANEL;
    for (int chunk = 0; chunk < chunks.count; ++chunk) {
        wait_copies<S::AHEAD - 1>();
        publish();
        __syncthreads();
        const Factors<C> &d = chunks.decays[chunks.slot(chunk)];
        uint32_t values = chunks.values(stage), keys = chunks.keys(stage), queries = chunks.queries(chunk);
        uint32_t scores = chunks.base + S::SCORES;
        auto ask_next = [&] {
            chunks.ask((stage + S::AHEAD) % S::STAGES, chunk + S::AHEAD);
            chunks.prepare(chunk + 1, through);
        };
        C16x8 s[COLUMNS / 8], sum[C / 8];
        typename F::A a[2][BATCH], weighted[C / 16];
        auto convert = [&](int begin) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                a[begin / BATCH % 2][i] = F::a(state.at[2 * (begin + i)], state.at[2 * (begin + i) + 1], SHRINK<E>);
        };
        auto from_state = [&](int begin) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                int key = 16 * (begin + i);
                uint64_t q = describe(own.own_keys(queries)) + (key / 64 * S::PANEL + key % 64 * 2) / 16;
                Products<E, C>::template multiply<false>(sum, a[begin / BATCH % 2][i].at, q, key > 0);
            }
            commit_products();
        };
        if (SCARCE) ask_next();
        convert(0);
        begin_products();
        uint64_t all_queries = describe(queries), some_keys = describe(keys + own.group * COLUMNS * 128);
#pragma unroll
        for (int key = 0; key < S::KEYS; key += 16) {
            int step = (key / 64 * S::PANEL + key % 64 * 2) / 16;
            Products<E, COLUMNS>::template multiply<false, false>(s, all_queries + step, some_keys + step, key > 0);
        }
        commit_products();
        from_state(0);
        if (!SCARCE) {
            ask_next();
            weigh<E, S>(weighted, values, own.value, d.end, 1.0f);
        }
        if (S::OWN_RESULTS && chunk > 0) write_outputs<E, S, C>(p, at, o, results, chunk - 1, 0, first_value);
        wait_products<1>();
        uint32_t counted[COLUMNS / 8][2];
        d.template count<E>(counted, s, p, own.row + lane / 4, own.group * COLUMNS + 2 * t);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            int row = own.row + lane / 8 % 2 * 8 + lane % 8, column = own.group * COLUMNS + 8 * n + lane / 16 * 8;
            put4(scores + S::Scores::place(row, column),
                 {counted[n][0], counted[n][1], counted[n + 1][0], counted[n + 1][1]});
        }
        publish();
#pragma unroll
        for (int step = BATCH; step < STEPS; step += BATCH) {
            wait_products<1>();
            convert(step);
            begin_products();
            from_state(step);
        }
        wait_products<0>();
        __syncthreads();
        if (S::QUERIES < S::STAGES) {
            if (chunk + 1 < chunks.count) chunks.ask_queries(chunk + 1);
            commit_copies();
        }
#pragma unroll
        for (int n = 0; n < C / 8; ++n) {
            float2 start = *reinterpret_cast<const float2 *>(&d.start[8 * n + 2 * t]);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n].at[i] *= (i % 2 ? start.y : start.x) / SHRINK<E>;
        }
        // and from within the chunk; groups that share values share its tokens
        constexpr int TOKENS = C / S::WK;
        uint64_t own_values = describe(own.own_values(values) + own.part * TOKENS * 128);
        uint64_t own_scores = describe(scores + own.part * TOKENS * 2);
        begin_products();
#pragma unroll
        for (int token = 0; token < TOKENS; token += 16)
            Products<E, C>::template multiply<true, false>(sum, own_values + token * 8, own_scores + token / 8, true);
        commit_products();
        if (SCARCE) weigh<E, S>(weighted, values, own.value, d.end, 1.0f);
        scale(state, d.whole);
        add<E, S>(state, weighted, own.own_keys(keys));
        if constexpr (S::WK == 1) {
            wait_products<1>();
            stage_outputs<E, S, C>(shared_address(results), sum, 0, own.row);
            wait_products<0>();
        } else {
            static_assert(S::WK == 2);
            wait_products<0>();
            __syncthreads();
            // each finishes half of the tokens
            char *tile = bytes + (keys - chunks.base) + own.values * S::PANEL;
            auto *shares = reinterpret_cast<float4 *>(bytes + (keys - chunks.base) + S::RESULT_BYTES);
            shares += own.values * (C / 8) * GROUP + threadIdx.x % GROUP;
            constexpr int HALF = C / 16;
#pragma unroll
            for (int n = 0; n < HALF; ++n) {
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = own.part ? sum[n].at[i] : sum[n + HALF].at[i];
                shares[(n + own.part * HALF) * GROUP] = make_float4(x[0], x[1], x[2], x[3]);
            }
            __syncthreads();
            C16x8 half[HALF];
#pragma unroll
            for (int n = 0; n < HALF; ++n) {
                float4 other = shares[(n + (1 - own.part) * HALF) * GROUP];
                float x[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) half[n].at[i] = x[i] + (own.part ? sum[n + HALF].at[i] : sum[n].at[i]);
            }
            stage_outputs<E, S, C / 2>(shared_address(tile), half, own.part * (C / 2), own.row);
            barrier<GROUP>(1 + own.group);
            write_outputs<E, S, C / 2>(p, at, o, tile, chunk, own.part * (C / 2), first_value);
        }
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    }
    if (S::OWN_RESULTS && chunks.count > 0) {
        __syncthreads();
        write_outputs<E, S, C>(p, at, o, results, chunks.count - 1, 0, first_value);
    }

    // backwards, the first token's own decay comes last
    Decay last;
    if (p.backwards) last = Decay(p, at, at.begin);
    if (at.segment == (p.backwards ? 0 : p.segments - 1) && p.state)
        state.store(p.state + at.state(p), p, own.key, at.first_value + own.value, last.factor());
}

// The kernels of element E for up to KEYS keys, in slices of VALUES values: outputs, and states alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RETENTION_BODY(WHAT, E, SHAPE) WHAT<E, SHAPE>(p);
#else
#define RETENTION_BODY(WHAT, E, SHAPE) // never launched: src/ops/retention/cuda/plan.rs
#endif
#define RETENTION_KERNEL(NAME, WHAT, E, ...)                                                                           \
    using NAME##_shape = Shape<E, __VA_ARGS__>;                                                                        \
    extern "C" __global__ void __launch_bounds__(NAME##_shape::THREADS, 1)                                             \
        NAME(const __grid_constant__ Retention p) {                                                                    \
        take_turn();                                                                                                   \
        RETENTION_BODY(WHAT, E, NAME##_shape)                                                                          \
    }                                                                                                                  \
    extern "C" __constant__ const unsigned NAME##_memory = NAME##_shape::MEMORY;
#define RETENTION(E, KEYS, VALUES, WK, STAGES, QUERIES)                                                                \
    RETENTION_KERNEL(retention_hopper_##E##_##KEYS##_##VALUES, walk, E, KEYS / WK, WK, VALUES / 64, STAGES, QUERIES)   \
    RETENTION_KERNEL(retention_states_hopper_##E##_##KEYS##_##VALUES, states, E, KEYS / WK, WK, VALUES / 64,           \
                     (KEYS > 256 ? 3 : 4), 0)
