//! The recurrence, token by token.

use super::{Segments, SelectiveScan, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// [`selective_scan`](super::selective_scan) as the formula reads, in tensor operations: any device, differentiable by
/// candle, slow.
pub fn selective_scan_reference(args: &SelectiveScan) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    let (b, l, d, n) = (sizes.batch, sizes.length, sizes.channels, sizes.states);
    let dtype = accumulation_dtype(args.u.dtype());
    let cast = |x: &Tensor| x.to_dtype(dtype);
    let (u, a) = (cast(args.u)?, cast(args.a)?);
    let mut delta = cast(args.delta)?;
    if let Some(bias) = args.delta_bias {
        delta = delta.broadcast_add(&cast(bias)?)?;
    }
    if args.softplus {
        // max(x, 0) + log(1 + exp(-|x|))
        delta = (delta.relu()? + (delta.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    }
    // B or C of one token, spread over the channels: [1, D, N]
    let token = |x: &Tensor, groups: Option<usize>, row: usize, t: usize| match groups {
        None => cast(x)?.unsqueeze(0),
        Some(g) => cast(&x.narrow(0, row, 1)?.narrow(1, t, 1)?)?
            .reshape((1, g, 1, n))?
            .broadcast_as((1, g, d / g, n))?
            .reshape((1, d, n)),
    };
    let segments = Segments::or_whole(args.segments, b, l);
    let none = Tensor::zeros((1, d, n), dtype, u.device())?;
    let (mut ys, mut states) = (vec![], vec![]);
    for row in 0..b {
        let mut h = args.initial_state.map_or(Ok(none.clone()), |h| cast(&h.narrow(0, row, 1)?))?;
        let mut y = vec![Tensor::zeros((1, 1, d), dtype, u.device())?; l];
        for run in segments.row(row) {
            if run.fresh {
                h = none.clone();
            }
            for t in run.tokens.clone() {
                let at = |x: &Tensor| x.narrow(0, row, 1)?.narrow(1, t, 1)?.squeeze(1);
                let (u_t, delta_t) = (at(&u)?, at(&delta)?.unsqueeze(D::Minus1)?);
                let decay = delta_t.broadcast_mul(&a)?.exp()?;
                let input = (delta_t * u_t.unsqueeze(D::Minus1)?)?;
                h = ((decay * h)? + token(args.b, sizes.groups[0], row, t)?.broadcast_mul(&input)?)?;
                let mut y_t = (&h * token(args.c, sizes.groups[1], row, t)?)?.sum(D::Minus1)?;
                if let Some(skip) = args.d {
                    y_t = (y_t + u_t.broadcast_mul(&cast(skip)?)?)?;
                }
                if let Some(z) = args.z {
                    y_t = (y_t * cast(&at(z)?)?.silu()?)?;
                }
                y[t] = y_t.unsqueeze(1)?;
            }
        }
        ys.push(if l == 0 { Tensor::zeros((1, 0, d), dtype, u.device())? } else { Tensor::cat(&y, 1)? });
        states.push(h);
    }
    Ok((Tensor::cat(&ys, 0)?.to_dtype(args.u.dtype())?, Tensor::cat(&states, 0)?))
}
