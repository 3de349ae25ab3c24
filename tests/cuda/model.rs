//! Whole models: logits, streaming, generation, training.

use crate::common::*;
use crate::gpu;
use candle_core::{DType, Device, Tensor};
use subquadratic::generate::{GenerationConfig, generate};
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::ops::Form;
use subquadratic::train::{Batch, Schedule, Trainer, TrainerConfig};

const VOCABULARY: usize = 61;

fn model(seed: u64, dtype: DType, device: &Device) -> LanguageModel {
    LanguageModel::init(&ModelConfig::mamba(64, 3, VOCABULARY), seed, dtype, device).unwrap()
}

fn ids(random: &mut Random, rows: usize, length: usize, device: &Device) -> Tensor {
    let ids: Vec<u32> = (0..rows * length).map(|_| random.int(0, VOCABULARY - 1) as u32).collect();
    Tensor::from_vec(ids, (rows, length), device).unwrap()
}

#[test]
fn logits_are_the_cpus() {
    let Some(device) = gpu() else { return };
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 3e-2)] {
        let (cpu, cuda) = (model(1, dtype, &Device::Cpu), model(1, dtype, &device));
        let ids = ids(&mut Random::new(2), 2, 70, &Device::Cpu);
        let want = cpu.forward(&ids).unwrap();
        let ids = ids.to_device(&device).unwrap();
        let got = cuda.forward(&ids).unwrap();
        let host = |x: &Tensor| x.to_device(&Device::Cpu).unwrap();
        assert_close(&format!("{dtype:?}"), &host(&got), &want, tolerance);
        // and token by token
        let mut state = cuda.init_state(2).unwrap();
        let step = |t| cuda.forward_with_state(&ids.narrow(1, t, 1)?.contiguous()?, &mut state);
        let steps: Vec<Tensor> = (0..70).map(step).collect::<Result<_, _>>().unwrap();
        assert_close(&format!("{dtype:?} steps"), &host(&Tensor::cat(&steps, 1).unwrap()), &want, tolerance);
    }
}

#[test]
fn generates_what_the_cpu_generates() {
    let Some(device) = gpu() else { return };
    let prompts = [vec![1u32, 2, 3], vec![4, 5, 6, 7, 8]];
    let config = || GenerationConfig { max_tokens: 20, ..Default::default() };
    let want = generate(&model(3, DType::F32, &Device::Cpu), &prompts, config()).unwrap();
    assert_eq!(generate(&model(3, DType::F32, &device), &prompts, config()).unwrap(), want);
}

#[test]
fn training_goes_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::BF16, 2e-2)] {
        let losses = |device: &Device| -> Vec<f64> {
            let mut trainer =
                Trainer::new(model(4, dtype, device), TrainerConfig::new(Schedule::constant(3e-3))).unwrap();
            let random = &mut Random::new(5);
            let all = ids(random, 4, 33, device);
            let part = |start| all.narrow(1, start, 32).unwrap().contiguous().unwrap();
            let batch = Batch::new(part(0), part(1));
            (0..15).map(|_| trainer.step(std::slice::from_ref(&batch)).unwrap().loss).collect()
        };
        let (want, got) = (losses(&Device::Cpu), losses(&device));
        assert!(want[14] < 0.8 * want[0], "{want:?}");
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= tolerance * want, "{got} {want}");
        }
    }
}

/// A RetNet in every form: the whole, and token by token.
#[test]
fn a_retnet_is_the_cpus() {
    let Some(device) = gpu() else { return };
    for form in [Form::Parallel, Form::Chunkwise { chunk: 32 }, Form::Recurrent] {
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 3e-2)] {
            let config = ModelConfig::retnet(64, 2, VOCABULARY);
            let model = |device: &Device| {
                let mut model = LanguageModel::init(&config, 1, dtype, device).unwrap();
                assert!(model.set_form(form).unwrap());
                model
            };
            let (cpu, cuda) = (model(&Device::Cpu), model(&device));
            let ids = ids(&mut Random::new(2), 2, 70, &Device::Cpu);
            let want = cpu.forward(&ids).unwrap();
            let ids = ids.to_device(&device).unwrap();
            let host = |x: &Tensor| x.to_device(&Device::Cpu).unwrap();
            let what = format!("{form:?} {dtype:?}");
            assert_close(&what, &host(&cuda.forward(&ids).unwrap()), &want, tolerance);
            let mut state = cuda.init_state(2).unwrap();
            let step = |t| cuda.forward_with_state(&ids.narrow(1, t, 1)?.contiguous()?, &mut state);
            let steps: Vec<Tensor> = (0..70).map(step).collect::<Result<_, _>>().unwrap();
            assert_close(&what, &host(&Tensor::cat(&steps, 1).unwrap()), &want, tolerance);
        }
    }
}
