//! The formula in tensor operations.

use super::{Rotary, RotaryStyle};
use crate::Result;
use crate::ops::accumulation_dtype;
use candle_core::{D, Tensor};

/// [`rotary`](super::rotary) in tensor operations: any device, differentiable by candle.
pub fn rotary_reference(args: &Rotary) -> Result<Tensor> {
    args.check()?;
    let (batch, length, heads, width) = args.x.dims4()?;
    let pairs = args.frequencies.len();
    if pairs == 0 || args.x.elem_count() == 0 {
        return Ok(args.x.clone());
    }
    let wide = accumulation_dtype(args.x.dtype());
    let rows = if args.positions.len() == length { 1 } else { batch };
    let (cos, sin) = args.table();
    let table = |values: Vec<f64>| {
        Tensor::from_vec(values, (rows, length, 1, pairs), &candle_core::Device::Cpu)?
            .to_dtype(wide)?
            .to_device(args.x.device())
    };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let x = args.x.to_dtype(wide)?;
    let turned = x.narrow(D::Minus1, 0, 2 * pairs)?;
    let (a, b) = match args.style {
        RotaryStyle::Half => (turned.narrow(3, 0, pairs)?, turned.narrow(3, pairs, pairs)?),
        RotaryStyle::Interleaved => {
            let both = turned.contiguous()?.reshape((batch, length, heads, pairs, 2))?;
            (both.narrow(4, 0, 1)?.squeeze(4)?, both.narrow(4, 1, 1)?.squeeze(4)?)
        }
    };
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    let turned = match args.style {
        RotaryStyle::Half => Tensor::cat(&[first, second], 3)?,
        RotaryStyle::Interleaved => {
            Tensor::stack(&[first, second], 4)?.reshape((batch, length, heads, 2 * pairs))?
        }
    };
    let rest = x.narrow(D::Minus1, 2 * pairs, width - 2 * pairs)?;
    let y = if 2 * pairs == width { turned } else { Tensor::cat(&[turned, rest], 3)? };
    Ok(y.to_dtype(args.x.dtype())?)
}
