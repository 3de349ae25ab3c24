// What the phases of a Mamba block do beside their products; src/layers/mamba has the formulas.
//
//   MIX     x, z = W norm(stream); u = silu(conv(x)): a block has the same channels of both, and keeps z and u for STATE
//   SELECT  dt, B, C = W u
//   STATE   delta = W norm(dt), the recurrence through the pool's states, skip weight and gate
// and then ADD.
#pragma once
#include "decode_phases.cuh"

constexpr int TAPS = 4;
constexpr int NUMBERS = 8; // of a state, in a lane
static_assert(2 * NUMBERS + 2 <= EARLY && 2 * TAPS <= EARLY, "what is loaded early has room");

// What the thread of one channel and one sequence has of the convolution.
struct Filter {
    float *tap, *window, &shift;
    float *place;
    int missing;

    __device__ Filter(Early &early, const Step &p, const Phase &phase, int channel, int slot)
        : tap(early), window(early + TAPS), shift(early[2 * TAPS - 1]), missing(TAPS - p.filter) {
        place = slot < 0 ? nullptr : phase.window + (int64_t(slot) * p.channels + channel) * (p.filter - 1);
    }
    __device__ void load(const Step &p, const Phase &phase, int channel) {
#pragma unroll
        for (int k = 0; k < TAPS; ++k) {
            tap[k] = k >= missing ? phase.taps[int64_t(channel) * p.filter + k - missing] : 0.0f;
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
    __device__ void store() const {
        if (!place) return;
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k)
            if (k >= missing) place[k - missing] = window[k];
    }
};

// A lane's part of a channel's state.
struct Part {
    int own;    // numbers from the lane's first on; not clamped to its own, see selective_scan_step.cu
    bool whole; // all of them, in pieces of 16 bytes

    __device__ Part(int states, int lane) {
        own = states - lane * NUMBERS;
        whole = own >= NUMBERS && states % 4 == 0;
    }
    __device__ void load(float *to, const float *from) const {
        if (whole) {
#pragma unroll
            for (int i = 0; i < NUMBERS; i += 4) {
                float4 v = *reinterpret_cast<const float4 *>(from + i);
                to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i) to[i] = i < own ? from[i] : 0.0f;
        }
    }
    __device__ void store(float *to, const float *from) const {
        if (whole) {
#pragma unroll
            for (int i = 0; i < NUMBERS; i += 4)
                *reinterpret_cast<float4 *>(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i)
                if (i < own) to[i] = from[i];
        }
    }
};

// The recurrence: a state of N numbers lies in `split` lanes.
template <typename E> struct Recurrence {
    Block<E> &b;
    const Phase &phase;
    const Share &share;
    int tasks, split = 1, bits = 0, lane, group;
    int own, channel, sequence, slot;
    int64_t place; // of the lane's numbers in those of a sequence

    __device__ Recurrence(Block<E> &b, const Phase &phase, const Share &share) : b(b), phase(phase), share(share) {
        tasks = (b.p.tokens == 1 ? b.p.rows : Divide(b.p.tokens)(b.p.rows)) * share.count;
        while (split * NUMBERS < b.p.states) split *= 2, ++bits;
        lane = threadIdx.x & (split - 1), group = threadIdx.x >> bits;
    }
    // Threads of whole warps have tasks, some of them none that counts.
    __device__ bool has(int task) const { return (task & ~((LANES >> bits) - 1)) < tasks; }
    __device__ void find(int task) {
        task = min(task, tasks - 1);
        sequence = Divide(share.count)(task);
        own = task - sequence * share.count, channel = share.first + own;
        slot = b.p.slots[sequence];
        place = int64_t(channel) * b.p.states + lane * NUMBERS;
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
        const Step &p = b.p;
        int lane = lane_of();
#pragma unroll 1
        for (int task = warp_of(); task < p.rows * 3; task += WARPS) {
            int kind = task % 3, size = kind ? p.states : p.rank;
            E *x = reinterpret_cast<E *>(b.selected + task / 3 * b.selected_pitch) + (kind ? p.rank + (kind - 1) * p.states : 0);
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
        for (int i = threadIdx.x; i < b.p.rows * width; i += THREADS)
            static_cast<E *>(b.p.drafts[phase.layer].selected)[i] =
                reinterpret_cast<E *>(b.selected + i / width * b.selected_pitch)[i % width];
    }
    __device__ void run(Early &early) {
        const Step &p = b.p;
        Part part(p.states, lane);
#pragma unroll 1
        for (int task = group; has(task); task += THREADS >> bits) {
            find(task);
            if (task >= THREADS >> bits) load_found(early);
            bool live = task < tasks;
            float *a = early, *h = early + NUMBERS, bias = early[2 * NUMBERS], skip = early[2 * NUMBERS + 1];
#pragma unroll 1
            for (int t = 0; t < p.tokens; ++t) {
                int row = sequence * p.tokens + t, at = row * p.own_channels + own;
                E delta = narrow<E>(b.sum(share, own, row));
                float u = b.own_u[at], dt = softplus(widen(delta) + bias), y = 0.0f;
                const E *in = reinterpret_cast<const E *>(b.selected + row * b.selected_pitch) + p.rank + lane * NUMBERS;
#pragma unroll
                for (int k = 0; k < NUMBERS; ++k)
                    if (k < part.own) {
                        h[k] = fmaf(exp2_fast(dt * (a[k] * LOG2E)), h[k], dt * u * widen(in[k]));
                        y = fmaf(h[k], widen(in[p.states + k]), y);
                    }
#pragma unroll 1
                for (int lanes = split / 2; lanes > 0; lanes /= 2) y += __shfl_xor_sync(~0u, y, lanes);
                y = slot < 0 ? 0.0f : fmaf(skip, u, y) * silu(b.own_z[at]);
                float next = __shfl_down_sync(~0u, y, split);
                if (!live || lane > 0) continue;
                int64_t to = int64_t(row) * p.channels + channel;
                if (own % PACK<E> == 0) publish(p.y + to / PACK<E>, pack(narrow<E>(y), narrow<E>(next)), b.mark);
                if (!p.keep) static_cast<E *>(p.drafts[phase.layer].delta)[to] = delta;
            }
            if (live && slot >= 0 && p.keep) part.store(state(), h);
        }
    }
};

// What becomes of a phase's products, those of STATE aside. Whole warps, for words of two lanes.
template <typename E>
__device__ void finish(Block<E> &b, const Phase &phase, const Share &share, int kind, const Task &task, Early &early) {
    const Step &p = b.p;
    Filter filter(early, p, phase, task.output, task.slot);
#pragma unroll 1
    for (int t = 0; t < p.tokens; ++t) {
        int row = task.sequence * p.tokens + t;
        float value = task.bias;
        if (task.live) value += b.sum(share, task.place, row);
        E y = narrow<E>(value), x = y;
        if (kind == MIX && task.segment == 0) {
            value = filter.next(widen(x));
            y = narrow<E>(value);
        }
        int64_t place = int64_t(row) * share.outputs + task.output;
        if (kind == MIX || kind == SELECT) {
            E next = narrow<E>(__shfl_down_sync(~0u, value, 1));
            Word *to = p.u + place / PACK<E>;
            int words = words_of<E>(share.outputs), w = task.output / PACK<E>;
            if (kind == SELECT) to = p.selected + int64_t(row) * words + w;
            if (!task.live) continue;
            if (task.segment == 0 && task.own % PACK<E> == 0) publish(to, pack(y, next), b.mark);
            if (kind == SELECT) {
                // the word that makes a pair of the last one
                if (w + 2 == words && task.output + 1 == share.outputs)
                    publish(p.selected + int64_t(row + 1) * words - 1, 0, b.mark);
                continue;
            }
            (task.segment ? b.own_z : b.own_u)[row * p.own_channels + task.own] = widen(y);
            if (!p.keep && task.segment == 0) {
                static_cast<E *>(p.drafts[phase.layer].x)[place] = x;
                static_cast<E *>(p.drafts[phase.layer].u)[place] = y;
            }
        } else if (task.live && kind == ADD) {
            float *own = b.own_stream + row * p.own_hidden + task.own;
            float sum = *own + widen(y);
            if (!p.wide) sum = widen(narrow<E>(sum));
            *own = sum;
            publish(p.stream + place, __float_as_uint(sum), b.mark);
        } else if (task.live) {
            static_cast<E *>(p.logits)[place] = y;
            b.logits[row * share.count + task.own] = widen(y);
        }
    }
    if (kind == MIX && task.live && task.segment == 0 && p.keep) filter.store();
}

// A layer ahead, a warp for each: what the phase reads beside its weights.
template <typename E> __device__ void hints(const Step &p, const Phase &phase, const Share &share, int warp) {
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
