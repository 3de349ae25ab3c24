//! The gated feed-forward layer of Mamba models with `d_intermediate > 0`.

use super::Parameter;
use super::parameter::{Reader, fan_in_uniform};
use crate::Result;
use crate::ops::linear;
use crate::ops::silu_gate;
use candle_core::{D, Tensor};
use candle_nn::VarBuilder;
use rand::Rng;

/// The sizes of a [`GatedMlp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatedMlpConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width of each half of `fc1`'s output.
    pub d_intermediate: usize,
}

impl GatedMlpConfig {
    /// Its parameters.
    pub fn parameters(&self) -> Vec<Parameter> {
        let doubled = self.d_intermediate.saturating_mul(2);
        vec![
            Parameter::new("fc1.weight", &[doubled, self.d_model]),
            Parameter::new("fc2.weight", &[self.d_model, self.d_intermediate]),
        ]
    }
}

/// `fc2(value * SiLU(gate))` with `(value, gate)` the halves of `fc1(x)`; no biases.
///
/// Source: `GatedMLP` of the package mamba-ssm.
#[derive(Clone, Debug)]
pub struct GatedMlp {
    fc1: Tensor,
    fc2: Tensor,
}

impl GatedMlp {
    /// Reads `fc1.weight` `[2 I, D]` and `fc2.weight` `[D, I]`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn new(config: &GatedMlpConfig, vb: VarBuilder) -> Result<Self> {
        let read = Reader::new(config.parameters(), vb);
        Ok(Self { fc1: read.get("fc1.weight")?, fc2: read.get("fc2.weight")? })
    }

    /// The published initialisation by parameter name, f32 on the CPU; `fc2` is scaled by `residual_scale`
    /// (the square root of one over the number of residual sums in the model).
    ///
    /// # Errors
    /// Sizes that cannot be allocated.
    pub fn init(
        config: &GatedMlpConfig,
        rng: &mut impl Rng,
        residual_scale: f64,
    ) -> Result<Vec<(String, Tensor)>> {
        let draw = |parameter: Parameter| {
            let scale = if parameter.name == "fc2.weight" { residual_scale } else { 1.0 };
            let tensor = fan_in_uniform(rng, &parameter.shape, scale)?;
            Ok((parameter.name, tensor))
        };
        config.parameters().into_iter().map(draw).collect()
    }

    /// `[B, L, D]` to `[B, L, D]`; differentiable in `x` and the parameters.
    ///
    /// # Errors
    /// Another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let both = linear(x, &self.fc1, None)?;
        let half = both.dim(D::Minus1)? / 2;
        let value = both.narrow(D::Minus1, 0, half)?;
        let gate = both.narrow(D::Minus1, half, half)?;
        linear(&silu_gate(&value, &gate)?, &self.fc2, None)
    }
}
