//! A small grid of retention's kernels, for compute-sanitizer: every kernel of every dtype once, ragged in every size.

use crate::common::*;
use crate::gpu;
use crate::pool_laws::args;
use crate::retention_case::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::layers::retention::RetentionConfig;
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::ops::{RetentionPool, RetentionPoolConfig};

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

/// A layer's other kernels: rotary embedding, norms, gates.
#[test]
fn a_model() {
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
