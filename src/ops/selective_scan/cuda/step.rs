//! How a few tokens go through the kernel of single steps.

use super::super::Sizes;
use super::plan::{MOST_BLOCKS, SPLITS, THREADS};

/// Up to so many tokens go through the kernel of single steps, with so many numbers of a state in a lane.
const STEP_TOKENS: usize = 4;
const STEP_STATES: usize = 4;
/// Rows that a lane of a step takes at a time, where as many blocks are left.
const STEP_ROWS: usize = 4;
const STEP_BLOCKS: usize = 1024;

/// The layout of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Lanes that a state is spread over.
    pub(super) split: usize,
    /// Rows that a lane takes at a time.
    pub(super) rows: usize,
    /// Blocks of channels and of rows.
    pub(super) blocks: [usize; 2],
}

/// How a call goes through the kernel of single steps; `None` where the scan's own kernel is better or the state too wide.
pub(super) fn step(sizes: &Sizes) -> Option<Step> {
    let split = SPLITS.into_iter().find(|split| split * STEP_STATES >= sizes.states)?;
    let columns = sizes.channels.div_ceil(THREADS / split);
    let rows = if columns * sizes.batch.div_ceil(STEP_ROWS) >= STEP_BLOCKS { STEP_ROWS } else { 1 };
    let blocks = [columns, sizes.batch.div_ceil(rows).min(MOST_BLOCKS)];
    (sizes.length <= STEP_TOKENS).then_some(Step { split, rows, blocks })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(batch: usize, length: usize, channels: usize, states: usize) -> Sizes {
        Sizes { batch, length, channels, states, groups: [Some(1), Some(1)] }
    }

    #[test]
    fn a_step_is_short() {
        assert_eq!(step(&sizes(8, 1, 1536, 16)), Some(Step { split: 4, rows: 1, blocks: [48, 8] }));
        assert_eq!(step(&sizes(512, 1, 5120, 16)), Some(Step { split: 4, rows: 4, blocks: [160, 128] }));
        assert_eq!(step(&sizes(8, 5, 1536, 16)), None);
        assert_eq!(step(&sizes(8, 1, 1536, 129)), None);
    }
}
