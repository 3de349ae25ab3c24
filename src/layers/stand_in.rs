//! `x W^T + b` until the operator of this name is there.

use crate::Result;
use candle_core::Tensor;

pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (&width, outer) =
        x.dims().split_last().ok_or_else(|| crate::Error::shape("linear: x", "[.., D]", &[]))?;
    let rows = outer.iter().product::<usize>();
    let y = x.reshape((rows, width))?.matmul(&weight.t()?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    let mut shape = outer.to_vec();
    shape.push(weight.dim(0)?);
    Ok(y.reshape(shape)?)
}
