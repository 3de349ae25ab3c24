//! One head of one row: time cut into spans that several threads take, as rows of a batch.
//!
//! Every span runs from an empty state. Then the states before the spans follow one from another,
//!
//! ```text
//! S[p] = e^(n log) S[p-1] + end of span p - 1
//! ```
//!
//! and what each of them adds to the outputs of its span, `scale e^((i+1) log) q[i] S[p]`, is one product of matrices.
//! The spans depend on the shape alone, so that results do not depend on the number of threads. The price is that product:
//! a quarter of the work again, or a little more.

use super::{Retention, Sizes, retention};
use crate::Result;
use candle_core::Tensor;

/// The retention of unified arguments of one row and head without segments, with a constant decay above zero, in `count`
/// spans of `length` tokens; what is left over goes on from the state behind them.
pub(super) fn in_spans(
    args: &Retention,
    sizes: Sizes,
    [count, length]: [usize; 2],
) -> Result<(Tensor, Tensor)> {
    let (keys, values, whole) = (sizes.keys, sizes.values, count * length);
    let cut =
        |x: &Tensor, width: usize| x.narrow(1, 0, whole)?.contiguous()?.reshape((count, length, 1, width));
    let (q, k, v) = (cut(args.q, keys)?, cut(args.k, keys)?, cut(args.v, values)?);
    let (o, ends) = retention(&Retention { q: &q, k: &k, v: &v, initial_state: None, ..*args })?;
    let total = (args.log_decay * length as f64)?.exp()?.reshape((1, 1, 1, 1))?;
    let mut state = match args.initial_state {
        Some(state) => state.clone(),
        None => ends.narrow(0, 0, 1)?.zeros_like()?,
    };
    let mut before = vec![];
    for span in 0..count {
        before.push(state.clone());
        state = (state.broadcast_mul(&total)? + ends.narrow(0, span, 1)?)?;
    }
    let before = Tensor::cat(&before, 0)?.reshape((count, keys, values))?;
    let places = Tensor::arange(1u32, length as u32 + 1, q.device())?.to_dtype(q.dtype())?;
    let reach = (places.broadcast_mul(args.log_decay)?.exp()? * args.scale)?.reshape((1, length, 1))?;
    let added = q.reshape((count, length, keys))?.matmul(&before)?.broadcast_mul(&reach)?;
    let o = (o.reshape((1, whole, 1, values))? + added.reshape((1, whole, 1, values))?)?;
    if whole == sizes.length {
        return Ok((o, state));
    }
    let [q, k, v] = [args.q, args.k, args.v].map(|x| x.narrow(1, whole, sizes.length - whole));
    let rest = Retention { q: &q?, k: &k?, v: &v?, initial_state: Some(&state), ..*args };
    let (tail, state) = retention(&rest)?;
    Ok((Tensor::cat(&[o, tail], 1)?, state))
}
