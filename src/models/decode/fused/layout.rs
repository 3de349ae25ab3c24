//! How much of a block's shared memory each part of a step has.

use super::kernels::Shape;

/// Of `decode.cuh` and `decode_stream.cuh`.
pub(super) const WARPS: usize = 8;
pub(super) const TILE: usize = 8;
pub(super) const GROUP: usize = 64;
const SLOT_GROUPS: std::ops::RangeInclusive<usize> = 2..=5;
const MOST_SLOTS: usize = 16;
pub(super) const GRAIN: usize = 2;
/// Shared memory that the kernel has beside what is asked for at its launch.
const FIXED: usize = 4 << 10;
/// How long words of activations are not asked for where weights keep the memory busy, by what an H200 has shown, ns.
const PATIENCE: usize = 250;
/// Slots with which weights come ahead of their phases.
const LEAST_SLOTS: usize = 2;

/// How rows of weights and outputs are shared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Split {
    /// Multiprocessors, which share the outputs.
    pub(super) blocks: usize,
    /// Groups of 64 bytes of a row that a slot of the ring holds for a warp at most.
    pub(super) slot_groups: usize,
}

impl Split {
    /// Outputs of a block at most.
    pub(super) fn own(&self, outputs: usize) -> usize {
        GRAIN * outputs.div_ceil(GRAIN).div_ceil(self.blocks)
    }

    /// Pieces that a row of so many bytes comes in.
    pub(super) fn pieces(&self, bytes: usize) -> usize {
        bytes.div_ceil(GROUP).div_ceil(WARPS).div_ceil(self.slot_groups)
    }

    /// Groups of a piece of it for each warp.
    fn size(&self, bytes: usize) -> usize {
        bytes.div_ceil(GROUP).div_ceil(WARPS).div_ceil(self.pieces(bytes))
    }

    /// Groups of the row for each warp.
    fn groups(&self, bytes: usize) -> usize {
        self.pieces(bytes) * self.size(bytes)
    }

    /// Bytes of a piece for each warp.
    pub(super) fn part(&self, bytes: usize) -> usize {
        self.size(bytes) * GROUP
    }

    /// Bytes between a warp's parts of two rows.
    pub(super) fn pitch(&self, bytes: usize) -> usize {
        pitch(self.groups(bytes))
    }

    /// Bytes of a slot that are a warp's where all have as many.
    fn own_slot(&self) -> usize {
        self.slot() / WARPS
    }

    fn slot(&self) -> usize {
        TILE * pitch(WARPS * self.slot_groups)
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
    /// The least bytes of a warp's part of a slot.
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
    /// How long words are not asked for, ns.
    pub(super) patience: usize,
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
    /// For so many rows, with the slots that suit the weights best. None if there is not enough memory.
    pub(super) fn new(plan: &Plan, rows: usize, needs: impl Fn(&Split) -> Needs) -> Option<Self> {
        let layouts = SLOT_GROUPS.filter_map(|slot_groups| {
            let split = Split { blocks: plan.blocks, slot_groups };
            let layout = Self::with(plan, rows, &split, &needs(&split))?;
            let worth: f64 =
                plan.shapes.iter().map(|shape| shape.bytes() as f64 * layout.worth(shape, &split)).sum();
            Some((worth, layout))
        });
        layouts.max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, layout)| layout)
    }

    /// How fast a shape's weights come, by what an H200 has shown: groups of a warp on their way, less that of the slot that
    /// is being read, and less where warps have unequal parts.
    fn worth(&self, shape: &Shape, split: &Split) -> f64 {
        let bytes = shape.row_bytes as usize;
        let ahead = (self.ring_slots - 1) * split.size(bytes);
        let whole = bytes.div_ceil(GROUP).div_ceil(WARPS) as f64 / split.groups(bytes) as f64;
        ahead as f64 * whole
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
        let ring_slots = (plan.memory.checked_sub(rest + FIXED)? / split.slot()).min(MOST_SLOTS);
        // whether a layer's weights are more than come ahead
        let layer: usize = plan.shapes.iter().rev().skip(1).map(Shape::bytes).sum();
        let busy = layer / plan.blocks > ring_slots * split.slot();
        let layout = Self {
            own: needs.own,
            own_hidden,
            heads: needs.heads,
            sums_bytes,
            x_bytes,
            ring_slots,
            slot_groups: split.slot_groups,
            patience: if busy { PATIENCE } else { 0 },
            bytes: rest + ring_slots * split.slot(),
        };
        (ring_slots >= LEAST_SLOTS && needs.slot <= split.own_slot()).then_some(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A layer of activations `[.., 2 hidden]` and a head.
    fn slots(
        hidden: usize,
        rows: usize,
        element: usize,
        blocks: usize,
        memory: usize,
    ) -> Option<(usize, usize)> {
        let shapes = [
            Shape::new(element, [2, 2 * hidden, hidden], 0),
            Shape::new(element, [1, hidden, 2 * hidden], 0),
            Shape::new(element, [1, 50280, hidden], 0),
        ];
        let plan = Plan { hidden, element, phases: 257, shapes: &shapes, blocks, memory };
        let layout = Layout::new(&plan, rows, |split| Needs {
            own: split.own(2 * hidden),
            tiles: split.own(2 * hidden).div_ceil(TILE),
            x: split.pitch(2 * hidden * element),
            ..Needs::default()
        })?;
        assert!(layout.bytes + FIXED <= memory);
        Some((layout.ring_slots, layout.slot_groups))
    }

    #[test]
    fn an_h100_has_room_for_the_published_models() {
        let slots = |hidden, rows, element| slots(hidden, rows, element, 132, 227 << 10);
        // parts of equal length, in as many slots as can be
        assert_eq!(slots(768, 1, 2), Some((16, 3)));
        assert_eq!(slots(2048, 1, 2), Some((12, 4)));
        assert_eq!(slots(2560, 1, 2), Some((9, 5)));
        assert!(slots(2560, 8, 2).is_some());
        // f32 activations of eight rows leave no room for weights
        assert_eq!(slots(2560, 8, 4), None);
        assert!(slots(2560, 4, 4).is_some());
    }

    #[test]
    fn small_models_fit_small_gpus() {
        assert!(slots(64, 8, 4, 20, 99 << 10).is_some());
    }
}
