//! A fresh layer.

use super::{HyenaFilter, ModalHyena, ModalHyenaConfig};
use crate::Result;
use crate::layers::parameter::{fan_in_uniform, filled, normal};
use candle_core::Tensor;
use rand::Rng;

/// Decay per token of the slowest and the fastest state.
const DECAYS: (f64, f64) = (1e-3, 0.5);

impl ModalHyena {
    /// An initialisation by parameter name, f32 on the CPU.
    ///
    /// Projections as PyTorch's linear layers, the last scaled by `residual_scale`; biases zero; `D` one. Poles lie
    /// within the unit circle, their decays spread evenly on a logarithmic scale and their angles over the half circle,
    /// as in diagonal state space models (Gu et al. 2022); residues are normal with variance `1 / S`.
    ///
    /// # Errors
    /// Sizes that cannot be allocated.
    pub fn init(
        config: &ModalHyenaConfig,
        rng: &mut impl Rng,
        residual_scale: f64,
    ) -> Result<Vec<(String, Tensor)>> {
        let (_, size) = config.filters();
        let mut all = vec![];
        for parameter in config.parameters() {
            let shape = &parameter.shape;
            let mut decay = || DECAYS.0 * (DECAYS.1 / DECAYS.0).powf(rng.random::<f64>());
            let tensor = match parameter.name.as_str() {
                "filter.poles" => {
                    let mut pole = (0.0, 0.0);
                    filled(shape, |i| {
                        if i % 2 == 1 {
                            return pole.1;
                        }
                        let angle = std::f64::consts::PI * (i / 2 % size) as f64 / size as f64;
                        let radius = (-decay()).exp();
                        pole = (radius * angle.cos(), radius * angle.sin());
                        pole.0
                    })?
                }
                "filter.log_poles" => filled(shape, |_| -decay())?,
                "filter.residues" | "filter.h" => normal(rng, shape, (size as f64).powf(-0.5))?,
                "filter.D" => filled(shape, |_| 1.0)?,
                "out_filter_dense.weight" => fan_in_uniform(rng, shape, residual_scale)?,
                name if name.ends_with("bias") => filled(shape, |_| 0.0)?,
                _ => fan_in_uniform(rng, shape, 1.0)?,
            };
            all.push((parameter.name, tensor));
        }
        debug_assert!(!matches!(config.filter, HyenaFilter::Complex { states: 0 }));
        Ok(all)
    }
}
