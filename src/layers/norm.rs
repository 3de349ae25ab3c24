//! RMS norm and layer norm as layers.

use super::Parameter;
use crate::ops::norm::{Norm, NormKind, add_norm, norm};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// Which norm, and its epsilon.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NormConfig {
    /// RMS norm with a weight.
    Rms {
        /// Added to the mean square.
        eps: f64,
    },
    /// RMS norm with a weight, epsilon outside the root.
    RmsOutside {
        /// Added to the root of the mean square.
        eps: f64,
    },
    /// Layer norm with weight and bias.
    Layer {
        /// Added to the variance.
        eps: f64,
    },
}

impl NormConfig {
    /// The parameters of a norm over `width` channels.
    pub fn parameters(&self, width: usize) -> Vec<Parameter> {
        let weight = Parameter::new("weight", &[width]);
        match self {
            Self::Rms { .. } | Self::RmsOutside { .. } => vec![weight],
            Self::Layer { .. } => vec![weight, Parameter::new("bias", &[width])],
        }
    }

    /// Refuses an epsilon that is negative or not finite; `name` says whose.
    pub(crate) fn validate(&self, name: &str) -> Result<()> {
        let (Self::Rms { eps } | Self::RmsOutside { eps } | Self::Layer { eps }) = *self;
        if eps >= 0.0 && eps.is_finite() {
            return Ok(());
        }
        Err(Error::value(format!("{name}: eps"), "a finite number of at least 0", eps))
    }

    /// The published initialisation, f32 on the CPU: ones, and zeros for the bias.
    pub fn init(&self, width: usize) -> Result<Vec<(String, Tensor)>> {
        let value = |parameter: Parameter| {
            let one = parameter.name == "weight";
            let make = if one { Tensor::ones } else { Tensor::zeros };
            Ok((parameter.name, make(parameter.shape, DType::F32, &Device::Cpu)?))
        };
        self.parameters(width).into_iter().map(value).collect()
    }
}

/// RMS norm: `x / sqrt(E[x^2] + eps) * weight` over the last dimension, or with `eps` outside the root.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    kind: NormKind,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight` `[D]`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let kind = NormKind::Rms;
        Ok(Self { weight: Parameter::new("weight", &[width]).read(&vb)?, kind, eps })
    }

    /// `[.., D]` to `[.., D]`; differentiable in `x` and the weight.
    ///
    /// # Errors
    /// Another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        norm(x, &self.arguments())
    }

    fn arguments(&self) -> Norm<'_> {
        Norm { kind: self.kind, weight: Some(&self.weight), bias: None, eps: self.eps, group_size: None }
    }
}

/// Layer norm: `(x - E[x]) / sqrt(Var[x] + eps) * weight + bias` over the last dimension.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias`, each `[D]`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn new(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = Parameter::new("weight", &[width]).read(&vb)?;
        let bias = Parameter::new("bias", &[width]).read(&vb)?;
        Ok(Self { weight, bias, eps })
    }

    /// `[.., D]` to `[.., D]`; differentiable in `x`, weight and bias.
    ///
    /// # Errors
    /// Another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        norm(x, &self.arguments())
    }

    fn arguments(&self) -> Norm<'_> {
        Norm {
            kind: NormKind::Layer,
            weight: Some(&self.weight),
            bias: Some(&self.bias),
            eps: self.eps,
            group_size: None,
        }
    }
}

/// The norm that a [`NormConfig`] names.
#[derive(Clone, Debug)]
pub enum NormLayer {
    /// See [`RmsNorm`].
    Rms(RmsNorm),
    /// See [`LayerNorm`].
    Layer(LayerNorm),
}

impl NormLayer {
    /// Reads the parameters of a norm over `width` channels.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn new(config: &NormConfig, width: usize, vb: VarBuilder) -> Result<Self> {
        Ok(match *config {
            NormConfig::Rms { eps } => Self::Rms(RmsNorm::new(width, eps, vb)?),
            NormConfig::RmsOutside { eps } => {
                Self::Rms(RmsNorm { kind: NormKind::RmsOutside, ..RmsNorm::new(width, eps, vb)? })
            }
            NormConfig::Layer { eps } => Self::Layer(LayerNorm::new(width, eps, vb)?),
        })
    }

    /// `[.., D]` to `[.., D]`.
    ///
    /// # Errors
    /// Another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        norm(x, &self.arguments())
    }

    /// `(residual + update, norm(residual + update))` in one pass, each `[.., D]`: the sum in the dtype of `residual`,
    /// the norm in that of `update`.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit.
    pub fn add_forward(&self, residual: &Tensor, update: &Tensor) -> Result<(Tensor, Tensor)> {
        add_norm(residual, update, &self.arguments())
    }

    pub(crate) fn arguments(&self) -> Norm<'_> {
        match self {
            Self::Rms(norm) => norm.arguments(),
            Self::Layer(norm) => norm.arguments(),
        }
    }
}
