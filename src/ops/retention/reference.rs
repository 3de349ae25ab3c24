//! The recurrence, token by token.

use super::{Retention, Segments, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// [`retention`](super::retention) as the formula reads, in tensor operations: any device, differentiable by candle, slow.
pub fn retention_reference(args: &Retention) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    let (b, l, h) = (sizes.batch, sizes.length, sizes.heads);
    let (dtype, device) = (accumulation_dtype(args.q.dtype()), args.q.device());
    // one token of a row, spread over the heads: [H, width]
    let token = |x: &Tensor, row: usize, t: usize| -> Result<Tensor> {
        let (_, _, groups, width) = x.dims4()?;
        let x = x.narrow(0, row, 1)?.narrow(1, t, 1)?.reshape((groups, 1, width))?.to_dtype(dtype)?;
        Ok(x.broadcast_as((groups, h / groups, width))?.reshape((h, width))?)
    };
    let segments = Segments::or_whole(args.segments, b, l);
    let none = Tensor::zeros((h, sizes.keys, sizes.values), dtype, device)?;
    let decays = args.log_decay.to_dtype(dtype)?.exp()?;
    let (mut outputs, mut states) = (vec![], vec![]);
    for row in 0..b {
        let initial = args.initial_state.map(|state| state.narrow(0, row, 1)?.squeeze(0)?.to_dtype(dtype));
        let mut state = initial.transpose()?.unwrap_or_else(|| none.clone());
        let mut output = vec![Tensor::zeros((1, h, sizes.values), dtype, device)?; l];
        for run in segments.row(row) {
            if run.fresh {
                state = none.clone();
            }
            for t in run.tokens.clone() {
                let decay = match sizes.per_token {
                    true => decays.narrow(0, row, 1)?.narrow(1, t, 1)?.reshape((h, 1, 1))?,
                    false => decays.reshape((h, 1, 1))?,
                };
                let (q, k, v) = (token(args.q, row, t)?, token(args.k, row, t)?, token(args.v, row, t)?);
                let input = k.unsqueeze(D::Minus1)?.matmul(&v.unsqueeze(1)?)?;
                state = (state.broadcast_mul(&decay)? + input)?;
                output[t] = (q.unsqueeze(1)?.matmul(&state)?.reshape((1, h, sizes.values))? * args.scale)?;
            }
        }
        outputs.push(if l == 0 {
            Tensor::zeros((0, h, sizes.values), dtype, device)?
        } else {
            Tensor::cat(&output, 0)?
        });
        states.push(state);
    }
    if b == 0 {
        let state = Tensor::zeros((0, h, sizes.keys, sizes.values), dtype, device)?;
        return Ok((Tensor::zeros((0, l, h, sizes.values), args.q.dtype(), device)?, state));
    }
    Ok((Tensor::stack(&outputs, 0)?.to_dtype(args.q.dtype())?, Tensor::stack(&states, 0)?))
}
