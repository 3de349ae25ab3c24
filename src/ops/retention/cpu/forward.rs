//! The forward pass, chunk by chunk.
//!
//! A chunk of `C` tokens takes `2 C K V` operations for what comes out of the state, as many for what goes in, and about
//! `C^2 (K + V)` for the tokens among themselves, whose upper triangle is left out block by block.

use super::Operands;
use super::decay::Weights;
use super::product::{Target, all_finite, multiply, weigh};
use crate::backend::cpu::matrix::Matrix;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Kernel, Real, Simd};
use crate::backend::cpu::view::Outlet;
use crate::ops::retention::plan::{self, Piece};

/// Tokens that look at those before them together.
pub(super) const BLOCK: usize = 64;
/// Tokens that go through the state together.
pub(super) const DEEP: usize = 256;

/// What a forward pass leaves.
pub(in super::super) struct Retained<T> {
    /// `[B, T, H, V]`
    pub(in super::super) o: Vec<T>,
    /// `[B, H, K, V]`
    pub(in super::super) state: Vec<T>,
    /// Of every row and head the states at the start of its spans, but for zeros; empty where none were asked for.
    pub(in super::super) kept: Vec<Vec<T>>,
}

impl<T: Real> Operands<'_, T> {
    /// In pieces of at most `chunk` tokens; keeps the states before the spans where asked.
    pub(in super::super) fn forward(&self, chunk: usize, keep: bool) -> Retained<T> {
        let sizes = &self.sizes;
        let outputs = sizes.batch * sizes.length * sizes.heads * sizes.values;
        let states = sizes.batch * sizes.heads * self.state_size();
        let (mut o, mut state) = (Vec::new(), Vec::new());
        let kept = {
            let o = Outlet::fresh_or_zeroed(&mut o, outputs, self.padded);
            let state = Outlet::fresh(&mut state, states);
            parallel::map(&self.tasks(), self.work(), |&task| {
                T::dispatch_on(
                    self.isa,
                    Walk { operands: self, task, chunk, o: Some(&o), state: Some(&state), keep },
                )
            })
        };
        // SAFETY: padding was zeroed; every head of every row wrote all of its own.
        unsafe {
            o.set_len(outputs);
            state.set_len(states);
        }
        Retained { o, state, kept: if keep { kept } else { vec![] } }
    }

    /// The states before the spans of one head, as a forward pass in pieces of at most `chunk` tokens keeps them.
    pub(super) fn kept(&self, task: [usize; 2], chunk: usize) -> Vec<T> {
        T::dispatch_on(self.isa, Walk { operands: self, task, chunk, o: None, state: None, keep: true })
    }
}

/// Walks the pieces of one head of one row; returns the kept states.
struct Walk<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    task: [usize; 2],
    chunk: usize,
    o: Option<&'a Outlet<'a, T>>,
    state: Option<&'a Outlet<'a, T>>,
    keep: bool,
}

impl<T: Real> Kernel<T> for Walk<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> Vec<T> {
        let (p, [row, head]) = (self.operands, self.task);
        let Walk { task, chunk, .. } = self;
        let size = p.state_size();
        let pieces = p.pieces(task, chunk);
        let mut state = p.initial(task).map_or_else(|| vec![T::ZERO; size], |state| state.to_vec());
        let mut walker = Walker::new(s, p, task, &pieces);
        let mut kept = vec![];
        let spans = if self.keep { plan::spans(&pieces, &p.sizes) } else { vec![] };
        let mut starts = spans.iter().map(|span| span.start).peekable();
        for (i, piece) in pieces.iter().enumerate() {
            if starts.next_if_eq(&i).is_some() && !piece.fresh {
                kept.extend_from_slice(&state);
            }
            walker.turn_to(piece);
            if let Some(o) = self.o {
                let offset =
                    ((row * p.sizes.length + piece.tokens.start) * p.sizes.heads + head) * p.sizes.values;
                let stride = p.sizes.heads * p.sizes.values;
                let to = o.at(offset, (piece.tokens.len() - 1) * stride + p.sizes.values);
                // SAFETY: at() checked the places; those of this head are this task's own.
                unsafe { walker.outputs(piece, &state, Target { start: to, stride }) };
            }
            if self.o.is_some() || self.keep && i + 1 < pieces.len() {
                walker.advance(piece, &mut state);
            }
        }
        if let Some(to) = self.state {
            let to = to.at((row * p.sizes.heads + head) * size, size);
            // SAFETY: at() checked the places, which are this task's own.
            unsafe { std::ptr::copy_nonoverlapping(state.as_ptr(), to, size) };
        }
        kept
    }
}

/// One head of one row and what its pieces need for a while.
pub(super) struct Walker<'a, T: Real, S: Simd<T>> {
    s: S,
    operands: &'a Operands<'a, T>,
    task: [usize; 2],
    pub(super) weights: Weights<T>,
    /// Weighted queries or keys.
    rows: Vec<T>,
    /// Queries against keys.
    scores: Vec<T>,
    decays: Vec<T>,
}

impl<'a, T: Real, S: Simd<T>> Walker<'a, T, S> {
    #[inline(always)]
    pub(super) fn new(s: S, operands: &'a Operands<'a, T>, task: [usize; 2], pieces: &[Piece]) -> Self {
        let longest = pieces.iter().map(|piece| piece.tokens.len()).max().unwrap_or(0);
        Self {
            s,
            operands,
            task,
            weights: Weights::new(s, &operands.decays, task[1], longest),
            rows: vec![T::ZERO; longest.min(DEEP) * operands.sizes.keys],
            scores: vec![T::ZERO; longest.min(BLOCK) * longest],
            decays: vec![T::ZERO; longest],
        }
    }

    #[inline(always)]
    pub(super) fn turn_to(&mut self, piece: &Piece) {
        self.weights.set(self.s, &self.operands.decays, self.task, piece);
    }

    /// The outputs of the current piece.
    ///
    /// # Safety
    /// `to` has places for them that nobody else touches.
    #[inline(always)]
    unsafe fn outputs(&mut self, piece: &Piece, state: &[T], to: Target<T>) {
        let (s, p) = (self.s, self.operands);
        let [q, k, v] = p.matrices(self.task, &piece.tokens);
        let (length, keys, values) = (piece.tokens.len(), p.sizes.keys, p.sizes.values);
        let state = Matrix::new(state, [keys, values], [values, 1]);
        if !piece.fresh {
            for start in (0..length).step_by(DEEP) {
                let q = q.part([start, 0], [DEEP.min(length - start), keys]);
                let weights = &self.weights.from_start[start..];
                let q = weigh(s, q, |i| weights[i] * p.scale, &mut self.rows);
                // SAFETY: rows of the caller's target.
                unsafe { multiply(to.from(start), None, q, state) };
            }
        }
        // what is not finite must not meet the zeros of the upper triangle
        let block = if all_finite(s, v) { BLOCK } else { 1 };
        for start in (0..length).step_by(block) {
            let rows = block.min(length - start);
            let end = start + rows;
            let q = weigh(s, q.part([start, 0], [rows, keys]), |_| p.scale, &mut self.rows);
            // SAFETY: the scores have places for rows of `end <= length`.
            unsafe {
                let to = Target::new(&mut self.scores, end);
                multiply(to, None, q, k.part([0, 0], [end, keys]).transposed());
            }
            for (i, scores) in self.scores.chunks_mut(end).enumerate().take(rows) {
                mask(s, scores, self.weights.row(s, start + i, &mut self.decays));
            }
            let scores = Matrix::new(&self.scores, [rows, end], [end, 1]);
            let keep = (!piece.fresh).then_some(T::ONE);
            // SAFETY: rows of the caller's target, filled above where they are kept.
            unsafe { multiply(to.from(start), keep, scores, v.part([0, 0], [end, values])) };
        }
    }

    /// The state after the current piece.
    #[inline(always)]
    pub(super) fn advance(&mut self, piece: &Piece, state: &mut [T]) {
        let (s, p) = (self.s, self.operands);
        let [_, k, v] = p.matrices(self.task, &piece.tokens);
        let (length, keys, values) = (piece.tokens.len(), p.sizes.keys, p.sizes.values);
        let mut keep = (!piece.fresh).then_some(self.weights.whole);
        for start in (0..length).step_by(DEEP) {
            let rows = DEEP.min(length - start);
            let weights = &self.weights.to_end[start..];
            let k = weigh(s, k.part([start, 0], [rows, keys]), |i| weights[i], &mut self.rows);
            let v = v.part([start, 0], [rows, values]);
            // SAFETY: the state is [K, V].
            unsafe { multiply(Target::new(state, values), keep, k.transposed(), v) };
            keep = Some(T::ONE);
        }
    }
}

/// Multiplies a row of scores by its decays; those beyond become zero.
#[inline(always)]
pub(super) fn mask<T: Real, S: Simd<T>>(s: S, scores: &mut [T], decays: &[T]) {
    use crate::backend::cpu::view::{lanes, load, put};
    let (now, later) = scores.split_at_mut(decays.len());
    for (i, n) in lanes(s, 0..now.len()) {
        let value = s.mul(load(s, now, i, n), load(s, decays, i, n));
        put(s, now, i, n, value);
    }
    later.fill(T::ZERO);
}
