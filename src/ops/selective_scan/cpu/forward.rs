//! The forward pass: every piece of work walks its channels through its chunks of tokens, states in the first cache.
//!
//! Per token, channel and state: one exponential (10 operations), 4 for the recurrence and the output, 3 loads and a
//! store of which all but the inputs' stay in the first cache. At 14 operations a state and 16 lanes, one f32 token of
//! 1536 channels and 16 states is 21,500 instructions, so that arithmetic, not memory, is the floor.

use super::{AHEAD, Coefficient, Lane, Operands, coefficient, from_blocks};
use crate::backend::cpu::math::{exp2, silu};
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::Outlet;
use crate::ops::selective_scan::plan::runs_in;
use rayon::prelude::*;
use std::ops::Range;

/// What a forward pass leaves.
pub(in super::super) struct Scanned<E: Element> {
    /// `[B, L, D]`
    pub(in super::super) y: Vec<E>,
    /// `[B, D, N]`
    pub(in super::super) state: Vec<E::Real>,
    /// The states before every chunk, `[B, chunks]` blocks of a row each; empty where none were asked for.
    pub(in super::super) kept: Vec<E::Real>,
}

/// One piece of work: a row, a tile of its channels, a span of its chunks.
pub(super) struct Piece {
    pub(super) row: usize,
    pub(super) tile: usize,
    pub(super) span: usize,
}

impl<E: Element> Operands<'_, E> {
    /// The pieces of work, span by span within a tile, tile by tile within a row.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        let (tiles, spans) = (self.plan.tiles.len(), self.plan.spans.len());
        let count = self.sizes.batch * tiles * spans;
        (0..count)
            .map(|i| Piece { row: i / spans / tiles, tile: i / spans % tiles, span: i % spans })
            .collect()
    }

    /// Scans; keeps the states before the chunks where asked.
    pub(in super::super) fn forward(&self, keep: bool) -> Scanned<E> {
        let sizes = &self.sizes;
        let elements = sizes.batch * sizes.length * sizes.channels;
        let states = if keep { sizes.batch * self.plan.chunks * self.row_size() } else { 0 };
        let (mut y, mut kept): (Vec<E>, Vec<E::Real>) = (Vec::new(), Vec::new());
        let pieces = self.pieces();
        let starts = self.starts(&pieces);
        let ends: Vec<Vec<E::Real>> = {
            let y = Outlet::fresh_or_zeroed(&mut y, elements, self.padded);
            let kept = Outlet::fresh(&mut kept, states);
            let walk = |(piece, state): (&Piece, Vec<E::Real>)| {
                let kept = keep.then_some(&kept);
                E::Real::dispatch_on(self.isa, Walk { operands: self, piece, state, y: &y, kept })
            };
            pieces.par_iter().zip(starts).map(walk).collect()
        };
        // SAFETY: padding was zeroed; the pieces wrote every other token, and the states before every chunk.
        unsafe {
            y.set_len(elements);
            kept.set_len(states);
        }
        // the end of a tile's last span is its part of the row's final state
        let last = pieces.iter().zip(&ends).filter(|(piece, _)| piece.span + 1 == self.plan.spans.len());
        let mut state: Vec<E::Real> = last.flat_map(|(_, end)| end.iter().copied()).collect();
        if sizes.length == 0 {
            let all = 0..self.plan.blocks.len();
            state = (0..sizes.batch).flat_map(|row| self.initial(row, &all)).collect();
        }
        let state = from_blocks(&self.plan, self.lanes, sizes.states, &state);
        Scanned { y, state, kept }
    }

    /// The chunks of a piece.
    pub(super) fn chunks(&self, piece: &Piece) -> Range<usize> {
        self.plan.spans[piece.span].clone()
    }
}

/// Walks a piece from its starting state to its end, writing outputs.
struct Walk<'a, E: Element> {
    operands: &'a Operands<'a, E>,
    piece: &'a Piece,
    state: Vec<E::Real>,
    y: &'a Outlet<'a, E>,
    kept: Option<&'a Outlet<'a, E::Real>>,
}

impl<E: Element> Kernel<E::Real> for Walk<'_, E> {
    type Output = Vec<E::Real>;

    #[inline(always)]
    fn run<S: Simd<E::Real>>(mut self, s: S) -> Vec<E::Real> {
        let (p, row) = (self.operands, self.piece.row);
        let (size, tile) = (p.block_size(), p.plan.tiles[self.piece.tile].clone());
        for chunk in p.chunks(self.piece) {
            if let Some(kept) = self.kept {
                let offset = (row * p.plan.chunks + chunk) * p.row_size() + tile.start * size;
                let to = kept.at(offset, self.state.len());
                // SAFETY: at() checked the place, which is this piece's own.
                unsafe { std::ptr::copy_nonoverlapping(self.state.as_ptr(), to, self.state.len()) };
            }
            for (index, state) in tile.clone().zip(self.state.chunks_exact_mut(size)) {
                let lane = p.lane(s, index);
                for run in runs_in(p.segments.row(row), chunk) {
                    if run.fresh {
                        state.fill(E::Real::ZERO);
                    }
                    for t in run.tokens {
                        let y = scan(s, p, [row, t], &lane, state);
                        let offset =
                            (row * p.sizes.length + t) * p.sizes.channels + lane.block.channels.start;
                        let to = self.y.at(offset, lane.width);
                        // SAFETY: at() checked the place, which is this piece's own.
                        unsafe { p.store(s, to, y, &lane) };
                    }
                }
            }
        }
        self.state
    }
}

/// One token of one block: moves its state on and returns its output.
#[inline(always)]
pub(super) fn scan<E: Element, S: Simd<E::Real>>(
    s: S,
    p: &Operands<E>,
    at: [usize; 2],
    lane: &Lane<E::Real, S>,
    state: &mut [E::Real],
) -> S::V {
    p.prefetch(s, at[0], Some(at[1] + AHEAD), lane);
    let x = p.input(s, at, lane);
    let du = s.mul(x.delta, x.u);
    let (b, c) = (p.token(0, at, lane.block), p.token(1, at, lane.block));
    let mut y = lane.d.map_or(s.splat(E::Real::ZERO), |d| s.mul(d, x.u));
    for (n, h) in state.chunks_exact_mut(S::LANES).enumerate() {
        // SAFETY: state holds N registers, so n < N; the pointers come with N of theirs.
        unsafe {
            let decay = exp2(s, s.mul(x.delta, s.load(lane.a.add(n * S::LANES))));
            let input = s.mul(du, coefficient(s, lane.b, b, n));
            let next = s.fma(decay, s.load(h.as_ptr()), input);
            s.store(h.as_mut_ptr(), next);
            y = s.fma(next, coefficient(s, lane.c, c, n), y);
        }
    }
    match &p.z {
        Some(z) => s.mul(y, silu(s, p.load(s, z, at, lane))),
        None => y,
    }
}

/// Whether `B` and `C` are constant in time.
pub(super) fn constant<T>(coefficient: &Coefficient<T>) -> bool {
    matches!(coefficient, Coefficient::Constant(_))
}
