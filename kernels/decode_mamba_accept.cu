// Moves the states of a draft's rows behind those of its tokens that are accepted, in all layers at once: windows of the
// convolutions and states of the recurrences, by the numbers that decode_mamba.cu left.
//
// Grid (channels over blocks, sequences, layers), 128 threads: four numbers of a channel's state a thread, the window with
// the first four. Bytes: states read and written; accepting none of the tokens of a sequence touches nothing.
#include "common/decode_mamba.cuh"

constexpr int BLOCK = 128;

struct Accept {
    const MambaPhase *phases;       // of the step, MIX and STATE of a layer being the first and the third of `each`
    const Draft *drafts;       // of each layer
    const int *slots, *counts; // [R / T]
    int each, tokens, channels, states, rank, filter;
};

template <typename E> __device__ void accept(const Accept &p) {
    int parts = (p.states + NUMBERS - 1) / NUMBERS, thread = blockIdx.x * BLOCK + threadIdx.x;
    int channel = thread / parts, first = thread % parts * NUMBERS, sequence = blockIdx.y;
    int slot = p.slots[sequence], count = min(p.tokens, p.counts[sequence]);
    if (channel >= p.channels || slot < 0 || count <= 0) return;
    const Draft &draft = p.drafts[blockIdx.z];
    const MambaPhase &mix = p.phases[blockIdx.z * p.each], &state = p.phases[blockIdx.z * p.each + 2];
    auto at = [&](const void *from, int t, int width, int i) {
        return widen(static_cast<const E *>(from)[int64_t(sequence * p.tokens + t) * width + i]);
    };
    int64_t place = (int64_t(slot) * p.channels + channel) * p.states + first;
    float bias = state.dt_bias[channel];
#pragma unroll
    for (int k = 0; k < NUMBERS; ++k) {
        if (first + k >= p.states) break;
        float a = state.a[int64_t(channel) * p.states + first + k] * LOG2E, h = state.state[place + k];
        for (int t = 0; t < count; ++t) {
            float dt = softplus(at(draft.delta, t, p.channels, channel) + bias);
            float into = at(draft.selected, t, p.rank + 2 * p.states, p.rank + first + k);
            h = fmaf(exp2_fast(dt * a), h, dt * at(draft.u, t, p.channels, channel) * into);
        }
        state.state[place + k] = h;
    }
    if (first > 0) return;
    int kept = p.filter - 1;
    float *window = mix.window + (int64_t(slot) * p.channels + channel) * kept;
    // older numbers are read before younger ones take their places
    for (int k = 0; k < kept; ++k) {
        int from = k + count;
        window[k] = from < kept ? window[from] : at(draft.x, from - kept, p.channels, channel);
    }
}

#define KERNEL(E)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK) decode_mamba_accept_##E(const __grid_constant__ Accept p) {    \
        take_turn();                                                                                                   \
        accept<E>(p);                                                                                                  \
    }
KERNEL(float)
KERNEL(bf16)
KERNEL(f16)
