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
use super::{BLOCK, Operands, Stretch};
use crate::backend::cpu::matrix::Matrix;
use crate::backend::cpu::padded::Padded;
use crate::backend::cpu::parallel;
use crate::backend::cpu::product::{Ahead, Part, Product, dot};
use crate::backend::cpu::simd::{Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows};
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
            let tasks: Vec<_> = stretches.iter().zip(&after).zip(kept).collect();
            parallel::map(&tasks, self.work(), |&((stretch, after), kept)| {
                let after = after.as_deref().or_else(|| self.given_state(given, stretch.task));
                let back = Back { operands: self, stretch, after, kept, given, outlets: &outlets };
                T::dispatch_on(self.isa, back)
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
    fn ahead_outputs(&self, given: &Given<T>, task: [usize; 2], next: Option<&Piece>) -> Ahead<T> {
        next.and_then(|next| self.given_outputs(given, task, &next.tokens)).map_or(Ahead::NONE, Ahead::rows)
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

/// Goes back through one stretch, from the gradient of the state after it.
struct Back<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    stretch: &'a Stretch,
    after: Option<&'a [T]>,
    kept: &'a [T],
    given: &'a Given<'a, T>,
    outlets: &'a Outlets<'a, T>,
}

impl<T: Real> Kernel<T> for Back<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let Stretch { task, ref pieces, first, .. } = *self.stretch;
        let (p, [row, head]) = (self.operands, task);
        let size = p.state_size();
        let spans = plan::spans(pieces, &p.sizes);
        let longest = pieces.iter().map(|piece| piece.tokens.len()).max().unwrap_or(0);
        let mut after = Gradient::new(s, p, self.after);
        let mut scratch = Scratch::new(longest, p.sizes.keys, p.sizes.values);
        let mut weights = Weights::new(s, &p.decays, head, longest);
        let mut kept = self.kept.chunks(size).rev();
        // values by keys, before each piece of a span
        let deepest = spans.iter().map(|span| span.len()).max().unwrap_or(0);
        let mut states: Vec<_> = (0..deepest).map(|_| Padded::zeros(p.sizes.values, p.sizes.keys)).collect();
        for span in spans.into_iter().rev() {
            let before = if pieces[span.start].fresh { None } else { kept.next() };
            match before {
                Some(state) => states[0].fill_transposed(s, p.square(state)),
                None => states[0].clear(),
            }
            for (i, piece) in pieces[span.start..span.end - 1].iter().enumerate() {
                weights.set(s, &p.decays, task, piece);
                scratch.pack(s, p, task, piece, &weights);
                let (before, next) = states.split_at_mut(i + 1);
                scratch.advance(p, piece, weights.whole, &mut before[i], &mut next[0]);
            }
            for (i, state) in span.clone().zip(&states).rev() {
                let piece = &pieces[i];
                weights.set(s, &p.decays, task, piece);
                scratch.pack(s, p, task, piece, &weights);
                scratch.next = i.checked_sub(1).map(|i| pieces[i].clone());
                self.piece(s, &weights, piece, state, &mut after, &mut scratch);
            }
        }
        if first {
            let to = self.outlets.initial.at((row * p.sizes.heads + head) * size, size);
            // SAFETY: at() checked the places, which are those of this head.
            unsafe { after.rows.copy_to(to) };
        }
    }
}

impl<T: Real> Back<'_, T> {
    /// One piece, packed: writes its gradients and moves `gradient`, that of the state, from after it to before it.
    /// `state` is that before it, turned.
    #[inline(always)]
    fn piece<S: Simd<T>>(
        &self,
        s: S,
        weights: &Weights<T>,
        piece: &Piece,
        state: &Padded<T>,
        gradient: &mut Gradient<T>,
        scratch: &mut Scratch<T>,
    ) {
        let p = self.operands;
        let (length, keys, values) = (piece.tokens.len(), p.sizes.keys, p.sizes.values);
        let [q, k, v] = p.matrices(self.stretch.task, &piece.tokens);
        let with_decay = self.outlets.log_decay.is_some();
        scratch.k.fill(s, k, |_| T::ONE);
        scratch.q.fill(s, q, |_| T::ONE);
        scratch.turned_k.fill_transposed(s, k);
        scratch.turned_v.fill_transposed(s, v);
        p.outputs(s, self.given, self.stretch.task, &piece.tokens, &mut scratch.outputs);
        scratch.decay[..length].fill(T::ZERO);
        if with_decay && !piece.fresh {
            let through = weights.whole * dot(s, state.all(), gradient.turned.all());
            scratch.decay[..length].fill(through);
        }
        let [next_q, next_k, next_v] = p.ahead(self.stretch.task, scratch.next.as_ref());
        let next_o = p.ahead_outputs(self.given, self.stretch.task, scratch.next.as_ref());
        // SAFETY: the targets hold L rows of K, L rows of V and K rows of V.
        unsafe {
            // to the state after
            let from_v = Product::new(scratch.v.matrix(length), gradient.turned.right(0..values, keys));
            from_v.weights(&weights.to_end).ahead([next_q, next_k]).write(p.isa, scratch.dk.target());
            let from_k = Product::new(scratch.k.matrix(length), gradient.rows.right(0..keys, values));
            from_k.weights(&weights.to_end).ahead([next_v, next_o]).write(p.isa, scratch.dv.target());
            if piece.fresh {
                scratch.dq.clear();
                gradient.rows.clear();
                gradient.turned.clear();
            } else {
                // from the state before
                let outputs = scratch.outputs.matrix(length);
                let into_q = Product::new(outputs, state.right(0..values, keys));
                into_q.weights(&weights.from_start).write(p.isa, scratch.dq.target());
                scratch.early_q.fill(s, q, |i| weights.from_start[i]);
                let q = scratch.early_q.matrix(length).transposed();
                let to = gradient.rows.target();
                let product = Product::new(q, scratch.outputs.right(0..length, values));
                product.plus(Some((to, weights.whole))).write(p.isa, to);
                gradient.turn(s);
            }
        }
        if with_decay {
            for i in 0..length {
                scratch.before[i] = dot(s, scratch.q.row(i), scratch.dq.row(i));
                scratch.after[i] = dot(s, scratch.k.row(i), scratch.dk.row(i));
            }
            along_decays(&mut scratch.decay[..length], &scratch.before, &scratch.after);
        }
        for start in (0..length).step_by(BLOCK) {
            self.block(s, weights, start..length.min(start + BLOCK), scratch);
        }
        self.write(s, &piece.tokens, scratch);
    }

    /// Some tokens of a piece and those before them among themselves.
    #[inline(always)]
    fn block<S: Simd<T>>(&self, s: S, weights: &Weights<T>, tokens: Range<usize>, scratch: &mut Scratch<T>) {
        let (p, Range { start, end }, rows) = (self.operands, tokens.clone(), tokens.len());
        let (keys, values) = (p.sizes.keys, p.sizes.values);
        let q = scratch.q.matrix(end).part([start, 0], [rows, keys]);
        let outputs = scratch.outputs.matrix(end).part([start, 0], [rows, values]);
        // SAFETY: scores and slopes have places for rows of `end` numbers, the gradients for `end` rows.
        unsafe {
            let scores = Product::new(q, scratch.turned_k.right(0..keys, end)).part(Part::Lower(start));
            scores.write(p.isa, scratch.scores.target());
            let slopes = Product::new(outputs, scratch.turned_v.right(0..values, end));
            slopes.part(Part::Lower(start)).write(p.isa, scratch.slopes.target());
        }
        for i in 0..rows {
            let decays = weights.row(s, start + i, &mut scratch.decays);
            let scores = &mut scratch.scores.row_mut(i)[..end];
            let slopes = &mut scratch.slopes.row_mut(i)[..end];
            mask(s, scores, decays);
            if self.outlets.log_decay.is_some() {
                between(scores, slopes, start + i, &mut scratch.decay);
            }
            mask(s, slopes, decays);
        }
        let scores = scratch.scores.matrix(rows).part([0, 0], [rows, end]);
        let slopes = scratch.slopes.matrix(rows).part([0, 0], [rows, end]);
        let (lower, upper) = (Part::LowerLeft(start), Part::UpperLeft(start));
        // SAFETY: as above.
        unsafe {
            let dq = scratch.dq.target().from(start);
            let from_k = Product::new(slopes, scratch.k.right(0..end, keys)).part(lower);
            from_k.plus(Some((dq, T::ONE))).write(p.isa, dq);
            let dk = scratch.dk.target();
            let from_q = Product::new(slopes.transposed(), scratch.q.right(tokens.clone(), keys)).part(upper);
            from_q.plus(Some((dk, T::ONE))).write(p.isa, dk);
            let dv = scratch.dv.target();
            let from_outputs = Product::new(scores.transposed(), scratch.outputs.right(tokens, values));
            from_outputs.part(upper).plus(Some((dv, T::ONE))).write(p.isa, dv);
        }
    }

    /// Copies the gradients of a piece to where they belong.
    #[inline(always)]
    fn write<S: Simd<T>>(&self, _: S, tokens: &Range<usize>, scratch: &Scratch<T>) {
        let (p, [row, head]) = (self.operands, self.stretch.task);
        let sides =
            [(&self.outlets.q, &scratch.dq), (&self.outlets.k, &scratch.dk), (&self.outlets.v, &scratch.dv)];
        for (i, t) in tokens.clone().enumerate() {
            let index = (row * p.sizes.length + t) * p.sizes.heads + head;
            for (outlet, from) in sides {
                let from = from.row(i);
                let to = outlet.at(index * from.len(), from.len());
                // SAFETY: at() checked the places, which are this task's own.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
            }
            if let Some(outlet) = &self.outlets.log_decay {
                // SAFETY: as above.
                unsafe { outlet.at(index, 1).write(scratch.decay[i]) };
            }
        }
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
