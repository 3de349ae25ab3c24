//! The arguments of the kernels, laid out as `kernels/common/decode_phases.cuh` and `decode_stream.cuh` have them.

/// What a phase does: `enum Kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Mix,
    Select,
    State,
    Add,
    Head,
}

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
    pub(super) padding: i32,
    pub(super) norm: Norm,
    pub(super) bias: u64,
    pub(super) taps: u64,
    pub(super) shift: u64,
    pub(super) window: u64,
    pub(super) a: u64,
    pub(super) d: u64,
    pub(super) dt_bias: u64,
    pub(super) inner: [u64; 3],
    pub(super) state: u64,
}

/// `struct Shape`
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) row_bytes: i32,
    pub(super) outputs: i32,
    pub(super) segments: i32,
    pub(super) turn: i32,
}

/// `struct Weights`
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Matrix {
    pub(super) data: u64,
    pub(super) shape: i32,
    pub(super) padding: i32,
}

/// `struct Draft`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Draft {
    pub(super) x: u64,
    pub(super) u: u64,
    pub(super) selected: u64,
    pub(super) delta: u64,
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
    pub(super) channels: i32,
    pub(super) states: i32,
    pub(super) rank: i32,
    pub(super) filter: i32,
    pub(super) vocabulary: i32,
    pub(super) wide: i32,
    pub(super) normed: i32,
    pub(super) embedding_scale: f32,
    pub(super) inner_eps: f32,
    pub(super) ids: u64,
    pub(super) slots: u64,
    pub(super) embedding: u64,
    pub(super) logits: u64,
    pub(super) chosen: u64,
    pub(super) stream: u64,
    pub(super) u: u64,
    pub(super) y: u64,
    pub(super) selected: u64,
    pub(super) best: u64,
    pub(super) epoch: u64,
    pub(super) drafts: u64,
    pub(super) own_channels: i32,
    pub(super) own_hidden: i32,
    pub(super) sums_bytes: i32,
    pub(super) x_bytes: i32,
    pub(super) ring_slots: i32,
}

/// `struct Accept` of `decode_accept.cu`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Accept {
    pub(super) phases: u64,
    pub(super) drafts: u64,
    pub(super) slots: u64,
    pub(super) counts: u64,
    pub(super) each: i32,
    pub(super) tokens: i32,
    pub(super) channels: i32,
    pub(super) states: i32,
    pub(super) rank: i32,
    pub(super) filter: i32,
}
