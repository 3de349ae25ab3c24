//! How a scan is cut into pieces of work: by its shape alone, so that results do not depend on the number of threads.

use super::Sizes;
use crate::ops::segments::Run;
use std::ops::Range;

/// Tokens between two kept states; the backward pass recomputes within as many.
pub(crate) const CHUNK: usize = 64;
/// Where batch and channels give fewer pieces of work than this, time is cut too.
const ENOUGH: usize = 4;
/// Pieces that time is cut into then.
const SPANS: usize = 16;
/// Tiles of a row: the channels of one are walked together, and their shares of dB and dC added up in one buffer.
const TILES: usize = 8;
/// Up to so many tokens a scan of at least [`STEP_STATES`] states goes token by token, with lanes over the states.
const STEP_TOKENS: usize = 4;
const STEP_STATES: usize = 4;

/// The channels of one register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) channels: Range<usize>,
    /// The group of `B` and of `C` that these channels belong to.
    pub(crate) groups: [usize; 2],
}

/// The pieces of work of one row of the batch.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) blocks: Vec<Block>,
    /// Neighbouring blocks of the same groups.
    pub(crate) tiles: Vec<Range<usize>>,
    /// Chunks of [`CHUNK`] tokens in a row.
    pub(crate) chunks: usize,
    /// Neighbouring chunks that one piece of work goes through in order; more than one span costs a second pass.
    pub(crate) spans: Vec<Range<usize>>,
}

/// Whether a forward pass is short enough for the kernel with lanes over the states.
pub(crate) fn is_step(sizes: &Sizes) -> bool {
    sizes.length <= STEP_TOKENS && sizes.states >= STEP_STATES
}

impl Plan {
    /// The plan for registers of `lanes` channels.
    pub(crate) fn new(sizes: &Sizes, lanes: usize) -> Self {
        let blocks = blocks(sizes, lanes);
        let size = blocks.len().div_ceil(TILES).max(1);
        let mut tiles: Vec<Range<usize>> = vec![];
        for (i, block) in blocks.iter().enumerate() {
            match tiles.last_mut() {
                Some(tile) if tile.len() < size && blocks[tile.start].groups == block.groups => tile.end += 1,
                _ => tiles.push(i..i + 1),
            }
        }
        let chunks = sizes.length.div_ceil(CHUNK);
        let spans = if sizes.batch * tiles.len() >= ENOUGH { 1 } else { SPANS };
        let size = chunks.div_ceil(spans).max(1);
        let spans = (0..chunks).step_by(size).map(|start| start..chunks.min(start + size)).collect();
        Self { blocks, tiles, chunks, spans }
    }
}

/// Registers of channels that lie in one group of `B` and one of `C`.
fn blocks(sizes: &Sizes, lanes: usize) -> Vec<Block> {
    let width = |side: usize| sizes.channels / sizes.groups[side].unwrap_or(1);
    let (mut start, mut blocks) = (0, vec![]);
    while start < sizes.channels {
        let groups = [start / width(0), start / width(1)];
        let end = (start + lanes).min((groups[0] + 1) * width(0)).min((groups[1] + 1) * width(1));
        blocks.push(Block { channels: start..end, groups });
        start = end;
    }
    blocks
}

/// The parts of a row's runs that lie in chunk `chunk`.
pub(crate) fn runs_in(runs: &[Run], chunk: usize) -> impl DoubleEndedIterator<Item = Run> + Clone + '_ {
    let (start, end) = (chunk * CHUNK, (chunk + 1) * CHUNK);
    runs.iter().filter(move |run| run.tokens.start < end && run.tokens.end > start).map(move |run| Run {
        tokens: run.tokens.start.max(start)..run.tokens.end.min(end),
        fresh: run.fresh && run.tokens.start >= start,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(batch: usize, length: usize, channels: usize, groups: [Option<usize>; 2]) -> Sizes {
        Sizes { batch, length, channels, states: 16, groups }
    }

    #[test]
    fn blocks_stay_within_their_groups() {
        let plan = Plan::new(&sizes(1, 10, 48, [Some(2), Some(3)]), 16);
        let starts: Vec<_> = plan.blocks.iter().map(|b| (b.channels.clone(), b.groups)).collect();
        assert_eq!(starts, [(0..16, [0, 0]), (16..24, [0, 1]), (24..32, [1, 1]), (32..48, [1, 2])]);
        assert_eq!(plan.tiles.iter().map(|t| t.len()).sum::<usize>(), 4);
    }

    #[test]
    fn time_is_cut_only_where_channels_are_few() {
        assert_eq!(Plan::new(&sizes(1, 4096, 1536, [Some(1), Some(1)]), 16).spans.len(), 1);
        assert_eq!(Plan::new(&sizes(1, 4096, 16, [Some(1), Some(1)]), 16).spans.len(), 16);
        assert!(Plan::new(&sizes(1, 0, 16, [Some(1), Some(1)]), 16).spans.is_empty());
    }

    #[test]
    fn runs_are_clipped_and_stay_fresh_only_at_their_start() {
        let run = |tokens: Range<usize>, fresh| Run { tokens, fresh };
        let runs = [run(3..CHUNK + 9, true), run(CHUNK + 20..3 * CHUNK, false)];
        let clipped: Vec<_> = runs_in(&runs, 1).collect();
        assert_eq!(clipped, [run(CHUNK..CHUNK + 9, false), run(CHUNK + 20..2 * CHUNK, false)]);
        assert_eq!(runs_in(&runs, 0).collect::<Vec<_>>(), [run(3..CHUNK, true)]);
    }
}
