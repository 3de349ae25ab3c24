//! The formulas in tensor operations.

use super::{Activation, accumulation_dtype};
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

/// [`activate`](super::activate) in tensor operations: any device, differentiable by candle.
pub fn activate_reference(x: &Tensor, activation: Activation) -> Result<Tensor> {
    let s = x.to_dtype(accumulation_dtype(x.dtype()))?;
    let y = match activation {
        Activation::Silu => s.silu()?,
        // candle rounds a constant of its derivative; the one of erf is exact
        Activation::Gelu => ((&s * ((&s * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?)? * 0.5)?,
        Activation::GeluTanh => {
            let cube = (s.sqr()? * &s)?;
            let u = ((&s + (cube * 0.044_715)?)? * 0.797_884_560_802_865_4)?;
            ((&s * (u.tanh()? + 1.0)?)? * 0.5)?
        }
        Activation::Relu => s.relu()?,
        Activation::Identity => s,
    };
    Ok(y.to_dtype(x.dtype())?)
}

/// [`gate`](super::gate) in tensor operations: any device, differentiable by candle.
pub fn gate_reference(x: &Tensor, z: &Tensor, activation: Activation) -> Result<Tensor> {
    let wide = accumulation_dtype(x.dtype());
    Ok((x.to_dtype(wide)? * activate_reference(&z.to_dtype(wide)?, activation)?)?.to_dtype(x.dtype())?)
}
