//! Projections, gates and mixing of heads.

use super::config::HyenaConfig;
use crate::Result;
use crate::ops::linear;
use candle_core::{D, Tensor};

/// Part `i` of the projections, `[B, L, D]`: of every head the `i`th of its `N + 1`.
pub(super) fn part(config: &HyenaConfig, p: &Tensor, i: usize) -> Result<Tensor> {
    let (d, heads) = (config.d_model, config.heads);
    if heads == 1 {
        return Ok(p.narrow(D::Minus1, i * d, d)?);
    }
    let (batch, length, _) = p.dims3()?;
    let by_head = p.reshape((batch, length, heads, config.order + 1, config.head()))?;
    Ok(by_head.narrow(3, i, 1)?.reshape((batch, length, d))?)
}

/// A gate as it is multiplied: with outer mixing, the sum over the channels of its head in the place of each.
pub(super) fn gate(config: &HyenaConfig, gate: Tensor) -> Result<Tensor> {
    if !config.outer_mixing {
        return Ok(gate);
    }
    let (batch, length, d) = gate.dims3()?;
    let sizes = (batch, length, config.heads, config.head());
    let summed = gate.reshape(sizes)?.sum_keepdim(D::Minus1)?.broadcast_as(sizes)?;
    Ok(summed.contiguous()?.reshape((batch, length, d))?)
}

/// Heads mixed by `weight` `[H, H]`, from rows to columns: `[B, L, D]`.
pub(super) fn mix(v: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((batch, length, d), heads) = (v.dims3()?, weight.dim(0)?);
    let by_channel = v.reshape((batch, length, heads, d / heads))?.transpose(2, 3)?.contiguous()?;
    let mixed = linear(&by_channel, &weight.t()?.contiguous()?, None)?;
    Ok(mixed.transpose(2, 3)?.contiguous()?.reshape((batch, length, d))?)
}
