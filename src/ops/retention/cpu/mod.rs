//! The CPU path: a task per row and head, chunk after chunk; products by the crate gemm on the task's own thread.
//!
//! [`Operands`] are the arguments read where they lie; [`forward`] and [`backward`] go through [`Chunk`]s, whose
//! sequences are copied, widened, into scratch; [`step`] is the recurrent form.
//!
//! # Cost
//! With chunks of `C` tokens a task computes `C (K + V)` multiplications a token inside the chunks (half of it above the
//! diagonal is left out in blocks of [`super::plan::ROWS`] rows) and `2 K V` through the state. Beside that each chunk
//! moves its sequences once and the state four times, within the caches.

pub(super) mod backward;
pub(super) mod forward;
mod product;
pub(super) mod step;

use super::{Retention, Sizes};
use crate::Result;
use crate::backend::cpu::math::exp;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Rows, lanes, load, put, with_unit_stride};
use crate::ops::Segments;
use candle_core::{Tensor, WithDType};
use std::ops::Range;

/// The tensors of a call with unit stride, to be [`Held`] by [`Operands`].
pub(super) struct Prepared([Tensor; 4]);

impl Prepared {
    pub(super) fn new(args: &Retention) -> Result<Self> {
        let [q, k, v, log] = [args.q, args.k, args.v, args.log_decay].map(with_unit_stride);
        Ok(Self([q?, k?, v?, log?]))
    }

    pub(super) fn hold(&self) -> [Held<'_>; 4] {
        [0, 1, 2, 3].map(|i| Held::new(&self.0[i]))
    }
}

/// The decays' logarithms.
enum Decays<'a, T> {
    /// `[H]`
    Constant(Vec<f64>),
    /// `[B, T, H]`
    Token(Rows<'a, T>),
}

/// The arguments as the kernels read them.
pub(super) struct Operands<'a, E: Element> {
    sizes: Sizes,
    sequences: [Rows<'a, E>; 3],
    decays: Decays<'a, E::Real>,
    scale: f64,
    /// `[B, H, K, V]`
    initial: Option<Vec<E::Real>>,
    segments: Segments,
    /// Whether there may be tokens of no sequence.
    padded: bool,
}

/// Neighbouring tokens of one row and head that no reset divides.
struct Chunk {
    tokens: Range<usize>,
    /// Whether the state before it is forgotten.
    fresh: bool,
    /// The decays' logarithms summed from the chunk's start, the first of them included unless it is `fresh`.
    sums: Vec<f64>,
}

impl Chunk {
    /// The logarithm of the decay of the state over the whole chunk.
    fn total(&self) -> f64 {
        self.sums.last().copied().unwrap_or(0.0)
    }

    /// `factor e^sums`: what reaches each token of the state before the chunk.
    fn reach<T: Real>(&self, factor: f64) -> Vec<T> {
        self.sums.iter().map(|c| T::from_f64(factor * c.exp())).collect()
    }

    /// `e^(total - sums)`: what is left of each token's contribution at the end.
    fn left<T: Real>(&self) -> Vec<T> {
        let total = self.total();
        self.sums.iter().map(|c| T::from_f64((total - c).exp())).collect()
    }
}

impl<'a, E: Element> Operands<'a, E> {
    /// `args` must have been checked and unified: sequences of dtype `E`, the others of `E::Real`.
    pub(super) fn new(args: &Retention, sizes: Sizes, held: &'a [Held<'a>; 4]) -> Result<Self> {
        let flat = |x: &Tensor| x.flatten_all()?.to_vec1::<E::Real>();
        let decays = match args.log_decay.rank() {
            1 => Decays::Constant(flat(args.log_decay)?.into_iter().map(|log| log.to_f64()).collect()),
            _ => Decays::Token(held[3].rows()?),
        };
        Ok(Self {
            sizes,
            sequences: [held[0].rows()?, held[1].rows()?, held[2].rows()?],
            decays,
            scale: args.scale,
            initial: args.initial_state.map(flat).transpose()?,
            segments: Segments::or_whole(args.segments, sizes.batch, sizes.length),
            padded: args.segments.is_some(),
        })
    }

    /// Numbers in the state of a head.
    fn state_size(&self) -> usize {
        self.sizes.key * self.sizes.value
    }

    /// Numbers in the states of all rows and heads.
    fn states_size(&self) -> usize {
        self.sizes.batch * self.sizes.heads * self.state_size()
    }

    /// The state of `head` of `row` before the first token.
    fn initial(&self, row: usize, head: usize) -> Vec<E::Real> {
        let size = self.state_size();
        let start = (row * self.sizes.heads + head) * size;
        match &self.initial {
            Some(states) => states[start..start + size].to_vec(),
            None => vec![E::Real::ZERO; size],
        }
    }

    /// The values of queries (0), keys (1) or values (2) of one token and head.
    fn token(&self, which: usize, row: usize, t: usize, head: usize) -> &'a [E] {
        self.sequences[which].row([row, t, self.sizes.group(which, head)])
    }

    /// The logarithm of the decay at one token.
    fn log_decay(&self, row: usize, t: usize, head: usize) -> f64 {
        match &self.decays {
            Decays::Constant(logs) => logs[head],
            Decays::Token(rows) => rows.row([row, t])[head].to_f64(),
        }
    }

    /// The chunks of `tokens` of a row and head, of at most `most` tokens each, in order.
    fn chunks(&self, row: usize, head: usize, tokens: &Range<usize>, most: usize) -> Vec<Chunk> {
        let mut chunks: Vec<Chunk> = vec![];
        for run in self.segments.row(row) {
            let end = run.tokens.end.min(tokens.end);
            // whether the next token goes on with the last chunk
            let mut open = false;
            for t in run.tokens.start.max(tokens.start)..end {
                let log = self.log_decay(row, t, head);
                let fresh = (run.fresh && t == run.tokens.start) || log == f64::NEG_INFINITY;
                match chunks.last_mut() {
                    Some(chunk) if open && !fresh && chunk.sums.len() < most => {
                        chunk.sums.push(chunk.total() + log);
                        chunk.tokens.end = t + 1;
                    }
                    _ => {
                        let sums = vec![if fresh { 0.0 } else { log }];
                        chunks.push(Chunk { tokens: t..t + 1, fresh, sums });
                    }
                }
                open = true;
            }
        }
        chunks
    }

    /// Copies the sequences of a chunk, widened, into `[tokens, width]` each.
    fn gather(&self, which: usize, row: usize, head: usize, tokens: &Range<usize>, to: &mut Vec<E::Real>) {
        gather(to, tokens.clone().map(|t| self.token(which, row, t, head)));
    }
}

/// Copies rows one behind the other, widened.
fn gather<'a, E: Element>(to: &mut Vec<E::Real>, rows: impl Iterator<Item = &'a [E]>) {
    to.clear();
    for row in rows {
        let start = to.len();
        to.resize(start + row.len(), E::Real::ZERO);
        dispatch(Widen(row, &mut to[start..]));
    }
}

struct Widen<'a, E: Element>(&'a [E], &'a mut [E::Real]);

impl<T: Real, E: Element<Real = T>> Kernel<T> for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for (c, n) in lanes(s, 0..self.0.len()) {
            put(s, self.1, c, n, load(s, self.0, c, n));
        }
    }
}

/// The decays between the tokens of a chunk, to be multiplied into blocks of rows of its products.
enum Mask<T> {
    /// `scale e^(log (C - 1 - d))` at `d`: row `i` begins at `C - 1 - i`.
    Constant(Vec<T>),
    /// From the chunk's sums.
    Token { scale: f64 },
}

impl<T: Real> Mask<T> {
    /// For chunks of at most `most` tokens.
    fn new<E: Element<Real = T>>(operands: &Operands<E>, head: usize, most: usize) -> Self {
        let scale = operands.scale;
        match &operands.decays {
            Decays::Constant(logs) if logs[head] > f64::NEG_INFINITY => {
                let table =
                    (0..most).map(|d| T::from_f64(scale * ((most - 1 - d) as f64 * logs[head]).exp()));
                Self::Constant(table.collect())
            }
            _ => Self::Token { scale },
        }
    }

    /// Multiplies rows `rows` of the products of all pairs of tokens up to `rows.end`: `block` `[rows, rows.end]`. What
    /// lies above the diagonal becomes zero.
    fn apply(&self, chunk: &Chunk, rows: Range<usize>, block: &mut [T]) {
        let width = rows.end;
        let mut factors = vec![];
        for (i, line) in rows.zip(block.chunks_mut(width)) {
            let factors = match self {
                Self::Constant(table) => &table[table.len() - 1 - i..],
                Self::Token { scale } => {
                    factors.clear();
                    let c = chunk.sums[i];
                    factors.extend(chunk.sums[..=i].iter().map(|from| T::from_f64(c - from)));
                    dispatch(Exponentials { values: &mut factors, factor: T::from_f64(*scale) });
                    &factors[..]
                }
            };
            dispatch(Scale { values: &mut line[..=i], factors });
            line[i + 1..].fill(T::ZERO);
        }
    }
}

/// `factor e^values`
struct Exponentials<'a, T> {
    values: &'a mut [T],
    factor: T,
}

impl<T: Real> Kernel<T> for Exponentials<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let factor = s.splat(self.factor);
        for (c, n) in lanes(s, 0..self.values.len()) {
            let power = exp(s, load(s, self.values, c, n));
            put(s, self.values, c, n, s.mul(power, factor));
        }
    }
}

/// `values *= factors`, one by one.
struct Scale<'a, T> {
    values: &'a mut [T],
    factors: &'a [T],
}

impl<T: Real> Kernel<T> for Scale<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for (c, n) in lanes(s, 0..self.values.len()) {
            let product = s.mul(load(s, self.values, c, n), load(s, self.factors, c, n));
            put(s, self.values, c, n, product);
        }
    }
}

/// Multiplies each row of `[factors, width]` by its factor.
fn scale_rows<T: Real>(values: &mut [T], width: usize, factors: &[T]) {
    for (row, &factor) in values.chunks_mut(width).zip(factors) {
        row.iter_mut().for_each(|x| *x = *x * factor);
    }
}
