// The loop over a step's phases, for models of any family F of blocks (decode_mamba.cuh, decode_retnet.cuh), and the phases
// that all of them have.
//
// A family is a Block with
//   Phase, Step       its own, with what it adds
//   Ahead             what a thread loads before its phase's inputs are there
//   with(kind, f)     calls f(Is<kind>())
//   takes_norm(kind)  whether a phase's inputs are the norm of the stream
//   is_for_all(kind)  whether blocks without outputs take the inputs too, for the next phase
//   is_whole(kind)    whether a phase does its own work behind its products, all of which it then has at once
//   make_rooms        its rooms in shared memory
//   begin, prepare    loads for a whole phase, for a task of another
//   input, take       where its inputs lie in shared memory; brings them there
//   products          with the weights
//   finish, end       what becomes of a task's products, and of a phase's, which are there behind await_sums
//   Source            copies a phase's weights for two warps
//   hints             brings close what a phase reads beside its weights
#pragma once
#include "decode_phases.cuh"

constexpr int NEAR = 4; // phases at hand: the next one, and two that warps may be apart
constexpr int MOST_SHAPES = 8;

// The largest logit, of equals the first; infinity at NONE stays.
struct Best {
    float value = -INFINITY;
    unsigned place = NONE;

    __device__ void merge(float x, unsigned i) {
        bool first = value == INFINITY ? i == NONE : i < place;
        if (x > value || (x == value && first)) value = x, place = i;
    }
    __device__ void over_warp() {
#pragma unroll 1
        for (int step = LANES / 2; step > 0; step /= 2)
            merge(__shfl_xor_sync(~0u, value, step), __shfl_xor_sync(~0u, place, step));
    }
};

// The most probable token of every row, the lowest id of equals, which is the next step's; NONE if a logit is NaN or infinity.
// All blocks find all of them. The block's own logits are there.
template <typename E, bool MANY> __device__ void choose(const Block<E, MANY> &b, const Share &share) {
    constexpr int TOGETHER = MANY ? 2 : AT_ONCE; // many rows have no registers for more
    const Step &p = b.p;
    int row = b.finisher() / LANES, lane = lane_of();
    if (row >= b.rows()) return;
    const E *logits = static_cast<const E *>(p.logits) + int64_t(row) * p.vocabulary + share.first;
    Best best;
#pragma unroll 1
    for (int start = lane; start < share.count; start += TOGETHER * LANES) {
        E e[TOGETHER];
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) e[m] = logits[min(start + m * LANES, share.count - 1)];
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) {
            float x = widen(e[m]);
            bool bad = !(x < INFINITY);
            best.merge(bad ? INFINITY : x, bad ? NONE : share.first + min(start + m * LANES, share.count - 1));
        }
    }
    best.over_warp();
    Word *to = p.best + (int64_t(blockIdx.x) * MOST_ROWS + row) * 2;
    if (lane < 2) p.copies.publish(to + lane, lane ? best.place : __float_as_uint(best.value), b.mark);
    best = Best();
#pragma unroll 1
    for (int start = lane; start - lane < gridDim.x; start += TOGETHER * LANES) {
        Words w[TOGETHER];
        const Word *from[TOGETHER];
        bool has[TOGETHER];
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m) {
            int block = start + m * LANES;
            from[m] = p.copies.own(p.best) + (int64_t(block) * MOST_ROWS + row) * 2, has[m] = block < gridDim.x;
        }
        await(w, from, has, b.mark);
#pragma unroll
        for (int m = 0; m < TOGETHER; ++m)
            if (has[m]) best.merge(__uint_as_float(uint32_t(w[m].at[0])), uint32_t(w[m].at[1]));
    }
    best.over_warp();
    if (lane > 0) return;
    unsigned id = best.place;
    if (blockIdx.x == 0) p.chosen[b.board.steps[row] * MOST_ROWS + row] = id;
    ++b.board.steps[row];
    bool none = id == NONE;
    b.board.ids[row] = none ? 0 : id;
    if (none || (p.stops && p.stops[id / 32] >> id % 32 & 1)) b.board.slots[row] = ended(b.board.slots[row]);
}

// ADD: a projection's outputs, onto the stream.
template <typename E, bool MANY> __device__ void add(Block<E, MANY> &b, const Share &share, const Task<MANY> &task) {
    const Step &p = b.p;
    if (!task.live) return;
#pragma unroll 1
    for (int t = 0; t < b.tokens(); ++t) {
        float *own = b.own_stream + (task.row + t) * p.own_hidden + task.own;
        float sum = *own + widen(narrow<E>(task.value(share, t)));
        if (!p.wide) sum = widen(narrow<E>(sum));
        p.copies.publish(p.stream + (task.row + t) * p.hidden + task.output, __float_as_uint(sum), b.mark);
        *own = sum;
    }
}
// HEAD: logits.
template <typename E, bool MANY> __device__ void head(Block<E, MANY> &b, const Share &share, const Task<MANY> &task) {
    const Step &p = b.p;
    if (!task.live) return;
#pragma unroll 1
    for (int t = 0; t < b.tokens(); ++t)
        static_cast<E *>(p.logits)[int64_t(task.row + t) * p.vocabulary + task.output] = narrow<E>(task.value(share, t));
}

// Registers for the four warps of a group; a launch gives as many to all, 168 with three groups, 128 with four.
template <int COUNT, bool MORE> __device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    static_assert(WARPS % 4 == 0 && COPIERS % 4 == 0, "whole groups");
    if constexpr (MORE)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// Copies weights, and brings close what else will be needed, a layer ahead. Who does not copy has the time for that, and keeps
// to the pace of who does: `done` is the phase he is at.
template <typename F>
__device__ void copy(const typename F::Step &p, const Weights *weights, const Share *shares, Ring &ring, volatile int *done,
                     int warp) {
    constexpr int HINTERS = FILLERS < COPIERS ? COPIERS - FILLERS : COPIERS;
    bool fills = warp < FILLERS;
    int hinter = FILLERS < COPIERS ? warp - FILLERS : warp;
    typename F::Source source(p, ring, warp);
    int all = p.count * p.steps, i = 0, later = 0;
#pragma unroll 1
    for (int n = 1 - F::LAYER; n < all; ++n) {
        if (++later == p.count) later = 0;
        if (!fills)
            while (*done < n) __nanosleep(100);
        if (n + F::LAYER < all && hinter >= 0)
            for (int part = hinter; part < F::HINTS; part += HINTERS)
                F::hints(p, static_cast<const typename F::Phase *>(p.phases)[later], shares[weights[later].shape], part);
        if (n < 0 || !fills) continue;
        if (n > 0 && i == 0) source.go_on();
        source.rush(i + 1 == p.count); // no words behind a step's last weights
        Share share = Share::load(shares[weights[i].shape]);
        if (share.count > 0) source.copy(weights[i], share);
        if (warp == 0 && lane_of() == 0) *done = n + 1;
        if (++i == p.count) i = 0;
    }
    wait_copies<0>();
}

// What a crew does: all of a block's warps beside the copiers are one that does both, or two (FINISHERS_OF). Sums go from who
// multiplies to who finishes in two buffers, in turn: READY when they are there, FREE when they have been taken and what follows
// from them has gone out. A crew that does both meets instead.
enum { MULTIPLY = 1, FINISH = 2 };

// The steps, for a crew. `near_phases` are its own.
template <typename F, int ROLES>
__device__ __forceinline__ void go(const typename F::Step &p, F &f, Ring &ring, const Weights *weights, const Share *shares,
                                   typename F::Phase *near_phases, float *all_sums) {
    using Phase = typename F::Phase;
    using E = typename F::Element;
    constexpr bool MULTIPLIES = ROLES & MULTIPLY, FINISHES = ROLES & FINISH, ALONE = MULTIPLIES && FINISHES;
    int own = MULTIPLIES ? threadIdx.x : f.finisher(), warp = warp_of();
    int most_tiles = p.sums_bytes / (WARPS * f.rows() * TILE * int(sizeof(float)));
    int sequences = f.sequences(), round = 0, freed = 0; // rounds: of products, of those whose sums have been taken
    // phases near the current one lie in shared memory, a lane's eight bytes each
    constexpr int PIECES = sizeof(Phase) / 8;
    static_assert(PIECES <= LANES && sizeof(Phase) % 8 == 0, "loaded by a warp");
    auto load_phase = [&](int i) {
        const Phase *all = static_cast<const Phase *>(p.phases);
        return own < PIECES ? reinterpret_cast<const uint64_t *>(all + (i < p.count ? i : 0))[own] : 0;
    };
    // that of mark `mark`, for all of the crew
    auto keep_phase = [&](uint32_t mark, uint64_t piece) {
        if (own < PIECES) reinterpret_cast<uint64_t *>(&near_phases[mark % NEAR])[own] = piece;
        if (MULTIPLIES)
            meet();
        else
            f.meet_finishers();
    };
    auto await_free = [&](int rounds) {
#pragma unroll 1
        for (; !FINISHES && freed < rounds; ++freed) meet(FREE + freed % 2, F::CREWS);
    };
    // those of the last round, whose number has been counted
    auto await_sums = [&] {
        if (!MULTIPLIES) meet(READY + (round - 1) % 2, F::CREWS);
    };
    auto take_phase = [&](int i) {
        const Phase &phase = near_phases[++f.mark % NEAR];
        Share share = Share::load(shares[weights[i].shape]);
        int kind = phase.kind;
        uint64_t later = load_phase(i + 1);
        if (share.count == 0 && !F::is_for_all(kind)) return keep_phase(f.mark + 1, later);
        typename F::Ahead ahead;
        typename F::Task task;
        int tiles = min(most_tiles, share.all_tiles), tasks = tiles * sequences * TILE;
        auto find = [&](int n, int first, int last) {
            task = {f, phase, share, n, first, last};
            F::with(kind, [&](auto kind) { f.prepare(kind, phase, share, task, ahead); });
        };
        auto take_buffer = [&] { f.sums = all_sums + round % 2 * (p.sums_bytes / int(sizeof(float))); };
        take_buffer();
        if (FINISHES) {
            if (phase.first) f.begin_stream(share);
            if (F::is_whole(kind))
                f.begin(phase, share, ahead);
            else if (own - lane_of() < tasks)
                find(own, 0, tiles);
        }
        Product<E, F::IS_MANY> product(share, f.input(kind, share), f.rows());
        auto take = [&] {
            // words that are asked for too early are late: those of others come no earlier than those of this block went
            await_free(round);
            if (!FINISHES && p.patience) __nanosleep(p.patience);
            if (F::takes_norm(kind)) f.take_norm(phase.norm, share, i == 0);
            f.take(kind, phase, share);
        };
        if (ALONE) take();
        // as many tiles at a time as there is room for
        int first = 0;
#pragma unroll 1
        do {
            tiles = min(most_tiles, share.all_tiles - first);
            take_buffer();
            if (MULTIPLIES) {
                // in the loop, where it is close to the products: a matter of the instruction cache
                if (!FINISHES && first == 0) take();
                await_free(round - 1);
                if (warp < share.warps)
                    f.products(kind, ring, phase, share, product, tiles);
                else
                    ring.skip(tiles * share.pieces);
            }
            if (MULTIPLIES && !FINISHES) arrive(READY + round % 2, F::CREWS);
            ++round;
            if (MULTIPLIES) keep_phase(f.mark + 1, later);
            if (F::is_whole(kind)) break;
            tasks = tiles * sequences * TILE;
            if (!MULTIPLIES && own - lane_of() >= tasks) await_sums();
#pragma unroll 1
            for (int n = own; FINISHES && n - lane_of() < tasks; n += F::FINISH_THREADS) {
                if (n >= F::FINISH_THREADS || first > 0) find(n, first, first + tiles);
                // what a kind does is found before its sums are there
                F::with(kind, [&](auto kind) {
                    if (n == own) await_sums();
                    task.find(share);
                    f.finish(kind, phase, share, task, ahead);
                });
            }
            first += most_tiles;
            if (!MULTIPLIES && first < share.all_tiles) arrive(FREE + (round - 1) % 2, F::CREWS);
        } while (first < share.all_tiles);
        if (FINISHES) f.end(kind, phase, share, ahead, await_sums);
        if (!MULTIPLIES) {
            arrive(FREE + (round - 1) % 2, F::CREWS);
            keep_phase(f.mark + 1, later);
        }
    };
    keep_phase(f.mark + 1, load_phase(0));
#pragma unroll 1
    do {
#pragma unroll 1
        for (int i = 0; i < p.count; ++i) take_phase(i);
        if (!p.chosen) break;
        if (FINISHES) {
            f.meet_finishers();
            choose(f, Share::load(shares[weights[p.count - 1].shape]));
        }
        meet(ALONE ? MULTIPLIERS : BOTH, F::CREWS);
    } while (f.board.steps[0] < p.steps);
}

template <typename F> __device__ void run(const typename F::Step &p) {
    extern __shared__ __align__(128) char bytes[];
    __shared__ alignas(16) Board only_board;
    __shared__ typename F::Phase near_phases[F::FINISHERS ? 2 : 1][NEAR];
    __shared__ alignas(alignof(Share)) char share_bytes[MOST_SHAPES * sizeof(Share)];
    __shared__ uint64_t flag_words[Ring::FLAGS];
    __shared__ int copied; // phases
    Board &board = *found(&only_board);
    Share *shares = reinterpret_cast<Share *>(found(share_bytes));
    char *free = bytes + p.ring_slots * p.slot_bytes();
    auto room = [&](int size) {
        char *own = free;
        free += (size + 15) / 16 * 16;
        return own;
    };
    int warp = warp_of();
    uint32_t slots = shared_address(bytes), flags = shared_address(flag_words);
    known(slots), known(flags);
    static_assert(sizeof(Weights) == 16, "loaded at once");
    Weights *weights = reinterpret_cast<Weights *>(room(p.count * sizeof(Weights)));
    const uint4 *all_weights = reinterpret_cast<const uint4 *>(p.weights);
#pragma unroll 1
    for (int i = threadIdx.x; i < p.count; i += blockDim.x) reinterpret_cast<uint4 *>(weights)[i] = all_weights[i];
    if (threadIdx.x < p.shape_count) shares[threadIdx.x] = Share(p.shapes[threadIdx.x], p.slot_groups);
    static_assert(Ring::FLAGS <= THREADS, "a thread each");
    if (threadIdx.x == 0) copied = 0;
    if (int row = threadIdx.x; row < MOST_ROWS)
        board.ids[row] = p.ids[row], board.slots[row] = p.slots[row], board.steps[row] = 0;
    if (threadIdx.x < Ring::FLAGS) Ring::begin(flags, threadIdx.x);
    F f(p, board, *reinterpret_cast<volatile unsigned *>(p.epoch));
    f.x = room(WARPS * p.x_bytes) + warp * p.x_bytes;
    float *all_sums = reinterpret_cast<float *>(room(2 * p.sums_bytes));
    f.own_stream = reinterpret_cast<float *>(room(f.rows() * p.own_hidden * sizeof(float)));
    f.make_rooms(room);
    __syncthreads();
    Ring ring(slots, flags, p.ring_slots, p.slot_bytes());
    constexpr bool SPLIT = F::FINISHERS > 0;
    if (warp >= WARPS + F::FINISHERS) {
        take_registers<88, false>();
        return copy<F>(p, weights, shares, ring, &copied, warp - WARPS - F::FINISHERS);
    }
    if constexpr (SPLIT) {
        if (warp >= WARPS) {
            take_registers<120, false>();
            return go<F, FINISH>(p, f, ring, weights, shares, found(near_phases[1]), all_sums);
        }
        take_registers<152, true>();
        go<F, MULTIPLY>(p, f, ring, weights, shares, found(near_phases[0]), all_sums);
    } else {
        take_registers<208, true>();
        go<F, MULTIPLY | FINISH>(p, f, ring, weights, shares, found(near_phases[0]), all_sums);
    }
    if (threadIdx.x > 0) return;
    // the last block leaves the next step's mark
    if (atomicAdd(p.epoch + 1, 1u) + 1 < gridDim.x) return;
    p.epoch[1] = 0;
    p.epoch[0] = f.mark;
}

#define DECODE_KERNEL(NAME, FAMILY, E, ROWS)                                                                           \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS<(ROWS > 1)>, 1)                                         \
        NAME##_##E##_##ROWS(const __grid_constant__ FAMILY<E, (ROWS > 1)>::Step p) {                                   \
        take_turn();                                                                                                   \
        run<FAMILY<E, (ROWS > 1)>>(p);                                                                                 \
    }
#define DECODE_KERNELS(NAME, FAMILY)                                                                                   \
    DECODE_KERNEL(NAME, FAMILY, float, 1) DECODE_KERNEL(NAME, FAMILY, float, 8)                                        \
    DECODE_KERNEL(NAME, FAMILY, bf16, 1) DECODE_KERNEL(NAME, FAMILY, bf16, 8)                                          \
    DECODE_KERNEL(NAME, FAMILY, f16, 1) DECODE_KERNEL(NAME, FAMILY, f16, 8)
