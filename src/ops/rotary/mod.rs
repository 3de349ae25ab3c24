//! Rotary position embedding.
//!
//! Channels of a head are taken in `R / 2` pairs, pair `i` turned by the angle `p f[i]` at position `p`:
//!
//! ```text
//! y1 = x1 cos(p f[i]) - x2 sin(p f[i])
//! y2 = x2 cos(p f[i]) + x1 sin(p f[i])
//! ```
//!
//! The pairs are `(x[i], x[i + R/2])` in the half form (GPT-NeoX, Llama) and `(x[2 i], x[2 i + 1])` in the interleaved
//! form (GPT-J, RetNet). Channels from `R` on pass through. Linear scaling of positions is a division of `f`.
//!
//! Angles are f64 whatever the dtype of `x`, and so exact to 1e-9 at a million tokens; sines and cosines are rounded to
//! f32 (f64 for f64), in which the products are computed.
//!
//! Source: RoFormer (Su et al. 2021), section 3.2.2.

mod angles;
mod cpu;
mod reference;

pub use reference::rotary_reference;

use super::Segments;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

/// Which channels form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotaryStyle {
    /// `i` and `i + R/2`
    Half,
    /// `2 i` and `2 i + 1`
    Interleaved,
}

/// Where the tokens stand in their sequences.
#[derive(Clone, Copy, Debug)]
pub enum Positions<'a> {
    /// `[B, L]` of u32 or i64.
    Ids(&'a Tensor),
    /// Counted: row `b` goes on from `offsets[b]` (zero where `offsets` is empty), every sequence of `segments` that
    /// starts afresh from zero; padding does not count.
    Counted {
        /// How many tokens each row's sequence has had, `[B]` or empty.
        offsets: &'a [usize],
        /// Packed sequences and padding; `None` is one sequence a row.
        segments: Option<&'a Segments>,
    },
}

/// The arguments of [`rotary`].
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a> {
    /// `[B, L, H, K]`: heads `H` of `K` channels. Only the channels need be contiguous.
    pub x: &'a Tensor,
    /// The positions of the `[B, L]` tokens.
    pub positions: Positions<'a>,
    /// `R / 2` angles per position, `R <= K`; see [`inverse_frequencies`].
    pub inverse_frequencies: &'a [f64],
    /// Which channels form a pair.
    pub style: RotaryStyle,
    /// Turn the other way, which undoes it.
    pub inverse: bool,
}

/// The usual frequencies: `base^(-2 i / width) / scaling` for `i < width / 2`.
pub fn inverse_frequencies(width: usize, base: f64, scaling: f64) -> Vec<f64> {
    (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64) / scaling).collect()
}

/// Rotary position embedding; see the [module](self) for the formula.
///
/// Returns `[B, L, H, K]` in the dtype of `x`. Differentiable in `x`.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument; more than `K / 2` frequencies, or one that is not finite.
pub fn rotary(args: &Rotary) -> Result<Tensor> {
    let positions = args.check()?;
    if !args.x.device().is_cpu() {
        return reference::composed(args, &positions);
    }
    cpu::on_cpu(args, positions)
}

impl Rotary<'_> {
    /// The position of every token, `[B, L]`.
    fn check(&self) -> Result<Vec<i64>> {
        let (b, l, _, k) = match *self.x.dims() {
            [b, l, h, k] => (b, l, h, k),
            _ => return Err(Error::shape("rotary: x", "[B, L, H, K]", self.x.dims())),
        };
        if !self.x.dtype().is_float() {
            return Err(Error::dtype("rotary: x", "a float", self.x.dtype()));
        }
        if 2 * self.inverse_frequencies.len() > k {
            let expected = format!("at most K / 2 = {}", k / 2);
            let got = self.inverse_frequencies.len();
            return Err(Error::value("rotary: inverse_frequencies", expected, got));
        }
        if let Some(f) = self.inverse_frequencies.iter().find(|f| !f.is_finite()) {
            return Err(Error::value("rotary: inverse_frequencies", "finite numbers", f));
        }
        self.positions.list(b, l)
    }
}

impl Positions<'_> {
    fn list(&self, batch: usize, length: usize) -> Result<Vec<i64>> {
        match *self {
            Self::Ids(ids) => {
                if ids.dims() != [batch, length] {
                    let expected = format!("[B, L] = [{batch}, {length}]");
                    return Err(Error::shape("rotary: positions", expected, ids.dims()));
                }
                if !matches!(ids.dtype(), DType::U32 | DType::I64) {
                    return Err(Error::dtype("rotary: positions", "u32 or i64", ids.dtype()));
                }
                Ok(ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1()?)
            }
            Self::Counted { offsets, segments } => {
                if !offsets.is_empty() && offsets.len() != batch {
                    return Err(Error::shape(
                        "rotary: offsets",
                        format!("[B] = [{batch}]"),
                        &[offsets.len()],
                    ));
                }
                if let Some(segments) = segments {
                    segments.check("rotary", batch, length)?;
                }
                let segments = Segments::or_whole(segments, batch, length);
                let mut positions = vec![0i64; batch * length];
                for row in 0..batch {
                    let mut next = offsets.get(row).map_or(0, |&offset| offset as i64);
                    for run in segments.row(row) {
                        next = if run.fresh { 0 } else { next };
                        for t in run.tokens.clone() {
                            positions[row * length + t] = next;
                            next += 1;
                        }
                    }
                }
                Ok(positions)
            }
        }
    }
}
