//! How much of a block's shared memory each part of a step has.

use super::kernels::Shape;

/// Of `decode.cuh` and `decode_stream.cuh`.
pub(super) const WARPS: usize = 8;
const COPIERS: usize = 4;
const LANES: usize = 32;
pub(super) const TILE: usize = 8;
pub(super) const GROUP: usize = 64;
const MOST_GROUPS: usize = 10;
const MOST_SLOTS: usize = 16;
pub(super) const GRAIN: usize = 2;
/// Threads of a block.
pub(super) const THREADS: usize = (WARPS + COPIERS) * LANES;
/// Shared memory that the kernel has beside what is asked for at its launch.
const FIXED: usize = 5 << 10;
/// Slots with which weights come ahead of their phases.
const LEAST_SLOTS: usize = 2;

/// How rows of weights and outputs are shared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    /// Multiprocessors, which share the outputs.
    pub(super) blocks: usize,
    /// Groups of 64 bytes of a row that a slot of a warp's ring holds at most.
    pub(super) slot_groups: usize,
}

impl Split {
    /// Outputs of a block at most.
    pub(super) fn own(&self, outputs: usize) -> usize {
        GRAIN * outputs.div_ceil(GRAIN).div_ceil(self.blocks)
    }

    /// Groups of a row of so many bytes in a slot.
    fn size(&self, bytes: usize) -> usize {
        let groups = bytes.div_ceil(GROUP).div_ceil(WARPS);
        groups.div_ceil(groups.div_ceil(self.slot_groups))
    }

    /// Groups of a row of so many bytes for each warp.
    fn groups(&self, bytes: usize) -> usize {
        let groups = bytes.div_ceil(GROUP).div_ceil(WARPS);
        groups.div_ceil(self.slot_groups) * self.size(bytes)
    }

    /// Bytes of a row for each warp.
    pub(super) fn part(&self, bytes: usize) -> usize {
        self.groups(bytes) * GROUP
    }

    /// Bytes between a warp's parts of two rows.
    pub(super) fn pitch(&self, bytes: usize) -> usize {
        pitch(self.groups(bytes))
    }

    fn slot(&self) -> usize {
        TILE * pitch(self.slot_groups)
    }
}

/// Bytes between rows of so many groups.
pub(super) fn pitch(groups: usize) -> usize {
    (groups | 1) * GROUP
}

/// What rows of a family's blocks need of shared memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Needs {
    /// Channels of a block, of which there are two numbers for every row.
    pub(super) own: usize,
    /// Tiles whose products are all there at once.
    pub(super) tiles: usize,
    /// Of the activations of a row, bytes of a warp.
    pub(super) x: usize,
    /// Heads of a warp's part.
    pub(super) heads: usize,
    /// What else there is, in bytes.
    pub(super) rooms: Vec<usize>,
    /// The least bytes of a slot.
    pub(super) slot: usize,
}

/// A multiprocessor's share of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) own: usize,
    pub(super) own_hidden: usize,
    pub(super) heads: usize,
    /// Of the products' sums, once, and of a warp's activations.
    pub(super) sums_bytes: usize,
    pub(super) x_bytes: usize,
    pub(super) ring_slots: usize,
    pub(super) slot_groups: usize,
    /// In all.
    pub(super) bytes: usize,
}

/// What layouts are made for: a residual stream, elements of so many bytes, a program of so many phases with these shapes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan<'a> {
    pub(super) hidden: usize,
    pub(super) element: usize,
    pub(super) phases: usize,
    pub(super) shapes: &'a [Shape],
    pub(super) blocks: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub(super) memory: usize,
}

impl Layout {
    /// For so many rows; the slots are those that let most bytes of weights be on their way. None if there is not enough
    /// memory.
    pub(super) fn new(plan: &Plan, rows: usize, needs: impl Fn(&Split) -> Needs) -> Option<Self> {
        let layouts = (1..=MOST_GROUPS).filter_map(|slot_groups| {
            let split = Split { blocks: plan.blocks, slot_groups };
            let layout = Self::with(plan, rows, &split, &needs(&split))?;
            let ahead =
                |shape: &Shape| shape.bytes() * layout.ring_slots * split.size(shape.row_bytes as usize);
            Some((plan.shapes.iter().map(ahead).sum::<usize>(), layout))
        });
        layouts.max_by_key(|(ahead, _)| *ahead).map(|(_, layout)| layout)
    }

    fn with(plan: &Plan, rows: usize, split: &Split, needs: &Needs) -> Option<Self> {
        let own_hidden = split.own(plan.hidden);
        let tiles = needs.tiles.max((80 / rows).min(16));
        let sums_bytes = tiles * WARPS * TILE * rows * size_of::<f32>();
        let stream = split.groups(plan.hidden * plan.element) * size_of::<f32>() / plan.element;
        let x_bytes = (rows * needs.x.max(pitch(stream))).next_multiple_of(16);
        let mut rooms =
            vec![plan.phases * 16, WARPS * x_bytes, 2 * sums_bytes, rows * own_hidden * size_of::<f32>()];
        rooms.extend([rows * needs.own * size_of::<f32>(); 2]);
        rooms.extend(&needs.rooms);
        let rest: usize = rooms.iter().map(|bytes| bytes.next_multiple_of(16)).sum();
        let ring_slots = (plan.memory.checked_sub(rest + FIXED)? / (WARPS * split.slot())).min(MOST_SLOTS);
        let layout = Self {
            own: needs.own,
            own_hidden,
            heads: needs.heads,
            sums_bytes,
            x_bytes,
            ring_slots,
            slot_groups: split.slot_groups,
            bytes: rest + ring_slots * WARPS * split.slot(),
        };
        (ring_slots >= LEAST_SLOTS && needs.slot <= split.slot()).then_some(layout)
    }
}
