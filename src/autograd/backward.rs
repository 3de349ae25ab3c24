//! The backward pass on a stack of its own.

use candle_core::{Error, Result, Tensor, TensorId, backprop::GradStore};
use std::thread;

/// The stack of the thread that goes backward: virtual memory, of which only what is used gets pages.
const STACK: usize = 1 << 30;

/// `loss.backward()` for graphs of any depth.
///
/// candle walks and drops its graph by recursion, which overflows a common stack after some 5,000 chained operations;
/// this runs it on a thread with a stack for millions, and drops the graph there too: all of it that `loss` alone
/// holds. The gradients come back detached, so that they hold no part of it either (candle's own do: the gradient of a
/// factor keeps the other factor's history).
///
/// On CUDA, candle gives every thread a stream of its own: the work of either thread is done before the other goes on.
pub fn backward(loss: Tensor) -> Result<GradStore> {
    let device = loss.device().clone();
    device.synchronize()?;
    let worker = move || {
        let mut gradients = loss.backward()?;
        let ids: Vec<TensorId> = gradients.get_ids().copied().collect();
        for id in ids {
            if let Some(gradient) = gradients.get_id(id).map(Tensor::detach) {
                gradients.insert_id(id, gradient);
            }
        }
        drop(loss);
        device.synchronize()?;
        Ok(gradients)
    };
    let thread = thread::Builder::new()
        .name("backward".into())
        .stack_size(STACK)
        .spawn(worker)
        .map_err(|e| Error::msg(format!("could not start a thread: {e}")))?;
    thread.join().map_err(|_| Error::msg("the backward pass panicked"))?
}
