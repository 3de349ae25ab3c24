// What the scan's backward adds up over the lanes of a warp, and where it lies in shared memory.
#pragma once
#include "scan.cuh"

// Tokens whose states and decays are in registers at once.
constexpr int MICRO = 4;

// Tokens whose shares of dB and dC are summed over the warp at once.
constexpr int BATCH = 2;

// What the lanes of a warp have to add up: over the parts of a state, and over the channels.
template <typename F> struct Sums {
    static constexpr int PER = F::PER, STATES = F::STATES, SPLIT = F::SPLIT, OWNERS = F::OWNERS;
    // By token: dx, dstep; each by part and channel.
    static constexpr int KINDS = 2;
    static constexpr int KIND = SPLIT * OWNERS * PER;
    static constexpr int TOKEN = KINDS * KIND;
    // By token, part and lane: dB's numbers, then dC's. Parts lie in other banks.
    static constexpr int PART = (OWNERS + 1) * 2 * STATES;
    float parts[SPLIT > 1 ? MICRO * TOKEN : 4];
    float channels[BATCH][SPLIT * PART];

    // Tokens that neighbouring lanes add up have their parts in another order, and so in other banks.
    static __device__ __forceinline__ int part_place(int token, int part, int owner) {
        return ((part ^ (token & (SPLIT / 2 - 1))) * OWNERS + owner) * PER;
    }
    // Pieces of four numbers of a lane, swizzled.
    static __device__ __forceinline__ int piece(int part, int owner, int q) {
        constexpr int PIECES = 2 * STATES / 4, TURN = 8 / PIECES;
        return part * PART + owner * 2 * STATES + (q ^ (owner / TURN % PIECES)) * 4;
    }
};
