//! The formula in tensor operations.

use super::{Attention, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// [`attention`](super::attention) in tensor operations, all weights at once: any device, differentiable by candle.
pub fn attention_reference(args: &Attention) -> Result<Tensor> {
    let sizes = args.check()?;
    let (b, l, m, h, g) = (sizes.batch, sizes.queries, sizes.keys, sizes.heads, sizes.groups);
    let dtype = accumulation_dtype(args.q.dtype());
    if l * b * h * sizes.values == 0 || m == 0 {
        let y = Tensor::zeros((b, l, h, sizes.values), dtype, args.q.device())?;
        return Ok(y.to_dtype(args.q.dtype())?);
    }
    // [B, H, .., channels]
    let heads = |x: &Tensor| -> Result<Tensor> {
        let x = x.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?;
        let (b, g, m, k) = x.dims4()?;
        Ok(x.unsqueeze(2)?.broadcast_as((b, g, h / g, m, k))?.contiguous()?.reshape((b, h, m, k))?)
    };
    let (q, k, v) = (args.q.to_dtype(dtype)?.transpose(1, 2)?.contiguous()?, heads(args.k)?, heads(args.v)?);
    debug_assert_eq!(k.dim(1)?, g * (h / g));
    let products = (q.matmul(&k.t()?)? * args.scale)?;
    let seen: Vec<u8> =
        args.keys.iter().flat_map(|keys| (0..m).map(|j| u8::from(keys.contains(&j)))).collect();
    let seen = Tensor::from_vec(seen, (b, 1, l, m), args.q.device())?.broadcast_as((b, h, l, m))?;
    // hidden products become the lowest of the seen, then weigh nothing
    let low = Tensor::full(-1e30f32, (b, h, l, m), args.q.device())?.to_dtype(dtype)?;
    let products = seen.where_cond(&products, &low)?;
    let largest = products.max_keepdim(D::Minus1)?.detach();
    let weights = (products.broadcast_sub(&largest)?.exp()? * seen.to_dtype(dtype)?)?;
    let sums = weights.sum_keepdim(D::Minus1)?;
    // a query that sees nothing: 0 / 1
    let sums = (&sums + sums.eq(0.0)?.to_dtype(dtype)?)?;
    let y = weights.broadcast_div(&sums)?.matmul(&v)?;
    Ok(y.transpose(1, 2)?.contiguous()?.to_dtype(args.q.dtype())?)
}
