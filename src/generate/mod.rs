//! Text generation: from a prompt's tokens to the ones that follow.
//!
//! [`GenerationConfig`] says what is wanted, [`Sampler`] draws a token from logits, [`Generation`] streams the tokens
//! of a batch, [`generate`] collects them.
//!
//! The model may be a trainable one: what generates is its [frozen](crate::models::LanguageModel::frozen) form.

mod candidates;
mod config;
mod sampler;
mod stream;

pub use config::GenerationConfig;
pub use sampler::Sampler;
pub(crate) use sampler::argmax;
pub use stream::{Finish, Generation, Token, generate};
