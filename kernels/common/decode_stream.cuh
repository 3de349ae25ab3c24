// A block's share of the weights, streamed through shared memory, and the products with them.
//
// The blocks share a matrix's outputs, the warps of a block its rows' bytes: a warp multiplies the same part of every row,
// and what it found is added up in the order of the warps. Weights depend on nothing, so that other warps copy them
// through all phases in order, as far ahead as the ring of slots goes.
#pragma once
#include "decode.cuh"

constexpr int TILE = 8;         // outputs
constexpr int UNIT = 16;        // bytes of a copy
constexpr int GROUP = 4 * UNIT; // bytes of a row in a step of products: those of four lanes
constexpr int GROUPS = 5;       // in a piece, at most
constexpr int SLOT = GROUPS * TILE * GROUP;
constexpr int MOST_SLOTS = 8;
constexpr int GRAIN = 2; // outputs are shared by the blocks in pairs

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
    int groups, pieces, size;             // of a row for each warp; in how many pieces, of how many groups
    int warps;                            // that have any
    int segments, form;

    __device__ explicit Share(const Shape &shape)
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
        pieces = (groups + GROUPS - 1) / GROUPS;
        size = (groups + pieces - 1) / pieces;
        groups = pieces * size;
        warps = (all + groups - 1) / groups;
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

// Bytes between a warp's rows of so many groups of activations, which lie in other banks than those of the row before.
__device__ __forceinline__ int pitch_of(int groups) { return (groups | 1) * GROUP; }

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
__device__ __forceinline__ void wait_for_flag(uint32_t flag, int parity) {
    uint32_t done;
    do asm volatile("{ .reg .pred p; "
#if __CUDA_ARCH__ >= 900
                    "mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
#else
                    "mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
#endif
                    "selp.u32 %0, 1, 0, p; }"
                    : "=r"(done)
                    : "r"(flag), "r"(parity)
                    : "memory");
    while (!done);
}

// A warp's slots, filled and read in turn. Shared addresses; `round` is how often all have been, modulo 2.
struct Ring {
    uint32_t slots, full, empty; // the lane's own place in the first slot; flags of all
    int size, next = 0, round = 0;
    uint64_t policy; // weights come once a step: they leave L2 to what stays

    __device__ Ring(uint32_t slots, uint32_t flags, int size, int warp) : size(size) {
        this->slots = slots + warp * size * SLOT + lane_of() * UNIT;
        full = flags + warp * 2 * MOST_SLOTS * FLAG, empty = full + MOST_SLOTS * FLAG;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    static constexpr int FLAG = sizeof(uint64_t);
    static constexpr int FLAGS = WARPS * 2 * MOST_SLOTS;

    __device__ uint32_t slot() const { return slots + next * SLOT; }
    __device__ void turn() {
        if (++next == size) next = 0, round ^= 1;
    }
    // Fills the next slot with `groups` from rows of a tile; zeros behind their ends, nothing where no row is.
    __device__ void fill(const char *from, int groups, int bytes, bool live) {
        wait_for_flag(empty + next * FLAG, round ^ 1);
        uint32_t to = slot();
#pragma unroll
        for (int j = 0; j < GROUPS; ++j)
            if (live && j < groups)
                asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                                 to + j * LANES * UNIT),
                             "l"(from + j * GROUP), "r"(bytes > j * GROUP ? UNIT : 0), "l"(policy)
                             : "memory");
        raise_flag_behind_copies(full + next * FLAG);
        turn();
    }
};

// Copies the parts of two warps of a phase's weights. PAIRS: rows may go in pairs.
template <bool PAIRS>
__device__ __forceinline__ void copy_weights(Ring &one, Ring &other, const Weights &weights, const Share &share, int warp) {
    int row = lane_of() / 4, unit = (warp * share.groups * 4 + lane_of() % 4) * UNIT, apart = COPIERS * share.groups * GROUP;
    bool both = warp + COPIERS < share.warps;
    const char *segment = weights.data + unit;
#pragma unroll 1
    for (int s = 0; s < share.segments; ++s, segment += weights.apart) {
        const char *from = segment + int64_t(share.first + row) * share.row_bytes;
#pragma unroll 1
        for (int left = share.count - row, tile = 0; tile < share.tiles; ++tile, left -= TILE) {
            int bytes = share.row_bytes - unit;
            if (PAIRS && share.form > 0)
                from = segment + int64_t(share.source(share.first + tile * TILE + row)) * share.row_bytes;
#pragma unroll 1
            for (int done = 0; done < share.groups; done += share.size, bytes -= share.size * GROUP) {
                one.fill(from + done * GROUP, share.size, bytes, left > 0);
                if (both) other.fill(from + apart + done * GROUP, share.size, bytes - apart, left > 0);
            }
            from += TILE * share.row_bytes;
        }
    }
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
}

__device__ __forceinline__ uint32_t load_word(uint32_t from) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from));
    return v;
}

// Sums of a tile: outputs times rows.
//
// A lane's 16 bytes of weights are the operand A of one product of tensor cores as they lie: its rows are the tile's outputs
// twice, with the first and third and with the second and fourth word of 16 bytes. B has a column of the same words for
// each row of activations and half, so that four rows take one product, and D's other columns mean nothing. Lane 4 g + t has
// output g in rows t and 4 + t.
template <typename E, bool MANY> struct Tile {
    static constexpr int HALVES = MANY ? 2 : 1; // of the rows
    uint32_t x[HALVES];                         // the lane's words of activations
    bool both;
    float c[HALVES][2][4];

    __device__ Tile(uint32_t at, int pitch, int rows) : both(MANY && rows > 4) {
        int row = MANY ? lane_of() / 8 : 0;
        at += lane_of() % 4 * UNIT + lane_of() / 4 % 2 * 4;
        x[0] = at + (row < rows ? row : 0) * pitch;
        if (MANY) x[HALVES - 1] = at + (row + 4 < rows ? row + 4 : 0) * pitch;
    }
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 8 * HALVES; ++i) c[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }
#define MULTIPLY(KIND)                                                                                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                         \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(a.x), "r"(a.y))
    static __device__ void mma(float (&c)[4], const uint4 &w, const uint2 &a) {
        if constexpr (std::is_same_v<E, bf16>)
            MULTIPLY("bf16");
        else
            MULTIPLY("f16");
    }
#undef MULTIPLY
    // N groups; `done` bytes of the activations are.
    template <int N> __device__ void multiply(uint32_t slot, int done) {
        uint4 w[N];
        uint2 a[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            w[j] = load_shared(slot + j * LANES * UNIT);
            a[j] = {load_word(x[0] + done + j * GROUP), load_word(x[0] + done + j * GROUP + 8)};
        }
#pragma unroll
        for (int j = 0; j < N; ++j) mma(c[0][j % 2], w[j], a[j]);
        if (!both) return;
#pragma unroll
        for (int j = 0; j < N; ++j)
            a[j] = {load_word(x[HALVES - 1] + done + j * GROUP), load_word(x[HALVES - 1] + done + j * GROUP + 8)};
#pragma unroll
        for (int j = 0; j < N; ++j) mma(c[HALVES - 1][j % 2], w[j], a[j]);
    }
    __device__ void store(float *to, int rows) {
        int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            if (t + 4 * half < rows)
                to[(t + 4 * half) * WARPS * TILE + g] =
                    (c[half][0][0] + c[half][0][3]) + (c[half][1][0] + c[half][1][3]);
    }
};
// Lane 4 g + t has a quarter of the sum of output g.
template <bool MANY> struct Tile<float, MANY> {
    static constexpr int ROWS = MANY ? MOST_ROWS : 1;
    uint32_t x;
    int pitch, rows;
    float c[ROWS];

    __device__ Tile(uint32_t at, int pitch, int rows) : x(at + lane_of() % 4 * UNIT), pitch(pitch), rows(rows) {}
    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) c[r] = 0.0f;
    }
    template <int N> __device__ void multiply(uint32_t slot, int done) {
#pragma unroll 1
        for (int j = 0; j < N; ++j) {
            uint4 w = load_shared(slot + j * LANES * UNIT);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (r < rows) {
                    uint4 a = load_shared(x + done + r * pitch + j * GROUP);
                    c[r] = fmaf(__uint_as_float(w.x), __uint_as_float(a.x), c[r]);
                    c[r] = fmaf(__uint_as_float(w.y), __uint_as_float(a.y), c[r]);
                    c[r] = fmaf(__uint_as_float(w.z), __uint_as_float(a.z), c[r]);
                    c[r] = fmaf(__uint_as_float(w.w), __uint_as_float(a.w), c[r]);
                }
        }
    }
    __device__ void store(float *to, int rows) {
        int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < rows) {
                c[r] += __shfl_xor_sync(~0u, c[r], 1);
                c[r] += __shfl_xor_sync(~0u, c[r], 2);
                if (t == 0) to[r * WARPS * TILE + g] = c[r];
            }
    }
};

// N groups in a slot, all the way.
template <int N, typename T> __device__ __forceinline__ void multiply(Ring &ring, T &tile, int bytes, int rows, int tiles, float *sums) {
#pragma unroll 1
    for (; tiles > 0; --tiles, sums += rows * WARPS * TILE) {
        tile.clear();
#pragma unroll 1
        for (int done = 0; done < bytes; done += N * GROUP) {
            wait_for_flag(ring.full + ring.next * Ring::FLAG, ring.round);
            tile.template multiply<N>(ring.slot(), done);
            __syncwarp();
            if (lane_of() == 0) raise_flag(ring.empty + ring.next * Ring::FLAG);
            ring.turn();
        }
        tile.store(sums, rows);
    }
}
// The products of some tiles: sums [tiles, rows, WARPS, TILE] of the warps that have a part. x: the warp's own part of the
// activations, rows `pitch` apart.
template <typename E, bool MANY>
__device__ void multiply(Ring &ring, const Share &share, uint32_t x, int pitch, int rows, int tiles, float *sums) {
    Tile<E, MANY> tile(x, pitch, rows);
    sums += warp_of() * TILE;
    int bytes = share.groups * GROUP;
    switch (share.size) {
    case 1: multiply<1>(ring, tile, bytes, rows, tiles, sums); break;
    case 2: multiply<2>(ring, tile, bytes, rows, tiles, sums); break;
    case 3: multiply<3>(ring, tile, bytes, rows, tiles, sums); break;
    case 4: multiply<4>(ring, tile, bytes, rows, tiles, sums); break;
    default: multiply<GROUPS>(ring, tile, bytes, rows, tiles, sums); break;
    }
}
