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

#[cfg(feature = "cuda")]
mod cuda;
mod few_rows;
mod grad;
mod many_rows;
mod reference;

pub use reference::linear_reference;

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::{D, Shape, Tensor};

/// `x weight^T + bias`: `x` `[.., in]`, `weight` `[out, in]`, `bias` `[out]`, the result `[.., out]`; see the
/// [module](self).
///
/// Any float dtype, the same for all; sums run in f32 (f64 for f64) and are rounded once. Differentiable in all three.
/// On the CPU the rows of `x` may lie apart, as those of a slice of a projection do: they are not copied.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let sizes = check(x, weight, bias)?;
    #[cfg(feature = "cuda")]
    if is_trained_on_cuda(x, weight, bias, sizes) {
        let parts = cuda::recorded(x, weight, bias, sizes, &[sizes.outputs])?;
        return <[Tensor; 1]>::try_from(parts).map(|[y]| y).map_err(|parts| parts_lost(parts.len()));
    }
    if !x.device().is_cpu() {
        return linear_reference(x, weight, bias);
    }
    grad::recorded(x, weight, bias, sizes)
}

/// [`linear`] with its outputs in `N` parts of `widths`, which add up to the outputs. On CUDA in training every part has
/// memory of its own, and so have their gradients: those of slices would be padded with zeros and added up.
pub(crate) fn linear_parts<const N: usize>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    widths: [usize; N],
) -> Result<[Tensor; N]> {
    let sizes = check(x, weight, bias)?;
    if widths.iter().sum::<usize>() != sizes.outputs {
        return Err(Error::value(
            "linear: widths",
            format!("{} in all", sizes.outputs),
            format!("{widths:?}"),
        ));
    }
    #[cfg(feature = "cuda")]
    if is_trained_on_cuda(x, weight, bias, sizes) {
        let parts = cuda::recorded(x, weight, bias, sizes, &widths)?;
        return parts.try_into().map_err(|parts: Vec<Tensor>| parts_lost(parts.len()));
    }
    let y = linear(x, weight, bias)?;
    let mut next = 0;
    let parts = widths.map(|width| {
        next += width;
        y.narrow(D::Minus1, next - width, width)
    });
    let parts = parts.into_iter().collect::<candle_core::Result<Vec<Tensor>>>()?;
    parts.try_into().map_err(|parts: Vec<Tensor>| parts_lost(parts.len()))
}

fn parts_lost(got: usize) -> Error {
    Error::value("linear: parts", "as many as asked for", got)
}

#[cfg(feature = "cuda")]
fn is_trained_on_cuda(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, sizes: Sizes) -> bool {
    let tracked = [Some(x), Some(weight), bias].into_iter().flatten().any(Tensor::track_op);
    x.device().is_cuda() && tracked && sizes.rows * sizes.inputs * sizes.outputs > 0
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
