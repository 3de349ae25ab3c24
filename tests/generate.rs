//! Generation: what is drawn depends on the prompt, the settings and the seed alone, however it is batched or cut.

mod common;

use candle_core::{DType, Device, Tensor};
use common::Random;
use proptest::prelude::*;
use std::sync::OnceLock;
use subquadratic::generate::{Finish, Generation, GenerationConfig, Sampler, Token, generate};
use subquadratic::layers::LayerState;
use subquadratic::models::{LanguageModel, ModelConfig};

const VOCABULARY: usize = 50;

/// A small model with random weights; with a head of its own, as a tied one would repeat the last token.
fn model() -> &'static LanguageModel {
    static MODEL: OnceLock<LanguageModel> = OnceLock::new();
    MODEL.get_or_init(|| {
        let mut config = ModelConfig::mamba(24, 2, VOCABULARY);
        config.initializer_range = 1.0;
        config.tie_embeddings = false;
        LanguageModel::init(&config, 3, DType::F32, &Device::Cpu).unwrap().frozen().unwrap()
    })
}

fn prompt(random: &mut Random, length: usize) -> Vec<u32> {
    (0..length).map(|_| random.int(0, VOCABULARY - 1) as u32).collect()
}

/// Logits of the last token of `ids`, by one forward pass over all of it.
fn last_logits(ids: &[u32]) -> Tensor {
    let ids = Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = model().forward(&ids).unwrap();
    logits.get(0).unwrap().get(ids.dim(1).unwrap() - 1).unwrap()
}

#[test]
fn greedy_is_the_argmax_of_full_forward_passes() {
    let mut random = Random::new(1);
    let mut seen = std::collections::HashSet::new();
    for length in [1, 2, 7, 30] {
        let prompt = prompt(&mut random, length);
        let mut ids = prompt.clone();
        for _ in 0..12 {
            ids.push(last_logits(&ids).argmax(0).unwrap().to_scalar().unwrap());
        }
        let got = generate(model(), &[&prompt], GenerationConfig::greedy(12)).unwrap();
        assert_eq!(got, [&ids[length..]]);
        seen.extend(got[0].clone());
    }
    assert!(seen.len() > 3, "the model says always the same: {seen:?}");
}

#[test]
fn sampling_is_the_sampler_on_full_forward_passes() {
    let mut random = Random::new(2);
    let config = GenerationConfig {
        max_tokens: 15,
        temperature: 0.9,
        top_k: Some(20),
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.3,
        seed: 5,
        ..Default::default()
    };
    let prompt = prompt(&mut random, 9);
    let mut sampler = Sampler::new(&config, 0).unwrap();
    sampler.observe(&prompt);
    let mut ids = prompt.clone();
    for _ in 0..15 {
        ids.push(sampler.sample(&last_logits(&ids)).unwrap());
    }
    assert_eq!(generate(model(), &[&prompt], config).unwrap(), [&ids[9..]]);
}

#[test]
fn a_seed_decides_everything() {
    let prompts = [vec![1u32, 2, 3], vec![4, 5]];
    let run = |seed| {
        let config = GenerationConfig { max_tokens: 20, seed, ..Default::default() };
        generate(model(), &prompts, config).unwrap()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let same = [vec![1u32, 2, 3], vec![1, 2, 3]];
    let config = GenerationConfig { max_tokens: 20, ..Default::default() };
    let rows = generate(model(), &same, config).unwrap();
    assert_ne!(rows[0], rows[1], "a stream for each row");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn rows_of_unequal_prompts_are_the_single_runs(
        seed in 0u64..1000,
        lengths in prop::collection::vec(1usize..40, 1..5),
        greedy in any::<bool>(),
        penalty in prop_oneof![Just(1.0), Just(1.2)],
    ) {
        let mut random = Random::new(seed);
        let prompts: Vec<Vec<u32>> = lengths.iter().map(|&length| prompt(&mut random, length)).collect();
        let config = GenerationConfig {
            max_tokens: 10,
            temperature: if greedy { 0.0 } else { 1.0 },
            top_p: 0.9,
            repetition_penalty: penalty,
            // rows end at different steps
            stop_tokens: prompt(&mut random, 4),
            seed,
            ..Default::default()
        };
        let together = generate(model(), &prompts, config.clone()).unwrap();
        for (row, prompt) in prompts.iter().enumerate() {
            let config = GenerationConfig { seed: seed + row as u64, ..config.clone() };
            prop_assert_eq!(&generate(model(), &[prompt], config).unwrap()[0], &together[row]);
        }
    }
}

#[test]
fn a_row_ends_with_its_first_stop_token_or_at_the_limit() {
    let prompts = [vec![1u32], vec![2, 3, 4], vec![5, 6], vec![7]];
    let free = GenerationConfig { max_tokens: 24, seed: 3, ..Default::default() };
    let rows = generate(model(), &prompts, free.clone()).unwrap();
    assert!(rows.iter().all(|row| row.len() == 24));
    // tokens that end some rows early
    let stop_tokens = vec![rows[0][3], rows[2][10]];
    let stopped = GenerationConfig { stop_tokens: stop_tokens.clone(), ..free };
    let mut finishes = vec![None; prompts.len()];
    let mut got = vec![vec![]; prompts.len()];
    for step in Generation::new(model(), &prompts, stopped.clone()).unwrap() {
        let step = step.unwrap();
        let rows: Vec<usize> = step.iter().map(|token| token.row).collect();
        let running: Vec<usize> = (0..prompts.len()).filter(|&row| finishes[row].is_none()).collect();
        assert_eq!(rows, running, "one token of each running row, in order");
        for Token { row, id, finish } in step {
            got[row].push(id);
            finishes[row] = finish;
        }
    }
    assert_eq!(got, generate(model(), &prompts, stopped).unwrap());
    let mut short = 0;
    for (row, (all, got)) in rows.iter().zip(&got).enumerate() {
        let end = all.iter().position(|id| stop_tokens.contains(id)).map_or(24, |place| place + 1);
        assert_eq!(got, &all[..end]);
        let reason = if stop_tokens.contains(&got[end - 1]) { Finish::Stop } else { Finish::Length };
        assert_eq!(finishes[row], Some(reason));
        short += usize::from(end < 24);
    }
    assert!(short >= 2);
}

#[test]
fn a_prefix_read_once_serves_many() {
    let mut random = Random::new(4);
    let prefix = prompt(&mut random, 21);
    let mut state = model().init_state(1).unwrap();
    let ids = Tensor::new(&prefix[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    model().prefill(&ids, None, &mut state).unwrap();
    let before = common::bits(state.blocks[0].tensors()[1].1);

    let ends = [vec![1u32, 2], vec![3], vec![4, 5, 6, 7]];
    let config = GenerationConfig { max_tokens: 9, seed: 8, ..Default::default() };
    let rows = state.select(&[0, 0, 0]).unwrap();
    let mut generation = Generation::with_state(model(), &ends, rows, config.clone()).unwrap();
    let mut got = vec![vec![]; 3];
    for step in generation.by_ref() {
        for token in step.unwrap() {
            got[token.row].push(token.id);
        }
    }
    let whole: Vec<Vec<u32>> = ends.iter().map(|end| [&prefix[..], end].concat()).collect();
    assert_eq!(got, generate(model(), &whole, config).unwrap());
    assert_eq!(before, common::bits(state.blocks[0].tensors()[1].1), "the prefix is left as it was");

    // and the states go on from there
    let states = generation.into_states().unwrap();
    for ((mut state, got), whole) in states.into_iter().zip(got).zip(whole) {
        assert_eq!(state.positions, [whole.len() + 8]);
        let next = Tensor::new(&[[got[8]]], &Device::Cpu).unwrap();
        let logits = model().prefill(&next, None, &mut state).unwrap().get(0).unwrap();
        common::assert_close("continued", &logits, &last_logits(&[whole, got].concat()), 1e-4);
    }
}

#[test]
fn states_of_a_generation_cut_short() {
    let prompts = [vec![1u32, 2, 3], vec![4]];
    let mut generation = Generation::new(model(), &prompts, GenerationConfig::greedy(10)).unwrap();
    generation.next().unwrap().unwrap();
    generation.next().unwrap().unwrap();
    let positions: Vec<_> =
        generation.into_states().unwrap().into_iter().map(|state| state.positions).collect();
    assert_eq!(positions, [[4], [2]]);
    let none = Generation::new(model(), &prompts, GenerationConfig::greedy(0)).unwrap();
    assert_eq!(none.count(), 0);
}

#[test]
fn a_trainable_model_generates_the_same() {
    let model = LanguageModel::init(&ModelConfig::mamba(16, 2, 40), 1, DType::F32, &Device::Cpu).unwrap();
    let config = GenerationConfig { max_tokens: 6, ..Default::default() };
    let prompts = [vec![1u32, 2, 3], vec![4u32]];
    let frozen = generate(&model.frozen().unwrap(), &prompts, config.clone()).unwrap();
    assert_eq!(generate(&model, &prompts, config).unwrap(), frozen);
}

#[test]
fn every_dtype_generates() {
    for dtype in [DType::F64, DType::BF16, DType::F16] {
        let model = LanguageModel::init(&ModelConfig::mamba(16, 1, 40), 1, dtype, &Device::Cpu).unwrap();
        let model = model.frozen().unwrap();
        let config = GenerationConfig { max_tokens: 4, ..Default::default() };
        let rows = generate(&model, &[vec![1u32, 2, 3], vec![4]], config).unwrap();
        assert!(rows.iter().all(|row| row.len() == 4), "{dtype:?}");
    }
}

#[test]
fn bad_requests_are_named() {
    let fails = |prompts: &[Vec<u32>], change: fn(&mut GenerationConfig), words: &[&str]| {
        let mut config = GenerationConfig::default();
        change(&mut config);
        let error = generate(model(), prompts, config).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    fails(&[], |_| (), &["prompts", "at least one"]);
    fails(&[vec![1], vec![]], |_| (), &["prompt 1", "at least one token"]);
    fails(&[vec![1], vec![2, 50]], |_| (), &["prompt 1", "vocabulary of 50", "50"]);
    fails(&[vec![1]], |c| c.stop_tokens = vec![3, 77], &["stop_tokens", "77"]);
    fails(&[vec![1]], |c| c.temperature = f64::NAN, &["temperature", "NaN"]);
    fails(&[vec![1]], |c| c.top_k = Some(0), &["top_k"]);
    let two = model().init_state(2).unwrap();
    let error = Generation::with_state(model(), &[vec![1u32]], two, GenerationConfig::default());
    assert!(error.unwrap_err().to_string().contains("rows of the state"));
}

#[test]
fn logits_that_are_not_numbers_end_the_generation() {
    let config = ModelConfig::mamba(16, 1, 40);
    let model = LanguageModel::init(&config, 1, DType::F32, &Device::Cpu).unwrap();
    let norm = &model.variables()["backbone.norm_f.weight"];
    norm.set(&(norm.ones_like().unwrap() * f64::NAN).unwrap()).unwrap();
    let mut generation = Generation::new(&model, &[vec![1u32]], GenerationConfig::default()).unwrap();
    let error = generation.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("logit of token 0") && error.contains("NaN"), "{error}");
    assert!(generation.next().is_none());
}
