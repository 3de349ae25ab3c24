//! The formulas in tensor operations.

use super::accumulation_dtype;
use crate::Result;
use candle_core::Tensor;

/// [`softplus`](super::softplus) in tensor operations: any device, differentiable by candle.
pub fn softplus_reference(x: &Tensor) -> Result<Tensor> {
    let s = x.to_dtype(accumulation_dtype(x.dtype()))?;
    // log1p(y) as y log(u) / (u - 1) with u = 1 + y: the rounding of u cancels
    let y = s.abs()?.neg()?.exp()?;
    let u = (&y + 1.0)?;
    let tiny = u.eq(1.0)?;
    let rounding = (&y / ((&u - 1.0)? + tiny.to_dtype(u.dtype())?)?)?.detach();
    let log = tiny.where_cond(&y, &(u.log()? * rounding)?)?;
    let positive = ((&s + s.abs()?)? * 0.5)?;
    Ok((positive + log)?.to_dtype(x.dtype())?)
}

/// [`sigmoid`](super::sigmoid) in tensor operations: any device, differentiable by candle.
pub fn sigmoid_reference(x: &Tensor) -> Result<Tensor> {
    let s = x.to_dtype(accumulation_dtype(x.dtype()))?;
    Ok((s.neg()?.exp()? + 1.0)?.recip()?.to_dtype(x.dtype())?)
}

/// [`silu`](super::silu) in tensor operations: any device, differentiable by candle.
pub fn silu_reference(x: &Tensor) -> Result<Tensor> {
    let s = x.to_dtype(accumulation_dtype(x.dtype()))?;
    Ok(s.silu()?.to_dtype(x.dtype())?)
}

/// [`silu_gate`](super::silu_gate) in tensor operations: any device, differentiable by candle.
pub fn silu_gate_reference(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    let wide = accumulation_dtype(x.dtype());
    Ok((x.to_dtype(wide)? * z.to_dtype(wide)?.silu()?)?.to_dtype(x.dtype())?)
}
