//! The feed-forward layer of a block, gated or plain.

use super::norm::{NormConfig, NormLayer};
use super::parameter::{Reader, check_sizes, fan_in_uniform};
use super::{Linear, Parameter};
use crate::ops::{Activation, activate, gate};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use rand::Rng;
use serde::{Deserialize, Serialize};

/// Where the gate of an [`Mlp`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpGate {
    /// There is none: `fc2(act(fc1(x)))`.
    None,
    /// The second half of `fc1`'s output.
    Joint,
    /// A projection of its own, `gate`.
    Separate,
}

/// The sizes and options of an [`Mlp`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpConfig {
    /// Width of input and output, `D`.
    pub d_model: usize,
    /// Width inside, `I`.
    pub d_intermediate: usize,
    /// The activation, of the gate where there is one.
    pub activation: Activation,
    /// The gate.
    pub gate: MlpGate,
    /// Biases on all projections.
    pub bias: bool,
    /// A norm before `fc2`, as sub-layer norm has it.
    pub inner_norm: Option<NormConfig>,
}

impl MlpConfig {
    /// The gated layer of Mamba models: SiLU, one projection for value and gate, no biases.
    pub fn joint(d_model: usize, d_intermediate: usize) -> Self {
        let (activation, gate) = (Activation::Silu, MlpGate::Joint);
        Self { d_model, d_intermediate, activation, gate, bias: false, inner_norm: None }
    }

    /// A gated layer with a projection for the gate, no biases.
    pub fn gated(d_model: usize, d_intermediate: usize, activation: Activation) -> Self {
        Self { activation, gate: MlpGate::Separate, ..Self::joint(d_model, d_intermediate) }
    }

    /// Its parameters: `fc1` `[I, D]` (`[2 I, D]` where it makes the gate too), `gate` `[I, D]`, `norm` `[I]`,
    /// `fc2` `[D, I]`.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (d, i) = (self.d_model, self.d_intermediate);
        let rows = if self.gate == MlpGate::Joint { i.saturating_mul(2) } else { i };
        let mut all = Linear::parameters("fc1", rows, d, self.bias);
        if self.gate == MlpGate::Separate {
            all.extend(Linear::parameters("gate", i, d, self.bias));
        }
        if let Some(norm) = &self.inner_norm {
            all.extend(norm.parameters(i).into_iter().map(|p| p.under("norm")));
        }
        all.extend(Linear::parameters("fc2", d, i, self.bias));
        all
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// A zero, an epsilon out of range, or sizes beyond any memory, by name.
    pub fn validate(&self) -> Result<()> {
        for (name, size) in [("d_model", self.d_model), ("d_intermediate", self.d_intermediate)] {
            if size == 0 || size > u32::MAX as usize {
                return Err(Error::value(format!("mlp: {name}"), "1 to 2^32 - 1", size));
            }
        }
        if let Some(norm) = &self.inner_norm {
            norm.validate("mlp: inner_norm")?;
        }
        check_sizes(&self.parameters())
    }
}

/// `fc2(norm(value act(gate)))`; see [`MlpGate`] for where value and gate come from, the norm being optional.
///
/// Sources: `GatedMLP` of the package mamba-ssm (joint), the gated linear unit of torchscale (separate), and the
/// feed-forward layer of the Transformer (none).
#[derive(Clone, Debug)]
pub struct Mlp {
    config: MlpConfig,
    fc1: Linear,
    gate: Option<Linear>,
    norm: Option<NormLayer>,
    fc2: Linear,
}

/// What [`Mlp::forward`] computes with, for a kernel that does the same: a first projection of one or two parts of width
/// `inner`, by as many layers or by one for both, and a second one.
#[cfg(feature = "cuda")]
pub(crate) struct Projections<'a> {
    pub(crate) first: Vec<&'a Linear>,
    pub(crate) parts: usize,
    pub(crate) inner: usize,
    pub(crate) activation: Activation,
    pub(crate) second: &'a Linear,
}

impl Mlp {
    /// None where there is a norm between the two.
    #[cfg(feature = "cuda")]
    pub(crate) fn projections(&self) -> Option<Projections<'_>> {
        let c = &self.config;
        self.norm.is_none().then(|| Projections {
            first: [Some(&self.fc1), self.gate.as_ref()].into_iter().flatten().collect(),
            parts: if c.gate == MlpGate::None { 1 } else { 2 },
            inner: c.d_intermediate,
            activation: c.activation,
            second: &self.fc2,
        })
    }

    /// Reads the parameters that [`MlpConfig::parameters`] lists.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn new(config: &MlpConfig, vb: VarBuilder) -> Result<Self> {
        let read = Reader::new(config.parameters(), vb.clone());
        let separate = config.gate == MlpGate::Separate;
        let norm = |norm: &NormConfig| NormLayer::new(norm, config.d_intermediate, vb.pp("norm"));
        Ok(Self {
            config: *config,
            fc1: Linear::read(&read, "fc1")?,
            gate: separate.then(|| Linear::read(&read, "gate")).transpose()?,
            norm: config.inner_norm.as_ref().map(norm).transpose()?,
            fc2: Linear::read(&read, "fc2")?,
        })
    }

    /// The published initialisation by parameter name, f32 on the CPU: uniform in `±fan_in^-1/2`, biases zero, `fc2`
    /// scaled by `residual_scale` (the square root of one over the number of residual sums in the model).
    ///
    /// # Errors
    /// Sizes that cannot be allocated.
    pub fn init(
        config: &MlpConfig,
        rng: &mut impl Rng,
        residual_scale: f64,
    ) -> Result<Vec<(String, Tensor)>> {
        let mut all = vec![];
        for parameter in config.parameters() {
            let shape = &parameter.shape;
            let tensor = match parameter.name.as_str() {
                "norm.weight" => super::parameter::filled(shape, |_| 1.0)?,
                name if name.ends_with("bias") => super::parameter::filled(shape, |_| 0.0)?,
                "fc2.weight" => fan_in_uniform(rng, shape, residual_scale)?,
                _ => fan_in_uniform(rng, shape, 1.0)?,
            };
            all.push((parameter.name, tensor));
        }
        Ok(all)
    }

    /// `[B, L, D]` to `[B, L, D]`; differentiable in `x` and the parameters.
    ///
    /// # Errors
    /// Another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let activation = self.config.activation;
        let inner = match (&self.gate, self.config.gate) {
            (Some(separate), _) => gate(&self.fc1.forward(x)?, &separate.forward(x)?, activation)?,
            (None, MlpGate::Joint) => {
                let half = self.fc1.weight.dim(0)? / 2;
                let [first, second] = self.fc1.forward_parts(x, [half; 2])?;
                gate(&first, &second, activation)?
            }
            (None, _) => activate(&self.fc1.forward(x)?, activation)?,
        };
        let inner = match &self.norm {
            Some(norm) => norm.forward(&inner)?,
            None => inner,
        };
        self.fc2.forward(&inner)
    }
}
