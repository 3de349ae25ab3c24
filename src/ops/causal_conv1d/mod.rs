//! Depthwise causal convolution over time, the short filter before a state space mixer.
//!
//! With `K` taps per channel, `x` extended to the left by the `K - 1` inputs of the initial state (or zeros),
//!
//! ```text
//! y[b, t, d] = bias[d] + sum_{k < K} weight[d, k] x[b, t - (K - 1) + k, d]      (then SiLU, if asked)
//! ```
//!
//! Source: Mamba (Gu & Dao 2023, section 3.4); argument order of `causal_conv1d_fn` in the package causal-conv1d.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod grad;
mod plan;
mod reference;

pub use reference::causal_conv1d_reference;

use super::{Segments, accumulation_dtype};
use crate::{Error, Result};
use candle_core::Tensor;

/// The arguments of [`causal_conv1d`].
#[derive(Clone, Copy, Debug)]
pub struct CausalConv1d<'a> {
    /// Input, `[B, L, D]`.
    pub x: &'a Tensor,
    /// Filters, `[D, K]` or (as checkpoints hold them) `[D, 1, K]`, `K >= 1`; the last tap meets the current token.
    pub weight: &'a Tensor,
    /// `[D]`
    pub bias: Option<&'a Tensor>,
    /// Apply SiLU to the result.
    pub silu: bool,
    /// The `K - 1` inputs before the first, oldest first: `[B, D, K - 1]`; zeros if `None`.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences and padding; `None` is one sequence a row.
    pub segments: Option<&'a Segments>,
}

/// Depthwise causal convolution; see the [module](self) for the formula.
///
/// Returns the output `[B, L, D]` in the dtype of `x`, and the final state `[B, D, K - 1]` (f32; f64 for f64 input):
/// the last inputs of each row's last sequence, zeros where it is shorter.
///
/// Differentiable in `x`, `weight`, `bias`, `initial_state`, and through both results.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn causal_conv1d(args: &CausalConv1d) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    #[cfg(feature = "cuda")]
    if args.x.device().is_cuda() {
        let filtered = cuda::on_cuda(args, sizes)?;
        return filtered.map_or_else(|| causal_conv1d_reference(args), Ok);
    }
    if !args.x.device().is_cpu() {
        return causal_conv1d_reference(args);
    }
    grad::recorded(args, sizes)
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    batch: usize,
    length: usize,
    channels: usize,
    /// `K`
    taps: usize,
}

impl CausalConv1d<'_> {
    fn check(&self) -> Result<Sizes> {
        let shape = |name: &str, expected: String, got: &Tensor| {
            Error::shape(format!("causal_conv1d: {name}"), expected, got.dims())
        };
        let Ok((b, l, d)) = self.x.dims3() else { return Err(shape("x", "[B, L, D]".into(), self.x)) };
        let k = match self.weight.dims() {
            &[rows, k] | &[rows, 1, k] if rows == d && k > 0 => k,
            _ => {
                return Err(shape(
                    "weight",
                    format!("[D, K] or [D, 1, K], [D, K] = [{d}, K >= 1]"),
                    self.weight,
                ));
            }
        };
        if let Some(bias) = self.bias.filter(|bias| bias.dims() != [d]) {
            return Err(shape("bias", format!("[D] = [{d}]"), bias));
        }
        if let Some(state) = self.initial_state.filter(|state| state.dims() != [b, d, k - 1]) {
            return Err(shape("initial_state", format!("[B, D, K - 1] = [{b}, {d}, {}]", k - 1), state));
        }
        if let Some(segments) = self.segments {
            segments.check("causal_conv1d", b, l)?;
        }
        Ok(Sizes { batch: b, length: l, channels: d, taps: k })
    }
}
