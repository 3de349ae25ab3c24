//! Sequences within `[B, L, D]` tensors, and the gated values at their positions.

use crate::backend::cpu::simd::{Element, Simd};
use crate::backend::cpu::view::{Rows, load};
use crate::ops::Segments;
use std::ops::Range;

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

impl<'a, E: Element> Signal<'a, E> {
    /// One row and block of channels of it.
    pub(in super::super) fn track(&self, row: usize, channels: &Range<usize>) -> SignalTrack<'a, E> {
        let track = |rows: &Rows<'a, E>| Track::new(rows, row, channels);
        SignalTrack { values: track(&self.values), gate: self.gate.as_ref().map(track) }
    }
}

/// The values of one row and one block of channels, token by token.
#[derive(Clone, Copy)]
pub(in super::super) struct Track<'a, E> {
    data: &'a [E],
    stride: usize,
    count: usize,
}

impl<'a, E: Element> Track<'a, E> {
    pub(in super::super) fn new(rows: &Rows<'a, E>, row: usize, channels: &Range<usize>) -> Self {
        let (data, stride) = rows.from([row, 0], 1);
        Self { data: &data[channels.start..], stride, count: channels.len() }
    }

    /// The block's channels of one token.
    #[inline(always)]
    pub(in super::super) fn load<S: Simd<E::Real>>(&self, s: S, token: usize) -> S::V {
        load(s, self.data, token * self.stride, self.count)
    }

    /// Asks for their memory.
    #[inline(always)]
    pub(in super::super) fn prefetch<S: Simd<E::Real>>(&self, s: S, token: usize) {
        s.prefetch(self.data[token * self.stride..].as_ptr());
    }
}

/// A [`Track`] of a [`Signal`].
#[derive(Clone, Copy)]
pub(in super::super) struct SignalTrack<'a, E> {
    pub(in super::super) values: Track<'a, E>,
    pub(in super::super) gate: Option<Track<'a, E>>,
}

impl<E: Element> SignalTrack<'_, E> {
    /// The block's channels of one token, gated.
    #[inline(always)]
    pub(in super::super) fn load<S: Simd<E::Real>>(&self, s: S, token: usize) -> S::V {
        let x = self.values.load(s, token);
        match &self.gate {
            Some(gate) => s.mul(x, gate.load(s, token)),
            None => x,
        }
    }

    /// Asks for their memory.
    #[inline(always)]
    pub(in super::super) fn prefetch<S: Simd<E::Real>>(&self, s: S, token: usize) {
        self.values.prefetch(s, token);
        if let Some(gate) = &self.gate {
            gate.prefetch(s, token);
        }
    }
}
