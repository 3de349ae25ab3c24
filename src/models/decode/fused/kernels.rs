//! The arguments of the kernels, laid out as `decode_project.cu` and `decode_state.cu` have them.

/// `struct Project`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Project {
    pub(super) x: u64,
    pub(super) update: u64,
    pub(super) sum: u64,
    pub(super) norm: u64,
    pub(super) norm_bias: u64,
    pub(super) weight: u64,
    pub(super) bias: u64,
    pub(super) y: u64,
    pub(super) taps: u64,
    pub(super) shift: u64,
    pub(super) window: u64,
    pub(super) u: u64,
    pub(super) slots: u64,
    pub(super) rows: i32,
    pub(super) inputs: i32,
    pub(super) outputs: i32,
    pub(super) split: i32,
    pub(super) wide: i32,
    pub(super) layer: i32,
    pub(super) outside: i32,
    pub(super) eps: f32,
    pub(super) channels: i32,
    pub(super) filter: i32,
    pub(super) tokens: i32,
    pub(super) keep: i32,
}

/// `struct Embed`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Embed {
    pub(super) embedding: u64,
    pub(super) x: u64,
    pub(super) ids: u64,
    pub(super) width: i32,
    pub(super) wide: i32,
    pub(super) scale: f32,
}

/// `struct State`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct State {
    pub(super) u: u64,
    pub(super) z: u64,
    pub(super) z_step: i64,
    pub(super) selected: u64,
    pub(super) kept: u64,
    pub(super) dt: u64,
    pub(super) delta: u64,
    pub(super) a: u64,
    pub(super) d: u64,
    pub(super) bias: u64,
    pub(super) weights: [u64; 3],
    pub(super) state: u64,
    pub(super) y: u64,
    pub(super) slots: u64,
    pub(super) counts: u64,
    pub(super) rows: i32,
    pub(super) tokens: i32,
    pub(super) channels: i32,
    pub(super) states: i32,
    pub(super) rank: i32,
    pub(super) keep: i32,
    pub(super) normed: i32,
    pub(super) eps: f32,
}

/// `struct Filter`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filter {
    pub(super) x: u64,
    pub(super) x_step: i64,
    pub(super) taps: u64,
    pub(super) shift: u64,
    pub(super) window: u64,
    pub(super) u: u64,
    pub(super) slots: u64,
    pub(super) counts: u64,
    pub(super) tokens: i32,
    pub(super) channels: i32,
    pub(super) filter: i32,
    pub(super) keep: i32,
}

/// `struct Argmax`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Argmax {
    pub(super) logits: u64,
    pub(super) ids: u64,
    pub(super) size: i32,
}
