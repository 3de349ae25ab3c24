//! How a call is cut into pieces of work: by its shape alone, so that results do not depend on the number of threads.

use super::{Form, Sizes};
use crate::ops::segments::Run;
use std::ops::Range;

/// Up to so many tokens [`Form::Auto`] is recurrent.
const FEW_TOKENS: usize = 4;

/// How many stretches time is cut into, and the least pieces of each.
const STRETCHES: usize = 8;
const LEAST_PIECES: usize = 4;

/// The kernels of a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// Token by token.
    Recurrent,
    /// In chunks of at most so many tokens.
    Chunks(usize),
}

/// What a form means for a shape.
pub(crate) fn path(form: Form, sizes: &Sizes) -> Path {
    match form {
        Form::Recurrent => Path::Recurrent,
        Form::Auto if sizes.length <= FEW_TOKENS => Path::Recurrent,
        Form::Auto => Path::Chunks(chunk(sizes)),
        Form::Chunkwise { chunk } => Path::Chunks(chunk.max(1)),
        Form::Parallel => Path::Chunks(usize::MAX),
    }
}

/// How many stretches the time of a head is cut into, of so many pieces: several where it is alone.
pub(crate) fn stretches(sizes: &Sizes, pieces: usize) -> usize {
    if sizes.batch * sizes.heads == 1 && pieces >= STRETCHES * LEAST_PIECES { STRETCHES } else { 1 }
}

/// The chunk that costs least: a token takes `C (K + V)` operations within the chunk and `4 K V` through the state, which
/// run the better the longer the chunk is.
pub(crate) fn chunk(sizes: &Sizes) -> usize {
    if sizes.keys * sizes.values <= 128 * 128 { 64 } else { 128 }
}

/// Tokens of a row that are computed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) tokens: Range<usize>,
    /// Whether the state before it counts for nothing.
    pub(crate) fresh: bool,
}

/// The pieces of a row of `runs`: at most `chunk` tokens each, cut before every token that `resets` the state.
pub(crate) fn pieces(runs: &[Run], chunk: usize, resets: impl Fn(usize) -> bool) -> Vec<Piece> {
    let mut pieces = vec![];
    for run in runs {
        let mut piece = Piece { tokens: run.tokens.start..run.tokens.start, fresh: run.fresh };
        for t in run.tokens.clone() {
            let resets = resets(t);
            if piece.tokens.len() == chunk || resets && !piece.tokens.is_empty() {
                pieces.push(piece);
                piece = Piece { tokens: t..t, fresh: false };
            }
            piece.fresh |= resets;
            piece.tokens.end = t + 1;
        }
        if !piece.tokens.is_empty() {
            pieces.push(piece);
        }
    }
    pieces
}

/// Pieces in a [`spans`] at most.
const SPAN_PIECES: usize = 16;

/// Neighbouring pieces at whose start the backward pass finds the state: it is zero there, or has been kept. So many
/// tokens lie between two kept states that these hold no more numbers than the keys and values do.
pub(crate) fn spans(pieces: &[Piece], sizes: &Sizes) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = vec![];
    let mut tokens = 0;
    for (i, piece) in pieces.iter().enumerate() {
        let enough = tokens * (sizes.keys + sizes.values) >= sizes.keys * sizes.values;
        match spans.last_mut() {
            Some(span) if !piece.fresh && !enough && span.len() < SPAN_PIECES => span.end += 1,
            _ => {
                spans.push(i..i + 1);
                tokens = 0;
            }
        }
        tokens += piece.tokens.len();
    }
    spans
}

/// Several rows of so many things taken in turns: the row and the place in it.
pub(crate) fn side_by_side(counts: &[usize]) -> Vec<(usize, usize)> {
    let longest = counts.iter().copied().max().unwrap_or(0);
    (0..longest)
        .flat_map(|i| (0..counts.len()).map(move |n| (n, i)))
        .filter(|&(n, i)| i < counts[n])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(length: usize, keys: usize, values: usize) -> Sizes {
        Sizes { batch: 1, length, heads: 1, keys, values, groups: [1; 3], per_token: false }
    }

    #[test]
    fn steps_are_recurrent_and_sequences_chunkwise() {
        assert_eq!(path(Form::Auto, &sizes(1, 256, 512)), Path::Recurrent);
        assert_eq!(path(Form::Auto, &sizes(4096, 64, 128)), Path::Chunks(64));
        assert_eq!(path(Form::Auto, &sizes(4096, 256, 512)), Path::Chunks(128));
        assert_eq!(path(Form::Chunkwise { chunk: 7 }, &sizes(1, 8, 8)), Path::Chunks(7));
        assert_eq!(path(Form::Parallel, &sizes(1, 8, 8)), Path::Chunks(usize::MAX));
    }

    #[test]
    fn pieces_end_with_chunks_runs_and_resets() {
        let runs = [Run { tokens: 1..6, fresh: false }, Run { tokens: 8..10, fresh: true }];
        let got: Vec<_> =
            pieces(&runs, 3, |t| t == 5 || t == 9).into_iter().map(|p| (p.tokens, p.fresh)).collect();
        assert_eq!(got, [(1..4, false), (4..5, false), (5..6, true), (8..9, true), (9..10, true)]);
        assert!(pieces(&[], 3, |_| false).is_empty());
    }

    #[test]
    fn rows_take_turns_while_they_last() {
        assert_eq!(side_by_side(&[2, 0, 3]), [(0, 0), (2, 0), (0, 1), (2, 1), (2, 2)]);
        assert!(side_by_side(&[]).is_empty());
    }

    #[test]
    fn kept_states_are_no_more_than_keys_and_values() {
        let run = [Run { tokens: 0..4096, fresh: false }];
        for (keys, values) in [(64, 128), (256, 512), (1, 1), (1024, 1024)] {
            let sizes = sizes(4096, keys, values);
            let spans = spans(&pieces(&run, 64, |_| false), &sizes);
            assert!((spans.len() - 1) * keys * values <= 4096 * (keys + values));
            assert_eq!(spans.iter().map(|span| span.len()).sum::<usize>(), 64);
        }
    }
}
