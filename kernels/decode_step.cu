// A step of decoding as one kernel: a program of phases for up to 8 rows (8 tokens of one sequence, or one of 8, or between).
//
// Grid: one block a multiprocessor, all there at once (a cooperative launch), 8 warps that multiply and 4 that copy. Every
// phase is a product of a few rows with a matrix whose outputs are shared by the blocks, and what follows from it alone.
// Weights stream past the phases into rings of shared memory (decode_stream.cuh); activations go from block to block as
// words that say themselves when they are there (decode.cuh).
//
// All phases share one loop, and so the code of what they have in common: a program that goes in circles has to stay in the
// instruction cache. Registers: 160 for one row, 168 (all there are, a few spilled) for more. Shared memory: what there is.
//
// Bytes: the weights, once; all else is small. On an H100 one row takes, as a share of 3.02 TB/s, 24 % in a model of 130m
// parameters (0.35 ms), 72 % of 1.4b (1.25 ms), 76 % of 2.8b (2.41 ms); eight rows of 2.8b 4.9 ms. What limits: a phase
// costs 2.5 us beside its weights (130m), half of it the way of the words, half instructions one after the other; with
// many rows the words themselves, eight bytes for four, read by every block.
#include "common/decode_mamba.cuh"

constexpr int AHEAD = 4; // phases: a layer of Mamba
constexpr int NEAR = 4;  // phases at hand: the next one, and two that warps may be apart
constexpr int MOST_SHAPES = 8;

// Copies weights for two warps, and brings close what else will be needed.
template <typename E>
__device__ void copy(const Step &p, const Weights *weights, const Share *shares, uint32_t slots, uint32_t flags, int warp) {
    Ring one(slots, flags, p.ring_slots, warp), other(slots, flags, p.ring_slots, warp + COPIERS);
#pragma unroll 1
    for (int i = 1 - AHEAD; i < p.count; ++i) {
        int later = i + AHEAD;
        if (later < p.count)
            for (int part = warp; part < HINTS; part += COPIERS)
                hints<E>(p, p.phases[later], shares[weights[later].shape], part);
        if (i < 0) continue;
        Share share = Share::load(shares[weights[i].shape]);
        if (share.count > 0 && warp < share.warps) copy_weights(one, other, weights[i], share, warp);
    }
    wait_copies<0>();
}

template <typename E, bool MANY> __device__ void step(const Step &p) {
    extern __shared__ __align__(128) char bytes[];
    __shared__ float row_sums[2][WARPS][MOST_ROWS];
    __shared__ Phase phases[NEAR];
    __shared__ alignas(alignof(Share)) char share_bytes[MOST_SHAPES * sizeof(Share)];
    __shared__ uint64_t flag_words[Ring::FLAGS];
    __shared__ __align__(16) char zeros[GROUPS * GROUP];
    Share *shares = reinterpret_cast<Share *>(share_bytes);
    char *free = bytes + p.ring_slots * WARPS * SLOT;
    auto room = [&](int size) {
        char *own = free;
        free += (size + 15) / 16 * 16;
        return own;
    };
    int warp = warp_of();
    uint32_t slots = shared_address(bytes), flags = shared_address(flag_words);
    Weights *weights = reinterpret_cast<Weights *>(room(p.count * sizeof(Weights)));
    const uint4 *all_weights = reinterpret_cast<const uint4 *>(p.weights);
#pragma unroll 1
    for (int i = threadIdx.x; i < p.count; i += blockDim.x) reinterpret_cast<uint4 *>(weights)[i] = all_weights[i];
    if (threadIdx.x < p.shape_count) shares[threadIdx.x] = Share(p.shapes[threadIdx.x]);
    if (threadIdx.x < Ring::FLAGS)
        begin_flag(flags + threadIdx.x * Ring::FLAG, threadIdx.x / MOST_SLOTS % 2 ? 1 : LANES);
    if (threadIdx.x < sizeof(zeros) / 4) reinterpret_cast<float *>(zeros)[threadIdx.x] = 0.0f;
    // phases near the current one lie in shared memory, a lane's eight bytes each
    constexpr int PIECES = sizeof(Phase) / 8;
    static_assert(PIECES <= LANES && sizeof(Phase) % 8 == 0 && sizeof(Weights) == 16, "loaded by a warp");
    auto load_phase = [&](int i) {
        return threadIdx.x < PIECES && i < p.count ? reinterpret_cast<const uint64_t *>(p.phases + i)[threadIdx.x] : 0;
    };
    auto keep_phase = [&](int i, uint64_t piece) {
        if (threadIdx.x < PIECES) reinterpret_cast<uint64_t *>(&phases[i % NEAR])[threadIdx.x] = piece;
    };
    keep_phase(0, load_phase(0));
    uint32_t mark = *reinterpret_cast<volatile unsigned *>(p.epoch);
    __syncthreads();
    if (warp >= WARPS) return copy<E>(p, weights, shares, slots, flags, warp - WARPS);

    Ring ring(slots, flags, p.ring_slots, warp);
    Block<E, MANY> b = {p, row_sums, mark};
    b.x = room(WARPS * p.x_bytes) + warp * p.x_bytes;
    float *all_sums = reinterpret_cast<float *>(room(2 * p.sums_bytes));
    b.own_stream = reinterpret_cast<float *>(room(p.rows * p.own_hidden * sizeof(float)));
    int own_bytes = p.rows * p.own_channels * sizeof(float);
    b.own_u = reinterpret_cast<float *>(room(own_bytes));
    b.own_z = reinterpret_cast<float *>(room(own_bytes));
    // with what the last warp reads behind the end
    int selected_groups = (words_of<E>(p.rank + 2 * p.states) * 4 + GROUP - 1) / GROUP;
    b.selected_pitch = pitch_of(selected_groups + selected_groups / WARPS);
    b.selected = room(p.rows * b.selected_pitch);
    int most_tiles = p.sums_bytes / (WARPS * p.rows * TILE * int(sizeof(float))), round = 0;
    int sequences = p.tokens == 1 ? p.rows : p.rows / p.tokens;
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
        const Phase &phase = phases[i % NEAR];
        Share share = Share::load(shares[weights[i].shape]);
        int kind = phase.kind;
        bool mixes = kind == MIX, moves = kind == STATE, ends = kind == HEAD;
        uint64_t later = load_phase(i + 1);
        ++b.mark;
        if (share.count > 0) {
            Early early;
            int tiles = min(most_tiles, share.all_tiles), tasks = tiles * sequences * TILE;
            Task task;
            float *place = nullptr;
            b.sums = all_sums + round * (p.sums_bytes / int(sizeof(float)));
            if (moves) Recurrence<E, MANY>(b, phase, share).load(early);
            if (kind == ADD && phase.layer == 0) b.begin_stream(share);
            auto find = [&](int n, int first, int last) {
                task = Task(b, phase, share, n, first, last);
                place = nullptr;
                if (!mixes || !task.live || task.segment) return;
                place = Filter::place(p, phase, task);
                Filter(early, p).load(phase, task.output, place);
            };
            if (!moves && warp * LANES < tasks) find(threadIdx.x, 0, tiles);
            if (mixes || ends) {
                b.take_norm(phase.norm, share, i == 0);
            } else if (moves) {
                b.take_selected(phase);
                if (p.normed) Recurrence<E, MANY>(b, phase, share).norms();
                if (!p.keep && blockIdx.x == 0) Recurrence<E, MANY>(b, phase, share).leave_selected();
            } else if (warp < share.warps) {
                b.take(phase, share);
            }
            uint32_t x = shared_address(moves ? b.selected + warp * share.groups * GROUP : b.x);
            int pitch = moves ? b.selected_pitch : b.pitch;
            // as many tiles at a time as there is room for
#pragma unroll 1
            for (int first = 0; first < share.all_tiles; first += most_tiles) {
                tiles = min(most_tiles, share.all_tiles - first);
                b.sums = all_sums + round * (p.sums_bytes / int(sizeof(float)));
                round ^= 1;
                if (warp < share.warps)
                    multiply<E>(ring, share, x, shared_address(zeros), pitch, p.rows, tiles, b.sums);
                keep_phase(i + 1, later);
                meet();
                if (moves) break;
                tasks = tiles * sequences * TILE;
#pragma unroll 1
                for (int n = threadIdx.x; n - lane_of() < tasks; n += THREADS) {
                    if (n >= THREADS || first > 0) find(n, first, first + tiles);
                    if (mixes)
                        mix(b, phase, share, task, early, place);
                    else if (kind == SELECT)
                        select(b, share, task);
                    else if (kind == ADD)
                        add(b, share, task);
                    else
                        head(b, share, task);
                }
            }
            if (moves) Recurrence<E, MANY>(b, phase, share).run(early);
        } else {
            keep_phase(i + 1, later);
            meet();
        }
    }
    if (p.chosen) {
        meet();
        choose<E>(p, Share::load(shares[weights[p.count - 1].shape]), b.mark);
    }
    if (threadIdx.x > 0) return;
    // the last block leaves the next step's mark
    if (atomicAdd(p.epoch + 1, 1u) + 1 < gridDim.x) return;
    p.epoch[1] = 0;
    p.epoch[0] = b.mark;
}

#define KERNEL(E, ROWS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS + COPIERS * LANES, 1)                                         \
        decode_step_##E##_##ROWS(const __grid_constant__ Step p) { step<E, (ROWS > 1)>(p); }
#define KERNELS(E) KERNEL(E, 1) KERNEL(E, 8)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)
