//! The arguments that the kernels of all families have, laid out as `kernels/common/decode_phases.cuh` and
//! `decode_stream.cuh` have them.

/// `struct Norm`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Norm {
    pub(super) weight: u64,
    pub(super) bias: u64,
    pub(super) layer: i32,
    pub(super) outside: i32,
    pub(super) eps: f32,
    pub(super) padding: i32,
}

/// `struct Phase`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Phase {
    pub(super) kind: i32,
    pub(super) layer: i32,
    pub(super) from: u64,
    pub(super) width: i32,
    pub(super) first: i32,
    pub(super) norm: Norm,
    pub(super) bias: u64,
}

/// `struct Shape`
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) row_bytes: i32,
    pub(super) outputs: i32,
    pub(super) segments: i32,
    pub(super) turn: i32,
    pub(super) form: i32,
    pub(super) padding: i32,
}

/// The form of a shape that is a matrix for every sequence, by its slot.
pub(super) const POOL: i32 = -1;

impl Shape {
    /// `segments` matrices `[outputs, inputs]` of elements of `element` bytes, the first block's share going to block `turn`.
    pub(super) fn new(element: usize, [segments, outputs, inputs]: [usize; 3], turn: usize) -> Self {
        Self {
            row_bytes: (inputs * element) as i32,
            outputs: outputs as i32,
            segments: segments as i32,
            turn: turn as i32,
            ..Self::default()
        }
    }

    /// All of its bytes.
    pub(super) fn bytes(&self) -> usize {
        self.row_bytes as usize * self.outputs as usize * self.segments as usize
    }
}

/// `struct Weights`
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Matrix {
    pub(super) data: u64,
    /// The shape in the lowest byte, above it the bytes from one segment to the next.
    pub(super) shape_apart: i64,
}

impl Matrix {
    pub(super) fn new(data: u64, next: u64, shape: usize) -> Self {
        let apart = if next == 0 { 0 } else { next.wrapping_sub(data) as i64 };
        Self { data, shape_apart: (apart << 8) | shape as i64 }
    }
}

/// `struct Step`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    pub(super) phases: u64,
    pub(super) weights: u64,
    pub(super) shapes: u64,
    pub(super) count: i32,
    pub(super) shape_count: i32,
    pub(super) rows: i32,
    pub(super) tokens: i32,
    pub(super) keep: i32,
    pub(super) hidden: i32,
    pub(super) vocabulary: i32,
    pub(super) wide: i32,
    pub(super) embedding_scale: f32,
    pub(super) ids: u64,
    pub(super) slots: u64,
    pub(super) embedding: u64,
    pub(super) logits: u64,
    pub(super) chosen: u64,
    pub(super) stream: u64,
    pub(super) best: u64,
    pub(super) apart: i32,
    pub(super) steps: i32,
    pub(super) epoch: u64,
    pub(super) stops: u64,
    pub(super) patience: i32,
    pub(super) own_hidden: i32,
    pub(super) sums_bytes: i32,
    pub(super) x_bytes: i32,
    pub(super) ring_slots: i32,
    pub(super) slot_groups: i32,
}
