//! Training steps: micro-batches, carried states, packing, bad input, deep stacks, and a model that learns.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Random, assert_close, values};
use subquadratic::generate::{GenerationConfig, generate};
use subquadratic::models::{LanguageModel, MixerConfig, ModelConfig};
use subquadratic::ops::Segments;
use subquadratic::train::{AdamW, Batch, Gradients, IGNORE, Schedule, Trainer, TrainerConfig, cross_entropy};

fn tiny(seed: u64, dtype: DType) -> LanguageModel {
    LanguageModel::init(&ModelConfig::mamba(16, 2, 30), seed, dtype, &Device::Cpu).unwrap()
}

fn ids(random: &mut Random, rows: usize, length: usize) -> Tensor {
    let ids: Vec<u32> = (0..rows * length).map(|_| random.int(0, 29) as u32).collect();
    Tensor::from_vec(ids, (rows, length), &Device::Cpu).unwrap()
}

fn cut(ids: &Tensor, rows: std::ops::Range<usize>, tokens: std::ops::Range<usize>) -> Batch {
    let part = |shift: usize| {
        let rows = ids.narrow(0, rows.start, rows.len()).unwrap();
        rows.narrow(1, tokens.start + shift, tokens.len()).unwrap().contiguous().unwrap()
    };
    Batch::new(part(0), part(1))
}

/// Plain descent would do; the point is what gradients the step sees, so the update must not hide their size.
fn config() -> TrainerConfig {
    let mut config = TrainerConfig::new(Schedule::constant(1e-2));
    config.optimizer.epsilon = 1.0;
    config.max_gradient_norm = f64::INFINITY;
    config
}

fn assert_same_weights(what: &str, got: &LanguageModel, want: &LanguageModel, tolerance: f64) {
    for (name, want) in want.variables() {
        assert_close(&format!("{what}: {name}"), &got.variables()[name], want, tolerance);
    }
}

#[test]
fn micro_batches_are_the_big_batch() {
    let mut random = Random::new(7);
    let all = ids(&mut random, 6, 13);
    let mut whole = cut(&all, 0..6, 0..12);
    // rows with different numbers of targets: the mean is over all of them
    let mut targets = whole.targets.to_vec2::<u32>().unwrap();
    targets[0][3..].fill(IGNORE);
    targets[4].fill(IGNORE);
    targets[5].fill(IGNORE);
    whole.targets = Tensor::new(targets, &Device::Cpu).unwrap();
    let part = |start: usize, rows: usize| {
        let rows = |x: &Tensor| x.narrow(0, start, rows).unwrap();
        Batch::new(rows(&whole.inputs), rows(&whole.targets))
    };
    let parts = [part(0, 1), part(1, 3), part(4, 2)];
    let mut big = Trainer::new(tiny(1, DType::F64), config()).unwrap();
    let mut small = Trainer::new(tiny(1, DType::F64), config()).unwrap();
    for _ in 0..3 {
        let a = big.step(std::slice::from_ref(&whole)).unwrap();
        let b = small.step(&parts).unwrap();
        assert!((a.loss - b.loss).abs() < 1e-12 && (a.gradient_norm / b.gradient_norm - 1.0).abs() < 1e-10);
        assert_eq!((a.tokens, b.tokens), (72, 72));
    }
    assert_same_weights("micro-batches", small.model(), big.model(), 1e-10);
}

#[test]
fn carried_states_are_truncated_back_propagation_by_hand() {
    let mut random = Random::new(8);
    let all = ids(&mut random, 2, 31);
    let mut trainer = Trainer::new(tiny(2, DType::F64), config()).unwrap();
    let manual = tiny(2, DType::F64);
    let mut optimizer = AdamW::new(manual.variables(), config().optimizer).unwrap();
    let mut state = manual.init_state(2).unwrap();
    let mut fresh_differs = false;
    for window in 0..3 {
        let mut batch = cut(&all, 0..2, window * 10..(window + 1) * 10);
        batch.carry = window > 0;
        // a batch of another stream in between changes nothing
        let mut other = cut(&all, 0..1, 0..5);
        other.targets = Tensor::full(IGNORE, (1, 5), &Device::Cpu).unwrap();
        other.stream = 1;
        let report = trainer.step(&[batch.clone(), other]).unwrap();

        let fresh = cross_entropy(&manual.forward(&batch.inputs).unwrap(), &batch.targets).unwrap();
        state.detach();
        let logits = manual.forward_with_state(&batch.inputs, &mut state).unwrap();
        let loss = cross_entropy(&logits, &batch.targets).unwrap().mean().unwrap();
        assert!((report.loss - values(&loss)[0]).abs() < 1e-12);
        fresh_differs |= (report.loss - values(&fresh.mean().unwrap())[0]).abs() > 1e-6;
        let mut store = loss.backward().unwrap();
        optimizer.step(&Gradients::take(manual.variables(), &mut store), 1e-2).unwrap();
    }
    assert!(fresh_differs, "the state matters");
    assert_same_weights("truncated", trainer.model(), &manual, 1e-12);
}

#[test]
fn packed_rows_train_as_separate_rows() {
    let mut random = Random::new(9);
    let all = ids(&mut random, 2, 9);
    let apart = cut(&all, 0..2, 0..8);
    let joined = |x: &Tensor| x.reshape((1, 16)).unwrap();
    let mut packed = Batch::new(joined(&apart.inputs), joined(&apart.targets));
    packed.segments = Some(Segments::packed(&[vec![8, 8]], 16).unwrap());
    let mut a = Trainer::new(tiny(3, DType::F64), config()).unwrap();
    let mut b = Trainer::new(tiny(3, DType::F64), config()).unwrap();
    a.step(&[apart]).unwrap();
    b.step(&[packed]).unwrap();
    assert_same_weights("packed", b.model(), a.model(), 1e-10);
}

#[test]
fn a_tiny_mamba_overfits() {
    for (dtype, recompute) in [(DType::F32, false), (DType::BF16, false), (DType::F32, true)] {
        let mut random = Random::new(10);
        let all = ids(&mut random, 2, 25);
        let batch = cut(&all, 0..2, 0..24);
        let mut trainer =
            Trainer::new(tiny(4, dtype), TrainerConfig::new(Schedule::cosine(2e-2, 5, 80))).unwrap();
        trainer.model_mut().set_recompute(recompute);
        let first = trainer.step(std::slice::from_ref(&batch)).unwrap();
        assert!((first.loss - 30f64.ln()).abs() < 0.3, "{first:?}");
        assert!(first.tokens_per_second() > 0.0);
        for _ in 1..80 {
            trainer.step(std::slice::from_ref(&batch)).unwrap();
        }
        let after = trainer.evaluate([Ok(batch)]).unwrap();
        assert!(after < 0.1, "{dtype:?}: {} -> {after}", first.loss);
    }
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let mut random = Random::new(11);
    let batch = cut(&ids(&mut random, 1, 9), 0..1, 0..8);
    let broken = || {
        let model = tiny(5, DType::F32);
        let d = &model.variables()["backbone.layers.0.mixer.D"];
        d.set(&(d.ones_like().unwrap() * f64::NAN).unwrap()).unwrap();
        model
    };
    let weights = |trainer: &Trainer| {
        trainer.model().variables().values().flat_map(|x| common::bits(x)).collect::<Vec<_>>()
    };
    let mut trainer = Trainer::new(broken(), config()).unwrap();
    let before = weights(&trainer);
    let error = trainer.step(std::slice::from_ref(&batch)).unwrap_err().to_string();
    assert!(error.contains("step 0") && error.contains("NaN"), "{error}");
    assert_eq!((weights(&trainer) == before, trainer.steps()), (true, 0));

    let mut trainer = Trainer::new(broken(), TrainerConfig { skip_nonfinite: true, ..config() }).unwrap();
    let report = trainer.step(&[batch]).unwrap();
    assert!(report.skipped && report.gradient_norm.is_nan());
    assert_eq!((weights(&trainer) == before, trainer.steps()), (true, 1));
}

#[test]
fn bad_batches_and_settings_are_named() {
    let mut random = Random::new(12);
    let mut trainer = Trainer::new(tiny(6, DType::F32), config()).unwrap();
    let batch = cut(&ids(&mut random, 2, 9), 0..2, 0..8);
    let mut fails = |change: fn(&mut Batch), word: &str| {
        let mut batch = batch.clone();
        change(&mut batch);
        let error = trainer.step(&[batch]).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert_eq!(trainer.steps(), 0);
    };
    fails(|b| b.targets = Tensor::full(IGNORE, (2, 8), &Device::Cpu).unwrap(), "not ignored");
    fails(|b| b.targets = Tensor::full(30u32, (2, 8), &Device::Cpu).unwrap(), "below V = 30");
    fails(|b| b.inputs = Tensor::full(30u32, (2, 8), &Device::Cpu).unwrap(), "30");
    fails(|b| b.targets = b.targets.to_dtype(DType::I64).unwrap(), "u32");
    fails(|b| b.targets = b.targets.narrow(1, 0, 7).unwrap(), "targets");
    fails(|b| b.inputs = b.inputs.get(0).unwrap(), "[B, L]");
    assert!(trainer.step(&[]).is_err());

    let frozen = tiny(6, DType::F32).frozen().unwrap();
    assert!(Trainer::new(frozen, config()).unwrap_err().to_string().contains("trainable"));
    let mut bad = config();
    bad.max_gradient_norm = 0.0;
    assert!(Trainer::new(tiny(6, DType::F32), bad).unwrap_err().to_string().contains("max_gradient_norm"));
    let mut bad = config();
    bad.optimizer.beta2 = 1.0;
    assert!(Trainer::new(tiny(6, DType::F32), bad).unwrap_err().to_string().contains("beta2"));
}

/// candle walks and drops graphs by recursion, which a stack of blocks this deep would overflow many times over.
#[test]
fn deep_models_train_and_generate_on_a_small_stack() {
    let run = || {
        let mut config = ModelConfig::mamba(4, 2000, 30);
        for block in &mut config.blocks {
            let MixerConfig::Mamba(mixer) = &mut block.mixer else { panic!("a Mamba") };
            (mixer.d_inner, mixer.d_state) = (4, 2);
        }
        let mut random = Random::new(13);
        let batch = cut(&ids(&mut random, 2, 6), 0..2, 0..5);
        let mut reports = vec![];
        for recompute in [false, true] {
            let mut model = LanguageModel::init(&config, 7, DType::F32, &Device::Cpu).unwrap();
            model.set_recompute(recompute);
            let mut trainer = Trainer::new(model, self::config()).unwrap();
            // no graph is left over where nothing counts, nor where a target is wrong
            let mut ignored = batch.clone();
            ignored.targets = Tensor::full(IGNORE, (2, 5), &Device::Cpu).unwrap();
            ignored.stream = 1;
            let mut wrong = batch.clone();
            wrong.targets = Tensor::full(30u32, (2, 5), &Device::Cpu).unwrap();
            assert!(trainer.step(&[batch.clone(), wrong]).is_err());
            let report = trainer.step(&[batch.clone(), ignored]).unwrap();
            assert!(trainer.evaluate([Ok(batch.clone())]).unwrap() < report.loss);
            reports.push(report);
            let tokens =
                generate(trainer.model(), &[vec![1u32, 2], vec![3]], GenerationConfig::greedy(3)).unwrap();
            assert_eq!(tokens.concat().len(), 6);
        }
        let [a, b] = &reports[..] else { unreachable!() };
        assert!(a.loss == b.loss && (a.gradient_norm / b.gradient_norm - 1.0).abs() < 1e-5, "{reports:?}");
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}
