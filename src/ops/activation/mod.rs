//! Elementwise functions of any shape: sigmoid, softplus, the activations of feed-forward layers, and gates of them.
//!
//! ```text
//! sigmoid(x)      = 1 / (1 + e^-x)
//! softplus(x)     = log(1 + e^x) = max(x, 0) + log1p(e^-|x|)      no overflow, relative accuracy in both tails
//! silu(x)         = x sigmoid(x)
//! gelu(x)         = x (1 + erf(x / sqrt 2)) / 2                   or, by name, its approximation with tanh
//! relu(x)         = max(x, 0)
//! gate(x, z)      = x act(z)
//! ```
//!
//! Arithmetic is f32 (f64 for f64), rounded once to the dtype of `x`.
//!
//! Sources: softplus, Dugas et al. 2001; SiLU, Elfwing et al. 2017 (also called swish); GELU, Hendrycks & Gimpel 2016;
//! gates, Shazeer 2020.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod reference;

pub use reference::{activate_reference, gate_reference, sigmoid_reference, softplus_reference};

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::Tensor;
use cpu::{Function, on_cpu};
use serde::{Deserialize, Serialize};

/// The activation of a feed-forward layer or a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x sigmoid(x)`, also called swish.
    Silu,
    /// The exact GELU.
    Gelu,
    /// The GELU by its approximation with tanh.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// `x`: a gate is then a plain product.
    Identity,
}

impl Activation {
    /// Its name in configs: `silu`, `gelu`, `gelu_tanh`, `relu` or `identity`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Relu => "relu",
            Self::Identity => "identity",
        }
    }

    /// The one that goes by `name` in the configs of PyTorch's packages, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" | "swish" => Some(Self::Silu),
            "gelu" => Some(Self::Gelu),
            "gelu_tanh" | "gelu_new" | "gelu_pytorch_tanh" => Some(Self::GeluTanh),
            "relu" => Some(Self::Relu),
            "identity" => Some(Self::Identity),
            _ => None,
        }
    }
}

/// `log(1 + e^x)` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    check("softplus", x)?;
    if x.device().is_cpu() { on_cpu(Function::Softplus, x, None) } else { softplus_reference(x) }
}

/// `activation` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    check(activation.name(), x)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = cuda::on_cuda(activation, x, None)?
    {
        return Ok(y);
    }
    if !x.device().is_cpu() {
        return activate_reference(x, activation);
    }
    on_cpu(Function::Activation(activation), x, None)
}

/// `x / (1 + e^-x)` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    activate(x, Activation::Silu)
}

/// `1 / (1 + e^-x)` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    check("sigmoid", x)?;
    if x.device().is_cpu() { on_cpu(Function::Sigmoid, x, None) } else { sigmoid_reference(x) }
}

/// `x activation(z)`, both of one shape and dtype; see the [module](self). Differentiable in both.
///
/// # Errors
/// Shapes or dtypes that differ, or a dtype that is not a float.
pub fn gate(x: &Tensor, z: &Tensor, activation: Activation) -> Result<Tensor> {
    check("gate", x)?;
    if z.dims() != x.dims() {
        return Err(Error::shape("gate: z", format!("{:?}", x.dims()), z.dims()));
    }
    if z.dtype() != x.dtype() {
        return Err(Error::dtype("gate: z", format!("{:?}", x.dtype()), z.dtype()));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = cuda::on_cuda(activation, x, Some(z))?
    {
        return Ok(y);
    }
    if !x.device().is_cpu() {
        return gate_reference(x, z, activation);
    }
    on_cpu(Function::Gate(activation), x, Some(z))
}

/// `x silu(z)`, both of one shape and dtype: [`gate`] with the activation most used.
///
/// # Errors
/// As [`gate`].
pub fn silu_gate(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    gate(x, z, Activation::Silu)
}

fn check(name: &str, x: &Tensor) -> Result<()> {
    if x.dtype().is_float() {
        return Ok(());
    }
    Err(Error::dtype(format!("{name}: x"), "a float", x.dtype()))
}
