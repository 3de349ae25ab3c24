//! A small grid of all kernels, for compute-sanitizer: each in every dtype, ragged in every size.

use crate::agree::{agree, tolerance};
use crate::case::{self, Form};
use crate::common::*;
use crate::gpu;
use crate::pool_laws::args;
use crate::retention_case::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::layers::retention::RetentionConfig;
use subquadratic::models::{Decoder, LanguageModel, ModelConfig};
use subquadratic::ops::norm::{Norm, NormKind, add_norm, gated_norm, norm};
use subquadratic::ops::{CausalConv1d, RetentionPool, RetentionPoolConfig, causal_conv1d};
use subquadratic::train::{Batch, Schedule, Trainer, TrainerConfig};

fn to(device: &Device, t: &[Tensor]) -> Vec<Tensor> {
    t.iter().map(|x| x.to_device(device).unwrap()).collect()
}

/// Forward and backward, decays that learn or do not.
fn run(device: &Device, case: &Case, dtype: DType, learns: bool, packed: bool) {
    let t = cast(&case.tensors(1), dtype);
    let segments = random_segments(&mut Random::new(2), case.batch, case.length);
    let decay = to(device, &t[3..4]).remove(0);
    let (outputs, all) = gradients(&t, |x| {
        let mut moved = to(device, x);
        if !learns {
            moved[3] = decay.clone();
        }
        let mut outputs = to(&Device::Cpu, &case.run(&moved, packed.then_some(&segments))?);
        // what no output depends on must have a gradient, too
        outputs.push((&x[3] * 0.0)?);
        Ok(outputs)
    });
    for x in outputs[..2].iter().chain(&all) {
        assert!(values(x).iter().all(|x| x.is_finite()), "{case:?} {dtype:?}");
    }
}

#[test]
fn walks() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for (keys, values) in [(64, 64), (60, 120), (128, 40), (128, 128), (200, 64), (256, 136), (512, 24)] {
            let case = Case { heads: [2, 1, 2], per_token: keys == 60, ..Case::new(1, 70, 2, keys, values) };
            run(&device, &case, dtype, false, values == 40);
        }
    }
}

#[test]
fn segments_of_time_and_decays_that_learn() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::BF16] {
        run(&device, &Case::new(1, 1030, 1, 64, 48), dtype, false, false);
        run(&device, &Case { per_token: true, ..Case::new(1, 300, 1, 40, 24) }, dtype, true, true);
    }
}

#[test]
fn steps_and_pools() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(3);
    for (dtype, state) in [(DType::F32, DType::F32), (DType::BF16, DType::BF16), (DType::F16, DType::F32)] {
        for (keys, values) in [(60, 20), (128, 33), (256, 64), (512, 40)] {
            let config = RetentionPoolConfig {
                dtype: state,
                window: 4,
                ..RetentionPoolConfig::new(3, 2, keys, values)
            };
            let mut pool = RetentionPool::new(config, &device).unwrap();
            let decays = Tensor::new(&[-0.1f32, -0.01], &device).unwrap();
            for tokens in [1, 2, 1, 3, 9] {
                let mut draw = |width| random.normal((2, tokens, 2, width)).to_dtype(dtype).unwrap();
                let mut t = to(&device, &[draw(keys), draw(keys), draw(values)]);
                t.push(decays.clone());
                pool.step(&args(&t), &[Some(2), None]).unwrap();
                pool.draft(&args(&t), &[Some(0), Some(2)]).unwrap();
                pool.accept(&[1, tokens]).unwrap();
            }
            assert!(values_of(&pool.state(2).unwrap()).iter().all(|x| x.is_finite()));
        }
    }
}

fn values_of(x: &Tensor) -> Vec<f64> {
    values(&x.to_device(&Device::Cpu).unwrap())
}

#[test]
fn scans() {
    let Some(device) = gpu() else { return };
    let full = case::Case::full;
    let grouped = case::Case { b: Form::Token(3), c: Form::Constant, gate: false, ..full(2, 21, 33, 12) };
    // whole tiles, ragged ones, time in chunks, states in lanes of their own, single tokens, blocks that take shares
    let cases = [
        full(1, 64, 64, 16),
        full(2, 37, 40, 5),
        full(1, 530, 24, 16),
        full(1, 20, 9, 130),
        grouped,
        full(2, 1, 40, 16),
        full(2, 700, 5120, 16),
    ];
    for (i, case) in cases.into_iter().enumerate() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let t = crate::case::cast(&case.tensors(i as u64), dtype);
            let used: Vec<Tensor> = case.differentiable().iter().map(|&i| t[i].clone()).collect();
            let segments = random_segments(&mut Random::new(5), case.batch, case.length);
            let other = to(&device, &t);
            agree(&format!("{case:?} {dtype:?}"), &device, &used, 3.0 * tolerance(dtype), |x| {
                let t = if x[0].device().is_cpu() { &t } else { &other };
                case.run(&case.place(t, x), (i == 1).then_some(&segments))
            });
        }
    }
}

#[test]
fn convolutions() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(6);
    for (batch, length, channels, taps) in
        [(2, 37, 72, 4), (1, 130, 64, 4), (2, 1, 24, 4), (1, 9, 5, 3), (1, 33, 16, 7)]
    {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let mut draw = |dims: &[usize]| random.normal(dims).to_dtype(dtype).unwrap();
            let inputs = [
                draw(&[batch, length, channels]),
                draw(&[channels, taps]),
                draw(&[channels]),
                draw(&[batch, channels, taps - 1]),
            ];
            agree(
                &format!("{length} {channels} {taps} {dtype:?}"),
                &device,
                &inputs,
                tolerance(dtype),
                |x| {
                    let (y, last) = causal_conv1d(&CausalConv1d {
                        x: &x[0],
                        weight: &x[1],
                        bias: Some(&x[2]),
                        silu: true,
                        initial_state: Some(&x[3]),
                        segments: None,
                    })?;
                    Ok(vec![y, last])
                },
            );
        }
    }
}

#[test]
fn norms() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(7);
    for (rows, width) in [(5, 24), (3, 200), (9, 513), (2, 768), (1, 2560)] {
        for (dtype, kind) in
            [(DType::F32, NormKind::Rms), (DType::BF16, NormKind::Layer), (DType::F16, NormKind::Rms)]
        {
            let mut draw = |dims: &[usize]| random.normal(dims).to_dtype(dtype).unwrap();
            let inputs = [draw(&[rows, width]), draw(&[rows, width]), draw(&[width]), draw(&[width])];
            agree(&format!("{rows} {width} {dtype:?}"), &device, &inputs, tolerance(dtype), |x| {
                let n = Norm { kind, weight: Some(&x[2]), bias: Some(&x[3]), eps: 1e-3, group_size: None };
                let (sum, y) = add_norm(&x[1], &x[0], &n)?;
                Ok(vec![
                    norm(&x[0], &n)?,
                    sum,
                    y,
                    gated_norm(&x[0], &x[1], &n, true)?,
                    gated_norm(&x[0], &x[1], &n, false)?,
                ])
            });
        }
    }
}

/// Steps of the one kernel, drafts taken back.
#[test]
fn decoding() {
    let Some(device) = gpu() else { return };
    for config in [ModelConfig::mamba(40, 2, 19), ModelConfig::retnet(64, 2, 19)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let model = LanguageModel::init(&config, 1, dtype, &device).unwrap().frozen().unwrap();
            let mut decoder = Decoder::new(&model, 3).unwrap();
            // one row and several, in a row
            decoder.greedy(&[Some(1)], &[3], 3, &[5]).unwrap();
            decoder.greedy(&[Some(1), Some(2)], &[3, 4], 2, &[]).unwrap();
            decoder.reset(2).unwrap();
            decoder.step(&[Some(1), None, Some(0)], &[3, 1, 2]).unwrap();
            decoder.draft(&[Some(2), Some(0)], &[1, 2, 3, 4]).unwrap();
            decoder.accept(&[1, 2]).unwrap();
            let logits = decoder.step(&[Some(0), Some(1), Some(2)], &[5, 6, 7]).unwrap();
            assert!(values_of(&logits).iter().all(|x| x.is_finite()));
        }
    }
}

/// Embedding, loss, gradients' norm, optimiser.
#[test]
fn a_step_of_training() {
    let Some(device) = gpu() else { return };
    let ids = |start: u32| {
        let ids: Vec<u32> = (0..34).map(|i| (i * i + start) % 19).collect();
        Tensor::from_vec(ids, (2, 17), &device).unwrap()
    };
    for dtype in [DType::F32, DType::BF16] {
        let model = LanguageModel::init(&ModelConfig::mamba(24, 1, 19), 0, dtype, &device).unwrap();
        let mut trainer = Trainer::new(model, TrainerConfig::new(Schedule::cosine(1e-3, 1, 10))).unwrap();
        for _ in 0..2 {
            let step = trainer.step(&[Batch::new(ids(0), ids(1))]).unwrap();
            assert!(step.loss.is_finite());
        }
    }
}

/// A layer's other kernels: rotary embedding, norms of heads, gates.
#[test]
fn a_retnet() {
    let Some(device) = gpu() else { return };
    let mut config = ModelConfig::retnet(48, 1, 11);
    for block in &mut config.blocks {
        block.mixer = subquadratic::models::MixerConfig::Retention(RetentionConfig::new(48, 3));
    }
    for dtype in [DType::F32, DType::BF16] {
        let model = LanguageModel::init(&config, 1, dtype, &device).unwrap();
        let ids = Tensor::from_vec((0..35u32).map(|i| i % 11).collect::<Vec<_>>(), (1, 35), &device).unwrap();
        let loss =
            model.forward(&ids).unwrap().to_dtype(DType::F32).unwrap().sqr().unwrap().mean_all().unwrap();
        let store = loss.backward().unwrap();
        for variable in model.variables().values() {
            let gradient = store.get(variable).unwrap().to_dtype(DType::F32).unwrap();
            assert!(values_of(&gradient).iter().all(|x| x.is_finite()));
        }
    }
}
