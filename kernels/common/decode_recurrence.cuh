// STATE of a Mamba block, and what it shares with the other phases (decode_mamba.cuh): arguments, and the recurrence through a
// pool's states. src/ops/selective_scan has the formula.
#pragma once
#include "decode_loop.cuh"

struct MambaPhase : Phase {
    const float *taps, *shift;    // MIX: [D, taps], [D] or null
    float *window;                // MIX: [slots, D, taps - 1]
    const float *a, *d, *dt_bias; // STATE: [D, N], [D], [D]
    const float *inner[3];        // STATE: weights of the norms of dt, B and C; null: ones
    float *state;                 // STATE: [slots, D, N]
};

// What drafts leave for those who accept some of them, of each layer, for up to MOST_ROWS rows.
struct Draft {
    void *x, *u;    // [R, D], before and behind the convolution
    void *selected; // [R, rank + 2 N], behind the inner norms
    void *delta;    // [R, D]
};

struct MambaStep : Step {
    int channels, states, rank, filter, normed;
    float inner_eps;
    Word *u, *y, *selected; // [R, D], [R, D], [R, rank + 2 N], elements
    const Draft *drafts;    // of each layer; or null
    int own_channels, padding; // channels of a block at most
};

// What a thread loads before its phase's inputs are there.
constexpr int EARLY = 10;
using Early = float[EARLY];

constexpr int NUMBERS = 4; // of a state, in a lane
static_assert(2 * NUMBERS + 2 <= EARLY, "what is loaded early has room");

// A lane's numbers of a channel's state.
struct Part {
    int first, count; // not clamped to four, see selective_scan_step.cu
    bool whole;       // all states are whole fours

    __device__ Part(int states, int lane)
        : first(lane * NUMBERS), count(states - first), whole(states % NUMBERS == 0 && count > 0) {}
    __device__ void load(float *to, const float *from) const {
        if (whole) {
            float4 v = *reinterpret_cast<const float4 *>(from + first);
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i) to[i] = i < count ? from[first + i] : 0.0f;
        }
    }
    __device__ void store(float *to, const float *from) const {
        if (whole) {
            *reinterpret_cast<float4 *>(to + first) = make_float4(from[0], from[1], from[2], from[3]);
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i)
                if (i < count) to[first + i] = from[i];
        }
    }
};

// A channel of a sequence.
struct Channel {
    int own, channel, sequence, slot;
    int place; // of its numbers in those of a sequence
    float *state;
    float u, gate; // of the only row there is
};

template <typename E, bool MANY> struct Mamba;

// The recurrence: a state of N numbers lies in `split` lanes.
template <typename E, bool MANY> struct Recurrence {
    Mamba<E, MANY> &b;
    const MambaPhase &phase;
    const Share &share;
    int tasks, split, bits, lane, group;
    bool whole; // a lane has four numbers of a state or none, and B and C lie so that it can have them at once

    __device__ Recurrence(Mamba<E, MANY> &b, const MambaPhase &phase, const Share &share)
        : b(b), phase(phase), share(share) {
        tasks = b.sequences() * share.count;
        bits = LANES - __clz((b.p.states - 1) / NUMBERS), split = 1 << bits;
        lane = b.finisher() & (split - 1), group = b.finisher() >> bits;
        whole = b.p.states % NUMBERS == 0 && b.p.rank % NUMBERS == 0;
    }
    // Threads of whole warps have tasks, some of them none that counts.
    __device__ bool has(int task) const { return (task & ~((LANES >> bits) - 1)) < tasks; }
    __device__ Channel find(int task) const {
        task = min(task, tasks - 1);
        Channel c;
        c.sequence = Divide(share.count)(task);
        c.own = task - c.sequence * share.count, c.channel = share.first + c.own;
        c.slot = b.board.slots[c.sequence];
        c.place = c.channel * b.p.states;
        c.state = phase.state + int64_t(c.slot) * b.p.channels * b.p.states + c.place;
        return c;
    }
    __device__ Channel load(int task, Early &early) const {
        Channel c = find(task);
        Part part(b.p.states, lane);
        part.load(early, phase.a + c.place);
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) early[NUMBERS + i] = 0.0f;
        if (c.slot >= 0) part.load(early + NUMBERS, c.state);
        early[2 * NUMBERS] = phase.dt_bias[c.channel], early[2 * NUMBERS + 1] = phase.d[c.channel];
        if (!MANY) c.u = b.own_u[c.own], c.gate = silu(b.own_z[c.own]);
        return c;
    }
    __device__ Channel load(Early &early) const { return has(group) ? load(group, early) : Channel(); }
    // The norms of what was selected.
    __device__ void norms() {
        const MambaStep &p = b.p;
        int lane = lane_of();
#pragma unroll 1
        for (int task = warp_of(); task < b.rows() * 3; task += WARPS) {
            int kind = task % 3, size = kind ? p.states : p.rank;
            E *x = reinterpret_cast<E *>(b.selected + task / 3 * b.selected_pitch);
            x += kind ? p.rank + (kind - 1) * p.states : 0;
            float sum = 0.0f;
#pragma unroll 1
            for (int i = lane; i < size; i += LANES) sum = fmaf(widen(x[i]), widen(x[i]), sum);
            float scale = 1.0f / sqrtf(warp_sum(sum) / size + p.inner_eps);
            const float *weight = phase.inner[kind];
#pragma unroll 1
            for (int i = lane; i < size; i += LANES) {
                E n = narrow<E>(widen(x[i]) * scale);
                x[i] = weight ? narrow<E>(widen(n) * weight[i]) : n;
            }
        }
        meet();
    }
    __device__ void leave_selected() {
        int width = b.p.rank + 2 * b.p.states;
#pragma unroll 1
        for (int i = threadIdx.x; i < b.rows() * width; i += THREADS)
            static_cast<E *>(b.p.drafts[phase.layer].selected)[i] =
                reinterpret_cast<E *>(b.selected + i / width * b.selected_pitch)[i % width];
    }
    // `first` is the thread's first task, and `early` has been loaded for it.
    template <typename W> __device__ void run(const Channel &first, Early &early, W &&await_sums) {
        const MambaStep &p = b.p;
        Part part(p.states, lane);
        await_sums();
#pragma unroll 1
        for (int task = group; has(task); task += b.FINISH_THREADS >> bits) {
            Channel c = task == group ? first : load(task, early);
            bool live = task < tasks;
            float *a = early, *h = early + NUMBERS, bias = early[2 * NUMBERS], skip = early[2 * NUMBERS + 1];
#pragma unroll 1
            for (int t = 0; t < b.tokens(); ++t) {
                int row = c.sequence * b.tokens() + t, at = row * p.own_channels + c.own;
                E delta = narrow<E>(sum_of_warps(share, b.place_of_sum(c.own, row), TILE));
                float u = MANY ? b.own_u[at] : c.u, dt = softplus(widen(delta) + bias), y = 0.0f;
                const E *in = reinterpret_cast<const E *>(b.selected + row * b.selected_pitch) + p.rank;
                Pack<E, NUMBERS> into, out;
                if (whole) {
                    const E *at = in + (part.count > 0 ? part.first : 0);
                    into = *reinterpret_cast<const Pack<E, NUMBERS> *>(at);
                    out = *reinterpret_cast<const Pack<E, NUMBERS> *>(at + p.states);
                } else {
#pragma unroll
                    for (int k = 0; k < NUMBERS; ++k) {
                        int n = k < part.count ? part.first + k : 0;
                        into.at[k] = in[n], out.at[k] = in[p.states + n];
                    }
                }
#pragma unroll
                for (int k = 0; k < NUMBERS; ++k) {
                    // a lane's numbers behind the end have nothing to do with what lies there
                    float add = k < part.count ? dt * u * widen(into.at[k]) : 0.0f;
                    h[k] = fmaf(exp2_fast(dt * (a[k] * LOG2E)), h[k], add);
                    y = fmaf(h[k], widen(out.at[k]), y);
                }
#pragma unroll 1
                for (int lanes = split / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(~0u, y, lanes);
                y = c.slot < 0 ? 0.0f : fmaf(skip, u, y) * (MANY ? silu(b.own_z[at]) : c.gate);
                float next = __shfl_down_sync(~0u, y, split);
                if (!live || lane > 0) continue;
                int64_t to = int64_t(row) * p.channels + c.channel;
                if (split == LANES)
                    b.own_u[at] = y;
                else if (c.own % PACK<E> == 0)
                    p.copies.publish(p.y + to / PACK<E>, pack(narrow<E>(y), narrow<E>(next)), b.mark);
                if (!p.keep) static_cast<E *>(p.drafts[phase.layer].delta)[to] = delta;
            }
            if (live && c.slot >= 0 && p.keep) part.store(c.state, h);
        }
        if (split == LANES) publish();
    }
    // Channels of a word are in two warps: through their place in shared memory.
    __device__ void publish() {
        b.meet_finishers();
        int words = (share.count + PACK<E> - 1) / PACK<E>;
        Divide by(words);
#pragma unroll 1
        for (int n = b.finisher(); n < b.rows() * words; n += b.FINISH_THREADS) {
            int row = by(n), own = (n - row * words) * PACK<E>;
            const float *y = b.own_u + row * b.p.own_channels + own;
            b.p.copies.publish(b.p.y + (int64_t(row) * b.p.channels + share.first + own) / PACK<E>,
                               pack(narrow<E>(y[0]), narrow<E>(own + 1 < share.count ? y[1] : 0.0f)), b.mark);
        }
    }
};
