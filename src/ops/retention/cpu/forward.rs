//! The forward pass, chunk by chunk.
//!
//! A chunk of `C` tokens takes `2 C K V` operations for what comes out of the state, as many for what goes in, and about
//! `C^2 (K + V)` for the tokens among themselves, whose upper triangle is left out block by block.

use super::decay::Weights;
use super::{BLOCK, Operands, Stretch};
use crate::backend::cpu::padded::{Padded, Target};
use crate::backend::cpu::parallel;
use crate::backend::cpu::product::{Ahead, Part, Product, all_finite};
use crate::backend::cpu::simd::{Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, lanes, load, put};
use crate::ops::retention::plan::{self, Piece};

/// What a forward pass leaves.
pub(in super::super) struct Retained<T> {
    /// `[B, T, H, V]`
    pub(in super::super) o: Vec<T>,
    /// `[B, H, K, V]`
    pub(in super::super) state: Vec<T>,
    /// Of every stretch the states at the start of its spans, but for zeros; empty where none were asked for.
    pub(in super::super) kept: Vec<Vec<T>>,
}

impl<T: Real> Operands<'_, T> {
    /// In pieces of at most `chunk` tokens; keeps the states before the spans where asked.
    pub(in super::super) fn forward(&self, chunk: usize, keep: bool) -> Retained<T> {
        let sizes = &self.sizes;
        let outputs = sizes.batch * sizes.length * sizes.heads * sizes.values;
        let states = sizes.batch * sizes.heads * self.state_size();
        let (mut o, mut state) = (Vec::new(), Vec::new());
        let stretches = self.stretches(chunk);
        let before = self.before(&stretches);
        let kept = {
            let o = Outlet::fresh_or_zeroed(&mut o, outputs, self.padded);
            let state = Outlet::fresh(&mut state, states);
            let tasks: Vec<_> = stretches.iter().zip(&before).collect();
            parallel::map(&tasks, self.work(), |(stretch, before)| {
                let before = before.as_deref().or_else(|| self.initial(stretch.task));
                let walk = Walk { before, o: Some(&o), keep, ..Walk::new(self, stretch) };
                let (kept, end) = T::dispatch_on(self.isa, walk);
                if stretch.last {
                    let size = self.state_size();
                    let [row, head] = stretch.task;
                    let to = state.at((row * sizes.heads + head) * size, size);
                    // SAFETY: at() checked the places, which are those of this head.
                    unsafe { end.copy_to(to) };
                }
                kept
            })
        };
        // SAFETY: padding was zeroed; every head of every row wrote all of its own.
        unsafe {
            o.set_len(outputs);
            state.set_len(states);
        }
        Retained { o, state, kept: if keep { kept } else { vec![] } }
    }

    /// The states before the spans of a stretch, as a forward pass keeps them, from that before the stretch.
    pub(super) fn kept(&self, stretch: &Stretch, before: Option<&[T]>) -> Vec<T> {
        let before = before.or_else(|| self.initial(stretch.task));
        T::dispatch_on(self.isa, Walk { before, keep: true, ..Walk::new(self, stretch) }).0
    }
}

/// The state after a stretch that begins with none.
pub(super) fn end_of<T: Real>(operands: &Operands<T>, stretch: &Stretch) -> Vec<T> {
    let mut end = vec![];
    T::dispatch_on(operands.isa, Walk::new(operands, stretch)).1.append_to(&mut end);
    end
}

/// Walks the pieces of a stretch; returns the kept states and the last one.
struct Walk<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    stretch: &'a Stretch,
    before: Option<&'a [T]>,
    o: Option<&'a Outlet<'a, T>>,
    keep: bool,
}

impl<'a, T: Real> Walk<'a, T> {
    /// From an empty state, for the last one alone.
    fn new(operands: &'a Operands<'a, T>, stretch: &'a Stretch) -> Self {
        Self { operands, stretch, before: None, o: None, keep: false }
    }
}

impl<T: Real> Kernel<T> for Walk<'_, T> {
    type Output = (Vec<T>, Padded<T>);

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> Self::Output {
        let Stretch { task, ref pieces, .. } = *self.stretch;
        let (p, [row, head]) = (self.operands, task);
        let mut state = Padded::zeros(p.sizes.keys, p.sizes.values);
        if let Some(before) = self.before {
            state.fill(s, p.square(before), |_| T::ONE);
        }
        let mut walker = Walker::new(s, p, task, pieces);
        let mut kept = vec![];
        let spans = if self.keep { plan::spans(pieces, &p.sizes) } else { vec![] };
        let mut starts = spans.iter().map(|span| span.start).peekable();
        for (i, piece) in pieces.iter().enumerate() {
            if starts.next_if_eq(&i).is_some() && !piece.fresh {
                state.append_to(&mut kept);
            }
            walker.turn_to(piece, pieces.get(i + 1));
            if let Some(o) = self.o {
                let offset =
                    ((row * p.sizes.length + piece.tokens.start) * p.sizes.heads + head) * p.sizes.values;
                let stride = p.sizes.heads * p.sizes.values;
                let to = o.at(offset, (piece.tokens.len() - 1) * stride + p.sizes.values);
                // SAFETY: at() checked the places; those of this head are this task's own.
                unsafe { walker.outputs(piece, &state, Target { start: to, stride }) };
            }
            walker.advance(piece, &mut state);
        }
        (kept, state)
    }
}

/// One head of one row and what its pieces need for a while.
struct Walker<'a, T: Real, S: Simd<T>> {
    s: S,
    operands: &'a Operands<'a, T>,
    task: [usize; 2],
    weights: Weights<T>,
    /// Keys by tokens.
    turned_keys: Padded<T>,
    /// Values of the piece, and its keys weighted by what is left of them at its end.
    values: Padded<T>,
    keys: Padded<T>,
    /// Of a block: queries, queries against keys.
    queries: Padded<T>,
    scores: Padded<T>,
    decays: Vec<T>,
    /// Queries, keys and values of the next piece.
    ahead: [Ahead<T>; 3],
}

impl<'a, T: Real, S: Simd<T>> Walker<'a, T, S> {
    #[inline(always)]
    fn new(s: S, operands: &'a Operands<'a, T>, task: [usize; 2], pieces: &[Piece]) -> Self {
        let longest = pieces.iter().map(|piece| piece.tokens.len()).max().unwrap_or(0);
        let (block, keys, values) = (longest.min(BLOCK), operands.sizes.keys, operands.sizes.values);
        Self {
            s,
            operands,
            task,
            weights: Weights::new(s, &operands.decays, task[1], longest),
            turned_keys: Padded::zeros(keys, longest),
            values: Padded::zeros(longest, values),
            keys: Padded::zeros(longest, keys),
            queries: Padded::zeros(block, keys),
            scores: Padded::zeros(block, longest),
            decays: vec![T::ZERO; longest],
            ahead: [Ahead::NONE; 3],
        }
    }

    /// Turns to a piece: copies its keys and values. Those of the next are asked for with the coming products.
    #[inline(always)]
    fn turn_to(&mut self, piece: &Piece, next: Option<&Piece>) {
        self.ahead = self.operands.ahead(self.task, next);
        self.weights.set(self.s, &self.operands.decays, self.task, piece);
        let [_, k, v] = self.operands.matrices(self.task, &piece.tokens);
        let to_end = &self.weights.to_end;
        self.keys.fill(self.s, k, |i| to_end[i]);
        self.values.fill(self.s, v, |_| T::ONE);
    }

    /// The outputs of the current piece.
    ///
    /// # Safety
    /// `to` has places for them that nobody else touches.
    #[inline(always)]
    unsafe fn outputs(&mut self, piece: &Piece, state: &Padded<T>, to: Target<T>) {
        let (s, p) = (self.s, self.operands);
        let [q, k, v] = p.matrices(self.task, &piece.tokens);
        let (length, keys, values) = (piece.tokens.len(), p.sizes.keys, p.sizes.values);
        self.turned_keys.fill_transposed(s, k);
        // what is not finite must not meet the zeros of the upper triangle
        let single = !all_finite(s, v);
        for start in (0..length).step_by(BLOCK) {
            let rows = BLOCK.min(length - start);
            let end = start + rows;
            self.queries.fill(s, q.part([start, 0], [rows, keys]), |_| p.scale);
            let q = self.queries.matrix(rows);
            let product = Product::new(q, self.turned_keys.right(0..keys, end)).part(Part::Lower(start));
            // SAFETY: there is a place for every score.
            unsafe { product.write(p.isa, self.scores.target()) };
            for i in 0..rows {
                let decays = self.weights.row(s, start + i, &mut self.decays);
                mask(s, &mut self.scores.row_mut(i)[..end], decays);
            }
            let scores = self.scores.matrix(rows).part([0, 0], [rows, end]);
            let among = self.values.right(0..end, values);
            let product = match piece.fresh {
                true => Product::new(scores, among),
                false => {
                    let weights = &self.weights.from_start[start..];
                    Product::new(q, state.right(0..keys, values)).weights(weights).then(scores, among)
                }
            };
            let [q, k, v] = std::mem::replace(&mut self.ahead, [Ahead::NONE; 3]);
            self.ahead[2] = v;
            let product = product.part(Part::LowerLeft(start)).single(single).ahead([q, k]);
            // SAFETY: the caller's promise, row `start` on.
            unsafe { product.write(p.isa, to.from(start)) };
        }
    }

    /// The state after the current piece.
    #[inline(always)]
    fn advance(&mut self, piece: &Piece, state: &mut Padded<T>) {
        let (length, to) = (piece.tokens.len(), state.target());
        let k = self.keys.matrix(length).transposed();
        let product = Product::new(k, self.values.right(0..length, self.operands.sizes.values));
        let plus = (!piece.fresh).then_some((to, self.weights.whole));
        let product = product.plus(plus).ahead([self.ahead[2], Ahead::NONE]);
        // SAFETY: the state is [K, V].
        unsafe { product.write(self.operands.isa, to) };
    }
}

/// Multiplies a row of scores by its decays; those beyond become zero.
#[inline(always)]
pub(super) fn mask<T: Real, S: Simd<T>>(s: S, scores: &mut [T], decays: &[T]) {
    let (now, later) = scores.split_at_mut(decays.len());
    for (i, n) in lanes(s, 0..now.len()) {
        let value = s.mul(load(s, now, i, n), load(s, decays, i, n));
        put(s, now, i, n, value);
    }
    later.fill(T::ZERO);
}
