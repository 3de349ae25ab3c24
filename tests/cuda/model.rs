//! Whole models: logits, streaming, generation, the memory of long prompts.

use crate::common::*;
use crate::gpu;
use candle_core::{DType, Device, Tensor};
use subquadratic::generate::{GenerationConfig, generate};
use subquadratic::models::{LanguageModel, ModelConfig, load};
use subquadratic::ops::{Form, Segments};

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

/// Every published layout: the whole, and token by token where there are states; packed rows.
#[test]
fn checkpoints_are_the_cpus() {
    let Some(device) = gpu() else { return };
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let directories = std::fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path());
    let mut seen = 0;
    for directory in directories.filter(|path| path.join("config.json").exists()) {
        let host = |x: &Tensor| x.to_device(&Device::Cpu).unwrap();
        let [cpu, cuda] = [&Device::Cpu, &device].map(|on| load(&directory, DType::F32, on).unwrap());
        let what = directory.file_name().unwrap().to_string_lossy().into_owned();
        let vocabulary = cpu.config().vocab_size as u32;
        let ids: Vec<u32> = (0..40).map(|i| (7 * i * i + i) % vocabulary).collect();
        let ids = Tensor::from_vec(ids, (2, 20), &Device::Cpu).unwrap();
        let there = ids.to_device(&device).unwrap();
        if !cpu.config().lm_head {
            continue;
        }
        let want = cpu.forward(&ids).unwrap();
        assert_close(&what, &host(&cuda.forward(&there).unwrap()), &want, 1e-4);
        let marks = Tensor::from_vec((0..40).map(|i| (i % 7 == 3) as u8).collect(), (2, 20), &Device::Cpu);
        let segments = Segments::from_marks(&marks.unwrap()).unwrap();
        if let Ok(want) = cpu.forward_segments(&ids, Some(&segments), None) {
            let got = cuda.forward_segments(&there, Some(&segments), None).unwrap();
            assert_close(&format!("{what}, packed"), &host(&got), &want, 1e-4);
        }
        seen += 1;
        let Ok(mut state) = cuda.init_state(2) else { continue };
        let step = |t| cuda.forward_with_state(&there.narrow(1, t, 1)?.contiguous()?, &mut state);
        if let Ok(steps) = (0..20).map(step).collect::<Result<Vec<_>, _>>() {
            assert_close(&format!("{what}, steps"), &host(&Tensor::cat(&steps, 1).unwrap()), &want, 1e-4);
        }
    }
    assert!(seen > 20, "{seen} fixtures");
}

#[test]
fn generates_what_the_cpu_generates() {
    let Some(device) = gpu() else { return };
    let prompts = [vec![1u32, 2, 3], vec![4, 5, 6, 7, 8]];
    let config = || GenerationConfig { max_tokens: 20, ..Default::default() };
    let want = generate(&model(3, DType::F32, &Device::Cpu), &prompts, config()).unwrap();
    assert_eq!(generate(&model(3, DType::F32, &device), &prompts, config()).unwrap(), want);
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

/// A prompt four times as long needs no more memory: it goes through the stack some 16,000 tokens at a time, and a block's
/// activations are all that is alive.
#[test]
fn the_memory_of_a_prompt_does_not_grow_with_it() {
    let Some(device) = gpu() else { return };
    let config = ModelConfig::retnet(1024, 6, VOCABULARY);
    let model = LanguageModel::init(&config, 1, DType::BF16, &device).unwrap().frozen().unwrap();
    let random = &mut Random::new(6);
    // what was freed stays with the process, so that this is the most it ever had
    let used = || {
        let (free, total) = candle_core::cuda_backend::cudarc::driver::result::mem_get_info().unwrap();
        (total - free) as f64 / 1e6
    };
    let mut prefill = |length: usize| {
        let ids = ids(random, 1, length, &device);
        let mut state = model.init_state(1).unwrap();
        let logits = model.prefill(&ids, None, &mut state).unwrap();
        assert!(values(&logits.to_device(&Device::Cpu).unwrap()).iter().all(|x| x.is_finite()));
        used()
    };
    let before = used();
    let (short, long) = (prefill(16_384), prefill(65_536));
    println!("used: {before:.0} MB before, {short:.0} behind 16384 tokens, {long:.0} behind 65536");
    // other tests run beside this one
    let block = 16_384.0 * 1024.0 * 2.0 * 20.0 / 1e6;
    assert!(long < short + block, "{before:.0} {short:.0} {long:.0} MB");
}
