// A block's share of the weights, streamed through shared memory, and the products with them.
//
// The blocks share a matrix's outputs, the warps of a block its rows' bytes: a warp multiplies the same part of every row,
// and what it found is added up in the order of the warps. Weights depend on nothing, so that other warps copy them
// through all phases in order, as far ahead as the ring of slots goes. A slot has a tile's rows, or a piece of each where
// they are long, and a warp its part of the piece: so rows are copied as they lie, in as few and as large copies as can be.
//
// A whole ring on its way at once would be in the way of the activations' words, which the memory then answers thousands of
// cycles late; the rate of a stream needs no more than FLYING.
#pragma once
#include "decode.cuh"

constexpr int TILE = 8;         // outputs
constexpr int UNIT = 16;        // bytes of a copy
constexpr int GROUP = 4 * UNIT; // bytes of a row in a step of products: those of four lanes
constexpr int MOST_GROUPS = 5; // in a slot, of a row, for a warp: each has code of its own
constexpr int MOST_SLOTS = 16;
constexpr int GRAIN = 2; // outputs are shared by the blocks in pairs
constexpr int FLYING = 64 << 10; // bytes of slots on their way, while words are waited for

// `segments` matrices of `outputs` rows, all shared by the blocks alike; the first block's share goes to block `turn`.
struct Shape {
    int row_bytes, outputs, segments, turn;
    int form, padding;
};
// Forms: rows as they lie; a matrix for every sequence, by its slot; above zero, rows of a head of that size, whose halves
// are turned together, in pairs, one of each half.
constexpr int PLAIN = 0, POOL = -1;

// Weights of one phase.
struct alignas(16) Weights {
    const char *data;
    int64_t shape : 8;  // one of the step's
    int64_t apart : 56; // bytes from one segment to the next
};

// A block's share of a shape.
struct alignas(16) Share {
    int row_bytes, outputs, first, count; // of each segment; the block's outputs
    int tiles, all_tiles;                 // of each segment, of all
    int groups, pieces, size;             // of a row for each warp; in how many pieces, of how many groups of a warp
    int warps;                            // that have any
    int segments, form;

    // With so many groups of a row in a slot at most.
    __device__ Share(const Shape &shape, int most)
        : row_bytes(shape.row_bytes), outputs(shape.outputs), segments(shape.segments), form(shape.form) {
        int blocks = gridDim.x, units = (outputs + GRAIN - 1) / GRAIN, block = blockIdx.x + blocks - shape.turn;
        if (block >= blocks) block -= blocks;
        int each = units / blocks, extra = units - each * blocks;
        first = GRAIN * (block * each + min(block, extra));
        count = max(0, min(GRAIN * (each + (block < extra)), outputs - first));
        tiles = (count + TILE - 1) / TILE;
        all_tiles = tiles * segments;
        int all = (row_bytes + GROUP - 1) / GROUP;
        groups = (all + WARPS - 1) / WARPS;
        pieces = (groups + most - 1) / most;
        size = (groups + pieces - 1) / pieces;
        groups = pieces * size;
        warps = form == POOL ? WARPS : min(WARPS, (all + size - 1) / size);
    }
    // Where row `n` of a matrix lies.
    __device__ int source(int n) const {
        if (form <= 0) return n;
        int half = form / 2, head = Divide(half)(n / 2);
        return head * half + n / 2 + n % 2 * half;
    }
    // From shared memory, in three loads.
    __device__ static Share load(const Share &from) {
        union Pieces {
            int4 at[3];
            Share share;
            __device__ Pieces() {}
        } pieces;
#pragma unroll
        for (int i = 0; i < 3; ++i) pieces.at[i] = reinterpret_cast<const int4 *>(&from)[i];
        return pieces.share;
    }
};

// Bytes between rows of so many groups, which lie in other banks than those of the row before.
__device__ __forceinline__ constexpr int pitch_of(int groups) { return (groups | 1) * GROUP; }

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barriers in shared memory, for those who fill a slot and for the one who has read it.
__device__ __forceinline__ void begin_flag(uint32_t flag, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(flag), "r"(count) : "memory");
}
__device__ __forceinline__ void raise_flag(uint32_t flag) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(flag) : "memory");
}
// Behind all of the lane's copies.
__device__ __forceinline__ void raise_flag_behind_copies(uint32_t flag) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(flag) : "memory");
}
// Hopper copies without the lanes. A warp asks for one in 120 cycles, whatever its size: two of the copiers are enough.
#if __CUDA_ARCH__ >= 900
constexpr bool BULK = true;
// By one lane, behind so many bytes of bulk copies.
__device__ __forceinline__ void raise_flag_behind_bytes(uint32_t flag, int bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(flag), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const char *from, int bytes, uint32_t flag, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
                     "r"(to), "l"(from), "r"(bytes), "r"(flag), "l"(policy)
                 : "memory");
}
#else
constexpr bool BULK = false;
__device__ __forceinline__ void raise_flag_behind_bytes(uint32_t, int) {}
__device__ __forceinline__ void copy_bulk(uint32_t, const char *, int, uint32_t, uint64_t) {}
#endif
constexpr int FILLERS = BULK ? 2 : COPIERS; // warps that copy
__device__ __forceinline__ bool is_raised(uint32_t flag, int parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; "
#if __CUDA_ARCH__ >= 900
                 "mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
#else
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
#endif
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(flag), "r"(parity)
                 : "memory");
    return done;
}
__device__ __forceinline__ void wait_for_flag(uint32_t flag, int parity) {
    while (!is_raised(flag, parity)) {}
}

// Slots, filled and read in turn. Shared addresses; `round` is how often all have been, modulo 2.
struct Ring {
    uint32_t slots, full, empty; // the first slot; flags of all
    int size, bytes, next = 0, round = 0;

    __device__ Ring(uint32_t slots, uint32_t flags, int size, int bytes)
        : slots(slots), full(flags), empty(flags + MOST_SLOTS * FLAG), size(size), bytes(bytes) {}
    static constexpr int FLAG = sizeof(uint64_t);
    static constexpr int FLAGS = 2 * MOST_SLOTS;
    // Makes flag `i` ready for those who fill slots, or for those who have read them.
    static __device__ void begin(uint32_t flags, int i) {
        begin_flag(flags + i * FLAG, i >= MOST_SLOTS ? WARPS : BULK ? FILLERS : FILLERS * LANES);
    }

    __device__ uint32_t slot() const { return slots + next * bytes; }
    __device__ void turn() {
        if (++next == size) next = 0, round ^= 1;
    }
    __device__ bool is_full() const { return is_raised(full + next * FLAG, round); }
    __device__ void wait_full() const { wait_for_flag(full + next * FLAG, round); }
    __device__ void wait_empty() const { wait_for_flag(empty + next * FLAG, round ^ 1); }
    // The warp has read the slot.
    __device__ void release() {
        __syncwarp();
        if (lane_of() == 0) raise_flag(empty + next * FLAG);
        turn();
    }
    // The warp has no part of some slots.
    __device__ void skip(int slots) {
#pragma unroll 1
        for (; slots > 0; --slots) wait_full(), release();
    }
};

// Fills slots of a ring; one of FILLERS warps, which share a slot's pieces.
struct Filler {
    Ring &ring;
    Ring oldest; // of the slots on their way
    int warp, flying = 0, usual, most; // slots on their way: now, at most
    int filled = 0;
    bool again = false;  // another step than the first
    bool lapped = false; // a ring is no longer than a step: what is filled now, the step before has read
    uint64_t policy; // weights come once a step: they leave L2 to what stays

    __device__ Filler(Ring &ring, int warp)
        : ring(ring), oldest(ring), warp(warp), usual(min(ring.size, max(1, FLYING / ring.bytes))), most(usual) {
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    // Another step begins.
    __device__ void go_on() {
        if (again) return;
        again = true, lapped = filled >= ring.size;
    }
    __device__ void rush(bool all) { most = all ? ring.size : usual; }
    // Behind what the block has written to memory in the step before, for copies of it.
    __device__ void follow() {
        if (!again) return;
        if (!lapped) {
            Ring each = ring;
#pragma unroll 1
            for (int i = 0; i < ring.size; ++i, each.turn()) each.wait_empty();
        }
        fence_bulk();
    }
    // Fills the next slot with `count` pieces, `pitch` apart, the i-th of which is place(i): where it lies, and how many bytes
    // of it, at most `whole`, are there. ZEROS: what is not there shall be zero.
    template <bool ZEROS, typename F> __device__ void fill(int count, int pitch, int whole, F &&place) {
#pragma unroll 1
        for (; flying >= most; --flying) oldest.wait_full(), oldest.turn();
        ++flying, ++filled;
        ring.wait_empty();
        uint32_t slot = ring.slot(), flag = ring.full + ring.next * Ring::FLAG;
        if (BULK) {
            int bytes = 0, own = warp + lane_of() * FILLERS;
            uint32_t to = slot + own * pitch;
            const char *from = nullptr;
            if (own < count) from = place(own, bytes);
            if (ZEROS && own < count && bytes < whole) {
#pragma unroll 1
                for (int at = bytes; at < whole; at += UNIT)
                    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + at), "r"(0) : "memory");
                fence_bulk();
            }
            __syncwarp();
            int all = __reduce_add_sync(~0u, bytes);
            if (lane_of() == 0) raise_flag_behind_bytes(flag, all);
            __syncwarp();
            if (bytes > 0) copy_bulk(to, from, bytes, flag, policy);
        } else {
#pragma unroll 1
            for (int i = warp; i < count; i += FILLERS) {
                int bytes;
                const char *from = place(i, bytes);
#pragma unroll 1
                for (int at = lane_of() * UNIT; at < (ZEROS ? whole : bytes); at += LANES * UNIT)
                    copy_unit(slot + i * pitch + at, from + at, bytes > at ? UNIT : 0);
            }
            raise_flag_behind_copies(flag);
        }
        ring.turn();
    }
    // 16 bytes, of which `bytes` are there.
    __device__ void copy_unit(uint32_t to, const char *from, int bytes) const {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                     "r"(bytes), "l"(policy)
                     : "memory");
    }
    // Between writes and bulk copies to the same place.
    static __device__ void fence_bulk() {
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async;" ::: "memory");
#endif
    }
    // The block's share of a phase's weights. PAIRS: rows may go in pairs.
    template <bool PAIRS> __device__ void copy(const Weights &weights, const Share &share) {
        const char *segment = weights.data;
        int piece = WARPS * share.size * GROUP, whole = share.warps * share.size * GROUP, pitch = pitch_of(WARPS * share.size);
#pragma unroll 1
        for (int s = 0; s < share.segments; ++s, segment += weights.apart)
#pragma unroll 1
            for (int first = 0; first < share.count; first += TILE)
#pragma unroll 1
                for (int done = 0; done < share.pieces * piece; done += piece)
                    fill<true>(min(share.count - first, TILE), pitch, whole, [&](int row, int &bytes) {
                        int n = share.first + first + row;
                        bytes = max(0, min(share.row_bytes - done, piece));
                        return segment + int64_t(PAIRS ? share.source(n) : n) * share.row_bytes + done;
                    });
    }
};
