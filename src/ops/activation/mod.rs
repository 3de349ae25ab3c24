//! Elementwise functions of any shape: softplus, SiLU, the SiLU gate and sigmoid.
//!
//! ```text
//! sigmoid(x)      = 1 / (1 + e^-x)
//! softplus(x)     = log(1 + e^x) = max(x, 0) + log1p(e^-|x|)      no overflow, relative accuracy in both tails
//! silu(x)         = x sigmoid(x)
//! silu_gate(x, z) = x silu(z)
//! ```
//!
//! Arithmetic is f32 (f64 for f64), rounded once to the dtype of `x`.
//!
//! Sources: softplus, Dugas et al. 2001; SiLU, Elfwing et al. 2017 (also called swish).

mod cpu;
mod reference;

pub use reference::{sigmoid_reference, silu_gate_reference, silu_reference, softplus_reference};

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::Tensor;
use cpu::{Function, on_cpu};

/// `log(1 + e^x)` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn softplus(x: &Tensor) -> Result<Tensor> {
    check("softplus", x)?;
    if x.device().is_cpu() { on_cpu(Function::Softplus, x, None) } else { softplus_reference(x) }
}

/// `x / (1 + e^-x)` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn silu(x: &Tensor) -> Result<Tensor> {
    check("silu", x)?;
    if x.device().is_cpu() { on_cpu(Function::Silu, x, None) } else { silu_reference(x) }
}

/// `1 / (1 + e^-x)` of any shape; see the [module](self). Differentiable.
///
/// # Errors
/// A dtype that is not a float.
pub fn sigmoid(x: &Tensor) -> Result<Tensor> {
    check("sigmoid", x)?;
    if x.device().is_cpu() { on_cpu(Function::Sigmoid, x, None) } else { sigmoid_reference(x) }
}

/// `x silu(z)`, both of one shape and dtype; see the [module](self). Differentiable in both.
///
/// # Errors
/// Shapes or dtypes that differ, or a dtype that is not a float.
pub fn silu_gate(x: &Tensor, z: &Tensor) -> Result<Tensor> {
    check("silu_gate", x)?;
    if z.dims() != x.dims() {
        return Err(Error::shape("silu_gate: z", format!("{:?}", x.dims()), z.dims()));
    }
    if z.dtype() != x.dtype() {
        return Err(Error::dtype("silu_gate: z", format!("{:?}", x.dtype()), z.dtype()));
    }
    if x.device().is_cpu() { on_cpu(Function::SiluGate, x, Some(z)) } else { silu_gate_reference(x, z) }
}

fn check(name: &str, x: &Tensor) -> Result<()> {
    if x.dtype().is_float() {
        return Ok(());
    }
    Err(Error::dtype(format!("{name}: x"), "a float", x.dtype()))
}
