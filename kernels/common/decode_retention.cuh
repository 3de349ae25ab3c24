// What phases of retention are given, how the channels of the values are shared, and the norm of heads that lie in several
// blocks.
#pragma once
#include "decode_loop.cuh"

struct RetNetPhase : Phase {
    const float *weight; // RETAIN: [V] of the norm of a head, or null
    float *state;        // RETAIN: [slots, H, V, K], keys in the order of the turned pairs
    int activation;      // of the gate, or without one of the value
    int padding;
};

// What drafts leave for those who accept some of them, of each layer, for up to MOST_ROWS rows.
struct Draft {
    void *k, *v; // [R, H K] turned, [R, H V]
};

struct RetNetStep : Step {
    int heads, key, value, inner, gated;
    int divided, outside;
    float outer, head_eps;
    int padding;
    const uint64_t *turns;     // [K / 2] turns of a position, times 2^64; null: none
    const float *logs;         // [H] ln gamma
    const unsigned *positions; // [R / T]
    Word *qk, *z, *u;          // [R, H K, 2] pairs of words in turn, [R, H V], [R, I], elements
    Word *parts;               // [R, blocks + H] sums of o^2, f32
    const Draft *drafts;       // of each layer; or null
    int own_values, most_heads; // of shared memory: channels of a block, heads of a warp's part of them, at most
};

// The two numbers of a pair of words, times `scale` each.
template <typename E> __device__ __forceinline__ uint32_t scaled(uint32_t word, float scale) {
    union {
        uint32_t word;
        E at[PACK<E>];
    } u = {word};
#pragma unroll
    for (int i = 0; i < PACK<E>; ++i) u.at[i] = narrow<E>(widen(u.at[i]) * scale);
    return u.word;
}

// The warps' channels of the block's values in RETAIN, and how many a warp's part of a slot holds.
struct Columns {
    int all, each, most;

    __device__ Columns(const RetNetStep &p, const Share &share) : all(share.count), each((share.count + WARPS - 1) / WARPS) {
        most = min(TILE, int(Divide(share.row_bytes)(p.slot_bytes() / WARPS)));
    }
    // Of a warp, from its `start`th on.
    __device__ int first(int warp, int start) const { return min(warp * each + start, all); }
    __device__ int count(int warp, int start) const { return min(min(most, each - start), all - first(warp, start)); }
};

// The heads of a warp's channels of z: those of its part of each piece of the row, `each` channels.
struct Heads {
    int each, end, per; // the row's end; heads of a part at most
    int pieces;
    Divide by, by_piece;

    __device__ Heads(const RetNetStep &p, int each, int pieces, int end)
        : each(each), end(end), per(min(p.heads, (each + p.value - 2) / p.value + 1)), pieces(pieces), by(p.value),
          by_piece(WARPS * each) {}
    __device__ int begin(int piece) const { return min((piece * WARPS + warp_of()) * each, end - 1); }
    __device__ int count() const { return pieces * per; }
    // The n-th; a part that has fewer repeats its last.
    __device__ int head(int n) const {
        int piece = Divide(per)(n), first = begin(piece), last = min(first + each, end) - 1;
        return min(by(first) + n - piece * per, by(last));
    }
    // Which of them channel `k` is of.
    __device__ int place(int k) const {
        int piece = by_piece(k);
        return piece * per + by(k) - by(begin(piece));
    }
};

// The block that has a channel of the values.
__device__ __forceinline__ int block_of(int channel, int each, int extra) {
    int unit = channel / GRAIN, large = extra * (each + 1);
    return unit < large ? Divide(each + 1)(unit) : extra + Divide(max(each, 1))(unit - large);
}
// The scales of a warp's heads of z, [R, most_heads], behind the phase of mark `mark`. All lanes of a warp.
__device__ __forceinline__ void take_scales(const RetNetStep &p, const Rows &rows, uint32_t mark, const Heads &all,
                                            float *scales) {
    constexpr int PARTS = 3; // that a lane has in registers
    int units = p.heads * p.value / GRAIN, each = units / gridDim.x, extra = units - each * gridDim.x;
    int heads = all.count(), bits = 0;
    // a head of a row has 2^bits lanes
    while (heads << (bits + 1) <= rows.lanes) ++bits;
    int split = 1 << bits, own = rows.begin >> bits, at = rows.begin & (split - 1);
    const Word *row = p.copies.own(p.parts) + int64_t(rows.own) * (gridDim.x + p.heads);
#pragma unroll 1
    for (int start = 0; start < heads; start += rows.lanes >> bits) {
        bool live = rows.live && start + own < heads;
        float sum = 0.0f;
        if (live) {
            int head = all.head(start + own), last = block_of(head * p.value + p.value - 1, each, extra) + head;
#pragma unroll 1
            for (int part = block_of(head * p.value, each, extra) + head + at; part <= last; part += PARTS * split) {
                Word w[PARTS];
#pragma unroll
                for (int m = 0; m < PARTS; ++m)
                    if (part + m * split <= last) w[m] = peek(row + part + m * split);
#pragma unroll
                for (int m = 0; m < PARTS; ++m)
                    if (part + m * split <= last) {
                        while (mark_of(w[m]) != mark) w[m] = peek(row + part + m * split);
                        sum += __uint_as_float(uint32_t(w[m]));
                    }
            }
        }
#pragma unroll 1
        for (int step = split / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        sum /= p.value;
        if (live && at == 0)
            scales[rows.own * p.most_heads + start + own] =
                1.0f / (p.outside ? sqrtf(sum) + p.head_eps : sqrtf(sum + p.head_eps));
    }
    __syncwarp();
}
