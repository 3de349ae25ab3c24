// The selective scan, forward; src/ops/selective_scan has the formula, common/scan.cuh the shape of a block.
//
// Grid (blocks of channels, batch, chunks of time), 128 threads. Per tile of 16 or 32 tokens: sequences, B and C by
// asynchronous copies one tile ahead; delta, delta u, B and C widened to f32 in shared memory; then every lane walks the
// tokens with its numbers of the state in registers; then skip weight, gate and store.
//
// With N = 16, bf16: one channel by four numbers in a lane (32 channels a block, 46 KB, 96 registers, 4 blocks a
// multiprocessor), two by four (64, 42 KB, 117, 4) or two by eight (128, 37 KB, 117, 4); no spills.
// Bytes: u, delta, z, B, C read once, y written once; for training 4 N bytes a channel and KEPT tokens of states, and y
// before the gate.
// Floor on an H100: the N exponentials of a channel and token, 16 a clock and multiprocessor (B D L N / 4.18e12 s), above
// that of memory (8 B D L bytes in bf16 at 3.02 TB/s). Softplus and gate add 3 to the 16, and the clock is 1.7 GHz, not
// 1.98, while these run: 1.36 of that floor is what the special functions allow.
// bf16, ms (share of the floor), one H200: 130m 0.177 (54%), 1.4b 0.432 (59%), 2.8b-8k 0.625 (51%), 2.8b-64k 2.68 (48%), short
// 0.130 (58%), 130m-256k 3.02 (51%; 8 rows of 32768 tokens 2.77).
// ncu, 130m: one by four 9.0 instructions a number of the state, 6.2 of them in the walk; IPC 2.6, shared memory 78% busy, DRAM
// 22%. Issue slots and special functions are two thirds busy, with 11 warps: latencies bind, and shared memory nearly does.
// Whole tiles ask no questions for that reason: half of the instructions outside the walk were addresses, bounds and branches.
// 320 blocks (2.8b-8k) are two for a multiprocessor and three for some: in shares for two each 0.618 instead of 0.695 ms.
// Registers and prologues of the shares' loop cost the others a hundredth or two: it is a kernel of its own.
// Tried and slower: sums over the states by the tensor cores in tf32 (9.4 instructions for 11, but 8% more time, waiting
// for products and for bursts of exponentials); one exponential of eight by an FMA polynomial (3%); walking in some warps
// while others prepare and finish (17% more instructions). Four tokens ahead instead of two, or bias and skip weight in
// registers: the same.
#include "common/scan_prepare.cuh"

// Tokens whose numbers are on their way while those of as many others are used.
template <typename F> constexpr int AHEAD = F::STATES > 4 ? 1 : 2;

// The lanes' shares of y: over the inputs that a walk has read where they fit there, else apart.
template <typename F> struct Shares {
    static constexpr bool APART = F::SPLIT > 2;
    // Parts begin in other banks, and so do two tokens that eight threads share.
    static constexpr int PART = F::CHANNELS + (F::OWNERS * F::PER % LANES < 4 ? 4 : F::OWNERS * F::PER % LANES);
    static constexpr int TOKEN = APART ? F::SPLIT * PART + (F::CHANNELS == 32 ? 4 : 0) : Inputs<F>::TOKEN;
    static constexpr int SIZE = APART ? F::TILE * TOKEN : 4;

    // The place of a lane's share in a token's row.
    static __device__ __forceinline__ int place(const Lane<F> &lane) {
        return APART ? lane.part * PART + spot(lane.own * F::PER) : Inputs<F>::place(lane.own) + lane.part * F::PER;
    }
    template <int WIDTH>
    static __device__ __forceinline__ void sum(float (&y)[WIDTH], const float *row, int channel) {
        if (APART) {
            load_floats(y, row + spot(channel));
#pragma unroll
            for (int part = 1; part < F::SPLIT; ++part) {
                float other[WIDTH];
                load_floats(other, row + part * PART + spot(channel));
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) y[k] += other[k];
            }
        } else {
            float both[2 * WIDTH];
            load_floats(both, row + spot(2 * channel));
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) {
                int place = Inputs<F>::mixed(k);
                y[k] = F::SPLIT == 1 ? both[place] : both[place] + both[place + F::PER];
            }
        }
    }
};

// What a lane reads of AHEAD tokens.
template <typename F> struct Read {
    static constexpr int COUNT = AHEAD<F>;
    float in[COUNT][2 * F::PER], b[COUNT][F::STATES], c[COUNT][F::STATES];
    __device__ __forceinline__ void load(const float *inputs, const float *b_, const float *c_, int token) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            load_floats(in[i], inputs + (token + i) * Inputs<F>::TOKEN);
            load_floats(b[i], b_ + (token + i) * F::WIDTH);
            load_floats(c[i], c_ + (token + i) * F::WIDTH);
        }
    }
};

// Moves h over so many tokens, a multiple of KEPT. `inputs`, `b`, `c` and `shares` are the lane's places at the first.
template <typename F, bool RESETS>
__device__ __forceinline__ void walk(typename F::States &h, const typename F::States &a, const float *inputs,
                                     const float *b, const float *c, float *shares, const uint8_t *marks, int tokens) {
    constexpr int PER = F::PER, STATES = F::STATES, COUNT = AHEAD<F>, UNROLL = PER * STATES > 4 ? 2 : 4;
    auto use = [&](const Read<F> &now, int t) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float y[PER] = {};
            if (RESETS && marks[t + i] == START) {
#pragma unroll
                for (int k = 0; k < PER; ++k)
#pragma unroll
                    for (int s = 0; s < STATES; ++s) h[k][s] = 0.0f;
            }
#pragma unroll
            for (int s = 0; s < STATES; ++s)
#pragma unroll
                for (int k = 0; k < PER; ++k) {
                    h[k][s] = fmaf(exp2_fast(now.in[i][k] * a[k][s]), h[k][s], now.in[i][PER + k] * now.b[i][s]);
                    y[k] = fmaf(h[k][s], now.c[i][s], y[k]);
                }
            // only this warp uses these channels, and where shares lie over inputs, its lanes have read them
            if (!Shares<F>::APART) __syncwarp();
            store_floats(shares + (t + i) * Shares<F>::TOKEN, y);
        }
    };
    Read<F> even, odd;
    even.load(inputs, b, c, 0);
#pragma unroll 1
    for (int first = 0; first < tokens; first += KEPT)
#pragma unroll UNROLL
        for (int i = 0; i < KEPT; i += 2 * COUNT) {
            int t = first + i;
            odd.load(inputs, b, c, t + COUNT);
            use(even, t);
            if (i + 2 * COUNT < KEPT || first + KEPT < tokens) even.load(inputs, b, c, t + 2 * COUNT);
            use(odd, t + COUNT);
        }
}

template <typename E, typename F> struct ForwardMemory {
    using T = Tile<E, F>;
    E u[2][T::SIZE], delta[T::SIZE], z[2][T::SIZE];
    float inputs[Inputs<F>::SIZE], shares[Shares<F>::SIZE];
    E raw[Coefficients<E, F, 2>::RAW];
    float b[F::TILE * F::WIDTH], c[F::TILE * F::WIDTH]; // neighbours, as they are widened together
    float bias[F::CHANNELS], skip[F::CHANNELS];
    uint8_t marks[3][F::TILE]; // of the tile before, which others may still finish, this one and the next
};

// Skip weight, gate and store of a tile.
template <bool WHOLE, typename E, typename F>
__device__ __forceinline__ void finish(const Scan &p, const ForwardMemory<E, F> &m, const Place<F> &at,
                                       const Tile<E, F> &own, const Walker<E, F> &y, const float *shares, int buffer,
                                       const uint8_t *marks, int start, bool aligned) {
    using T = Tile<E, F>;
    float skip[T::WIDTH];
    load_floats(skip, m.skip + own.channel);
#pragma unroll
    for (int v = 0; v < T::OWN; ++v) {
        int token = own.token + v * T::ROWS;
        if (!WHOLE && (!own.has(v) || !own.live || start + token >= at.end)) break;
        typename T::Elements out;
        float u[T::WIDTH], sum[T::WIDTH];
        widen(u, T::get(m.u[buffer], v));
        Shares<F>::sum(sum, shares + token * Shares<F>::TOKEN, own.channel);
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k) sum[k] = fmaf(skip[k], u[k], sum[k]);
        float gate[T::WIDTH];
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k) gate[k] = 1.0f;
        if (WHOLE || p.z.data) {
            widen(gate, T::get(m.z[buffer], v));
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) gate[k] = silu(gate[k]);
        }
        if (p.ungated) {
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) out.at[k] = narrow<E>(sum[k]);
            Walker<E, F> ungated = y; // laid out alike
            ungated.place += static_cast<E *>(p.ungated) - static_cast<E *>(p.y.data);
            ungated.store(at, own, v, out, WHOLE || aligned);
        }
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k) sum[k] *= gate[k];
        if (!WHOLE && p.marks && marks[token] == PAD)
#pragma unroll
            for (int k = 0; k < T::WIDTH; ++k) sum[k] = 0.0f;
#pragma unroll
        for (int k = 0; k < T::WIDTH; ++k) out.at[k] = narrow<E>(sum[k]);
        y.store(at, own, v, out, WHOLE || aligned);
    }
}

// Between blocks: all threads' writes come before, their reads behind.
__device__ __forceinline__ void hand_on(int *handed) {
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.s32 [%0], 1;" ::"l"(handed) : "memory");
}
__device__ __forceinline__ void await(const int *handed) {
    for (int there = threadIdx.x; !there;) asm volatile("ld.acquire.gpu.s32 %0, [%1];" : "=r"(there) : "l"(handed) : "memory");
    __syncthreads();
}

// The tokens of `at`. If there is `handed`, states go by it from stretch to stretch of a chain.
template <typename E, typename F>
__device__ __forceinline__ void stretch(const Scan &p, ForwardMemory<E, F> &m, const Place<F> &at, int *handed) {
    using T = Tile<E, F>;
    constexpr int TILE = F::TILE;
    Lane<F> lane(at);
    // few numbers in a lane are for sequences in whole packs: others take the wider forms
    bool aligned = F::STATES == 4 || p.aligned;
    int n = p.states;
    int64_t row_states = int64_t(p.channels) * n;
    T own(at);
    Walker<E, F> u(p.u, at, own, at.begin), delta(p.delta, at, own, at.begin), z(p.z, at, own, at.begin);
    Walker<E, F> y(p.y, at, own, at.begin);
    Coefficients<E, F, 2> coefficients(p.b, p.c, at, at.begin, n, p.aligned_coefficients);
    // whether tiles are whole, but for their tokens
    bool whole = F::STATES == 4 && T::PACKS >= THREADS && aligned && at.count == F::CHANNELS && coefficients.whole &&
                 p.softplus && p.z.data && !p.marks;
    int in_place = Inputs<F>::place(lane.own), part_place = lane.part * F::STATES, share_place = Shares<F>::place(lane);
    // else all of them would be reckoned again for every tile
    asm volatile("" : "+r"(in_place), "+r"(part_place), "+r"(share_place));
    float *all_shares = Shares<F>::APART ? m.shares : m.inputs, *shares = all_shares + share_place;
    const float *inputs = m.inputs + in_place, *own_b = m.b + part_place, *own_c = m.c + part_place;
    // What is used up while a tile is prepared has one buffer: a thread asks for what it has just read itself.
    auto fetch = [&](int buffer, uint8_t *marks, int start) {
        int left = at.end - start;
        if (whole && left >= TILE) {
            u.fetch(m.u[buffer]), delta.fetch(m.delta), coefficients.template fetch<true>(m.raw, left);
            z.fetch(m.z[buffer]);
        } else {
            u.fetch(m.u[buffer], at, own, left, aligned);
            delta.fetch(m.delta, at, own, left, aligned);
            if (p.z.data) z.fetch(m.z[buffer], at, own, left, aligned);
            coefficients.template fetch<false>(m.raw, left);
            load_marks(p, at, marks, start);
        }
        commit_copies();
        u.move(p.u, 1), delta.move(p.delta, 1), z.move(p.z, 1), coefficients.move(1);
    };
    fetch(0, m.marks[0], at.begin);
    // while the first tile is on its way
    typename F::States a, h = {};
    lane.load(a, p.a, n, LOG2E);
    bool later = handed && at.begin > 0;
    if (later) await(handed);
    if (later || p.carried && !handed)
        lane.load(h, p.carried + at.slot(p) * row_states, n, 1.0f);
    else if (p.initial)
        lane.load(h, p.initial + at.row * row_states, n, 1.0f);
    for (int k = threadIdx.x; k < F::CHANNELS; k += THREADS) {
        float bias = p.bias && k < at.count ? p.bias[at.first + k] : 0.0f;
        float skip = p.d && k < at.count ? p.d[at.first + k] : 0.0f;
        m.bias[k] = bias, m.skip[k] = skip;
    }
    __syncthreads();
    int buffer = 0, turn = 0;
    float *kept = p.kept;
    if (kept) kept += (int64_t(at.row) * ((p.length + KEPT - 1) / KEPT) + at.begin / KEPT) * row_states;
    for (int start = at.begin; start < at.end; start += TILE, buffer ^= 1) {
        const uint8_t *marks = m.marks[turn];
        turn = turn < 2 ? turn + 1 : 0;
        bool all = whole && start + TILE <= at.end;
        wait_copies<0>();
        if (all) {
            coefficients.template widen_tile<true>(m.b, m.raw, p.b, p.c, at, start);
            prepare<INPUTS, true, E, F>(p, at, own, m.u[buffer], m.delta, nullptr, nullptr, m.inputs, nullptr, m.bias, marks, start);
        } else {
            coefficients.template widen_tile<false>(m.b, m.raw, p.b, p.c, at, start);
            prepare<INPUTS, false, E, F>(p, at, own, m.u[buffer], m.delta, nullptr, nullptr, m.inputs, nullptr, m.bias, marks, start);
        }
        if (start + TILE < at.end) fetch(buffer ^ 1, m.marks[turn], start + TILE);
        __syncthreads();
        int stretch = kept ? KEPT : TILE;
#pragma unroll 1
        for (int t = 0; t < TILE; t += stretch) {
            if (kept && start + t < at.end) lane.store(kept, h, n), kept += row_states;
            const float *in = inputs + t * Inputs<F>::TOKEN, *bt = own_b + t * F::WIDTH, *ct = own_c + t * F::WIDTH;
            if (p.marks)
                walk<F, true>(h, a, in, bt, ct, shares + t * Shares<F>::TOKEN, marks + t, stretch);
            else
                walk<F, false>(h, a, in, bt, ct, shares + t * Shares<F>::TOKEN, nullptr, stretch);
        }
        __syncthreads();
        if (all)
            finish<true, E, F>(p, m, at, own, y, all_shares, buffer, marks, start, aligned);
        else
            finish<false, E, F>(p, m, at, own, y, all_shares, buffer, marks, start, aligned);
        y.move(p.y, 1);
    }
    if (at.end < p.length && handed) {
        lane.store(p.carried + at.slot(p) * row_states, h, n);
        hand_on(handed);
    } else if (at.end == p.length && p.state) {
        lane.store(p.state + at.row * row_states, h, n);
    }
}

template <typename E, typename F> __device__ void forward(const Scan &p) {
    extern __shared__ __align__(16) char bytes[];
    stretch<E, F>(p, *reinterpret_cast<ForwardMemory<E, F> *>(bytes), Place<F>(p), nullptr);
}

// The same where blocks would not share out evenly, some more of them than run at a time: all their chains of tokens in a
// row, cut into one share for each block that runs, not shorter than a chain. A block begins with the last chain of its
// share, which may end in the next one's, and comes to the first one at last, whose beginning is then done: the block before
// it began with that, and was launched before.
template <typename E, typename F> __device__ void forward_shares(const Scan &p) {
    extern __shared__ __align__(16) char bytes[];
    int columns = p.channels / p.part * p.blocks, length = (p.length + LONGEST_TILE - 1) / LONGEST_TILE * LONGEST_TILE;
    int64_t from = blockIdx.x * int64_t(p.share), to = min(from + p.share, int64_t(p.batch) * columns * length);
    for (int chain = (to - 1) / length, last = from / length; chain >= last; --chain) {
        int64_t begin = int64_t(chain) * length;
        Place<F> at(p, columns, chain, max(from - begin, int64_t(0)), min(to - begin, int64_t(p.length)));
        stretch<E, F>(p, *reinterpret_cast<ForwardMemory<E, F> *>(bytes), at, p.handed + chain);
        __syncthreads();
    }
}

#define FORWARD(E, BLOCKS)                                                                                             \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 4, E, 1, 4, 4)                                             \
    SCAN_KERNEL(selective_scan_fwd_shares, forward_shares, ForwardMemory, 4, E, 1, 4, 4)                               \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 4, E, 2, 4, 4)                                             \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 3, E, 2, 8, 1)                                             \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, BLOCKS, E, 2, 8, 2)                                        \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 3, E, 2, 8, 4)                                             \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 3, E, 2, 8, 8)                                             \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 3, E, 2, 8, 16)                                            \
    SCAN_KERNEL(selective_scan_fwd, forward, ForwardMemory, 3, E, 2, 8, 32)
FORWARD(float, 3)
FORWARD(bf16, 4)
FORWARD(f16, 4)
