//! How a scan is laid out on a GPU: by its shape and the device's size alone.

use super::super::Sizes;

/// Numbers of a state in one lane, channels in one lane, threads of a block, tokens of a tile: as `scan.cuh` has them.
const STATES: usize = 8;
const PAIR: usize = 2;
pub(super) const THREADS: usize = 128;
pub(super) const TILE: usize = 16;
/// Lanes that one state may be spread over.
const SPLITS: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// A chunk has at least as many tiles.
const CHUNK_TILES: usize = 8;
/// What a second, cheaper walk through a chunk costs, and how far it goes before decays make the rest negligible.
const SUMMARY_COST: f64 = 0.7;
const SUMMARY_TOKENS: f64 = 128.0;
/// Bounds of a grid, and of the integers that kernels count tokens with.
const MOST_BLOCKS: usize = 65_535;
const MOST_TOKENS: usize = (1 << 31) - 2 * TILE;

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

/// The layout of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Lanes that share a state.
    pub(super) split: usize,
    /// Channels that share their groups of `B` and of `C`, and how many such parts there are.
    pub(super) part: usize,
    pub(super) parts: usize,
    /// Blocks in a part.
    pub(super) blocks: usize,
    /// Tokens of a chunk, and the number of chunks.
    pub(super) chunk: usize,
    pub(super) chunks: usize,
}

impl Plan {
    /// For a device that has room for `slots` blocks at once; `None` where no kernel takes the call.
    pub(super) fn new(sizes: &Sizes, slots: usize) -> Option<Self> {
        let Sizes { batch, length, channels, states, groups } = *sizes;
        let split = SPLITS.into_iter().find(|split| split * STATES >= states)?;
        if batch * length * channels == 0 || batch > MOST_BLOCKS || length > MOST_TOKENS {
            return None;
        }
        let width = |side: usize| channels / groups[side].unwrap_or(channels);
        let part = gcd(width(0), width(1));
        let parts = channels / part;
        let blocks = part.div_ceil(THREADS / split * PAIR);
        let tiles = length.div_ceil(TILE);
        let all = blocks * parts * batch;
        let cost = |chunks: &usize| {
            let waves = (all * chunks).div_ceil(slots.max(1)) as f64 / *chunks as f64;
            let share = (SUMMARY_TOKENS * *chunks as f64 / length as f64).min(1.0);
            waves * if *chunks > 1 { 1.0 + SUMMARY_COST * share } else { 1.0 } + 1e-5 * *chunks as f64
        };
        let most = (tiles / CHUNK_TILES).clamp(1, MOST_BLOCKS);
        let chunks = (1..=most).min_by(|a, b| cost(a).total_cmp(&cost(b)))?;
        let chunk = tiles.div_ceil(chunks) * TILE;
        Some(Self { split, part, parts, blocks, chunk, chunks: length.div_ceil(chunk) })
    }

    /// Blocks of all parts.
    pub(super) fn columns(&self) -> usize {
        self.parts * self.blocks
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(batch: usize, length: usize, channels: usize, states: usize) -> Sizes {
        Sizes { batch, length, channels, states, groups: [Some(1), Some(1)] }
    }

    #[test]
    fn a_state_is_spread_over_as_few_lanes_as_hold_it() {
        for (states, split) in [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (128, 16), (129, 32), (256, 32)] {
            assert_eq!(
                Plan::new(&sizes(1, 10, 64, states), 528).map(|plan| plan.split),
                Some(split),
                "{states}"
            );
        }
        assert_eq!(Plan::new(&sizes(1, 10, 64, 257), 528), None);
    }

    #[test]
    fn a_step_is_short() {
        assert_eq!(step(&sizes(8, 1, 1536, 16)), Some(Step { split: 4, rows: 1, blocks: [48, 8] }));
        assert_eq!(step(&sizes(512, 1, 5120, 16)), Some(Step { split: 4, rows: 4, blocks: [160, 128] }));
        assert_eq!(step(&sizes(8, 5, 1536, 16)), None);
        assert_eq!(step(&sizes(8, 1, 1536, 129)), None);
    }

    #[test]
    fn nothing_to_do_is_no_work_for_a_kernel() {
        for (batch, length, channels) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (65_536, 1, 1)] {
            assert_eq!(Plan::new(&sizes(batch, length, channels, 16), 528), None);
        }
    }

    #[test]
    fn time_is_cut_where_channels_do_not_fill_the_device() {
        let chunks =
            |batch, length, channels| Plan::new(&sizes(batch, length, channels, 16), 528).map(|p| p.chunks);
        assert_eq!(chunks(64, 200, 1536), Some(1));
        assert_eq!(chunks(8, 2048, 1536), Some(5));
        assert_eq!(chunks(1, 262_144, 1536), Some(44));
        assert_eq!(chunks(1, 100, 16), Some(1));
    }

    #[test]
    fn chunks_cover_the_tokens_and_parts_the_channels() {
        for (length, groups) in [(1, [Some(1), Some(1)]), (531, [Some(2), Some(3)]), (9000, [None, Some(4)])]
        {
            let sizes = Sizes { batch: 2, length, channels: 48, states: 16, groups };
            let Some(plan) = Plan::new(&sizes, 264) else { panic!("no plan for {sizes:?}") };
            assert!(plan.chunk % TILE == 0 && plan.chunks * plan.chunk >= length);
            assert!((plan.chunks - 1) * plan.chunk < length);
            assert_eq!(plan.part * plan.parts, 48);
            for group in groups {
                assert_eq!(48 / group.unwrap_or(48) % plan.part, 0);
            }
        }
    }
}
