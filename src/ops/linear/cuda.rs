//! The product in candle's graph on CUDA, by cuBLAS: one node, whose gradients go straight to `x` and the weight, where
//! candle's own nodes for reshaping, transposing and multiplying would add each of them up several times.

use super::{Sizes, output_shape};
use crate::Result;
use crate::autograd::{Gradients, record_all};
use crate::ops::accumulation_dtype;
use candle_core::backend::BackendStorage;
use candle_core::op::{Add, BackpropOp};
use candle_core::{CudaStorage, Storage, Tensor};

/// `x weight^T + bias`, the outputs in parts of `widths`, each a tensor of its own.
pub(super) fn recorded(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sizes: Sizes,
    widths: &[usize],
) -> Result<Vec<Tensor>> {
    let saved = Saved {
        x: x.detach().reshape((sizes.rows, sizes.inputs))?.contiguous()?,
        weight: weight.detach().contiguous()?,
        widths: widths.to_vec(),
    };
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let mut outputs = vec![];
    for (start, width) in saved.parts() {
        let bias = bias.as_ref().map(|bias| bias.detach().narrow(0, start, width)).transpose()?;
        let y = product(&saved.x, &saved.weight.narrow(0, start, width)?.t()?)?;
        let y = match bias {
            Some(bias) => plus(y, &bias, sizes.rows)?,
            None => y,
        };
        outputs.push((Storage::Cuda(y), output_shape(x, width)));
    }
    let mut inputs = vec![x, weight];
    inputs.extend(bias.as_ref());
    let wanted: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    let shape = x.shape().clone();
    let outputs = record_all("linear", &inputs, outputs, move |gradients| {
        let mut gradients = saved.backward(gradients, &wanted)?;
        if let Some(dx) = &mut gradients[0] {
            *dx = dx.reshape(&shape)?;
        }
        Ok(gradients)
    })?;
    Ok(outputs)
}

struct Saved {
    /// `[R, in]`
    x: Tensor,
    weight: Tensor,
    widths: Vec<usize>,
}

impl Saved {
    /// The first output of every part, and how many it has.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        self.widths.iter().scan(0, |next, &width| {
            *next += width;
            Some((*next - width, width))
        })
    }

    fn backward(&self, gradients: &[Option<Tensor>], wanted: &[bool]) -> candle_core::Result<Gradients> {
        let rows = self.x.dim(0)?;
        let mut dx: Option<Tensor> = None;
        let (mut dweight, mut dbias) = (vec![], vec![]);
        for ((start, width), dy) in self.parts().zip(gradients) {
            let dy = match dy {
                Some(dy) => dy.reshape((rows, width))?.contiguous()?,
                None => Tensor::zeros((rows, width), self.x.dtype(), self.x.device())?,
            };
            if wanted[0] {
                let part = tensor(product(&dy, &self.weight.narrow(0, start, width)?)?, self.x.dims());
                dx = Some(match dx {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
            if wanted[1] {
                dweight.push(tensor(product(&dy.t()?, &self.x)?, &[width, self.weight.dim(1)?]));
            }
            if wanted.get(2) == Some(&true) {
                let wide = dy.to_dtype(accumulation_dtype(dy.dtype()))?;
                dbias.push(wide.sum(0)?.to_dtype(dy.dtype())?);
            }
        }
        let joined = |mut parts: Vec<Tensor>| match parts.len() {
            0 | 1 => Ok(parts.pop()),
            _ => Tensor::cat(&parts, 0).map(Some),
        };
        let mut all = vec![dx, joined(dweight)?];
        if wanted.len() > 2 {
            all.push(joined(dbias)?);
        }
        Ok(all)
    }
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
