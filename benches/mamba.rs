//! The Mamba layer and the published 130m model, with random weights.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use criterion::{Criterion, Throughput};
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use subquadratic::Result;
use subquadratic::layers::{Mamba, MambaConfig};
use subquadratic::models::{LanguageModel, ModelConfig};

const VOCABULARY: usize = 50280;

/// The layer alone: sequences with every gradient, and steps.
pub fn layer(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut layer = group(criterion, "mamba");
    for shape in bench.shapes("mamba") {
        let [b, l, d] = shape.sizes(["B", "L", "D"]);
        let config = MambaConfig::new(d);
        let (names, parameters): (Vec<_>, Vec<_>) =
            Mamba::init(&config, &mut StdRng::seed_from_u64(0), 1.0)?.into_iter().unzip();
        for &dtype in bench.dtypes() {
            let mut inputs = vec![bench.uniform(&[b, l, d], -1.0..1.0, dtype)?];
            for (name, parameter) in names.iter().zip(&parameters) {
                let wide = ["A_log", "D"].contains(&name.as_str());
                let dtype = if wide { DType::F32 } else { dtype };
                inputs.push(parameter.to_device(&bench.device)?.to_dtype(dtype)?);
            }
            let build = |parameters: &[Tensor]| {
                let tensors: HashMap<_, _> = names.iter().cloned().zip(parameters.iter().cloned()).collect();
                Mamba::new(&config, VarBuilder::from_tensors(tensors, dtype, &bench.device))
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
    Ok(())
}

/// Prompts of the 130m model up to the logits of the last token, and greedy steps.
pub fn model(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut model = group(criterion, "mamba-130m");
    for &dtype in bench.dtypes() {
        // initialised when a benchmark that passes the filter first asks for it
        let device = bench.device.clone();
        let lazy = std::cell::LazyCell::new(|| {
            let config = ModelConfig::mamba(768, 24, VOCABULARY);
            LanguageModel::init(&config, 0, dtype, &device).and_then(|model| model.frozen()).expect("a model")
        });
        for length in [512, 2048] {
            let ids = bench.tokens(1, length, VOCABULARY as u32)?;
            let id = format!("prefill-{length}/{}/fwd", name(dtype));
            measure(&mut model, id, Throughput::Elements(length as u64), &bench.device, || {
                let mut state = lazy.init_state(1)?;
                lazy.prefill(&ids, None, &mut state)
            });
        }
        let token = bench.tokens(1, 1, VOCABULARY as u32)?;
        let mut state = None;
        let id = format!("decode/{}/step", name(dtype));
        measure(&mut model, id, Throughput::Elements(1), &bench.device, || {
            let state = match &mut state {
                Some(state) => state,
                none => none.insert(lazy.init_state(1)?),
            };
            Ok(lazy.prefill(&token, None, state)?.argmax(1)?)
        });
    }
    model.finish();
    Ok(())
}
