//! AdamW with wide moments and master weights, in parameter groups.

use super::gradients::{Gradients, Mutable, part, part_mut};
use super::kernels;
use crate::backend::cpu::simd::Element;
use crate::ops::accumulation_dtype;
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor, Var};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The constants of [`AdamW`]; the learning rate comes with every step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay of the first moment. Default 0.9.
    #[serde(with = "super::exact")]
    pub beta1: f64,
    /// Decay of the second moment. Default 0.95.
    #[serde(with = "super::exact")]
    pub beta2: f64,
    /// Added to the root of the second moment. Default 1e-8.
    #[serde(with = "super::exact")]
    pub epsilon: f64,
    /// Weight decay of the groups that name none of their own. Default 0.1.
    #[serde(with = "super::exact")]
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamWConfig {
    fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f64, fits: bool, expected: &str| {
            if fits { Ok(()) } else { Err(Error::value(format!("AdamW: {name}"), expected, value)) }
        };
        check("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "from 0, below 1")?;
        check("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "from 0, below 1")?;
        check("epsilon", self.epsilon, self.epsilon > 0.0 && self.epsilon.is_finite(), "above 0")?;
        let decay = self.weight_decay;
        check("weight_decay", decay, decay >= 0.0 && decay.is_finite(), "at least 0")
    }
}

/// How one parameter is treated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Factor of the learning rate.
    #[serde(with = "super::exact")]
    pub rate: f64,
    /// Factor of [`AdamWConfig::weight_decay`].
    #[serde(with = "super::exact")]
    pub decay: f64,
}

impl Group {
    /// The usual treatment of the parameter `name`: full learning rate; weight decay for matrices and convolution
    /// kernels, none for biases, norms and other vectors, and none for the parameters of a recurrence (`A_log`, `D`,
    /// `dt_bias`), whose size is a time scale rather than a strength.
    pub fn usual(name: &str, parameter: &Tensor) -> Self {
        let last = name.rsplit('.').next().unwrap_or(name);
        let recurrent = matches!(last, "A_log" | "D" | "dt_bias");
        let decays = parameter.rank() >= 2 && !recurrent && last != "bias" && !name.contains("norm");
        Self { rate: 1.0, decay: if decays { 1.0 } else { 0.0 } }
    }
}

/// AdamW (Loshchilov & Hutter 2019): Adam with weight decay apart from the gradient.
///
/// With `g` the gradient, `t` the steps so far (this one included), `r` the learning rate times the group's factor:
///
/// ```text
/// m = beta1 m + (1 - beta1) g
/// v = beta2 v + (1 - beta2) g^2
/// w = (1 - r decay) w - r (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
/// ```
///
/// `m`, `v` and `w` are f32 (f64 for f64 parameters) whatever the parameter's dtype: bf16 and f16 parameters have a
/// master copy, which they are rounded from after each step. On the CPU a step is one pass over the memory of each
/// parameter. A parameter that got no gradient keeps its value and moments.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    parameters: BTreeMap<String, Parameter>,
    steps: u64,
}

#[derive(Debug)]
struct Parameter {
    variable: Var,
    group: Group,
    memory: Memory,
}

/// Moments and master weights: plain memory on the CPU, tensors elsewhere.
#[derive(Debug)]
enum Memory {
    F32(Buffers<f32>),
    F64(Buffers<f64>),
    Device { first: Tensor, second: Tensor, master: Tensor },
}

#[derive(Debug)]
struct Buffers<T> {
    first: Vec<T>,
    second: Vec<T>,
    /// Empty where the parameter itself is as wide.
    master: Vec<T>,
}

impl Memory {
    fn new(variable: &Var) -> Result<Self> {
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
        let master = variable.detach().to_dtype(accumulation_dtype(variable.dtype()))?.copy()?;
        Ok(Self::Device { first: master.zeros_like()?, second: master.zeros_like()?, master })
    }
}

impl AdamW {
    /// An optimiser of `variables` in their [usual groups](Group::usual).
    ///
    /// # Errors
    /// A constant outside its range, a parameter that is not a float.
    pub fn new(variables: &BTreeMap<String, Var>, config: AdamWConfig) -> Result<Self> {
        Self::with_groups(variables, config, Group::usual)
    }

    /// An optimiser of `variables`, each in the group that `group` says by name and value.
    ///
    /// # Errors
    /// As [`AdamW::new`]; and a group with a factor that is negative or no number.
    pub fn with_groups(
        variables: &BTreeMap<String, Var>,
        config: AdamWConfig,
        group: impl Fn(&str, &Tensor) -> Group,
    ) -> Result<Self> {
        config.validate()?;
        let parameter = |(name, variable): (&String, &Var)| {
            let group = group(name, variable);
            for factor in [group.rate, group.decay] {
                if !(factor >= 0.0 && factor.is_finite()) {
                    return Err(Error::value(format!("AdamW: group of {name}"), "factors from 0", factor));
                }
            }
            let memory = Memory::new(variable)?;
            Ok((name.clone(), Parameter { variable: variable.clone(), group, memory }))
        };
        let parameters = variables.iter().map(parameter).collect::<Result<_>>()?;
        Ok(Self { config, parameters, steps: 0 })
    }

    /// The constants.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// The steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The group of every parameter.
    pub fn groups(&self) -> BTreeMap<String, Group> {
        self.parameters.iter().map(|(name, p)| (name.clone(), p.group.clone())).collect()
    }

    /// One step against `gradients`.
    ///
    /// # Errors
    /// A gradient of another shape than its parameter. Gradients are not checked for NaN:
    /// [`Gradients::clip`] and [`Gradients::norm`] tell.
    pub fn step(&mut self, gradients: &Gradients, learning_rate: f64) -> Result<()> {
        for (name, parameter) in &self.parameters {
            if let Some((gradient, _)) = gradients.unscaled(name)
                && gradient.shape() != parameter.variable.shape()
            {
                let expected = format!("{:?}", parameter.variable.dims());
                return Err(Error::shape(format!("gradient of {name}"), expected, gradient.dims()));
            }
        }
        self.steps += 1;
        let steps = self.steps as f64;
        let config = &self.config;
        for (name, parameter) in &mut self.parameters {
            let Some((gradient, gradient_scale)) = gradients.unscaled(name) else { continue };
            let rate = learning_rate * parameter.group.rate;
            let step = kernels::Step {
                gradient_scale,
                beta1: config.beta1,
                beta2: config.beta2,
                epsilon: config.epsilon,
                keep: 1.0 - rate * config.weight_decay * parameter.group.decay,
                size: rate / (1.0 - config.beta1.powf(steps)),
                root_scale: 1.0 / (1.0 - config.beta2.powf(steps)).sqrt(),
            };
            parameter.update(gradient, &step)?;
        }
        Ok(())
    }

    /// What a checkpoint needs beside the parameters, by name: `first.NAME`, `second.NAME` and, for parameters narrower
    /// than f32, `master.NAME`.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for (name, parameter) in &self.parameters {
            for (part, tensor) in parameter.tensors()? {
                state.insert(format!("{part}.{name}"), tensor);
            }
        }
        Ok(state)
    }

    /// Puts back a [state](AdamW::state) after `steps` steps. The parameters themselves are loaded apart from it.
    ///
    /// # Errors
    /// A tensor that is missing or of the wrong shape or dtype; nothing is changed then.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, steps: u64) -> Result<()> {
        let mut restored = BTreeMap::new();
        for (name, parameter) in &self.parameters {
            restored.insert(name.clone(), parameter.restored(name, state)?);
        }
        for (name, memory) in restored {
            if let Some(parameter) = self.parameters.get_mut(&name) {
                parameter.memory = memory;
            }
        }
        self.steps = steps;
        Ok(())
    }
}

impl Parameter {
    fn update(&mut self, gradient: &Tensor, step: &kernels::Step) -> Result<()> {
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
                let g = (gradient.to_dtype(master.dtype())? * step.gradient_scale)?;
                *first = ((&*first * step.beta1)? + (&g * (1.0 - step.beta1))?)?;
                *second = ((&*second * step.beta2)? + (g.sqr()? * (1.0 - step.beta2))?)?;
                let divisor = ((second.sqrt()? * step.root_scale)? + step.epsilon)?;
                let narrow = variable.dtype() != master.dtype();
                let weight = if narrow { master.clone() } else { variable.detach() };
                *master = ((weight * step.keep)? - ((&*first / divisor)? * step.size)?)?;
                variable.set(&master.to_dtype(variable.dtype())?.copy()?)?;
            }
        }
        Ok(())
    }

    /// Moments, and the master copy of narrow parameters, as tensors of the parameter's shape.
    fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
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
                let mut all = vec![("first", first.clone()), ("second", second.clone())];
                if self.variable.dtype() != master.dtype() {
                    all.push(("master", master.clone()));
                }
                Ok(all)
            }
        }
    }

    fn restored(&self, name: &str, state: &BTreeMap<String, Tensor>) -> Result<Memory> {
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
                let device = self.variable.device();
                Memory::Device {
                    first: get("first")?.to_device(device)?,
                    second: get("second")?.to_device(device)?,
                    master: if narrow {
                        get("master")?.to_device(device)?
                    } else {
                        self.variable.detach().copy()?
                    },
                }
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
