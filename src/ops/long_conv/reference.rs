//! The sum itself, as products with Toeplitz matrices.

use super::{LongConv, Segments, accumulation_dtype};
use crate::Result;
use crate::ops::segments::PAD;
use candle_core::Tensor;

/// Output tokens a matrix.
const ROWS: usize = 64;

/// [`long_conv`](super::long_conv) as the formula reads, in tensor operations: any device, differentiable by candle,
/// O(L^2).
pub fn long_conv_reference(args: &LongConv) -> Result<Tensor> {
    let sizes = args.check()?;
    let (b, l, d, g) = (sizes.batch, sizes.length, sizes.channels, sizes.groups);
    let dtype = accumulation_dtype(args.x.dtype());
    let gated = |x: Tensor, gate: Option<&Tensor>| match gate {
        Some(gate) => x * gate.to_dtype(dtype)?,
        None => Ok(x),
    };
    let v = gated(args.x.to_dtype(dtype)?, args.pre_gate)?;
    let past = args.past.map_or(0, |past| past.dims()[1]);
    let v = args.past.map_or(Ok(v.clone()), |past| Tensor::cat(&[&past.to_dtype(dtype)?, &v], 1))?;
    // the taps by lag, from the last of the future to the last of the past, with a zero for all lags beyond: [G, R + K + 1]
    let zero = Tensor::zeros((g, 1), dtype, v.device())?;
    let wide =
        |filter: &Tensor| if args.taps_first { filter.t()?.to_dtype(dtype) } else { filter.to_dtype(dtype) };
    let mut taps = vec![wide(args.filter)?];
    if let Some(reverse) = args.reverse {
        let flip: Vec<u32> = (0..sizes.reverse as u32).rev().collect();
        let flipped = wide(reverse)?.contiguous()?.index_select(&Tensor::new(flip, v.device())?, 1)?;
        let future = Tensor::cat(&[&flipped, &Tensor::zeros((g, sizes.taps - 1), dtype, v.device())?], 1)?;
        let behind = Tensor::zeros((g, sizes.reverse - 1), dtype, v.device())?;
        taps = vec![(future + Tensor::cat(&[&behind, &taps[0]], 1)?)?];
    }
    taps.push(zero);
    let (taps, before) = (Tensor::cat(&taps, 1)?.contiguous()?, sizes.reverse.saturating_sub(1));
    let beyond = taps.dim(1)? - 1;
    let segments = Segments::or_whole(args.segments, b, past + l);
    let mut rows = vec![];
    for row in 0..b {
        let mut y = vec![Tensor::zeros((1, d), dtype, v.device())?; past + l];
        for tokens in segments.sequences(row) {
            let index: Vec<u32> = tokens.iter().map(|&t| t as u32).collect();
            let n = index.len();
            let v = v.get(row)?.contiguous()?.index_select(&Tensor::new(index, v.device())?, 0)?;
            // [G, n, D / G]
            let v = v.reshape((n, g, d / g))?.transpose(0, 1)?.contiguous()?;
            for start in (0..n).step_by(ROWS) {
                let count = ROWS.min(n - start);
                let lag =
                    |t: usize, s: usize| (t + before).checked_sub(s).map_or(beyond, |lag| lag.min(beyond));
                let lags = (start..start + count).flat_map(|t| (0..n).map(move |s| lag(t, s) as u32));
                let matrix =
                    taps.index_select(&Tensor::from_vec(lags.collect(), count * n, v.device())?, 1)?;
                let z = matrix.reshape((g, count, n))?.matmul(&v)?.transpose(0, 1)?.reshape((count, d))?;
                for i in 0..count {
                    y[tokens[start + i]] = z.narrow(0, i, 1)?;
                }
            }
        }
        rows.push(Tensor::cat(&y, 0)?.narrow(0, past, l)?.unsqueeze(0)?);
    }
    let mut y = Tensor::cat(&rows, 0)?;
    if let Some(skip) = args.d {
        let keep = segments.marks(v.device())?.ne(PAD)?.to_dtype(dtype)?;
        let v = v.broadcast_mul(&keep.unsqueeze(2)?)?.narrow(1, past, l)?;
        y = (y + v.broadcast_mul(&skip.to_dtype(dtype)?)?)?;
    }
    Ok(gated(y, args.post_gate)?.to_dtype(args.x.dtype())?)
}
