//! How much of a block's shared memory each part of a step has.

use super::kernels::Shape;
use super::weights::Sizes;

/// Of `decode.cuh` and `decode_stream.cuh`.
const WARPS: usize = 8;
const COPIERS: usize = 4;
const LANES: usize = 32;
const TILE: usize = 8;
const GROUP: usize = 64;
const SLOT: usize = 5 * TILE * GROUP;
const MOST_SLOTS: usize = 8;
const GRAIN: usize = 2;
/// Threads of a block.
pub(super) const THREADS: usize = (WARPS + COPIERS) * LANES;
/// Shared memory that the kernel has beside what is asked for at its launch.
const FIXED: usize = 4 << 10;
/// Slots with which weights come ahead of their phases.
const LEAST_SLOTS: usize = 2;

/// A multiprocessor's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Outputs of a block at most: channels, and parts of the stream.
    pub(super) own_channels: usize,
    pub(super) own_hidden: usize,
    /// Of the products' sums, once, and of a warp's activations.
    pub(super) sums_bytes: usize,
    pub(super) x_bytes: usize,
    pub(super) ring_slots: usize,
    /// In all.
    pub(super) bytes: usize,
}

impl Layout {
    /// For so many rows, on `blocks` multiprocessors with `memory` bytes of shared memory each; none if that is not
    /// enough.
    pub(super) fn new(
        sizes: &Sizes,
        element: usize,
        phases: usize,
        rows: usize,
        blocks: usize,
        memory: usize,
    ) -> Option<Self> {
        let own = |outputs: usize| GRAIN * outputs.div_ceil(GRAIN).div_ceil(blocks);
        let groups = |bytes: usize| bytes.div_ceil(GROUP).div_ceil(WARPS);
        let pitch = |groups: usize| (groups | 1) * GROUP;
        let [own_channels, own_hidden] = [sizes.channels, sizes.hidden].map(own);
        // a recurrence has all of its products at once, what else there is takes turns
        let tiles = own_channels.div_ceil(TILE).max((80 / rows).min(16));
        let sums_bytes = tiles * WARPS * TILE * rows * size_of::<f32>();
        let activations = pitch(groups(sizes.channels * element));
        let stream = pitch(groups(sizes.hidden * element) * size_of::<f32>() / element);
        let x_bytes = rows * activations.max(stream);
        let per_word = size_of::<u32>() / element;
        let selected_words = sizes.selected().div_ceil(per_word).next_multiple_of(2);
        let selected = (selected_words * size_of::<u32>()).div_ceil(GROUP);
        let rooms = [
            phases * 16,
            WARPS * x_bytes,
            2 * sums_bytes,
            rows * own_hidden * size_of::<f32>(),
            rows * own_channels * size_of::<f32>(),
            rows * own_channels * size_of::<f32>(),
            rows * pitch(selected + selected / WARPS),
        ];
        let rest: usize = rooms.iter().map(|bytes| bytes.next_multiple_of(16)).sum();
        let ring_slots = memory.checked_sub(rest + FIXED)? / (WARPS * SLOT);
        let ring_slots = ring_slots.min(MOST_SLOTS);
        let bytes = rest + ring_slots * WARPS * SLOT;
        let layout = Self { own_channels, own_hidden, sums_bytes, x_bytes, ring_slots, bytes };
        (ring_slots >= LEAST_SLOTS).then_some(layout)
    }
}

/// The shapes of a layer's projections and of the head, in the order of their use. Turns have blocks with more of one
/// phase have less of the next.
pub(super) fn shapes(sizes: &Sizes, element: usize, blocks: usize) -> [Shape; 5] {
    let shape = |inputs: usize, outputs: usize, segments: usize, turn: usize| Shape {
        row_bytes: (inputs * element) as i32,
        outputs: outputs as i32,
        segments: segments as i32,
        turn: turn as i32,
    };
    let extra = sizes.channels.div_ceil(GRAIN) % blocks;
    [
        shape(sizes.hidden, sizes.channels, 2, 0),
        shape(sizes.channels, sizes.selected(), 1, blocks / 3),
        shape(sizes.padded_rank(element), sizes.channels, 1, 0),
        shape(sizes.channels, sizes.hidden, 1, extra),
        shape(sizes.hidden, sizes.vocabulary, 1, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(hidden: usize) -> Sizes {
        Sizes {
            hidden,
            channels: 2 * hidden,
            states: 16,
            filter: 4,
            rank: hidden / 16,
            vocabulary: 50280,
            inner_eps: None,
            wide: true,
            embedding_scale: 1.0,
        }
    }

    #[test]
    fn an_h100_has_room_for_the_published_models() {
        let slots = |hidden, rows, element| {
            Layout::new(&sizes(hidden), element, 257, rows, 132, 227 << 10).map(|layout| layout.ring_slots)
        };
        assert_eq!(slots(768, 1, 2), Some(8));
        assert_eq!(slots(2560, 1, 2), Some(8));
        assert!(slots(2560, 8, 2) >= Some(3));
        // f32 activations of eight rows leave no room for weights
        assert_eq!(slots(2560, 8, 4), None);
        assert!(slots(2560, 4, 4).is_some());
    }

    #[test]
    fn small_models_fit_small_gpus() {
        let layout = Layout::new(&sizes(64), 4, 13, 8, 20, 99 << 10).unwrap();
        assert_eq!([layout.own_channels, layout.own_hidden], [8, 4]);
        assert!(layout.bytes + FIXED <= 99 << 10);
    }
}
