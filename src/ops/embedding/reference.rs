//! The formula in tensor operations.

use crate::Result;
use candle_core::Tensor;

/// [`embedding`](super::embedding()) in tensor operations: any device, differentiable by candle, whose sums are of the
/// weight's dtype.
pub fn embedding_reference(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    super::check(weight, ids)?;
    rows(weight, ids)
}

/// The same of ids that were checked: asking a device for them again would wait for it.
pub(crate) fn rows(weight: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(weight.dim(1)?);
    Ok(weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)?)
}
