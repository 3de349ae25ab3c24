//! Models of published sizes with random weights: prompts up to the logits of the last token, greedy steps, and on a GPU
//! steps of training.

use crate::support::{Bench, group, measure, measure_runs, name};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use criterion::{Criterion, Throughput};
use std::collections::HashMap;
use subquadratic::layers::retention::RetentionConfig;
use subquadratic::models::{Decoder, Family, LanguageModel, MixerConfig, ModelConfig};
use subquadratic::train::{Batch, Schedule, Trainer, TrainerConfig};
use subquadratic::{Result, peak_bytes};

const VOCABULARY: usize = 50280;
/// Greedy tokens that a decoder is asked for at a time.
const IN_A_ROW: u64 = 64;

/// Mamba, RetNet and a hybrid; the larger ones on a GPU alone.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mamba = |width, layers| ModelConfig::mamba(width, layers, VOCABULARY);
    let retnet = |width, layers| ModelConfig::retnet(width, layers, VOCABULARY);
    model(criterion, bench, "mamba-130m", mamba(768, 24), &[512, 2048])?;
    model(criterion, bench, "retnet-d768-l12", retnet(768, 12), &[512, 2048])?;
    model(criterion, bench, "hybrid-d128-l4", hybrid(128)?, &[1 << 10, 1 << 13, 1 << 17])?;
    if !bench.device.is_cpu() {
        model(criterion, bench, "mamba-1.4b", mamba(2048, 48), &[8192, 65536])?;
        model(criterion, bench, "mamba-2.8b", mamba(2560, 64), &[2048])?;
        model(criterion, bench, "retnet-1.3b", with_heads(retnet(2048, 24), 8), &[8192, 65536])?;
        model(criterion, bench, "retnet-1.3b-h32", retnet(2048, 24), &[8192])?;
        training(criterion, bench)?;
    }
    Ok(())
}

/// A RetNet with so many heads in each layer, like that of `shapes.json`.
fn with_heads(mut config: ModelConfig, heads: usize) -> ModelConfig {
    for block in &mut config.blocks {
        block.mixer = MixerConfig::Retention(RetentionConfig::new(config.hidden_size, heads));
    }
    config
}

/// Whole steps of training a Mamba in bf16 with f32 masters: forward, backward, clipping, AdamW.
fn training(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut training = group(criterion, "training");
    for shape in bench.shapes("training") {
        let [rows, length, width, layers, vocabulary] = shape.sizes(["B", "L", "D", "layers", "V"]);
        let config = ModelConfig::mamba(width, layers, vocabulary);
        let ids = bench.tokens(rows, length + 1, vocabulary as u32)?;
        let part = |start| Ok::<_, subquadratic::Error>(ids.narrow(1, start, length)?.contiguous()?);
        let batch = Batch::new(part(0)?, part(1)?);
        for (what, recompute) in [("step_recompute", true), ("step", false)] {
            let mut trainer = None;
            let id = format!("{}/bf16/{what}", shape.name);
            let throughput = Throughput::Elements((rows * length) as u64);
            measure(&mut training, id, throughput, &bench.device, || {
                let trainer = match &mut trainer {
                    Some(trainer) => trainer,
                    none => {
                        let mut model = LanguageModel::init(&config, 0, DType::BF16, &bench.device)?;
                        model.set_recompute(recompute);
                        let schedule = Schedule::cosine(1e-4, 10, 100_000);
                        none.insert(Trainer::new(model, TrainerConfig::new(schedule))?)
                    }
                };
                trainer.step(std::slice::from_ref(&batch))
            });
            if trainer.is_some() {
                memory(what, &bench.device);
            }
        }
    }
    training.finish();
    Ok(())
}

/// One of each mixer that decodes in constant space: attention has a window.
fn hybrid(width: usize) -> Result<ModelConfig> {
    let mut config = ModelConfig::striped("hyena attention mamba hyena", width, VOCABULARY)?;
    for block in &mut config.blocks {
        if let MixerConfig::Attention(attention) = &mut block.mixer {
            attention.window = Some(1024);
        }
    }
    Ok(config)
}

/// Random weights, drawn on the device.
fn random(config: &ModelConfig, dtype: DType, device: &Device) -> Result<LanguageModel> {
    // under this crate's own names, whatever the family
    let config = ModelConfig { family: Family::Hybrid, ..config.clone() };
    let mut tensors = HashMap::new();
    for parameter in config.parameters() {
        let (name, shape) = (parameter.name, parameter.shape);
        let ones = ["A_log", ".D"].iter().any(|end| name.ends_with(end)) || name.contains("norm");
        let tensor = match ones {
            true => Tensor::ones(shape, DType::F32, device)?,
            false => Tensor::randn(0f32, 0.02, shape, device)?,
        };
        tensors.insert(name, if parameter.wide { tensor } else { tensor.to_dtype(dtype)? });
    }
    LanguageModel::new(&config, VarBuilder::from_tensors(tensors, dtype, device))
}

/// Says the most memory in use so far, so that what takes least of it runs first.
fn memory(what: &str, device: &Device) {
    if let Some(bytes) = peak_bytes(device) {
        println!("{what}: {} MB in use at most", bytes / 1_000_000);
    }
}

/// Bytes of the weights that a token is multiplied with: all but an embedding that is not the head too.
fn weights(config: &ModelConfig, dtype: DType) -> u64 {
    let numbers: usize =
        config.parameters().iter().map(|parameter| parameter.shape.iter().product::<usize>()).sum();
    let embedding = if config.tie_embeddings { 0 } else { config.vocab_size * config.hidden_size };
    ((numbers - embedding) * dtype.size_in_bytes()) as u64
}

/// One of them; on a GPU in bf16 alone.
fn model(
    criterion: &mut Criterion,
    bench: &mut Bench,
    title: &str,
    config: ModelConfig,
    lengths: &[usize],
) -> Result<()> {
    let mut model = group(criterion, title);
    let dtypes = if bench.device.is_cpu() { bench.dtypes() } else { &[DType::BF16] };
    for &dtype in dtypes {
        // initialised when a benchmark that passes the filter first asks for it
        let device = bench.device.clone();
        let lazy = std::cell::LazyCell::new(|| random(&config, dtype, &device).expect("a model"));
        for &length in lengths {
            let ids = bench.tokens(1, length, VOCABULARY as u32)?;
            let id = format!("prefill-{length}/{}/fwd", name(dtype));
            let mut ran = false;
            measure(&mut model, id, Throughput::Elements(length as u64), &bench.device, || {
                ran = true;
                let mut state = lazy.init_state(1)?;
                lazy.prefill(&ids, None, &mut state)
            });
            if ran {
                memory(title, &bench.device);
            }
        }
        // greedy tokens, a call each or all of `IN_A_ROW` in one
        let in_a_row = if bench.device.is_cpu() { 1 } else { IN_A_ROW };
        for (rows, what, each) in [(1, "call", 1), (1, "step", in_a_row), (8, "step", in_a_row)] {
            let (mut decoder, mut ids) = (None, vec![1; rows]);
            let slots: Vec<Option<usize>> = (0..rows).map(Some).collect();
            let suffix = if rows == 1 { String::new() } else { format!("-{rows}") };
            let title = format!("decode{suffix}/{}/{what}", name(dtype));
            let weights = Throughput::BytesDecimal(weights(&config, dtype));
            measure_runs(&mut model, title, weights, &bench.device, each, || {
                let decoder = match &mut decoder {
                    Some(decoder) => decoder,
                    none => none.insert(Decoder::new(&lazy, rows)?),
                };
                let chosen = decoder.greedy(&slots, &ids, each as usize, &[])?;
                ids = chosen.iter().filter_map(|row| row.last().copied()).collect();
                Ok(())
            });
        }
    }
    model.finish();
    Ok(())
}
