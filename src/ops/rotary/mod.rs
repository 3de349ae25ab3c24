//! Rotary position embedding: pairs of channels turned by an angle that grows with the position.
//!
//! With `p` the token's position and `w_i` the angle per position of pair `i < R`,
//!
//! ```text
//! y[a] = x[a] cos(p w_i) - x[b] sin(p w_i)        (a, b) = (i, i + R)        half
//! y[b] = x[a] sin(p w_i) + x[b] cos(p w_i)               = (2 i, 2 i + 1)    interleaved
//! ```
//!
//! for every head; channels from `2 R` on stay as they are.
//!
//! Angles are f64 and reduced before they are rounded, whatever the dtype of `x`: positions of 10^6 and more turn as
//! exactly as position 1. Products are f32 (f64 for f64), rounded once.
//!
//! Sources: RoFormer (Su et al. 2021), section 3.4.2, which interleaves; the other order is that of GPT-NeoX.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod reference;

#[cfg(feature = "cuda")]
pub(crate) use cuda::turns_of;
pub use reference::rotary_reference;

use super::Segments;
use crate::{Error, Result};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Which channels turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotaryStyle {
    /// Channel `i` of the first half with channel `i` of the second.
    Half,
    /// Neighbours.
    Interleaved,
}

/// The arguments of [`rotary`].
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// `[B, L, H, K]`
    pub x: &'a Tensor,
    /// The position of every token, row by row: `B L` of them, or `L` where all rows have the same.
    pub positions: &'a [usize],
    /// The angle per position of each pair, at most `K / 2`.
    pub frequencies: &'a [f64],
    /// Which channels turn together.
    pub style: RotaryStyle,
}

/// Turns pairs of channels; see the [module](self).
///
/// Returns `[B, L, H, K]` in the dtype of `x`. Differentiable in `x`.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn rotary(args: &Rotary) -> Result<Tensor> {
    args.check()?;
    #[cfg(feature = "cuda")]
    if args.x.device().is_cuda()
        && let Some(y) = cuda::one(args)?
    {
        return Ok(y);
    }
    if args.x.device().is_cpu() { cpu::on_cpu(args) } else { rotary_reference(args) }
}

/// The arguments of [`rotary_pair`].
#[derive(Clone, Copy, Debug)]
pub struct RotaryPair<'a> {
    /// Queries, `[B, L, Hq, K]`.
    pub q: &'a Tensor,
    /// Keys, `[B, L, Hk, K]`.
    pub k: &'a Tensor,
    /// As of [`Rotary`].
    pub positions: &'a [usize],
    /// As of [`Rotary`]; none turn nothing.
    pub frequencies: &'a [f64],
    /// As of [`Rotary`].
    pub style: RotaryStyle,
    /// Logarithms of decays, one for each head of the queries, at most 0: queries are then divided by the root of the sum of
    /// the decays up to them, `s_t^2 = sum_(j <= t) e^(j log_decay)` at position `t`, as RetNet scales its outputs.
    pub log_decay: Option<&'a [f64]>,
}

/// Turns queries and keys, and scales queries where they are to be; see the [module](self).
///
/// Returns `[B, L, Hq, K]` and `[B, L, Hk, K]` in the dtypes of `q` and `k`. On CUDA, with one dtype, one pass over both.
/// Differentiable in both.
///
/// # Errors
/// Shapes or dtypes that do not fit, a decay above 1, naming the argument.
pub fn rotary_pair(args: &RotaryPair) -> Result<(Tensor, Tensor)> {
    let (q, k) = (args.side(args.q), args.side(args.k));
    q.check()?;
    k.check()?;
    args.check()?;
    #[cfg(feature = "cuda")]
    if args.q.device().is_cuda()
        && let Some(pair) = cuda::pair(args)?
    {
        return Ok(pair);
    }
    let turned = rotary(&q)?;
    let turned = match args.factors()? {
        Some(factors) => turned.broadcast_mul(&factors)?,
        None => turned,
    };
    Ok((turned, rotary(&k)?))
}

impl<'a> RotaryPair<'a> {
    fn side(&self, x: &'a Tensor) -> Rotary<'a> {
        Rotary { x, positions: self.positions, frequencies: self.frequencies, style: self.style }
    }

    fn check(&self) -> Result<()> {
        if self.q.dims()[..2] != self.k.dims()[..2] || self.q.dims()[3] != self.k.dims()[3] {
            let expected = format!("[B, L, Hk, K] of the queries' {:?}", self.q.dims());
            return Err(Error::shape("rotary: k", expected, self.k.dims()));
        }
        let Some(logs) = self.log_decay else { return Ok(()) };
        if logs.len() != self.q.dims()[2] {
            let expected = format!("one for each of {} heads", self.q.dims()[2]);
            return Err(Error::value("rotary: log_decay", expected, logs.len()));
        }
        match logs.iter().find(|log| log.is_nan() || **log > 0.0) {
            Some(wrong) => Err(Error::value("rotary: log_decay", "logarithms of at most 0", wrong)),
            None => Ok(()),
        }
    }

    /// `1 / s_t` in the dtype of the queries, `[B or 1, L, H, 1]`; as many rows as there are positions for.
    fn factors(&self) -> Result<Option<Tensor>> {
        let Some(logs) = self.log_decay else { return Ok(None) };
        let (_, length, heads, _) = self.q.dims4()?;
        let of = |&position: &usize| logs.iter().map(move |&log| decay_sum(log, position + 1).sqrt().recip());
        let factors: Vec<f64> = self.positions.iter().flat_map(of).collect();
        let dims = (self.positions.len() / length.max(1), length, heads, 1);
        let factors = Tensor::from_vec(factors, dims, self.q.device())?;
        Ok(Some(factors.to_dtype(self.q.dtype())?))
    }
}

/// `sum_(j < tokens) e^(j log)`, accurate for decays near one and for many tokens.
pub(crate) fn decay_sum(log: f64, tokens: usize) -> f64 {
    let n = tokens as f64;
    match log {
        0.0 => n,
        f64::NEG_INFINITY => n.min(1.0),
        log => (n * log).exp_m1() / log.exp_m1(),
    }
}

/// The positions of `[B, L]` tokens whose rows have had `before` tokens each: `L` numbers if all rows have the same,
/// else `B L`. Padding has position 0.
pub fn positions(before: &[usize], segments: Option<&Segments>, length: usize) -> Vec<usize> {
    let first = before.first().copied().unwrap_or(0);
    let Some(segments) = segments else {
        if before.iter().all(|&start| start == first) {
            return (first..first + length).collect();
        }
        return before.iter().flat_map(|&start| start..start + length).collect();
    };
    let mut all = vec![0; before.len() * length];
    for (row, (tokens, &start)) in all.chunks_mut(length.max(1)).zip(before).enumerate() {
        let mut next = start;
        for run in segments.row(row) {
            if run.fresh {
                next = 0;
            }
            for token in &mut tokens[run.tokens.clone()] {
                *token = next;
                next += 1;
            }
        }
    }
    all
}

impl Rotary<'_> {
    fn check(&self) -> Result<()> {
        let Ok((batch, length, _, width)) = self.x.dims4() else {
            return Err(Error::shape("rotary: x", "[B, L, H, K]", self.x.dims()));
        };
        if !self.x.dtype().is_float() {
            return Err(Error::dtype("rotary: x", "a float", self.x.dtype()));
        }
        if self.positions.len() != length && self.positions.len() != batch * length {
            let expected = format!("{length} or {}, one for each token", batch * length);
            return Err(Error::value("rotary: positions", expected, self.positions.len()));
        }
        if 2 * self.frequencies.len() > width {
            let expected = format!("at most half of K = {width}");
            return Err(Error::value("rotary: frequencies", expected, self.frequencies.len()));
        }
        match self.frequencies.iter().find(|w| !w.is_finite()) {
            Some(wrong) => Err(Error::value("rotary: frequencies", "finite numbers", wrong)),
            None => Ok(()),
        }
    }

    /// Cosine and sine of every pair at every position.
    fn table(&self) -> (Vec<f64>, Vec<f64>) {
        let angles = self.positions.iter().flat_map(|&p| self.frequencies.iter().map(move |w| p as f64 * w));
        angles.map(|angle| (angle.cos(), angle.sin())).unzip()
    }
}
