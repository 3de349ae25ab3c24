//! Normalisation over the last dimension: RMS norm and layer norm, plain, fused with a residual sum, or gated.
//!
//! Over each group of `G` neighbouring channels (`G = D` unless grouped), with `E` the mean over the group,
//!
//! ```text
//! RMS norm    n = s / sqrt(E[s^2] + eps)
//!             n = s / (sqrt(E[s^2]) + eps)                with eps outside the root, as StripedHyena has it
//! layer norm  n = (s - E[s]) / sqrt(E[(s - E[s])^2] + eps)
//! y = n * weight + bias
//! ```
//!
//! where `s = x` ([`norm`], [`rms_norm`], [`layer_norm`]), `s = residual + x` ([`add_norm`]), or with a gate `z`
//! ([`gated_norm`]) `s = x SiLU(z)` before the norm, or `s = x` and `y SiLU(z)` after it.
//!
//! Sources: RMS norm, Zhang & Sennrich 2019; layer norm, Ba et al. 2016; grouped and gated as Mamba-2 (Dao & Gu 2024)
//! uses them, `RMSNormGated` of the package mamba-ssm; `RMSNorm` of the package stripedhyena.
//!
//! # Low precision
//! Statistics and products run in f32 (f64 for f64) and the result is rounded once to the dtype of `x`, with one
//! exception: the ungated RMS norm rounds `n` to the dtype of `x` before it is multiplied by `weight`, as transformers
//! does, so that bf16 checkpoints give the same numbers. [`add_norm`] normalises the sum as it is stored.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod grad;
mod reference;

pub use reference::norm_reference;

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::Tensor;

/// Which statistics a norm takes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// The root mean square, `eps` added to its square.
    Rms,
    /// The root mean square, `eps` added to it.
    RmsOutside,
    /// Mean and standard deviation.
    Layer,
}

/// A norm: what all of them have beside their input.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// RMS norm or layer norm.
    pub kind: NormKind,
    /// `[D]`; ones if `None`.
    pub weight: Option<&'a Tensor>,
    /// `[D]`; zeros if `None`.
    pub bias: Option<&'a Tensor>,
    /// Added to the mean square, or to its root.
    pub eps: f64,
    /// Channels that are normalised together, a divisor of `D`; all if `None`.
    pub group_size: Option<usize>,
}

/// What a norm is taken of.
#[derive(Clone, Copy, Debug)]
pub struct NormInput<'a> {
    /// `[.., D]`
    pub x: &'a Tensor,
    /// `[.., D]`, added to `x`; of its dtype or of its accumulation dtype.
    pub residual: Option<&'a Tensor>,
    /// `[.., D]`, the gate, of the dtype of `x`.
    pub z: Option<&'a Tensor>,
    /// Whether the gate is applied to the norm's output (else to its input).
    pub norm_before_gate: bool,
}

/// RMS norm of `x` `[.., D]`; see the [module](self). Weight `[D]`, of any float dtype.
///
/// Returns `[.., D]` in the dtype of `x`. Differentiable in both.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    norm(x, &Norm { kind: NormKind::Rms, weight, bias: None, eps, group_size: None })
}

/// Layer norm of `x` `[.., D]`; see the [module](self). Weight and bias `[D]`, of any float dtype.
///
/// Returns `[.., D]` in the dtype of `x`. Differentiable in all three.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    norm(x, &Norm { kind: NormKind::Layer, weight, bias, eps, group_size: None })
}

/// Any norm of `x` `[.., D]`; see the [module](self).
///
/// Returns `[.., D]` in the dtype of `x`. Differentiable in every tensor.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn norm(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    Ok(run("norm", &NormInput { x, residual: None, z: None, norm_before_gate: false }, norm)?.0)
}

/// The residual stream and its norm in one pass: `(residual + x, norm(residual + x))`; see the [module](self).
///
/// Both are `[.., D]`. The sum has the dtype of `residual`, which may be wider than that of `x` (f32 beside bf16 or
/// f16); the norm has the dtype of `x`. Differentiable in every tensor, through both results.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn add_norm(residual: &Tensor, x: &Tensor, norm: &Norm) -> Result<(Tensor, Tensor)> {
    let input = NormInput { x, residual: Some(residual), z: None, norm_before_gate: false };
    let (y, sum) = run("add_norm", &input, norm)?;
    Ok((sum.ok_or_else(|| Error::value("add_norm", "a sum", "none"))?, y))
}

/// A gated norm: `norm(x) SiLU(z)` if `norm_before_gate`, else `norm(x SiLU(z))`; see the [module](self).
///
/// `x` and `z` are `[.., D]` of one dtype, as is the result. Differentiable in every tensor.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn gated_norm(x: &Tensor, z: &Tensor, norm: &Norm, norm_before_gate: bool) -> Result<Tensor> {
    Ok(run("gated_norm", &NormInput { x, residual: None, z: Some(z), norm_before_gate }, norm)?.0)
}

fn run(name: &'static str, input: &NormInput, norm: &Norm) -> Result<(Tensor, Option<Tensor>)> {
    let group = input.check(name, norm)?;
    #[cfg(feature = "cuda")]
    if input.x.device().is_cuda() {
        let normed = cuda::on_cuda(name, input, norm, group)?;
        return normed.map_or_else(|| norm_reference(input, norm), Ok);
    }
    if !input.x.device().is_cpu() {
        return norm_reference(input, norm);
    }
    grad::on_cpu(name, input, norm, group)
}

impl NormInput<'_> {
    /// The group size.
    fn check(&self, name: &str, norm: &Norm) -> Result<usize> {
        let of = |argument: &str| format!("{name}: {argument}");
        let dtype = self.x.dtype();
        let channels = match self.x.dims().last() {
            Some(&channels) if channels > 0 => channels,
            _ => return Err(Error::shape(of("x"), "[.., D >= 1]", self.x.dims())),
        };
        if !dtype.is_float() {
            return Err(Error::dtype(of("x"), "a float", dtype));
        }
        for (argument, tensor) in [("residual", self.residual), ("z", self.z)] {
            let Some(tensor) = tensor else { continue };
            if tensor.dims() != self.x.dims() {
                let expected = format!("[.., D] = {:?}", self.x.dims());
                return Err(Error::shape(of(argument), expected, tensor.dims()));
            }
            let wide = accumulation_dtype(dtype);
            if tensor.dtype() != dtype && (argument == "z" || tensor.dtype() != wide) {
                let expected =
                    if argument == "z" { format!("{dtype:?}") } else { format!("{dtype:?} or {wide:?}") };
                return Err(Error::dtype(of(argument), expected, tensor.dtype()));
            }
        }
        for (argument, tensor) in [("weight", norm.weight), ("bias", norm.bias)] {
            let Some(tensor) = tensor else { continue };
            if tensor.dims() != [channels] {
                return Err(Error::shape(of(argument), format!("[D] = [{channels}]"), tensor.dims()));
            }
            if !tensor.dtype().is_float() {
                return Err(Error::dtype(of(argument), "a float", tensor.dtype()));
            }
        }
        match norm.group_size.unwrap_or(channels) {
            group if group > 0 && channels % group == 0 => Ok(group),
            group => Err(Error::value(of("group_size"), format!("a divisor of D = {channels}"), group)),
        }
    }
}
