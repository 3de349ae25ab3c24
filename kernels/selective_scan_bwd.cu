// The selective scan, backward: all gradients from the states before every KEPT tokens, which forward kept.
//
// Grid and lanes as forward. Tiles go from the last to the first. Within one, a first walk leaves the state before every
// group of 4 tokens in shared memory; then, group by group from the last, states and decays of 4 tokens are computed
// again into registers, and the gradient of the state is carried back through them:
//     dh_t = C_t g_t + carry      carry = 2^(a delta_t) dh_t
//     dC += g_t h_t    dB += delta_t u_t dh_t    du, ddelta, dA from dh_t, carry and h_(t-1)
// Shares of dB and dC are added up over a warp's channels and those of du and ddelta over the parts of a state by shuffles,
// then dB and dC over the warps through shared memory, and in selective_scan_coefficients over blocks: always in one order, no
// atomics. A lane has its numbers of B, C and the state in the order in which the first two shuffles give them away.
// What dz needs of y forward has kept, of the sequences' type: what that loses is what dz loses by its own rounding.
//
// With N = 16: two channels by four numbers in a lane, 64 channels in a block; 72 KB of shared memory (f32: 86), 168
// registers (251), no spills: 3 blocks (2) a multiprocessor, before Hopper 2.
// Bytes: u, delta, z, dy, y, B, C and 4 N bytes a channel and 16 tokens of states read; du, ddelta, dz and 8 N bytes a
// token and block for dB and dC written.
// One H200, N 16, bf16, kernel alone: short 0.433 ms; before the gradients of bias and skip weight were summed up in shared
// memory (short 0.444) 130m 0.540, 1.4b in three chunks 1.41, 2.8b-8k in nine 1.72. Around it: a first walk that chains the
// chunks (130m 0.081, 2.8b-8k 0.36 to 0.42: selective_scan_carry.cu) and a few sums (0.03). All of it and what forward keeps,
// beside mamba_ssm's kernel in one run: 130m 0.662 (1.76), 1.4b 1.65 (4.59), 2.8b-8k 2.28 (5.90), 2.8b-64k 8.59 (24.0), 130m-256k
// 9.55 (31.1), short 0.483 (2.32).
// ncu (130m): 28 instructions a number of the state, 19 of them in the walk back, which has half of the time; IPC 2.7 with 12
// warps a multiprocessor, shared memory half busy: issue slots and latencies bind. What a lane keeps over a tile beside the
// state is in shared memory: a spilled register costs a trip to L2, since shared memory leaves no L1.
// Tried and slower: the sums over lanes through shared memory (2 to 3%, 68% of it busy), or over channels by the tensor
// cores (numbers in two parts: 39 instructions); numbers in the order they come, with selections in every shuffle (up to 2%); the
// next group's inputs asked for ahead, in one walk or both (8 to 15%: they are then read twice); eight numbers in a lane spill.
#include "common/scan_back.cuh"

template <typename E, typename F> struct Backward {
    using T = Tile<E, F>;
    using Memory = BackwardMemory<E, F>;
    using States = typename F::States;
    static constexpr int PER = F::PER, STATES = F::STATES, SPLIT = F::SPLIT, WIDTH = F::WIDTH, TILE = F::TILE;
    static constexpr int GROUPS = TILE / MICRO;
    static_assert(TILE == KEPT);
    // Numbers of dB and dC, and of dx and dstep, that a lane has of a token when all are summed up.
    static constexpr int SUMS = at_least_one(2 * STATES / F::OWNERS), RESULTS = at_least_one(2 * PER / SPLIT);

    // A lane's places in the tile's first token.
    struct Places {
        const float *inputs, *gradients, *b, *c;
        float *sums, *results;
        int row, apart; // from token to token of `results`, and from dx to dstep where a lane has both
        __device__ Places(Memory &m, const Lane<F> &lane)
            : inputs(m.inputs + Inputs<F>::place(lane.own)), gradients(m.gradients + spot(lane.own * PER)) {
            b = m.coefficients + threadIdx.x % Memory::COPIES * Memory::COPY + lane.part * STATES;
            c = b + TILE * WIDTH;
            // shares of dB and dC are given out in pairs, one of each
            int sum = share<2 * STATES, 1, F::OWNERS>(threadIdx.x), result = share<2 * PER, F::OWNERS, LANES>(threadIdx.x);
            sums = m.sums[threadIdx.x / LANES][0] + sum % 2 * WIDTH + lane.part * STATES + sum / 2;
            float *dx = m.inputs + Inputs<F>::place(lane.own) + PER, *dstep = m.gradients + spot(lane.own * PER);
            results = result < PER ? dx + result : dstep + result - PER;
            row = result < PER ? Inputs<F>::TOKEN : Memory::ROW;
            apart = dstep - dx;
        }
    };

    // From the order of a state's numbers to that of the lane, and back.
    static __device__ __forceinline__ void turn(States &x) {
#pragma unroll
        for (int bit = 1; bit < Memory::COPIES; bit *= 2) {
            bool swap = threadIdx.x & bit;
#pragma unroll
            for (int k = 0; k < PER; ++k)
#pragma unroll
                for (int j = 0; j < STATES; ++j)
                    if (j < (j ^ turned(bit))) {
                        float &low = x[k][j], &high = x[k][j ^ turned(bit)], other = low;
                        low = swap ? high : low, high = swap ? other : high;
                    }
        }
    }

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

    // Back through one tile: carry, da and the tile's slots take the results.
    template <bool RESETS>
    static __device__ __forceinline__ void walk(Memory &m, const Lane<F> &lane, const Places &at, const States &a,
                                                States &h, States &carry, States &da, const uint8_t *marks) {
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
            float sums[MICRO][SUMS], results[MICRO][RESULTS];
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
                float shares[2 * STATES], dx_dstep[2 * PER] = {};
#pragma unroll
                for (int j = 0; j < STATES; ++j)
#pragma unroll
                    for (int k = 0; k < PER; ++k) {
                        float &db = shares[2 * j], &dc = shares[2 * j + 1], &dx = dx_dstep[k], &dstep = dx_dstep[PER + k];
                        float now = i == MICRO - 1 ? h[k][j] : before[i + 1 < MICRO ? i + 1 : i][k][j];
                        float dh = fmaf(ct[j], g[k], carry[k][j]);
                        dc = k ? fmaf(g[k], now, dc) : g[k] * now;
                        db = k ? fmaf(dh, in[PER + k], db) : dh * in[PER + k];
                        dx = fmaf(dh, bt[j], dx);
                        carry[k][j] = dh * decay[i][k][j];
                        float q = carry[k][j] * before[i][k][j];
                        dstep = fmaf(q, a[k][j], dstep);
                        da[k][j] = fmaf(q, in[k], da[k][j]);
                    }
                share_out<2 * STATES, 1, F::OWNERS, Memory::COPIES>(sums[i], shares);
                share_out<2 * PER, F::OWNERS, LANES>(results[i], dx_dstep);
            }
            __syncwarp();
            // of the warp's channels nothing in the slots of these tokens is needed any more
#pragma unroll
            for (int i = 0; i < MICRO; ++i) {
                int t = group * MICRO + i;
                if (threadIdx.x % F::OWNERS < 2 * STATES)
#pragma unroll
                    for (int r = 0; r < SUMS; ++r) at.sums[t * 2 * WIDTH + r % 2 * WIDTH + r / 2] = sums[i][r];
                if (lane.part < 2 * PER)
#pragma unroll
                    for (int r = 0; r < RESULTS; ++r)
                        at.results[(r < PER ? t * at.row : t * Memory::ROW + at.apart) + r % PER] = results[i][r];
            }
        }
    }

    // The block's shares of dB and dC of `left` tokens, over its warps in their order.
    template <bool WHOLE> static __device__ __forceinline__ void sum_warps(const Memory &m, float *to, int n, int left) {
        if (WHOLE) {
#pragma unroll
            for (int i = threadIdx.x; i < TILE * WIDTH / 2; i += THREADS) {
                float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    float4 x = reinterpret_cast<const float4 *>(m.sums[w])[i];
                    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
                }
                reinterpret_cast<float4 *>(to)[i] = sum;
            }
            return;
        }
        int first = threadIdx.x / LANES;
#pragma unroll
        for (int k = threadIdx.x % LANES; k < 2 * n; k += LANES) {
            int place = k < n ? k : WIDTH + k - n;
#pragma unroll
            for (int token = first; token < TILE + first; token += WARPS) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += m.sums[w][token][place];
                if (token < left) to[token * 2 * n + k] = sum;
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
            lane.load(carry, p.carried + at.slot(p) * row_states, n, 1.0f);
        else if (p.initial)
            lane.load(carry, p.initial + at.row * row_states, n, 1.0f);
        turn(a), turn(carry);
        for (int i = 0; i < T::WIDTH / 4; ++i)
            m.shares[0][i][threadIdx.x] = m.shares[1][i][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int c = threadIdx.x; c < F::CHANNELS; c += THREADS) {
            m.bias[c] = p.bias && c < at.count ? p.bias[at.first + c] : 0.0f;
            m.skip[c] = p.d && c < at.count ? p.d[at.first + c] : 0.0f;
        }
        T own(at);
        Places places(m, lane);
        int start = at.begin + (at.end - at.begin - 1) / TILE * TILE, buffer = 0, mark = 0;
        // the thread's packs of the row's first tokens, where they take no registers
        const Sequence *sequences[] = {&p.u, &p.delta, &p.z, &p.dy};
#pragma unroll
        for (int i = 0; i < 4; ++i) m.places[i][threadIdx.x] = Walker<E, F>(*sequences[i], at, own, 0).place;
        Coefficients<E, F, 2> coefficients(p.b, p.c, at, start, n, p.aligned_coefficients);
        // whether tiles are whole, but for their tokens
        bool whole = SPLIT == 4 && T::PACKS >= THREADS && p.aligned && at.count == F::CHANNELS && coefficients.whole &&
                     p.softplus && p.z.data && !p.marks;
        // What is used up while a tile is prepared has one buffer: a thread asks for what it has just read itself.
        auto fetch = [&](int buffer, uint8_t *marks, int start) {
            int left = at.end - start;
            auto walker = [&](int i) { return Walker<E, F>(m.places[i][threadIdx.x], *sequences[i], start); };
            auto u = walker(0), delta = walker(1), z = walker(2), dy = walker(3);
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
            coefficients.move(-1);
        };
        const float *kept = p.kept + (at.row * tiles + start / TILE) * row_states;
        fetch(0, m.marks[0], start);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        for (; start >= at.begin; start -= TILE, buffer ^= 1) {
            const uint8_t *marks = m.marks[mark];
            mark = mark < 2 ? mark + 1 : 0;
            bool all = whole && start + TILE <= at.end;
            lane.load(h, kept, n, 1.0f), kept -= row_states;
            if (all) {
                coefficients.template widen_tile<true, Memory::COPIES, Memory::COPY>(m.coefficients, m.raw, p.b, p.c, at, start);
                prepare<BOTH, true, E, F>(p, at, own, m.u[buffer], m.delta, m.z[buffer], m.dy[buffer], m.inputs, m.gradients,
                                    m.bias, marks, start);
            } else {
                coefficients.template widen_tile<false, Memory::COPIES, Memory::COPY>(m.coefficients, m.raw, p.b, p.c, at, start);
                prepare<BOTH, false, E, F>(p, at, own, m.u[buffer], m.delta, m.z[buffer], m.dy[buffer], m.inputs, m.gradients,
                                     m.bias, marks, start);
            }
            // y is not needed before the tile is finished
            if (Memory::ROOM && p.z.data)
                Walker<E, F>(p.ungated, p.du, at, own, start).fetch(m.y, at, own, at.end - start, p.aligned);
            if (start > at.begin) fetch(buffer ^ 1, m.marks[mark], start - TILE);
            commit_copies();
            __syncthreads();
            turn(h);
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
        }
        turn(carry), turn(da);
        if (at.chunk == 0 && p.state) lane.store(p.state + at.row * row_states, carry, n);
        lane.store(p.da + chunk * row_states, da, n);
        __syncthreads();
        for (int i = threadIdx.x; i < 2 * F::CHANNELS; i += THREADS) {
            int c = i % F::CHANNELS, k = c % T::WIDTH;
            const auto &shares = m.shares[i / F::CHANNELS][k / 4];
            float sum = 0.0f;
            for (int row = 0; row < T::ROWS; ++row)
                sum += reinterpret_cast<const float *>(shares + row * T::COLUMNS + c / T::WIDTH)[k % 4];
            if (c < at.count) (i < F::CHANNELS ? p.dbias : p.dd)[chunk * p.channels + at.first + c] = sum;
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
