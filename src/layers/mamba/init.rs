//! The published initialisation.

use super::{Mamba, MambaConfig, TimeStepScheme};
use crate::Result;
use crate::layers::parameter::{fan_in_uniform, filled, uniform};
use candle_core::Tensor;
use rand::Rng;

impl Mamba {
    /// The published initialisation by parameter name, f32 on the CPU.
    ///
    /// * `dt_proj.bias`: the inverse softplus of `exp(U[ln 1e-3, ln 0.1])`, at least `1e-4`;
    ///   `dt_proj.weight`: uniform in `±dt_rank^-1/2`;
    /// * `A_log`: `ln 1 .. ln N` in every channel; `D`: ones;
    /// * everything else as PyTorch's layers begin, uniform in `±fan_in^-1/2`, the biases of the projections zero, and
    ///   `out_proj.weight` times `residual_scale`: in a model `(residual sums per layer * layers)^-1/2`, else 1.
    ///
    /// Source: the package mamba-ssm (`Mamba.__init__`, `_init_weights`).
    ///
    /// # Errors
    /// An inconsistent config.
    pub fn init(
        config: &MambaConfig,
        rng: &mut impl Rng,
        residual_scale: f64,
    ) -> Result<Vec<(String, Tensor)>> {
        config.validate()?;
        let mut all = vec![];
        for parameter in config.parameters() {
            let shape = &parameter.shape;
            let tensor = match parameter.name.as_str() {
                "dt_proj.bias" => filled(shape, |_| inverse_softplus(time_step(config, rng)))?,
                "dt_proj.weight" => {
                    let bound = config.time_step.scale * (config.dt_rank as f64).powf(-0.5);
                    match config.time_step.scheme {
                        TimeStepScheme::Random => uniform(rng, shape, bound)?,
                        TimeStepScheme::Constant => filled(shape, |_| bound)?,
                    }
                }
                "dt_layernorm.weight" | "b_layernorm.weight" | "c_layernorm.weight" => {
                    filled(shape, |_| 1.0)?
                }
                "A_log" => filled(shape, |i| ((i % config.d_state + 1) as f64).ln())?,
                "D" => filled(shape, |_| 1.0)?,
                "in_proj.bias" | "out_proj.bias" => filled(shape, |_| 0.0)?,
                "conv1d.bias" => uniform(rng, shape, (config.d_conv as f64).powf(-0.5))?,
                "out_proj.weight" => fan_in_uniform(rng, shape, residual_scale)?,
                _ => fan_in_uniform(rng, shape, 1.0)?,
            };
            all.push((parameter.name, tensor));
        }
        Ok(all)
    }
}

fn time_step(config: &MambaConfig, rng: &mut impl Rng) -> f64 {
    let t = &config.time_step;
    let (low, high) = (t.min.ln(), t.max.ln());
    (low + (high - low) * rng.random::<f64>()).exp().max(t.floor)
}

/// The `x` with `softplus(x) = dt`.
fn inverse_softplus(dt: f64) -> f64 {
    dt + (-(-dt).exp_m1()).ln()
}
