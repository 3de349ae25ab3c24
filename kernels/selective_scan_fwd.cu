// The selective scan, forward; src/ops/selective_scan has the formula, common/scan.cuh the shape of a block.
//
// Grid (blocks of channels, batch, chunks of time), 128 threads. Per tile of 16 tokens: sequences, B and C by asynchronous
// copies one tile ahead; delta, delta u, B and C widened to f32 in shared memory; then every lane walks the tokens with
// 2 channels x 8 numbers of the state in registers; then skip weight, gate and store. With N = 16 a block has 128
// channels, and B and C are read once for all of them.
//
// Shared memory 41 KB (bf16), 64 KB (f32); 128 registers, no spills: 4 blocks (f32: 3) a multiprocessor.
// Bytes: u, delta, z, B, C read once, y written once, and for training 4 N bytes a channel and tile of states.
// Floor on an H100: the N exponentials of a channel and token, 16 a clock and multiprocessor (B D L N / 4.18e12 s), above
// that of memory (8 B D L bytes in bf16 at 3.02 TB/s).
// Measured at B 64, D 1536, L 200, N 16, bf16: 0.171 ms, 2.3 times the floor; ncu: IPC 2.3, special functions 55% and FMA
// 32% busy, DRAM 27%; the walk takes 60% of the time at 80% of the special functions' rate, widening and storing the rest.
// Exponentials by FMA polynomials would cost as many issue slots as they free, so there are none.
// Faster still: widen in a warp of its own while the others walk, so that the special functions never wait.
#include "common/scan_prepare.cuh"

// Tokens that the compiler interleaves.
constexpr int WALK = 4;
constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;

template <int SPLIT, bool RESETS>
__device__ __forceinline__ void walk(float (&h)[PAIR][STATES], const float (&a)[PAIR][STATES], const float *step,
                                     float *input, const float *b, const float *c, const uint8_t *marks, int pair,
                                     int part) {
    constexpr int CHANNELS = Place<SPLIT>::CHANNELS, WIDTH = STATES * SPLIT;
#pragma unroll WALK
    for (int t = 0; t < TILE; ++t) {
        float bt[STATES], ct[STATES];
        load_states(bt, b + t * WIDTH + part * STATES);
        load_states(ct, c + t * WIDTH + part * STATES);
        float2 delta = reinterpret_cast<const float2 *>(step + t * CHANNELS)[pair];
        float2 x = reinterpret_cast<const float2 *>(input + t * CHANNELS)[pair];
        if (RESETS && marks[t] == START) {
#pragma unroll
            for (int i = 0; i < STATES; ++i) h[0][i] = h[1][i] = 0.0f;
        }
        float y[PAIR] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < STATES; ++i) {
            h[0][i] = fmaf(exp2_fast(delta.x * a[0][i]), h[0][i], x.x * bt[i]);
            h[1][i] = fmaf(exp2_fast(delta.y * a[1][i]), h[1][i], x.y * bt[i]);
            y[0] = fmaf(h[0][i], ct[i], y[0]);
            y[1] = fmaf(h[1][i], ct[i], y[1]);
        }
        sum_parts<SPLIT>(y, part);
        // every lane of the warp has read its input by now, and only this warp uses these channels
        put_parts<SPLIT>(input + t * CHANNELS + pair * PAIR, y, part);
    }
}

template <typename E, int SPLIT> struct ForwardMemory {
    using T = Tile<E, SPLIT>;
    E u[2][T::SIZE], delta[2][T::SIZE], z[T::SIZE];
    float step[T::SIZE], input[T::SIZE];
    E raw_b[2][CoefficientTile<E, SPLIT>::RAW], raw_c[2][CoefficientTile<E, SPLIT>::RAW];
    float b[TILE * STATES * SPLIT], c[TILE * STATES * SPLIT];
    float bias[T::CHANNELS];
    uint8_t marks[2][TILE];
};

template <typename E, int SPLIT> __device__ void forward(const Scan &p) {
    using T = Tile<E, SPLIT>;
    extern __shared__ __align__(16) char bytes[];
    auto &m = *reinterpret_cast<ForwardMemory<E, SPLIT> *>(bytes);
    Place<SPLIT> at(p);
    Lane<SPLIT> lane(at);
    int n = p.states;
    int64_t row_states = int64_t(p.channels) * n;
    float a[PAIR][STATES], h[PAIR][STATES] = {};
    lane.load(a, p.a, n, LOG2E);
    if (p.carried)
        lane.load(h, p.carried + (int64_t(at.row) * at.chunks + at.chunk) * row_states, n, 1.0f);
    else if (p.initial)
        lane.load(h, p.initial + at.row * row_states, n, 1.0f);
    load_bias(p, at, m.bias);
    T own(at);
    CoefficientTile<E, SPLIT> b(p.b, at, n, p.aligned_coefficients, 0), c(p.c, at, n, p.aligned_coefficients, 1);
    auto fetch = [&](int buffer, int start) {
        own.fetch(m.u[buffer], p.u, at, start, p.aligned);
        own.fetch(m.delta[buffer], p.delta, at, start, p.aligned);
        b.fetch(m.raw_b[buffer], at, start);
        c.fetch(m.raw_c[buffer], at, start);
        commit_copies();
    };
    fetch(0, at.begin);
    int buffer = 0;
    int64_t tiles = (p.length + TILE - 1) / TILE;
    for (int start = at.begin; start < at.end; start += TILE, buffer ^= 1) {
        load_marks(p, at, m.marks[buffer], start);
        wait_copies<0>();
        __syncthreads();
        if (p.z.data) own.fetch(m.z, p.z, at, start, p.aligned);
        commit_copies();
        if (start + TILE < at.end) fetch(buffer ^ 1, start + TILE);
        b.widen_tile(m.b, m.raw_b[buffer], at, start);
        c.widen_tile(m.c, m.raw_c[buffer], at, start);
        prepare<E, SPLIT>(p, at, own, m.u[buffer], m.delta[buffer], nullptr, nullptr, m.step, m.input, nullptr, m.bias,
                          m.marks[buffer], start);
        if (p.kept) lane.store(p.kept + (at.row * tiles + start / TILE) * row_states, h, n);
        __syncthreads();
        if (p.marks)
            walk<SPLIT, true>(h, a, m.step, m.input, m.b, m.c, m.marks[buffer], lane.pair, lane.part);
        else
            walk<SPLIT, false>(h, a, m.step, m.input, m.b, m.c, m.marks[buffer], lane.pair, lane.part);
        // the gate of this tile, but not what was asked for after it
        if (start + TILE < at.end)
            wait_copies<1>();
        else
            wait_copies<0>();
        __syncthreads();
        float skip[T::WIDTH];
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k)
            skip[k] = p.d && own.channel + k < at.count ? p.d[at.first + own.channel + k] : 0.0f;
#pragma unroll
        for (int v = 0; v < T::OWN; ++v) {
            int i = threadIdx.x + v * THREADS, token = own.token + v * T::ROWS;
            if (!own.has(v) || !own.live || start + token >= at.end) break;
            bool padding = p.marks && m.marks[buffer][token] == PAD;
            Vector<E> u = reinterpret_cast<const Vector<E> *>(m.u[buffer])[i], out;
            float y[T::WIDTH];
            load_floats(y, m.input + i * T::WIDTH);
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) y[k] = fmaf(skip[k], widen(u.at[k]), y[k]);
            if (p.z.data) {
                Vector<E> z = reinterpret_cast<const Vector<E> *>(m.z)[i];
#pragma unroll
                for (int k = 0; k < T::WIDTH; ++k) y[k] *= silu(widen(z.at[k]));
            }
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) out.at[k] = narrow<E>(padding ? 0.0f : y[k]);
            own.store(p.y, at, start, v, out, p.aligned);
        }
    }
    if (at.end == p.length && p.state) lane.store(p.state + at.row * row_states, h, n);
}

SCAN_KERNELS(selective_scan_fwd, forward, ForwardMemory, BLOCKS_PER_MULTIPROCESSOR)
