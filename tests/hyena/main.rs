//! The Hyena layer: its formula as plain sums, the streaming law, gradients, initialisation, bad input.

#[path = "../common/mod.rs"]
mod common;

mod oracle;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use common::{Random, assert_close, check_gradients, gradients, rounding, values};
use oracle::oracle;
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use subquadratic::layers::hyena::{Direction, FilterOrder, HyenaFilter, ImplicitFilter, SineFrequency};
use subquadratic::layers::{Hyena, HyenaConfig, LayerState};
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::ops::{Activation, LongConvState, Segments};
use subquadratic::{Error, Result};

fn base() -> HyenaConfig {
    let filter =
        ImplicitFilter { emb_dim: 3, width: 4, inner_layers: 1, w: 1.0, ..ImplicitFilter::default() };
    HyenaConfig { filter: HyenaFilter::Implicit(filter), ..HyenaConfig::new(3, 80) }
}

/// Orders 2 to 4, every kind of filter, both numberings, heads.
fn configs() -> Vec<HyenaConfig> {
    let linear = ImplicitFilter {
        linear: true,
        normalized: true,
        normalized_first: true,
        emb_dim: 3,
        ..ImplicitFilter::default()
    };
    let separate = ImplicitFilter {
        frequency: SineFrequency::Separate,
        modulate: false,
        normalized: true,
        inner_layers: 0,
        emb_dim: 5,
        width: 3,
        ..ImplicitFilter::default()
    };
    vec![
        base(),
        HyenaConfig { order: 3, filter_order: FilterOrder::ChannelFirst, ..base() },
        HyenaConfig { order: 4, filter: HyenaFilter::Explicit, in_bias: false, short_filter: 1, ..base() },
        HyenaConfig { order: 3, filter: HyenaFilter::Implicit(separate), out_bias: false, ..base() },
        HyenaConfig { outer_mixing: true, activation: Activation::Gelu, post_order_ffn: true, ..base() },
        heads(),
        HyenaConfig { filter_order: FilterOrder::ChannelFirst, outer_mixing: true, ..heads() },
        HyenaConfig { filter: HyenaFilter::Implicit(linear), order: 2, post_order_ffn: false, ..heads() },
    ]
}

/// Three heads of two channels.
fn heads() -> HyenaConfig {
    HyenaConfig { d_model: 6, heads: 3, order: 3, post_order_ffn: true, ..base() }
}

/// Layers whose outputs depend on how long the sequence is, or on what comes.
fn without_state() -> Vec<HyenaConfig> {
    vec![
        HyenaConfig { direction: Direction::TwoSided, order: 3, ..base() },
        HyenaConfig { direction: Direction::TwoSided, outer_mixing: true, ..heads() },
        HyenaConfig { direction: Direction::Centred, order: 3, ..base() },
        HyenaConfig { direction: Direction::Centred, ..heads() },
        HyenaConfig { num_blocks: 4, activation: Activation::Relu, ..base() },
        HyenaConfig { num_blocks: 2, direction: Direction::Centred, ..heads() },
    ]
}

fn parameters(config: &HyenaConfig, seed: u64) -> Vec<Tensor> {
    let random = &mut Random::new(seed);
    let draw = |p: subquadratic::layers::Parameter| match p.name.as_str() {
        name if name.ends_with("deltas") => random.uniform(p.shape, -3.0, -0.5),
        name if name.ends_with("pos_emb.t") => {
            let count = p.shape[1];
            let t: Vec<f64> = (0..count).map(|i| i as f64 / (count - 1) as f64).collect();
            Tensor::from_vec(t, p.shape, &Device::Cpu).unwrap()
        }
        _ => (random.normal(p.shape) * 0.6).unwrap(),
    };
    config.parameters().into_iter().map(draw).collect()
}

fn layer(config: &HyenaConfig, parameters: &[Tensor]) -> Result<Hyena> {
    let names = config.parameters().into_iter().map(|p| p.name);
    let tensors: HashMap<String, Tensor> = names.zip(parameters.iter().cloned()).collect();
    let dtype = tensors["in_proj.weight"].dtype();
    Hyena::new(config, VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))
}

#[test]
fn equals_the_formula() {
    for config in configs().into_iter().chain(without_state()) {
        let parameters = parameters(&config, 1);
        let layer = layer(&config, &parameters).unwrap();
        for length in [1, 2, 4, 17, 20, 80].into_iter().filter(|n| n % config.num_blocks == 0) {
            let x = Random::new(2).normal((1, length, config.d_model));
            let want = oracle(&config, &parameters, &values(&x), length);
            let want = Tensor::from_vec(want, (1, length, config.d_model), &Device::Cpu).unwrap();
            assert_close(&format!("{config:?} {length}"), &layer.forward(&x).unwrap(), &want, 1e-11);
        }
    }
}

#[test]
fn any_split_equals_the_whole() {
    let mut random = Random::new(3);
    for config in configs() {
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let declared = config.parameters();
            let exact = parameters(&config, 4);
            let cast =
                |(t, p): (&Tensor, &subquadratic::layers::Parameter)| t.to_dtype(p.dtype(dtype)).unwrap();
            let parameters: Vec<Tensor> = exact.iter().zip(&declared).map(cast).collect();
            let layer = layer(&config, &parameters).unwrap();
            let x = random.normal((2, 80, config.d_model)).to_dtype(dtype).unwrap();
            let whole = layer.forward(&x).unwrap();
            for parts in [1, 3, 20, 80] {
                let (mut state, mut start, mut ys) = (layer.init_state(2).unwrap(), 0, vec![]);
                for length in random.split(80, parts, 1) {
                    let part = x.narrow(1, start, length).unwrap();
                    ys.push(layer.forward_with_state(&part, &mut state).unwrap());
                    start += length;
                }
                assert_eq!(state.positions, [80, 80]);
                let y = Tensor::cat(&ys, 1).unwrap();
                assert_close(&format!("{config:?} {dtype:?} in {parts}"), &y, &whole, 64.0 * rounding(dtype));
            }
        }
    }
}

#[test]
fn packed_and_padded_rows_equal_each_alone() {
    for config in
        configs().into_iter().chain(without_state().into_iter().filter(|config| config.num_blocks == 1))
    {
        let layer = layer(&config, &parameters(&config, 5)).unwrap();
        let x = Random::new(6).normal((1, 60, config.d_model));
        let alone =
            |start: usize, length: usize| layer.forward(&x.narrow(1, start, length).unwrap()).unwrap();
        let part = |y: &Tensor, start: usize, length: usize| y.narrow(1, start, length).unwrap();
        let segments = Segments::packed(&[vec![20, 35]], 60).unwrap();
        let y = layer.forward_segments(&x, Some(&segments), None).unwrap();
        assert_close("packed", &part(&y, 0, 20), &alone(0, 20), 1e-11);
        assert_close("packed", &part(&y, 20, 35), &alone(20, 35), 1e-11);
        let segments = Segments::left_padded(&[33], 60).unwrap();
        let y = layer.forward_segments(&x, Some(&segments), None).unwrap();
        assert_close("padded", &part(&y, 27, 33), &alone(27, 33), 1e-11);
        let Ok(mut state) = layer.init_state(1) else { continue };
        let y = layer.forward_segments(&x, Some(&segments), Some(&mut state)).unwrap();
        assert_close("padded", &part(&y, 27, 33), &alone(27, 33), 1e-11);
        assert_eq!(state.positions, [33]);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for config in configs().into_iter().chain(without_state()) {
        let filter = match config.filter {
            // without a decay, time alone matters to nothing
            HyenaFilter::Implicit(filter) => {
                HyenaFilter::Implicit(ImplicitFilter { modulate: true, ..filter })
            }
            HyenaFilter::Explicit => HyenaFilter::Explicit,
        };
        let length = if config.num_blocks > 1 { 8 } else { 7 };
        let config = HyenaConfig { l_max: length, filter, ..config };
        let names: Vec<String> = config.parameters().into_iter().map(|p| p.name).collect();
        let mut inputs = parameters(&config, 7);
        inputs.push(Random::new(8).normal((1, length, config.d_model)));
        let names: Vec<&str> = names.iter().map(String::as_str).chain(["x"]).collect();
        check_gradients(&format!("{config:?}"), &names, &inputs, |all| {
            let (x, parameters) = all.split_last().unwrap();
            Ok(vec![layer(&config, parameters)?.forward(x)?])
        });
    }
}

#[test]
fn gradients_do_not_depend_on_the_cut() {
    for config in configs() {
        let mut inputs = parameters(&config, 9);
        inputs.push(Random::new(10).normal((2, 12, config.d_model)));
        let run = |all: &[Tensor], pieces: &[usize]| {
            let (x, parameters) = all.split_last().unwrap();
            let layer = layer(&config, parameters)?;
            if pieces.is_empty() {
                return Ok(vec![layer.forward(x)?]);
            }
            let (mut state, mut start, mut ys) = (layer.init_state(2)?, 0, vec![]);
            for &length in pieces {
                ys.push(layer.forward_with_state(&x.narrow(1, start, length)?, &mut state)?);
                start += length;
            }
            Ok(vec![Tensor::cat(&ys, 1)?])
        };
        let (y, whole) = gradients(&inputs, |all| run(all, &[]));
        for pieces in [&[12][..], &[5, 1, 6], &[1; 12]] {
            let (cut, found) = gradients(&inputs, |all| run(all, pieces));
            for (got, want) in cut.iter().chain(&found).zip(y.iter().chain(&whole)) {
                assert_close(&format!("{config:?} in {pieces:?}"), got, want, 1e-10);
            }
        }
    }
}

#[test]
fn a_state_is_saved_selected_and_reset() {
    let config = &configs()[1];
    let layer = layer(config, &parameters(config, 11)).unwrap();
    let x = Random::new(12).normal((2, 40, 3));
    let whole = layer.forward(&x).unwrap();
    let mut state = layer.init_state(2).unwrap();
    layer.forward_with_state(&x.narrow(1, 0, 25).unwrap(), &mut state).unwrap();
    let saved: HashMap<&str, Tensor> = state.saved().unwrap().into_iter().collect();
    assert_eq!(saved["past"].dims(), [2, 2, 25, 3]);
    let loaded =
        subquadratic::layers::HyenaState::from_tensors(saved["conv"].clone(), &saved["past"], &[25, 25])
            .unwrap();
    for (mut state, rows) in
        [(state.clone(), [0, 1]), (loaded, [0, 1]), (state.select(&[1, 0]).unwrap(), [1, 0])]
    {
        for t in 25..40 {
            let rows = Tensor::new(&rows.map(|row| row as u32)[..], &Device::Cpu).unwrap();
            let at = |x: &Tensor| x.index_select(&rows, 0).unwrap().narrow(1, t, 1).unwrap();
            assert_close(
                "goes on",
                &layer.forward_with_state(&at(&x), &mut state).unwrap(),
                &at(&whole),
                1e-11,
            );
        }
        assert_eq!((state.batch(), state.positions.as_slice()), (2, &[40, 40][..]));
    }
    assert!(state.bytes() > 0 && !state.is_tracked());
    state.reset().unwrap();
    assert_close("anew", &layer.forward_with_state(&x, &mut state).unwrap(), &whole, 1e-11);
    assert!(state.select(&[2]).is_err());
}

#[test]
fn the_published_initialisation() {
    let config = HyenaConfig { order: 3, ..HyenaConfig::new(16, 100) };
    let all: HashMap<String, Tensor> =
        Hyena::init(&config, &mut StdRng::seed_from_u64(0), 1.0).unwrap().into_iter().collect();
    for parameter in config.parameters() {
        assert_eq!(all[&parameter.name].dims(), parameter.shape, "{}", parameter.name);
    }
    let z = values(&all["filter_fn.pos_emb.z"]);
    let (t, w) = (7.0 / 99.0, std::f64::consts::TAU * 7.0 / 100.0);
    let want = [t, (1e-4 * w).cos(), w.cos(), -(1e-4 * w).sin(), -w.sin()];
    z[35..40].iter().zip(want).for_each(|(got, want)| assert!((got - want).abs() < 1e-6, "{got} {want}"));
    let deltas = values(&all["filter_fn.modulation.deltas"]);
    assert!((deltas[0] - 0.01f64.ln() / 1.5).abs() < 1e-5 && (deltas[31] - 0.01f64.ln() / 0.3).abs() < 1e-5);
    assert!(values(&all["filter_fn.implicit_filter.1.freq"]).iter().all(|&f| f == 10.0));
}

#[test]
fn bad_input_is_named() {
    let config = base();
    let layer = layer(&config, &parameters(&config, 13)).unwrap();
    let zeros = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    assert!(message(layer.forward(&zeros((1, 81, 3)))).contains("l_max = 80"));
    assert!(message(layer.forward(&zeros((1, 8, 4)))).contains("hyena: x"));
    let mut state = layer.init_state(1).unwrap();
    layer.forward_with_state(&zeros((1, 79, 3)), &mut state).unwrap();
    layer.forward_with_state(&zeros((1, 1, 3)), &mut state).unwrap();
    assert!(message(layer.forward_with_state(&zeros((1, 1, 3)), &mut state)).contains("l_max"));
    assert_eq!(state.positions, [80]);
    assert!(message(layer.forward_with_state(&zeros((2, 1, 3)), &mut state)).contains("state"));
    state.long[0] = LongConvState::new(1, 4, DType::F64, &Device::Cpu).unwrap();
    assert!(message(layer.forward_with_state(&zeros((1, 1, 3)), &mut state)).contains("state"));
    let refused = |config: HyenaConfig, name: &str| {
        assert!(
            matches!(config.validate(), Err(Error::Value { name: got, .. }) if got.contains(name)),
            "{name}"
        );
    };
    refused(HyenaConfig { order: 1, ..base() }, "order");
    refused(HyenaConfig { d_model: 0, ..base() }, "d_model");
    refused(HyenaConfig { l_max: 0, ..base() }, "l_max");
    refused(HyenaConfig { short_filter: 0, ..base() }, "short_filter");
    let even = ImplicitFilter { emb_dim: 4, ..ImplicitFilter::default() };
    refused(HyenaConfig { filter: HyenaFilter::Implicit(even), ..base() }, "emb_dim");
    refused(HyenaConfig { heads: 2, ..base() }, "heads");
    refused(HyenaConfig { heads: 0, ..base() }, "heads");
    refused(HyenaConfig { num_blocks: 0, ..base() }, "num_blocks");
    refused(HyenaConfig { num_blocks: 2, direction: Direction::TwoSided, ..base() }, "num_blocks");
    for config in without_state() {
        let stateless = self::layer(&config, &parameters(&config, 14)).unwrap();
        let word = if config.direction == Direction::Causal { "num_blocks" } else { "bidirectional" };
        assert!(stateless.init_state(1).unwrap_err().to_string().contains(word), "{config:?}");
        if config.num_blocks == 4 {
            assert!(message(stateless.forward(&zeros((1, 10, 3)))).contains("multiple of num_blocks = 4"));
        }
    }
}

#[test]
fn every_parameter_gets_a_gradient_in_low_precision() {
    let config = base();
    let declared = config.parameters();
    let cast = |(t, p): (Tensor, &subquadratic::layers::Parameter)| {
        Var::from_tensor(&t.to_dtype(p.dtype(DType::BF16)).unwrap()).unwrap().into_inner()
    };
    let leaves: Vec<Tensor> = parameters(&config, 15).into_iter().zip(&declared).map(cast).collect();
    let x = Random::new(16).normal((1, 20, 3)).to_dtype(DType::BF16).unwrap();
    let store = layer(&config, &leaves).unwrap().forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
    for (leaf, parameter) in leaves.iter().zip(&declared) {
        let gradient = store.get(leaf).unwrap_or_else(|| panic!("no gradient of {}", parameter.name));
        assert!(values(gradient).iter().any(|&g| g != 0.0), "{}", parameter.name);
    }
}

/// Blocks that forget their activations give the same gradients, through the state too.
#[test]
fn recomputed_blocks_carry_their_state() {
    let config = ModelConfig::hyena(6, 2, 12, 20);
    let mut model = LanguageModel::init(&config, 3, DType::F64, &Device::Cpu).unwrap();
    let ids =
        Tensor::new(&[[7u32, 8, 9, 10, 11, 7, 9, 4], [10, 9, 8, 7, 0, 6, 11, 8]], &Device::Cpu).unwrap();
    let mut run = |recompute: bool| {
        model.set_recompute(recompute);
        let (mut state, mut start, mut logits) = (model.init_state(2).unwrap(), 0, vec![]);
        for length in [3, 1, 4] {
            let part = ids.narrow(1, start, length).unwrap();
            logits.push(model.forward_with_state(&part, &mut state).unwrap());
            start += length;
        }
        let logits = Tensor::cat(&logits, 1).unwrap();
        let nodes = logits.sorted_nodes().len();
        let gradients = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let of = |(name, variable): (&String, &Var)| {
            (name.clone(), gradients.get(variable).unwrap_or_else(|| panic!("{name}: no gradient")).clone())
        };
        (logits, nodes, model.variables().iter().map(of).collect::<Vec<_>>())
    };
    let (logits, nodes, kept) = run(false);
    let (again, fewer, recomputed) = run(true);
    // what a block computes is no part of the graph that waits for the way back
    assert!(2 * fewer < nodes, "{fewer} nodes with recomputation, {nodes} without");
    assert_close("logits", &again, &logits, 1e-12);
    for ((name, got), (_, want)) in recomputed.iter().zip(&kept) {
        assert_close(name, got, want, 1e-10);
    }
}
