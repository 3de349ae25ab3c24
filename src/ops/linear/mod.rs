//! The product with a weight matrix, which most of a model's time goes into.
//!
//! With `x` of `R` rows (all dimensions but the last taken together), `weight` as checkpoints hold it,
//!
//! ```text
//! y[r, o] = bias[o] + sum_i weight[o, i] x[r, i]
//! ```

mod reference;

pub use reference::linear_reference;

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::{Shape, Tensor};

/// `x weight^T + bias`: `x` `[.., in]`, `weight` `[out, in]`, `bias` `[out]`, the result `[.., out]`; see the
/// [module](self).
///
/// Any float dtype, the same for all; sums run in f32 (f64 for f64) and are rounded once. Differentiable in all three.
/// On the CPU the rows of `x` may lie apart, as those of a slice of a projection do: they are not copied.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_reference(x, weight, bias)
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) rows: usize,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Sizes> {
    let (inputs, rows) = match x.dims() {
        [outer @ .., inputs] => (*inputs, outer.iter().product()),
        [] => return Err(Error::shape("linear: x", "[.., in]", &[])),
    };
    let outputs = match *weight.dims() {
        [outputs, width] if width == inputs => outputs,
        _ => {
            return Err(Error::shape(
                "linear: weight",
                format!("[out, in] = [out, {inputs}]"),
                weight.dims(),
            ));
        }
    };
    let dtype = x.dtype();
    if !dtype.is_float() {
        return Err(Error::dtype("linear: x", "a float", dtype));
    }
    if weight.dtype() != dtype {
        return Err(Error::dtype("linear: weight", format!("{dtype:?}, as x has"), weight.dtype()));
    }
    if let Some(bias) = bias {
        if bias.dims() != [outputs] {
            return Err(Error::shape("linear: bias", format!("[out] = [{outputs}]"), bias.dims()));
        }
        if bias.dtype() != dtype {
            return Err(Error::dtype("linear: bias", format!("{dtype:?}, as x has"), bias.dtype()));
        }
    }
    Ok(Sizes { rows, inputs, outputs })
}

fn output_shape(x: &Tensor, outputs: usize) -> Shape {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    dims.into()
}
