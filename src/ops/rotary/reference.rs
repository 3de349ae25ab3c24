//! The formula in tensor operations.

use super::{Rotary, RotaryStyle};
use crate::Result;
use crate::ops::accumulation_dtype;
use candle_core::{D, Tensor};

/// [`rotary`](super::rotary) in tensor operations: any device, differentiable by candle.
pub fn rotary_reference(args: &Rotary) -> Result<Tensor> {
    let positions = args.check()?;
    composed(args, &positions)
}

pub(super) fn composed(args: &Rotary, positions: &[i64]) -> Result<Tensor> {
    let (b, l, h, k) = args.x.dims4()?;
    let pairs = args.inverse_frequencies.len();
    let wide = accumulation_dtype(args.x.dtype());
    if pairs == 0 {
        return Ok(args.x.clone());
    }
    let sign = if args.inverse { -1.0 } else { 1.0 };
    let table = |of: fn(f64) -> f64| -> Result<Tensor> {
        let of_token = |&p: &i64| args.inverse_frequencies.iter().map(move |f| of(sign * p as f64 * f));
        let values: Vec<f64> = positions.iter().flat_map(of_token).collect();
        Ok(Tensor::from_vec(values, (b, l, 1, pairs), &candle_core::Device::Cpu)?
            .to_dtype(wide)?
            .to_device(args.x.device())?)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let x = args.x.narrow(D::Minus1, 0, 2 * pairs)?.to_dtype(wide)?;
    // each of the two [B, L, H, R / 2]
    let (x1, x2) = match args.style {
        RotaryStyle::Half => (x.narrow(D::Minus1, 0, pairs)?, x.narrow(D::Minus1, pairs, pairs)?),
        RotaryStyle::Interleaved => {
            let x = x.reshape((b, l, h, pairs, 2))?;
            (x.narrow(D::Minus1, 0, 1)?.squeeze(4)?, x.narrow(D::Minus1, 1, 1)?.squeeze(4)?)
        }
    };
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    let y = match args.style {
        RotaryStyle::Half => Tensor::cat(&[y1, y2], D::Minus1)?,
        RotaryStyle::Interleaved => Tensor::stack(&[y1, y2], 4)?.reshape((b, l, h, 2 * pairs))?,
    };
    let y = y.to_dtype(args.x.dtype())?;
    if 2 * pairs == k {
        return Ok(y);
    }
    Ok(Tensor::cat(&[y, args.x.narrow(D::Minus1, 2 * pairs, k - 2 * pairs)?], D::Minus1)?)
}
