//! The chunkwise form in tensor operations, for devices without a kernel of ours.

use super::{Form, Retention, Segments, Sizes, accumulation_dtype};
use crate::Result;
use crate::ops::segments::{CONTINUE, PAD, START};
use candle_core::{D, DType, Tensor};

/// Tokens of a chunk where none are asked for.
const CHUNK: usize = 64;
/// A decay below e to this is zero in every dtype.
const FORGET: f64 = -1e3;

/// [`retention`](super::retention) in chunks of tensor operations: any device, differentiable by candle.
pub fn retention_composed(args: &Retention) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    let (b, t, h) = (sizes.batch, sizes.length, sizes.heads);
    let dtype = accumulation_dtype(args.q.dtype());
    let device = args.q.device();
    let mut state = match args.initial_state {
        Some(state) => state.to_dtype(dtype)?,
        None => Tensor::zeros((b, h, sizes.key, sizes.value), dtype, device)?,
    };
    if b == 0 || t == 0 {
        return Ok((Tensor::zeros((b, t, h, sizes.value), args.q.dtype(), device)?, state));
    }
    let chunk = match args.form {
        Form::Auto => CHUNK,
        Form::Parallel => t,
        Form::Chunkwise { chunk } => chunk,
        Form::Recurrent => 1,
    };
    let [q, k, v] = [args.q, args.k, args.v].map(|x| heads_first(x, &sizes, dtype));
    let (q, k, v) = (q?, k?, v?);
    let (log, starts) = decays(args, &sizes, dtype)?;
    let kept = keep(args.segments, &sizes, dtype, device)?;
    let k = match &kept {
        Some(kept) => k.broadcast_mul(kept)?,
        None => k,
    };
    let mut parts = vec![];
    for start in (0..t).step_by(chunk) {
        let n = chunk.min(t - start);
        let at = |x: &Tensor| x.narrow(2, start, n);
        let (q, k, v) = (at(&q)?, at(&k)?, at(&v)?);
        let from = lower(n, dtype, device)?;
        let sums = |x: &Tensor| -> Result<Tensor> {
            Ok(from.broadcast_as((b, h, n, n))?.matmul(&at(x)?.contiguous()?)?)
        };
        // [B, H, n, 1]: the logarithms summed, and how many sequences have begun
        let (c, begun) = (sums(&log)?, sums(&starts)?);
        let equal = |x: &Tensor, y: &Tensor| x.broadcast_eq(y)?.to_dtype(dtype);
        let below = c.broadcast_sub(&c.transpose(2, 3)?)?.broadcast_mul(&from)?;
        let together = equal(&begun, &begun.transpose(2, 3)?)?.broadcast_mul(&from)?;
        let decay = (below.exp()? * together)?;
        let inner = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * decay)?.matmul(&v)?;
        let nothing = begun.zeros_like()?;
        let reached = (c.exp()? * equal(&begun, &nothing)?)?;
        parts.push(((inner + q.matmul(&state)?.broadcast_mul(&reached)?)? * args.scale)?);
        let last = |x: &Tensor| x.narrow(2, n - 1, 1);
        let left = (last(&c)?.broadcast_sub(&c)?.exp()? * equal(&begun, &last(&begun)?)?)?;
        let update = k.broadcast_mul(&left)?.transpose(2, 3)?.contiguous()?.matmul(&v)?;
        state = (state.broadcast_mul(&last(&reached)?)? + update)?;
    }
    let mut o = Tensor::cat(&parts, 2)?;
    if let Some(kept) = &kept {
        o = o.broadcast_mul(kept)?;
    }
    Ok((o.transpose(1, 2)?.contiguous()?.to_dtype(args.q.dtype())?, state))
}

/// `[B, T, groups, width]` as `[B, H, T, width]`.
fn heads_first(x: &Tensor, sizes: &Sizes, dtype: DType) -> Result<Tensor> {
    let (b, t, groups, width) = x.dims4()?;
    let x = x.to_dtype(dtype)?.transpose(1, 2)?;
    let spread = x.unsqueeze(2)?.broadcast_as((b, groups, sizes.heads / groups, t, width))?;
    Ok(spread.contiguous()?.reshape((b, sizes.heads, t, width))?)
}

/// `[B, H, T, 1]` each: the decays' logarithms, zero at padding and where all is forgotten, and ones where it is.
fn decays(args: &Retention, sizes: &Sizes, dtype: DType) -> Result<(Tensor, Tensor)> {
    let (b, t, h) = (sizes.batch, sizes.length, sizes.heads);
    let log = args.log_decay.to_dtype(dtype)?;
    let log = match log.rank() {
        1 => log.reshape((1, h, 1, 1))?.broadcast_as((b, h, t, 1))?.contiguous()?,
        _ => log.transpose(1, 2)?.unsqueeze(D::Minus1)?.contiguous()?,
    };
    let mut starts = log.detach().lt(FORGET)?;
    let mut kept = log.detach().ge(FORGET)?;
    if let Some(segments) = args.segments {
        let marks =
            segments.marks(log.device())?.reshape((b, 1, t, 1))?.broadcast_as((b, h, t, 1))?.contiguous()?;
        let padding = marks.eq(PAD)?;
        let zero = padding.zeros_like()?;
        starts = marks.eq(START)?.where_cond(&zero.ones_like()?, &starts)?;
        starts = padding.where_cond(&zero, &starts)?;
        kept = marks.eq(CONTINUE)?.where_cond(&kept, &zero)?;
    }
    let log = kept.where_cond(&log, &log.zeros_like()?)?;
    Ok((log, starts.to_dtype(dtype)?))
}

/// One, and zero at padding: `[B, 1, T, 1]`.
fn keep(
    segments: Option<&Segments>,
    sizes: &Sizes,
    dtype: DType,
    device: &candle_core::Device,
) -> Result<Option<Tensor>> {
    let Some(segments) = segments else { return Ok(None) };
    let marks = segments.marks(device)?.reshape((sizes.batch, 1, sizes.length, 1))?;
    Ok(Some(marks.ne(PAD)?.to_dtype(dtype)?))
}

/// Ones on and below the diagonal, `[n, n]`.
fn lower(n: usize, dtype: DType, device: &candle_core::Device) -> Result<Tensor> {
    let places = Tensor::arange(0u32, n as u32, device)?;
    let below = places.unsqueeze(1)?.broadcast_ge(&places.unsqueeze(0)?)?;
    Ok(below.to_dtype(dtype)?)
}
