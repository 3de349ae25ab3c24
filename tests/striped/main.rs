//! Attention and gated Hyena layers, alone and in hybrids: the streaming law over splits, packing and padding, gradients,
//! states, saving, bad input.

mod cache;
#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use common::*;
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use subquadratic::layers::attention::{QkvLayout, RotaryConfig};
use subquadratic::layers::modal_hyena::{ChannelOrder, HyenaFilter};
use subquadratic::layers::{Attention, AttentionConfig, LayerState, ModalHyena, ModalHyenaConfig};
use subquadratic::models::{LanguageModel, MixerConfig, ModelConfig, ModelState, load};
use subquadratic::ops::{RotaryStyle, Segments};

const D: usize = 12;

fn hyenas() -> Vec<ModalHyenaConfig> {
    let filters = [
        HyenaFilter::Complex { states: 3 },
        HyenaFilter::Real { states: 4, groups: 6 },
        HyenaFilter::Medium { taps: 11, groups: 4 },
        HyenaFilter::Short { taps: 4, groups: 12 },
    ];
    let orders = [ChannelOrder::Thirds, ChannelOrder::Columns { heads: 3 }, ChannelOrder::Interleaved];
    let config = |(i, filter): (usize, HyenaFilter)| ModalHyenaConfig {
        filter,
        order: orders[i % 3],
        short_bias: i != 1,
        projection_bias: i != 2,
        short_taps: 3 + i % 2,
        ..ModalHyenaConfig::new(D)
    };
    filters.into_iter().enumerate().map(config).collect()
}

fn attentions() -> Vec<AttentionConfig> {
    let base = AttentionConfig { heads: 6, kv_heads: 2, head_dim: 4, ..AttentionConfig::new(D, 3) };
    let scaled = RotaryConfig { base: 100.0, scaling: 4.0, style: RotaryStyle::Interleaved };
    vec![
        base.clone(),
        AttentionConfig { layout: QkvLayout::Joint, window: Some(4), out_bias: true, ..base.clone() },
        AttentionConfig { kv_heads: 6, layout: QkvLayout::JointByHead, rotary: Some(scaled), ..base.clone() },
        AttentionConfig { rotary: None, window: Some(1), qkv_bias: true, ..base },
    ]
}

/// A model of one block.
fn model(mixer: MixerConfig) -> LanguageModel {
    let mut config = ModelConfig::striped("mamba", D, 11).unwrap();
    config.blocks[0].mixer = mixer;
    LanguageModel::init(&config, 5, DType::F64, &Device::Cpu).unwrap()
}

fn models() -> Vec<(String, LanguageModel)> {
    let mut all = vec![];
    for config in hyenas() {
        all.push((format!("{config:?}"), model(MixerConfig::ModalHyena(config))));
    }
    for config in attentions() {
        all.push((format!("{config:?}"), model(MixerConfig::Attention(config))));
    }
    let patterns = [
        "mamba",
        "retention",
        "hyena attention",
        "mamba*2 attention hyena",
        "mamba hyena retention attention",
    ];
    for pattern in patterns {
        let config = ModelConfig::striped(pattern, D, 11).unwrap();
        all.push((pattern.into(), LanguageModel::init(&config, 6, DType::F64, &Device::Cpu).unwrap()));
    }
    // a long filter among the others
    let mut config = ModelConfig::striped("mamba*2 attention", D, 11).unwrap();
    config.blocks[1].mixer = ModelConfig::hyena(D, 1, 11, 48).blocks[0].mixer.clone();
    all.push((
        "with a long filter".into(),
        LanguageModel::init(&config, 6, DType::F64, &Device::Cpu).unwrap(),
    ));
    all
}

fn tokens(random: &mut Random, batch: usize, length: usize) -> Tensor {
    let ids: Vec<u32> = (0..batch * length).map(|_| random.int(0, 10) as u32).collect();
    Tensor::from_vec(ids, (batch, length), &Device::Cpu).unwrap()
}

/// Logits and state of `ids` in pieces of these lengths are those of one call.
fn check_split(what: &str, model: &LanguageModel, ids: &Tensor, split: &[usize]) {
    let (whole, once) = in_pieces(model, ids, &[ids.dim(1).unwrap()]);
    assert_close(&format!("{what} with a state"), &whole, &model.forward(ids).unwrap(), 1e-11);
    let (pieces, state) = in_pieces(model, ids, split);
    assert_close(&format!("{what} {split:?}"), &pieces, &whole, 1e-11);
    for (a, b) in once.blocks.iter().zip(&state.blocks) {
        for ((name, a), (_, b)) in a.tensors().into_iter().zip(b.tensors()) {
            assert_close(&format!("{what} {split:?}: state {name}"), b, a, 1e-11);
        }
    }
}

fn in_pieces(model: &LanguageModel, ids: &Tensor, split: &[usize]) -> (Tensor, ModelState) {
    let (mut state, mut start) = (model.init_state(ids.dim(0).unwrap()).unwrap(), 0);
    let mut piece = |&count: &usize| {
        start += count;
        model.forward_with_state(&ids.narrow(1, start - count, count).unwrap(), &mut state).unwrap()
    };
    let pieces: Vec<Tensor> = split.iter().map(&mut piece).collect();
    (Tensor::cat(&pieces, 1).unwrap(), state)
}

#[test]
fn any_split_equals_the_whole() {
    let random = &mut Random::new(1);
    for (what, model) in models() {
        // prompts of one token, which the packages get wrong, and all else: every way to cut seven tokens
        let ids = tokens(random, 2, 7);
        for cuts in 0u32..1 << 6 {
            let mut split = vec![1];
            for t in 0..6 {
                match cuts >> t & 1 {
                    1 => split.push(1),
                    _ => *split.last_mut().unwrap() += 1,
                }
            }
            check_split(&what, &model, &ids, &split);
        }
        // longer than every filter, window and chunk
        let ids = tokens(random, 2, 40);
        for split in [vec![1; 40], vec![1, 39], vec![39, 1], random.split(40, 5, 1)] {
            check_split(&what, &model, &ids, &split);
            check_split(&format!("frozen {what}"), &model.frozen().unwrap(), &ids, &split);
        }
    }
}

#[test]
fn packed_and_padded_rows_equal_each_alone() {
    let random = &mut Random::new(2);
    for (what, model) in models() {
        let ids = tokens(random, 2, 20);
        let packed = Segments::packed(&[vec![7, 1, 9], vec![3, 17]], 20).unwrap();
        let mut state = model.init_state(2).unwrap();
        let got = model.forward_segments(&ids, Some(&packed), Some(&mut state)).unwrap();
        for row in 0..2 {
            let mut last = None;
            for run in packed.row(row) {
                let (start, count) = (run.tokens.start, run.tokens.len());
                let part = ids.narrow(0, row, 1).unwrap().narrow(1, start, count).unwrap();
                let mut own = model.init_state(1).unwrap();
                let want = model.forward_with_state(&part, &mut own).unwrap();
                let got = got.narrow(0, row, 1).unwrap().narrow(1, start, count).unwrap();
                assert_close(&format!("{what}: packed row {row}, {start}"), &got, &want, 1e-11);
                last = Some(own);
            }
            // both go on alike
            let next = tokens(random, 1, 3);
            let want = model.forward_with_state(&next, &mut last.unwrap()).unwrap();
            let got = model.forward_with_state(&next, &mut state.select(&[row]).unwrap()).unwrap();
            assert_close(&format!("{what}: after packed row {row}"), &got, &want, 1e-11);
        }
        // padding on either side, a state carried over, then steps of rows of different lengths
        let lengths = [4, 9];
        for left in [true, false] {
            let cut = if left { Segments::left_padded } else { Segments::right_padded };
            let segments = cut(&lengths, 9).unwrap();
            let first = tokens(random, 2, 9);
            let mut state = model.init_state(2).unwrap();
            model.forward_segments(&first, Some(&segments), Some(&mut state)).unwrap();
            let next = tokens(random, 2, 4);
            let got = model.forward_with_state(&next, &mut state).unwrap();
            for (row, length) in lengths.into_iter().enumerate() {
                let start = if left { 9 - length } else { 0 };
                let bare = first.narrow(0, row, 1).unwrap().narrow(1, start, length).unwrap();
                let bare = Tensor::cat(&[&bare, &next.narrow(0, row, 1).unwrap()], 1).unwrap();
                let want = model.forward(&bare).unwrap().narrow(1, length, 4).unwrap();
                let got = got.narrow(0, row, 1).unwrap();
                assert_close(&format!("{what}: padded row {row}, left {left}"), &got, &want, 1e-11);
            }
        }
    }
}

/// `f` with the layer's parameters and `x`, `[1, 5, D]`, as inputs.
fn check_layer(
    what: &str,
    parameters: Vec<(String, Tensor)>,
    f: impl Fn(VarBuilder, &Tensor) -> subquadratic::Result<Vec<Tensor>>,
) {
    let random = &mut Random::new(3);
    let mut names = vec!["x".to_string()];
    let mut inputs = vec![random.normal((1, 5, D))];
    for (name, value) in parameters {
        let noise = (random.normal(value.shape()) * 0.05).unwrap();
        inputs.push((value.to_dtype(DType::F64).unwrap() + noise).unwrap());
        names.push(name);
    }
    let borrowed: Vec<&str> = names.iter().map(String::as_str).collect();
    check_gradients(what, &borrowed, &inputs, |inputs| {
        let map = names[1..].iter().cloned().zip(inputs[1..].iter().cloned());
        let vb = VarBuilder::from_tensors(map.collect::<HashMap<_, _>>(), DType::F64, &Device::Cpu);
        f(vb, &inputs[0])
    });
}

#[test]
fn gradients_of_layers_are_finite_differences_through_the_state_too() {
    let rng = &mut StdRng::seed_from_u64(1);
    for config in hyenas() {
        let parameters = ModalHyena::init(&config, rng, 1.0).unwrap();
        check_layer(&format!("{config:?}"), parameters, |vb, x| {
            let layer = ModalHyena::new(&config, vb)?;
            let mut state = layer.init_state(1)?;
            let first = layer.forward_with_state(&x.narrow(1, 0, 3)?, &mut state)?;
            let second = layer.forward_with_state(&x.narrow(1, 3, 2)?, &mut state)?;
            Ok(vec![first, second, state.short, state.filter])
        });
    }
    for config in attentions() {
        // a window of one is no function of queries and keys
        let config = AttentionConfig { window: config.window.map(|window| window.max(2)), ..config };
        // the softmax ignores a bias of the keys where there are no positions
        let config = AttentionConfig { qkv_bias: config.qkv_bias && config.rotary.is_some(), ..config };
        let parameters = config.init(rng, 1.0).unwrap();
        check_layer(&format!("{config:?}"), parameters, |vb, x| {
            let layer = Attention::new(&config, vb)?;
            let mut state = layer.init_state(1)?;
            let first = layer.forward_with_state(&x.narrow(1, 0, 3)?, &mut state)?;
            let second = layer.forward_with_state(&x.narrow(1, 3, 2)?, &mut state)?;
            Ok(vec![first, second, state.k().clone(), state.v().clone()])
        });
    }
}

#[test]
fn every_dtype_runs_and_is_near_f64() {
    for pattern in ["hyena attention mamba"] {
        let config = ModelConfig::striped(pattern, 64, 11).unwrap();
        let ids = tokens(&mut Random::new(4), 2, 40);
        let of = |dtype| LanguageModel::init(&config, 6, dtype, &Device::Cpu).unwrap().forward(&ids).unwrap();
        let exact = of(DType::F64);
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 1e-2), (DType::BF16, 8e-2)] {
            assert_close(&format!("{pattern} {dtype:?}"), &of(dtype), &exact, tolerance);
        }
    }
}

#[test]
fn models_and_states_come_back_from_files() {
    let random = &mut Random::new(5);
    let dir = tempfile::tempdir().unwrap();
    for (i, (what, model)) in models().into_iter().enumerate() {
        let path = dir.path().join(i.to_string());
        model.save(&path).unwrap();
        let back = load(&path, DType::F64, &Device::Cpu).unwrap();
        assert_eq!(back.config(), model.config(), "{what}");
        let ids = tokens(random, 2, 9);
        let model = model.frozen().unwrap();
        let (mut state, mut other) = (model.init_state(2).unwrap(), back.init_state(2).unwrap());
        let want = model.forward_with_state(&ids, &mut state).unwrap();
        assert_eq!(bits(&back.forward_with_state(&ids, &mut other).unwrap()), bits(&want), "{what}");
        let file = path.join("state.safetensors");
        state.save(&file).unwrap();
        let mut loaded = ModelState::load(&file, &Device::Cpu).unwrap();
        let next = tokens(random, 2, 3);
        let want = model.forward_with_state(&next, &mut state).unwrap();
        assert_eq!(bits(&model.forward_with_state(&next, &mut loaded).unwrap()), bits(&want), "{what}");
        state.reset().unwrap();
        let again = model.forward_with_state(&ids, &mut state).unwrap();
        assert_close(&format!("{what}: after reset"), &again, &model.forward(&ids).unwrap(), 1e-12);
    }
}

#[test]
fn bad_input_is_named() {
    let striped = |pattern: &str| ModelConfig::striped(pattern, 64, 11).unwrap_err().to_string();
    assert!(striped("hyena rwkv").contains("rwkv"));
    assert!(striped("hyena*0").contains("hyena*0"));
    assert!(striped(" ").contains("none"));

    let other = model(MixerConfig::ModalHyena(ModalHyenaConfig::new(D)));
    let mut state = model(MixerConfig::Attention(AttentionConfig::new(D, 3))).init_state(1).unwrap();
    let error = other.forward_with_state(&tokens(&mut Random::new(7), 1, 1), &mut state).unwrap_err();
    assert!(error.to_string().contains("state"), "{error}");

    let wrong = |config: AttentionConfig| config.validate().unwrap_err().to_string();
    assert!(wrong(AttentionConfig { kv_heads: 2, ..AttentionConfig::new(D, 3) }).contains("kv_heads"));
    assert!(wrong(AttentionConfig { head_dim: 3, ..AttentionConfig::new(D, 3) }).contains("head_dim"));
    let groups = HyenaFilter::Short { taps: 7, groups: 5 };
    let config = ModalHyenaConfig { filter: groups, ..ModalHyenaConfig::new(D) };
    assert!(config.validate().unwrap_err().to_string().contains("groups"));
}
