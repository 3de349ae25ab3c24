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
mod reference;

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
    if args.x.device().is_cpu() { cpu::on_cpu(args) } else { rotary_reference(args) }
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
