// What the phases of a Mamba block do beside their products; src/layers/mamba has the formulas.
//
//   MIX     x, z = W norm(stream); u = silu(conv(x)): a block has the same channels of both, and keeps z and u for STATE
//   SELECT  dt, B, C = W u
//   STATE   delta = W norm(dt), the recurrence through the pool's states, skip weight and gate
// and then ADD.
#pragma once
#include "decode_loop.cuh"

enum { MIX = OWN, SELECT, STATE };

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

constexpr int TAPS = 4;
constexpr int NUMBERS = 4; // of a state, in a lane
static_assert(2 * NUMBERS + 2 <= EARLY && 2 * TAPS <= EARLY, "what is loaded early has room");

// What the thread of one channel and one sequence has of the convolution.
struct Filter {
    float *tap, *window, &shift;
    int missing;

    __device__ Filter(Early &early, const MambaStep &p)
        : tap(early), window(early + TAPS), shift(early[2 * TAPS - 1]), missing(TAPS - p.filter) {}
    // Where its state lies; null for an idle row.
    __device__ static float *place(const MambaStep &p, const MambaPhase &phase, int channel, int slot) {
        return slot < 0 ? nullptr : phase.window + (int64_t(slot) * p.channels + channel) * (p.filter - 1);
    }
    __device__ void load(const MambaPhase &phase, int channel, const float *place) {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            tap[k] = k >= missing ? phase.taps[channel * (TAPS - missing) + k - missing] : 0.0f;
            if (k + 1 < TAPS) window[k] = k >= missing && place ? place[k - missing] : 0.0f;
        }
        shift = phase.shift ? phase.shift[channel] : 0.0f;
    }
    __device__ float next(float x) {
        float sum = fmaf(tap[TAPS - 1], x, shift);
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k) sum = fmaf(tap[k], window[k], sum);
#pragma unroll
        for (int k = 0; k + 2 < TAPS; ++k) window[k] = window[k + 1];
        window[TAPS - 2] = x;
        return silu(sum);
    }
    __device__ void store(float *place) const {
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k)
            if (k >= missing) place[k - missing] = window[k];
    }
};

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

template <typename E, bool MANY> struct Mamba;

// The recurrence: a state of N numbers lies in `split` lanes.
template <typename E, bool MANY> struct Recurrence {
    Mamba<E, MANY> &b;
    const MambaPhase &phase;
    const Share &share;
    int tasks, split, bits, lane, group;
    int own, channel, sequence, slot;
    int place;  // of the channel's numbers in those of a sequence
    bool whole; // a lane has four numbers of a state or none, and B and C lie so that it can have them at once

    __device__ Recurrence(Mamba<E, MANY> &b, const MambaPhase &phase, const Share &share)
        : b(b), phase(phase), share(share) {
        tasks = b.sequences() * share.count;
        bits = LANES - __clz((b.p.states - 1) / NUMBERS), split = 1 << bits;
        lane = threadIdx.x & (split - 1), group = threadIdx.x >> bits;
        whole = b.p.states % NUMBERS == 0 && b.p.rank % NUMBERS == 0;
    }
    // Threads of whole warps have tasks, some of them none that counts.
    __device__ bool has(int task) const { return (task & ~((LANES >> bits) - 1)) < tasks; }
    __device__ void find(int task) {
        task = min(task, tasks - 1);
        sequence = Divide(share.count)(task);
        own = task - sequence * share.count, channel = share.first + own;
        slot = b.slots[sequence];
        place = channel * b.p.states;
    }
    __device__ float *state() const { return phase.state + int64_t(slot) * b.p.channels * b.p.states + place; }
    __device__ void load_found(Early &early) {
        Part part(b.p.states, lane);
        part.load(early, phase.a + place);
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) early[NUMBERS + i] = 0.0f;
        if (slot >= 0) part.load(early + NUMBERS, state());
        early[2 * NUMBERS] = phase.dt_bias[channel], early[2 * NUMBERS + 1] = phase.d[channel];
    }
    __device__ void load(Early &early) {
        if (!has(group)) return;
        find(group);
        load_found(early);
    }
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
    __device__ void run(Early &early) {
        const MambaStep &p = b.p;
        Part part(p.states, lane);
#pragma unroll 1
        for (int task = group; has(task); task += THREADS >> bits) {
            find(task);
            if (task >= THREADS >> bits) load_found(early);
            bool live = task < tasks;
            float *a = early, *h = early + NUMBERS, bias = early[2 * NUMBERS], skip = early[2 * NUMBERS + 1];
#pragma unroll 1
            for (int t = 0; t < b.tokens(); ++t) {
                int row = sequence * b.tokens() + t, at = row * p.own_channels + own;
                E delta = narrow<E>(sum_of(share, b.place_of_sum(own, row)));
                float u = b.own_u[at], dt = softplus(widen(delta) + bias), y = 0.0f;
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
                y = slot < 0 ? 0.0f : fmaf(skip, u, y) * silu(b.own_z[at]);
                float next = __shfl_down_sync(~0u, y, split);
                if (!live || lane > 0) continue;
                int64_t to = int64_t(row) * p.channels + channel;
                if (split == LANES)
                    b.own_u[at] = y;
                else if (own % PACK<E> == 0)
                    p.copies.publish(p.y + to / PACK<E>, pack(narrow<E>(y), narrow<E>(next)), b.mark);
                if (!p.keep) static_cast<E *>(p.drafts[phase.layer].delta)[to] = delta;
            }
            if (live && slot >= 0 && p.keep) part.store(state(), h);
        }
        if (split == LANES) publish();
    }
    // Channels of a word are in two warps: through their place in shared memory.
    __device__ void publish() {
        meet();
        int words = (share.count + PACK<E> - 1) / PACK<E>;
        Divide by(words);
#pragma unroll 1
        for (int n = threadIdx.x; n < b.rows() * words; n += THREADS) {
            int row = by(n), own = (n - row * words) * PACK<E>;
            const float *y = b.own_u + row * b.p.own_channels + own;
            b.p.copies.publish(b.p.y + (int64_t(row) * b.p.channels + share.first + own) / PACK<E>,
                               pack(narrow<E>(y[0]), narrow<E>(own + 1 < share.count ? y[1] : 0.0f)), b.mark);
        }
    }
};

template <typename E, bool MANY> struct Mamba : Block<E, MANY> {
    using Base = Block<E, MANY>;
    using Element = E;
    using Task = ::Task<MANY>;
    using Phase = MambaPhase;
    using Step = MambaStep;
    struct Ahead {
        Early early;
        float *place; // of the task's window
    };
    static constexpr int LAYER = 4; // phases
    static constexpr int HINTS = 6;
    template <typename F> static __device__ __forceinline__ void with(int kind, F &&f) {
        among<ADD, STATE>(kind, f);
    }
    const Step &p;
    float *own_u, *own_z; // [R, own_channels]
    int *slots;           // [R / T]
    char *selected;       // [R, rank + 2 N], for all warps
    int selected_pitch;

    __device__ Mamba(const Step &p, float (*row_sums)[WARPS][MOST_ROWS], uint32_t mark) : Base{p, row_sums, mark}, p(p) {}
    template <typename Room> __device__ void make_rooms(Room &&room) {
        int own_bytes = this->rows() * p.own_channels * sizeof(float);
        own_u = reinterpret_cast<float *>(room(own_bytes));
        own_z = reinterpret_cast<float *>(room(own_bytes));
        // with what the last warp reads behind the end
        int selected_groups = (words_of<E>(p.rank + 2 * p.states) * 4 + GROUP - 1) / GROUP;
        selected_pitch = pitch_of(selected_groups + selected_groups / WARPS);
        selected = room(this->rows() * selected_pitch);
        slots = reinterpret_cast<int *>(room(MOST_ROWS * sizeof(int)));
        if (threadIdx.x < this->sequences()) slots[threadIdx.x] = p.slots[threadIdx.x];
        meet();
    }
    static __device__ bool takes_norm(int kind) { return kind == MIX || kind == HEAD; }
    static __device__ bool is_for_all(int) { return false; }
    static __device__ bool is_whole(int kind) { return kind == STATE; }
    struct Source : Filler {
        __device__ Source(const Step &, Ring &ring, int warp) : Filler(ring, warp) {}
        __device__ void copy(const Weights &weights, const Share &share) { Filler::copy<false>(weights, share); }
    };

    __device__ void begin(const Phase &phase, const Share &share, Ahead &ahead) {
        Recurrence<E, MANY>(*this, phase, share).load(ahead.early);
    }
    template <typename K>
    __device__ void prepare(K kind, const Phase &phase, const Share &, const Task &task, Ahead &ahead) {
        ahead.place = nullptr;
        if (kind != MIX || !task.live || task.segment) return;
        ahead.place = Filter::place(p, phase, task.output, slots[task.sequence]);
        Filter(ahead.early, p).load(phase, task.output, ahead.place);
    }
    __device__ Input take(const Phase &phase, const Share &share) {
        if (phase.kind == STATE) {
            take_selected(phase);
            Recurrence<E, MANY> recurrence(*this, phase, share);
            if (p.normed) recurrence.norms();
            if (!p.keep && blockIdx.x == 0) recurrence.leave_selected();
            return {shared_address(selected + warp_of() * share.groups * GROUP), selected_pitch};
        }
        if (!takes_norm(phase.kind) && warp_of() < share.warps) Base::take(phase, share);
        return {shared_address(this->x), this->pitch};
    }
    __device__ void products(int, Ring &ring, const Phase &, const Share &share, const Input &input, int tiles) {
        multiply<E, MANY>(ring, share, input.at, input.pitch, this->rows(), tiles, this->sums);
    }
    // Whole warps, for words of two lanes.
    template <typename K>
    __device__ void finish(K kind, const Phase &phase, const Share &share, const Task &task, Ahead &ahead) {
        if (kind == MIX)
            mix(phase, share, task, ahead);
        else if (kind == SELECT)
            select(share, task);
        else if (kind == ADD)
            add(*this, share, task);
        else
            head(*this, share, task);
    }
    __device__ void end(const Phase &phase, const Share &share, Ahead &ahead) {
        if (phase.kind == STATE) Recurrence<E, MANY>(*this, phase, share).run(ahead.early);
    }

    // What was selected, for all warps.
    __device__ void take_selected(const Phase &phase) {
        int pairs = selected_pitch / 8, row_pairs = words_of<E>(phase.width) / 2;
#pragma unroll 1
        for (int i = threadIdx.x, r = 0; r < this->rows(); i += THREADS) {
            for (; i >= pairs; i -= pairs) ++r;
            if (r >= this->rows()) break;
            Words w = {};
            const Word *from = p.copies.own(phase.from) + 2 * (int64_t(r) * row_pairs + i);
            if (i < row_pairs)
                do w = peek_two(from);
                while (mark_of(w.at[0]) != this->mark - 1 || mark_of(w.at[1]) != this->mark - 1);
            *reinterpret_cast<uint2 *>(selected + r * selected_pitch + i * 8) = {uint32_t(w.at[0]), uint32_t(w.at[1])};
        }
        meet();
    }
    __device__ void mix(const Phase &phase, const Share &share, const Task &task, Ahead &ahead) {
        Filter filter(ahead.early, p);
        int own = task.row * p.own_channels + task.own, at = task.row * p.channels + task.output;
#pragma unroll 1
        for (int t = 0; t < this->tokens(); ++t, own += p.own_channels, at += p.channels) {
            E x = narrow<E>(task.value(share, t)), y = x;
            float u = filter.next(widen(x)); // means nothing for z
            y = task.segment ? x : narrow<E>(u);
            E next = narrow<E>(__shfl_down_sync(~0u, u, 1));
            if (!task.live) continue;
            if (task.segment == 0 && task.own % PACK<E> == 0) p.copies.publish(p.u + at / PACK<E>, pack(y, next), this->mark);
            (task.segment ? own_z : own_u)[own] = widen(y);
            if (p.keep || task.segment) continue;
            static_cast<E *>(p.drafts[phase.layer].x)[at] = x;
            static_cast<E *>(p.drafts[phase.layer].u)[at] = y;
        }
        if (ahead.place && p.keep) filter.store(ahead.place);
    }
    __device__ void select(const Share &share, const Task &task) {
        int words = words_of<E>(share.outputs), w = task.output / PACK<E>;
#pragma unroll 1
        for (int t = 0; t < this->tokens(); ++t) {
            float value = task.value(share, t), next = __shfl_down_sync(~0u, value, 1);
            Word *row = p.selected + (task.row + t) * words;
            if (!task.live) continue;
            if (task.own % PACK<E> == 0) p.copies.publish(row + w, pack(narrow<E>(value), narrow<E>(next)), this->mark);
            // the word that makes a pair of the last one
            if (w + 2 == words && task.output + 1 == share.outputs) p.copies.publish(row + w + 1, 0, this->mark);
        }
    }
    // A layer ahead, a part for each warp: what the phase reads beside its weights.
    static __device__ void hints(const Step &p, const Phase &phase, const Share &share, int warp) {
        int sequences = 1, each = 0;
        const void *from = nullptr;
        bool mix = phase.kind == MIX, state = phase.kind == STATE;
        if (warp == 0) {
            from = phase.bias, each = sizeof(E);
        } else if (warp == 1) {
            if (mix && phase.bias) from = static_cast<const E *>(phase.bias) + p.channels, each = sizeof(E);
            if (state) from = phase.a, each = p.states * sizeof(float);
        } else if (warp == 2) {
            if (mix) from = phase.taps, each = p.filter * sizeof(float);
            if (state) from = phase.d, each = sizeof(float);
        } else if (warp == 3) {
            if (mix) from = phase.shift, each = sizeof(float);
            if (state) from = phase.dt_bias, each = sizeof(float);
        } else if (warp == 4) {
            sequences = p.rows / p.tokens;
            if (mix) from = phase.window, each = (p.filter - 1) * sizeof(float);
            if (state) from = phase.state, each = p.states * sizeof(float);
        } else if (warp == 5 && (mix || phase.kind == HEAD)) {
            hint(phase.norm.weight, p.hidden * sizeof(float));
        }
        if (!from || share.count == 0) return;
#pragma unroll 1
        for (int s = 0; s < sequences; ++s) {
            int slot = warp == 4 ? p.slots[s] : 0;
            if (slot >= 0)
                hint(static_cast<const char *>(from) + (int64_t(slot) * p.channels + share.first) * each, share.count * each);
        }
    }
};
