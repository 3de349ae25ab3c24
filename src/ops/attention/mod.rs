//! Softmax attention over ranges of keys.
//!
//! For query `t` of head `h`, with keys and values of the head's group `g = h G / H`,
//!
//! ```text
//! w[j] = exp(scale q[t] . k[j]) / sum_(i in keys(t)) exp(scale q[t] . k[i])        j in keys(t)
//! y[t] = sum_(j in keys(t)) w[j] v[j]
//! ```
//!
//! `keys(t)` is a range: [`causal`] gives those of a plain sequence, with a sliding window or without. A query that sees
//! no key has a zero output.
//!
//! Sources: Vaswani et al. 2017; grouped queries, Ainslie et al. 2023; the blocked form, FlashAttention-2 (Dao 2023),
//! section 3.
//!
//! # On the CPU
//! Tiles of queries meet tiles of keys with a running maximum and sum, so that memory beside the output is a few tiles:
//! linear in the length. The backward pass computes the weights again from the logarithm of each query's sum. Weights
//! and sums are f32 (f64 for f64).

mod cpu;
mod grad;
mod reference;

pub use reference::attention_reference;

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;

/// The arguments of [`attention`].
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Queries, `[B, L, H, K]`.
    pub q: &'a Tensor,
    /// Keys, `[B, M, G, K]`; `G` divides `H`.
    pub k: &'a Tensor,
    /// Values, `[B, M, G, V]`.
    pub v: &'a Tensor,
    /// Factor of the products, `K^-1/2` as a rule.
    pub scale: f64,
    /// The keys that each of the `[B, L]` queries sees, row by row.
    pub keys: &'a [Range<usize>],
}

/// The keys of the last `length` of `total` tokens in each of `batch` rows: all up to the query's own, at most `window`.
pub fn causal(batch: usize, length: usize, total: usize, window: Option<usize>) -> Vec<Range<usize>> {
    let past = total.saturating_sub(length);
    let of = |t: usize| {
        let end = past + t + 1;
        end.saturating_sub(window.unwrap_or(end))..end
    };
    (0..batch).flat_map(|_| (0..length).map(of)).collect()
}

/// Softmax attention; see the [module](self) for the formula.
///
/// Returns `[B, L, H, V]` in the dtype of `q`, which `k` and `v` must share. Differentiable in `q`, `k` and `v`.
///
/// # Errors
/// Shapes, dtypes or ranges that do not fit, naming the argument.
pub fn attention(args: &Attention) -> Result<Tensor> {
    let sizes = args.check()?;
    if !args.q.device().is_cpu() {
        return attention_reference(args);
    }
    grad::recorded(args, sizes)
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) heads: usize,
    pub(crate) groups: usize,
    /// Channels of queries and keys.
    pub(crate) width: usize,
    /// Channels of values.
    pub(crate) values: usize,
}

impl Attention<'_> {
    fn check(&self) -> Result<Sizes> {
        let wrong = |name: &str, expected: String, got: &Tensor| {
            Error::shape(format!("attention: {name}"), expected, got.dims())
        };
        let Ok((batch, queries, heads, width)) = self.q.dims4() else {
            return Err(wrong("q", "[B, L, H, K]".into(), self.q));
        };
        let (keys, groups) = match *self.k.dims() {
            [b, m, g, k] if b == batch && k == width && g > 0 && heads % g == 0 => (m, g),
            _ => {
                let expected = format!("[B, M, G, K] = [{batch}, M, a divisor of {heads}, {width}]");
                return Err(wrong("k", expected, self.k));
            }
        };
        let values = match *self.v.dims() {
            [b, m, g, v] if (b, m, g) == (batch, keys, groups) => v,
            _ => return Err(wrong("v", format!("[B, M, G, V] = [{batch}, {keys}, {groups}, V]"), self.v)),
        };
        let dtype = self.q.dtype();
        if !dtype.is_float() {
            return Err(Error::dtype("attention: q", "a float", dtype));
        }
        for (name, tensor) in [("k", self.k), ("v", self.v)] {
            if tensor.dtype() != dtype {
                let expected = format!("{dtype:?}, as q has");
                return Err(Error::dtype(format!("attention: {name}"), expected, tensor.dtype()));
            }
        }
        if self.keys.len() != batch * queries {
            let expected = format!("B L = {} ranges", batch * queries);
            return Err(Error::value("attention: keys", expected, self.keys.len()));
        }
        if let Some(range) = self.keys.iter().find(|range| range.end > keys) {
            return Err(Error::value(
                "attention: keys",
                format!("ranges within {keys}"),
                format!("{range:?}"),
            ));
        }
        if !self.scale.is_finite() {
            return Err(Error::value("attention: scale", "a finite number", self.scale));
        }
        Ok(Sizes { batch, queries, keys, heads, groups, width, values })
    }
}
