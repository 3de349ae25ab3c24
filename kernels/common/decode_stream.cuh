// A block's share of the weights, streamed through shared memory, and the products with them.
//
// The blocks share a matrix's outputs, the warps of a block its rows' bytes: a warp multiplies the same part of every row,
// and what it found is added up in the order of the warps. Weights depend on nothing, so that other warps copy them, one for
// each, through all phases in order and as far ahead as the ring of slots goes.
#pragma once
#include "decode.cuh"

constexpr int TILE = 8;         // outputs
constexpr int UNIT = 16;        // bytes of a copy
constexpr int GROUP = 4 * UNIT; // bytes of a row in a step of products: those of four lanes
constexpr int GROUPS = 5;       // in a piece, at most
constexpr int SLOT = GROUPS * TILE * GROUP;
constexpr int MOST_SLOTS = 8;
constexpr int GRAIN = 2; // outputs are shared by the blocks in pairs

// `segments` matrices of `outputs` rows one below the other, all shared by the blocks alike; the first block's share goes
// to block `turn`.
struct Shape {
    int row_bytes, outputs, segments, turn;
};

// Weights of one phase.
struct alignas(16) Weights {
    const char *data;
    int shape; // one of the step's
};

// A block's share of a shape.
struct alignas(16) Share {
    int row_bytes, outputs, first, count; // of each segment; the block's outputs
    int tiles, all_tiles;                 // of each segment, of all
    int groups, pieces, size;             // of a row for each warp; in how many pieces, of how many groups
    int warps;                            // that have any
    int segments, padding;

    __device__ explicit Share(const Shape &shape)
        : row_bytes(shape.row_bytes), outputs(shape.outputs), segments(shape.segments) {
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
        warps = (all + groups - 1) / groups;
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

// A barrier in shared memory, for those who fill a slot or for the one who has read it.
struct Flag {
    uint64_t bits;

    __device__ void begin(int count) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&bits)), "r"(count) : "memory");
    }
    // Behind all of the lane's copies.
    __device__ void raise_behind_copies() {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&bits)) : "memory");
    }
    __device__ void raise() {
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(&bits))
                     : "memory");
    }
    __device__ bool is_raised(int parity) {
        uint32_t done;
        asm volatile("{ .reg .pred p; "
#if __CUDA_ARCH__ >= 900
                     "mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
#else
                     "mbarrier.test_wait.parity.shared.b64 p, [%1], %2; "
#endif
                     "selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(&bits)), "r"(parity)
                     : "memory");
        return done;
    }
    __device__ void wait(int parity) {
        while (!is_raised(parity)) {}
    }
};

// A warp's slots. Filled and read in turn; `round` is how often all have been.
struct Ring {
    char *slots; // the lane's own place in the first
    Flag *full, *empty;
    int size, next = 0, round = 0;

    __device__ char *slot() const { return slots + next * SLOT; }
    __device__ void turn() {
        if (++next == size) next = 0, round ^= 1;
    }
};

// Copies a warp's part of a phase's weights.
__device__ __forceinline__ void copy_weights(Ring &ring, const Weights &weights, const Share &share, int warp) {
    int row = lane_of() / 4, unit = warp * share.groups * 4 + lane_of() % 4;
    const char *segment = weights.data + int64_t(share.first + row) * share.row_bytes + unit * UNIT;
#pragma unroll 1
    for (int s = 0; s < share.segments; ++s, segment += int64_t(share.outputs) * share.row_bytes) {
        const char *from = segment;
#pragma unroll 1
        for (int left = share.count - row, tile = 0; tile < share.tiles; ++tile, left -= TILE) {
            int bytes = share.row_bytes - unit * UNIT;
#pragma unroll 1
            for (int done = 0; done < share.groups; done += share.size, bytes -= share.size * GROUP) {
                int groups = min(share.size, share.groups - done);
                ring.empty[ring.next].wait(ring.round ^ 1);
                uint32_t to = shared_address(ring.slot());
#pragma unroll
                for (int j = 0; j < GROUPS; ++j)
                    if (left > 0 && j < groups)
                        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to + j * LANES * UNIT),
                                     "l"(from + (done + j) * GROUP), "r"(bytes > j * GROUP ? UNIT : 0)
                                     : "memory");
                ring.full[ring.next].raise_behind_copies();
                ring.turn();
            }
            from += TILE * share.row_bytes;
        }
    }
}

// Sums of a tile: outputs times rows. Lane 4 g + t has row g and outputs 2 t, 2 t + 1 where tensor cores multiply;
// output g and a quarter of the sum for f32.
template <typename E> struct Tile {
    float c[2][4];
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = 0.0f;
    }
#define MULTIPLY(KIND)                                                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, "     \
                 "{%7, %8}, {%0, %1, %2, %3};"                                                                          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                       \
                 : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1))
    static __device__ void mma(float (&c)[4], uint32_t a0, uint32_t a2, uint32_t b0, uint32_t b1) {
        if constexpr (std::is_same_v<E, bf16>)
            MULTIPLY("bf16");
        else
            MULTIPLY("f16");
    }
#undef MULTIPLY
    // x: row 0's activations of the lane in the piece. The sum's order is free, so that a lane's eight numbers of 16
    // bytes make operands of two products as they lie.
    __device__ void multiply(const char *slot, const char *x, int pitch, int rows, int groups) {
        int g = lane_of() / 4;
        const char *own = x + g * pitch;
        uint4 w[GROUPS], a[GROUPS];
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
            w[j] = a[j] = {};
            if (j < groups) w[j] = *reinterpret_cast<const uint4 *>(slot + j * LANES * UNIT);
            if (j < groups && g < rows) a[j] = *reinterpret_cast<const uint4 *>(own + j * GROUP);
        }
#pragma unroll
        for (int j = 0; j < GROUPS; ++j) {
            mma(c[0], a[j].x, a[j].y, w[j].x, w[j].y);
            mma(c[1], a[j].z, a[j].w, w[j].z, w[j].w);
        }
    }
    __device__ void store(float *to, int rows) {
        int g = lane_of() / 4, t = lane_of() % 4;
        if (g < rows) *reinterpret_cast<float2 *>(to + g * TILE + 2 * t) = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
    }
};
template <> struct Tile<float> {
    float c[MOST_ROWS];
    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < MOST_ROWS; ++r) c[r] = 0.0f;
    }
    __device__ void multiply(const char *slot, const char *x, int pitch, int rows, int groups) {
#pragma unroll 1
        for (int j = 0; j < groups; ++j) {
            float4 w = *reinterpret_cast<const float4 *>(slot + j * LANES * UNIT);
#pragma unroll
            for (int r = 0; r < MOST_ROWS; ++r)
                if (r < rows) {
                    float4 a = *reinterpret_cast<const float4 *>(x + r * pitch + j * GROUP);
                    c[r] = fmaf(w.x, a.x, fmaf(w.y, a.y, fmaf(w.z, a.z, fmaf(w.w, a.w, c[r]))));
                }
        }
    }
    __device__ void store(float *to, int rows) {
        int g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll
        for (int r = 0; r < MOST_ROWS; ++r)
            if (r < rows) {
                c[r] += __shfl_xor_sync(~0u, c[r], 1);
                c[r] += __shfl_xor_sync(~0u, c[r], 2);
                if (t == 0) to[r * TILE + g] = c[r];
            }
    }
};

// The products of some tiles: sums [tiles, WARPS, rows, TILE] of the warps that have a part. x: the warp's own part of the
// activations.
template <typename E>
__device__ void multiply(Ring &ring, const Share &share, const char *x, int pitch, int rows, int tiles, float *sums) {
    x += lane_of() % 4 * UNIT;
    sums += warp_of() * rows * TILE;
    Tile<E> tile;
#pragma unroll 1
    for (; tiles > 0; --tiles) {
        tile.clear();
#pragma unroll 1
        for (int done = 0; done < share.groups; done += share.size) {
            ring.full[ring.next].wait(ring.round);
            tile.multiply(ring.slot(), x + done * GROUP, pitch, rows, min(share.size, share.groups - done));
            __syncwarp();
            if (lane_of() == 0) ring.empty[ring.next].raise();
            ring.turn();
        }
        tile.store(sums, rows);
        sums += WARPS * rows * TILE;
    }
}
