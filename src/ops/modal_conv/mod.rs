//! The modal convolution: a causal long convolution whose filter is a sum of `S` exponentials per channel.
//!
//! With poles `p` and residues `R` (complex, or both real) of each channel `d`,
//!
//! ```text
//! y[t] = D u[t] + sum_(j <= t) k[t - j] u[j],      k[t] = Re sum_s R_s p_s^t
//! ```
//!
//! which is the recurrence
//!
//! ```text
//! h_s[t] = p_s h_s[t-1] + u[t],      y[t] = D u[t] + Re sum_s R_s h_s[t]
//! ```
//!
//! so that a sequence leaves `S` numbers per channel behind, however long it is.
//!
//! Sources: Laughing Hyena (Massaroli et al. 2023), section 3 (modal form); StripedHyena's complex poles; Evo 2's real
//! poles, given by their logarithms.
//!
//! # Form on the CPU
//! Tokens are taken in chunks of `T` = 16. With `H` the state before a chunk, `P = p^T`,
//!
//! ```text
//! y[i] = sum_(j <= i) k[i - j] u[j] + Re sum_s (R_s p_s^(i+1)) H_s
//! H'_s = P_s H_s + sum_j p_s^(T-1-j) u[j]
//! ```
//!
//! The powers are made in f64 once per call, and `H` is carried in f64 from chunk to chunk, so that rounding does not
//! gather over a million tokens. Outputs and final state come from one pass; beside them, memory is `O(D S)`. There is
//! no transform, and no length that is better than another.

mod cpu;
mod fit;
mod grad;
mod plan;
mod reference;

pub use fit::{ModalFit, fit_modal};
pub use reference::{modal_conv_reference, modal_filter};

use super::{Segments, accumulation_dtype};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// The poles of a [`ModalConv`], f32 or f64.
#[derive(Clone, Copy, Debug)]
pub enum Poles<'a> {
    /// Complex, `[D, S, 2]` (real and imaginary part); residues are complex as well.
    Complex(&'a Tensor),
    /// Real, `[D, S]`; residues are real as well.
    Real(&'a Tensor),
    /// Real and positive, by their logarithms `[D, S]`; residues are real.
    Log(&'a Tensor),
}

impl<'a> Poles<'a> {
    /// The tensor.
    pub fn tensor(self) -> &'a Tensor {
        match self {
            Self::Complex(poles) | Self::Real(poles) | Self::Log(poles) => poles,
        }
    }

    /// The largest absolute value: above 1, the filter grows without bound.
    ///
    /// # Errors
    /// A tensor that is not of floats.
    pub fn largest(self) -> Result<f64> {
        let values = self.tensor().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        Ok(match self {
            Self::Complex(_) => values.chunks(2).map(|p| p[0].hypot(p[1])).fold(0.0, f64::max),
            Self::Real(_) => values.into_iter().map(f64::abs).fold(0.0, f64::max),
            Self::Log(_) => values.into_iter().map(f64::exp).fold(0.0, f64::max),
        })
    }
}

/// The arguments of [`modal_conv`].
#[derive(Clone, Copy, Debug)]
pub struct ModalConv<'a> {
    /// Input, `[B, L, D]`.
    pub u: &'a Tensor,
    /// The poles.
    pub poles: Poles<'a>,
    /// Residues, of the shape of the poles, f32 or f64.
    pub residues: &'a Tensor,
    /// Skip weight, `[D]`.
    pub d: Option<&'a Tensor>,
    /// The state before the first token: `[B, D, S, 2]`, `[B, D, S]` where real; zeros if `None`.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences and padding; `None` is one sequence a row.
    pub segments: Option<&'a Segments>,
}

/// The modal convolution; see the [module](self) for the formula.
///
/// Returns the output `[B, L, D]` in the dtype of `u`, and the final state `[B, D, S, 2]` (`[B, D, S]` where the poles
/// are real; f32, f64 for f64 input).
///
/// Differentiable in every tensor argument, the initial state included, and through both results. Costs `O(L D S)` time
/// whatever the length.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument. Poles and residues must be f32 or f64: rounded to bf16 a pole
/// of 0.999 is another filter.
pub fn modal_conv(args: &ModalConv) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    if !args.u.device().is_cpu() {
        return modal_conv_reference(args);
    }
    // parameters and state in f64, whatever they were given in
    let wide = |x: &Tensor| x.to_dtype(DType::F64);
    let poles = wide(args.poles.tensor())?;
    let residues = wide(args.residues)?;
    let d = args.d.map(wide).transpose()?;
    let initial = args.initial_state.map(wide).transpose()?;
    grad::recorded(&grad::Arguments {
        u: args.u,
        poles: &poles,
        residues: &residues,
        d: d.as_ref(),
        initial: initial.as_ref(),
        segments: args.segments,
        log: matches!(args.poles, Poles::Log(_)),
        sizes,
    })
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) channels: usize,
    /// `S`
    pub(crate) states: usize,
    pub(crate) complex: bool,
}

impl Sizes {
    /// Real numbers in the state of a channel.
    pub(crate) fn components(&self) -> usize {
        self.states * if self.complex { 2 } else { 1 }
    }

    fn state_dims(&self) -> Vec<usize> {
        let mut dims = vec![self.batch, self.channels, self.states];
        dims.extend(self.complex.then_some(2));
        dims
    }
}

impl ModalConv<'_> {
    fn check(&self) -> Result<Sizes> {
        let wrong = |name: &str, expected: String, got: &Tensor| {
            Error::shape(format!("modal_conv: {name}"), expected, got.dims())
        };
        let Ok((batch, length, channels)) = self.u.dims3() else {
            return Err(wrong("u", "[B, L, D]".into(), self.u));
        };
        if !self.u.dtype().is_float() {
            return Err(Error::dtype("modal_conv: u", "a float", self.u.dtype()));
        }
        let complex = matches!(self.poles, Poles::Complex(_));
        let poles = self.poles.tensor();
        let states = match *poles.dims() {
            [d, s, 2] if complex && d == channels && s > 0 => s,
            [d, s] if !complex && d == channels && s > 0 => s,
            _ if complex => {
                return Err(wrong("poles", format!("[D, S, 2] = [{channels}, S >= 1, 2]"), poles));
            }
            _ => return Err(wrong("poles", format!("[D, S] = [{channels}, S >= 1]"), poles)),
        };
        if self.residues.dims() != poles.dims() {
            let expected = format!("{:?}, as the poles", poles.dims());
            return Err(wrong("residues", expected, self.residues));
        }
        for (name, tensor) in [("poles", poles), ("residues", self.residues)] {
            if !matches!(tensor.dtype(), DType::F32 | DType::F64) {
                return Err(Error::dtype(format!("modal_conv: {name}"), "f32 or f64", tensor.dtype()));
            }
        }
        if let Some(d) = self.d.filter(|d| d.dims() != [channels]) {
            return Err(wrong("d", format!("[D] = [{channels}]"), d));
        }
        let sizes = Sizes { batch, length, channels, states, complex };
        let dims = sizes.state_dims();
        if let Some(state) = self.initial_state.filter(|state| state.dims() != dims) {
            let symbols = if complex { "[B, D, S, 2]" } else { "[B, D, S]" };
            return Err(wrong("initial_state", format!("{symbols} = {dims:?}"), state));
        }
        if let Some(segments) = self.segments {
            segments.check("modal_conv", batch, length)?;
        }
        Ok(sizes)
    }
}
