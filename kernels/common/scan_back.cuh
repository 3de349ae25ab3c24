// What a block of the scan's backward has in shared memory, and how it finishes a tile.
#pragma once
#include "scan_prepare.cuh"
#include "scan_sums.cuh"

constexpr int WARPS = THREADS / LANES;
template <typename E, typename F> struct BackwardMemory {
    using T = Tile<E, F>;
    static constexpr int ROW = Inputs<F>::ROW;
    // Whether there is room for y, and for what is otherwise in its own place behind one more barrier.
    static constexpr bool ROOM = F::CHANNELS <= 128;
    E u[2][T::SIZE], z[2][T::SIZE], dy[2][T::SIZE], delta[T::SIZE], y[ROOM ? T::SIZE : 8];
    E raw[Coefficients<E, F, 2>::RAW];
    float inputs[Inputs<F>::SIZE];        // then, in the place of delta u: dx
    float gradients[F::TILE * ROW];       // dy times SiLU(z)
    float dstep[F::TILE * ROW];
    float b[F::TILE * F::WIDTH], c[F::TILE * F::WIDTH]; // neighbours, as they are widened together
    float4 saved[F::TILE / MICRO - 1][F::PER * F::STATES / 4][THREADS];
    union {
        Sums<F> own[WARPS];                 // within a walk
        float products[ROOM ? F::TILE * ROW : 4]; // behind it: shares of the skip weight's gradient
    };
    __device__ float *dd() { return ROOM ? products : gradients; }
    float sums[WARPS][F::TILE][2 * F::WIDTH];
    float bias[F::CHANNELS], skip[F::CHANNELS], totals[2 * F::CHANNELS]; // gradients of bias, then of skip weight, so far
    uint8_t marks[3][F::TILE]; // of the tile before, which others may still finish, this one and the next
};

// The tile's gradients of the sequences; leaves those of bias and skip weight, by token, in dstep and dd.
template <bool WHOLE, typename E, typename F>
__device__ __forceinline__ void finish(const Scan &p, BackwardMemory<E, F> &m, const Place<F> &at, const Tile<E, F> &own,
                                       int buffer, const uint8_t *marks, int start) {
    using T = Tile<E, F>;
    using Memory = BackwardMemory<E, F>;
    constexpr int W = T::WIDTH;
    Walker<E, F> to_u(p.du.data, p.du, at, own, start), to_delta(p.ddelta.data, p.du, at, own, start);
    Walker<E, F> to_z(p.dz.data, p.du, at, own, start);
    bool aligned = WHOLE || p.aligned;
    float skip[W];
    load_floats(skip, m.skip + own.channel);
#pragma unroll
    for (int v = 0; v < T::OWN; ++v) {
        if (!WHOLE && !own.has(v)) break;
        int token = own.token + v * T::ROWS;
        float *steps = m.dstep + token * Memory::ROW + spot(own.channel);
        float *products = m.dd() + token * Memory::ROW + spot(own.channel);
        bool inside = own.live && start + token < at.end;
        typename T::Elements out, du;
        float dstep[W] = {}, dd[W] = {};
        if (!WHOLE && !(inside && !(p.marks && marks[token] == PAD))) {
#pragma unroll
            for (int k = 0; k < W; ++k) out.at[k] = narrow<E>(0.0f);
            store_floats(steps, dstep);
            store_floats(products, dd);
            if (inside) {
                to_u.store(at, own, v, out, aligned);
                to_delta.store(at, own, v, out, aligned);
                if (p.z.data) to_z.store(at, own, v, out, aligned);
            }
            continue;
        }
        auto uv = T::get(m.u[buffer], v), gv = T::get(m.dy[buffer], v);
        float g[W], mixed[2 * W];
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
        load_floats(dstep, steps);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            int place = Inputs<F>::mixed(k);
            float u = widen(uv.at[k]), step = mixed[place], dx = mixed[place + F::PER];
            dstep[k] = fmaf(u, dx, LN2 * dstep[k]);
            du.at[k] = narrow<E>(fmaf(skip[k], g[k], step * dx));
            dd[k] = g[k] * u;
        }
        if (WHOLE || p.softplus)
#pragma unroll
            for (int k = 0; k < W; ++k) dstep[k] *= softplus_slope<E>(mixed[Inputs<F>::mixed(k)]);
#pragma unroll
        for (int k = 0; k < W; ++k) out.at[k] = narrow<E>(dstep[k]);
        store_floats(steps, dstep);
        store_floats(products, dd);
        to_delta.store(at, own, v, out, aligned);
        to_u.store(at, own, v, du, aligned);
    }
}
