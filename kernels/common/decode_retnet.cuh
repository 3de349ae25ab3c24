// What the phases of a RetNet block do beside their products; src/layers/retention and src/layers/mlp.rs have the formulas.
//
//   QUERY   q, k = W norm(stream), turned by the token's position, q divided by s_t
//   VALUE   v, g = W norm(stream): a block has the same channels of both, and keeps them for
//   RETAIN  S = gamma S + k v of these channels, o = K^-1/2 q S; z = o weight act(g), and the block's sum of o^2 of each head
//   ADD     of z times the reciprocal deviation of its head
//   UP      u = a act(b), a, b = W norm(stream); or act(a)
//   ADD     of u
//
// States go through the rings as weights do, a row for each channel of the values, and are written back from there. Nobody
// waits for q and k: VALUE lies between.
#pragma once
#include "activation.cuh"
#include "decode_retention.cuh"

enum { QUERY = OWN, VALUE, RETAIN, UP };

template <typename E, bool MANY> struct RetNet : Block<E, MANY> {
    using Base = Block<E, MANY>;
    using Element = E;
    using Task = ::Task<MANY>;
    using Phase = RetNetPhase;
    using Step = RetNetStep;
    struct Ahead {
        float cos, sin, factor, weight, bias; // see prepare
        int slot;
    };
    static constexpr int LAYER = 6; // phases
    static constexpr int HINTS = 5;
    template <typename F> static __device__ __forceinline__ void with(int kind, F &&f) {
        among<ADD, UP>(kind, f);
    }
    const Step &p;
    float *own_v, *own_g; // [R, own_values]; v becomes o
    float *decays;        // [H] gamma
    unsigned *positions;  // [R / T], of the first step

    __device__ RetNet(const Step &p, Board &board, uint32_t mark) : Base{p, board, mark}, p(p) {}
    template <typename Room> __device__ void make_rooms(Room &&room) {
        int own_bytes = this->rows() * p.own_values * sizeof(float);
        own_v = reinterpret_cast<float *>(room(own_bytes));
        own_g = reinterpret_cast<float *>(room(own_bytes));
        room(WARPS * this->rows() * p.most_heads * sizeof(float)); // see scales
        decays = reinterpret_cast<float *>(room(p.heads * sizeof(float)));
        positions = reinterpret_cast<unsigned *>(room(MOST_ROWS * sizeof(unsigned)));
#pragma unroll 1
        for (int h = threadIdx.x; h < p.heads; h += THREADS) decays[h] = expf(p.logs[h]);
        if (threadIdx.x < this->sequences()) positions[threadIdx.x] = p.positions[threadIdx.x];
    }
    // [R, most_heads] of the warp: those of all lie before the decays
    __device__ float *scales() const { return decays - (WARPS - warp_of()) * this->rows() * p.most_heads; }
    static __device__ bool takes_norm(int kind) { return kind == QUERY || kind == UP || kind == HEAD; }
    static __device__ bool is_for_all(int kind) { return kind == QUERY; }
    static __device__ bool is_whole(int) { return false; }

    struct Source : Filler {
        const Step &p;
        int first; // the first sequence's slot

        __device__ Source(const Step &p, Ring &ring, int warp) : Filler(ring, warp), p(p), first(p.slots[0]) {}
        __device__ void copy(const Weights &weights, const Share &share) {
            if (share.form != POOL) return Filler::copy<true>(weights, share);
            Filler::follow();
            Columns columns(p, share);
            int sequences = MANY ? p.rows / p.tokens : 1;
#pragma unroll 1
            for (int s = 0; s < sequences; ++s) {
                int slot = s == 0 ? first : p.slots[s];
                if (slot < 0) continue;
                const char *from = weights.data + (int64_t(slot) * share.outputs + share.first) * share.row_bytes;
#pragma unroll 1
                for (int start = 0; start < columns.each; start += columns.most)
                    fill<false>(WARPS, p.slot_bytes() / WARPS, 0, [&](int warp, int &bytes) {
                        bytes = columns.count(warp, start) * share.row_bytes;
                        return from + int64_t(columns.first(warp, start)) * share.row_bytes;
                    });
            }
        }
    };
    static __device__ void hints(const Step &p, const Phase &phase, const Share &share, int part) {
        const void *from = nullptr;
        int bytes = 0;
        if (part < 2 && phase.bias && part < share.segments) {
            from = static_cast<const E *>(phase.bias) + part * share.outputs + share.first, bytes = share.count * sizeof(E);
        } else if (part == 2 && takes_norm(phase.kind)) {
            from = phase.norm.weight, bytes = p.hidden * sizeof(float);
        } else if (part == 3 && takes_norm(phase.kind)) {
            from = phase.norm.bias, bytes = p.hidden * sizeof(float);
        } else if (part == 4) {
            from = phase.weight, bytes = p.value * sizeof(float);
        }
        if (from && bytes > 0) hint(from, bytes);
    }

    __device__ void begin(const Phase &, const Share &, Ahead &) {}
    // The turn of an output of QUERY at a position, and the factor of a query.
    __device__ void turn(const Task &task, int t, Ahead &ahead) {
        ahead.cos = 1.0f, ahead.sin = 0.0f, ahead.factor = 1.0f;
        if (!task.live) return;
        unsigned position = positions[task.sequence] + this->board.steps[task.sequence] + t;
        int head = Divide(p.key)(task.output), pair = (task.output - head * p.key) / 2;
        if (p.turns) {
            // signed half turns, of which 32 bits are as exact as an f32 can tell
            int phase = int(uint64_t(position) * p.turns[pair] >> 32);
            sincospif(float(phase) * 4.656612873077393e-10f, &ahead.sin, &ahead.cos); // 2^-31
            if (task.output % 2 == 0) ahead.sin = -ahead.sin;
        }
        if (p.divided && task.segment == 0) {
            float log = p.logs[head], count = float(position) + 1.0f;
            ahead.factor = rsqrtf(log == 0.0f ? count : expm1f(count * log) / expm1f(log));
        }
    }
    template <typename K>
    __device__ void prepare(K kind, const Phase &phase, const Share &share, const Task &task, Ahead &ahead) {
        if (kind == QUERY) {
            if (!MANY) turn(task, 0, ahead);
        } else if (kind == RETAIN) {
            ahead.slot = this->board.slots[task.sequence];
            ahead.weight = 1.0f;
            if (task.live && phase.weight) ahead.weight = phase.weight[task.output - Divide(p.value)(task.output) * p.value];
        } else if (kind == UP) {
            ahead.bias = 0.0f;
            if (task.live && phase.bias && share.segments > 1)
                ahead.bias = widen(static_cast<const E *>(phase.bias)[share.outputs + task.output]);
        }
    }

    // Queries and keys of the heads of the block's values, for all warps: pairs of words [heads, R, K / PACK].
    __device__ void take_queries(const Share &share) {
        constexpr int COUNT = 2;
        int row_pairs = p.key / PACK<E>, first = Divide(p.value)(share.first);
        int heads = Divide(p.value)(share.first + share.count - 1) - first + 1, rows = this->rows();
        Divide by_pairs(row_pairs), by_rows(rows);
#pragma unroll 1
        for (int start = threadIdx.x; start < heads * rows * row_pairs; start += COUNT * THREADS) {
            Words w[COUNT];
            const Word *from[COUNT];
#pragma unroll
            for (int m = 0; m < COUNT; ++m) {
                int n = start + m * THREADS, line = by_pairs(n), head = rows == 1 ? line : by_rows(line);
                from[m] = p.copies.own(p.qk) +
                          2 * ((int64_t(line - head * rows) * p.heads + first + head) * row_pairs + n - line * row_pairs);
                if (n < heads * rows * row_pairs) w[m] = peek_two(from[m]);
            }
#pragma unroll
            for (int m = 0; m < COUNT; ++m) {
                int n = start + m * THREADS;
                if (n >= heads * rows * row_pairs) break;
                while (mark_of(w[m].at[0]) != this->mark - 2 || mark_of(w[m].at[1]) != this->mark - 2)
                    w[m] = peek_two(from[m]);
                *reinterpret_cast<uint2 *>(this->all_x() + n * 8) = {uint32_t(w[m].at[0]), uint32_t(w[m].at[1])};
            }
        }
        // v is there too
        meet();
    }
    // Scales z on its way.
    struct Scaling {
        RetNet &b;
        bool any;
        Heads heads;

        __device__ Scaling(RetNet &b, const Phase &phase, const Share &share)
            : b(b), any(phase.from == b.p.z), heads(b.p, share.size * int(GROUP / sizeof(E)), share.pieces, phase.width) {}
        __device__ void begin() const {
            if (any) take_scales(b.p, Rows(b.rows()), b.mark - 1, heads, b.scales());
        }
        __device__ uint2 operator()(int row, int at, uint2 pair) const {
            if (!any) return pair;
            float factor = b.scales()[row * b.p.most_heads + heads.place(at * int(8 / sizeof(E)))];
            return {scaled<E>(pair.x, factor), scaled<E>(pair.y, factor)};
        }
    };

    __device__ Input input(int kind, const Share &share) const { return this->input_of(share, kind != ADD); }
    __device__ void take(int kind, const Phase &phase, const Share &share) {
        if (kind == RETAIN) take_queries(share);
        if (kind == ADD && warp_of() < share.warps) Base::take(phase, share, Scaling(*this, phase, share));
    }

    // States of the sequences' channels through the ring, and q S behind every token in the place of v.
    __device__ void retain(Ring &ring, const Phase &phase, const Share &share) {
        constexpr int TOKENS = MANY ? MOST_ROWS : 1, LINE = 4 / PACK<E> * 8; // bytes of q and k for four keys
        Columns columns(p, share);
        int first_head = Divide(p.value)(share.first), sequences = this->sequences(), pitch = p.key / 4 * LINE;
#pragma unroll 1
        for (int s = 0, row = 0; s < sequences; ++s, row += this->tokens()) {
            int slot = this->board.slots[s];
            if (slot == IDLE) continue;
            bool keep = p.keep && slot >= 0; // the state of a row that has ended comes, and stays
#pragma unroll 1
            for (int start = 0; start < columns.each; start += columns.most) {
                // lanes share the slot's channels
                int count = columns.count(warp_of(), start);
                Rows lanes(count);
                int own = columns.first(warp_of(), start) + lanes.own, channel = share.first + own;
                float o[TOKENS] = {};
                ring.wait_full();
                if (lanes.live) {
                    int head = Divide(p.value)(channel);
                    float decay = decays[head], *v = own_v + row * p.own_values + own;
                    const char *x = this->all_x() + ((head - first_head) * this->rows() + row) * pitch;
                    uint32_t from = ring.slot() + warp_of() * (p.slot_bytes() / WARPS) + lanes.own * share.row_bytes;
                    float *to = phase.state + (int64_t(slot) * p.heads * p.value + channel) * p.key;
#pragma unroll(MANY ? 1 : 8 / int(sizeof(E)))
                    for (int key = lanes.begin * 4; key < p.key; key += lanes.lanes * 4) {
                        uint4 bits = load_shared(from + key * 4);
                        float h[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                                      __uint_as_float(bits.w)};
#pragma unroll
                        for (int t = 0; t < TOKENS; ++t) {
                            if (MANY && t >= this->tokens()) break;
                            // pairs of words: of q, of k, in turn
                            E qk[2][4];
                            const uint2 *at = reinterpret_cast<const uint2 *>(x + t * pitch + key / 4 * LINE);
#pragma unroll
                            for (int i = 0; i < 4 / PACK<E>; ++i)
                                *reinterpret_cast<uint2 *>(&qk[i % 2][i / 2 * 2 * PACK<E>]) = at[i];
                            float value = v[t * p.own_values];
#pragma unroll
                            for (int i = 0; i < 4; ++i) {
                                h[i] = fmaf(decay, h[i], widen(qk[1][i]) * value);
                                o[t] = fmaf(widen(qk[0][i]), h[i], o[t]);
                            }
                        }
                        if (keep) __stcs(reinterpret_cast<float4 *>(to + key), make_float4(h[0], h[1], h[2], h[3]));
                    }
                }
                ring.release();
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    if (MANY && t >= this->tokens()) break;
#pragma unroll 1
                    for (int step = lanes.lanes / 2; step > 0; step /= 2) o[t] += __shfl_xor_sync(~0u, o[t], step);
                    if (lanes.live && lanes.begin == 0) own_v[(row + t) * p.own_values + own] = o[t];
                }
            }
        }
    }
    __device__ void products(int kind, Ring &ring, const Phase &phase, const Share &share, Product<E, MANY> &product, int tiles) {
        if (kind == RETAIN)
            retain(ring, phase, share);
        else
            product.multiply(ring, this->rows(), tiles, this->sums);
    }

    // Whole warps, for words of two lanes and for pairs.
    template <typename K>
    __device__ void finish(K kind, const Phase &phase, const Share &share, const Task &task, Ahead &ahead) {
        if (kind == QUERY)
            query(phase, share, task, ahead);
        else if (kind == VALUE)
            keep_values(phase, share, task);
        else if (kind == RETAIN)
            output(phase, task, ahead);
        else if (kind == UP)
            up(phase, share, task, ahead);
        else if (kind == ADD)
            add(*this, share, task);
        else
            head(*this, share, task);
    }
    __device__ void query(const Phase &phase, const Share &share, const Task &task, Ahead &ahead) {
        // words of a row: pairs of q and k in turn
        int width = p.heads * p.key, pair = task.output / (2 * PACK<E>), word = task.output / PACK<E> % 2;
        Word *to = p.qk + 2 * int64_t(task.row) * (width / PACK<E>) + (2 * pair + task.segment) * 2 + word;
#pragma unroll 1
        for (int t = 0; t < this->tokens(); ++t, to += 2 * (width / PACK<E>)) {
            if (MANY) turn(task, t, ahead);
            float x = ahead.factor * widen(narrow<E>(task.value(share, t))), other = __shfl_xor_sync(~0u, x, 1);
            float y = fmaf(x, ahead.cos, other * ahead.sin), next = __shfl_down_sync(~0u, y, 1);
            if (!task.live) continue;
            if (task.own % PACK<E> == 0) p.copies.publish(to, pack(narrow<E>(y), narrow<E>(next)), this->mark);
            if (!p.keep && task.segment)
                static_cast<E *>(p.drafts[phase.layer].k)[int64_t(task.row + t) * width + task.output] = narrow<E>(y);
        }
    }
    __device__ void keep_values(const Phase &phase, const Share &share, const Task &task) {
        if (!task.live) return;
#pragma unroll 1
        for (int t = 0; t < this->tokens(); ++t) {
            E value = narrow<E>(task.value(share, t));
            (task.segment ? own_g : own_v)[(task.row + t) * p.own_values + task.own] = widen(value);
            if (!p.keep && !task.segment)
                static_cast<E *>(p.drafts[phase.layer].v)[int64_t(task.row + t) * p.heads * p.value + task.output] = value;
        }
    }
    __device__ void output(const Phase &phase, const Task &task, Ahead &ahead) {
        int at = task.row * p.own_values + task.own;
        Word *to = p.z + (int64_t(task.row) * p.heads * p.value + task.output) / PACK<E>;
#pragma unroll 1
        for (int t = 0; t < this->tokens(); ++t, at += p.own_values, to += p.heads * p.value / PACK<E>) {
            float o = task.live && ahead.slot >= 0 ? p.outer * own_v[at] : 0.0f, z = o * ahead.weight;
            if (p.gated && task.live) z *= activated(phase.activation, own_g[at]);
            float next = __shfl_down_sync(~0u, z, 1);
            if (!task.live) continue;
            if (task.own % PACK<E> == 0) p.copies.publish(to, pack(narrow<E>(z), narrow<E>(next)), this->mark);
            own_v[at] = o;
        }
    }
    __device__ void up(const Phase &phase, const Share &share, const Task &task, Ahead &ahead) {
        Word *to = p.u + (int64_t(task.row) * p.inner + task.output) / PACK<E>;
        const float *second = task.sum + share.tiles * this->rows() * WARPS * TILE;
        bool live = task.live && task.segment == 0;
#pragma unroll 1
        for (int t = 0; t < this->tokens(); ++t, to += p.inner / PACK<E>, second += WARPS * TILE) {
            float u = widen(narrow<E>(task.value(share, t)));
            if (live && share.segments > 1)
                u *= activated(phase.activation, widen(narrow<E>(sum_of_warps(share, second, TILE) + ahead.bias)));
            else
                u = activated(phase.activation, u);
            float next = __shfl_down_sync(~0u, u, 1);
            if (live && task.own % PACK<E> == 0) p.copies.publish(to, pack(narrow<E>(u), narrow<E>(next)), this->mark);
        }
    }
    // Sums of squares of the block's part of each head.
    template <typename W> __device__ void end(int kind, const Phase &, const Share &share, Ahead &, W &&) {
        if (kind != RETAIN) return;
        this->meet_finishers();
        Divide by(p.value);
        int first = by(share.first), heads = by(share.first + share.count - 1) - first + 1;
#pragma unroll 1
        for (int n = this->finisher() / LANES; n < this->rows() * heads; n += this->FINISH_THREADS / LANES) {
            int row = heads == 1 ? n : Divide(heads)(n), head = first + n - row * heads;
            int begin = max(head * p.value - share.first, 0), end = min((head + 1) * p.value - share.first, share.count);
            const float *o = own_v + row * p.own_values;
            float sum = 0.0f;
#pragma unroll 1
            for (int i = begin + lane_of(); i < end; i += LANES) sum = fmaf(o[i], o[i], sum);
            sum = warp_sum(sum);
            if (lane_of() == 0)
                p.copies.publish(p.parts + row * (gridDim.x + p.heads) + blockIdx.x + head, __float_as_uint(sum), this->mark);
        }
    }
};
