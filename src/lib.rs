#![doc = include_str!("../README.md")]
//! # Where to start
//!
//! - [`models::load`] and [`generate`](mod@generate): a published checkpoint, and text from it.
//! - [`models::LanguageModel::init`] and [`train`]: a model of one's own.
//! - [`layers`]: the mixers as parts of another candle model.
//! - [`ops`]: the functions they are made of.
//! - [`autograd`]: a backward pass that deep stacks do not overflow, and recomputation of activations.
//!
//! # Shapes, dtypes, states
//!
//! Sequences are `[B, L, D]`: batch, length, channels; token ids `[B, L]`, logits `[B, L, V]`. States come batch first
//! and are f32 (f64 for f64 models) whatever the dtype of the weights; decays, norms' statistics and reductions are
//! computed in the same. Losses are natural logarithms. Nothing is normalised over the batch or the length, so a row's
//! numbers do not depend on its neighbours.
//!
//! # The streaming law
//!
//! With `f(x, s)` the output and the final state of a mixer, its gradients included:
//!
//! | what is done | what it equals |
//! |---|---|
//! | `f(x, s)` on all of `x` | any split: `f(x₂, s₁)` after `s₁` from `f(x₁, s)` |
//! | | single steps, `L` calls of one token |
//! | rows packed into one, with resets ([`ops::Segments::packed`]) | each row alone, from a fresh state |
//! | rows padded left or right ([`ops::Segments::left_padded`]) | each row alone; padding touches neither state nor gradient |
//! | a state saved, loaded and gone on from | the state itself |
//!
//! Equal means up to the rounding of the dtype; the number of threads changes no bit.

pub mod autograd;
mod backend;
mod error;
pub mod generate;
pub mod layers;
pub mod models;
pub mod ops;
pub mod train;

pub use backend::cpu::memory::reuse_memory;
pub use backend::peak_bytes;
pub use error::{Error, Result};
