//! The products on the CPU, forward and backward.

use super::parts::Products;
use super::{Path, Sizes, few_rows, many_rows, path};
use crate::autograd::Gradients;
use crate::backend::cpu::matrix::{Held, Matrix, as_matrix};
use crate::backend::cpu::simd::{Element, Real};
use crate::backend::cpu::view::{storage, tensor};
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};

/// The products of tensors of `dtype`.
pub(super) fn products(dtype: DType) -> Result<Products> {
    Ok(match dtype {
        DType::F32 => Products { forward: forward::<f32>, backward: backward::<f32> },
        DType::F64 => Products { forward: forward::<f64>, backward: backward::<f64> },
        DType::BF16 => Products { forward: forward::<bf16>, backward: backward::<bf16> },
        DType::F16 => Products { forward: forward::<f16>, backward: backward::<f16> },
        other => return Err(Error::dtype("linear: x", "f32, f64, bf16 or f16", other)),
    })
}

fn forward<E: Element>(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, sizes: Sizes) -> Result<Storage> {
    let path = path(sizes.rows);
    let few = path == Path::FewRows;
    let x = as_matrix(x)?;
    let weight = if few && weight.stride()[1] != 1 { weight.contiguous()? } else { weight.clone() };
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let (x, weight, bias) = (Held::new(&x), Held::new(&weight), bias.as_ref().map(Held::new));
    let bias = bias.as_ref().map(Held::matrix::<E>).transpose()?;
    let bias = bias.map(|bias| bias.row(0));
    let (x, weight) = (x.matrix::<E>()?, weight.matrix::<E>()?);
    let y = match path {
        Path::FewRows => few_rows::product(x, weight, bias, sizes),
        Path::ManyRows => many_rows::product(x, weight.transposed(), bias),
    };
    Ok(Storage::Cpu(storage(y)))
}

fn backward<E: Element>(dy: &Tensor, x: &Tensor, weight: &Tensor, wanted: &[bool]) -> Result<Gradients> {
    let dims = x.dims();
    let (dy, x) = (as_matrix(dy)?, as_matrix(x)?);
    let held = [Held::new(&dy), Held::new(&x), Held::new(weight)];
    let (dy, x, w) = (held[0].matrix::<E>()?, held[1].matrix::<E>()?, held[2].matrix::<E>()?);
    let mut gradients = vec![None; wanted.len()];
    if wanted[0] {
        gradients[0] = Some(tensor(many_rows::product(dy, w, None), dims));
    }
    if wanted[1] {
        gradients[1] = Some(tensor(many_rows::product(dy.transposed(), x, None), weight.dims()));
    }
    if wanted.get(2) == Some(&true) {
        let sums = column_sums(dy).into_iter().map(E::narrow).collect::<Vec<_>>();
        gradients[2] = Some(tensor(sums, dy.dims[1]));
    }
    Ok(gradients)
}

fn column_sums<E: Element>(matrix: Matrix<E>) -> Vec<E::Real> {
    let [rows, columns] = matrix.dims;
    let mut sums = vec![E::Real::ZERO; columns];
    for r in 0..rows {
        sums.iter_mut().enumerate().for_each(|(i, sum)| *sum += matrix.at(r, i).widen());
    }
    sums
}
