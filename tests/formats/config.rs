//! `config.json`: every key is honoured, known to change nothing, or refused by name.

use super::*;
use proptest::prelude::*;
use serde_json::json;
use subquadratic::models::read_config;

/// What another value of a key does.
#[derive(Clone, Copy, Debug)]
pub enum Effect {
    /// Other logits from the same weights.
    Logits,
    /// Other logits in bf16.
    Bf16Logits,
    /// Other tensors: the weights no longer fit, and the message names this one.
    Tensors(&'static str),
    /// Refused by name.
    Refused,
    /// Refused by the name of another key, which contradicts it.
    Against(&'static str),
    /// Another fresh model, the same logits.
    Init,
    /// Neither: notes for other programs.
    Nothing,
}
use Effect::*;

/// Every key that a family writes, a value that differs from the saved one, and what it does.
fn effects(family: Family) -> Vec<(&'static str, Value, Effect)> {
    if family == Family::MambaOriginal {
        return vec![
            ("d_model", json!(13), Tensors("embedding")),
            ("d_intermediate", json!(129), Tensors("mlp.fc1.weight")),
            ("n_layer", json!(1), Tensors("layers.1.")),
            ("vocab_size", json!(25), Tensors("embedding")),
            ("ssm_cfg.layer", json!("Mamba2"), Refused),
            ("ssm_cfg.d_state", json!(6), Tensors("A_log")),
            ("ssm_cfg.d_conv", json!(4), Tensors("conv1d.weight")),
            ("ssm_cfg.expand", json!(2), Tensors("out_proj.weight")),
            ("ssm_cfg.dt_rank", json!(3), Tensors("dt_proj.weight")),
            ("ssm_cfg.dt_min", json!(0.01), Init),
            ("ssm_cfg.dt_max", json!(0.2), Init),
            ("ssm_cfg.dt_init_floor", json!(0.01), Init),
            ("ssm_cfg.dt_scale", json!(2.0), Init),
            ("ssm_cfg.dt_init", json!("constant"), Init),
            ("ssm_cfg.bias", json!(false), Tensors("in_proj.bias")),
            ("ssm_cfg.conv_bias", json!(false), Tensors("conv1d.bias")),
            ("attn_layer_idx", json!([1]), Refused),
            ("attn_cfg", json!({"num_heads": 2}), Nothing),
            ("rms_norm", json!(false), Tensors("norm.bias")),
            ("residual_in_fp32", json!(false), Bf16Logits),
            ("fused_add_norm", json!(false), Nothing),
            ("pad_vocab_size_multiple", json!(16), Tensors("embedding")),
            ("tie_embeddings", json!(false), Tensors("lm_head.weight")),
        ];
    }
    let mut all = vec![
        ("model_type", json!("mamba2"), Refused),
        ("architectures", json!(["Other"]), Nothing),
        ("vocab_size", json!(22), Tensors("embeddings")),
        ("hidden_size", json!(u32::MAX), Tensors("embeddings")),
        ("num_hidden_layers", json!(1), Tensors("layers.1.")),
        ("state_size", json!(6), Tensors("A_log")),
        ("conv_kernel", json!(4), Tensors("conv1d.weight")),
        ("intermediate_size", json!(24), Tensors("out_proj.weight")),
        ("expand", json!(2), Nothing), // intermediate_size counts
        ("time_step_rank", json!("auto"), Tensors("dt_proj.weight")),
        ("time_step_min", json!(0.01), Init),
        ("time_step_max", json!(0.2), Init),
        ("time_step_floor", json!(0.01), Init),
        ("time_step_scale", json!(2.0), Init),
        ("time_step_init_scheme", json!("constant"), Init),
        ("use_bias", json!(false), Tensors("in_proj.bias")),
        ("use_conv_bias", json!(false), Tensors("conv1d.bias")),
        ("hidden_act", json!("gelu"), Refused),
        ("layer_norm_epsilon", json!(0.5), Logits),
        ("residual_in_fp32", json!(false), Bf16Logits),
        ("tie_word_embeddings", json!(false), Tensors("lm_head.weight")),
        ("initializer_range", json!(0.5), Init),
        ("rescale_prenorm_residual", json!(true), Init),
        ("bos_token_id", json!(3), Init),
        ("eos_token_id", json!([3, 4]), Init),
        ("pad_token_id", json!(3), Init),
        ("torch_dtype", json!("float16"), Nothing),
    ];
    if family == Family::FalconMamba {
        all.push(("mixer_rms_eps", json!(0.5), Logits));
    }
    all
}

#[test]
fn every_key_is_honoured_or_refused_by_name() {
    for family in FAMILIES {
        check_effects(&format!("{family:?}"), &Saved::of(family), effects(family));
    }
}

/// Every key that was written is listed in `effects`, and does what they say.
pub fn check_effects(family: &str, saved: &Saved, effects: Vec<(&'static str, Value, Effect)>) {
    let ids = ids();
    let logits = |dtype| load(saved.dir.path(), dtype, &Device::Cpu).unwrap().forward(&ids).unwrap();
    let (want, want16) = (common::values(&logits(DType::F32)), common::values(&logits(DType::BF16)));
    let config = read_config(saved.dir.path()).unwrap();

    let mut written: Vec<String> = vec![];
    for (key, value) in saved.keys() {
        match value {
            Value::Object(inner) if key == "ssm_cfg" => {
                written.extend(inner.keys().map(|inner| format!("{key}.{inner}")));
            }
            _ => written.push(key),
        }
    }
    let mut listed: Vec<&str> = effects.iter().map(|(key, ..)| *key).collect();
    listed.sort();
    written.sort();
    assert_eq!(listed, written, "{family}: a key without its test");

    for (key, value, effect) in effects {
        let what = format!("{family} {key}: {effect:?}");
        let _changed = saved.with_key(key, Some(value));
        match effect {
            Logits => assert_ne!(common::values(&logits(DType::F32)), want, "{what}"),
            Bf16Logits => assert_ne!(common::values(&logits(DType::BF16)), want16, "{what}"),
            Tensors(tensor) => saved.fails(&["model.safetensors", tensor]),
            Refused => saved.fails(&["config.json", &format!("`{key}`")]),
            Against(other) => saved.fails(&["config.json", &format!("`{other}`")]),
            Init => assert_ne!(read_config(saved.dir.path()).unwrap(), config, "{what}"),
            Nothing => assert_eq!(read_config(saved.dir.path()).unwrap(), config, "{what}"),
        }
        if matches!(effect, Init | Nothing) {
            assert_eq!(common::values(&logits(DType::F32)), want, "{what}");
        }
    }
}

/// What is left out has the family's default.
#[test]
fn keys_left_out_have_their_defaults() {
    for family in [Family::Mamba, Family::FalconMamba] {
        let mut config = config(family);
        for block in &mut config.blocks {
            let MixerConfig::Mamba(mixer) = &mut block.mixer else { panic!("a Mamba") };
            (mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.dt_rank) = (24, 16, 4, 1);
            mixer.bias = false;
        }
        config.initializer_range = 0.1;
        let saved = Saved::new(&config);
        let mut keys = saved.keys();
        keys.retain(|key, _| {
            ["model_type", "hidden_size", "num_hidden_layers", "vocab_size"].contains(&key.as_str())
        });
        saved.write_keys(keys);
        let read = read_config(saved.dir.path()).unwrap();
        assert_eq!((&read.blocks, read.tie_embeddings, read.residual_in_fp32), (&config.blocks, true, true));
        assert_eq!(read.initializer_range, 0.1);
        saved.load().unwrap();
    }
    let saved = Saved::of(Family::MambaOriginal);
    saved.write_keys(json!({"d_model": 40, "n_layer": 3, "vocab_size": 21}).as_object().unwrap().clone());
    let read = read_config(saved.dir.path()).unwrap();
    let mut want = ModelConfig::mamba(40, 3, 21);
    (want.family, want.vocab_multiple) = (Family::MambaOriginal, 8);
    assert_eq!(read, want);
    assert_eq!(read.vocab_rows(), 24);
}

/// As they lie on the hub.
#[test]
fn published_configs_are_read() {
    let read = |value: Value| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), value.to_string()).unwrap();
        read_config(dir.path()).unwrap()
    };
    let hf = read(json!({
        "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
        "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": true, "hidden_act": "silu",
        "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-5,
        "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0,
        "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": false, "residual_in_fp32": true,
        "rms_norm": true, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 1e-4,
        "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48,
        "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
        "use_bias": false, "use_cache": true, "use_conv_bias": true, "vocab_size": 50280
    }));
    assert_eq!(hf.parameter_count(), 129_135_360);
    let original = json!({
        "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": true,
        "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8
    });
    let original = read(original);
    assert_eq!((original.parameter_count(), original.vocab_rows()), (129_135_360, 50280));
    assert_eq!(original.blocks, hf.blocks);
    let falcon = read(json!({
        "_name_or_path": "./", "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0,
        "conv_kernel": 4, "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-5,
        "model_type": "falcon_mamba", "num_hidden_layers": 64, "pad_token_id": 11,
        "rescale_prenorm_residual": false, "residual_in_fp32": true, "state_size": 16,
        "tie_word_embeddings": false, "time_step_floor": 1e-4, "time_step_init_scheme": "random",
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "time_step_scale": 1.0,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_bias": false,
        "use_cache": true, "use_conv_bias": true, "vocab_size": 65024
    }));
    assert_eq!(falcon.parameter_count(), 7_272_665_088);
    assert_eq!(falcon.tokens.eos, [11]);
}

#[test]
fn inconsistent_and_unsupported_configs_are_refused_by_name() {
    let hf: &[(&str, Value)] = &[
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-4)),
        ("hidden_size", json!("12")),
        ("hidden_size", json!(12.5)),
        ("hidden_size", json!(1e300)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("vocab_size", json!([21])),
        ("state_size", json!(0)),
        ("conv_kernel", json!(0)),
        ("time_step_rank", json!("automatic")),
        ("time_step_rank", json!(0)),
        ("layer_norm_epsilon", json!("1e-5")),
        ("residual_in_fp32", json!(1)),
        ("tie_word_embeddings", json!("yes")),
        ("hidden_act", json!("relu")),
        ("time_step_init_scheme", json!("other")),
        ("eos_token_id", json!(["a"])),
        ("eos_token_id", json!(-1)),
        ("layer_types", json!(["linear_attention", "full_attention"])),
        ("layer_types", json!(["linear_attention"])),
        // kept by early conversions: must not contradict the rest
        ("d_model", json!(13)),
        ("n_layer", json!(3)),
        ("d_inner", json!(24)),
        ("rms_norm", json!(false)),
        // known to other families or to nobody
        ("num_heads", json!(4)),
        ("head_dim", json!(64)),
        ("n_groups", json!(1)),
        ("quantization_config", json!({"bits": 4})),
        ("rope_theta", json!(1e4)),
        ("sliding_window", json!(128)),
        ("mixer_rms_eps", json!(1e-6)),
    ];
    let original: &[(&str, Value)] = &[
        ("d_model", json!(0)),
        ("n_layer", json!(-1)),
        ("n_layer", json!(1u64 << 40)),
        ("d_intermediate", json!(-128)),
        ("d_intermediate", json!("128")),
        ("ssm_cfg.d_state", json!(0)),
        ("ssm_cfg.expand", json!(-2)),
        ("ssm_cfg.expand", json!(1e30)),
        ("ssm_cfg.dt_init", json!("zeros")),
        ("ssm_cfg.ngroups", json!(2)),
        ("ssm_cfg.headdim", json!(64)),
        ("ssm_cfg.layer", json!("Mamba2")),
        ("attn_layer_idx", json!([0])),
        ("pad_vocab_size_multiple", json!(0)),
        ("unknown", json!(true)),
    ];
    for (family, cases) in [(Family::Mamba, hf), (Family::MambaOriginal, original)] {
        let saved = Saved::of(family);
        for (key, value) in cases {
            let _changed = saved.with_key(key, Some(value.clone()));
            saved.fails(&["config.json", &format!("`{key}`")]);
        }
    }
    // sizes that no memory holds, and values that only the whole shows to be wrong: the file and the part are named
    let saved = Saved::of(Family::Mamba);
    for (key, value, part) in [
        ("intermediate_size", json!(1u64 << 40), "d_inner"),
        ("state_size", json!(u64::MAX), "d_state"),
        ("vocab_size", json!(1u64 << 60), "vocab_size"),
        ("layer_norm_epsilon", json!(-1.0), "eps"),
        ("time_step_min", json!(0.5), "time_step"),
        ("initializer_range", json!(-0.1), "initializer_range"),
    ] {
        let _changed = saved.with_key(key, Some(value));
        saved.fails(&["config.json", part]);
    }
    for key in ["model_type", "hidden_size", "num_hidden_layers"] {
        let _changed = saved.with_key(key, None);
        saved.fails(&["config.json", &format!("`{key}`"), "nothing"]);
    }
    // an absent feature, however it is written
    for value in [json!(null), json!(false), json!([]), json!({}), json!("")] {
        let _changed = saved.with_key("some_feature", Some(value));
        saved.load().unwrap();
    }
}

#[test]
fn a_config_that_is_none_is_refused() {
    let saved = Saved::of(Family::Mamba);
    let path = saved.path("config.json");
    let good = fs::read(&path).unwrap();
    let nested = "[".repeat(100_000);
    for bad in ["", "{", "nonsense", "[]", "3", "null", "\"mamba\"", "{\"model_type\": 3}", "\u{0}", &nested]
    {
        fs::write(&path, bad).unwrap();
        saved.fails(&["config.json"]);
    }
    fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    saved.fails(&["config.json"]);
    for end in (0..good.len() - 2).step_by(7) {
        fs::write(&path, &good[..end]).unwrap();
        saved.fails(&["config.json", "JSON"]);
    }
    fs::remove_file(&path).unwrap();
    saved.fails(&["config.json", "No such file"]);
    fs::create_dir(&path).unwrap();
    saved.fails(&["config.json"]);
    let nowhere = load("/nowhere/at/all", DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(nowhere.contains("/nowhere/at/all"), "{nowhere}");
    // only floats make a model
    fs::remove_dir(&path).unwrap();
    fs::write(&path, good).unwrap();
    for dtype in [DType::U32, DType::I64, DType::U8] {
        let error = load(saved.dir.path(), dtype, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("f32, f64, bf16 or f16"), "{error}");
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0i64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-2.0..40.0f64).prop_map(Value::from),
        "[a-zA-Z0-9 ]{0,8}".prop_map(Value::from),
        Just(json!("auto")),
        prop::collection::vec(any::<u8>(), 0..4).prop_map(Value::from),
        Just(json!({})),
        Just(json!({"d_state": 5})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever the values of known keys: a model, or an error that names the folder; never a panic.
    #[test]
    fn any_values_of_any_keys_are_read_or_refused(
        family in 0usize..3,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
    ) {
        static SAVED: std::sync::OnceLock<Vec<Saved>> = std::sync::OnceLock::new();
        let saved = &SAVED.get_or_init(|| FAMILIES.map(Saved::of).into())[family];
        let dir = tempfile::tempdir().unwrap();
        let mut keys = saved.keys();
        for (key, value) in changes {
            let key = keys.keys().nth(key.index(keys.len())).unwrap().clone();
            keys.insert(key, value);
        }
        fs::write(dir.path().join("config.json"), Value::Object(keys).to_string()).unwrap();
        fs::copy(saved.path("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        match load(dir.path(), DType::F32, &Device::Cpu) {
            Ok(model) => {
                let ids = Tensor::new(&[[0u32]], &Device::Cpu).unwrap();
                let logits = model.forward(&ids).unwrap();
                prop_assert_eq!(logits.dims(), &[1, 1, model.config().vocab_size]);
            }
            Err(error) => {
                let message = error.to_string();
                let dir = dir.path().display().to_string();
                prop_assert!(message.contains(&dir), "{message}");
            }
        }
    }
}
