//! Subquadratic sequence-model layers on candle.

pub mod autograd;
mod backend;
mod error;
pub mod generate;
pub mod layers;
pub mod models;
pub mod ops;
pub mod train;

pub use error::{Error, Result};
