//! Scans of few channels: time is cut into spans that are gone through at once, each twice.
//!
//! A span is an affine map of its starting state, `h -> decay h + end`. A first pass finds every span's map, from zero;
//! applied in order, the maps give every span the state that it starts from in the second pass. Going back, the gradient
//! of the state passes through the same maps with the same decays.

use super::forward::{Piece, scan};
use super::{Lane, Operands, coefficient};
use crate::backend::cpu::math::exp2;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::Rows;
use crate::ops::selective_scan::plan::runs_in;
use rayon::prelude::*;

/// What a span does to a state: `decay h + end`.
struct Affine<T> {
    decay: Vec<T>,
    end: Vec<T>,
}

impl<T: Real> Affine<T> {
    fn apply(&self, state: &[T]) -> Vec<T> {
        let terms = self.decay.iter().zip(&self.end).zip(state);
        terms.map(|((&decay, &end), &state)| decay * state + end).collect()
    }
}

impl<E: Element> Operands<'_, E> {
    /// The state at the start of every piece. With more than one span, each span is first scanned from zero.
    pub(super) fn starts(&self, pieces: &[Piece]) -> Vec<Vec<E::Real>> {
        let spans = self.plan.spans.len();
        let tile = |piece: &Piece| self.initial(piece.row, &self.plan.tiles[piece.tile]);
        if spans <= 1 {
            return pieces.iter().map(tile).collect();
        }
        let probe = |piece: &Piece| match piece.span + 1 < spans {
            true => E::Real::dispatch_on(self.isa, Probe { operands: self, piece }),
            false => Affine { decay: vec![], end: vec![] },
        };
        let maps: Vec<Affine<E::Real>> = pieces.par_iter().map(probe).collect();
        let mut starts: Vec<Vec<E::Real>> = Vec::with_capacity(pieces.len());
        for (i, piece) in pieces.iter().enumerate() {
            let start = match piece.span {
                0 => tile(piece),
                _ => maps[i - 1].apply(&starts[i - 1]),
            };
            starts.push(start);
        }
        starts
    }

    /// The gradient of the state at the end of every piece. With more than one span, each is first gone through from
    /// zero.
    pub(super) fn ends(
        &self,
        pieces: &[Piece],
        dy: Option<&Rows<E>>,
        dstate: &[E::Real],
    ) -> Vec<Vec<E::Real>> {
        let (spans, size) = (self.plan.spans.len(), self.block_size());
        let last = |piece: &Piece| {
            let tile = &self.plan.tiles[piece.tile];
            let start = piece.row * self.row_size();
            dstate[start + tile.start * size..start + tile.end * size].to_vec()
        };
        if spans <= 1 {
            return pieces.iter().map(last).collect();
        }
        let probe = |piece: &Piece| match piece.span {
            0 => Affine { decay: vec![], end: vec![] },
            _ => E::Real::dispatch_on(self.isa, BackProbe { operands: self, piece, dy }),
        };
        let maps: Vec<Affine<E::Real>> = pieces.par_iter().map(probe).collect();
        let mut ends: Vec<Vec<E::Real>> = vec![vec![]; pieces.len()];
        for (i, piece) in pieces.iter().enumerate().rev() {
            ends[i] = if piece.span + 1 == spans { last(piece) } else { maps[i + 1].apply(&ends[i + 1]) };
        }
        ends
    }

    /// The sum of the steps of a span in every lane, and whether a sequence begins there.
    #[inline(always)]
    fn total_step<S: Simd<E::Real>>(&self, s: S, piece: &Piece, lane: &Lane<E::Real, S>) -> (S::V, bool) {
        let (mut total, mut fresh) = (s.splat(E::Real::ZERO), false);
        for chunk in self.chunks(piece) {
            for run in runs_in(self.segments.row(piece.row), chunk) {
                fresh |= run.fresh;
                for t in run.tokens {
                    total = s.add(total, self.input(s, [piece.row, t], lane).delta);
                }
            }
        }
        (total, fresh)
    }

    /// The decay of every state over a span: `exp(A total)`, or zero where a sequence begins.
    #[inline(always)]
    fn total_decay<S: Simd<E::Real>>(
        &self,
        s: S,
        piece: &Piece,
        lane: &Lane<E::Real, S>,
        decay: &mut [E::Real],
    ) {
        let (total, fresh) = self.total_step(s, piece, lane);
        for (n, decay) in decay.chunks_exact_mut(S::LANES).enumerate() {
            // SAFETY: n < N, and the chunk holds LANES numbers.
            unsafe {
                let value = exp2(s, s.mul(total, s.load(lane.a.add(n * S::LANES))));
                s.store(decay.as_mut_ptr(), if fresh { s.splat(E::Real::ZERO) } else { value });
            }
        }
    }
}

/// Scans a piece from zero, for its [`Affine`] map.
struct Probe<'a, E: Element> {
    operands: &'a Operands<'a, E>,
    piece: &'a Piece,
}

impl<E: Element> Kernel<E::Real> for Probe<'_, E> {
    type Output = Affine<E::Real>;

    #[inline(always)]
    fn run<S: Simd<E::Real>>(self, s: S) -> Affine<E::Real> {
        let (p, row) = (self.operands, self.piece.row);
        let (size, tile) = (p.block_size(), p.plan.tiles[self.piece.tile].clone());
        let mut map = Affine {
            decay: vec![E::Real::ZERO; tile.len() * size],
            end: vec![E::Real::ZERO; tile.len() * size],
        };
        let blocks = map.decay.chunks_exact_mut(size).zip(map.end.chunks_exact_mut(size));
        for (index, (decay, end)) in tile.zip(blocks) {
            let lane = p.lane(s, index);
            p.total_decay(s, self.piece, &lane, decay);
            for chunk in p.chunks(self.piece) {
                for run in runs_in(p.segments.row(row), chunk) {
                    if run.fresh {
                        end.fill(E::Real::ZERO);
                    }
                    for t in run.tokens {
                        scan(s, p, [row, t], &lane, end);
                    }
                }
            }
        }
        map
    }
}

/// Goes back through a piece from zero, for the [`Affine`] map of its gradient.
struct BackProbe<'a, E: Element> {
    operands: &'a Operands<'a, E>,
    piece: &'a Piece,
    dy: Option<&'a Rows<'a, E>>,
}

impl<E: Element> Kernel<E::Real> for BackProbe<'_, E> {
    type Output = Affine<E::Real>;

    #[inline(always)]
    fn run<S: Simd<E::Real>>(self, s: S) -> Affine<E::Real> {
        let (p, row) = (self.operands, self.piece.row);
        let (size, tile) = (p.block_size(), p.plan.tiles[self.piece.tile].clone());
        let mut map = Affine {
            decay: vec![E::Real::ZERO; tile.len() * size],
            end: vec![E::Real::ZERO; tile.len() * size],
        };
        let blocks = map.decay.chunks_exact_mut(size).zip(map.end.chunks_exact_mut(size));
        for (index, (decay, dh)) in tile.zip(blocks) {
            let lane = p.lane(s, index);
            p.total_decay(s, self.piece, &lane, decay);
            for chunk in p.chunks(self.piece).rev() {
                for run in runs_in(p.segments.row(row), chunk).rev() {
                    for t in run.tokens.rev() {
                        let c = p.token(1, [row, t], lane.block);
                        let g = p.ungated(s, self.dy, [row, t], &lane).g;
                        let delta = p.input(s, [row, t], &lane).delta;
                        for (n, dh) in dh.chunks_exact_mut(S::LANES).enumerate() {
                            // SAFETY: n < N; the pointers come with N registers or numbers.
                            unsafe {
                                let sum = s.fma(g, coefficient(s, lane.c, c, n), s.load(dh.as_ptr()));
                                let decay = exp2(s, s.mul(delta, s.load(lane.a.add(n * S::LANES))));
                                s.store(dh.as_mut_ptr(), s.mul(sum, decay));
                            }
                        }
                    }
                    if run.fresh {
                        dh.fill(E::Real::ZERO);
                    }
                }
            }
        }
        map
    }
}
