//! The CPU path: a head of a row is one piece of work, walked chunk by chunk with its state in the second cache.
//!
//! [`Operands`] are the arguments, read where they lie. [`forward`] walks chunks, [`backward`] goes back through them,
//! [`step`] is the recurrent form. Time is cut
//! into [`stretches`] where there is one head alone. What a chunk needs of the decays is in [`decay`].

pub(super) mod backward;
pub(super) mod decay;
pub(super) mod forward;
mod scratch;
pub(super) mod step;
mod stretches;

use self::decay::Decays;
use super::plan::{self, Piece};
use super::{Retention, Segments, Sizes};
use crate::Result;
use crate::backend::cpu::matrix::Matrix;
use crate::backend::cpu::product::Ahead;
use crate::backend::cpu::simd::{Isa, Real};
use crate::backend::cpu::view::{Held, Rows, with_unit_stride};
use candle_core::Tensor;
use std::ops::Range;

/// Tokens that look at those before them together.
const BLOCK: usize = 64;

/// Bytes of the second cache for states of heads that are walked side by side.
const STATES: usize = 256 << 10;

/// Pieces of one head of one row that are walked one after another.
struct Stretch {
    /// Row and head.
    task: [usize; 2],
    pieces: Vec<Piece>,
    /// Whether the head begins or ends with it.
    first: bool,
    last: bool,
}

/// The tensors of a call with unit stride, to be [`Held`] by [`Operands`].
pub(super) struct Prepared {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Option<Tensor>,
}

impl Prepared {
    pub(super) fn new(args: &Retention) -> Result<Self> {
        Ok(Self {
            q: with_unit_stride(args.q)?,
            k: with_unit_stride(args.k)?,
            v: with_unit_stride(args.v)?,
            initial_state: args.initial_state.map(|state| state.contiguous()).transpose()?,
        })
    }

    pub(super) fn hold(&self) -> Locks<'_> {
        Locks {
            q: Held::new(&self.q),
            k: Held::new(&self.k),
            v: Held::new(&self.v),
            initial_state: self.initial_state.as_ref().map(Held::new),
        }
    }
}

/// The locked storages of [`Prepared`].
pub(super) struct Locks<'a> {
    q: Held<'a>,
    k: Held<'a>,
    v: Held<'a>,
    initial_state: Option<Held<'a>>,
}

/// The arguments as the kernels read them.
pub(super) struct Operands<'a, T: Real> {
    pub(super) sizes: Sizes,
    pub(super) isa: Isa,
    pub(super) segments: Segments,
    /// Whether there may be tokens of no sequence.
    pub(super) padded: bool,
    scale: T,
    q: Rows<'a, T>,
    k: Rows<'a, T>,
    v: Rows<'a, T>,
    decays: Decays<T>,
    initial: Option<Rows<'a, T>>,
}

impl Stretch {
    /// Tokens of the longest piece.
    fn longest(&self) -> usize {
        self.pieces.iter().map(|piece| piece.tokens.len()).max().unwrap_or(0)
    }
}

impl<'a, T: Real> Operands<'a, T> {
    /// Of checked arguments, all of dtype `T`.
    pub(super) fn new(isa: Isa, args: &Retention, sizes: Sizes, locks: &'a Locks<'a>) -> Result<Self> {
        Ok(Self {
            sizes,
            isa,
            segments: Segments::or_whole(args.segments, sizes.batch, sizes.length),
            padded: args.segments.is_some(),
            scale: T::from_f64(args.scale),
            q: locks.q.rows()?,
            k: locks.k.rows()?,
            v: locks.v.rows()?,
            decays: Decays::new(args.log_decay, &sizes)?,
            initial: locks.initial_state.as_ref().map(|state| state.rows()).transpose()?,
        })
    }

    /// Row and head of every piece of work.
    fn tasks(&self) -> Vec<[usize; 2]> {
        let heads = self.sizes.heads;
        (0..self.sizes.batch * heads).map(|i| [i / heads, i % heads]).collect()
    }

    /// The pieces of a row, for one head.
    fn pieces(&self, [row, head]: [usize; 2], chunk: usize) -> Vec<Piece> {
        plan::pieces(self.segments.row(row), chunk, |t| self.decays.resets([row, t, head]))
    }

    /// All stretches of a call, in order.
    fn stretches(&self, chunk: usize) -> Vec<Stretch> {
        let mut all = vec![];
        for task in self.tasks() {
            let pieces = self.pieces(task, chunk);
            let count = plan::stretches(&self.sizes, pieces.len());
            let cuts: Vec<_> = (0..=count).map(|i| i * pieces.len() / count).collect();
            all.extend(cuts.windows(2).map(|cut| Stretch {
                task,
                pieces: pieces[cut[0]..cut[1]].to_vec(),
                first: cut[0] == 0,
                last: cut[1] == pieces.len(),
            }));
        }
        all
    }

    /// Queries, keys and values of one head, `[tokens, width]` each.
    fn matrices(&self, [row, head]: [usize; 2], tokens: &Range<usize>) -> [Matrix<'a, T>; 3] {
        let mut sides = [&self.q, &self.k, &self.v].into_iter().zip(self.sizes.groups);
        std::array::from_fn(|_| {
            let (rows, groups) = sides.next().unwrap_or((&self.q, self.sizes.groups[0]));
            let group = head / (self.sizes.heads / groups);
            let (data, stride) = rows.from([row, tokens.start, group], 1);
            Matrix::new(data, [tokens.len(), rows.width()], [stride, 1])
        })
    }

    /// Queries, keys and values of the piece that comes next, if one does, to be asked for.
    fn ahead(&self, next: Option<([usize; 2], &Piece)>) -> [Ahead<T>; 3] {
        next.map_or([Ahead::NONE; 3], |(task, next)| self.matrices(task, &next.tokens).map(Ahead::rows))
    }

    /// How many heads are walked side by side, so that the rows of all heads, which are neighbours in memory, are read one
    /// after another: as many as have their states in the second cache and leave work for every thread.
    fn together(&self) -> usize {
        let heads = self.sizes.heads;
        let fit = STATES / (self.state_size() * size_of::<T>()).max(1);
        let share = self.sizes.batch * heads / rayon::current_num_threads();
        (1..=fit.min(share).clamp(1, heads)).rev().find(|&n| heads.is_multiple_of(n)).unwrap_or(1)
    }

    /// A state or its gradient.
    fn square<'s>(&self, state: &'s [T]) -> Matrix<'s, T> {
        Matrix::new(state, [self.sizes.keys, self.sizes.values], [self.sizes.values, 1])
    }

    /// The state before the first token of a head, `[K, V]`.
    fn initial(&self, [row, head]: [usize; 2]) -> Option<&'a [T]> {
        let size = self.state_size();
        self.initial.map(|state| &state.from([row, head, 0], 0).0[..size])
    }

    /// Numbers in the state of a head.
    fn state_size(&self) -> usize {
        self.sizes.keys * self.sizes.values
    }

    /// Numbers computed with, for the choice whether threads are worth it.
    fn work(&self) -> usize {
        self.sizes.batch * self.sizes.length * self.sizes.heads * self.state_size()
    }
}
