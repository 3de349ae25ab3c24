//! The operators: pure, differentiable functions on tensors, the same on every device.
//!
//! Each is a folder: `mod.rs` tells the math, shapes and checks, `reference.rs` is the paper's formula in plain tensor
//! operations (any dtype, any device, differentiable by candle itself), `cpu.rs` the fast path and `grad.rs` its
//! backward pass. Arguments are structs with named fields; sequences are `[B, L, D]` (batch, length, channels), states
//! are batch first.

pub mod activation;
pub mod attention;
pub mod causal_conv1d;
pub mod embedding;
mod form;
pub mod linear;
pub mod long_conv;
pub mod modal_conv;
pub mod norm;
pub mod retention;
pub mod rotary;
pub mod segments;
pub mod selective_scan;

pub use activation::{Activation, activate, gate, sigmoid, silu, silu_gate, softplus};
pub use attention::{Attention, attention};
pub use causal_conv1d::{CausalConv1d, causal_conv1d};
pub use embedding::embedding;
pub use form::Form;
pub use linear::linear;
pub use long_conv::{FilterCache, LongConv, LongConvState, StreamConv, long_conv, long_conv_with_state};
pub use modal_conv::{ModalConv, Poles, modal_conv};
pub use norm::{Norm, NormKind, add_norm, gated_norm, layer_norm, norm, rms_norm};
pub use retention::{Retention, RetentionPool, RetentionPoolConfig, retention};
pub use rotary::{Rotary, RotaryPair, RotaryStyle, rotary, rotary_pair};
pub use segments::Segments;
pub use selective_scan::{SelectiveScan, selective_scan};

use candle_core::DType;

/// The dtype that recurrences, states and reductions of a tensor of `dtype` run in: f64 for f64, else f32.
pub fn accumulation_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
