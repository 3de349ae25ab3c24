//! The published initialisation.

use super::{MultiScaleRetention, RetentionConfig};
use crate::Result;
use crate::layers::parameter::{filled, uniform};
use candle_core::Tensor;
use rand::Rng;

/// The gain of queries, keys, values and gates.
const GAIN: f64 = 0.176_776_695_296_636_9;

impl MultiScaleRetention {
    /// The published initialisation by parameter name, f32 on the CPU: Xavier's uniform, with gain `2^-5/2` for
    /// queries, keys, values and gates, and 1 for the output, which is scaled by `residual_scale`; convolutions
    /// uniform in `±taps^-1/2`; biases zero; norms one.
    ///
    /// Source: torchscale (`MultiScaleRetention.reset_parameters`).
    ///
    /// # Errors
    /// An inconsistent config.
    pub fn init(
        config: &RetentionConfig,
        rng: &mut impl Rng,
        residual_scale: f64,
    ) -> Result<Vec<(String, Tensor)>> {
        config.validate()?;
        let mut all = vec![];
        for parameter in config.parameters() {
            let shape = &parameter.shape;
            let xavier = |gain: f64| gain * (6.0 / shape.iter().sum::<usize>() as f64).sqrt();
            let tensor = match parameter.name.as_str() {
                "g_norm.weight" => filled(shape, |_| 1.0)?,
                "o_proj.weight" => uniform(rng, shape, xavier(residual_scale))?,
                name if name.ends_with("conv1d.weight") => uniform(rng, shape, (shape[2] as f64).powf(-0.5))?,
                name if name.ends_with("bias") => filled(shape, |_| 0.0)?,
                _ => uniform(rng, shape, xavier(GAIN))?,
            };
            all.push((parameter.name, tensor));
        }
        Ok(all)
    }
}
