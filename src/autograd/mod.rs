//! Custom gradients of any number of tensors, activation recomputation, and a backward pass for deep graphs.

mod backward;
mod checkpoint;
mod record;

pub use backward::backward;
pub use checkpoint::checkpoint;
pub(crate) use record::{Gradients, record, record_all, storage_of};
