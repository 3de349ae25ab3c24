//! The formula in tensor operations.

use super::{Sizes, accumulation_dtype};
use crate::Result;
use candle_core::Tensor;

/// [`linear`](super::linear) in tensor operations: any device, differentiable by candle.
pub fn linear_reference(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Sizes { rows, inputs, outputs } = super::check(x, weight, bias)?;
    let wide = if x.device().is_cpu() { accumulation_dtype(x.dtype()) } else { x.dtype() };
    let mut y = x.reshape((rows, inputs))?.to_dtype(wide)?.matmul(&weight.to_dtype(wide)?.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(&bias.to_dtype(wide)?)?;
    }
    Ok(y.to_dtype(x.dtype())?.reshape(super::output_shape(x, outputs))?)
}
