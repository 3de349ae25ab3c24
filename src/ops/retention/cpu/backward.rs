//! The backward pass, from the last chunk to the first.
//!
//! With `G` the gradient of the state after a chunk of `L` tokens, `S` the state before it, `M[i, j] = exp(c[i] - c[j])`
//! for `j <= i`, `A = scale M (q k^T)` and `P = scale M (do v^T)`:
//!
//! ```text
//! dq[i] = scale exp(c[i]) do[i] S^T + (P k)[i]
//! dk[j] = exp(c[L-1] - c[j]) v[j] G^T + (P^T q)[j]
//! dv[j] = exp(c[L-1] - c[j]) k[j] G + (A^T do)[j]
//! G    <- exp(c[L-1]) G + scale sum_i exp(c[i]) q[i]^T do[i]
//! ```
//!
//! The gradient of `log_decay[t]` is the sum of what passed through it: from each token before `t` to each one from `t`
//! on. Each kind of path (between two tokens, from the state before, to the state after, through) is added up alone, so
//! that nothing large cancels.

use super::decay::Weights;
use super::forward::mask;
use super::scratch::{Gradient, Scratch};
use super::{Operands, Stretch};
use crate::backend::cpu::matrix::Matrix;
use crate::backend::cpu::padded::{Padded, Target};
use crate::backend::cpu::parallel;
use crate::backend::cpu::product::{Ahead, Part, Product, dot};
use crate::backend::cpu::simd::{Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows};
use crate::ops::retention::Sizes;
use crate::ops::retention::plan::{self, Piece};
use std::ops::Range;

/// The gradients of the arguments; those of q, k and v for every head.
pub(in super::super) struct Gradients<T> {
    /// `[B, T, H, K]`
    pub(in super::super) q: Vec<T>,
    /// `[B, T, H, K]`
    pub(in super::super) k: Vec<T>,
    /// `[B, T, H, V]`
    pub(in super::super) v: Vec<T>,
    /// `[B, T, H]`; empty where not asked for.
    pub(in super::super) log_decay: Vec<T>,
    /// `[B, H, K, V]`
    pub(in super::super) initial: Vec<T>,
}

/// Where they go.
struct Outlets<'a, T> {
    q: Outlet<'a, T>,
    k: Outlet<'a, T>,
    v: Outlet<'a, T>,
    log_decay: Option<Outlet<'a, T>>,
    initial: Outlet<'a, T>,
}

/// What is given.
pub(in super::super) struct Given<'a, T: Real> {
    /// The states that a forward pass in pieces of `chunk` tokens kept, if one did.
    pub(in super::super) kept: &'a [Vec<T>],
    /// `[B, T, H, V]`
    pub(in super::super) o: Option<Rows<'a, T>>,
    /// `[B, H, K, V]`
    pub(in super::super) state: Option<&'a [T]>,
}

impl<T: Real> Operands<'_, T> {
    /// In pieces of at most `chunk` tokens; that of the decay if `decay`.
    pub(in super::super) fn backward(&self, chunk: usize, given: &Given<T>, decay: bool) -> Gradients<T> {
        let sizes = &self.sizes;
        let tokens = sizes.batch * sizes.length * sizes.heads;
        let (keys, values) = (tokens * sizes.keys, tokens * sizes.values);
        let decays = if decay { tokens } else { 0 };
        let states = sizes.batch * sizes.heads * self.state_size();
        let [mut q, mut k, mut v, mut log_decay, mut initial] = [const { Vec::new() }; 5];
        {
            let outlets = Outlets {
                q: Outlet::fresh_or_zeroed(&mut q, keys, self.padded),
                k: Outlet::fresh_or_zeroed(&mut k, keys, self.padded),
                v: Outlet::fresh_or_zeroed(&mut v, values, self.padded),
                log_decay: decay.then(|| Outlet::fresh_or_zeroed(&mut log_decay, decays, self.padded)),
                initial: Outlet::fresh(&mut initial, states),
            };
            let stretches = self.stretches(chunk);
            let after = self.after(&stretches, given);
            let kept = match given.kept.is_empty() {
                false => None,
                true => {
                    let tasks: Vec<_> = stretches.iter().zip(self.before(&stretches)).collect();
                    Some(parallel::map(&tasks, self.work(), |(stretch, before)| {
                        self.kept(stretch, before.as_deref())
                    }))
                }
            };
            let kept = kept.as_deref().unwrap_or(given.kept);
            let tasks: Vec<_> = (stretches.iter().zip(&after).zip(kept))
                .map(|((stretch, after), kept)| {
                    let after = after.as_deref().or_else(|| self.given_state(given, stretch.task));
                    Task { stretch, after, kept }
                })
                .collect();
            let groups: Vec<_> = tasks.chunks(self.together()).collect();
            parallel::map(&groups, self.work(), |tasks| {
                T::dispatch_on(self.isa, Back { operands: self, tasks, given, outlets: &outlets })
            });
        }
        // SAFETY: padding was zeroed; every head of every row wrote all of its own.
        unsafe {
            q.set_len(keys);
            k.set_len(keys);
            v.set_len(values);
            log_decay.set_len(decays);
            initial.set_len(states);
        }
        Gradients { q, k, v, log_decay, initial }
    }

    /// The given gradient of the last state of a head.
    pub(super) fn given_state<'g>(&self, given: &Given<'g, T>, [row, head]: [usize; 2]) -> Option<&'g [T]> {
        let size = self.state_size();
        given.state.map(|state| &state[(row * self.sizes.heads + head) * size..][..size])
    }

    /// `do` of some tokens of a head, if there is any.
    fn given_outputs<'g>(
        &self,
        given: &Given<'g, T>,
        [row, head]: [usize; 2],
        tokens: &Range<usize>,
    ) -> Option<Matrix<'g, T>> {
        given.o.as_ref().map(|o| {
            let (data, stride) = o.from([row, tokens.start, head], 1);
            Matrix::new(data, [tokens.len(), self.sizes.values], [stride, 1])
        })
    }

    /// That of the piece that comes next, if one does, to be asked for.
    fn ahead_outputs(&self, given: &Given<T>, next: Option<([usize; 2], &Piece)>) -> Ahead<T> {
        let next = next.and_then(|(task, next)| self.given_outputs(given, task, &next.tokens));
        next.map_or(Ahead::NONE, Ahead::rows)
    }

    /// `scale do` of some tokens, zero where there is none.
    #[inline(always)]
    pub(super) fn outputs<S: Simd<T>>(
        &self,
        s: S,
        given: &Given<T>,
        task: [usize; 2],
        tokens: &Range<usize>,
        to: &mut Padded<T>,
    ) {
        match self.given_outputs(given, task, tokens) {
            Some(o) => to.fill(s, o, |_| self.scale),
            None => to.clear(),
        }
    }
}

/// A stretch, the gradient of the state after it, and the states kept in it.
struct Task<'a, T> {
    stretch: &'a Stretch,
    after: Option<&'a [T]>,
    kept: &'a [T],
}

/// Goes back through stretches side by side.
struct Back<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    tasks: &'a [Task<'a, T>],
    given: &'a Given<'a, T>,
    outlets: &'a Outlets<'a, T>,
}

impl<T: Real> Kernel<T> for Back<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let p = self.operands;
        let Sizes { heads, keys, values, .. } = p.sizes;
        let size = p.state_size();
        let longest = self.tasks.iter().map(|task| task.stretch.longest()).max().unwrap_or(0);
        let mut scratch = Scratch::new(longest, keys, values);
        let spans: Vec<_> = self.tasks.iter().map(|t| plan::spans(&t.stretch.pieces, &p.sizes)).collect();
        let mut walks: Vec<_> = (self.tasks.iter())
            .map(|Task { stretch, after, kept }| {
                let weights = Weights::new(s, &p.decays, stretch.task[1], stretch.longest());
                (Gradient::new(s, p, *after), weights, kept.chunks(size).rev())
            })
            .collect();
        // values by keys, before each piece of a span
        let deepest = spans.iter().flatten().map(|span| span.len()).max().unwrap_or(0);
        let mut states: Vec<_> = (0..deepest).map(|_| Padded::zeros(values, keys)).collect();
        let counts: Vec<_> = spans.iter().map(Vec::len).collect();
        let mut order = plan::side_by_side(&counts).into_iter().peekable();
        while let Some((n, i)) = order.next() {
            let span = |n: usize, i: usize| spans[n][spans[n].len() - 1 - i].clone();
            let Stretch { task, ref pieces, .. } = *self.tasks[n].stretch;
            let (after, weights, kept) = &mut walks[n];
            let inner = span(n, i);
            let before = if pieces[inner.start].fresh { None } else { kept.next() };
            match before {
                Some(state) => states[0].fill_transposed(s, p.square(state)),
                None => states[0].clear(),
            }
            for (i, piece) in pieces[inner.start..inner.end - 1].iter().enumerate() {
                weights.set(s, &p.decays, task, piece);
                scratch.take_ends(s, p, task, piece, weights);
                let (before, next) = states.split_at_mut(i + 1);
                scratch.advance(p, piece, weights.whole, &mut before[i], &mut next[0]);
            }
            for (i, state) in inner.clone().zip(&states).rev() {
                let piece = &pieces[i];
                weights.set(s, &p.decays, task, piece);
                scratch.next = match (i > inner.start, order.peek()) {
                    (true, _) => Some((task, pieces[i - 1].clone())),
                    (false, Some(&(n, i))) => {
                        let stretch = self.tasks[n].stretch;
                        Some((stretch.task, stretch.pieces[span(n, i).end - 1].clone()))
                    }
                    (false, None) => None,
                };
                self.piece(s, (task, piece), weights, state, after, &mut scratch);
            }
        }
        for (task, (after, ..)) in self.tasks.iter().zip(&walks).filter(|(task, _)| task.stretch.first) {
            let [row, head] = task.stretch.task;
            let to = self.outlets.initial.at((row * heads + head) * size, size);
            // SAFETY: at() checked the places, which are those of this head.
            unsafe { after.rows.copy_to(to) };
        }
    }
}

impl<T: Real> Back<'_, T> {
    /// One piece: writes its gradients and moves `gradient`, that of the state, from after it to before it. `state` is that
    /// before it, turned.
    #[inline(always)]
    fn piece<S: Simd<T>>(
        &self,
        s: S,
        (task, piece): ([usize; 2], &Piece),
        weights: &Weights<T>,
        state: &Padded<T>,
        gradient: &mut Gradient<T>,
        scratch: &mut Scratch<T>,
    ) {
        let p = self.operands;
        let (length, keys, values) = (piece.tokens.len(), p.sizes.keys, p.sizes.values);
        let with_decay = self.outlets.log_decay.is_some();
        scratch.take_up(s, p, task, piece);
        p.outputs(s, self.given, task, &piece.tokens, &mut scratch.outputs);
        scratch.decay[..length].fill(T::ZERO);
        if with_decay && !piece.fresh {
            let through = weights.whole * dot(s, state.all(), gradient.turned.all());
            scratch.decay[..length].fill(through);
        }
        self.among(s, weights, length, scratch);
        let next = scratch.next.as_ref().map(|(task, piece)| (*task, piece));
        let [next_q, next_k, next_v] = p.ahead(next);
        let next_o = p.ahead_outputs(self.given, next);
        let Scratch { q, k, v, outputs, scores, slopes, early_q, along, .. } = scratch;
        let [scores, slopes] = [scores, slopes].map(|x| x.matrix(length).part([0, 0], [length; 2]));
        let [dq, dk, dv] = self.places(task, &piece.tokens);
        let o = outputs.matrix(length);
        // each is what goes through a state and what goes from token to token
        let from_k = (slopes, k.right(0..length, keys));
        let from_q = (slopes.transposed(), q.right(0..length, keys));
        let from_o = (scores.transposed(), outputs.right(0..length, values));
        // SAFETY: the places hold L rows of K, K and V numbers and are this task's own, along has L rows of K.
        unsafe {
            let into_k = Product::new(v.matrix(length), gradient.turned.right(0..values, keys));
            let mut into_k = into_k.weights(&weights.to_end).ahead([next_q, next_k]);
            if with_decay {
                into_k.write(p.isa, along.target());
                (0..length).for_each(|i| scratch.after[i] = dot(s, k.row(i), along.row(i)));
                into_k = Product::new(from_q.0, from_q.1).plus(Some((along.target(), T::ONE)));
            } else {
                into_k = into_k.then(from_q.0, from_q.1);
            }
            into_k.part(Part::UpperLeft(0)).write(p.isa, dk);
            let into_v = Product::new(k.matrix(length), gradient.rows.right(0..keys, values));
            let into_v = into_v.weights(&weights.to_end).then(from_o.0, from_o.1).part(Part::UpperLeft(0));
            into_v.ahead([next_v, next_o]).write(p.isa, dv);
            let mut into_q = Product::new(from_k.0, from_k.1);
            if !piece.fresh {
                let through = Product::new(o, state.right(0..values, keys)).weights(&weights.from_start);
                if with_decay {
                    through.write(p.isa, along.target());
                    (0..length).for_each(|i| scratch.before[i] = dot(s, q.row(i), along.row(i)));
                    into_q = into_q.plus(Some((along.target(), T::ONE)));
                } else {
                    into_q = through.then(from_k.0, from_k.1);
                }
            }
            into_q.part(Part::LowerLeft(0)).write(p.isa, dq);
            if piece.fresh {
                scratch.before.fill(T::ZERO);
                gradient.rows.clear();
                gradient.turned.clear();
            } else {
                early_q.fill(s, q.matrix(length), |i| weights.from_start[i]);
                let to = gradient.rows.target();
                let product = Product::new(early_q.matrix(length).transposed(), from_o.1);
                product.plus(Some((to, weights.whole))).write(p.isa, to);
                gradient.turn(s);
            }
        }
        if let Some(outlet) = &self.outlets.log_decay {
            along_decays(&mut scratch.decay[..length], &scratch.before, &scratch.after);
            for (t, decay) in piece.tokens.clone().zip(&scratch.decay) {
                let [row, head] = task;
                let to = outlet.at((row * p.sizes.length + t) * p.sizes.heads + head, 1);
                // SAFETY: at() checked the place, which is this task's own.
                unsafe { to.write(*decay) };
            }
        }
    }

    /// `A` and `P` of the tokens of a piece, and their share of the gradient of the decays.
    #[inline(always)]
    fn among<S: Simd<T>>(&self, s: S, weights: &Weights<T>, length: usize, scratch: &mut Scratch<T>) {
        let isa = self.operands.isa;
        let (keys, values) = (self.operands.sizes.keys, self.operands.sizes.values);
        let scores = Product::new(scratch.q.matrix(length), scratch.turned_k.right(0..keys, length));
        let slopes = Product::new(scratch.outputs.matrix(length), scratch.turned_v.right(0..values, length));
        // SAFETY: both have places for L rows of L numbers.
        unsafe {
            scores.part(Part::Lower(0)).write(isa, scratch.scores.target());
            slopes.part(Part::Lower(0)).write(isa, scratch.slopes.target());
        }
        for i in 0..length {
            let decays = weights.row(s, i, &mut scratch.decays);
            let scores = &mut scratch.scores.row_mut(i)[..length];
            let slopes = &mut scratch.slopes.row_mut(i)[..length];
            mask(s, scores, decays);
            if self.outlets.log_decay.is_some() {
                between(scores, slopes, i, &mut scratch.decay);
            }
            mask(s, slopes, decays);
        }
    }

    /// Where the gradients of q, k and v of some tokens belong.
    #[inline(always)]
    fn places(&self, [row, head]: [usize; 2], tokens: &Range<usize>) -> [Target<T>; 3] {
        let Sizes { length, heads, keys, values, .. } = self.operands.sizes;
        let Outlets { q, k, v, .. } = self.outlets;
        [(q, keys), (k, keys), (v, values)].map(|(outlet, width)| {
            let (offset, stride) = (((row * length + tokens.start) * heads + head) * width, heads * width);
            Target { start: outlet.at(offset, (tokens.len() - 1) * stride + width), stride }
        })
    }
}

/// Adds the paths that begin or end outside the piece: from the state before to a token, through the decays up to its own;
/// from a token to the state after, through those behind it.
fn along_decays<T: Real>(decay: &mut [T], before: &[T], after: &[T]) {
    let mut sum = T::ZERO;
    for (to, path) in decay.iter_mut().zip(before).rev() {
        sum += *path;
        *to += sum;
    }
    let mut sum = T::ZERO;
    for (to, path) in decay.iter_mut().zip(after) {
        *to += sum;
        sum += *path;
    }
}

/// Adds the paths from the tokens before `i` to `i`: `scores` with their decays, `slopes` without.
#[inline(always)]
fn between<T: Real>(scores: &[T], slopes: &[T], i: usize, decay: &mut [T]) {
    let mut sum = T::ZERO;
    for ((score, slope), to) in scores.iter().zip(slopes).zip(&mut decay[1..=i]) {
        sum += *score * *slope;
        *to += sum;
    }
}
