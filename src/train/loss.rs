//! The loss of next-token prediction.

use super::kernels;
use crate::backend::cpu::simd::Element;
use crate::backend::cpu::view::{Held, storage, with_unit_stride};
use crate::ops::accumulation_dtype;
use crate::{Error, Result, autograd};
use candle_core::{CpuStorage, D, DType, Shape, Storage, Tensor};
use half::{bf16, f16};
use std::sync::Arc;

/// The target of a token that has none: it adds nothing to the loss and gets no gradient.
pub const IGNORE: u32 = u32::MAX;

/// The result of [`cross_entropy`].
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// The sum over all targets of `-log p(target)`, in nats: a scalar, f32 (f64 for f64 logits), differentiable.
    pub total: Tensor,
    /// How many targets were not ignored.
    pub targets: usize,
}

impl CrossEntropy {
    /// The mean over the targets.
    ///
    /// # Errors
    /// Every target was ignored.
    pub fn mean(&self) -> Result<Tensor> {
        if self.targets == 0 {
            return Err(Error::value("cross_entropy: targets", "at least one that is not ignored", 0));
        }
        Ok((&self.total / self.targets as f64)?)
    }
}

/// Cross-entropy of `logits` `[.., V]` (any float dtype) and `targets` `[..]` (u32, [`IGNORE`] for none).
///
/// ```text
/// total = sum_t log(sum_v exp(logits[t, v])) - logits[t, targets[t]]
/// d total / d logits[t, v] = softmax(logits[t])[v] - [v = targets[t]]
/// ```
///
/// Computed in f32 (f64 for f64 logits) after the row's maximum is taken off; the sums are f64. Between the passes only
/// one number a token is kept beside the logits: the backward pass makes the softmax again, straight into the gradient.
/// CUDA has kernels for f32, bf16 and f16 that do the same, a row's sum in f32; elsewhere tensor operations do.
///
/// # Errors
/// Shapes that do not fit, another dtype, a target outside the vocabulary.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<CrossEntropy> {
    let Some((&vocabulary, rows)) = logits.dims().split_last() else {
        return Err(Error::shape("cross_entropy: logits", "[.., V]", logits.dims()));
    };
    let ids = check_targets(targets, rows, vocabulary)?;
    let count = ids.iter().filter(|&&id| id != IGNORE).count();
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(total) = super::cuda::cross_entropy(logits, &ids)?
    {
        return Ok(CrossEntropy { total, targets: count });
    }
    if !logits.device().is_cpu() {
        return Ok(CrossEntropy { total: composed(logits, targets, &ids)?, targets: count });
    }
    let total = match logits.dtype() {
        DType::F32 => recorded::<f32>(logits, ids, vocabulary)?,
        DType::F64 => recorded::<f64>(logits, ids, vocabulary)?,
        DType::BF16 => recorded::<bf16>(logits, ids, vocabulary)?,
        DType::F16 => recorded::<f16>(logits, ids, vocabulary)?,
        other => return Err(Error::dtype("cross_entropy: logits", "f32, f64, bf16 or f16", other)),
    };
    Ok(CrossEntropy { total, targets: count })
}

/// The targets of logits `[rows.., vocabulary]`, in order.
pub(super) fn check_targets(targets: &Tensor, rows: &[usize], vocabulary: usize) -> Result<Vec<u32>> {
    if rows != targets.dims() {
        return Err(Error::shape("cross_entropy: targets", format!("[..] = {rows:?}"), targets.dims()));
    }
    if targets.dtype() != DType::U32 {
        return Err(Error::dtype("cross_entropy: targets", "u32", targets.dtype()));
    }
    let ids = targets.flatten_all()?.to_vec1::<u32>()?;
    match ids.iter().find(|&&id| id != IGNORE && id as usize >= vocabulary) {
        None => Ok(ids),
        Some(id) => {
            Err(Error::value("cross_entropy: target", format!("below V = {vocabulary}, or IGNORE"), id))
        }
    }
}

/// The CPU form: one pass for the logarithms, one in the backward pass for the gradient.
fn recorded<E: Element>(logits: &Tensor, targets: Vec<u32>, vocabulary: usize) -> Result<Tensor> {
    let shape = logits.shape().clone();
    // rows over one leading dimension; a slice of a padded vocabulary is read where it lies
    let rows = match logits.rank() {
        2 => logits.detach(),
        _ => logits.detach().reshape((targets.len(), vocabulary))?,
    };
    let rows = with_unit_stride(&rows)?;
    let (log_sums, total) = {
        let held = Held::new(&rows);
        kernels::log_sum_exp::<E>(held.rows()?, &targets)
    };
    let scalar = match accumulation_dtype(logits.dtype()) {
        DType::F64 => CpuStorage::F64(vec![total]),
        _ => CpuStorage::F32(vec![total as f32]),
    };
    let (log_sums, targets) = (Arc::new(log_sums), Arc::new(targets));
    let outputs = [(Storage::Cpu(scalar), Shape::from(()))];
    let [loss] = autograd::record("cross_entropy", &[logits], outputs, move |[gradient]| {
        let Some(gradient) = gradient else { return Ok(vec![None]) };
        let scale = gradient.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let held = Held::new(&rows);
        let data = kernels::softmax_less_target::<E>(held.rows()?, &log_sums, &targets, scale);
        let plain = candle_core::op::BackpropOp::none();
        Ok(vec![Some(Tensor::from_storage(Storage::Cpu(storage(data)), shape.clone(), plain, false))])
    })?;
    Ok(loss)
}

/// The same in tensor operations, for other devices.
fn composed(logits: &Tensor, targets: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let x = logits.to_dtype(accumulation_dtype(logits.dtype()))?;
    let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    let log_sums = x.exp()?.sum(D::Minus1)?.log()?;
    let chosen: Vec<u32> = ids.iter().map(|&id| if id == IGNORE { 0 } else { id }).collect();
    let counted: Vec<f32> = ids.iter().map(|&id| if id == IGNORE { 0.0 } else { 1.0 }).collect();
    let device = logits.device();
    let chosen = Tensor::from_vec(chosen, targets.shape(), device)?.unsqueeze(D::Minus1)?;
    let counted = Tensor::from_vec(counted, targets.shape(), device)?.to_dtype(x.dtype())?;
    let chosen = x.contiguous()?.gather(&chosen, D::Minus1)?.squeeze(D::Minus1)?;
    Ok(((log_sums - chosen)? * counted)?.sum_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn the_two_forms_agree() {
        let logits = Var::randn(0f64, 3.0, (2, 5, 7), &Device::Cpu).unwrap();
        let targets = Tensor::new(&[[0u32, 6, IGNORE, 3, 3], [IGNORE, 1, 2, 5, 4]], &Device::Cpu).unwrap();
        let fast = cross_entropy(&logits, &targets).unwrap().total;
        let slow = composed(&logits, &targets, &check_targets(&targets, &[2, 5], 7).unwrap()).unwrap();
        let value = |x: &Tensor| x.to_scalar::<f64>().unwrap();
        assert!((value(&fast) - value(&slow)).abs() < 1e-12 * value(&slow));
        let gradient = |loss: Tensor| loss.backward().unwrap().get(&logits).unwrap().clone();
        let difference = (gradient(fast) - gradient(slow)).unwrap().abs().unwrap().max_all().unwrap();
        assert!(value(&difference) < 1e-13);
    }
}
