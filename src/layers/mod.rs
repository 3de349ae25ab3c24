//! Layers: parameters and the operators they go through.
//!
//! A layer is a config, a struct of tensors and plain methods. `new` reads the parameters from a candle `VarBuilder`
//! under the names of the published checkpoints; `init` draws the published initialisation and returns it by name, so
//! that it fits candle's `VarMap` as well as [`LanguageModel`](crate::models::LanguageModel). Sequences are `[B, L, D]`.
//!
//! Every mixer follows the streaming law: how a sequence is cut into calls, packed with others or padded does not
//! change its outputs, its final state or its gradients.

mod gated_mlp;
pub mod mamba;
mod norm;
pub(crate) mod parameter;

pub use gated_mlp::{GatedMlp, GatedMlpConfig};
pub use mamba::{Mamba, MambaConfig, MambaState};
pub use norm::{LayerNorm, NormConfig, NormLayer, RmsNorm};
pub use parameter::Parameter;
