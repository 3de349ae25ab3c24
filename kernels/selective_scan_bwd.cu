// The selective scan, backward: all gradients from the states before every KEPT tokens, which forward kept.
//
// Grid and lanes as forward. Tiles go from the last to the first. Within one, a first walk leaves the state before every
// group of 4 tokens in shared memory; then, group by group from the last, states and decays of 4 tokens are computed
// again into registers, and the gradient of the state is carried back through them:
//     dh_t = C_t g_t + carry      carry = 2^(a delta_t) dh_t
//     dC += g_t h_t    dB += delta_t u_t dh_t    du, ddelta, dA from dh_t, carry and h_(t-1)
// Shares of dB and dC are added up over a warp's channels and those of y, du and ddelta over the parts of a state through
// shared memory, then over the warps, and in selective_scan_coefficients over blocks: always in one order, no atomics.
//
// With N = 16: two channels by four numbers in a lane, 64 channels in a block; 75 KB of shared memory (f32: 90), 168
// registers (198), no spills: 3 blocks (2) a multiprocessor.
// Bytes: u, delta, z, dy, B, C and 4 N bytes a channel and 16 tokens of states read; du, ddelta, dz and 8 N bytes a token
// and block for dB and dC written.
// One H100, N 16, bf16, with everything around it: 130m 0.87 ms, 1.4b 2.06, 2.8b-8k 2.76, short 0.59. ncu (1.4b): 32
// instructions a number of the state, 18 of them in the walk back; IPC 2.2, FMA 33% busy, special functions 30%, shared
// memory 70%, DRAM 21%: latency of shared memory binds, with 12 warps a multiprocessor. Sums over channels by the tensor
// cores (numbers in two parts) took 39 instructions and were slower; eight numbers in a lane spill.
// Faster still: y kept by forward, and finishing and preparing tiles in warps of their own.
#include "common/scan_prepare.cuh"
#include "common/scan_sums.cuh"

constexpr int WARPS = THREADS / LANES;
template <typename E, typename F> struct BackwardMemory {
    using T = Tile<E, F>;
    E u[2][T::SIZE], z[2][T::SIZE], dy[2][T::SIZE], delta[T::SIZE];
    E raw_b[CoefficientTile<E, F>::RAW], raw_c[CoefficientTile<E, F>::RAW];
    float inputs[Inputs<F>::SIZE]; // then, in the place of delta u: dx
    float gradients[T::SIZE];      // dy times SiLU(z), then y
    float dstep[T::SIZE];
    float b[F::TILE * F::WIDTH], c[F::TILE * F::WIDTH];
    float4 saved[F::TILE / MICRO - 1][F::PER * F::STATES / 4][THREADS];
    Sums<F> own[WARPS];
    float sums[WARPS][F::TILE][2 * F::WIDTH];
    float bias[F::CHANNELS], skip[F::CHANNELS];
    uint8_t marks[F::TILE];
};

template <typename E, typename F> struct Backward {
    using T = Tile<E, F>;
    using Memory = BackwardMemory<E, F>;
    using States = typename F::States;
    static constexpr int PER = F::PER, STATES = F::STATES, SPLIT = F::SPLIT, WIDTH = F::WIDTH, TILE = F::TILE;
    static constexpr int GROUPS = TILE / MICRO;
    static_assert(TILE == KEPT);

    // A lane's places in the tile's first token.
    struct Places {
        const float *inputs, *gradients, *b, *c;
        __device__ Places(const Memory &m, const Lane<F> &lane)
            : inputs(m.inputs + Inputs<F>::place(lane.own)), gradients(m.gradients + spot(lane.own * PER)),
              b(m.b + lane.part * STATES), c(m.c + lane.part * STATES) {}
    };

    // Moves h over token t; gives the decays, zero where a sequence begins.
    template <bool RESETS>
    static __device__ __forceinline__ void advance(const Memory &m, const Places &at, States &h, States &decay,
                                                   const States &a, int t) {
        float bt[STATES], in[2 * PER];
        load_floats(bt, at.b + t * WIDTH);
        load_floats(in, at.inputs + t * Inputs<F>::TOKEN);
        bool reset = RESETS && m.marks[t] == START;
#pragma unroll
        for (int k = 0; k < PER; ++k)
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                decay[k][i] = reset ? 0.0f : exp2_fast(in[k] * a[k][i]);
                h[k][i] = fmaf(decay[k][i], h[k][i], in[PER + k] * bt[i]);
            }
    }
    static __device__ __forceinline__ void save(Memory &m, int group, const States &h) {
#pragma unroll
        for (int q = 0; q < PER * STATES / 4; ++q) {
            const float *x = &h[0][0] + 4 * q;
            m.saved[group][q][threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
        }
    }
    static __device__ __forceinline__ void restore(const Memory &m, int group, States &h) {
#pragma unroll
        for (int q = 0; q < PER * STATES / 4; ++q) {
            float4 v = m.saved[group][q][threadIdx.x];
            float *x = &h[0][0] + 4 * q;
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        }
    }

    // Sums the lanes' shares of dB and dC of BATCH tokens, in the order of the lanes.
    static __device__ __forceinline__ void sum_channels(Memory &m, int warp, int token) {
        using S = Sums<F>;
        constexpr int HALVES = SPLIT * STATES, TASKS = BATCH * HALVES; // pairs of numbers
        const auto &own = m.own[warp];
#pragma unroll
        for (int first = 0; first < TASKS; first += LANES) {
            int task = first + threadIdx.x % LANES;
            if (TASKS % LANES && task >= TASKS) break;
            int t = task / HALVES, part = task / STATES % SPLIT, half = task % STATES;
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int owner = 0; owner < F::OWNERS; ++owner) {
                int place = S::piece(part, owner, half / 2) + half % 2 * 2;
                float2 v = *reinterpret_cast<const float2 *>(own.channels[t] + place);
                sum.x += v.x, sum.y += v.y;
            }
            // the first half of a lane's shares is dB's
            int kind = half / (STATES / 2), state = part * STATES + half % (STATES / 2) * 2;
            *reinterpret_cast<float2 *>(&m.sums[warp][token + t][kind * WIDTH + state]) = sum;
        }
    }

    // Puts y, dx and dstep of a token and owner to their places.
    static __device__ __forceinline__ void put(Memory &m, int token, int owner, const float (&y)[PER],
                                               const float (&dx)[PER], const float (&dstep)[PER]) {
        store_floats(m.gradients + token * F::CHANNELS + spot(owner * PER), y);
        store_floats(m.inputs + token * Inputs<F>::TOKEN + Inputs<F>::place(owner) + PER, dx);
        store_floats(m.dstep + token * F::CHANNELS + spot(owner * PER), dstep);
    }

    // Sums y, dx and dstep of MICRO tokens over the parts.
    static __device__ __forceinline__ void sum_parts(Memory &m, int warp, int token) {
        using S = Sums<F>;
        if constexpr (SPLIT > 1) {
            constexpr int TASKS = MICRO * S::OWNERS;
            const auto &own = m.own[warp];
#pragma unroll
            for (int first = 0; first < TASKS; first += LANES) {
                int task = first + threadIdx.x % LANES, t = task / S::OWNERS, owner = task % S::OWNERS;
                if (TASKS % LANES && task >= TASKS) break;
                float sums[S::KINDS][PER] = {};
#pragma unroll
                for (int kind = 0; kind < S::KINDS; ++kind)
#pragma unroll
                    for (int part = 0; part < SPLIT; ++part) {
                        float share[PER];
                        load_floats(share, own.parts + t * S::TOKEN + kind * S::KIND + S::part_place(t, part, owner));
#pragma unroll
                        for (int k = 0; k < PER; ++k) sums[kind][k] += share[k];
                    }
                put(m, token + t, warp * S::OWNERS + owner, sums[0], sums[1], sums[2]);
            }
        }
    }

    // Back through one tile: carry, da and the tile's slots take the results.
    template <bool RESETS>
    static __device__ __forceinline__ void walk(Memory &m, const Lane<F> &lane, const Places &at, const States &a,
                                                States &h, States &carry, States &da) {
        using S = Sums<F>;
        int warp = threadIdx.x / LANES, owner = threadIdx.x % F::OWNERS;
        auto &own = m.own[warp];
        {
            States decay;
#pragma unroll MICRO
            for (int t = 0; t < TILE - MICRO; ++t) {
                if (t % MICRO == 0) save(m, t / MICRO, h);
                advance<RESETS>(m, at, h, decay, a, t);
            }
        }
#pragma unroll 1
        for (int group = GROUPS - 1; group >= 0; --group) {
            States before[MICRO], decay[MICRO];
            if (group < GROUPS - 1) restore(m, group, h);
#pragma unroll
            for (int i = 0; i < MICRO; ++i) {
#pragma unroll
                for (int k = 0; k < PER; ++k)
#pragma unroll
                    for (int j = 0; j < STATES; ++j) before[i][k][j] = h[k][j];
                advance<RESETS>(m, at, h, decay[i], a, group * MICRO + i);
            }
#pragma unroll
            for (int i = MICRO - 1; i >= 0; --i) {
                int t = group * MICRO + i;
                float bt[STATES], ct[STATES], in[2 * PER], g[PER];
                load_floats(bt, at.b + t * WIDTH);
                load_floats(ct, at.c + t * WIDTH);
                load_floats(in, at.inputs + t * Inputs<F>::TOKEN);
                load_floats(g, at.gradients + t * F::CHANNELS);
                float dx[PER] = {}, dstep[PER] = {}, y[PER] = {}, db[STATES], dc[STATES];
#pragma unroll
                for (int j = 0; j < STATES; ++j)
#pragma unroll
                    for (int k = 0; k < PER; ++k) {
                        float now = i == MICRO - 1 ? h[k][j] : before[i + 1 < MICRO ? i + 1 : i][k][j];
                        float dh = fmaf(ct[j], g[k], carry[k][j]);
                        dc[j] = k ? fmaf(g[k], now, dc[j]) : g[k] * now;
                        db[j] = k ? fmaf(dh, in[PER + k], db[j]) : dh * in[PER + k];
                        y[k] = fmaf(ct[j], now, y[k]);
                        dx[k] = fmaf(dh, bt[j], dx[k]);
                        carry[k][j] = dh * decay[i][k][j];
                        float q = carry[k][j] * before[i][k][j];
                        dstep[k] = fmaf(q, a[k][j], dstep[k]);
                        da[k][j] = fmaf(q, in[k], da[k][j]);
                    }
                if constexpr (SPLIT > 1) {
                    float *parts = own.parts + i * S::TOKEN + S::part_place(i, lane.part, owner);
                    store_floats(parts, y);
                    store_floats(parts + S::KIND, dx);
                    store_floats(parts + 2 * S::KIND, dstep);
                } else {
                    put(m, t, lane.own, y, dx, dstep);
                }
                float *shares = own.channels[i % BATCH];
#pragma unroll
                for (int q = 0; q < STATES / 4; ++q) {
                    *reinterpret_cast<float4 *>(shares + S::piece(lane.part, owner, q)) =
                        make_float4(db[4 * q], db[4 * q + 1], db[4 * q + 2], db[4 * q + 3]);
                    *reinterpret_cast<float4 *>(shares + S::piece(lane.part, owner, STATES / 4 + q)) =
                        make_float4(dc[4 * q], dc[4 * q + 1], dc[4 * q + 2], dc[4 * q + 3]);
                }
                if (i % BATCH == 0) {
                    __syncwarp();
                    sum_channels(m, warp, t);
                    // of the warp's channels nothing in the tile's slots of these tokens is needed any more
                    if (i == 0) sum_parts(m, warp, t);
                    __syncwarp();
                }
            }
        }
    }

    static __device__ void run(const Scan &p) {
        extern __shared__ __align__(16) char bytes[];
        Memory &m = *reinterpret_cast<Memory *>(bytes);
        constexpr int OWN = (F::CHANNELS + THREADS - 1) / THREADS;
        Place<F> at(p);
        Lane<F> lane(at);
        int n = p.states;
        int64_t row_states = int64_t(p.channels) * n, tiles = (p.length + TILE - 1) / TILE;
        int64_t chunk = int64_t(at.row) * at.chunks + at.chunk;
        States a, carry = {}, da = {}, h;
        lane.load(a, p.a, n, LOG2E);
        if (p.carried)
            lane.load(carry, p.carried + chunk * row_states, n, 1.0f);
        else if (p.initial)
            lane.load(carry, p.initial + at.row * row_states, n, 1.0f);
        for (int c = threadIdx.x; c < F::CHANNELS; c += THREADS) {
            m.bias[c] = p.bias && c < at.count ? p.bias[at.first + c] : 0.0f;
            m.skip[c] = p.d && c < at.count ? p.d[at.first + c] : 0.0f;
        }
        T own(at);
        Places places(m, lane);
        int start = at.begin + (at.end - at.begin - 1) / TILE * TILE, buffer = 0;
        CoefficientTile<E, F> b(p.b, at, n, p.aligned_coefficients, 0), c(p.c, at, n, p.aligned_coefficients, 1);
        // What is used up while a tile is prepared has one buffer: a thread asks for what it has just read itself.
        auto fetch = [&](int buffer, int start) {
            auto ask = [&](E *tile, const Sequence &s) {
                Walker<E, F>(s, at, own, start).fetch(tile, at, own, at.end - start, p.aligned);
            };
            ask(m.u[buffer], p.u);
            ask(m.delta, p.delta);
            if (p.z.data) ask(m.z[buffer], p.z);
            ask(m.dy[buffer], p.dy);
            b.fetch(m.raw_b, at, start);
            c.fetch(m.raw_c, at, start);
            commit_copies();
        };
        float dd[OWN] = {}, dbias[OWN] = {};
        fetch(0, start);
        for (; start >= at.begin; start -= TILE, buffer ^= 1) {
            lane.load(h, p.kept + (at.row * tiles + start / TILE) * row_states, n, 1.0f);
            load_marks(p, at, m.marks, start);
            wait_copies<0>();
            __syncthreads();
            b.widen_tile(m.b, m.raw_b, at, start);
            c.widen_tile(m.c, m.raw_c, at, start);
            prepare<E, F>(p, at, own, m.u[buffer], m.delta, m.z[buffer], m.dy[buffer], m.inputs, m.gradients, m.bias,
                          m.marks, start);
            if (start > at.begin) fetch(buffer ^ 1, start - TILE);
            __syncthreads();
            if (p.marks)
                walk<true>(m, lane, places, a, h, carry, da);
            else
                walk<false>(m, lane, places, a, h, carry, da);
            __syncthreads();
            finish(p, m, at, own, buffer, start);
            // the block's shares of dB and dC, over its warps in their order
            float *sums = p.sums + ((int64_t(blockIdx.x) * p.batch + at.row) * p.length + start) * 2 * n;
            for (int k = threadIdx.x % LANES; k < 2 * n; k += LANES) {
                int place = k < n ? k : WIDTH + k - n, first = threadIdx.x / LANES, left = at.end - start;
#pragma unroll
                for (int token = first; token < TILE + first; token += WARPS) {
                    float sum = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; ++w) sum += m.sums[w][token][place];
                    if (token < left) sums[token * 2 * n + k] = sum;
                }
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                int c = threadIdx.x + k * THREADS;
                if (c < at.count)
#pragma unroll
                    for (int t = 0; t < TILE; ++t) {
                        dbias[k] += m.dstep[t * F::CHANNELS + spot(c)];
                        dd[k] += m.gradients[t * F::CHANNELS + spot(c)];
                    }
            }
        }
        if (at.chunk == 0 && p.state) lane.store(p.state + at.row * row_states, carry, n);
        lane.store(p.da + chunk * row_states, da, n);
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            int c = threadIdx.x + k * THREADS;
            if (c < at.count) {
                p.dbias[chunk * p.channels + at.first + c] = dbias[k];
                p.dd[chunk * p.channels + at.first + c] = dd[k];
            }
        }
    }

    // The tile's gradients of the sequences; leaves those of bias and skip weight, by token, in dstep and gradients.
    static __device__ __forceinline__ void finish(const Scan &p, Memory &m, const Place<F> &at, const T &own, int buffer,
                                                  int start) {
        constexpr int W = T::WIDTH;
        Walker<E, F> to_u(p.du, at, own, start), to_delta(p.ddelta, at, own, start), to_z(p.dz, at, own, start);
        float skip[W];
        load_floats(skip, m.skip + own.channel);
#pragma unroll
        for (int v = 0; v < T::OWN; ++v) {
            if (!own.has(v)) break;
            int token = own.token + v * T::ROWS;
            float *steps = m.dstep + token * F::CHANNELS, *gradients = m.gradients + token * F::CHANNELS;
            bool inside = own.live && start + token < at.end;
            bool live = inside && !(p.marks && m.marks[token] == PAD);
            typename T::Elements out, du;
            float dstep[W] = {}, dd[W] = {};
            if (!live) {
#pragma unroll
                for (int k = 0; k < W; ++k) out.at[k] = narrow<E>(0.0f);
                store_floats(steps + spot(own.channel), dstep);
                store_floats(gradients + spot(own.channel), dd);
                if (inside) {
                    to_u.store(at, own, v, out, p.aligned);
                    to_delta.store(at, own, v, out, p.aligned);
                    if (p.z.data) to_z.store(at, own, v, out, p.aligned);
                }
                continue;
            }
            auto uv = T::get(m.u[buffer], v), gv = T::get(m.dy[buffer], v);
            float g[W], mixed[2 * W];
            load_floats(mixed, m.inputs + token * Inputs<F>::TOKEN + spot(2 * own.channel));
#pragma unroll
            for (int k = 0; k < W; ++k) g[k] = widen(gv.at[k]);
            if (p.z.data) {
                auto zv = T::get(m.z[buffer], v);
                float y[W];
                load_floats(y, gradients + spot(own.channel));
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    float z = widen(zv.at[k]), s = sigmoid(z);
                    out.at[k] = narrow<E>(g[k] * fmaf(skip[k], widen(uv.at[k]), y[k]) * silu_slope(z, s));
                    g[k] *= z * s;
                }
                to_z.store(at, own, v, out, p.aligned);
            }
            load_floats(dstep, steps + spot(own.channel));
#pragma unroll
            for (int k = 0; k < W; ++k) {
                int place = Inputs<F>::mixed(k);
                float u = widen(uv.at[k]), step = mixed[place], dx = mixed[place + PER];
                dstep[k] = fmaf(u, dx, LN2 * dstep[k]);
                if (p.softplus) dstep[k] *= softplus_slope<E>(step);
                out.at[k] = narrow<E>(dstep[k]);
                du.at[k] = narrow<E>(fmaf(skip[k], g[k], step * dx));
                dd[k] = g[k] * u;
            }
            store_floats(steps + spot(own.channel), dstep);
            store_floats(gradients + spot(own.channel), dd);
            to_delta.store(at, own, v, out, p.aligned);
            to_u.store(at, own, v, du, p.aligned);
        }
    }
};

template <typename E, typename F> __device__ void backward(const Scan &p) { Backward<E, F>::run(p); }

#define BACKWARD(E, BLOCKS)                                                                                             \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 1)                                       \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 2)                                       \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 4)                                       \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 8)                                       \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 16)                                      \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 32)                                      \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, 2, E, 1, 8, 32)
BACKWARD(float, 2)
BACKWARD(bf16, 3)
BACKWARD(f16, 3)
