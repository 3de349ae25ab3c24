//! The layers alone, with random weights: sequences with every gradient, and steps.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use criterion::{Criterion, Throughput};
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use subquadratic::Result;
use subquadratic::layers::{
    Attention, AttentionConfig, Mamba, MambaConfig, ModalHyena, ModalHyenaConfig, MultiScaleRetention,
    RetentionConfig,
};

/// A layer type over the shapes of its name; `$config` makes its config from the sizes D and `$size`.
macro_rules! layer {
    ($criterion:expr, $bench:expr, $title:literal, $layer:ty, $size:literal, $config:expr) => {{
        let bench: &mut Bench = $bench;
        let mut layer = group($criterion, $title);
        for shape in bench.shapes($title) {
            let [b, l, d, size] = shape.sizes(["B", "L", "D", $size]);
            let config = $config(d, size);
            let (names, parameters): (Vec<_>, Vec<_>) =
                <$layer>::init(&config, &mut StdRng::seed_from_u64(0), 1.0)?.into_iter().unzip();
            for &dtype in bench.dtypes() {
                let mut inputs = vec![bench.uniform(&[b, l, d], -1.0..1.0, dtype)?];
                for (name, parameter) in names.iter().zip(&parameters) {
                    let wide =
                        config.parameters().iter().any(|declared| declared.wide && declared.name == *name);
                    let dtype = if wide { DType::F32 } else { dtype };
                    inputs.push(parameter.to_device(&bench.device)?.to_dtype(dtype)?);
                }
                let build = |parameters: &[Tensor]| {
                    let tensors: HashMap<_, _> =
                        names.iter().cloned().zip(parameters.iter().cloned()).collect();
                    <$layer>::new(&config, VarBuilder::from_tensors(tensors, dtype, &bench.device))
                };
                let id = format!("{}/{}", shape.name, name(dtype));
                let throughput = Throughput::Elements((b * l) as u64);
                measure_both(&mut layer, &id, throughput, &inputs, |x| build(&x[1..])?.forward(&x[0]));

                let built = build(&inputs[1..])?;
                let mut state = built.init_state(b)?;
                let token = inputs[0].narrow(1, 0, 1)?.contiguous()?;
                let throughput = Throughput::Elements(b as u64);
                measure(&mut layer, format!("{id}/step"), throughput, &bench.device, || {
                    built.forward_with_state(&token, &mut state)
                });
            }
        }
        layer.finish();
    }};
}

/// Every layer that has shapes.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    layer!(criterion, bench, "mamba", Mamba, "L", |d, _| MambaConfig::new(d));
    layer!(criterion, bench, "multi_scale_retention", MultiScaleRetention, "H", RetentionConfig::new);
    layer!(criterion, bench, "modal_hyena", ModalHyena, "L", |d, _| ModalHyenaConfig::new(d));
    layer!(criterion, bench, "attention_layer", Attention, "H", AttentionConfig::new);
    Ok(())
}
