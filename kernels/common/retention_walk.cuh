// Chunkwise retention; src/ops/retention has the formula, retention.cuh the shape of a block.
//
// One kernel is the forward pass and every gradient: with G the gradient of the state, going back in time,
//     dq = retention(do, v, k) over S^T,  dk = retention(v, do, q) over G^T,  dv = retention(k, q, do) over G.
// Per chunk of C tokens, M being the decays between its tokens and c[i], e[j] those from its start and to its end:
//     P   = outer inner M (q k^T)                                   all warps together, into shared memory
//     o^T = c (S^T q^T) outer + v^T P^T                             S from registers, which are fragments A as they are
//     S^T = whole S^T + inner (e v)^T k                             in f32
// The next chunk's q, k and v come by asynchronous copies meanwhile. WK warps share 16 values' keys and add up their o.
// `retention_states` computes the states alone, which the segments of time hand on.
//
// Grid (slices of 16 WV values, batch * heads, segments), 32 WV WK threads.
// Bytes: q, k, v read and o written once (q and k once a slice, from L2); with several segments k and v once more.
// Measured on an H100, bf16, kernels alone: B 8, T 2048, H 32, K = V = 256: 1.39 ms, floor 0.36; B 1, T 8192, H 96,
// K = V = 128 in segments of 1024: 0.86 ms, floor 0.27. A warp's 16 rows of A read every fragment B for themselves, so
// shared memory is the limit. Faster: wgmma, whose warpgroups read B once (retention_hopper.cuh, 2.5 times).
#pragma once
#include "retention.cuh"

// Tokens whose outputs a warp computes at once.
constexpr int TOGETHER = 32;

template <typename E, int KW_, int WK_, int WV_, int C_, int STAGES_, bool OUTPUTS_> struct Shape {
    static constexpr int KW = KW_, WK = WK_, WV = WV_, C = C_, STAGES = STAGES_;
    static constexpr bool OUTPUTS = OUTPUTS_;
    static constexpr int WARPS = WK * WV, THREADS = WARPS * LANES, KEYS = KW * WK, VALUES = 16 * WV;
    using Keys = Tile<E, C, KEYS>;
    using Values = Tile<E, C, VALUES>;
    using Scores = Tile<E, C, C>;
    // Tiles of 8 tokens' outputs; each of the WK warps that share values finishes some.
    static constexpr int TILES = C / 8, OWN = TILES / WK, SHARES = OUTPUTS ? WV * TILES * (WK - 1) * LANES : 0;
    // Bytes of shared memory.
    static constexpr int KEY_BYTES = Keys::SIZE * sizeof(E), VALUE_BYTES = Values::SIZE * sizeof(E);
    static constexpr int STAGE = (OUTPUTS ? 2 : 1) * KEY_BYTES + VALUE_BYTES;
    static constexpr int SCORES = STAGES * STAGE;
    static constexpr int SHARED = SCORES + (OUTPUTS ? Scores::SIZE * sizeof(E) : 0);
    static constexpr int DECAYS = SHARED + SHARES * sizeof(float4);
    static constexpr int MEMORY = DECAYS + 2 * sizeof(Decays<C>) + 128;
};

// P of the lower triangle, in blocks of 16 x 16 that the warps take in turns.
template <typename E, typename S>
__device__ __forceinline__ void scores(char *to, uint32_t q, uint32_t k, const Decays<S::C> &decays, float factor,
                                       int warp) {
    using F = Fragments<E>;
    constexpr int BLOCKS = S::C / 16;
    int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
    for (int block = warp; block < BLOCKS * (BLOCKS + 1) / 2; block += S::WARPS) {
        int i = 0, j = block;
        while (j > i) j -= ++i;
        C16x8 p[2];
#pragma unroll
        for (int key = 0; key < S::KEYS; key += 16) {
            auto a = F::template a<typename S::Keys>(q, 16 * i, key);
            auto b = F::template b_transposed<typename S::Keys>(k, 16 * j, key);
            F::multiply(p[0], a, b.at[0]);
            F::multiply(p[1], a, b.at[1]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = 16 * i + 8 * half + g, column = 16 * j + 8 * n + 2 * t;
                float low = factor * decays.between(row, column), high = factor * decays.between(row, column + 1);
                // where there is no decay there is nothing, whatever the product
                low = low == 0.0f ? 0.0f : low * p[n].at[2 * half];
                high = high == 0.0f ? 0.0f : high * p[n].at[2 * half + 1];
                F::template put<typename S::Scores>(to, row, column, low, high);
            }
    }
}

// f16 holds a state only up to 65504.
template <typename E> constexpr float SHRINK = 1.0f;
template <> constexpr float SHRINK<f16> = 1.0f / 64;

// Outputs of tokens first.. (TOGETHER of them at most), this warp's share.
template <typename E, typename S>
__device__ __forceinline__ void outputs(C16x8 *o, const State<S::KW / 8> &state, uint32_t q, uint32_t v, uint32_t scores,
                                        const Decays<S::C> &decays, int first, int part, int value) {
    using F = Fragments<E>;
    constexpr int TILES = (S::C < TOGETHER ? S::C : TOGETHER) / 8;
    int t = threadIdx.x % 4;
#pragma unroll
    for (int key = 0; key < S::KW; key += 16) {
        auto a = F::a(state.at[key / 8], state.at[key / 8 + 1], SHRINK<E>);
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
            auto b = F::template b_transposed<typename S::Keys>(q, first + 8 * n, part * S::KW + key);
            F::multiply(o[n], a, b.at[0]);
            F::multiply(o[n + 1], a, b.at[1]);
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        float2 start = *reinterpret_cast<const float2 *>(&decays.start[first + 8 * n + 2 * t]);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n].at[i] *= (i % 2 ? start.y : start.x) / SHRINK<E>;
    }
#pragma unroll
    for (int token = 0; token < S::C; token += 16) {
        if (token >= first + 8 * TILES || token / 16 % S::WK != part) continue;
        auto a = F::template a_transposed<typename S::Values>(v, token, value);
#pragma unroll
        for (int n = 0; n < TILES; n += 2)
            if (first + 8 * n >= token) {
                auto b = F::template b_transposed<typename S::Scores>(scores, first + 8 * n, token);
                F::multiply(o[n], a, b.at[0]);
                F::multiply(o[n + 1], a, b.at[1]);
            }
    }
}

// The state behind the chunk.
template <typename E, typename S>
__device__ __forceinline__ void advance(State<S::KW / 8> &state, uint32_t k, uint32_t v, const Decays<S::C> &decays,
                                        int part, int value) {
    using F = Fragments<E>;
    typename F::A a[S::C / 16];
#pragma unroll
    for (int token = 0; token < S::C; token += 16) {
        a[token / 16] = F::template a_transposed<typename S::Values>(v, token, value);
        F::weigh(a[token / 16], decays.end + token);
    }
    float whole = decays.whole;
#pragma unroll
    for (int key = 0; key < S::KW; key += 16) {
        C16x8 sum[2];
#pragma unroll
        for (int token = 0; token < S::C; token += 16) {
            auto b = F::template b<typename S::Keys>(k, token, part * S::KW + key);
            F::multiply(sum[0], a[token / 16], b.at[0]);
            F::multiply(sum[1], a[token / 16], b.at[1]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            state.at[key / 8].at[i] = fmaf(whole, state.at[key / 8].at[i], sum[0].at[i]);
            state.at[key / 8 + 1].at[i] = fmaf(whole, state.at[key / 8 + 1].at[i], sum[1].at[i]);
        }
    }
}

template <int THREADS> __device__ __forceinline__ void barrier(int name) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}

template <typename E, typename S> __device__ __forceinline__ void walk(const Retention &p) {
    constexpr int C = S::C;
    extern __shared__ char unaligned[];
    char *bytes = unaligned + (-shared_address(unaligned) & 127);
    uint32_t base = shared_address(bytes);
    auto *decays = reinterpret_cast<Decays<C> *>(bytes + S::DECAYS);
    int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    int part = warp / S::WV, value = warp % S::WV * 16; // this warp's keys and values
    Place at(p, S::VALUES);
    int columns = p.values - at.first_value;
    const E *q = S::OUTPUTS ? p.q.at<E>(at.row, at.head) : nullptr;
    const E *k = p.k.at<E>(at.row, at.head), *v = p.v.at<E>(at.row, at.head) + at.first_value;
    E *o = S::OUTPUTS ? p.o.at<E>(at.row, at.head) : nullptr;

    bool ends = at.segment == (p.backwards ? 0 : p.segments - 1);
    if (!S::OUTPUTS && ends) return; // nothing begins with its state
    int chunks = (at.tokens + C - 1) / C, chunk = 0;
    Decay through;
    bool constant = !p.per_token && !p.marks;
    if (!S::OUTPUTS && constant) {
        // what decays make negligible by the segment's end need not be read; a decay of 1 makes nothing so
        Decay one(p, at, at.begin);
        through.log = one.log * at.tokens, through.resets = one.resets;
        float counting = one.resets ? 0.0f : NEGLIGIBLE / fabsf(float(one.log * C));
        if (counting < float(chunks)) chunk = chunks - 1 - min(chunks - 1, int(counting) + 1);
    }
    auto ask = [&](int stage, int chunk) {
        uint32_t to = base + stage * S::STAGE;
        fetch<E, C, S::VALUES, S::THREADS>(to, v, p.v.token, columns, p, at, chunk * C);
        fetch<E, C, S::KEYS, S::THREADS>(to + S::VALUE_BYTES, k, p.k.token, p.keys, p, at, chunk * C);
        if (S::OUTPUTS)
            fetch<E, C, S::KEYS, S::THREADS>(to + S::VALUE_BYTES + S::KEY_BYTES, q, p.q.token, p.keys, p, at, chunk * C);
        commit_copies();
    };
    auto prepare = [&](int chunk) {
        if (warp != S::WARPS - 1) return;
        Decay all = decays[chunk % 2].fill(p, at, chunk * C);
        if (S::OUTPUTS || !constant) through.then(all);
    };

    State<S::KW / 8> state;
    int first_key = part * S::KW, first_value = at.first_value + value;
    if (S::OUTPUTS) {
        if (p.segments > 1)
            state.load(p.carried + at.carried(p), p, first_key, first_value);
        else if (p.initial)
            state.load(p.initial + at.state(p), p, first_key, first_value);
    }
    if (S::STAGES > 1) ask(chunk % 2, chunk);
    prepare(chunk);
    for (; chunk < chunks; ++chunk) {
        int stage = S::STAGES > 1 ? chunk % 2 : 0;
        if (S::STAGES == 1) {
            __syncthreads();
            ask(stage, chunk);
        }
        wait_copies<0>();
        __syncthreads();
        if (chunk + 1 < chunks) {
            if (S::STAGES > 1) ask(stage ^ 1, chunk + 1);
            prepare(chunk + 1);
        }
        const Decays<C> &d = decays[chunk % 2];
        uint32_t values = base + stage * S::STAGE, keys = values + S::VALUE_BYTES, queries = keys + S::KEY_BYTES;
        if (S::OUTPUTS) {
            scores<E, S>(bytes + S::SCORES, queries, keys, d, p.inner * p.outer, warp);
            __syncthreads();
            constexpr int TILES = (C < TOGETHER ? C : TOGETHER) / 8;
            C16x8 own[S::WK > 1 ? S::OWN : 1];
            auto *shares = reinterpret_cast<float4 *>(bytes + S::SHARED) + warp % S::WV * S::TILES * (S::WK - 1) * LANES;
#pragma unroll
            for (int first = 0; first < C; first += 8 * TILES) {
                C16x8 sum[TILES];
                outputs<E, S>(sum, state, queries, values, base + S::SCORES, d, first, part, value);
                if (S::WK == 1) {
                    put_outputs<E, TILES>(p, at, o, sum, chunk * C + first, first_value);
                } else {
#pragma unroll
                    for (int n = 0; n < TILES; ++n) {
                        int tile = first / 8 + n, owner = tile / S::OWN;
                        float *x = sum[n].at;
                        if (owner == part)
                            own[tile % S::OWN] = sum[n];
                        else
                            shares[(tile * (S::WK - 1) + part - (part > owner)) * LANES + lane] =
                                make_float4(x[0], x[1], x[2], x[3]);
                    }
                }
            }
            if constexpr (S::WK > 1) {
                barrier<S::WK * LANES>(1 + warp % S::WV);
#pragma unroll
                for (int n = 0; n < S::OWN; ++n)
#pragma unroll
                    for (int i = 0; i < S::WK - 1; ++i) {
                        float4 x = shares[((part * S::OWN + n) * (S::WK - 1) + i) * LANES + lane];
                        float *to = own[n].at;
                        to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
                    }
                put_outputs<E, S::OWN>(p, at, o, own, chunk * C + part * S::OWN * 8, first_value);
            }
        }
        advance<E, S>(state, keys, values, d, part, value);
    }

    // backwards, the first token's own decay comes last
    Decay last;
    if (p.backwards) last = Decay(p, at, at.begin);
    if (S::OUTPUTS) {
        if (ends && p.state) state.store(p.state + at.state(p), p, first_key, first_value, last.factor());
    } else {
        state.store(p.carried + at.carried(p), p, first_key, first_value, last.factor());
        if (threadIdx.x == S::THREADS - 1 && blockIdx.x == 0) {
            if (!constant) through.then(last);
            p.factors[int64_t(blockIdx.y) * p.segments + at.segment] = through.factor();
        }
    }
}

// Elements of 16 bits have kernels of their own on Hopper (retention_hopper.cuh): compiled for it, these are never launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <typename E> constexpr bool LAUNCHED = sizeof(E) > 2;
#else
template <typename E> constexpr bool LAUNCHED = true;
#endif
template <typename E, typename S> __device__ __forceinline__ void walk_if_launched(const Retention &p) {
    if constexpr (LAUNCHED<E>) walk<E, S>(p);
}

// The kernels of element E for up to KW WK keys, in slices of 16 WV values: outputs, and states alone.
#define RETENTION_KERNEL(NAME, E, KW, WK, WV, C, STAGES, OUTPUTS, BLOCKS)                                              \
    using NAME##_shape = Shape<E, KW, WK, WV, C, STAGES, OUTPUTS>;                                                     \
    extern "C" __global__ void __launch_bounds__(NAME##_shape::THREADS, BLOCKS)                                        \
        NAME(const __grid_constant__ Retention p) {                                                                    \
        take_turn();                                                                                                   \
        walk_if_launched<E, NAME##_shape>(p);                                                                          \
    }                                                                                                                  \
    extern "C" __constant__ const unsigned NAME##_memory = NAME##_shape::MEMORY;
#define RETENTION(E, KEYS, VALUES, WK, C, STAGES, BLOCKS)                                                              \
    RETENTION_KERNEL(retention_##E##_##KEYS##_##VALUES, E, KEYS / WK, WK, VALUES / 16, C, STAGES, true, BLOCKS)        \
    RETENTION_KERNEL(retention_states_##E##_##KEYS##_##VALUES, E, KEYS / WK, WK, VALUES / 16, C, STAGES, false, BLOCKS)
