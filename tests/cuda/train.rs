//! What training needs beside the operators: projections, the loss, the optimiser, whole steps.

use crate::agree::{agree, to, tolerance};
use crate::common::*;
use crate::gpu;
use candle_core::{DType, Device, Tensor, Var};
use std::collections::BTreeMap;
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::ops::{embedding, linear};
use subquadratic::train::{
    AdamW, AdamWConfig, Batch, Gradients, IGNORE, Schedule, Trainer, TrainerConfig, cross_entropy,
};

#[test]
fn projections() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(21);
    for seed in 0..24 {
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let [inputs, outputs] = [(); 2].map(|()| [1, 3, 16, 48, 200][random.int(0, 4)]);
        let rows = random.int(1, 9);
        let wide = random.normal((2, rows, inputs + 3)).to_dtype(dtype).unwrap();
        let mut all = vec![wide.narrow(2, random.int(0, 3), inputs).unwrap()];
        all.push(random.normal((outputs, inputs)).to_dtype(dtype).unwrap());
        all.extend((seed % 2 == 0).then(|| random.normal(outputs).to_dtype(dtype).unwrap()));
        let what = format!("linear {inputs} -> {outputs} {dtype:?}");
        agree(&what, &device, &all, tolerance(dtype), |x| Ok(vec![linear(&x[0], &x[1], x.get(2))?]));
    }
}

#[test]
fn embeddings() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(24);
    for seed in 0..24 {
        let dtype = [DType::F32, DType::BF16, DType::F16, DType::F64][seed % 4];
        let (rows, width) = ([1, 9, 300][random.int(0, 2)], [1, 7, 128, 300][random.int(0, 3)]);
        let weight = random.normal((rows, width)).to_dtype(dtype).unwrap();
        let ids: Vec<u32> = (0..2 * 37).map(|_| random.int(0, rows - 1) as u32).collect();
        let ids = Tensor::from_vec(ids, (2, 37), &Device::Cpu).unwrap();
        let what = format!("embedding {rows} {width} {dtype:?}");
        agree(&what, &device, &[weight], tolerance(dtype), |x| {
            Ok(vec![embedding(&x[0], &ids.to_device(x[0].device())?)?])
        });
    }
}

#[test]
fn the_loss() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(22);
    for seed in 0..36 {
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let vocabulary = [1, 2, 17, 256, 1501, 50280][seed / 6];
        let rows = random.int(1, 7);
        // rows of a padded vocabulary, now and then
        let padded = vocabulary + if seed % 2 == 0 { 8 } else { 0 };
        let logits = (random.normal((2, rows, padded)) * 3.0).unwrap().to_dtype(dtype).unwrap();
        let logits = logits.narrow(2, 0, vocabulary).unwrap();
        let mut ids: Vec<u32> = (0..2 * rows).map(|_| random.int(0, vocabulary - 1) as u32).collect();
        ids[rows] = IGNORE;
        let targets = Tensor::from_slice(&ids, (2, rows), &Device::Cpu).unwrap();
        let what = format!("loss of {rows} rows of {vocabulary} {dtype:?}");
        agree(&what, &device, &[logits], tolerance(dtype), |x| {
            let loss = cross_entropy(&x[0], &targets.to_device(x[0].device())?)?;
            assert_eq!(loss.targets, ids.len() - 1);
            Ok(vec![loss.total])
        });
    }
    // what is no number stays none
    for (value, dtype) in [(f32::NAN, DType::F32), (f32::INFINITY, DType::BF16)] {
        let logits = Tensor::new(&[[0f32, value, 1.0]], &device).unwrap().to_dtype(dtype).unwrap();
        let target = Tensor::new(&[0u32], &device).unwrap();
        let total = cross_entropy(&logits, &target).unwrap().total.to_scalar::<f32>().unwrap();
        assert!(!total.is_finite(), "{value}: {total}");
    }
}

/// Variables of several dtypes and sizes, more than a block's among them, and gradients for them.
fn parameters(device: &Device) -> (BTreeMap<String, Var>, Vec<Vec<Tensor>>) {
    let random = &mut Random::new(23);
    let mut variables = BTreeMap::new();
    for (i, dtype) in [DType::F32, DType::BF16, DType::F16, DType::F64].into_iter().enumerate() {
        for (j, size) in [1, 77, 4096, 10_001].into_iter().enumerate() {
            let value = random.normal(size).to_dtype(dtype).unwrap().to_device(device).unwrap();
            variables.insert(format!("p{i}{j}"), Var::from_tensor(&value).unwrap());
        }
    }
    let step = |_| {
        let gradient = |x: &Var| random.normal(x.elem_count()).to_dtype(x.dtype()).unwrap();
        variables.values().map(gradient).collect()
    };
    let gradients = (0..4).map(step).collect();
    (variables, gradients)
}

/// The gradients of `sum w g`: exactly `g`.
fn exact(variables: &BTreeMap<String, Var>, gradients: &[Tensor]) -> Gradients {
    let device = variables.values().next().unwrap().device();
    let mut loss = Tensor::zeros((), DType::F64, device).unwrap();
    for (variable, gradient) in variables.values().zip(gradients) {
        let term = (variable.as_tensor() * gradient.to_device(device).unwrap()).unwrap();
        loss = (loss + term.to_dtype(DType::F64).unwrap().sum_all().unwrap()).unwrap();
    }
    Gradients::take(variables, &mut loss.backward().unwrap())
}

#[test]
fn the_optimizer() {
    let Some(device) = gpu() else { return };
    for with_f64 in [false, true] {
        let run = |device: &Device| {
            let (mut variables, steps) = parameters(device);
            let mut steps = steps;
            if !with_f64 {
                let kept = |x: &Tensor| x.dtype() != DType::F64;
                steps.iter_mut().for_each(|gradients| gradients.retain(kept));
                variables.retain(|_, x| x.dtype() != DType::F64);
            }
            let mut optimizer = AdamW::new(&variables, AdamWConfig::default()).unwrap();
            let mut norms = vec![];
            for (i, gradients) in steps.iter().enumerate() {
                let mut gradients = exact(&variables, gradients);
                norms.push(gradients.clip(1.0).unwrap());
                if i == 2 {
                    // a state put back is the state; and one taken earlier does not move with the optimiser
                    let state = optimizer.state().unwrap();
                    optimizer.step(&gradients, 0.1).unwrap();
                    optimizer.restore(&state, 2).unwrap();
                }
                optimizer.step(&gradients, 1e-2).unwrap();
            }
            let state: Vec<Tensor> = optimizer.state().unwrap().into_values().collect();
            let values: Vec<Tensor> = variables.values().map(|x| x.as_tensor().clone()).collect();
            (to(&values, &Device::Cpu), to(&state, &Device::Cpu), norms)
        };
        let (got, want) = (run(&device), run(&Device::Cpu));
        for (got, want) in got.2.iter().zip(&want.2) {
            assert!((got - want).abs() < 1e-5 * want, "norm {got}, {want}");
        }
        for (i, (got, want)) in got.0.iter().zip(&want.0).chain(got.1.iter().zip(&want.1)).enumerate() {
            assert_eq!(got.dtype(), want.dtype());
            // clipping is by one norm, to which f32 gradients add their rounding
            let tolerance = match got.dtype() {
                DType::F32 => 1e-4,
                DType::F64 => 1e-7,
                other => tolerance(other),
            };
            assert_close(&format!("optimiser: tensor {i}"), got, want, tolerance);
        }
    }
}

#[test]
fn steps_of_training() {
    let Some(device) = gpu() else { return };
    let configs = [ModelConfig::mamba(64, 3, 61), ModelConfig::retnet(64, 3, 61)];
    for (config, (dtype, tolerance)) in
        configs.iter().flat_map(|c| [(DType::F32, 1e-3), (DType::BF16, 4e-2)].map(|precision| (c, precision)))
    {
        let losses = |device: &Device, recompute: bool| {
            let mut model = LanguageModel::init(config, 4, dtype, device).unwrap();
            model.set_recompute(recompute);
            // With the usual epsilon, gradients that are nothing but rounding move their parameters by whole steps, and a
            // loss that falls fast makes much of little: on the CPU, f32 and f64 part by 2e-3 in 15 steps of this RetNet at
            // an epsilon of 1e-4 and a rate of 3e-3, by 2e-6 here.
            let mut settings = TrainerConfig::new(Schedule::constant(1e-3));
            settings.optimizer.epsilon = 1e-3;
            let mut trainer = Trainer::new(model, settings).unwrap();
            let random = &mut Random::new(5);
            let ids: Vec<u32> = (0..4 * 33).map(|_| random.int(0, 60) as u32).collect();
            let ids = Tensor::from_vec(ids, (4, 33), device).unwrap();
            let part = |start| ids.narrow(1, start, 32).unwrap().contiguous().unwrap();
            let batch = Batch::new(part(0), part(1));
            let step = |_| trainer.step(std::slice::from_ref(&batch)).unwrap().loss;
            (0..15).map(step).collect::<Vec<f64>>()
        };
        let want = losses(&Device::Cpu, false);
        for recompute in [false, true] {
            let got = losses(&device, recompute);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() < tolerance * want, "{dtype:?} step {i}: loss {got}, {want}");
            }
            assert_eq!(got, losses(&device, recompute), "the same steps twice");
        }
        assert!(want[14] < 0.8 * want[0], "{want:?}");
    }
}
