//! Operators with any number of inputs and outputs, on the running tape or in candle's graph.

use super::graph::{self, Gradients};
use super::tape;
use candle_core::{Result, Shape, Storage, Tensor};

/// Puts an operator into candle's graph.
///
/// * `inputs`: every tensor the operator can be differentiated in. `backward` returns as many gradients, each of the
///   shape and dtype of its input, or `None` for zero.
/// * `outputs`: the results, already computed. `backward` gets as many gradients, `None` where an output was not used.
///
/// With no tracked input the outputs come back as plain tensors and `backward` is dropped.
pub(crate) fn record<const N: usize>(
    name: &'static str,
    inputs: &[&Tensor],
    outputs: [(Storage, Shape); N],
    backward: impl Fn([Option<&Tensor>; N]) -> Result<Gradients> + Send + Sync + 'static,
) -> Result<[Tensor; N]> {
    let outputs = record_all(name, inputs, outputs.into(), move |gradients| {
        backward(std::array::from_fn(|i| gradients.get(i)?.as_ref()))
    })?;
    let count = |outputs: Vec<Tensor>| candle_core::Error::msg(format!("{name}: {} outputs", outputs.len()));
    outputs.try_into().map_err(count)
}

/// [`record`] for a number of outputs that is not known beforehand.
pub(crate) fn record_all(
    name: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<(Storage, Shape)>,
    backward: impl Fn(&[Option<Tensor>]) -> Result<Gradients> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let tracked: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    if tracked.is_empty() {
        let plain = candle_core::op::BackpropOp::none;
        return Ok(outputs
            .into_iter()
            .map(|(storage, shape)| Tensor::from_storage(storage, shape, plain(), false))
            .collect());
    }
    if tape::is_running() {
        return Ok(tape::push(name, inputs, outputs, Box::new(backward)));
    }
    graph::connect(name, inputs, outputs, Box::new(backward))
}

/// The storage of an untracked tensor, for [`record`]: a copy.
pub(crate) fn storage_of(tensor: &Tensor) -> Result<(Storage, Shape)> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let whole = layout.start_offset() == 0;
    if whole {
        return Ok((storage.try_clone(layout)?, tensor.shape().clone()));
    }
    drop(storage);
    storage_of(&tensor.force_contiguous()?)
}
