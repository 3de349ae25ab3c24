//! The product with a weight matrix, which most of a model's time goes into.
//!
//! With `x` of `R` rows (all dimensions but the last taken together), `weight` as checkpoints hold it,
//!
//! ```text
//! y[r, o] = bias[o] + sum_i weight[o, i] x[r, i]
//! ```
//!
//! # Cost on the CPU
//! With few rows (a step of generation) the floor is one read of the weights: `few_rows` streams them through all
//! threads once for up to eight rows, bf16 and f16 widened in registers. With many rows the floor is `2 R in out`
//! operations: `many_rows` gives tiles of the result to the crate gemm, widening tiles of bf16 and f16 to f32 on the
//! way, so that no sum is ever rounded to half precision. How the work is cut depends on the sizes alone: results are
//! the same bits for any number of threads.

mod few_rows;
mod grad;
mod many_rows;
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
    if !x.device().is_cpu() {
        return linear_reference(x, weight, bias);
    }
    let sizes = check(x, weight, bias)?;
    grad::recorded(x, weight, bias, sizes)
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    rows: usize,
    inputs: usize,
    outputs: usize,
}

/// How a call is computed on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    FewRows,
    ManyRows,
}

/// As many rows, and no more, go through the weights directly; beyond, packing the weights pays.
const FEW_ROWS: usize = 16;

fn path(rows: usize) -> Path {
    if rows <= FEW_ROWS { Path::FewRows } else { Path::ManyRows }
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
