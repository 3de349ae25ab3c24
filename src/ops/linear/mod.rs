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
mod parts;
mod reference;

pub use reference::linear_reference;

use super::accumulation_dtype;
use crate::{Error, Result};
use candle_core::{D, Shape, Tensor};
use parts::Products;

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
    match products(x, weight, bias, sizes)? {
        Some(products) => {
            let [y] = whole(parts::recorded(x, weight, bias, sizes, &[sizes.outputs], products)?)?;
            Ok(y)
        }
        None => linear_reference(x, weight, bias),
    }
}

/// [`linear`] with its outputs in `N` parts of `widths`, which add up to the outputs. In training every part has memory of
/// its own; else they are slices of one product.
pub(crate) fn linear_parts<const N: usize>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    widths: [usize; N],
) -> Result<[Tensor; N]> {
    let sizes = check(x, weight, bias)?;
    if widths.iter().sum::<usize>() != sizes.outputs {
        let expected = format!("{} in all", sizes.outputs);
        return Err(Error::value("linear: widths", expected, format!("{widths:?}")));
    }
    if is_tracked(x, weight, bias)
        && let Some(products) = products(x, weight, bias, sizes)?
    {
        return whole(parts::recorded(x, weight, bias, sizes, &widths, products)?);
    }
    let y = linear(x, weight, bias)?;
    let mut next = 0;
    let slices = widths.map(|width| {
        next += width;
        y.narrow(D::Minus1, next - width, width)
    });
    whole(slices.into_iter().collect::<candle_core::Result<_>>()?)
}

fn whole<const N: usize>(parts: Vec<Tensor>) -> Result<[Tensor; N]> {
    parts.try_into().map_err(|parts: Vec<Tensor>| Error::value("linear: parts", N.to_string(), parts.len()))
}

/// The products of this crate that take a call: all on the CPU, those with gradients on CUDA.
fn products(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, sizes: Sizes) -> Result<Option<Products>> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let empty = sizes.rows * sizes.inputs * sizes.outputs == 0;
        return Ok((is_tracked(x, weight, bias) && !empty).then_some(cuda::PRODUCTS));
    }
    let _ = (weight, bias, sizes);
    x.device().is_cpu().then(|| grad::products(x.dtype())).transpose()
}

fn is_tracked(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> bool {
    [Some(x), Some(weight), bias].into_iter().flatten().any(Tensor::track_op)
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
