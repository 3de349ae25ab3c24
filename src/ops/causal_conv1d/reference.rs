//! The formula, token by token.

use super::{CausalConv1d, Segments, Sizes, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// [`causal_conv1d`](super::causal_conv1d) as the formula reads, in tensor operations: any device, differentiable by
/// candle, slow.
pub fn causal_conv1d_reference(args: &CausalConv1d) -> Result<(Tensor, Tensor)> {
    let Sizes { batch: b, length: l, channels: d, taps: k } = args.check()?;
    let dtype = accumulation_dtype(args.x.dtype());
    let x = args.x.to_dtype(dtype)?;
    let weight = args.weight.to_dtype(dtype)?.reshape((d, k))?;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, dtype, x.device());
    let segments = Segments::or_whole(args.segments, b, l);
    let (mut ys, mut states) = (vec![], vec![]);
    for row in 0..b {
        let none = zeros(&[1, d, k - 1])?;
        let mut state = match args.initial_state {
            Some(state) => state.narrow(0, row, 1)?.to_dtype(dtype)?,
            None => none.clone(),
        };
        let mut y = vec![zeros(&[1, 1, d])?; l];
        for run in segments.row(row) {
            if run.fresh {
                state = none.clone();
            }
            for t in run.tokens.clone() {
                let now = x.narrow(0, row, 1)?.narrow(1, t, 1)?.transpose(1, 2)?;
                let window = Tensor::cat(&[&state, &now], 2)?;
                let mut sum = window.broadcast_mul(&weight)?.sum(D::Minus1)?;
                if let Some(bias) = args.bias {
                    sum = sum.broadcast_add(&bias.to_dtype(dtype)?)?;
                }
                y[t] = (if args.silu { sum.silu()? } else { sum }).unsqueeze(1)?;
                state = window.narrow(2, 1, k - 1)?;
            }
        }
        ys.push(if l == 0 { zeros(&[1, 0, d])? } else { Tensor::cat(&y, 1)? });
        states.push(state);
    }
    Ok((Tensor::cat(&ys, 0)?.to_dtype(args.x.dtype())?, Tensor::cat(&states, 0)?))
}
