//! Training: loss, optimiser, schedule, gradient clipping, data, checkpoints.
//!
//! [`Trainer`] puts the pieces together: [`TextBatches`] cuts a text into [`Batch`]es, [`cross_entropy`] is the loss,
//! [`Gradients`] are summed and clipped, [`AdamW`] updates the parameters at the rate of a [`Schedule`], and a
//! checkpoint keeps all of it. Each works without the others, with any set of candle variables.

mod checkpoint;
#[cfg(feature = "cuda")]
mod cuda;
mod data;
mod exact;
mod gradients;
mod kernels;
mod loss;
mod optimizer;
mod parameter;
mod schedule;
mod trainer;

pub use checkpoint::latest_checkpoint;
pub use data::{Order, Position, TextBatches};
pub use gradients::Gradients;
pub use loss::{CrossEntropy, IGNORE, cross_entropy};
pub use optimizer::{AdamW, AdamWConfig, Group};
pub use schedule::Schedule;
pub use trainer::{Batch, StepReport, Trainer, TrainerConfig};
