//! The gradients of a model's parameters, by name.

use super::kernels;
use crate::backend::cpu::simd::Element;
use crate::ops::accumulation_dtype;
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Storage, Tensor, Var, backprop::GradStore};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// The gradients of named parameters: what a backward pass gave, or the sum of several.
#[derive(Clone, Debug)]
pub struct Gradients {
    tensors: BTreeMap<String, Tensor>,
    /// What every tensor is still to be multiplied by.
    scale: f64,
    /// Whether the tensors are sums of their own, in f32 or f64, that may be added to in place.
    owned: bool,
}

impl Gradients {
    /// Takes the gradients of `variables` out of a backward pass. A variable without one did not contribute to the
    /// loss, and is left out.
    pub fn take(variables: &BTreeMap<String, Var>, store: &mut GradStore) -> Self {
        let gradient = |(name, var): (&String, &Var)| Some((name.clone(), store.remove(var)?));
        Self { tensors: variables.iter().filter_map(gradient).collect(), scale: 1.0, owned: false }
    }

    /// The gradient of the parameter `name`.
    pub fn get(&self, name: &str) -> Result<Option<Tensor>> {
        let scaled = |x: &Tensor| if self.scale == 1.0 { Ok(x.clone()) } else { x * self.scale };
        Ok(self.tensors.get(name).map(scaled).transpose()?)
    }

    /// The tensor of `name`, and what it is still to be multiplied by.
    pub(super) fn unscaled(&self, name: &str) -> Option<(&Tensor, f64)> {
        Some((self.tensors.get(name)?, self.scale))
    }

    /// Multiplies all gradients by `factor`. Costs nothing: it is applied where they are read.
    pub fn scale(&mut self, factor: f64) {
        self.scale *= factor;
    }

    /// Adds the gradients of another micro-batch, in f32 (f64 for f64 gradients) whatever their dtype.
    pub fn add(&mut self, other: &Gradients) -> Result<()> {
        let sum_of = |x: &Tensor, scale: f64| {
            let wide = x.to_dtype(accumulation_dtype(x.dtype()))?;
            if scale == 1.0 { wide.copy() } else { wide * scale }
        };
        if !self.owned || self.scale != 1.0 {
            for tensor in self.tensors.values_mut() {
                *tensor = sum_of(tensor, self.scale)?;
            }
            (self.owned, self.scale) = (true, 1.0);
        }
        for (name, tensor) in &other.tensors {
            let Some(sum) = self.tensors.get_mut(name) else {
                self.tensors.insert(name.clone(), sum_of(tensor, other.scale)?);
                continue;
            };
            if sum.device().is_cpu() && other.scale == 1.0 {
                sum.inplace_op2(&tensor.contiguous()?, &AddInto)?;
            } else {
                *sum = (&*sum + (tensor.to_dtype(sum.dtype())? * other.scale)?)?;
            }
        }
        Ok(())
    }

    /// The Euclidean norm of all gradients together, summed in f64. NaN or infinite if any element is.
    pub fn norm(&self) -> Result<f64> {
        let all: Vec<&Tensor> = self.tensors.values().collect();
        #[cfg(feature = "cuda")]
        let (together, all): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|tensor| super::cuda::has_kernels(tensor));
        #[cfg(feature = "cuda")]
        let mut sum = super::cuda::sum_of_squares(&together)?;
        #[cfg(not(feature = "cuda"))]
        let mut sum = 0.0;
        for tensor in all {
            sum += sum_of_squares(tensor)?;
        }
        Ok(sum.sqrt() * self.scale.abs())
    }

    /// Scales the gradients so that their [norm](Gradients::norm) is at most `largest`; returns the norm before.
    ///
    /// A norm that is not finite is returned too, and the gradients are left as they are: not to be used.
    ///
    /// # Errors
    /// A `largest` that is not a positive number.
    pub fn clip(&mut self, largest: f64) -> Result<f64> {
        if largest.is_nan() || largest <= 0.0 {
            return Err(Error::value("largest gradient norm", "a number above 0", largest));
        }
        let norm = self.norm()?;
        if norm > largest && norm.is_finite() {
            self.scale(largest / norm);
        }
        Ok(norm)
    }
}

fn sum_of_squares(x: &Tensor) -> Result<f64> {
    if !x.device().is_cpu() {
        let wide = x.to_dtype(accumulation_dtype(x.dtype()))?;
        return Ok(wide.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar()?);
    }
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { return Ok(f64::NAN) };
    fn squares<E: Element>(storage: &CpuStorage, layout: &Layout) -> Result<f64> {
        Ok(kernels::sum_of_squares(part::<E>(storage, layout)?))
    }
    match x.dtype() {
        DType::F32 => squares::<f32>(storage, layout),
        DType::F64 => squares::<f64>(storage, layout),
        DType::BF16 => squares::<bf16>(storage, layout),
        DType::F16 => squares::<f16>(storage, layout),
        other => Err(Error::dtype("gradient", "f32, f64, bf16 or f16", other)),
    }
}

/// The elements of a contiguous tensor.
pub(super) fn part<'a, E: Element>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [E]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&E::cpu_storage_as_slice(storage)?[start..end]),
        None => candle_core::bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// The same, to be written; only f32 and f64, bf16 and f16 have a variant here.
pub(super) fn part_mut<'a, E: Mutable>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> candle_core::Result<&'a mut [E]> {
    match (layout.contiguous_offsets(), E::slice_mut(storage)) {
        (Some((start, end)), Some(data)) => Ok(&mut data[start..end]),
        (None, _) => candle_core::bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
        (_, None) => candle_core::bail!("expected a tensor of {:?}", E::DTYPE),
    }
}

/// Elements whose storage candle lets us write.
pub(super) trait Mutable: Element {
    /// The data of a storage of this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! mutable {
    ($($t:ty, $variant:ident);+) => {$(
        impl Mutable for $t {
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    )+};
}
mutable!(f32, F32; f64, F64; bf16, BF16; f16, F16);

/// Adds the second tensor to the first, which is f32 or f64.
struct AddInto;

impl InplaceOp2 for AddInto {
    fn name(&self) -> &'static str {
        "add-gradient"
    }
    fn cpu_fwd(
        &self,
        sum: &mut CpuStorage,
        sum_layout: &Layout,
        x: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<()> {
        macro_rules! add {
            ($sum:ty, $x:ty) => {
                kernels::add_into(part_mut::<$sum>(sum, sum_layout)?, part::<$x>(x, layout)?)
            };
        }
        match x {
            CpuStorage::F64(_) => add!(f64, f64),
            CpuStorage::F32(_) => add!(f32, f32),
            CpuStorage::BF16(_) => add!(f32, bf16),
            CpuStorage::F16(_) => add!(f32, f16),
            _ => candle_core::bail!("gradients are f32, f64, bf16 or f16"),
        }
        Ok(())
    }
}
