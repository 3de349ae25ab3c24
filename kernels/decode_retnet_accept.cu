// Moves the states of a draft's rows behind those of its tokens that are accepted, in all layers at once, by the keys and
// values that decode_retnet.cu left.
//
// Grid (states over blocks, sequences, layers), 128 threads: four keys of a channel of the values a thread. Bytes: states
// read and written; accepting none of the tokens of a sequence touches nothing.
#include "common/decode_retnet.cuh"

constexpr int BLOCK = 128;
constexpr int NUMBERS = 4;

struct Accept {
    const RetNetPhase *phases; // of the step, RETAIN of a layer being the third of `each`
    const Draft *drafts;       // of each layer
    const float *logs;         // [H] ln gamma
    const int *slots, *counts; // [R / T]
    int each, tokens, heads, key, value, padding;
};

template <typename E> __device__ void accept(const Accept &p) {
    int parts = p.key / NUMBERS, thread = blockIdx.x * BLOCK + threadIdx.x, sequence = blockIdx.y;
    int channel = thread / parts, first = thread % parts * NUMBERS, head = channel / p.value;
    int slot = p.slots[sequence], count = min(p.tokens, p.counts[sequence]);
    if (head >= p.heads || slot < 0 || count <= 0) return;
    const Draft &draft = p.drafts[blockIdx.z];
    const E *k = static_cast<const E *>(draft.k) + (int64_t(sequence) * p.tokens * p.heads + head) * p.key + first;
    const E *v = static_cast<const E *>(draft.v) + int64_t(sequence) * p.tokens * p.heads * p.value + channel;
    float4 &at = *reinterpret_cast<float4 *>(p.phases[blockIdx.z * p.each + 2].state +
                                             (int64_t(slot) * p.heads * p.value + channel) * p.key + first);
    float4 state = at;
    float decay = expf(p.logs[head]), *h = &state.x;
    for (int t = 0; t < count; ++t, k += p.heads * p.key, v += p.heads * p.value)
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) h[i] = fmaf(decay, h[i], widen(k[i]) * widen(*v));
    at = state;
}

#define KERNEL(E)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(BLOCK) decode_retnet_accept_##E(const __grid_constant__ Accept p) {   \
        take_turn();                                                                                                   \
        accept<E>(p);                                                                                                  \
    }
KERNEL(float)
KERNEL(bf16)
KERNEL(f16)
