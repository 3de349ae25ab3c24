//! What is saved is what is loaded: families, heads, dtypes, shards, random sizes.

use super::*;
use proptest::prelude::*;
use subquadratic::layers::mamba::{TimeStepInit, TimeStepScheme};
use subquadratic::models::{BlockConfig, SpecialTokens, load_trainable, read_config};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::BF16, DType::F16];

#[track_caller]
fn same_weights(what: &str, got: &LanguageModel, want: &LanguageModel) {
    assert_eq!(got.config(), want.config(), "{what}");
    let names: Vec<_> = got.parameters().keys().collect();
    assert_eq!(names, want.parameters().keys().collect::<Vec<_>>(), "{what}");
    for (name, tensor) in want.parameters() {
        let got = &got.parameters()[name];
        assert_eq!((got.dtype(), got.dims()), (tensor.dtype(), tensor.dims()), "{what}: {name}");
        assert_eq!(common::bits(got), common::bits(tensor), "{what}: {name}");
    }
}

#[test]
fn models_come_back_bit_for_bit() {
    for family in FAMILIES {
        for tied in [true, false] {
            let mut config = config(family);
            config.tie_embeddings = tied;
            if family != Family::MambaOriginal {
                config.tokens = SpecialTokens { bos: Some(3), eos: vec![4, 5], pad: Some(0) };
            }
            for dtype in DTYPES {
                let what = format!("{family:?} tied {tied} {dtype:?}");
                let model = model(&config, dtype);
                let dir = tempfile::tempdir().unwrap();
                model.save(dir.path()).unwrap();
                assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
                let back = load(dir.path(), dtype, &Device::Cpu).unwrap();
                same_weights(&what, &back, &model);
                let logits = |model: &LanguageModel| common::bits(&model.forward(&ids()).unwrap());
                assert_eq!(logits(&back), logits(&model), "{what}");
                let trainable = load_trainable(dir.path(), dtype, &Device::Cpu).unwrap();
                same_weights(&what, &trainable, &model);
                assert_eq!(trainable.variables().len(), model.parameters().len());

                // once more in the same place
                trainable.save(dir.path()).unwrap();
                same_weights(&what, &load(dir.path(), dtype, &Device::Cpu).unwrap(), &model);
                assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
            }
        }
    }
}

/// Stored in any dtype, loaded in any: what a conversion of the tensors gives; decays stay wide.
#[test]
fn weights_are_converted_as_they_are_read() {
    for stored in DTYPES {
        let model = model(&config(Family::Mamba), stored);
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path()).unwrap();
        for dtype in DTYPES {
            let back = load(dir.path(), dtype, &Device::Cpu).unwrap();
            for (name, tensor) in model.parameters() {
                let wide = name.ends_with("A_log") || name.ends_with(".D");
                let own = if wide && dtype != DType::F64 { DType::F32 } else { dtype };
                let got = &back.parameters()[name];
                assert_eq!(got.dtype(), own);
                assert_eq!(common::bits(got), common::bits(&tensor.to_dtype(own).unwrap()), "{name}");
            }
        }
    }
}

#[test]
fn shards_are_one_checkpoint() {
    for family in FAMILIES {
        for shards in [1, 2, 5] {
            let saved = Saved::of(family);
            saved.shard(shards);
            same_weights(&format!("{family:?} in {shards}"), &saved.load().unwrap(), &saved.model);
        }
    }
}

/// A model that a family's config cannot tell of is refused before anything is written.
#[test]
fn configs_beyond_a_family_are_not_saved() {
    type Change = fn(&mut ModelConfig);
    let cases: [(Family, Change); 6] = [
        (Family::Mamba, |c| c.blocks[1].mlp = super::config(Family::MambaOriginal).blocks[0].mlp),
        (Family::Mamba, |c| c.blocks[0].norm = NormConfig::Rms { eps: 1e-3 }),
        (Family::Mamba, |c| c.vocab_multiple = 8),
        (Family::MambaOriginal, |c| c.final_norm = Some(NormConfig::Rms { eps: 1e-3 })),
        (Family::MambaOriginal, |c| c.blocks[1].mlp = None),
        (Family::FalconMamba, |c| {
            let MixerConfig::Mamba(mixer) = &mut c.blocks[0].mixer else { unreachable!() };
            mixer.inner_norm_eps = None;
        }),
    ];
    for (family, change) in cases {
        let mut config = config(family);
        change(&mut config);
        let dir = tempfile::tempdir().unwrap();
        let error = model(&config, DType::F32).save(dir.path().join("new")).unwrap_err().to_string();
        assert!(!error.is_empty() && names(dir.path()).is_empty(), "{family:?}: {error}");
    }
}

fn any_config() -> impl Strategy<Value = ModelConfig> {
    let sizes = (1usize..20, 1usize..4, 1usize..40, 1usize..9, 1usize..6, 1usize..6, 1usize..40);
    let flags = prop::collection::vec(any::<bool>(), 6);
    // numbers of a few digits, as configs have them: the JSON parser reads longer ones to the last bit but one
    let few = |digits: i32| (1u32..1000).prop_map(move |n| f64::from(n) / 10f64.powi(digits));
    (0usize..3, sizes, flags, few(9), (few(3), 1usize..20)).prop_map(
        |(
            family,
            (width, layers, vocabulary, d_state, d_conv, dt_rank, d_inner),
            flags,
            eps,
            (range, multiple),
        )| {
            let family = FAMILIES[family];
            let original = family == Family::MambaOriginal;
            let mut config = ModelConfig::mamba(width, layers, vocabulary);
            let MixerConfig::Mamba(mut mixer) = config.blocks[0].mixer.clone() else { unreachable!() };
            (mixer.d_state, mixer.d_conv, mixer.dt_rank, mixer.d_inner) = (d_state, d_conv, dt_rank, d_inner);
            (mixer.bias, mixer.conv_bias) = (flags[0], flags[1]);
            mixer.inner_norm_eps = (family == Family::FalconMamba).then_some(eps);
            let scheme = if flags[2] { TimeStepScheme::Constant } else { TimeStepScheme::Random };
            mixer.time_step = TimeStepInit { min: eps, max: 1.0, floor: range, scale: range, scheme };
            let norm = match (original, flags[3]) {
                (true, true) => NormConfig::Layer { eps: 1e-5 },
                (true, false) => NormConfig::Rms { eps: 1e-5 },
                _ => NormConfig::Rms { eps },
            };
            let mlp = (original && flags[2])
                .then_some(FeedForwardConfig { norm, layer: MlpConfig::joint(width, 128) });
            config.blocks = vec![BlockConfig::new(norm, MixerConfig::Mamba(mixer), mlp); layers];
            (config.family, config.final_norm, config.tie_embeddings) = (family, Some(norm), flags[4]);
            config.residual_in_fp32 = flags[5];
            config.vocab_multiple = if original { multiple } else { 1 };
            config.initializer_range = if original { 0.02 } else { range };
            config.rescale_residual = original;
            config
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn models_of_any_sizes_come_back(config in any_config()) {
        let model = LanguageModel::init(&config, 5, DType::F32, &Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path()).unwrap();
        let back = load(dir.path(), DType::F32, &Device::Cpu).unwrap();
        same_weights("random sizes", &back, &model);
        prop_assert_eq!(read_config(dir.path()).unwrap(), config.clone());
        let ids = Tensor::new(&[[0u32, (config.vocab_size - 1) as u32]], &Device::Cpu).unwrap();
        let logits = back.forward(&ids).unwrap();
        prop_assert_eq!(logits.dims(), &[1, 2, config.vocab_size]);
    }
}
