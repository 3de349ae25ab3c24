//! AdamW with wide moments and master weights, in parameter groups.

use super::parameter::{Memory, Parameter};
use super::{Gradients, kernels};
use crate::{Error, Result};
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
/// parameter, on CUDA one launch over all of them. A parameter that got no gradient keeps its value and moments.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    parameters: BTreeMap<String, Parameter>,
    steps: u64,
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
        #[cfg(feature = "cuda")]
        let mut together = super::cuda::Update::default();
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
            #[cfg(feature = "cuda")]
            if let Memory::Device { first, second, master } = &parameter.memory {
                let moments = super::cuda::Moments { first, second, master: master.as_ref() };
                if together.push(&parameter.variable, &moments, gradient, &step)? {
                    continue;
                }
            }
            parameter.update(gradient, &step)?;
        }
        #[cfg(feature = "cuda")]
        together.run()?;
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
