// What the phases of a Mamba block do beside their products; src/layers/mamba has the formulas.
//
//   MIX     x, z = W norm(stream); u = silu(conv(x)): a block has the same channels of both, and keeps z and u for STATE
//   SELECT  dt, B, C = W u
//   STATE   delta = W norm(dt), the recurrence through the pool's states, skip weight and gate
// and then ADD.
#pragma once
#include "decode_recurrence.cuh"

enum { MIX = OWN, SELECT, STATE };

constexpr int TAPS = 4;
static_assert(2 * TAPS <= EARLY, "what is loaded early has room");

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

template <typename E, bool MANY> struct Mamba : Block<E, MANY> {
    using Base = Block<E, MANY>;
    using Element = E;
    using Task = ::Task<MANY>;
    using Phase = MambaPhase;
    using Step = MambaStep;
    struct Ahead {
        Early early;
        float *place;    // of the task's window
        Channel channel; // STATE's
    };
    static constexpr int LAYER = 4; // phases
    static constexpr int HINTS = 6;
    template <typename F> static __device__ __forceinline__ void with(int kind, F &&f) {
        among<ADD, STATE>(kind, f);
    }
    const Step &p;
    float *own_u, *own_z; // [R, own_channels]
    char *selected;       // [R, rank + 2 N], for all warps
    int selected_pitch;

    __device__ Mamba(const Step &p, Board &board, uint32_t mark) : Base{p, board, mark}, p(p) {}
    template <typename Room> __device__ void make_rooms(Room &&room) {
        int own_bytes = this->rows() * p.own_channels * sizeof(float);
        own_u = reinterpret_cast<float *>(room(own_bytes));
        own_z = reinterpret_cast<float *>(room(own_bytes));
        // with what the last warp reads behind the end
        int selected_groups = (words_of<E>(p.rank + 2 * p.states) * 4 + GROUP - 1) / GROUP;
        selected_pitch = pitch_of(selected_groups + selected_groups / WARPS);
        selected = room(this->rows() * selected_pitch);
    }
    static __device__ bool takes_norm(int kind) { return kind == MIX || kind == HEAD; }
    static __device__ bool is_for_all(int) { return false; }
    static __device__ bool is_whole(int kind) { return kind == STATE; }
    struct Source : Filler {
        __device__ Source(const Step &, Ring &ring, int warp) : Filler(ring, warp) {}
        __device__ void copy(const Weights &weights, const Share &share) { Filler::copy<false>(weights, share); }
    };

    __device__ void begin(const Phase &phase, const Share &share, Ahead &ahead) {
        ahead.channel = Recurrence<E, MANY>(*this, phase, share).load(ahead.early);
    }
    template <typename K>
    __device__ void prepare(K kind, const Phase &phase, const Share &, const Task &task, Ahead &ahead) {
        ahead.place = nullptr;
        if (kind != MIX || !task.live || task.segment) return;
        ahead.place = Filter::place(p, phase, task.output, this->board.slots[task.sequence]);
        Filter(ahead.early, p).load(phase, task.output, ahead.place);
    }
    __device__ Input input(int kind, const Share &share) const {
        if (kind == STATE) return {shared_address(selected + warp_of() * share.groups * GROUP), selected_pitch};
        return this->input_of(share, takes_norm(kind));
    }
    __device__ void take(int kind, const Phase &phase, const Share &share) {
        if (kind == STATE) {
            take_selected(phase);
            Recurrence<E, MANY> recurrence(*this, phase, share);
            if (p.normed) recurrence.norms();
            if (!p.keep && blockIdx.x == 0) recurrence.leave_selected();
        } else if (!takes_norm(kind) && warp_of() < share.warps) {
            Base::take(phase, share);
        }
    }
    __device__ void products(int, Ring &ring, const Phase &, const Share &, Product<E, MANY> &product, int tiles) {
        product.multiply(ring, this->rows(), tiles, this->sums);
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
    template <typename W>
    __device__ void end(int kind, const Phase &phase, const Share &share, Ahead &ahead, W &&await_sums) {
        if (kind == STATE) Recurrence<E, MANY>(*this, phase, share).run(ahead.channel, ahead.early, await_sums);
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
