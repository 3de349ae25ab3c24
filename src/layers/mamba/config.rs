//! The sizes of a Mamba layer and its parameters.

use crate::layers::Parameter;
use crate::layers::parameter::check_sizes;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a time step projection starts out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeStepScheme {
    /// Uniform in `±scale dt_rank^-1/2`.
    Random,
    /// `scale dt_rank^-1/2` throughout.
    Constant,
}

/// The range of the time steps at initialisation: `dt = exp(U[ln min, ln max])`, at least `floor`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeStepInit {
    /// The shortest step.
    pub min: f64,
    /// The longest step.
    pub max: f64,
    /// Shorter steps are raised to this.
    pub floor: f64,
    /// Scales `dt_proj.weight`.
    pub scale: f64,
    /// How `dt_proj.weight` is drawn.
    pub scheme: TimeStepScheme,
}

impl Default for TimeStepInit {
    fn default() -> Self {
        Self { min: 1e-3, max: 0.1, floor: 1e-4, scale: 1.0, scheme: TimeStepScheme::Random }
    }
}

/// The sizes and options of a [`Mamba`](super::Mamba) layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MambaConfig {
    /// Width of input and output, `D`.
    pub d_model: usize,
    /// Channels of convolution and recurrence.
    pub d_inner: usize,
    /// States per channel, `N`.
    pub d_state: usize,
    /// Taps of the convolution, `K`.
    pub d_conv: usize,
    /// Rank of the time step projection.
    pub dt_rank: usize,
    /// Biases on `in_proj` and `out_proj`.
    pub bias: bool,
    /// A bias on the convolution.
    pub conv_bias: bool,
    /// RMS norms with this epsilon on dt (before `dt_proj`), B and C, as FalconMamba and Jamba have them.
    pub inner_norm_eps: Option<f64>,
    /// Weights on these norms, `dt_layernorm`, `b_layernorm` and `c_layernorm`, as Jamba has them.
    #[serde(default)]
    pub inner_norm_weight: bool,
    /// Used by [`Mamba::init`](super::Mamba::init) only.
    pub time_step: TimeStepInit,
}

impl MambaConfig {
    /// The published sizes for a width: twice as many channels, 16 states, 4 taps, rank `ceil(D / 16)`.
    pub fn new(d_model: usize) -> Self {
        Self {
            d_model,
            d_inner: d_model.saturating_mul(2),
            d_state: 16,
            d_conv: 4,
            dt_rank: d_model.div_ceil(16),
            bias: false,
            conv_bias: true,
            inner_norm_eps: None,
            inner_norm_weight: false,
            time_step: TimeStepInit::default(),
        }
    }

    /// Checks that the sizes make a layer.
    ///
    /// # Errors
    /// A zero, an epsilon or time step out of range, or sizes beyond any memory, by name.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("d_model", self.d_model),
            ("d_inner", self.d_inner),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("dt_rank", self.dt_rank),
        ];
        for (name, size) in sizes {
            if size == 0 || size > u32::MAX as usize {
                return Err(Error::value(format!("mamba: {name}"), "1 to 2^32 - 1", size));
            }
        }
        if let Some(eps) = self.inner_norm_eps.filter(|&eps| !(eps >= 0.0 && eps.is_finite())) {
            return Err(Error::value("mamba: inner_norm_eps", "a finite number of at least 0", eps));
        }
        let t = self.time_step;
        if !(t.min > 0.0 && t.min <= t.max && t.max.is_finite() && t.floor >= 0.0 && t.scale.is_finite()) {
            return Err(Error::value("mamba: time_step", "0 < min <= max, floor >= 0", format!("{t:?}")));
        }
        check_sizes(&self.parameters())
    }

    /// The parameters, under their upstream names.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (d, inner, n) = (self.d_model, self.d_inner, self.d_state);
        let mut all = vec![Parameter::new("in_proj.weight", &[inner.saturating_mul(2), d])];
        if self.bias {
            all.push(Parameter::new("in_proj.bias", &[inner.saturating_mul(2)]));
        }
        all.push(Parameter::new("conv1d.weight", &[inner, 1, self.d_conv]));
        if self.conv_bias {
            all.push(Parameter::new("conv1d.bias", &[inner]));
        }
        for (name, width) in [("dt", self.dt_rank), ("b", n), ("c", n)] {
            if self.inner_norm_weight {
                all.push(Parameter::new(&format!("{name}_layernorm.weight"), &[width]));
            }
        }
        let selected = self.dt_rank.saturating_add(n.saturating_mul(2));
        all.extend([
            Parameter::new("x_proj.weight", &[selected, inner]),
            Parameter::new("dt_proj.weight", &[inner, self.dt_rank]),
            Parameter::new("dt_proj.bias", &[inner]),
            Parameter::wide("A_log", &[inner, n]),
            Parameter::wide("D", &[inner]),
            Parameter::new("out_proj.weight", &[d, inner]),
        ]);
        if self.bias {
            all.push(Parameter::new("out_proj.bias", &[d]));
        }
        all
    }
}
