// What a block of the scan's backward has in shared memory, and how it finishes a tile.
#pragma once
#include "scan_prepare.cuh"
#include "scan_sums.cuh"

constexpr int WARPS = THREADS / LANES;
// Tokens whose states and decays are in registers at once.
constexpr int MICRO = 4;

template <typename E, typename F> struct BackwardMemory {
    using T = Tile<E, F>;
    static constexpr int ROW = Inputs<F>::ROW;
    // Whether there is room for y.
    static constexpr bool ROOM = F::CHANNELS <= 128;
    E u[2][T::SIZE], z[2][T::SIZE], dy[2][T::SIZE], delta[T::SIZE], y[ROOM ? T::SIZE : 8];
    E raw[Coefficients<E, F, 2>::RAW];
    float inputs[Inputs<F>::SIZE];        // then, in the place of delta u: dx
    float gradients[F::TILE * ROW];       // dy times SiLU(z); then dstep
    // B, then C, in as many orders as lanes of a part have: `turned`. Copies lie in other banks.
    static constexpr int COPIES = F::OWNERS < 4 ? F::OWNERS : 4, COPY = 2 * F::TILE * F::WIDTH + 16;
    float coefficients[COPIES * COPY];
    float4 saved[F::TILE / MICRO - 1][F::PER * F::STATES / 4][THREADS];
    float sums[WARPS][F::TILE][2 * F::WIDTH];
    E *places[4][THREADS]; // of u, delta, z and dy
    float bias[F::CHANNELS], skip[F::CHANNELS];
    // The gradients of bias and skip weight of every thread's packs, so far.
    float4 shares[2][T::WIDTH / 4][THREADS];
    uint8_t marks[3][F::TILE]; // of the tile before, which others may still finish, this one and the next
};

// Adds to a thread's shares.
template <int WIDTH> __device__ __forceinline__ void add_share(float4 (&shares)[WIDTH / 4][THREADS], const float (&x)[WIDTH]) {
#pragma unroll
    for (int q = 0; q < WIDTH / 4; ++q) {
        float4 &sum = shares[q][threadIdx.x], now = sum;
        sum = make_float4(now.x + x[4 * q], now.y + x[4 * q + 1], now.z + x[4 * q + 2], now.w + x[4 * q + 3]);
    }
}

// The tile's gradients of the sequences; adds to those of bias and skip weight.
template <bool WHOLE, typename E, typename F>
__device__ __forceinline__ void finish(const Scan &p, BackwardMemory<E, F> &m, const Place<F> &at, const Tile<E, F> &own,
                                       int buffer, const uint8_t *marks, int start) {
    using T = Tile<E, F>;
    using Memory = BackwardMemory<E, F>;
    constexpr int W = T::WIDTH;
    Walker<E, F> to_u(p.du.data, p.du, at, own, start), to_delta(p.ddelta.data, p.du, at, own, start);
    Walker<E, F> to_z(p.dz.data, p.du, at, own, start);
    bool aligned = WHOLE || p.aligned;
    float skip[W], dbias[W] = {}, dskip[W] = {};
    load_floats(skip, m.skip + own.channel);
#pragma unroll
    for (int v = 0; v < T::OWN; ++v) {
        if (!WHOLE && !own.has(v)) break;
        int token = own.token + v * T::ROWS;
        bool inside = own.live && start + token < at.end;
        typename T::Elements out, du;
        if (!WHOLE && !(inside && !(p.marks && marks[token] == PAD))) {
#pragma unroll
            for (int k = 0; k < W; ++k) out.at[k] = narrow<E>(0.0f);
            if (inside) {
                to_u.store(at, own, v, out, aligned);
                to_delta.store(at, own, v, out, aligned);
                if (p.z.data) to_z.store(at, own, v, out, aligned);
            }
            continue;
        }
        auto uv = T::get(m.u[buffer], v), gv = T::get(m.dy[buffer], v);
        float g[W], mixed[2 * W], dstep[W];
        load_floats(mixed, m.inputs + token * Inputs<F>::TOKEN + spot(2 * own.channel));
#pragma unroll
        for (int k = 0; k < W; ++k) g[k] = widen(gv.at[k]);
        if (WHOLE || p.z.data) {
            auto zv = T::get(m.z[buffer], v);
            auto yv = Memory::ROOM ? T::get(m.y, v) : Walker<E, F>(p.ungated, p.du, at, own, start).load(at, own, v);
#pragma unroll
            for (int k = 0; k < W; ++k) {
                float z = widen(zv.at[k]), s = sigmoid(z);
                out.at[k] = narrow<E>(g[k] * widen(yv.at[k]) * silu_slope(z, s));
                g[k] *= z * s;
            }
            to_z.store(at, own, v, out, aligned);
        }
        load_floats(dstep, m.gradients + token * Memory::ROW + spot(own.channel));
#pragma unroll
        for (int k = 0; k < W; ++k) {
            int place = Inputs<F>::mixed(k);
            float u = widen(uv.at[k]), step = mixed[place], dx = mixed[place + F::PER];
            dstep[k] = fmaf(u, dx, LN2 * dstep[k]);
            du.at[k] = narrow<E>(fmaf(skip[k], g[k], step * dx));
            dskip[k] = fmaf(g[k], u, dskip[k]);
        }
        if (WHOLE || p.softplus)
#pragma unroll
            for (int k = 0; k < W; ++k) dstep[k] *= softplus_slope<E>(mixed[Inputs<F>::mixed(k)]);
#pragma unroll
        for (int k = 0; k < W; ++k) out.at[k] = narrow<E>(dstep[k]), dbias[k] += dstep[k];
        to_delta.store(at, own, v, out, aligned);
        to_u.store(at, own, v, du, aligned);
    }
    add_share(m.shares[0], dbias);
    add_share(m.shares[1], dskip);
}
