//! The backward pass: chunk by chunk from the end, each recomputed from the state kept before it.
//!
//! Per token, channel and state: the forward's recurrence once more (12 operations) and 9 for the gradients. The
//! gradients of `B` and `C` are sums over channels: each tile adds its blocks up lane by lane, sums the lanes once, and
//! the tiles are added in order.

use super::forward::{Piece, constant};
use super::{AHEAD, Lane, Operands, coefficient, from_blocks, to_blocks};
use crate::backend::cpu::math::{exp2, sigmoid, silu_grad};
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows};
use crate::ops::selective_scan::plan::{CHUNK, runs_in};
use rayon::prelude::*;

/// The gradients of every argument, in its own layout.
pub(in super::super) struct Gradients<E: Element> {
    pub(in super::super) u: Vec<E>,
    pub(in super::super) delta: Vec<E>,
    pub(in super::super) z: Option<Vec<E>>,
    pub(in super::super) a: Vec<E::Real>,
    pub(in super::super) b: Vec<E::Real>,
    pub(in super::super) c: Vec<E::Real>,
    pub(in super::super) d: Vec<E::Real>,
    pub(in super::super) bias: Vec<E::Real>,
    pub(in super::super) initial: Vec<E::Real>,
}

/// Gradients of one piece that are sums over time, and the one that leaves it at its start.
struct Sums<T> {
    /// `dh` before the first token, blocks of `[N, LANES]`.
    state: Vec<T>,
    a: Vec<T>,
    /// Of constant `B` and `C`, else unused.
    bc: [Vec<T>; 2],
    /// Blocks of `[LANES]`.
    d: Vec<T>,
    bias: Vec<T>,
}

/// Where the gradients of the sequences go.
struct Outlets<'a, E: Element> {
    u: Outlet<'a, E>,
    delta: Outlet<'a, E>,
    z: Option<Outlet<'a, E>>,
    /// A share per tile: `[B, tiles, L, N]`.
    bc: [Outlet<'a, E::Real>; 2],
}

impl<E: Element> Operands<'_, E> {
    /// Goes back from the gradients of the output (`[B, L, D]`) and of the final state (`[B, D, N]`).
    pub(in super::super) fn backward(
        &self,
        kept: &[E::Real],
        dy: Option<Rows<E>>,
        dstate: Option<&[E::Real]>,
    ) -> Gradients<E> {
        let sizes = &self.sizes;
        let (tiles, n) = (self.plan.tiles.len(), sizes.states);
        let elements = sizes.batch * sizes.length * sizes.channels;
        let sequence = |values| Outlet::fresh_or_zeroed(values, elements, self.padded);
        let share_sizes = [&self.b, &self.c].map(|coefficient| match constant(coefficient) {
            true => 0,
            false => sizes.batch * tiles * sizes.length * n,
        });
        let (mut u, mut delta, mut z) = (Vec::new(), Vec::new(), self.z.as_ref().map(|_| Vec::new()));
        let mut shares: [Vec<E::Real>; 2] = [vec![], vec![]];
        let zeros = vec![E::Real::ZERO; sizes.batch * sizes.channels * n];
        let dstate = to_blocks(&self.plan, self.lanes, n, dstate.unwrap_or(&zeros));
        let pieces = self.pieces();
        let ends = self.ends(&pieces, dy.as_ref(), &dstate);
        let sums: Vec<Sums<E::Real>> = {
            let [b, c] = &mut shares;
            let share = |values, size| Outlet::fresh_or_zeroed(values, size, self.padded);
            let outlets = Outlets {
                u: sequence(&mut u),
                delta: sequence(&mut delta),
                z: z.as_mut().map(sequence),
                bc: [share(b, share_sizes[0]), share(c, share_sizes[1])],
            };
            let back = |(piece, state): (&Piece, Vec<E::Real>)| {
                let back = Back { operands: self, piece, state, kept, dy: dy.as_ref(), outlets: &outlets };
                E::Real::dispatch_on(self.isa, back)
            };
            pieces.par_iter().zip(ends).map(back).collect()
        };
        // SAFETY: padding was zeroed, and the pieces wrote every other token.
        unsafe {
            for sequence in [Some(&mut u), Some(&mut delta), z.as_mut()].into_iter().flatten() {
                sequence.set_len(elements);
            }
            for (share, size) in shares.iter_mut().zip(share_sizes) {
                share.set_len(size);
            }
        }
        let first = pieces.iter().zip(&sums).filter(|(piece, _)| piece.span == 0);
        let mut initial: Vec<E::Real> = first.flat_map(|(_, sums)| sums.state.iter().copied()).collect();
        if sizes.length == 0 {
            initial = dstate;
        }
        let over_rows = |of: fn(&Sums<E::Real>) -> &Vec<E::Real>, width: usize| {
            let mut total = vec![E::Real::ZERO; self.plan.blocks.len() * width * self.lanes];
            for (piece, sums) in pieces.iter().zip(&sums) {
                let start = self.plan.tiles[piece.tile].start * width * self.lanes;
                total[start..].iter_mut().zip(of(sums)).for_each(|(total, &x)| *total += x);
            }
            from_blocks(&self.plan, self.lanes, width, &total)
        };
        let side = |side: usize, of: fn(&Sums<E::Real>) -> &Vec<E::Real>| match sizes.groups[side] {
            None => over_rows(of, n),
            Some(groups) => self.over_tiles(&shares[side], side, groups),
        };
        Gradients {
            a: over_rows(|sums| &sums.a, n),
            b: side(0, |sums| &sums.bc[0]),
            c: side(1, |sums| &sums.bc[1]),
            d: over_rows(|sums| &sums.d, 1),
            bias: over_rows(|sums| &sums.bias, 1),
            initial: from_blocks(&self.plan, self.lanes, n, &initial),
            u,
            delta,
            z,
        }
    }

    /// `[B, L, G, N]` from the shares of the tiles, in their order.
    fn over_tiles(&self, shares: &[E::Real], side: usize, groups: usize) -> Vec<E::Real> {
        let (length, n) = (self.sizes.length, self.sizes.states);
        let mut total = vec![E::Real::ZERO; self.sizes.batch * length * groups * n];
        for (i, share) in shares.chunks((length * n).max(1)).enumerate() {
            let (row, tile) = (i / self.plan.tiles.len(), i % self.plan.tiles.len());
            let group = self.plan.blocks[self.plan.tiles[tile].start].groups[side];
            for (t, share) in share.chunks(n).enumerate() {
                let start = ((row * length + t) * groups + group) * n;
                total[start..].iter_mut().zip(share).for_each(|(total, &x)| *total += x);
            }
        }
        total
    }

    /// The gradient of the output before its gate, at one token.
    #[inline(always)]
    pub(super) fn ungated<S: Simd<E::Real>>(
        &self,
        s: S,
        dy: Option<&Rows<E>>,
        at: [usize; 2],
        lane: &Lane<E::Real, S>,
    ) -> Ungated<S::V> {
        let dy = dy.map_or(s.splat(E::Real::ZERO), |dy| self.load(s, dy, at, lane));
        match &self.z {
            None => Ungated { dy, g: dy, z: dy, sigmoid: dy },
            Some(z) => {
                let z = self.load(s, z, at, lane);
                let sigmoid = sigmoid(s, z);
                Ungated { dy, g: s.mul(dy, s.mul(z, sigmoid)), z, sigmoid }
            }
        }
    }
}

/// The gradient of one token's output, after (`dy`) and before (`g`) its gate, with what the gate's own gradient needs.
pub(super) struct Ungated<V> {
    dy: V,
    pub(super) g: V,
    z: V,
    sigmoid: V,
}

/// Goes back through a piece from the gradient of the state at its end.
struct Back<'a, E: Element> {
    operands: &'a Operands<'a, E>,
    piece: &'a Piece,
    state: Vec<E::Real>,
    kept: &'a [E::Real],
    dy: Option<&'a Rows<'a, E>>,
    outlets: &'a Outlets<'a, E>,
}

/// Recomputed values of one chunk of one block, by token of the chunk.
struct Tape<T> {
    /// The states: before the first token, then after every token; `[N, LANES]` each.
    states: Vec<T>,
    /// `exp(delta A)`, `[N, LANES]` each.
    decays: Vec<T>,
    /// `u`, `delta + bias` and `delta` after softplus, `[LANES]` each.
    inputs: Vec<T>,
    /// The tile's gradients of `B` and `C`, `[N, LANES]` each.
    bc: [Vec<T>; 2],
    /// `[N, LANES]` of zeros: the state before a fresh sequence.
    blank: Vec<T>,
}

/// A token of a chunk: its place in the row, and whether a sequence begins there.
type Token = (usize, bool);

impl<E: Element> Kernel<E::Real> for Back<'_, E> {
    type Output = Sums<E::Real>;

    #[inline(always)]
    fn run<S: Simd<E::Real>>(mut self, s: S) -> Sums<E::Real> {
        let (p, row) = (self.operands, self.piece.row);
        let (size, tile) = (p.block_size(), p.plan.tiles[self.piece.tile].clone());
        let zeros = |n: usize| vec![E::Real::ZERO; n];
        let (blocks, vectors) = (tile.len() * size, tile.len() * S::LANES);
        let bc = [zeros(blocks), zeros(blocks)];
        let mut sums = Sums { state: vec![], a: zeros(blocks), bc, d: zeros(vectors), bias: zeros(vectors) };
        let mut tape = Tape {
            states: zeros((CHUNK + 1) * size),
            decays: zeros(CHUNK * size),
            inputs: zeros(CHUNK * 3 * S::LANES),
            bc: [zeros(CHUNK * size), zeros(CHUNK * size)],
            blank: zeros(size),
        };
        for chunk in p.chunks(self.piece).rev() {
            let tokens: Vec<Token> = runs_in(p.segments.row(row), chunk)
                .flat_map(|run| run.tokens.clone().map(move |t| (t, run.fresh && t == run.tokens.start)))
                .collect();
            tape.bc.iter_mut().for_each(|bc| bc[..tokens.len() * size].fill(E::Real::ZERO));
            for (i, index) in tile.clone().enumerate() {
                let lane = p.lane(s, index);
                let start = (row * p.plan.chunks + chunk) * p.row_size() + index * size;
                tape.states[..size].copy_from_slice(&self.kept[start..start + size]);
                self.replay(s, &tokens, &lane, &mut tape);
                self.reverse(s, &tokens, &lane, &mut tape, i, &mut sums);
            }
            self.share(s, &tokens, &tape);
        }
        sums.state = self.state;
        sums
    }
}

impl<E: Element> Back<'_, E> {
    /// Computes a chunk of a block once more, onto the tape.
    #[inline(always)]
    fn replay<S: Simd<E::Real>>(
        &self,
        s: S,
        tokens: &[Token],
        lane: &Lane<E::Real, S>,
        tape: &mut Tape<E::Real>,
    ) {
        let (p, size) = (self.operands, self.operands.block_size());
        for (k, &(t, fresh)) in tokens.iter().enumerate() {
            let at = [self.piece.row, t];
            p.prefetch(s, at[0], Some(t + AHEAD), lane);
            let x = p.input(s, at, lane);
            let du = s.mul(x.delta, x.u);
            let b = p.token(0, at, lane.block);
            let (before, after) = tape.states[k * size..(k + 2) * size].split_at_mut(size);
            let before = if fresh { &tape.blank } else { &*before };
            let decays = &mut tape.decays[k * size..(k + 1) * size];
            let inputs = &mut tape.inputs[k * 3 * S::LANES..(k + 1) * 3 * S::LANES];
            // SAFETY: before, after and decays hold N registers, inputs three; the pointers come with N of theirs.
            unsafe {
                s.store(inputs.as_mut_ptr(), x.u);
                s.store(inputs.as_mut_ptr().add(S::LANES), x.raw);
                s.store(inputs.as_mut_ptr().add(2 * S::LANES), x.delta);
                for n in 0..p.sizes.states {
                    let o = n * S::LANES;
                    let decay = exp2(s, s.mul(x.delta, s.load(lane.a.add(o))));
                    let input = s.mul(du, coefficient(s, lane.b, b, n));
                    s.store(decays.as_mut_ptr().add(o), decay);
                    s.store(after.as_mut_ptr().add(o), s.fma(decay, s.load(before.as_ptr().add(o)), input));
                }
            }
        }
    }

    /// Goes back through the tape of block `i` of the tile.
    #[inline(always)]
    fn reverse<S: Simd<E::Real>>(
        &mut self,
        s: S,
        tokens: &[Token],
        lane: &Lane<E::Real, S>,
        tape: &mut Tape<E::Real>,
        i: usize,
        sums: &mut Sums<E::Real>,
    ) {
        let (p, size) = (self.operands, self.operands.block_size());
        let ln2 = s.splat(E::Real::LN_2_HI + E::Real::LN_2_LO);
        let dh = &mut self.state[i * size..(i + 1) * size];
        let da = &mut sums.a[i * size..(i + 1) * size];
        let zero = s.splat(E::Real::ZERO);
        let (mut dd, mut dbias) = (zero, zero);
        for (k, &(t, fresh)) in tokens.iter().enumerate().rev() {
            let at = [self.piece.row, t];
            let [b, c] = [p.token(0, at, lane.block), p.token(1, at, lane.block)];
            if let (Some(dy), Some(t)) = (self.dy, t.checked_sub(AHEAD)) {
                s.prefetch(dy.row([at[0], t])[lane.block.channels.clone()].as_ptr());
            }
            let out = p.ungated(s, self.dy, at, lane);
            let (before, after) = tape.states[k * size..(k + 2) * size].split_at(size);
            let before = if fresh { &tape.blank } else { before };
            let decays = &tape.decays[k * size..(k + 1) * size];
            let [tape_b, tape_c] = &mut tape.bc;
            let [sum_b, sum_c] = &mut sums.bc;
            // a constant B or C gathers over time, another over the blocks of the tile
            let gather = |is_constant: bool, sum: *mut E::Real, tape: *mut E::Real| match is_constant {
                true => sum,
                false => tape,
            };
            let db = gather(
                lane.b.is_some(),
                sum_b[i * size..(i + 1) * size].as_mut_ptr(),
                tape_b[k * size..(k + 1) * size].as_mut_ptr(),
            );
            let dc = gather(
                lane.c.is_some(),
                sum_c[i * size..(i + 1) * size].as_mut_ptr(),
                tape_c[k * size..(k + 1) * size].as_mut_ptr(),
            );
            let inputs = tape.inputs[k * 3 * S::LANES..(k + 1) * 3 * S::LANES].as_ptr();
            // SAFETY: every slice above holds N registers (inputs three), and n < N.
            let (u, raw, delta) =
                unsafe { (s.load(inputs), s.load(inputs.add(S::LANES)), s.load(inputs.add(2 * S::LANES))) };
            let du = s.mul(delta, u);
            let mut y = lane.d.map_or(zero, |d| s.mul(d, u));
            let (mut d_delta, mut d_du) = (zero, zero);
            for n in 0..p.sizes.states {
                let o = n * S::LANES;
                // SAFETY: as above.
                unsafe {
                    let (bn, cn) = (coefficient(s, lane.b, b, n), coefficient(s, lane.c, c, n));
                    let h = s.load(after.as_ptr().add(o));
                    let g = s.fma(out.g, cn, s.load(dh.as_ptr().add(o)));
                    s.store(dc.add(o), s.fma(out.g, h, s.load(dc.add(o))));
                    s.store(db.add(o), s.fma(g, du, s.load(db.add(o))));
                    d_du = s.fma(g, bn, d_du);
                    let back = s.mul(g, s.load(decays.as_ptr().add(o)));
                    let slope = s.mul(back, s.load(before.as_ptr().add(o)));
                    d_delta = s.fma(slope, s.load(lane.a.add(o)), d_delta);
                    s.store(da.as_mut_ptr().add(o), s.fma(slope, delta, s.load(da.as_ptr().add(o))));
                    s.store(dh.as_mut_ptr().add(o), back);
                    y = s.fma(h, cn, y);
                }
            }
            if fresh {
                dh.fill(E::Real::ZERO);
            }
            dd = s.fma(out.g, u, dd);
            let skip = lane.d.map_or(zero, |d| s.mul(out.g, d));
            let d_delta = s.fma(d_du, u, s.mul(d_delta, ln2));
            let d_delta = if p.softplus { s.mul(d_delta, sigmoid(s, raw)) } else { d_delta };
            dbias = s.add(dbias, d_delta);
            let offset = (at[0] * p.sizes.length + t) * p.sizes.channels + lane.block.channels.start;
            // SAFETY: at() checked the places, which are this piece's own.
            unsafe {
                p.store(s, self.outlets.u.at(offset, lane.width), s.fma(d_du, delta, skip), lane);
                p.store(s, self.outlets.delta.at(offset, lane.width), d_delta, lane);
                if let Some(z) = &self.outlets.z {
                    let dz = s.mul(s.mul(out.dy, y), silu_grad(s, out.z, out.sigmoid));
                    p.store(s, z.at(offset, lane.width), dz, lane);
                }
            }
        }
        for (sum, value) in [(&mut sums.d, dd), (&mut sums.bias, dbias)] {
            let sum = sum[i * S::LANES..(i + 1) * S::LANES].as_mut_ptr();
            // SAFETY: the slice holds LANES numbers.
            unsafe { s.store(sum, s.add(s.load(sum), value)) };
        }
    }

    /// Sums the lanes of the tile's gradients of `B` and `C` in a chunk.
    #[inline(always)]
    fn share<S: Simd<E::Real>>(&self, s: S, tokens: &[Token], tape: &Tape<E::Real>) {
        let (p, n) = (self.operands, self.operands.sizes.states);
        let sides = [constant(&p.b), constant(&p.c)];
        for (side, _) in sides.iter().enumerate().filter(|(_, is_constant)| !**is_constant) {
            for (k, &(t, _)) in tokens.iter().enumerate() {
                let from = &tape.bc[side][k * n * S::LANES..(k + 1) * n * S::LANES];
                let row = self.piece.row * p.plan.tiles.len() + self.piece.tile;
                let to = self.outlets.bc[side].at((row * p.sizes.length + t) * n, n);
                for (n, lanes) in from.chunks_exact(S::LANES).enumerate() {
                    // SAFETY: at() checked the place, which is this piece's own; the chunk holds LANES numbers.
                    unsafe { *to.add(n) = s.sum(s.load(lanes.as_ptr())) };
                }
            }
        }
    }
}
