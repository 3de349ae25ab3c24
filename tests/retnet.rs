//! The RetNet layer and model: gradients, forms, torchscale's other denominators and its state, bad input.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use common::*;
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use std::path::PathBuf;
use subquadratic::layers::retention::*;
use subquadratic::layers::{MultiScaleRetention, NormConfig};
use subquadratic::models::{Form, LanguageModel, MixerConfig, MixerState, load, read_config};
use subquadratic::ops::{Activation, RotaryStyle};

const TORCHSCALE: [&str; 3] = ["retnet-torchscale", "retnet-torchscale-bin", "retnet-torchscale-deepnorm"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu).unwrap()
}

/// Layers with every option between them.
fn configs() -> Vec<RetentionConfig> {
    let base = RetentionConfig { head_value: 3, ..RetentionConfig::new(8, 2) };
    let rotary = |style, angles| Some(RetentionRotary { style, angles, base: 100.0 });
    vec![
        base.clone(),
        RetentionConfig {
            heads: 4,
            kv_heads: 2,
            head_key: 2,
            decay: HeadDecay::LogLinear,
            rotary: rotary(RotaryStyle::Half, RotaryAngles::Open),
            scaling: RetentionScaling::None,
            norm: HeadNorm { kind: NormConfig::Layer { eps: 1e-3 }, affine: true },
            gate: Some(Activation::Gelu),
            feature_map: Some(Activation::Silu),
            short_conv: Some(ShortConv { width: 3, bias: true }),
            bias: true,
            ..base.clone()
        },
        RetentionConfig {
            decay: HeadDecay::Given(vec![-0.5, 0.0]),
            rotary: None,
            norm: HeadNorm { kind: NormConfig::Rms { eps: 1e-3 }, affine: true },
            gate: None,
            ..base
        },
    ]
}

fn tensors(config: &RetentionConfig, random: &mut Random) -> Vec<(String, Tensor)> {
    let draw = |p: subquadratic::layers::Parameter| (p.name, (random.normal(p.shape) * 0.7).unwrap());
    config.parameters().into_iter().map(draw).collect()
}

fn layer(config: &RetentionConfig, tensors: &[(String, Tensor)]) -> MultiScaleRetention {
    let map = tensors.iter().cloned().collect();
    MultiScaleRetention::new(config, VarBuilder::from_tensors(map, tensors[0].1.dtype(), &Device::Cpu))
        .unwrap()
}

#[test]
fn gradients_of_all_parameters_are_finite_differences() {
    let random = &mut Random::new(1);
    for config in configs() {
        let named = tensors(&config, random);
        let mut inputs: Vec<Tensor> = named.iter().map(|(_, x)| x.clone()).collect();
        inputs.push(random.normal((2, 5, 8)));
        let names: Vec<&str> = named.iter().map(|(name, _)| name.as_str()).chain(["x"]).collect();
        check_gradients(&format!("{config:?}"), &names, &inputs, |inputs| {
            let (x, parameters) = inputs.split_last().unwrap();
            let named: Vec<_> =
                names.iter().map(|name| name.to_string()).zip(parameters.iter().cloned()).collect();
            let layer = layer(&config, &named);
            let mut state = layer.init_state(2)?;
            let head = layer.forward_with_state(&x.narrow(1, 0, 3)?, &mut state)?;
            let tail = layer.forward_with_state(&x.narrow(1, 3, 2)?, &mut state)?;
            Ok(vec![head, tail, state.retention])
        });
    }
}

#[test]
fn fresh_layers_have_every_parameter_and_work_in_every_dtype() {
    let random = &mut Random::new(2);
    for config in configs() {
        let initial = MultiScaleRetention::init(&config, &mut StdRng::seed_from_u64(1), 1.0).unwrap();
        let x = random.normal((2, 9, 8));
        let wide: Vec<_> =
            initial.iter().map(|(n, t)| (n.clone(), t.to_dtype(DType::F64).unwrap())).collect();
        let want = layer(&config, &wide).forward(&x).unwrap();
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 0.06), (DType::F16, 8e-3)] {
            let low: Vec<_> = initial.iter().map(|(n, t)| (n.clone(), t.to_dtype(dtype).unwrap())).collect();
            let got = layer(&config, &low).forward(&x.to_dtype(dtype).unwrap()).unwrap();
            assert_eq!(got.dtype(), dtype);
            assert!(
                relative_errors(&got, &want).0 < tolerance,
                "{dtype:?} {:?}",
                relative_errors(&got, &want)
            );
        }
    }
}

/// At position 10^6 a bf16 model turns and scales as an f64 one does: neither positions nor decays are rounded.
#[test]
fn far_positions_are_as_exact_as_near_ones() {
    let random = &mut Random::new(3);
    let config = RetentionConfig::new(32, 4);
    let named = tensors(&config, random);
    let x = random.normal((1, 12, 32));
    let error = |position: usize| {
        let run = |dtype| {
            let named: Vec<_> = named
                .iter()
                .map(|(n, t)| (n.clone(), t.to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap()))
                .collect();
            let layer = layer(&config, &named);
            let mut state = layer.init_state(1).unwrap();
            state.positions = vec![position];
            let x = x.to_dtype(DType::BF16).unwrap().to_dtype(dtype).unwrap();
            layer.forward_with_state(&x, &mut state).unwrap()
        };
        relative_errors(&run(DType::BF16), &run(DType::F64)).0
    };
    let (near, far) = (error(0), error(1_000_000));
    assert!(far < 1.5 * near + 1e-3, "relative error {near:.1e} at the start, {far:.1e} at 10^6");
}

/// Every form, and every way through them, gives the same logits: 1e-12 in f64, 1e-5 in f32.
#[test]
fn forms_of_a_model_agree() {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5)] {
        for name in ["retnet-torchscale", "retnet-fla-groups", "retnet-fla-conv", "retnet-port-ffn"] {
            let ids = &expected(name)["ids"];
            let mut model = load(fixture(name), dtype, &Device::Cpu).unwrap();
            let want = model.forward(ids).unwrap();
            let length = ids.dim(1).unwrap();
            let forms = (1..=length).map(|chunk| Form::Chunkwise { chunk });
            for form in forms.chain([Form::Parallel, Form::Recurrent]) {
                assert!(model.set_form(form).unwrap());
                assert_close(&format!("{name} {form:?}"), &model.forward(ids).unwrap(), &want, tolerance);
            }
            // parallel, then chunkwise, then recurrent, with a saved state in between
            let mut state = model.init_state(ids.dim(0).unwrap()).unwrap();
            let file = tempfile::NamedTempFile::new().unwrap();
            let mut parts = vec![];
            let cuts =
                [(0, 8, Form::Parallel), (8, 5, Form::Chunkwise { chunk: 2 }), (13, 6, Form::Recurrent)];
            for (start, count, form) in cuts {
                model.set_form(form).unwrap();
                parts.push(
                    model.forward_with_state(&ids.narrow(1, start, count).unwrap(), &mut state).unwrap(),
                );
                state.save(file.path()).unwrap();
                state = subquadratic::models::ModelState::load(file.path(), &Device::Cpu).unwrap();
            }
            assert_close(name, &Tensor::cat(&parts, 1).unwrap(), &want, tolerance);
        }
    }
}

/// The same weights with another denominator.
fn with_scaling(name: &str, scaling: RetentionScaling) -> LanguageModel {
    let loaded = load(fixture(name), DType::F64, &Device::Cpu).unwrap();
    let mut config = read_config(fixture(name)).unwrap();
    for block in &mut config.blocks {
        let MixerConfig::Retention(mixer) = &mut block.mixer else { panic!("retention") };
        mixer.scaling = scaling;
    }
    let tensors = loaded.parameters().iter().map(|(name, x)| (name.clone(), x.clone())).collect();
    LanguageModel::new(&config, VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu)).unwrap()
}

#[test]
fn torchscales_other_forms_are_reproduced_with_their_denominators() {
    for name in TORCHSCALE {
        let expected = expected(name);
        for (form, scaling) in [
            ("parallel", RetentionScaling::RowSum),
            ("chunkwise", RetentionScaling::ChunkRowSum { chunk: 8 }),
        ] {
            let got = with_scaling(name, scaling).forward(&expected["ids"]).unwrap();
            assert_close(&format!("{name} {form}"), &got, &expected[form], 1e-10);
            // the canonical form differs by what the epsilon of the norm weighs
            let gap = relative_errors(&expected[form], &expected["logits"]).0;
            assert!(gap > 1e-9 && gap < 2e-2, "{name} {form}: {gap:.1e}");
        }
    }
}

#[test]
fn torchscales_state_goes_in_and_out() {
    for name in TORCHSCALE {
        let expected = expected(name);
        let ids = &expected["ids"];
        let (batch, length) = ids.dims2().unwrap();
        let model = load(fixture(name), DType::F64, &Device::Cpu).unwrap();
        let mut state = model.init_state(batch).unwrap();
        model.forward_with_state(ids, &mut state).unwrap();
        let mut imported = state.clone();
        for (i, (block, other)) in state.blocks.iter().zip(&mut imported.blocks).enumerate() {
            let MixerConfig::Retention(config) = &model.config().blocks[i].mixer else { panic!("retention") };
            let (MixerState::Retention(ours), MixerState::Retention(theirs)) = (block, other) else {
                panic!()
            };
            let (key_value, scale) =
                (&expected[&format!("state.{i}.prev_key_value")], &expected[&format!("state.{i}.scale")]);
            let (got, sums) = ours.to_torchscale(config).unwrap();
            assert_close("prev_key_value", &got, key_value, 1e-10);
            assert_close("scale", &sums, scale, 1e-10);
            *theirs = RetentionState::from_torchscale(config, key_value, scale, length).unwrap();
            // a scale that belongs to another position, and shapes that are not the layer's
            let error = RetentionState::from_torchscale(config, key_value, scale, length + 1).unwrap_err();
            assert!(error.to_string().contains("scale"), "{error}");
            let turned = key_value.transpose(2, 3).unwrap();
            let error = RetentionState::from_torchscale(config, &turned, scale, length).unwrap_err();
            assert!(error.to_string().contains("[B, H, V, K]"), "{error}");
        }
        let next = ids.narrow(1, 0, 1).unwrap();
        let want = model.forward_with_state(&next, &mut state).unwrap();
        assert_close(name, &model.forward_with_state(&next, &mut imported).unwrap(), &want, 1e-10);
    }
}

#[test]
fn decays_are_those_of_the_paper() {
    let near = |got: Vec<f64>, want: &[f64]| {
        assert!(got.iter().zip(want).all(|(a, b)| (a.exp() - b).abs() < 1e-15), "{got:?}");
        assert_eq!(got.len(), want.len());
    };
    near(HeadDecay::Geometric.logarithms(3), &[1.0 - 1.0 / 32.0, 1.0 - 1.0 / 64.0, 1.0 - 1.0 / 128.0]);
    near(HeadDecay::LogLinear.logarithms(3), &[1.0 - 1.0 / 32.0, 1.0 - 1.0 / 128.0, 1.0 - 1.0 / 512.0]);
    // a head whose gamma rounds to one in f32 still decays
    assert!(HeadDecay::Geometric.logarithms(40)[39] < 0.0);
}

#[test]
fn what_does_not_fit_is_named() {
    type Change = fn(&mut RetentionConfig);
    let cases: [(Change, &[&str]); 7] = [
        (|c| c.heads = 0, &["heads"]),
        (|c| c.kv_heads = 3, &["kv_heads", "divisor"]),
        (|c| c.head_key = 3, &["head_key", "even"]),
        (|c| c.decay = HeadDecay::Given(vec![-0.1]), &["decay", "2 logarithms"]),
        (|c| c.decay = HeadDecay::Given(vec![-0.1, 0.3]), &["decay", "0.3"]),
        (|c| c.form = Form::Chunkwise { chunk: 0 }, &["chunk"]),
        (|c| c.norm.kind = NormConfig::Rms { eps: -1.0 }, &["norm", "eps"]),
    ];
    for (change, words) in cases {
        let mut config = RetentionConfig::new(8, 2);
        change(&mut config);
        let error = config.validate().unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
    let random = &mut Random::new(4);
    let config = RetentionConfig { scaling: RetentionScaling::RowSum, ..RetentionConfig::new(8, 2) };
    let parity = layer(&config, &tensors(&config, random));
    let mut state = parity.init_state(1).unwrap();
    let x = random.normal((1, 3, 8));
    parity.forward_with_state(&x, &mut state).unwrap();
    let error = parity.forward_with_state(&x, &mut state).unwrap_err().to_string();
    assert!(error.contains("DecaySum"), "{error}");
    assert_eq!(state.positions, [3]);
    let plain = layer(&RetentionConfig::new(8, 2), &tensors(&config, random));
    let mut other = plain.init_state(2).unwrap();
    assert!(plain.forward_with_state(&x, &mut other).unwrap_err().to_string().contains("[1, 2, 4, 8]"));
    assert!(plain.forward(&random.normal((1, 3, 7))).unwrap_err().to_string().contains("[B, L, 8]"));
}
