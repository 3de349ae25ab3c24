//! Layers: parameters and the operators they go through.
//!
//! A layer is a config, a struct of tensors and plain methods. `new` reads the parameters from a candle `VarBuilder`
//! under the names of the published checkpoints; `init` draws the published initialisation and returns it by name, so
//! that it fits candle's `VarMap` as well as [`LanguageModel`](crate::models::LanguageModel). Sequences are `[B, L, D]`.
//!
//! Every mixer follows the streaming law: how a sequence is cut into calls, packed with others or padded does not
//! change its outputs, its final state or its gradients.

pub mod attention;
pub mod hyena;
mod linear;
pub mod mamba;
mod mlp;
pub mod modal_hyena;
mod norm;
pub(crate) mod parameter;
pub mod retention;
pub(crate) mod state;

pub use attention::{Attention, AttentionConfig, AttentionState};
pub use hyena::{Hyena, HyenaConfig, HyenaState};
pub use mamba::{Mamba, MambaConfig, MambaState};
pub use mlp::{Mlp, MlpConfig, MlpGate};
pub use modal_hyena::{ModalHyena, ModalHyenaConfig, ModalHyenaState};
pub use norm::{LayerNorm, NormConfig, NormLayer, RmsNorm};
pub use parameter::Parameter;
pub use retention::{MultiScaleRetention, RetentionConfig, RetentionState};
pub use state::LayerState;

pub(crate) use linear::Linear;
