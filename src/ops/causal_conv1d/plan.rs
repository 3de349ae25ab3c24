//! How the work is cut: sequences into tiles of tokens, tiles into tasks. By shape and segments alone.

use super::Segments;
use std::ops::Range;

/// The tokens of one row that form one sequence, and what lies before and behind them.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// Index in the batch.
    pub(super) row: usize,
    /// Its tokens, in order; more than one range where padding lies within.
    runs: Vec<Range<usize>>,
    /// The number of its tokens.
    pub(super) length: usize,
    /// Whether it goes on from the row's initial state (else from zeros).
    pub(super) carried: bool,
    /// Whether the row's final state is its own.
    pub(super) last: bool,
}

impl Sequence {
    /// All sequences of all rows, in order. A row without tokens has one empty sequence: its state passes through.
    pub(super) fn all(segments: Option<&Segments>, batch: usize, length: usize) -> Vec<Self> {
        let mut sequences = Vec::with_capacity(batch);
        for row in 0..batch {
            let first = Self { row, runs: vec![], length: 0, carried: true, last: false };
            let Some(segments) = segments else {
                sequences.push(Self {
                    runs: std::iter::once(0..length).collect(),
                    length,
                    last: true,
                    ..first
                });
                continue;
            };
            let mut current = first;
            for run in segments.row(row) {
                if run.fresh {
                    let next = Self { row, runs: vec![], length: 0, carried: false, last: false };
                    let ended = std::mem::replace(&mut current, next);
                    if ended.length > 0 {
                        sequences.push(ended);
                    }
                }
                current.length += run.tokens.len();
                current.runs.push(run.tokens.clone());
            }
            sequences.push(Self { last: true, ..current });
        }
        sequences
    }

    /// The tokens at `positions` of the sequence.
    pub(super) fn tokens(&self, positions: Range<usize>) -> impl Iterator<Item = usize> {
        let mut start = 0;
        self.runs.iter().flat_map(move |run| {
            let clip = |p: usize| p.clamp(start, start + run.len()) - start + run.start;
            let tokens = clip(positions.start)..clip(positions.end);
            start += run.len();
            tokens
        })
    }
}

/// Some positions of one sequence.
#[derive(Clone, Debug)]
pub(super) struct Tile<'a> {
    pub(super) sequence: &'a Sequence,
    pub(super) positions: Range<usize>,
}

/// One unit of parallel work.
#[derive(Clone, Debug)]
pub(super) struct Task<'a> {
    pub(super) tiles: Vec<Tile<'a>>,
    pub(super) channels: Range<usize>,
}

/// Tokens a task has at least, where there are as many.
const TASK_TOKENS: usize = 64;
/// Channels of a task at most.
const TASK_CHANNELS: usize = 512;

/// Tiles of up to `tile` tokens in tasks: each group of tiles once for each block of channels, the blocks innermost.
pub(super) fn tasks(sequences: &[Sequence], tile: usize, channels: usize) -> Vec<Task<'_>> {
    let mut groups: Vec<Vec<Tile>> = vec![];
    let mut size = TASK_TOKENS;
    for sequence in sequences {
        // an empty sequence has one empty tile, which passes its state and the state's gradient on
        for start in (0..sequence.length.max(1)).step_by(tile) {
            let end = sequence.length.min(start + tile);
            if size >= TASK_TOKENS {
                groups.push(vec![]);
                size = 0;
            }
            size += (end - start).max(1);
            if let Some(group) = groups.last_mut() {
                group.push(Tile { sequence, positions: start..end });
            }
        }
    }
    let starts = || (0..channels).step_by(TASK_CHANNELS);
    let block = |start: usize| start..channels.min(start + TASK_CHANNELS);
    groups
        .iter()
        .flat_map(|tiles| starts().map(|start| Task { tiles: tiles.clone(), channels: block(start) }))
        .collect()
}
