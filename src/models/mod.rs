//! One language model for every checkpoint family, with loading and saving.
//!
//! A [`LanguageModel`] is a stack of blocks (norm, mixer, residual sum, and where the family has one norm, MLP, residual
//! sum), built from one [`ModelConfig`]. [`load`] recognises a directory by its `config.json`; [`formats`] lists the
//! families. What a sequence leaves behind is a [`ModelState`].

mod block;
mod classify;
mod config;
mod decode;
mod distill;
pub mod formats;
mod forward;
mod language_model;
mod load;
mod mixer;
mod pattern;
mod save;
mod state;
pub(crate) mod weights;

pub use config::{BlockConfig, FeedForwardConfig, ModelConfig, Residual, SpecialTokens};
pub use decode::Decoder;
pub use distill::FilterErrors;
pub use formats::Family;
pub use language_model::LanguageModel;
pub use load::{LoadOptions, load, load_trainable, load_with, read_config};
pub use mixer::{MixerConfig, MixerState};
pub use state::ModelState;
pub use weights::write as write_safetensors;

pub use crate::layers::NormConfig;
pub use crate::ops::Form;
