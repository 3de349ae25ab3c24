//! One parameter of the optimiser: its moments, its master weights, its step.

use super::gradients::{Mutable, part, part_mut};
use super::{Group, kernels};
use crate::backend::cpu::simd::Element;
use crate::ops::accumulation_dtype;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor, Var};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A variable and what the optimiser keeps of it.
#[derive(Debug)]
pub(super) struct Parameter {
    pub(super) variable: Var,
    pub(super) group: Group,
    pub(super) memory: Memory,
}

/// Moments and master weights: plain memory on the CPU, tensors elsewhere.
#[derive(Debug)]
pub(super) enum Memory {
    F32(Buffers<f32>),
    F64(Buffers<f64>),
    /// The master where the parameter itself is narrower.
    Device {
        first: Tensor,
        second: Tensor,
        master: Option<Tensor>,
    },
}

/// Moments and master weights on the CPU.
#[derive(Debug)]
pub(super) struct Buffers<T> {
    first: Vec<T>,
    second: Vec<T>,
    /// Empty where the parameter itself is as wide.
    master: Vec<T>,
}

impl Memory {
    /// Moments of zero.
    pub(super) fn new(variable: &Var) -> Result<Self> {
        let (n, wide) = (variable.elem_count(), accumulation_dtype(variable.dtype()));
        if !variable.device().is_cpu() {
            return Self::on_device(variable);
        }
        Ok(match variable.dtype() {
            DType::F32 => Self::F32(Buffers { first: vec![0.0; n], second: vec![0.0; n], master: vec![] }),
            DType::F64 => Self::F64(Buffers { first: vec![0.0; n], second: vec![0.0; n], master: vec![] }),
            DType::BF16 | DType::F16 => {
                let master = variable.flatten_all()?.to_dtype(wide)?.to_vec1()?;
                Self::F32(Buffers { first: vec![0.0; n], second: vec![0.0; n], master })
            }
            other => return Err(Error::dtype("AdamW: parameter", "f32, f64, bf16 or f16", other)),
        })
    }

    fn on_device(variable: &Var) -> Result<Self> {
        let wide = accumulation_dtype(variable.dtype());
        let zeros = || Tensor::zeros(variable.shape(), wide, variable.device());
        let master = (variable.dtype() != wide).then(|| variable.detach().to_dtype(wide)).transpose()?;
        Ok(Self::Device { first: zeros()?, second: zeros()?, master })
    }
}

impl Parameter {
    /// One step against the gradient.
    pub(super) fn update(&mut self, gradient: &Tensor, step: &kernels::Step) -> Result<()> {
        let variable = &self.variable;
        let gradient = gradient.contiguous()?;
        match &mut self.memory {
            Memory::F32(memory) => {
                variable.inplace_op2(&gradient, &Update { memory: Mutex::new(memory), step })?
            }
            Memory::F64(memory) => {
                variable.inplace_op2(&gradient, &Update { memory: Mutex::new(memory), step })?
            }
            Memory::Device { first, second, master } => {
                let g = (gradient.to_dtype(first.dtype())? * step.gradient_scale)?;
                *first = ((&*first * step.beta1)? + (&g * (1.0 - step.beta1))?)?;
                *second = ((&*second * step.beta2)? + (g.sqr()? * (1.0 - step.beta2))?)?;
                let divisor = ((second.sqrt()? * step.root_scale)? + step.epsilon)?;
                let weight = master.take().unwrap_or_else(|| variable.detach());
                let weight = ((weight * step.keep)? - ((&*first / divisor)? * step.size)?)?;
                variable.set(&weight.to_dtype(variable.dtype())?)?;
                *master = (variable.dtype() != weight.dtype()).then_some(weight);
            }
        }
        Ok(())
    }

    /// Moments, and the master copy of narrow parameters, as tensors of the parameter's shape.
    pub(super) fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        fn tensors<T: Element>(memory: &Buffers<T>, shape: &[usize]) -> Result<Vec<(&'static str, Tensor)>> {
            [("first", &memory.first), ("second", &memory.second), ("master", &memory.master)]
                .into_iter()
                .filter(|(part, data)| *part != "master" || !data.is_empty())
                .map(|(part, data)| Ok((part, Tensor::from_slice(data, shape, &Device::Cpu)?)))
                .collect()
        }
        match &self.memory {
            Memory::F32(memory) => tensors(memory, self.variable.dims()),
            Memory::F64(memory) => tensors(memory, self.variable.dims()),
            Memory::Device { first, second, master } => {
                let all = [("first", Some(first)), ("second", Some(second)), ("master", master.as_ref())];
                // copies: the next step may write these in place
                let own = all.into_iter().filter_map(|(part, x)| Some((part, x?)));
                own.map(|(part, x)| Ok((part, x.copy()?))).collect()
            }
        }
    }

    /// The memory of this parameter in a state of the optimiser.
    pub(super) fn restored(&self, name: &str, state: &BTreeMap<String, Tensor>) -> Result<Memory> {
        let wide = accumulation_dtype(self.variable.dtype());
        let get = |part: &str| {
            let name = format!("{part}.{name}");
            let tensor =
                state.get(&name).ok_or_else(|| Error::value("optimiser state", &name, "no such tensor"))?;
            if tensor.dims() != self.variable.dims() {
                return Err(Error::shape(name, format!("{:?}", self.variable.dims()), tensor.dims()));
            }
            if tensor.dtype() != wide {
                return Err(Error::dtype(name, format!("{wide:?}"), tensor.dtype()));
            }
            Ok(tensor.clone())
        };
        let narrow = self.variable.dtype() != wide;
        fn flat<T: Element>(x: Tensor) -> Result<Vec<T>> {
            Ok(x.flatten_all()?.to_vec1()?)
        }
        Ok(match &self.memory {
            Memory::F32(_) => Memory::F32(Buffers {
                first: flat(get("first")?)?,
                second: flat(get("second")?)?,
                master: if narrow { flat(get("master")?)? } else { vec![] },
            }),
            Memory::F64(_) => Memory::F64(Buffers {
                first: flat(get("first")?)?,
                second: flat(get("second")?)?,
                master: vec![],
            }),
            Memory::Device { .. } => {
                let own =
                    |part| -> Result<Tensor> { Ok(get(part)?.to_device(self.variable.device())?.copy()?) };
                let master = narrow.then(|| own("master")).transpose()?;
                Memory::Device { first: own("first")?, second: own("second")?, master }
            }
        })
    }
}

/// Writes a parameter of the CPU and its memory in one pass.
struct Update<'a, T> {
    memory: Mutex<&'a mut Buffers<T>>,
    step: &'a kernels::Step,
}

impl<T: crate::backend::cpu::simd::Real> Update<'_, T> {
    fn run<E, G>(
        &self,
        weight: (&mut CpuStorage, &Layout),
        gradient: (&CpuStorage, &Layout),
    ) -> candle_core::Result<()>
    where
        E: Mutable + Element<Real = T>,
        G: Element<Real = T>,
    {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Buffers { first, second, master } = &mut **memory;
        let weight = part_mut::<E>(weight.0, weight.1)?;
        let parameter = kernels::Parameter { weight, master, first, second };
        kernels::adamw(parameter, part::<G>(gradient.0, gradient.1)?, self.step);
        Ok(())
    }
}

/// The pairs of dtypes of a parameter and its gradient: the same, or the gradient wider.
macro_rules! update {
    ($t:ty: $($weight:ident $e:ty, $gradient:ident $g:ty);+) => {
        impl InplaceOp2 for Update<'_, $t> {
            fn name(&self) -> &'static str {
                "adamw"
            }
            fn cpu_fwd(
                &self,
                weight: &mut CpuStorage,
                weight_layout: &Layout,
                gradient: &CpuStorage,
                layout: &Layout,
            ) -> candle_core::Result<()> {
                let dtypes = (weight.dtype(), gradient.dtype());
                match dtypes {
                    $((DType::$weight, DType::$gradient) => {
                        self.run::<$e, $g>((weight, weight_layout), (gradient, layout))
                    })+
                    _ => candle_core::bail!("adamw: parameter and gradient of {dtypes:?}"),
                }
            }
        }
    };
}
update!(f32: F32 f32, F32 f32; BF16 bf16, BF16 bf16; BF16 bf16, F32 f32; F16 f16, F16 f16; F16 f16, F32 f32);
update!(f64: F64 f64, F64 f64);
