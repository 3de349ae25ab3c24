//! The products on CUDA, by cuBLAS. As one node their gradients go straight to `x` and the weight, where candle's own nodes
//! for reshaping, transposing and multiplying would add each of them up several times.

use super::Sizes;
use super::parts::Products;
use crate::Result;
use crate::autograd::Gradients;
use crate::ops::accumulation_dtype;
use candle_core::backend::BackendStorage;
use candle_core::op::{Add, BackpropOp};
use candle_core::{CudaStorage, Storage, Tensor};

pub(super) const PRODUCTS: Products = Products { forward, backward };

fn forward(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, sizes: Sizes) -> Result<Storage> {
    let x = x.reshape((sizes.rows, sizes.inputs))?.contiguous()?;
    let y = product(&x, &weight.contiguous()?.t()?)?;
    Ok(Storage::Cuda(match bias {
        Some(bias) => plus(y, &bias.contiguous()?, sizes.rows)?,
        None => y,
    }))
}

fn backward(dy: &Tensor, x: &Tensor, weight: &Tensor, wanted: &[bool]) -> Result<Gradients> {
    let (outputs, inputs) = weight.dims2()?;
    let rows = x.elem_count() / inputs;
    let dy = dy.reshape((rows, outputs))?.contiguous()?;
    let mut gradients = vec![None; wanted.len()];
    if wanted[0] {
        gradients[0] = Some(tensor(product(&dy, &weight.contiguous()?)?, x.dims()));
    }
    if wanted[1] {
        let x = x.reshape((rows, inputs))?.contiguous()?;
        gradients[1] = Some(tensor(product(&dy.t()?, &x)?, &[outputs, inputs]));
    }
    if wanted.get(2) == Some(&true) {
        let wide = dy.to_dtype(accumulation_dtype(dy.dtype()))?;
        gradients[2] = Some(wide.sum(0)?.to_dtype(dy.dtype())?);
    }
    Ok(gradients)
}

fn tensor(storage: CudaStorage, dims: &[usize]) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), dims, BackpropOp::none(), false)
}

/// `a b` of two matrices.
fn product(a: &Tensor, b: &Tensor) -> candle_core::Result<CudaStorage> {
    let ((m, k), n) = (a.dims2()?, b.dim(1)?);
    let ((a, a_layout), (b, b_layout)) = (a.storage_and_layout(), b.storage_and_layout());
    match (&*a, &*b) {
        (Storage::Cuda(a), Storage::Cuda(b)) => a.matmul(b, (1, m, n, k), a_layout, b_layout),
        _ => candle_core::bail!("linear: expected x and weight on one CUDA device"),
    }
}

/// `y + bias` in every row.
fn plus(y: CudaStorage, bias: &Tensor, rows: usize) -> candle_core::Result<CudaStorage> {
    let layout = candle_core::Layout::contiguous((rows, bias.elem_count()));
    let (bias, own) = (bias.broadcast_as(layout.shape())?, layout.clone());
    let (storage, layout) = bias.storage_and_layout();
    match &*storage {
        Storage::Cuda(bias) => y.binary_impl::<Add>(bias, &own, layout),
        _ => candle_core::bail!("linear: expected x and bias on one CUDA device"),
    }
}
