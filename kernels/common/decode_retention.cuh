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

// A warp's channels of the block's values in RETAIN, and how many a slot holds.
struct Columns {
    int first, count, most;

    __device__ Columns(const RetNetStep &p, const Share &share, int warp) {
        int each = (share.count + WARPS - 1) / WARPS;
        first = min(warp * each, share.count), count = min(each, share.count - first);
        most = min(TILE, int(Divide(share.row_bytes)(p.slot_bytes())));
    }
};

// The block that has a channel of the values.
__device__ __forceinline__ int block_of(int channel, int each, int extra) {
    int unit = channel / GRAIN, large = extra * (each + 1);
    return unit < large ? Divide(each + 1)(unit) : extra + Divide(max(each, 1))(unit - large);
}
// The scales of the heads of z from channel `first` to before `end`, [R, most_heads], behind the phase of mark `mark`. All
// lanes of a warp.
__device__ __forceinline__ void take_scales(const RetNetStep &p, const Rows &rows, uint32_t mark, int first, int end,
                                            float *scales) {
    Divide by(p.value);
    int units = p.heads * p.value / GRAIN, each = units / gridDim.x, extra = units - each * gridDim.x;
    int first_head = by(first), heads = by(end - 1) - first_head + 1, bits = 0;
    // a head of a row has 2^bits lanes
    while (heads << (bits + 1) <= rows.lanes) ++bits;
    int split = 1 << bits, own = rows.begin >> bits, at = rows.begin & (split - 1);
    const Word *row = p.copies.own(p.parts) + int64_t(rows.own) * (gridDim.x + p.heads);
#pragma unroll 1
    for (int start = 0; start < heads; start += rows.lanes >> bits) {
        int head = first_head + start + own;
        bool live = rows.live && start + own < heads;
        float sum = 0.0f;
        if (live) {
            int last = block_of(head * p.value + p.value - 1, each, extra) + head;
#pragma unroll 1
            for (int part = block_of(head * p.value, each, extra) + head + at; part <= last; part += AT_ONCE * split) {
                Word w[AT_ONCE];
#pragma unroll
                for (int m = 0; m < AT_ONCE; ++m)
                    if (part + m * split <= last) w[m] = peek(row + part + m * split);
#pragma unroll
                for (int m = 0; m < AT_ONCE; ++m)
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
