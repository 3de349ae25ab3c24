// The selective scan, backward: all gradients from the states before every tile, which forward kept.
//
// Grid and lanes as forward. Tiles go from the last to the first. Within one, a first walk leaves the state before every
// group of 4 tokens in shared memory; then, group by group from the last, states and decays of 4 tokens are computed
// again into registers, and the gradient of the state is carried back through them:
//     dh_t = C_t g_t + carry      carry = 2^(a delta_t) dh_t
//     dC += g_t h_t    dB += delta_t u_t dh_t    du, ddelta, dA from dh_t, carry and h_(t-1)
// Two exponentials and some 24 instructions a number of the state. Shares of dB and dC are added up over a warp's channels
// through shared memory, over the warps, and in selective_scan_coefficients over blocks: always in one order, no atomics.
//
// Shared memory 112 KB; 255 registers, no spills: 2 blocks a multiprocessor.
// Bytes: u, delta, z, dy, B, C and 4 N bytes a channel and tile of states read; du, ddelta, dz and 8 N bytes a token and
// block for dB and dC written. Floor on an H100: 2.2 clocks a channel and token of issue slots, 0.17 ms at the shape below.
// Measured at B 64, D 1536, L 200, N 16, bf16: 0.57 ms; ncu: IPC 2.1, FMA 32% busy, DRAM 20%.
// Faster still: more warps at once (registers bind), and dB and dC summed over a cluster of blocks.
#include "common/scan_prepare.cuh"

constexpr int BLOCKS_PER_MULTIPROCESSOR = 2;

constexpr int WARPS = THREADS / LANES;
// Tokens whose states and decays are in registers at once.
constexpr int MICRO = 4;
constexpr int GROUPS = TILE / MICRO;
// Tokens whose shares of dB and dC are summed over the warp at once.
constexpr int BATCH = 2;

template <typename E, int SPLIT> struct BackwardMemory {
    using T = Tile<E, SPLIT>;
    static constexpr int BUFFERS = sizeof(E) == 2 ? 2 : 1;
    E u[BUFFERS][T::SIZE], delta[BUFFERS][T::SIZE], z[BUFFERS][T::SIZE], dy[BUFFERS][T::SIZE];
    float step[T::SIZE], input[T::SIZE], slope[T::SIZE];
    E raw_b[BUFFERS][CoefficientTile<E, SPLIT>::RAW], raw_c[BUFFERS][CoefficientTile<E, SPLIT>::RAW];
    float b[TILE * STATES * SPLIT], c[TILE * STATES * SPLIT];
    float4 saved[GROUPS - 1][PAIR * STATES / 4][THREADS];
    float shares[WARPS][BATCH][LANES * 2 * STATES];
    float sums[WARPS][TILE][2 * STATES * SPLIT];
    float bias[T::CHANNELS], skip[T::CHANNELS];
    uint8_t marks[TILE];
};

template <typename E, int SPLIT> struct Backward {
    using T = Tile<E, SPLIT>;
    using Memory = BackwardMemory<E, SPLIT>;
    static constexpr int WIDTH = STATES * SPLIT;
    using States = float[PAIR][STATES];

    // Moves h over token t; gives the decays, zero where a sequence begins.
    template <bool RESETS>
    static __device__ __forceinline__ void advance(const Memory &m, const Lane<SPLIT> &lane, States &h, States &decay,
                                                   const States &a, int t) {
        float bt[STATES];
        load_states(bt, m.b + t * WIDTH + lane.part * STATES);
        float2 delta = reinterpret_cast<const float2 *>(m.step + t * T::CHANNELS)[lane.pair];
        float2 x = reinterpret_cast<const float2 *>(m.input + t * T::CHANNELS)[lane.pair];
        bool reset = RESETS && m.marks[t] == START;
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            decay[0][i] = reset ? 0.0f : exp2_fast(delta.x * a[0][i]);
            decay[1][i] = reset ? 0.0f : exp2_fast(delta.y * a[1][i]);
            h[0][i] = fmaf(decay[0][i], h[0][i], x.x * bt[i]);
            h[1][i] = fmaf(decay[1][i], h[1][i], x.y * bt[i]);
        }
    }
    static __device__ __forceinline__ void save(Memory &m, int group, const States &h) {
#pragma unroll
        for (int q = 0; q < PAIR * STATES / 4; ++q) {
            const float *x = &h[0][0] + 4 * q;
            m.saved[group][q][threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
        }
    }
    static __device__ __forceinline__ void restore(const Memory &m, int group, States &h) {
#pragma unroll
        for (int q = 0; q < PAIR * STATES / 4; ++q) {
            float4 v = m.saved[group][q][threadIdx.x];
            float *x = &h[0][0] + 4 * q;
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        }
    }

    // Sums the lanes' shares of BATCH tokens, in the order of the lanes.
    static __device__ __forceinline__ void sum_lanes(Memory &m, int warp, int token) {
        constexpr int TASKS = BATCH * SPLIT * STATES;
        __syncwarp();
#pragma unroll
        for (int first = 0; first < TASKS; first += LANES) {
            int task = first + threadIdx.x % LANES;
            if (TASKS % LANES && task >= TASKS) break;
            int t = task / (SPLIT * STATES), part = task / STATES % SPLIT, half = task % STATES;
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int g = 0; g < LANES / SPLIT; ++g) {
                int lane = g * SPLIT + part, q = (half / 2) ^ (lane / 2 & 3);
                float2 v = reinterpret_cast<const float2 *>(m.shares[warp][t])[lane * STATES + q * 2 + half % 2];
                sum.x += v.x, sum.y += v.y;
            }
            // the first half of a lane's shares is dB's
            int kind = half / (STATES / 2), state = part * STATES + half % (STATES / 2) * 2;
            *reinterpret_cast<float2 *>(&m.sums[warp][token + t][kind * WIDTH + state]) = sum;
        }
        __syncwarp();
    }

    // Back through one tile: carry, da and the tile's slots of step, input and slope take the results.
    template <bool RESETS>
    static __device__ __forceinline__ void walk(Memory &m, const Lane<SPLIT> &lane, const States &a, States &h,
                                                States &carry, States &da) {
        int warp = threadIdx.x / LANES, own = threadIdx.x % LANES;
        {
            States decay;
#pragma unroll MICRO
            for (int t = 0; t < TILE - MICRO; ++t) {
                if (t % MICRO == 0) save(m, t / MICRO, h);
                advance<RESETS>(m, lane, h, decay, a, t);
            }
        }
#pragma unroll 1
        for (int group = GROUPS - 1; group >= 0; --group) {
            States before[MICRO], decay[MICRO];
            if (group < GROUPS - 1) restore(m, group, h);
#pragma unroll
            for (int i = 0; i < MICRO; ++i) {
#pragma unroll
                for (int k = 0; k < PAIR; ++k)
#pragma unroll
                    for (int j = 0; j < STATES; ++j) before[i][k][j] = h[k][j];
                advance<RESETS>(m, lane, h, decay[i], a, group * MICRO + i);
            }
#pragma unroll
            for (int i = MICRO - 1; i >= 0; --i) {
                int t = group * MICRO + i;
                float bt[STATES], ct[STATES], db[STATES], dc[STATES];
                load_states(bt, m.b + t * WIDTH + lane.part * STATES);
                load_states(ct, m.c + t * WIDTH + lane.part * STATES);
                float2 delta = reinterpret_cast<const float2 *>(m.step + t * T::CHANNELS)[lane.pair];
                float2 x = reinterpret_cast<const float2 *>(m.input + t * T::CHANNELS)[lane.pair];
                float2 g = reinterpret_cast<const float2 *>(m.slope + t * T::CHANNELS)[lane.pair];
                float dx[PAIR] = {}, dstep[PAIR] = {}, y[PAIR] = {};
#pragma unroll
                for (int j = 0; j < STATES; ++j) {
                    float h0 = i == MICRO - 1 ? h[0][j] : before[i + 1 < MICRO ? i + 1 : i][0][j];
                    float h1 = i == MICRO - 1 ? h[1][j] : before[i + 1 < MICRO ? i + 1 : i][1][j];
                    float dh0 = fmaf(ct[j], g.x, carry[0][j]), dh1 = fmaf(ct[j], g.y, carry[1][j]);
                    dc[j] = fmaf(g.y, h1, g.x * h0);
                    db[j] = fmaf(dh1, x.y, dh0 * x.x);
                    y[0] = fmaf(ct[j], h0, y[0]), y[1] = fmaf(ct[j], h1, y[1]);
                    dx[0] = fmaf(dh0, bt[j], dx[0]), dx[1] = fmaf(dh1, bt[j], dx[1]);
                    carry[0][j] = dh0 * decay[i][0][j], carry[1][j] = dh1 * decay[i][1][j];
                    float q0 = carry[0][j] * before[i][0][j], q1 = carry[1][j] * before[i][1][j];
                    dstep[0] = fmaf(q0, a[0][j], dstep[0]), dstep[1] = fmaf(q1, a[1][j], dstep[1]);
                    da[0][j] = fmaf(q0, delta.x, da[0][j]), da[1][j] = fmaf(q1, delta.y, da[1][j]);
                }
                sum_parts<SPLIT>(dx, lane.part);
                sum_parts<SPLIT>(dstep, lane.part);
                sum_parts<SPLIT>(y, lane.part);
                // every lane of the warp has read the slots by now, and only this warp uses these channels
                int place = t * T::CHANNELS + lane.pair * PAIR;
                put_parts<SPLIT>(m.input + place, dx, lane.part);
                put_parts<SPLIT>(m.step + place, dstep, lane.part);
                put_parts<SPLIT>(m.slope + place, y, lane.part);
                float4 *shares = reinterpret_cast<float4 *>(m.shares[warp][i % BATCH]) + own * (STATES / 2);
                int swizzle = own / 2 & 3;
                shares[0 ^ swizzle] = make_float4(db[0], db[1], db[2], db[3]);
                shares[1 ^ swizzle] = make_float4(db[4], db[5], db[6], db[7]);
                shares[2 ^ swizzle] = make_float4(dc[0], dc[1], dc[2], dc[3]);
                shares[3 ^ swizzle] = make_float4(dc[4], dc[5], dc[6], dc[7]);
                if (i % BATCH == 0) sum_lanes(m, warp, t);
            }
        }
    }

    static __device__ void run(const Scan &p) {
        extern __shared__ __align__(16) char bytes[];
        Memory &m = *reinterpret_cast<Memory *>(bytes);
        constexpr int BUFFERS = Memory::BUFFERS;
        constexpr int OWN = (T::CHANNELS + THREADS - 1) / THREADS;
        Place<SPLIT> at(p);
        Lane<SPLIT> lane(at);
        int n = p.states;
        int64_t row_states = int64_t(p.channels) * n, tiles = (p.length + TILE - 1) / TILE;
        int64_t chunk = int64_t(at.row) * at.chunks + at.chunk;
        States a, carry = {}, da = {}, h;
        lane.load(a, p.a, n, LOG2E);
        if (p.carried)
            lane.load(carry, p.carried + chunk * row_states, n, 1.0f);
        else if (p.initial)
            lane.load(carry, p.initial + at.row * row_states, n, 1.0f);
        for (int c = threadIdx.x; c < T::CHANNELS; c += THREADS) {
            m.bias[c] = p.bias && c < at.count ? p.bias[at.first + c] : 0.0f;
            m.skip[c] = p.d && c < at.count ? p.d[at.first + c] : 0.0f;
        }
        T own(at);
        CoefficientTile<E, SPLIT> b(p.b, at, n, p.aligned_coefficients, 0), c(p.c, at, n, p.aligned_coefficients, 1);
        auto fetch = [&](int buffer, int start) {
            own.fetch(m.u[buffer], p.u, at, start, p.aligned);
            own.fetch(m.delta[buffer], p.delta, at, start, p.aligned);
            if (p.z.data) own.fetch(m.z[buffer], p.z, at, start, p.aligned);
            own.fetch(m.dy[buffer], p.dy, at, start, p.aligned);
            b.fetch(m.raw_b[buffer], at, start);
            c.fetch(m.raw_c[buffer], at, start);
            commit_copies();
        };
        float dd[OWN] = {}, dbias[OWN] = {};
        int start = at.begin + (at.end - at.begin - 1) / TILE * TILE, buffer = 0;
        fetch(0, start);
        for (; start >= at.begin; start -= TILE) {
            load_marks(p, at, m.marks, start);
            wait_copies<0>();
            __syncthreads();
            if (BUFFERS == 2 && start > at.begin) fetch(buffer ^ 1, start - TILE);
            lane.load(h, p.kept + (at.row * tiles + start / TILE) * row_states, n, 1.0f);
            b.widen_tile(m.b, m.raw_b[buffer], at, start);
            c.widen_tile(m.c, m.raw_c[buffer], at, start);
            prepare<E, SPLIT>(p, at, own, m.u[buffer], m.delta[buffer], m.z[buffer], m.dy[buffer], m.step, m.input, m.slope,
                              m.bias, m.marks, start);
            __syncthreads();
            if (p.marks)
                walk<true>(m, lane, a, h, carry, da);
            else
                walk<false>(m, lane, a, h, carry, da);
            __syncthreads();
            finish(p, m, at, own, buffer, start);
            // the block's shares of dB and dC, over its warps in their order
            float *sums = p.sums + ((int64_t(blockIdx.x) * p.batch + at.row) * p.length + start) * 2 * n;
            for (int token = threadIdx.x / LANES; token < min(TILE, at.end - start); token += WARPS)
                for (int k = threadIdx.x % LANES; k < 2 * n; k += LANES) {
                    int place = k < n ? k : WIDTH + k - n;
                    float sum = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; ++w) sum += m.sums[w][token][place];
                    sums[token * 2 * n + k] = sum;
                }
            __syncthreads();
            if (BUFFERS == 1 && start > at.begin) fetch(0, start - TILE);
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                int c = threadIdx.x + k * THREADS;
                if (c < at.count)
                    for (int t = 0; t < TILE; ++t) {
                        dbias[k] += m.step[t * T::CHANNELS + c];
                        dd[k] += m.input[t * T::CHANNELS + c];
                    }
            }
            if (BUFFERS == 2) buffer ^= 1;
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

    // The tile's gradients of the sequences; leaves those of bias and skip weight, by token, in step and input.
    static __device__ void finish(const Scan &p, Memory &m, const Place<SPLIT> &at, const T &own, int buffer, int start) {
        constexpr int W = T::WIDTH;
        float shift[W], skip[W];
        load_floats(shift, m.bias + own.channel);
        load_floats(skip, m.skip + own.channel);
#pragma unroll
        for (int v = 0; v < T::OWN; ++v) {
            if (!own.has(v)) break;
            int i = threadIdx.x + v * THREADS, token = own.token + v * T::ROWS;
            bool inside = own.live && start + token < at.end;
            bool live = inside && !(p.marks && m.marks[token] == PAD);
            Vector<E> out, du;
            float dx[W] = {}, dstep[W] = {};
            if (!live) {
#pragma unroll
                for (int k = 0; k < W; ++k) out.at[k] = narrow<E>(0.0f);
                store_floats(m.step + i * W, dstep);
                store_floats(m.input + i * W, dx);
                if (inside) {
                    own.store(p.du, at, start, v, out, p.aligned);
                    own.store(p.ddelta, at, start, v, out, p.aligned);
                    if (p.z.data) own.store(p.dz, at, start, v, out, p.aligned);
                }
                continue;
            }
            Vector<E> uv = reinterpret_cast<const Vector<E> *>(m.u[buffer])[i];
            Vector<E> gv = reinterpret_cast<const Vector<E> *>(m.dy[buffer])[i];
            float u[W], g[W], step[W];
            load_floats(dx, m.input + i * W);
#pragma unroll
            for (int k = 0; k < W; ++k) u[k] = widen(uv.at[k]), g[k] = widen(gv.at[k]);
            if (p.z.data) {
                Vector<E> zv = reinterpret_cast<const Vector<E> *>(m.z[buffer])[i];
                float y[W];
                load_floats(y, m.slope + i * W);
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    float z = widen(zv.at[k]), s = sigmoid(z);
                    float dz = g[k] * fmaf(skip[k], u[k], y[k]) * silu_slope(z, s);
                    out.at[k] = narrow<E>(dz);
                    g[k] *= z * s;
                }
                own.store(p.dz, at, start, v, out, p.aligned);
            }
            Vector<E> dv = reinterpret_cast<const Vector<E> *>(m.delta[buffer])[i];
            load_floats(dstep, m.step + i * W);
#pragma unroll
            for (int k = 0; k < W; ++k) {
                step[k] = widen(dv.at[k]) + shift[k];
                dstep[k] = fmaf(u[k], dx[k], LN2 * dstep[k]);
            }
            if (p.softplus)
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    float y = softplus(step[k]);
                    dstep[k] *= softplus_slope(step[k], y);
                    step[k] = y;
                }
#pragma unroll
            for (int k = 0; k < W; ++k) {
                out.at[k] = narrow<E>(dstep[k]);
                du.at[k] = narrow<E>(fmaf(skip[k], g[k], step[k] * dx[k]));
                dx[k] = g[k] * u[k];
            }
            store_floats(m.step + i * W, dstep);
            store_floats(m.input + i * W, dx);
            own.store(p.ddelta, at, start, v, out, p.aligned);
            own.store(p.du, at, start, v, du, p.aligned);
        }
    }
};

template <typename E, int SPLIT> __device__ void backward(const Scan &p) { Backward<E, SPLIT>::run(p); }

SCAN_KERNELS(selective_scan_bwd, backward, BackwardMemory, BLOCKS_PER_MULTIPROCESSOR)
