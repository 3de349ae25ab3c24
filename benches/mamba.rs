//! The Mamba layer and the published 130m model, with random weights.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use criterion::{Criterion, Throughput};
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use subquadratic::Result;
use subquadratic::layers::{Mamba, MambaConfig};
use subquadratic::models::{Decoder, LanguageModel, ModelConfig};

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
    sized(criterion, bench, "mamba-130m", [768, 24], &[512, 2048])?;
    if !bench.device.is_cpu() {
        sized(criterion, bench, "mamba-1.4b", [2048, 48], &[8192])?;
        sized(criterion, bench, "mamba-2.8b", [2560, 64], &[2048])?;
    }
    Ok(())
}

/// Random weights; on a GPU they are drawn there.
fn random(config: &ModelConfig, dtype: DType, device: &Device) -> Result<LanguageModel> {
    if device.is_cpu() {
        return LanguageModel::init(config, 0, dtype, device)?.frozen();
    }
    let mut tensors = HashMap::new();
    for parameter in config.parameters() {
        let (name, shape) = (parameter.name, parameter.shape);
        let wide = ["A_log", ".D"].iter().any(|end| name.ends_with(end));
        let tensor = match name.contains("norm") || wide {
            true => Tensor::ones(shape, DType::F32, device)?,
            false => Tensor::randn(0f32, 0.02, shape, device)?,
        };
        tensors.insert(name, if wide { tensor } else { tensor.to_dtype(dtype)? });
    }
    LanguageModel::new(config, VarBuilder::from_tensors(tensors, dtype, device))
}

/// A model of a width and so many layers; on a GPU in bf16 alone.
fn sized(
    criterion: &mut Criterion,
    bench: &mut Bench,
    title: &str,
    [width, layers]: [usize; 2],
    lengths: &[usize],
) -> Result<()> {
    let mut model = group(criterion, title);
    let dtypes = if bench.device.is_cpu() { bench.dtypes() } else { &[DType::BF16] };
    for &dtype in dtypes {
        // initialised when a benchmark that passes the filter first asks for it
        let device = bench.device.clone();
        let lazy = std::cell::LazyCell::new(|| {
            random(&ModelConfig::mamba(width, layers, VOCABULARY), dtype, &device).expect("a model")
        });
        for &length in lengths {
            let ids = bench.tokens(1, length, VOCABULARY as u32)?;
            let id = format!("prefill-{length}/{}/fwd", name(dtype));
            measure(&mut model, id, Throughput::Elements(length as u64), &bench.device, || {
                let mut state = lazy.init_state(1)?;
                lazy.prefill(&ids, None, &mut state)
            });
        }
        let (mut decoder, mut id) = (None, vec![1]);
        let title = format!("decode/{}/step", name(dtype));
        measure(&mut model, title, Throughput::Elements(1), &bench.device, || {
            let decoder = match &mut decoder {
                Some(decoder) => decoder,
                none => none.insert(Decoder::new(&lazy, 1)?),
            };
            id = decoder.step_greedy(&[Some(0)], &id)?;
            Ok(())
        });
    }
    model.finish();
    Ok(())
}
