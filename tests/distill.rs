//! Hyena models turned into gated modal ones: the logits stay near, the report is true, the state does not grow.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use common::*;
use std::collections::HashMap;
use subquadratic::layers::hyena::{Direction, HyenaFilter};
use subquadratic::layers::{Hyena, ModalHyena};
use subquadratic::models::{LanguageModel, MixerConfig, ModelConfig, load};
use subquadratic::ops::Poles;
use subquadratic::ops::modal_conv::modal_filter;

const WIDTH: usize = 16;
const LENGTH: usize = 96;

/// With weights of the size that training leaves.
fn model(dtype: DType) -> LanguageModel {
    let mut config = ModelConfig::hyena(WIDTH, 2, 11, LENGTH);
    for block in &mut config.blocks {
        let MixerConfig::Hyena(mixer) = &mut block.mixer else { panic!("a Hyena") };
        mixer.short_filter = 4;
        // smooth filters; at 10, the default, a fresh one is nearly noise at this length and takes many more states
        let HyenaFilter::Implicit(filter) = &mut mixer.filter else { panic!("a network") };
        filter.w = 2.0;
    }
    let model = LanguageModel::init(&config, 3, dtype, &Device::Cpu).unwrap();
    let random = &mut Random::new(4);
    for (name, variable) in model.variables() {
        if !name.contains("pos_emb") {
            let change =
                (random.normal(variable.shape()) * 0.05).unwrap().to_dtype(variable.dtype()).unwrap();
            variable.set(&(variable.as_tensor() + change).unwrap()).unwrap();
        }
    }
    model
}

fn tokens(random: &mut Random, batch: usize, length: usize) -> Tensor {
    let ids: Vec<u32> = (0..batch * length).map(|_| random.int(0, 10) as u32).collect();
    Tensor::from_vec(ids, (batch, length), &Device::Cpu).unwrap()
}

#[test]
fn logits_stay_near_and_nearer_with_more_states() {
    let model = model(DType::F64);
    let ids = tokens(&mut Random::new(1), 2, LENGTH);
    let want = model.forward(&ids).unwrap();
    let error = |states| {
        let (distilled, report) = model.distill(states).unwrap();
        let worst = report.iter().flat_map(|layer| layer.channels.iter().copied()).fold(0.0, f64::max);
        for layer in &report {
            let pairs = layer.channels.iter().zip(&layer.bounds);
            assert!(pairs.clone().count() == WIDTH && pairs.clone().all(|(error, bound)| bound <= error));
        }
        let (rms, _) = relative_errors(&distilled.forward(&ids).unwrap(), &want);
        // two blocks, each of which adds what its filters miss to the stream
        assert!(rms < 4.0 * worst, "{states} states: {rms:.1e} of logits, {worst:.1e} of filters");
        (worst, rms)
    };
    let (few, enough) = (error(2), error(8));
    assert!(few.0 > 10.0 * enough.0 && few.1 > 10.0 * enough.1);
    assert!(enough.0 < 1e-2 && enough.1 < 2e-4, "{enough:?}");
}

#[test]
fn the_report_tells_how_far_the_written_filters_are() {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let model = model(dtype);
        let (distilled, report) = model.distill(4).unwrap();
        assert_eq!(report.iter().map(|layer| layer.block).collect::<Vec<_>>(), [0, 1]);
        for layer in &report {
            let MixerConfig::Hyena(config) = &model.config().blocks[layer.block].mixer else {
                panic!("a Hyena")
            };
            let prefix = format!("hyena.backbone.layers.{}.mixer.", layer.block);
            let under =
                model.parameters().iter().filter_map(|(n, x)| Some((n.strip_prefix(&prefix)?, x.detach())));
            let under: HashMap<String, Tensor> = under.map(|(n, x)| (n.to_string(), x)).collect();
            let hyena = Hyena::new(config, VarBuilder::from_tensors(under, dtype, &Device::Cpu)).unwrap();
            let want = hyena.filters().unwrap().remove(0).to_dtype(DType::F64).unwrap();
            assert_eq!(want.dims(), [WIDTH, LENGTH]);
            let get = |name: &str| {
                let name = format!("backbone.layers.{}.mixer.filter.{name}", layer.block);
                distilled.parameters()[&name].squeeze(2).unwrap().to_dtype(DType::F64).unwrap()
            };
            let (poles, residues) = (get("poles"), get("residues"));
            let got = modal_filter(Poles::Complex(&poles), &residues, LENGTH).unwrap();
            for (d, &error) in layer.channels.iter().enumerate() {
                let (got, want) = (values(&got.get(d).unwrap()), values(&want.get(d).unwrap()));
                let square = |x: f64| x * x;
                let left: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
                let own: f64 = want.iter().map(|&x| square(x)).sum();
                let own = (left / own).sqrt();
                assert!(
                    (own - error).abs() <= 1e-9 + 1e-6 * error,
                    "{dtype:?} channel {d}: {error} for {own}"
                );
            }
            assert!(Poles::Complex(&poles).largest().unwrap() <= 1.0);
        }
    }
}

#[test]
fn a_distilled_model_decodes_in_constant_space_beyond_the_longest_length_and_comes_back() {
    let random = &mut Random::new(2);
    let (distilled, _) = model(DType::F32).distill(4).unwrap();
    assert!(distilled.variables().is_empty());
    let mut state = distilled.init_state(1).unwrap();
    let first = tokens(random, 1, 7);
    let mut parts = vec![distilled.forward_with_state(&first, &mut state).unwrap()];
    let size = state.bytes();
    let rest = tokens(random, 1, 2 * LENGTH);
    for t in 0..2 * LENGTH {
        parts.push(distilled.forward_with_state(&rest.narrow(1, t, 1).unwrap(), &mut state).unwrap());
    }
    assert_eq!(state.bytes(), size);
    let all = Tensor::cat(&[&first, &rest], 1).unwrap();
    let whole = distilled.forward(&all).unwrap();
    assert_close("steps", &Tensor::cat(&parts, 1).unwrap(), &whole, 1e-4);
    let dir = tempfile::tempdir().unwrap();
    distilled.save(dir.path()).unwrap();
    let back = load(dir.path(), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(back.config(), distilled.config());
    assert_eq!(bits(&back.forward(&all).unwrap()), bits(&whole));
}

#[test]
fn what_has_no_modal_form_is_refused_by_name() {
    let fails = |config: &ModelConfig, states, words: &[&str]| {
        let model = LanguageModel::init(config, 1, DType::F32, &Device::Cpu).unwrap();
        let error = model.distill(states).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    };
    let plain = ModelConfig::hyena(8, 2, 11, 32);
    fails(&plain, 0, &["states", "at least 1"]);
    fails(&ModelConfig::mamba(8, 2, 11), 4, &["Hyena", "mamba"]);
    let with = |change: fn(&mut subquadratic::layers::HyenaConfig)| {
        let mut config = plain.clone();
        let MixerConfig::Hyena(mixer) = &mut config.blocks[1].mixer else { panic!("a Hyena") };
        change(mixer);
        config
    };
    fails(&with(|mixer| mixer.order = 3), 4, &["block 1", "order", "got 3"]);
    let config = with(|mixer| mixer.direction = Direction::TwoSided);
    let MixerConfig::Hyena(mixer) = &config.blocks[1].mixer else { panic!("a Hyena") };
    let none = VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu);
    let error = ModalHyena::distill(mixer, none, 4).unwrap_err().to_string();
    assert!(error.contains("bidirectional"), "{error}");
}
