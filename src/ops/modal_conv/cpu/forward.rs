//! The forward pass: every piece of work takes its channels through the chunks of a row.
//!
//! Per token and channel: `(T + 1) / 2` multiply-adds for what the chunk itself gives and 2 per real number of state,
//! each with a load from the first cache: 40 for 8 complex states. At two a cycle and 16 lanes that is as fast as memory
//! gives the inputs.

use super::super::Sizes;
use super::super::plan::{CHUNK, Chunk, GROUP, chunks, tiles};
use super::tables::Tables;
use super::{Way, chunk, from_blocks, gather, to_blocks};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Outlet, Rows, store};
use crate::ops::Segments;
use std::ops::Range;

/// One piece of work: the chunks of a row, a tile of its blocks of channels.
pub(super) struct Piece {
    pub(super) row: usize,
    pub(super) tile: Range<usize>,
}

/// A call's data and how it is cut.
pub(in super::super) struct Scan<'a, E: Element> {
    pub(super) u: Rows<'a, E>,
    pub(super) tables: &'a Tables<E::Real>,
    pub(super) sizes: Sizes,
    /// Of every row.
    pub(super) chunks: Vec<Vec<Chunk>>,
    pub(super) padded: bool,
}

/// What a forward pass leaves.
pub(in super::super) struct Scanned<E: Element> {
    /// `[B, L, D]`
    pub(in super::super) y: Vec<E>,
    /// `[B, D, C]`
    pub(in super::super) state: Vec<E::Real>,
    /// Of every piece the state before every group of chunks, blocks of `[C, LANES]`; empty where none were asked for.
    pub(in super::super) kept: Vec<Vec<f64>>,
}

impl<'a, E: Element> Scan<'a, E> {
    pub(in super::super) fn new(
        u: Rows<'a, E>,
        tables: &'a Tables<E::Real>,
        sizes: Sizes,
        segments: Option<&Segments>,
    ) -> Self {
        let padded = segments.is_some();
        let segments = Segments::or_whole(segments, sizes.batch, sizes.length);
        let chunks = (0..sizes.batch).map(|row| chunks(segments.row(row))).collect();
        Self { u, tables, sizes, chunks, padded }
    }

    /// Numbers in the state of a block.
    pub(super) fn block_size(&self) -> usize {
        self.sizes.components() * self.tables.lanes()
    }

    /// The pieces, tile by tile within a row.
    pub(super) fn pieces(&self) -> Vec<Piece> {
        let tiles = tiles(self.sizes.channels, self.tables.lanes());
        let of_row = |row| tiles.iter().map(move |tile| Piece { row, tile: tile.clone() });
        (0..self.sizes.batch).flat_map(of_row).collect()
    }

    /// A piece's part of a `[B, D, C]` state in blocks.
    pub(super) fn part<'b>(&self, piece: &Piece, blocks: &'b [f64]) -> &'b [f64] {
        let size = self.block_size();
        let row = piece.row * self.sizes.channels.div_ceil(self.tables.lanes()) * size;
        &blocks[row + piece.tile.start * size..row + piece.tile.end * size]
    }

    /// The channels of block `index`.
    pub(super) fn channels(&self, index: usize) -> Range<usize> {
        let lanes = self.tables.lanes();
        index * lanes..self.sizes.channels.min((index + 1) * lanes)
    }

    /// A `[B, D, C]` state (zeros if `None`) in blocks.
    pub(super) fn blocks(&self, state: Option<&[f64]>) -> Vec<f64> {
        let Sizes { batch, channels, .. } = self.sizes;
        match state {
            Some(state) => to_blocks(state, channels, self.sizes.components(), self.tables.lanes()),
            None => vec![0.0; batch * channels.div_ceil(self.tables.lanes()) * self.block_size()],
        }
    }

    /// Scans from `initial` `[B, D, C]`; keeps the states before groups of chunks where asked.
    pub(in super::super) fn forward(&self, initial: Option<&[f64]>, keep: bool) -> Scanned<E> {
        let Sizes { batch, length, channels, .. } = self.sizes;
        let elements = batch * length * channels;
        let initial = self.blocks(initial);
        let mut y = Vec::new();
        let outlet = Outlet::fresh_or_zeroed(&mut y, elements, self.padded);
        let walked = parallel::map(&self.pieces(), elements * self.sizes.components(), |piece| {
            let state = self.part(piece, &initial).to_vec();
            dispatch(Walk { scan: self, piece, state, y: &outlet, keep })
        });
        // SAFETY: padding was zeroed, and the pieces wrote every other token.
        unsafe { y.set_len(elements) };
        let (state, kept): (Vec<_>, Vec<_>) = walked.into_iter().unzip();
        let state = from_blocks(&state.concat(), channels, self.sizes.components(), self.tables.lanes());
        Scanned { y, state, kept }
    }
}

struct Walk<'a, E: Element> {
    scan: &'a Scan<'a, E>,
    piece: &'a Piece,
    state: Vec<f64>,
    y: &'a Outlet<'a, E>,
    keep: bool,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Walk<'_, E> {
    type Output = (Vec<f64>, Vec<f64>);

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, s: S) -> Self::Output {
        let (scan, row) = (self.scan, self.piece.row);
        assert_eq!(scan.tables.lanes(), S::LANES);
        let Sizes { length, channels: width, .. } = scan.sizes;
        let size = scan.block_size();
        let mut scratch = vec![T::ZERO; size];
        let mut kept = vec![];
        for group in scan.chunks[row].chunks(GROUP) {
            if self.keep {
                kept.extend_from_slice(&self.state);
            }
            for (index, state) in self.piece.tile.clone().zip(self.state.chunks_exact_mut(size)) {
                let (block, channels) = (scan.tables.block(index), scan.channels(index));
                for tokens in group {
                    if tokens.fresh {
                        state.fill(0.0);
                    }
                    prefetch(s, scan, row, tokens.start + CHUNK, &channels);
                    let x = gather(s, &scan.u, row, tokens, Way::Forward, channels.clone());
                    let y = chunk(s, &block, Way::Forward, &x, tokens.count, state, &mut scratch);
                    for (i, y) in y.into_iter().enumerate().take(tokens.count) {
                        let at = (row * length + tokens.start + i) * width + channels.start;
                        // SAFETY: `at` checked the place; no other piece has this token and these channels.
                        unsafe { store(s, self.y.at(at, channels.len()), channels.len(), y) };
                    }
                }
            }
        }
        (self.state, kept)
    }
}

/// Asks for the next chunk's inputs: rows lie too far apart for the hardware to see the stream.
#[inline(always)]
fn prefetch<E: Element, S: Simd<E::Real>>(
    s: S,
    scan: &Scan<E>,
    row: usize,
    start: usize,
    channels: &Range<usize>,
) {
    for t in start..scan.sizes.length.min(start + CHUNK) {
        s.prefetch(scan.u.row([row, t])[channels.clone()].as_ptr());
    }
}
