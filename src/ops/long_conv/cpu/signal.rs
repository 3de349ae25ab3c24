//! Sequences within `[B, L, D]` tensors, and the gated values at their positions.

use crate::backend::cpu::simd::{Element, Simd};
use crate::backend::cpu::view::{Rows, load};
use crate::ops::Segments;

/// The tokens of one sequence.
#[derive(Clone, Debug)]
pub(in super::super) struct Sequence {
    /// Index in the batch.
    pub(in super::super) row: usize,
    tokens: Tokens,
}

#[derive(Clone, Debug)]
enum Tokens {
    /// The first so many of the row.
    First(usize),
    /// These.
    Listed(Vec<usize>),
}

impl Sequence {
    /// All sequences of all rows, in order.
    pub(in super::super) fn all(segments: Option<&Segments>, batch: usize, length: usize) -> Vec<Self> {
        let Some(segments) = segments else {
            return (0..batch).map(|row| Self { row, tokens: Tokens::First(length) }).collect();
        };
        let listed = |row| {
            let of_row = segments.sequences(row).into_iter();
            of_row.map(move |tokens| Self { row, tokens: Tokens::Listed(tokens) })
        };
        (0..batch).flat_map(listed).collect()
    }

    /// How many.
    pub(in super::super) fn len(&self) -> usize {
        match &self.tokens {
            Tokens::First(count) => *count,
            Tokens::Listed(tokens) => tokens.len(),
        }
    }

    /// The token at `position`.
    #[inline(always)]
    pub(in super::super) fn token(&self, position: usize) -> usize {
        match &self.tokens {
            Tokens::First(_) => position,
            Tokens::Listed(tokens) => tokens[position],
        }
    }
}

/// `[B, L, D]` values, each multiplied by its gate's.
#[derive(Clone, Copy)]
pub(in super::super) struct Signal<'a, E: Element> {
    pub(in super::super) values: Rows<'a, E>,
    pub(in super::super) gate: Option<Rows<'a, E>>,
}

impl<E: Element> Signal<'_, E> {
    /// `n` channels from `c` of one token.
    #[inline(always)]
    pub(super) fn load<S: Simd<E::Real>>(&self, s: S, at: [usize; 2], c: usize, n: usize) -> S::V {
        let x = load(s, self.values.row(at), c, n);
        match &self.gate {
            Some(gate) => s.mul(x, load(s, gate.row(at), c, n)),
            None => x,
        }
    }

    /// Asks for the memory of one token from channel `c` on.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd<E::Real>>(&self, s: S, at: [usize; 2], c: usize) {
        s.prefetch(self.values.row(at)[c..].as_ptr());
        if let Some(gate) = &self.gate {
            s.prefetch(gate.row(at)[c..].as_ptr());
        }
    }
}
