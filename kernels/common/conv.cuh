// What the passes of the convolution share: arguments, a thread's walk through a strip, tokens on their way.
#pragma once
#include "types.cuh"

constexpr int THREADS = 128;
constexpr int LANES = 32;
constexpr int WARPS = THREADS / LANES;
constexpr uint8_t START = 1;
constexpr uint8_t PAD = 2;

struct Sequence {
    void *data;
    int64_t row, token;
};

struct Conv {
    Sequence x, y, dy, dx;
    const void *weight, *bias;                     // [D, K], [D]: f32 where wide, else of the sequences' type
    const float *initial, *dfinal;                 // [B, D, K - 1] twice
    float *final, *dinitial, *shares;              // [B, D, K - 1] twice, [B, strips, K + 1, D]
    const uint8_t *marks;                          // [B, L]
    int length, channels, taps, strip, silu, wide_weight, wide_bias;
};

// A thread's place and its walk: the inputs of the window, oldest first.
template <typename E, int TAPS, int WIDTH> struct Walk {
    // Tokens that a walk without marks goes through before its strip, so that nothing waits for the window's first inputs: whole
    // groups, and no more than the shortest strip.
    static constexpr int HALO = TAPS > 5 ? 8 : 4;
    const Conv &p;
    int channel, row, begin, end, live;
    float window[TAPS][WIDTH], weight[TAPS][WIDTH], bias[WIDTH];

    // Of a strip, for the channels of vector `column`.
    __device__ Walk(const Conv &p, int column, int strip) : p(p) {
        channel = column * WIDTH;
        row = blockIdx.y;
        begin = strip * p.strip;
        end = min(begin + p.strip, p.length);
        live = channel < p.channels && begin < p.length;
        clear();
    }

    __device__ void parameters() {
        if (p.wide_weight)
            filter_of<float>();
        else
            filter_of<E>();
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            bias[i] = !p.bias       ? 0.0f
                      : p.wide_bias ? static_cast<const float *>(p.bias)[channel + i]
                                    : widen(static_cast<const E *>(p.bias)[channel + i]);
    }
    template <typename T> __device__ __forceinline__ void filter_of() {
        auto from = static_cast<const T *>(p.weight) + int64_t(channel) * p.taps;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            float own[TAPS];
            if (p.taps == TAPS)
                widen(own, reinterpret_cast<const Pack<T, TAPS> *>(from)[i]);
            else
#pragma unroll
                for (int k = 0; k < TAPS; ++k) {
                    int tap = k - (TAPS - p.taps);
                    own[k] = tap >= 0 ? widen(from[i * p.taps + tap]) : 0.0f;
                }
#pragma unroll
            for (int k = 0; k < TAPS; ++k) weight[k][i] = own[k];
        }
    }

    __device__ uint8_t mark(int t) const { return p.marks ? p.marks[int64_t(row) * p.length + t] : 0; }

    __device__ E *at(const Sequence &s, int t) const {
        return static_cast<E *>(s.data) + row * s.row + t * s.token + channel;
    }
    __device__ void load(float (&to)[WIDTH], const Sequence &s, int t) const {
        widen(to, *reinterpret_cast<const Pack<E, WIDTH> *>(at(s, t)));
    }

    __device__ void store(const Sequence &s, int t, const float (&from)[WIDTH]) const {
        Pack<E, WIDTH> v;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v.at[i] = narrow<E>(from[i]);
        *reinterpret_cast<Pack<E, WIDTH> *>(at(s, t)) = v;
    }

    // Place of slot `k >= 1` of the window in a [B, D, K - 1] state; below zero: not part of it.
    __device__ int64_t slot(int k, int i) const {
        int column = k - 1 - (TAPS - p.taps);
        return column < 0 ? -1 : (int64_t(row) * p.channels + channel + i) * (p.taps - 1) + column;
    }

    // The window before token `begin`: slots 1.. hold the last inputs of its sequence.
    __device__ void look_back() {
        int t = begin - 1, k = TAPS - 1;
        for (; k >= 1 && t >= 0; --t) {
            uint8_t m = mark(t);
            if (m == PAD) continue;
#pragma unroll
            for (int j = 1; j < TAPS; ++j)
                if (j == k) load(window[j], p.x, t);
            --k;
            if (m == START) return;
        }
        if (!p.initial) return;
        // slots still empty: the latest inputs of the initial state
#pragma unroll
        for (int j = 1; j < TAPS; ++j)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                int64_t place = j <= k ? slot(j + TAPS - 1 - k, i) : -1;
                if (place >= 0) window[j][i] = p.initial[place];
            }
    }

    __device__ void clear() {
#pragma unroll
        for (int k = 0; k < TAPS; ++k)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) window[k][i] = 0.0f;
    }

    __device__ void push(const Pack<E, WIDTH> &x) {
#pragma unroll
        for (int k = 0; k + 1 < TAPS; ++k)
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) window[k][i] = window[k + 1][i];
        widen(window[TAPS - 1], x);
    }

    // The filter's result for the newest input, before SiLU.
    __device__ void filter(float (&sum)[WIDTH]) const {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            sum[i] = bias[i];
#pragma unroll
            for (int k = 0; k < TAPS; ++k) sum[i] = fmaf(weight[k][i], window[k][i], sum[i]);
        }
    }
};

// Groups of tokens of a sequence on their way through shared memory; a thread uses what it has asked for itself.
template <typename E, int WIDTH, int DEPTH_> struct Ring {
    static constexpr int AHEAD = 4, DEPTH = WIDTH == 1 ? 1 : DEPTH_;
    using Elements = Pack<E, WIDTH>;
    Elements at[DEPTH][AHEAD][THREADS];

    // Asks for a group, of which `left` tokens exist, and moves on.
    __device__ __forceinline__ void ask(int slot, const E *&from, int64_t step, int left) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j, from += step)
            if (j < left) {
                if constexpr (WIDTH == 1)
                    at[slot][j][threadIdx.x].at[0] = *from;
                else
                    copy_async<sizeof(Elements)>(&at[slot][j][threadIdx.x], from);
            }
    }
};
