// The selective scan, backward: all gradients from the states before every KEPT tokens, which forward kept.
//
// Grid and lanes as forward. Tiles go from the last to the first. Within one, a first walk leaves the state before every
// group of 4 tokens in shared memory; then, group by group from the last, states and decays of 4 tokens are computed
// again into registers, and the gradient of the state is carried back through them:
//     dh_t = C_t g_t + carry      carry = 2^(a delta_t) dh_t
//     dC += g_t h_t    dB += delta_t u_t dh_t    du, ddelta, dA from dh_t, carry and h_(t-1)
// Shares of dB and dC are added up over a warp's channels and those of du and ddelta over the parts of a state through
// shared memory, then over the warps, and in selective_scan_coefficients over blocks: always in one order, no atomics.
// What dz needs of y forward has kept, of the sequences' type: what that loses is what dz loses by its own rounding.
//
// With N = 16: two channels by four numbers in a lane, 64 channels in a block; 74 KB of shared memory (f32: 91), 168
// registers (222), no spills: 3 blocks (2) a multiprocessor, before Hopper 2.
// Bytes: u, delta, z, dy, y, B, C and 4 N bytes a channel and 16 tokens of states read; du, ddelta, dz and 8 N bytes a
// token and block for dB and dC written.
// One H100, N 16, bf16, with everything around it: 130m 0.72 ms, 1.4b 1.70, 2.8b-8k 2.38, 2.8b-64k 9.4, 130m-256k 10.0,
// short 0.50. ncu (1.4b): 28 instructions a number of the state, 17 of them in the walk back; IPC 2.3, FMA 33% busy,
// special functions 34%, shared memory 62%, DRAM 21%: latency of shared memory binds, with 12 warps a multiprocessor. Sums
// over channels by the tensor cores (numbers in two parts) took 39 instructions and were slower; eight numbers in a lane
// spill. Faster still: sums of one batch of tokens while the next is computed, for which there is no shared memory left.
#include "common/scan_back.cuh"

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
    static __device__ __forceinline__ void advance(const uint8_t *marks, const Places &at, States &h, States &decay,
                                                   const States &a, int t) {
        float bt[STATES], in[2 * PER];
        load_floats(bt, at.b + t * WIDTH);
        load_floats(in, at.inputs + t * Inputs<F>::TOKEN);
        bool reset = RESETS && marks[t] == START;
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

    // Puts dx and dstep of a token and owner to their places.
    static __device__ __forceinline__ void put(Memory &m, int token, int owner, const float (&dx)[PER],
                                               const float (&dstep)[PER]) {
        store_floats(m.inputs + token * Inputs<F>::TOKEN + Inputs<F>::place(owner) + PER, dx);
        store_floats(m.dstep + token * Memory::ROW + spot(owner * PER), dstep);
    }

    // Sums dx and dstep of MICRO tokens over the parts.
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
                put(m, token + t, warp * S::OWNERS + owner, sums[0], sums[1]);
            }
        }
    }

    // Back through one tile: carry, da and the tile's slots take the results.
    template <bool RESETS>
    static __device__ __forceinline__ void walk(Memory &m, const Lane<F> &lane, const Places &at, const States &a,
                                                States &h, States &carry, States &da, const uint8_t *marks) {
        using S = Sums<F>;
        int warp = threadIdx.x / LANES, owner = threadIdx.x % F::OWNERS;
        auto &own = m.own[warp];
        {
            States decay;
#pragma unroll MICRO
            for (int t = 0; t < TILE - MICRO; ++t) {
                if (t % MICRO == 0) save(m, t / MICRO, h);
                advance<RESETS>(marks, at, h, decay, a, t);
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
                advance<RESETS>(marks, at, h, decay[i], a, group * MICRO + i);
            }
#pragma unroll
            for (int i = MICRO - 1; i >= 0; --i) {
                int t = group * MICRO + i;
                float bt[STATES], ct[STATES], in[2 * PER], g[PER];
                load_floats(bt, at.b + t * WIDTH);
                load_floats(ct, at.c + t * WIDTH);
                load_floats(in, at.inputs + t * Inputs<F>::TOKEN);
                load_floats(g, at.gradients + t * Memory::ROW);
                float dx[PER] = {}, dstep[PER] = {}, db[STATES], dc[STATES];
#pragma unroll
                for (int j = 0; j < STATES; ++j)
#pragma unroll
                    for (int k = 0; k < PER; ++k) {
                        float now = i == MICRO - 1 ? h[k][j] : before[i + 1 < MICRO ? i + 1 : i][k][j];
                        float dh = fmaf(ct[j], g[k], carry[k][j]);
                        dc[j] = k ? fmaf(g[k], now, dc[j]) : g[k] * now;
                        db[j] = k ? fmaf(dh, in[PER + k], db[j]) : dh * in[PER + k];
                        dx[k] = fmaf(dh, bt[j], dx[k]);
                        carry[k][j] = dh * decay[i][k][j];
                        float q = carry[k][j] * before[i][k][j];
                        dstep[k] = fmaf(q, a[k][j], dstep[k]);
                        da[k][j] = fmaf(q, in[k], da[k][j]);
                    }
                if constexpr (SPLIT > 1) {
                    float *parts = own.parts + i * S::TOKEN + S::part_place(i, lane.part, owner);
                    store_floats(parts, dx);
                    store_floats(parts + S::KIND, dstep);
                } else {
                    put(m, t, lane.own, dx, dstep);
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

    // The block's shares of dB and dC of `left` tokens, over its warps in their order.
    template <bool WHOLE> static __device__ __forceinline__ void sum_warps(const Memory &m, float *to, int n, int left) {
        int width = WHOLE ? WIDTH : n, first = threadIdx.x / LANES;
#pragma unroll
        for (int k = threadIdx.x % LANES; k < 2 * width; k += LANES) {
            int place = k < width ? k : WIDTH + k - width;
#pragma unroll
            for (int token = first; token < TILE + first; token += WARPS) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += m.sums[w][token][place];
                if (WHOLE || token < left) to[token * 2 * width + k] = sum;
            }
        }
    }

    static __device__ void run(const Scan &p) {
        extern __shared__ __align__(16) char bytes[];
        Memory &m = *reinterpret_cast<Memory *>(bytes);
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
        for (int i = threadIdx.x; i < 2 * F::CHANNELS; i += THREADS) m.totals[i] = 0.0f;
        for (int c = threadIdx.x; c < F::CHANNELS; c += THREADS) {
            m.bias[c] = p.bias && c < at.count ? p.bias[at.first + c] : 0.0f;
            m.skip[c] = p.d && c < at.count ? p.d[at.first + c] : 0.0f;
        }
        T own(at);
        Places places(m, lane);
        int start = at.begin + (at.end - at.begin - 1) / TILE * TILE, buffer = 0, turn = 0;
        Walker<E, F> u(p.u, at, own, start), delta(p.delta, at, own, start);
        Walker<E, F> z(p.z, at, own, start), dy(p.dy, at, own, start);
        Coefficients<E, F, 2> coefficients(p.b, p.c, at, start, n, p.aligned_coefficients);
        // whether tiles are whole, but for their tokens
        bool whole = SPLIT == 4 && T::PACKS >= THREADS && p.aligned && at.count == F::CHANNELS && coefficients.whole &&
                     p.softplus && p.z.data && !p.marks;
        // What is used up while a tile is prepared has one buffer: a thread asks for what it has just read itself.
        auto fetch = [&](int buffer, uint8_t *marks, int start) {
            int left = at.end - start;
            if (whole && left >= TILE) {
                u.fetch(m.u[buffer]), delta.fetch(m.delta), dy.fetch(m.dy[buffer]);
                coefficients.template fetch<true>(m.raw, left);
                z.fetch(m.z[buffer]);
            } else {
                u.fetch(m.u[buffer], at, own, left, p.aligned);
                delta.fetch(m.delta, at, own, left, p.aligned);
                dy.fetch(m.dy[buffer], at, own, left, p.aligned);
                if (p.z.data) z.fetch(m.z[buffer], at, own, left, p.aligned);
                coefficients.template fetch<false>(m.raw, left);
                load_marks(p, at, marks, start);
            }
            u.move(p.u, -1), delta.move(p.delta, -1), z.move(p.z, -1), dy.move(p.dy, -1), coefficients.move(-1);
        };
        const float *kept = p.kept + (at.row * tiles + start / TILE) * row_states;
        fetch(0, m.marks[0], start);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        for (; start >= at.begin; start -= TILE, buffer ^= 1) {
            const uint8_t *marks = m.marks[turn];
            turn = turn < 2 ? turn + 1 : 0;
            bool all = whole && start + TILE <= at.end;
            lane.load(h, kept, n, 1.0f), kept -= row_states;
            if (all) {
                coefficients.template widen_tile<true>(m.b, m.raw, p.b, p.c, at, start);
                prepare<BOTH, true, E, F>(p, at, own, m.u[buffer], m.delta, m.z[buffer], m.dy[buffer], m.inputs, m.gradients,
                                    m.bias, marks, start);
            } else {
                coefficients.template widen_tile<false>(m.b, m.raw, p.b, p.c, at, start);
                prepare<BOTH, false, E, F>(p, at, own, m.u[buffer], m.delta, m.z[buffer], m.dy[buffer], m.inputs, m.gradients,
                                     m.bias, marks, start);
            }
            // y is not needed before the tile is finished
            if (Memory::ROOM && p.z.data)
                Walker<E, F>(p.ungated, p.du, at, own, start).fetch(m.y, at, own, at.end - start, p.aligned);
            if (start > at.begin) fetch(buffer ^ 1, m.marks[turn], start - TILE);
            commit_copies();
            __syncthreads();
            if (p.marks)
                walk<true>(m, lane, places, a, h, carry, da, marks);
            else
                walk<false>(m, lane, places, a, h, carry, da, marks);
            wait_copies<0>();
            __syncthreads();
            if (all)
                finish<true, E, F>(p, m, at, own, buffer, marks, start);
            else
                finish<false, E, F>(p, m, at, own, buffer, marks, start);
            float *sums = p.sums + ((int64_t(blockIdx.x) * p.batch + at.row) * p.length + start) * 2 * n;
            if (all)
                sum_warps<true>(m, sums, n, TILE);
            else
                sum_warps<false>(m, sums, n, at.end - start);
            __syncthreads();
            for (int i = threadIdx.x; i < 2 * F::CHANNELS; i += THREADS) {
                const float *shares = (i < F::CHANNELS ? m.dstep : m.dd()) + spot(i % F::CHANNELS);
                float sum = m.totals[i];
#pragma unroll 4
                for (int t = 0; t < TILE; ++t) sum += shares[t * Memory::ROW];
                m.totals[i] = sum;
            }
            if (!Memory::ROOM) __syncthreads();
        }
        if (at.chunk == 0 && p.state) lane.store(p.state + at.row * row_states, carry, n);
        lane.store(p.da + chunk * row_states, da, n);
        // every thread gives what it has summed up itself
        for (int i = threadIdx.x; i < 2 * F::CHANNELS; i += THREADS) {
            int c = i % F::CHANNELS;
            if (c < at.count) (i < F::CHANNELS ? p.dbias : p.dd)[chunk * p.channels + at.first + c] = m.totals[i];
        }
    }
};

template <typename E, typename F> __device__ void backward(const Scan &p) { Backward<E, F>::run(p); }

#define BACKWARD(E, BLOCKS)                                                                                            \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 1)                                      \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 2)                                      \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 4)                                      \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 8)                                      \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 16)                                     \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, BLOCKS, E, 2, 4, 32)                                     \
    SCAN_KERNEL(selective_scan_bwd, backward, BackwardMemory, 2, E, 1, 8, 32)
// Shared memory holds three blocks from Hopper on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SHORT_BLOCKS 2
#else
#define SHORT_BLOCKS 3
#endif
BACKWARD(float, 2)
BACKWARD(bf16, SHORT_BLOCKS)
BACKWARD(f16, SHORT_BLOCKS)
