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

use super::Operands;
use super::forward::{BLOCK, Walker, mask};
use super::product::{Target, dot, multiply, weigh};
use crate::backend::cpu::matrix::Matrix;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows, lanes, load, put};
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
            let tasks: Vec<_> = self.tasks().into_iter().enumerate().collect();
            parallel::map(&tasks, self.work(), |&(index, task)| {
                let swept;
                let kept = match given.kept.get(index) {
                    Some(kept) => kept,
                    None => {
                        swept = self.kept(task, chunk);
                        &swept
                    }
                };
                let back = Back { operands: self, task, chunk, kept, given, outlets: &outlets };
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
}

/// Goes back through one head of one row.
struct Back<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    task: [usize; 2],
    chunk: usize,
    kept: &'a [T],
    given: &'a Given<'a, T>,
    outlets: &'a Outlets<'a, T>,
}

impl<T: Real> Kernel<T> for Back<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let (p, [row, head]) = (self.operands, self.task);
        let size = p.state_size();
        let start = (row * p.sizes.heads + head) * size;
        let mut gradient = match self.given.state {
            Some(state) => state[start..start + size].to_vec(),
            None => vec![T::ZERO; size],
        };
        let pieces = p.pieces(self.task, self.chunk);
        let spans = plan::spans(&pieces, &p.sizes);
        let longest = pieces.iter().map(|piece| piece.tokens.len()).max().unwrap_or(0);
        let mut scratch = Scratch::new(longest, p.sizes.keys, p.sizes.values);
        let mut walker = Walker::new(s, p, self.task, &pieces);
        let mut kept = self.kept.chunks(size).rev();
        let none = vec![T::ZERO; size];
        let mut states: Vec<T> = vec![];
        for span in spans.into_iter().rev() {
            // the states before each piece of the span
            states.clear();
            let first = if pieces[span.start].fresh { None } else { kept.next() };
            states.extend_from_slice(first.unwrap_or(&none));
            for i in span.clone().skip(1) {
                states.extend_from_within((i - 1 - span.start) * size..(i - span.start) * size);
                let piece = &pieces[i - 1];
                walker.turn_to(piece);
                walker.advance(piece, &mut states[(i - span.start) * size..]);
            }
            for i in span.clone().rev() {
                let state = &states[(i - span.start) * size..][..size];
                walker.turn_to(&pieces[i]);
                self.piece(s, &walker, &pieces[i], state, &mut gradient, &mut scratch);
            }
        }
        let to = self.outlets.initial.at(start, size);
        // SAFETY: at() checked the places, which are this task's own.
        unsafe { std::ptr::copy_nonoverlapping(gradient.as_ptr(), to, size) };
    }
}

/// What a piece needs for a while.
struct Scratch<T> {
    /// Weighted rows.
    rows: Vec<T>,
    outputs: Vec<T>,
    /// `A` and `P` of a block.
    scores: Vec<T>,
    slopes: Vec<T>,
    decays: Vec<T>,
    /// Gradients of q, k and v of the piece.
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    /// Those of the decays.
    decay: Vec<T>,
    /// Paths from the state before to each token, and from each token to the state after.
    before: Vec<T>,
    after: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new(longest: usize, keys: usize, values: usize) -> Self {
        let zeros = |n| vec![T::ZERO; n];
        let scores = longest.min(BLOCK) * longest;
        Self {
            rows: zeros(longest * keys),
            outputs: zeros(longest * values),
            scores: zeros(scores),
            slopes: zeros(scores),
            decays: zeros(longest),
            q: zeros(longest * keys),
            k: zeros(longest * keys),
            v: zeros(longest * values),
            decay: zeros(longest),
            before: zeros(longest),
            after: zeros(longest),
        }
    }
}

impl<T: Real> Back<'_, T> {
    /// One piece: writes its gradients and moves `gradient`, that of the state, from after it to before it.
    #[inline(always)]
    fn piece<S: Simd<T>>(
        &self,
        s: S,
        walker: &Walker<T, S>,
        piece: &Piece,
        state: &[T],
        gradient: &mut [T],
        scratch: &mut Scratch<T>,
    ) {
        let p = self.operands;
        let (length, keys, values) = (piece.tokens.len(), p.sizes.keys, p.sizes.values);
        let [q, k, v] = p.matrices(self.task, &piece.tokens);
        let weights = &walker.weights;
        let square = |x| Matrix::new(x, [keys, values], [values, 1]);
        let with_decay = self.outlets.log_decay.is_some();
        let outputs = self.outputs(s, &piece.tokens, &mut scratch.outputs);
        scratch.decay[..length].fill(T::ZERO);
        if with_decay && !piece.fresh {
            let through = weights.whole * dot(s, state, gradient);
            scratch.decay[..length].fill(through);
        }
        // SAFETY: the targets hold L rows of K, L rows of V and K rows of V.
        unsafe {
            // to the state after
            multiply(Target::new(&mut scratch.k, keys), None, v, square(gradient).transposed());
            weigh_in_place(s, &mut scratch.k, keys, &weights.to_end);
            let weighted = weigh(s, k, |i| weights.to_end[i], &mut scratch.rows);
            multiply(Target::new(&mut scratch.v, values), None, weighted, square(gradient));
            if piece.fresh {
                scratch.q[..length * keys].fill(T::ZERO);
                gradient.fill(T::ZERO);
            } else {
                // from the state before
                multiply(Target::new(&mut scratch.q, keys), None, outputs, square(state).transposed());
                weigh_in_place(s, &mut scratch.q, keys, &weights.from_start);
                let weighted = weigh(s, q, |i| weights.from_start[i], &mut scratch.rows);
                let to = Target::new(gradient, values);
                multiply(to, Some(weights.whole), weighted.transposed(), outputs);
            }
        }
        if with_decay {
            for i in 0..length {
                scratch.before[i] = dot(s, q.row(i), &scratch.q[i * keys..][..keys]);
                scratch.after[i] = dot(s, k.row(i), &scratch.k[i * keys..][..keys]);
            }
            along_decays(&mut scratch.decay[..length], &scratch.before, &scratch.after);
        }
        for start in (0..length).step_by(BLOCK) {
            let rows = BLOCK.min(length - start);
            let end = start + rows;
            let (q, outputs) = (q.part([start, 0], [rows, keys]), outputs.part([start, 0], [rows, values]));
            let (k, v) = (k.part([0, 0], [end, keys]), v.part([0, 0], [end, values]));
            // SAFETY: scores and slopes have places for rows of `end <= length`, the gradients for `end` rows.
            unsafe {
                multiply(Target::new(&mut scratch.scores, end), None, q, k.transposed());
                multiply(Target::new(&mut scratch.slopes, end), None, outputs, v.transposed());
                let pairs = scratch.scores.chunks_mut(end).zip(scratch.slopes.chunks_mut(end));
                for (i, (scores, slopes)) in pairs.enumerate().take(rows) {
                    let decays = weights.row(s, start + i, &mut scratch.decays);
                    mask(s, scores, decays);
                    if with_decay {
                        between(scores, slopes, start + i, &mut scratch.decay);
                    }
                    mask(s, slopes, decays);
                }
                let scores = Matrix::new(&scratch.scores, [rows, end], [end, 1]);
                let slopes = Matrix::new(&scratch.slopes, [rows, end], [end, 1]);
                let one = Some(T::ONE);
                multiply(Target::new(&mut scratch.q, keys).from(start), one, slopes, k);
                multiply(Target::new(&mut scratch.k, keys), one, slopes.transposed(), q);
                multiply(Target::new(&mut scratch.v, values), one, scores.transposed(), outputs);
            }
        }
        self.write(s, &piece.tokens, scratch);
    }

    /// `scale do` of some tokens, zero where there is none.
    #[inline(always)]
    fn outputs<'t, S: Simd<T>>(&self, s: S, tokens: &Range<usize>, to: &'t mut [T]) -> Matrix<'t, T> {
        let (p, [row, head]) = (self.operands, self.task);
        let dims = [tokens.len(), p.sizes.values];
        match &self.given.o {
            Some(o) => {
                let (data, stride) = o.from([row, tokens.start, head], 1);
                weigh(s, Matrix::new(data, dims, [stride, 1]), |_| p.scale, to)
            }
            None => {
                to[..dims[0] * dims[1]].fill(T::ZERO);
                Matrix::new(to, dims, [dims[1], 1])
            }
        }
    }

    /// Copies the gradients of a piece to where they belong.
    #[inline(always)]
    fn write<S: Simd<T>>(&self, _: S, tokens: &Range<usize>, scratch: &Scratch<T>) {
        let (p, [row, head]) = (self.operands, self.task);
        let (keys, values) = (p.sizes.keys, p.sizes.values);
        let sides = [
            (&self.outlets.q, &scratch.q, keys),
            (&self.outlets.k, &scratch.k, keys),
            (&self.outlets.v, &scratch.v, values),
        ];
        for (i, t) in tokens.clone().enumerate() {
            let index = (row * p.sizes.length + t) * p.sizes.heads + head;
            for (outlet, from, width) in sides {
                let from = &from[i * width..][..width];
                let to = outlet.at(index * width, width);
                // SAFETY: at() checked the places, which are this task's own.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, width) };
            }
            if let Some(outlet) = &self.outlets.log_decay {
                // SAFETY: as above.
                unsafe { outlet.at(index, 1).write(scratch.decay[i]) };
            }
        }
    }
}

/// Rows of a buffer times their weights.
#[inline(always)]
fn weigh_in_place<T: Real, S: Simd<T>>(s: S, rows: &mut [T], columns: usize, weights: &[T]) {
    for (row, weight) in rows.chunks_mut(columns).zip(weights) {
        for (c, n) in lanes(s, 0..columns) {
            let value = s.mul(load(s, row, c, n), s.splat(*weight));
            put(s, row, c, n, value);
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
