//! The formula in tensor operations.

use super::{Norm, NormInput, NormKind, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// Any norm as the formula reads, in tensor operations: any device, differentiable by candle, slow.
///
/// Returns the norm and, with a residual, the sum.
pub fn norm_reference(input: &NormInput, norm: &Norm) -> Result<(Tensor, Option<Tensor>)> {
    let group = input.check("norm", norm)?;
    let (x, dtype) = (input.x, input.x.dtype());
    let wide = accumulation_dtype(dtype);
    let sum = match input.residual {
        Some(residual) => Some((residual.to_dtype(wide)? + x.to_dtype(wide)?)?.to_dtype(residual.dtype())?),
        None => None,
    };
    let mut s = sum.as_ref().unwrap_or(x).to_dtype(wide)?;
    let gate = match input.z {
        Some(z) => Some(z.to_dtype(wide)?.silu()?),
        None => None,
    };
    if let (Some(gate), false) = (&gate, input.norm_before_gate) {
        s = (s * gate)?;
    }

    let mut groups = x.dims().to_vec();
    let channels = groups.pop().unwrap_or(group);
    groups.extend([channels / group, group]);
    s = s.reshape(groups)?;
    if norm.kind == NormKind::Layer {
        s = s.broadcast_sub(&s.mean_keepdim(D::Minus1)?)?;
    }
    let square = s.sqr()?.mean_keepdim(D::Minus1)?;
    let scale = match norm.kind {
        NormKind::RmsOutside => (square.sqrt()? + norm.eps)?,
        NormKind::Rms | NormKind::Layer => (square + norm.eps)?.sqrt()?,
    };
    let mut y = s.broadcast_div(&scale)?.reshape(x.dims())?;

    if norm.kind != NormKind::Layer && gate.is_none() {
        y = y.to_dtype(dtype)?.to_dtype(wide)?;
    }
    if let Some(weight) = norm.weight {
        y = y.broadcast_mul(&weight.to_dtype(wide)?)?;
    }
    if let Some(bias) = norm.bias {
        y = y.broadcast_add(&bias.to_dtype(wide)?)?;
    }
    if let (Some(gate), true) = (&gate, input.norm_before_gate) {
        y = (y * gate)?;
    }
    Ok((y.to_dtype(dtype)?, sum))
}
