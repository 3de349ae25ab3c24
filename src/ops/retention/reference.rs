//! The recurrence, token by token.

use super::{Retention, Segments, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// [`retention`](super::retention) as the formula reads, in tensor operations: any device, differentiable by candle,
/// slow.
pub fn retention_reference(args: &Retention) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    let (b, t, h) = (sizes.batch, sizes.length, sizes.heads);
    let dtype = accumulation_dtype(args.q.dtype());
    let cast = |x: &Tensor| x.to_dtype(dtype);
    let device = args.q.device();
    // one token of one row, spread over the heads: [H, width]
    let token = |x: &Tensor, row: usize, t: usize| -> Result<Tensor> {
        let x = cast(&x.narrow(0, row, 1)?.narrow(1, t, 1)?.squeeze(0)?.squeeze(0)?)?;
        let (groups, width) = x.dims2()?;
        Ok(x.unsqueeze(1)?.broadcast_as((groups, h / groups, width))?.reshape((h, width))?)
    };
    let segments = Segments::or_whole(args.segments, b, t);
    let none = Tensor::zeros((h, sizes.key, sizes.value), dtype, device)?;
    let (mut rows, mut states) = (vec![], vec![]);
    for row in 0..b {
        let mut s = args.initial_state.map_or(Ok(none.clone()), |s| cast(&s.get(row)?))?;
        let mut o = vec![Tensor::zeros((h, sizes.value), dtype, device)?; t];
        for run in segments.row(row) {
            if run.fresh {
                s = none.clone();
            }
            for t in run.tokens.clone() {
                let (q, k, v) = (token(args.q, row, t)?, token(args.k, row, t)?, token(args.v, row, t)?);
                let log = match args.log_decay.rank() {
                    1 => args.log_decay.clone(),
                    _ => args.log_decay.get(row)?.get(t)?,
                };
                let decay = cast(&log)?.exp()?.reshape((h, 1, 1))?;
                let update = k.unsqueeze(2)?.broadcast_mul(&v.unsqueeze(1)?)?;
                s = (s.broadcast_mul(&decay)? + update)?;
                let read = q.unsqueeze(2)?.broadcast_mul(&s)?.sum(D::Minus2)?;
                o[t] = (read * args.scale)?;
            }
        }
        rows.push(if t == 0 {
            Tensor::zeros((0, h, sizes.value), dtype, device)?
        } else {
            Tensor::stack(&o, 0)?
        });
        states.push(s);
    }
    if b == 0 {
        let o = Tensor::zeros((0, t, h, sizes.value), args.q.dtype(), device)?;
        return Ok((o, Tensor::zeros((0, h, sizes.key, sizes.value), dtype, device)?));
    }
    Ok((Tensor::stack(&rows, 0)?.to_dtype(args.q.dtype())?, Tensor::stack(&states, 0)?))
}
