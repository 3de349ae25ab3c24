//! How the work is cut: by shape and segments alone, so that results do not depend on the number of threads.

use super::Sizes;
use crate::ops::segments::Run;
use std::ops::Range;

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 16;
/// Chunks that a block of channels goes through before the next one comes; also those between two kept states.
pub(super) const GROUP: usize = 8;
/// Calls of fewer tokens go token by token: the tables would cost more.
const STEP_TOKENS: usize = 8;
/// Pieces that the channels of a row are cut into, where there are as many.
const TILES: usize = 8;

/// Neighbouring tokens of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) start: usize,
    pub(super) count: usize,
    /// Whether the state before it is zero.
    pub(super) fresh: bool,
}

/// Whether a call is short enough to go token by token.
pub(super) fn is_step(sizes: &Sizes) -> bool {
    sizes.length < STEP_TOKENS
}

/// The chunks of a row, in order; only the last of a run is shorter.
pub(super) fn chunks(runs: &[Run]) -> Vec<Chunk> {
    let of_run = |run: &Run| {
        let (tokens, fresh) = (run.tokens.clone(), run.fresh);
        tokens.clone().step_by(CHUNK).map(move |start| Chunk {
            start,
            count: CHUNK.min(tokens.end - start),
            fresh: fresh && start == tokens.start,
        })
    };
    runs.iter().flat_map(of_run).collect()
}

/// The registers of `lanes` channels, in tiles of neighbours.
pub(super) fn tiles(channels: usize, lanes: usize) -> Vec<Range<usize>> {
    let blocks = channels.div_ceil(lanes);
    let size = blocks.div_ceil(TILES).max(1);
    (0..blocks).step_by(size).map(|start| start..blocks.min(start + size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_runs_and_start_fresh_once() {
        let runs = [Run { tokens: 2..40, fresh: true }, Run { tokens: 41..44, fresh: false }];
        let chunk = |start, count, fresh| Chunk { start, count, fresh };
        let expected = [chunk(2, 16, true), chunk(18, 16, false), chunk(34, 6, false), chunk(41, 3, false)];
        assert_eq!(chunks(&runs), expected);
    }

    #[test]
    fn tiles_cover_the_blocks() {
        assert_eq!(tiles(1024, 16).len(), 8);
        assert_eq!(tiles(33, 16), [0..1, 1..2, 2..3]);
        assert!(tiles(0, 16).is_empty());
    }
}
