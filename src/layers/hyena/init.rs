//! The published initialisation.

use super::Hyena;
use super::config::{HyenaConfig, HyenaFilter, ImplicitFilter};
use crate::Result;
use crate::layers::parameter::{fan_in_uniform, filled, normal, uniform};
use candle_core::Tensor;
use rand::Rng;
use std::f64::consts::TAU;

/// The slowest and the fastest filter have decayed to this after so much of the grid.
const TARGET: f64 = 1e-2;
const SLOWEST: f64 = 1.5;
const FASTEST: f64 = 0.3;

impl Hyena {
    /// The published initialisation by parameter name, f32 on the CPU.
    ///
    /// * positions: time, and the cosines and sines of frequencies `1e-4` to `(emb_dim - 1) / 2 - 1`; decay rates that
    ///   reach 0.01 at 0.3 to 1.5 of the grid; sines' frequencies `w`;
    /// * skip weights: normal; explicit filters: normal, over the square root of their length; matrices between heads:
    ///   normal, over the square root of a head's channels;
    /// * everything else as PyTorch's layers begin, uniform in `±fan_in^-1/2`; `out_proj.weight` times `residual_scale`.
    ///
    /// Source: `HyenaOperator` and `HyenaFilter` of safari and hyena-dna.
    ///
    /// # Errors
    /// An inconsistent config.
    pub fn init(
        config: &HyenaConfig,
        rng: &mut impl Rng,
        residual_scale: f64,
    ) -> Result<Vec<(String, Tensor)>> {
        config.validate()?;
        let implicit = match config.filter {
            HyenaFilter::Implicit(filter) => filter,
            HyenaFilter::Explicit => ImplicitFilter::default(),
        };
        let mut all = vec![];
        let mut fan_in = config.d_model;
        for parameter in config.parameters() {
            let shape = &parameter.shape;
            if shape.len() > 1 {
                fan_in = shape[1..].iter().product();
            }
            let tensor = match parameter.name.as_str() {
                "filter_fn.bias" => normal(rng, shape, 1.0)?,
                "ord_proj_w" => normal(rng, shape, (config.head() as f64).powf(-0.5))?,
                "filter_fn.filter" => normal(rng, shape, (config.l_max as f64).powf(-0.5))?,
                "filter_fn.pos_emb.t" => filled(shape, |i| time(config.l_max, i))?,
                "filter_fn.pos_emb.z" => filled(shape, |i| {
                    feature(&implicit, config.l_max, i / implicit.emb_dim, i % implicit.emb_dim)
                })?,
                "filter_fn.modulation.deltas" => filled(shape, |i| delta(config, i))?,
                name if name.ends_with(".freq") => filled(shape, |_| implicit.w)?,
                "out_proj.weight" => fan_in_uniform(rng, shape, residual_scale)?,
                name if name.ends_with("bias") => uniform(rng, shape, (fan_in.max(1) as f64).powf(-0.5))?,
                _ => fan_in_uniform(rng, shape, 1.0)?,
            };
            all.push((parameter.name, tensor));
        }
        Ok(all)
    }
}

/// Position `i` of the grid, in 0..=1.
fn time(l_max: usize, i: usize) -> f64 {
    i as f64 / l_max.saturating_sub(1).max(1) as f64
}

/// Feature `column` of position `i`: time, cosines, negative sines.
fn feature(filter: &ImplicitFilter, l_max: usize, i: usize, column: usize) -> f64 {
    let bands = (filter.emb_dim - 1) / 2;
    let angle = |band: usize| {
        let step = (bands as f64 - 1.0 - 1e-4) / (bands.max(2) - 1) as f64;
        (1e-4 + band as f64 * step) * TAU * i as f64 / l_max as f64
    };
    match column {
        0 => time(l_max, i),
        column if column <= bands => angle(column - 1).cos(),
        column => -angle(column - 1 - bands).sin(),
    }
}

/// The decay rate of filter `i`.
fn delta(config: &HyenaConfig, i: usize) -> f64 {
    let (low, high) = (TARGET.ln() / SLOWEST, TARGET.ln() / FASTEST);
    low + (high - low) * i as f64 / (config.columns().max(2) - 1) as f64
}
