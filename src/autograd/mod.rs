//! Custom gradients of any number of tensors, a tape for them, activation recomputation, and a backward pass for deep
//! graphs.

mod backward;
mod checkpoint;
mod graph;
mod record;
mod tape;

pub use backward::backward;
pub use checkpoint::checkpoint;
pub(crate) use graph::Gradients;
pub(crate) use record::{record, record_all, storage_of};
pub use tape::{value_and_grad, vjp};
