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
        let kept: Vec<Vec<T>> = {
            let o = Outlet::fresh_or_zeroed(&mut o, outputs, self.padded);
            let state = Outlet::fresh(&mut state, states);
            let heads: Vec<_> = stretches.iter().zip(before.iter().map(Option::as_deref)).collect();
            let groups: Vec<_> = heads.chunks(self.together()).collect();
            let ends = parallel::map(&groups, self.work(), |heads| {
                let heads: Vec<_> = (heads.iter())
                    .map(|&(stretch, before)| (stretch, before.or_else(|| self.initial(stretch.task))))
                    .collect();
                let ends =
                    T::dispatch_on(self.isa, Walk { heads: &heads, o: Some(&o), keep, operands: self });
                for (end, (stretch, _)) in ends.iter().zip(heads).filter(|(_, (stretch, _))| stretch.last) {
                    let size = self.state_size();
                    let [row, head] = stretch.task;
                    let to = state.at((row * sizes.heads + head) * size, size);
                    // SAFETY: at() checked the places, which are those of this head.
                    unsafe { end.state.copy_to(to) };
                }
                ends.into_iter().map(|end| end.kept).collect::<Vec<_>>()
            });
            ends.into_iter().flatten().collect()
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
        let walk = Walk { operands: self, heads: &[(stretch, before)], o: None, keep: true };
        T::dispatch_on(self.isa, walk).pop().map_or_else(Vec::new, |end| end.kept)
    }
}

/// The state after a stretch that begins with none.
pub(super) fn end_of<T: Real>(operands: &Operands<T>, stretch: &Stretch) -> Vec<T> {
    let mut end = vec![];
    let walk = Walk { operands, heads: &[(stretch, None)], o: None, keep: false };
    T::dispatch_on(operands.isa, walk).iter().for_each(|head| head.state.append_to(&mut end));
    end
}

/// Walks the pieces of stretches side by side, each from the state before it.
struct Walk<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    heads: &'a [(&'a Stretch, Option<&'a [T]>)],
    o: Option<&'a Outlet<'a, T>>,
    keep: bool,
}

/// One of them: how far its state is, and those kept.
struct Head<T> {
    state: Padded<T>,
    weights: Weights<T>,
    kept: Vec<T>,
}

impl<T: Real> Kernel<T> for Walk<'_, T> {
    type Output = Vec<Head<T>>;

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> Self::Output {
        let p = self.operands;
        let longest = self.heads.iter().map(|(stretch, _)| stretch.longest()).max().unwrap_or(0);
        let mut heads = vec![];
        let mut starts = vec![];
        for (stretch, before) in self.heads {
            let mut state = Padded::zeros(p.sizes.keys, p.sizes.values);
            if let Some(before) = before {
                state.fill(s, p.square(before), |_| T::ONE);
            }
            let weights = Weights::new(s, &p.decays, stretch.task[1], stretch.longest());
            heads.push(Head { state, weights, kept: vec![] });
            let spans = if self.keep { plan::spans(&stretch.pieces, &p.sizes) } else { vec![] };
            starts.push(spans.into_iter().map(|span| span.start).peekable());
        }
        let mut walker = Walker::new(s, p, longest);
        let counts: Vec<_> = self.heads.iter().map(|(stretch, _)| stretch.pieces.len()).collect();
        let mut order = plan::side_by_side(&counts).into_iter().peekable();
        while let Some((n, i)) = order.next() {
            let (stretch, head) = (self.heads[n].0, &mut heads[n]);
            let (task, piece) = (stretch.task, &stretch.pieces[i]);
            if starts[n].next_if_eq(&i).is_some() && !piece.fresh {
                head.state.append_to(&mut head.kept);
            }
            let next = order.peek().map(|&(n, i)| (self.heads[n].0.task, &self.heads[n].0.pieces[i]));
            walker.turn_to(task, piece, &mut head.weights, next);
            if let Some(o) = self.o {
                let [row, number] = task;
                let first = (row * p.sizes.length + piece.tokens.start) * p.sizes.heads + number;
                let stride = p.sizes.heads * p.sizes.values;
                let to = o.at(first * p.sizes.values, (piece.tokens.len() - 1) * stride + p.sizes.values);
                // SAFETY: at() checked the places; those of this head are this task's own.
                unsafe { walker.outputs(task, piece, head, Target { start: to, stride }) };
            }
            walker.advance(piece, head);
        }
        heads
    }
}

/// What the pieces of any head need for a while.
struct Walker<'a, T: Real, S: Simd<T>> {
    s: S,
    operands: &'a Operands<'a, T>,
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
    fn new(s: S, operands: &'a Operands<'a, T>, longest: usize) -> Self {
        let (block, keys, values) = (longest.min(BLOCK), operands.sizes.keys, operands.sizes.values);
        Self {
            s,
            operands,
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
    fn turn_to(
        &mut self,
        task: [usize; 2],
        piece: &Piece,
        weights: &mut Weights<T>,
        next: Option<([usize; 2], &Piece)>,
    ) {
        self.ahead = self.operands.ahead(next);
        weights.set(self.s, &self.operands.decays, task, piece);
        let [_, k, v] = self.operands.matrices(task, &piece.tokens);
        self.keys.fill(self.s, k, |i| weights.to_end[i]);
        self.values.fill(self.s, v, |_| T::ONE);
    }

    /// The outputs of the current piece.
    ///
    /// # Safety
    /// `to` has places for them that nobody else touches.
    #[inline(always)]
    unsafe fn outputs(&mut self, task: [usize; 2], piece: &Piece, head: &Head<T>, to: Target<T>) {
        let (s, p) = (self.s, self.operands);
        let [q, k, v] = p.matrices(task, &piece.tokens);
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
                let decays = head.weights.row(s, start + i, &mut self.decays);
                mask(s, &mut self.scores.row_mut(i)[..end], decays);
            }
            let scores = self.scores.matrix(rows).part([0, 0], [rows, end]);
            let among = self.values.right(0..end, values);
            let product = match piece.fresh {
                true => Product::new(scores, among),
                false => {
                    let weights = &head.weights.from_start[start..];
                    Product::new(q, head.state.right(0..keys, values)).weights(weights).then(scores, among)
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
    fn advance(&mut self, piece: &Piece, head: &mut Head<T>) {
        let (length, to) = (piece.tokens.len(), head.state.target());
        let k = self.keys.matrix(length).transposed();
        let product = Product::new(k, self.values.right(0..length, self.operands.sizes.values));
        let plus = (!piece.fresh).then_some((to, head.weights.whole));
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
