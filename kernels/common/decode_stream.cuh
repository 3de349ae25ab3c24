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
constexpr int MOST_GROUPS = 10; // in a slot, of a row
constexpr int MOST_SLOTS = 16;
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
        warps = form == POOL ? WARPS : (all + groups - 1) / groups;
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
// Hopper copies long parts of rows without the lanes, which a short one is not worth: each takes 25 cycles.
#if __CUDA_ARCH__ >= 900
constexpr int BULK_GROUPS = 8;
// By one lane for all, behind so many bytes of bulk copies.
__device__ __forceinline__ void raise_flag_behind_bytes(uint32_t flag, int bytes) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; "
                 "mbarrier.arrive.shared.b64 state, [%0], %2; }" ::"r"(flag),
                 "r"(bytes), "n"(LANES - 1)
                 : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const char *from, int bytes, uint32_t flag, uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
                     "r"(to), "l"(from), "r"(bytes), "r"(flag), "l"(policy)
                 : "memory");
}
#else
constexpr int BULK_GROUPS = 1 << 30;
__device__ __forceinline__ void raise_flag_behind_bytes(uint32_t, int) {}
__device__ __forceinline__ void copy_bulk(uint32_t, const char *, int, uint32_t, uint64_t) {}
#endif
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

// A warp's slots, filled and read in turn; the rows of a tile in a slot are pitch_of their groups apart. Shared addresses;
// `round` is how often all have been, modulo 2.
struct Ring {
    uint32_t slots, full, empty; // the first slot; flags of all
    int size, bytes, next = 0, round = 0;
    uint64_t policy; // weights come once a step: they leave L2 to what stays

    __device__ Ring(uint32_t slots, uint32_t flags, int size, int bytes, int warp) : size(size), bytes(bytes) {
        this->slots = slots + warp * size * bytes;
        full = flags + warp * 2 * MOST_SLOTS * FLAG, empty = full + MOST_SLOTS * FLAG;
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    static constexpr int FLAG = sizeof(uint64_t);
    static constexpr int FLAGS = WARPS * 2 * MOST_SLOTS;

    __device__ uint32_t slot() const { return slots + next * bytes; }
    __device__ void turn() {
        if (++next == size) next = 0, round ^= 1;
    }
    __device__ void wait_full() const { wait_for_flag(full + next * FLAG, round); }
    // The warp has read the slot.
    __device__ void release() {
        __syncwarp();
        if (lane_of() == 0) raise_flag(empty + next * FLAG);
        turn();
    }
    // Fills the next slot with `groups` from `rows` rows of a tile, which begin at `from`, the `row`th being the lane's own;
    // zeros where there are fewer bytes.
    __device__ void fill(const char *from, int row, int groups, int bytes, int rows) {
        wait_for_flag(empty + next * FLAG, round ^ 1);
        uint32_t to = slot() + row * pitch_of(groups), flag = full + next * FLAG;
        if (groups >= BULK_GROUPS) {
            int whole = groups * GROUP;
            bytes = max(0, min(bytes, whole));
            if (bytes < whole) {
#pragma unroll 1
                for (int at = bytes; at < whole; at += UNIT)
                    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to + at), "r"(0) : "memory");
                fence_bulk();
            }
            if (lane_of() == 0) raise_flag_behind_bytes(flag, rows * bytes);
            __syncwarp();
            if (lane_of() < rows && bytes > 0) copy_bulk(to, from, bytes, flag, policy);
        } else {
            int unit = lane_of() % 4 * UNIT;
            to += unit, from += unit, bytes -= unit;
            constexpr int AT_ONCE = 5;
#pragma unroll 1
            for (; groups > 0; groups -= AT_ONCE, to += AT_ONCE * GROUP, from += AT_ONCE * GROUP, bytes -= AT_ONCE * GROUP)
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j)
                    if (row < rows && j < groups) copy_unit(to + j * GROUP, from + j * GROUP, bytes > j * GROUP ? UNIT : 0);
            raise_flag_behind_copies(flag);
        }
        turn();
    }
    // Fills it with one row of so many bytes.
    __device__ void fill(const char *from, int bytes) {
        wait_for_flag(empty + next * FLAG, round ^ 1);
        uint32_t to = slot(), flag = full + next * FLAG;
        if (bytes >= BULK_GROUPS * GROUP) {
            if (lane_of() == 0) raise_flag_behind_bytes(flag, bytes), copy_bulk(to, from, bytes, flag, policy);
        } else {
#pragma unroll 1
            for (int at = lane_of() * UNIT; at < bytes; at += LANES * UNIT) copy_unit(to + at, from + at, UNIT);
            raise_flag_behind_copies(flag);
        }
        turn();
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
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
        __syncwarp();
    }
};

// Copies the parts of two warps of a phase's weights. PAIRS: rows may go in pairs.
template <bool PAIRS>
__device__ __forceinline__ void copy_weights(Ring &one, Ring &other, const Weights &weights, const Share &share, int warp) {
    int row = share.size >= BULK_GROUPS ? lane_of() % TILE : lane_of() / 4;
    int begin = warp * share.groups * GROUP, apart = COPIERS * share.groups * GROUP;
    bool both = warp + COPIERS < share.warps;
    const char *segment = weights.data + begin;
#pragma unroll 1
    for (int s = 0; s < share.segments; ++s, segment += weights.apart) {
        const char *from = segment + int64_t(share.first + row) * share.row_bytes;
#pragma unroll 1
        for (int left = share.count, tile = 0; tile < share.tiles; ++tile, left -= TILE) {
            int bytes = share.row_bytes - begin, rows = min(left, TILE);
            if (PAIRS && share.form > 0)
                from = segment + int64_t(share.source(share.first + tile * TILE + row)) * share.row_bytes;
#pragma unroll 1
            for (int done = 0; done < share.groups; done += share.size, bytes -= share.size * GROUP) {
                one.fill(from + done * GROUP, row, share.size, bytes, rows);
                if (both) other.fill(from + apart + done * GROUP, row, share.size, bytes - apart, rows);
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
        constexpr int AT_ONCE = MANY && N > 5 ? (N + 1) / 2 : N;
#pragma unroll
        for (int first = 0; first < N; first += AT_ONCE) {
            uint4 w[AT_ONCE];
            uint2 a[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE && first + j < N; ++j) w[j] = load_shared(slot + (first + j) * GROUP);
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                if (half && !both) break;
                uint32_t from = x[half] + done + first * GROUP;
#pragma unroll
                for (int j = 0; j < AT_ONCE && first + j < N; ++j)
                    a[j] = {load_word(from + j * GROUP), load_word(from + j * GROUP + 8)};
#pragma unroll
                for (int j = 0; j < AT_ONCE && first + j < N; ++j) mma(c[half][j % 2], w[j], a[j]);
            }
        }
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
            uint4 w = load_shared(slot + j * GROUP);
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
template <int N, typename T>
__device__ __forceinline__ void multiply(Ring &ring, T &tile, int bytes, int rows, int tiles, float *sums) {
    uint32_t own = lane_of() / 4 * pitch_of(N) + lane_of() % 4 * UNIT;
#pragma unroll 1
    for (; tiles > 0; --tiles, sums += rows * WARPS * TILE) {
        tile.clear();
#pragma unroll 1
        for (int done = 0; done < bytes; done += N * GROUP) {
            ring.wait_full();
            tile.template multiply<N>(ring.slot() + own, done);
            ring.release();
        }
        tile.store(sums, rows);
    }
}
// The products of some tiles: sums [tiles, rows, WARPS, TILE] of the warps that have a part. x: the warp's own part of the
// activations, rows `pitch` apart. A number of groups in a slot has code of its own.
template <typename E, bool MANY, int N = 1>
__device__ __forceinline__ void multiply(Ring &ring, const Share &share, Tile<E, MANY> &tile, int rows, int tiles, float *sums) {
    if (N == MOST_GROUPS || share.size == N)
        return multiply<N>(ring, tile, share.groups * GROUP, rows, tiles, sums);
    if constexpr (N < MOST_GROUPS) multiply<E, MANY, N + 1>(ring, share, tile, rows, tiles, sums);
}
template <typename E, bool MANY>
__device__ void multiply(Ring &ring, const Share &share, uint32_t x, int pitch, int rows, int tiles, float *sums) {
    Tile<E, MANY> tile(x, pitch, rows);
    multiply<E, MANY>(ring, share, tile, rows, tiles, sums + warp_of() * TILE);
}
