//! Decoding by kernels of its own, against the model's forward pass on the same device and on the CPU.

use crate::common::*;
use crate::decoder_laws::*;
use crate::gpu;
use candle_core::{DType, Device};
use subquadratic::generate::{Generation, GenerationConfig, generate};
use subquadratic::layers::retention::{
    HeadDecay, HeadNorm, RetentionConfig, RetentionRotary, RetentionScaling, RotaryAngles, ShortConv,
};
use subquadratic::layers::{MlpConfig, MlpGate};
use subquadratic::models::{Decoder, Family, LanguageModel, MixerConfig, ModelConfig, NormConfig};
use subquadratic::ops::{Activation, RotaryStyle};

const VOCABULARY: usize = 61;

/// Models of Mamba blocks with other options each; all of them have kernels.
fn mambas() -> [ModelConfig; 5] {
    let mut falcon = ModelConfig::mamba(64, 2, VOCABULARY);
    (falcon.family, falcon.tie_embeddings) = (Family::FalconMamba, false);
    let mut original = ModelConfig::mamba(72, 3, VOCABULARY);
    let norm = NormConfig::Layer { eps: 1e-5 };
    (original.family, original.vocab_multiple) = (Family::MambaOriginal, 8);
    (original.final_norm, original.residual_in_fp32) = (Some(norm), false);
    original.blocks.iter_mut().for_each(|block| block.norm = norm);
    let mut odd = ModelConfig::mamba(40, 2, VOCABULARY);
    // rows that several warps share, and states in two halves
    let mut wide = ModelConfig::mamba(264, 2, VOCABULARY);
    let sizes = [(&mut falcon, [13, 2, 24]), (&mut odd, [24, 3, 5]), (&mut wide, [76, 4, 33])];
    for (config, [states, filter, rank]) in sizes {
        let bias = config.family == Family::FalconMamba;
        for block in &mut config.blocks {
            let MixerConfig::Mamba(mixer) = &mut block.mixer else { panic!("a Mamba") };
            (mixer.d_state, mixer.d_conv, mixer.dt_rank) = (states, filter, rank);
            (mixer.bias, mixer.conv_bias) = (bias, !bias);
            mixer.inner_norm_eps = bias.then_some(1e-3);
        }
    }
    [ModelConfig::mamba(64, 3, VOCABULARY), falcon, original, odd, wide]
}

/// A RetNet of two layers with these mixers and feed-forward layers.
fn retnet(hidden: usize, mixer: impl Fn(&mut RetentionConfig), mlp: impl Fn(&mut MlpConfig)) -> ModelConfig {
    let mut config = ModelConfig::retnet(hidden, 2, VOCABULARY);
    for block in &mut config.blocks {
        let (MixerConfig::Retention(own), Some(feed)) = (&mut block.mixer, &mut block.mlp) else {
            panic!("a RetNet")
        };
        mixer(own);
        own.kv_heads = own.heads;
        mlp(&mut feed.layer);
    }
    config
}

/// The same for RetNet blocks.
fn retnets() -> [ModelConfig; 5] {
    // as fla has it: halves turned together, a weight for the heads' norm; heads narrower than a tile
    let mut fla = retnet(
        72,
        |c| {
            (c.heads, c.head_key, c.head_value) = (6, 20, 12);
            c.rotary = Some(RetentionRotary {
                style: RotaryStyle::Half,
                angles: RotaryAngles::Open,
                base: 10_000.0,
            });
            (c.scaling, c.norm.affine) = (RetentionScaling::None, true);
        },
        |mlp| mlp.d_intermediate = 40,
    );
    fla.embedding_scale = 3.0;
    // as torchscale had it at first: layer norms, biases, no gate of the feed-forward layer; rows that several warps share
    let norm = NormConfig::Layer { eps: 1e-5 };
    let mut early = retnet(
        264,
        |c| {
            (c.heads, c.head_key, c.head_value, c.bias) = (4, 64, 132, true);
            c.decay = HeadDecay::LogLinear;
            c.norm = HeadNorm { kind: NormConfig::RmsOutside { eps: 1e-4 }, affine: true };
        },
        |mlp| {
            (mlp.gate, mlp.activation, mlp.bias) = (MlpGate::None, Activation::Gelu, true);
            mlp.d_intermediate = 304;
        },
    );
    (early.final_norm, early.residual_in_fp32, early.tie_embeddings) = (Some(norm), false, true);
    for block in &mut early.blocks {
        block.norm = norm;
        block.mlp.as_mut().unwrap().norm = norm;
    }
    // no gates, no turns, decays of all kinds; halves with biases in one projection
    let bare = retnet(
        48,
        |c| {
            (c.heads, c.head_key, c.head_value) = (3, 16, 16);
            c.decay = HeadDecay::Given(vec![-1.5, 0.0, -1e-3]);
            (c.gate, c.rotary) = (None, None);
        },
        |mlp| (mlp.gate, mlp.activation) = (MlpGate::Joint, Activation::Relu),
    );
    let odd = retnet(
        64,
        |c| {
            (c.heads, c.head_key, c.head_value, c.bias) = (2, 8, 40, true);
            c.gate = Some(Activation::GeluTanh);
            if let Some(rotary) = &mut c.rotary {
                rotary.style = RotaryStyle::Half;
            }
        },
        |mlp| (mlp.bias, mlp.activation) = (true, Activation::Identity),
    );
    [ModelConfig::retnet(128, 3, VOCABULARY), fla, early, bare, odd]
}

fn configs() -> impl Iterator<Item = ModelConfig> {
    mambas().into_iter().chain(retnets())
}

fn model(config: &ModelConfig, dtype: DType, device: &Device) -> LanguageModel {
    LanguageModel::init(config, 1, dtype, device).unwrap().frozen().unwrap()
}

#[test]
fn steps_are_the_model() {
    let Some(device) = gpu() else { return };
    for config in configs() {
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 4e-2), (DType::F16, 6e-3)] {
            let model = model(&config, dtype, &device);
            assert!(Decoder::new(&model, 1).unwrap().is_fused(8));
            let what = format!("{:?} {dtype:?}", config.family);
            follows_the_model(&what, &model, 6, 60, tolerance);
        }
    }
    for configs in [mambas(), retnets()] {
        greedy_is_the_largest_logit(&model(&configs[0], DType::F32, &device));
        // a step of the smallest ones is shorter than the ring of weights
        let smallest = [ModelConfig::mamba(64, 1, VOCABULARY), ModelConfig::retnet(64, 1, VOCABULARY)];
        for config in configs.iter().chain(&smallest) {
            steps_in_a_row_are_steps_in_turn(
                &format!("{:?}", config.family),
                &model(config, DType::F32, &device),
            );
        }
        refuses_nonsense(&model(&configs[1], DType::F32, &device));
    }
}

/// Without kernels of its own: a pool, rows that come and go, drafts taken back.
#[test]
fn other_models_decode_from_a_pool() {
    let Some(device) = gpu() else { return };
    let convolved = retnet(64, |c| c.short_conv = Some(ShortConv { width: 4, bias: true }), |_| ());
    let layered = retnet(64, |c| c.norm.kind = NormConfig::Layer { eps: 1e-5 }, |_| ());
    let mut post = ModelConfig::retnet(64, 2, VOCABULARY);
    post.blocks.iter_mut().for_each(|block| block.residual.scale = 1.5);
    for config in [convolved, layered, post] {
        let model = model(&config, DType::F32, &device);
        assert!(!Decoder::new(&model, 1).unwrap().is_fused(1));
        follows_the_model("another model", &model, 6, 30, 1e-4);
    }
}

/// Steps at far positions, one model on both devices: angles and scales are exact.
#[test]
fn a_long_sequence_goes_on_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for config in [&retnets()[0], &retnets()[1]] {
        let logits = [&device, &Device::Cpu].map(|device| {
            let model = model(config, DType::F32, device);
            let mut state = model.init_state(1).unwrap();
            state.positions = vec![1_000_003];
            for block in &mut state.blocks {
                use subquadratic::layers::LayerState;
                block.positions_mut().unwrap().clone_from(&state.positions);
            }
            let mut decoder = Decoder::new(&model, 2).unwrap();
            decoder.set_state(1, &state, 0).unwrap();
            let first = decoder.step(&[Some(1)], &[1, 2, 3]).unwrap();
            let then = decoder.step(&[Some(1)], &[4]).unwrap();
            candle_core::Tensor::cat(&[first, then], 1).unwrap().to_device(&Device::Cpu).unwrap()
        });
        assert_close("far positions", &logits[0], &logits[1], 1e-4);
    }
}

#[test]
fn generation_is_the_cpus() {
    let Some(device) = gpu() else { return };
    let prompts = [vec![1u32, 2, 3], vec![4, 5, 6, 7, 8], vec![9]];
    for config in [GenerationConfig::greedy(30), GenerationConfig { max_tokens: 20, ..Default::default() }] {
        let config = GenerationConfig { stop_tokens: vec![7, 11], ..config };
        for own in [&mambas()[0], &retnets()[0]] {
            let on = |device: &Device| generate(&model(own, DType::F32, device), &prompts, config.clone());
            assert_eq!(on(&device).unwrap(), on(&Device::Cpu).unwrap());
        }
    }
    // and the states that it leaves
    for own in [&mambas()[0], &retnets()[0], &retnets()[1]] {
        // to its end, or left before
        for taken in [1, 5, 20] {
            let states = |device: &Device| {
                let model = model(own, DType::F32, device);
                let mut generation = Generation::new(&model, &prompts, GenerationConfig::greedy(20)).unwrap();
                generation.by_ref().take(taken).for_each(|step| drop(step.unwrap()));
                generation.into_states().unwrap()
            };
            for (got, want) in states(&device).iter().zip(&states(&Device::Cpu)) {
                crate::decoder_laws::assert_same_state("behind a generation", got, want, 1e-4);
            }
        }
    }
}

#[test]
fn a_hundred_runs_give_the_same_bits() {
    let Some(device) = gpu() else { return };
    for config in [&mambas()[0], &retnets()[0]] {
        let model = model(config, DType::BF16, &device);
        let run = || -> Vec<u64> {
            let mut decoder = Decoder::new(&model, 3).unwrap();
            let slots = [Some(1), Some(0), None];
            let mut all = vec![];
            for t in 0..4 {
                let logits = decoder.step(&slots, &[t, t + 1, 0]).unwrap().narrow(0, 0, 2).unwrap();
                all.extend(bits(&logits.to_device(&Device::Cpu).unwrap()));
            }
            all
        };
        let want = run();
        for _ in 1..100 {
            assert!(run() == want);
        }
    }
}

#[test]
fn a_token_tried_is_a_token_taken() {
    let Some(device) = gpu() else { return };
    for config in [&mambas()[0], &retnets()[0]] {
        tried_is_taken(config, &device);
    }
}

fn tried_is_taken(config: &ModelConfig, device: &Device) {
    let (cuda, cpu) = (model(config, DType::F32, device), model(config, DType::F32, &Device::Cpu));
    for rows in [1, 2, 4] {
        let slots: Vec<Option<usize>> = (0..rows).map(Some).collect();
        let [mut taken, mut tried, mut want] =
            [&cuda, &cuda, &cpu].map(|model| Decoder::new(model, rows).unwrap());
        let ids = |tokens: u32| -> Vec<u32> {
            (0..rows as u32).flat_map(|r| (0..tokens).map(move |t| 3 * r + t)).collect()
        };
        taken.step(&slots, &ids(1)).unwrap();
        want.step(&slots, &ids(1)).unwrap();
        tried.draft(&slots, &ids(2)).unwrap();
        tried.accept(&vec![1; rows]).unwrap();
        for slot in 0..rows {
            let want = want.state(slot).unwrap();
            let forward = {
                let mut state = cuda.init_state(1).unwrap();
                let ids = candle_core::Tensor::new(&[[3 * slot as u32]], device).unwrap();
                cuda.forward_with_state(&ids, &mut state).unwrap();
                state
            };
            for (name, got) in [
                ("taken", taken.state(slot).unwrap()),
                ("tried", tried.state(slot).unwrap()),
                ("forward", forward),
            ] {
                for (i, (got, want)) in got.blocks.iter().zip(&want.blocks).enumerate() {
                    use subquadratic::layers::LayerState;
                    for ((part, got), (_, want)) in got.saved().unwrap().iter().zip(want.saved().unwrap()) {
                        let got = got.to_device(&Device::Cpu).unwrap();
                        let what = format!("rows {rows} {name} block {i} {part}");
                        assert_close(&what, &got, &want, 1e-5);
                    }
                }
            }
        }
    }
}
