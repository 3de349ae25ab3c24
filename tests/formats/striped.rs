//! StripedHyena, Evo, Evo 2, Jamba and hybrids of this crate: what is saved comes back, every key counts or is refused,
//! damage is named, what is tolerated is told.

use super::config::{Effect::*, check_effects};
use super::*;
use serde_json::json;
use subquadratic::models::{LoadOptions, load_with, read_config};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

const FIXTURES: [&str; 5] = ["striped-hyena", "evo-bf16", "evo2", "evo2-pt", "jamba"];

/// The fixtures' configs, and a hybrid of every mixer.
fn configs() -> Vec<(String, ModelConfig)> {
    let mut all: Vec<_> =
        FIXTURES.iter().map(|name| (name.to_string(), read_config(fixture(name)).unwrap())).collect();
    let mut hybrid = ModelConfig::striped("mamba hyena retention attention mamba", 12, 21).unwrap();
    hybrid.blocks[4].mixer = ModelConfig::hyena(12, 1, 21, 16).blocks[0].mixer.clone();
    all.push(("hybrid".into(), hybrid));
    all
}

fn saved(name: &str) -> Saved {
    let (_, config) = configs().into_iter().find(|(own, _)| own == name).unwrap();
    Saved::new(&config)
}

#[test]
fn models_come_back_bit_for_bit() {
    for (what, config) in configs() {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let (dir, model) = (tempfile::tempdir().unwrap(), model(&config, dtype));
            model.save(dir.path()).unwrap();
            let back = load(dir.path(), dtype, &Device::Cpu).unwrap();
            assert_eq!(back.config(), model.config(), "{what}");
            for (name, tensor) in model.parameters() {
                let own = &back.parameters()[name];
                assert_eq!(
                    (own.dtype(), common::bits(own)),
                    (tensor.dtype(), common::bits(tensor)),
                    "{name}"
                );
            }
            let logits = |model: &LanguageModel| common::bits(&model.forward(&ids()).unwrap());
            assert_eq!(logits(&back), logits(&model), "{what} {dtype:?}");
        }
    }
}

/// Keys of both packages and of transformers that every config has.
fn tokens_and_dtype() -> Vec<(&'static str, Value, config::Effect)> {
    vec![
        ("bos_token_id", json!(3), Init),
        ("eos_token_id", json!([3, 4]), Init),
        ("pad_token_id", json!(3), Init),
        ("torch_dtype", json!("float16"), Nothing),
    ]
}

/// Keys that StripedHyena and Evo 2 share.
fn shared() -> Vec<(&'static str, Value, config::Effect)> {
    let mut all = tokens_and_dtype();
    all.extend([
        ("vocab_size", json!(45), Tensors("embedding_layer.weight")),
        ("inner_mlp_size", json!(41), Tensors("mlp.l1.weight")),
        ("mlp_activation", json!("silu"), Logits),
        ("eps", json!(0.5), Logits),
        ("use_flash_rmsnorm", json!(false), Logits),
        ("final_norm", json!(false), Tensors("norm.scale")),
        ("tie_embeddings", json!(true), Tensors("unembed.weight")),
        ("short_filter_length", json!(4), Tensors("short_filter_weight")),
        ("short_filter_bias", json!(false), Tensors("short_filter_bias")),
        ("column_split_hyena", json!(false), Logits),
        ("num_attention_heads", json!(2), Logits),
        ("proj_groups", json!(1), Tensors("Wqkv")),
        ("qkv_proj_bias", json!(true), Tensors("Wqkv.bias")),
        ("mha_out_proj_bias", json!(true), Tensors("out_proj.bias")),
        ("rotary_emb_base", json!(100), Logits),
        ("use_interpolated_rotary_pos_emb", json!(true), Nothing), // the factor is 1
        ("rotary_emb_scaling_factor", json!(4), Nothing),          // not asked for
        ("max_seqlen", json!(99), Init),
    ]);
    all
}

/// `all` with some keys' entries in the place of those there.
fn with(
    mut all: Vec<(&'static str, Value, config::Effect)>,
    own: Vec<(&'static str, Value, config::Effect)>,
) -> Vec<(&'static str, Value, config::Effect)> {
    all.retain(|(key, ..)| own.iter().all(|(other, ..)| key != other));
    all.extend(own);
    all
}

#[test]
fn every_key_of_striped_hyena_counts() {
    let own = vec![
        ("model_type", json!("mamba2"), Refused),
        ("hidden_size", json!(28), Against("num_filters")),
        ("num_filters", json!(12), Refused),
        ("num_layers", json!(3), Tensors("blocks.3.")),
        ("attn_layer_idxs", json!([1]), Against("hyena_layer_idxs")),
        ("hyena_layer_idxs", json!([0]), Refused),
        ("hyena_filter_groups", json!(2), Refused),
        ("mlp_activation", json!("gelu"), Logits),
        ("state_size", json!(3), Tensors("filter.poles")),
    ];
    check_effects("striped-hyena", &saved("striped-hyena"), with(shared(), own));
    // positions that are interpolated, keys and queries with biases
    let evo = saved("evo-bf16");
    for key in ["use_interpolated_rotary_pos_emb", "rotary_emb_scaling_factor"] {
        let value = if key.starts_with("use") { json!(false) } else { json!(3) };
        let want = common::bits(&evo.model.forward(&ids()).unwrap());
        let _changed = evo.with_key(key, Some(value));
        assert_ne!(common::bits(&evo.load().unwrap().forward(&ids()).unwrap()), want, "{key}");
    }
}

#[test]
fn every_key_of_evo2_counts() {
    let own = vec![
        ("hidden_size", json!(32), Tensors("embedding_layer.weight")),
        ("num_attention_heads", json!(4), Logits),
        ("num_filters", json!(12), Nothing),
        ("num_layers", json!(3), Tensors("blocks.3.")),
        ("attn_layer_idxs", json!([]), Against("hcl_layer_idxs")),
        ("hcl_layer_idxs", json!([]), Refused),
        ("hcm_layer_idxs", json!([]), Against("hcl_layer_idxs")),
        ("hcs_layer_idxs", json!([]), Against("hcl_layer_idxs")),
        ("state_size", json!(4), Tensors("filter.log_poles")),
        ("hcl_filter_groups", json!(4), Nothing),
        ("hcm_filter_length", json!(9), Tensors("blocks.2.filter.h")),
        ("hcm_filter_groups", json!(4), Tensors("blocks.2.filter.h")),
        ("hcs_filter_length", json!(5), Tensors("blocks.3.filter.h")),
        ("hcs_filter_groups", json!(4), Tensors("blocks.3.filter.h")),
        ("interleave", json!(true), Refused), // beside column_split_hyena
        ("hyena_out_proj_bias", json!(true), Tensors("out_filter_dense.bias")),
        ("qkv_proj_bias", json!(false), Tensors("Wqkv.bias")),
        ("column_split", json!(false), Nothing), // as it is: see below
        ("evo2_style_activations", json!(true), Logits),
        ("use_flash_rmsnorm", json!(true), Logits),
    ];
    let saved = saved("evo2-pt");
    check_effects("evo2", &saved, with(shared(), own));
    // queries, keys and values head by head have no shared keys
    let changed = saved.with_key("column_split", Some(json!(true)));
    saved.fails(&["config.json", "kv_heads"]);
    drop(changed);
    // filters of 128 taps and more are the other way round
    let evo2 = self::saved("evo2");
    let _changed = evo2.with_key("hcm_filter_length", Some(json!(127)));
    evo2.fails(&["model.safetensors", "blocks.1.filter.h"]);
}

#[test]
fn every_key_of_jamba_counts() {
    let mut effects = tokens_and_dtype();
    effects.extend([
        ("model_type", json!("mamba2"), Refused),
        ("architectures", json!(["Other"]), Nothing),
        ("vocab_size", json!(42), Tensors("embed_tokens")),
        ("hidden_size", json!(25), Against("num_attention_heads")),
        ("intermediate_size", json!(41), Tensors("feed_forward.up_proj")),
        ("num_hidden_layers", json!(3), Tensors("layers.3.")),
        ("num_experts", json!(2), Refused),
        ("rms_norm_eps", json!(0.5), Logits),
        ("hidden_act", json!("gelu"), Refused),
        ("initializer_range", json!(0.5), Init),
        ("tie_word_embeddings", json!(true), Tensors("lm_head.weight")),
        ("attn_layer_period", json!(2), Tensors("layers.3.")),
        ("attn_layer_offset", json!(2), Tensors("layers.2.")),
        ("mamba_expand", json!(3), Tensors("in_proj")),
        ("mamba_d_state", json!(6), Tensors("A_log")),
        ("mamba_d_conv", json!(4), Tensors("conv1d.weight")),
        ("mamba_dt_rank", json!(4), Tensors("dt_proj")),
        ("mamba_proj_bias", json!(true), Tensors("in_proj.bias")),
        ("mamba_conv_bias", json!(false), Tensors("conv1d.bias")),
        ("num_attention_heads", json!(8), Tensors("q_proj")),
        ("num_key_value_heads", json!(3), Tensors("k_proj")),
        ("head_dim", json!(6), Tensors("q_proj")),
    ]);
    check_effects("jamba", &saved("jamba"), effects);
}

#[test]
fn every_key_of_a_hybrid_counts() {
    let saved = saved("hybrid");
    let model = |change: &dyn Fn(&mut Value)| {
        let mut model = saved.keys()["model"].clone();
        change(&mut model);
        model
    };
    let mut effects = tokens_and_dtype();
    effects.push(("model_type", json!("mamba2"), Refused));
    effects.push(("model", model(&|model| model["vocab_size"] = json!(22)), Tensors("embeddings.weight")));
    check_effects("hybrid", &saved, effects);
    // every field is there and known, down to the mixers, but for those that are younger than the format
    let fields = model(&|_| ());
    let optional =
        |field: &str, value: &Value| value.is_null() || ["final_norm", "lm_head", "labels"].contains(&field);
    for (field, _) in fields.as_object().unwrap().iter().filter(|(field, value)| !optional(field, value)) {
        let without = model(&|model| drop(model.as_object_mut().unwrap().remove(field)));
        let _changed = saved.with_key("model", Some(without));
        saved.fails(&["config.json", "`model`", field]);
    }
    for place in [
        "",
        "/blocks/0",
        "/blocks/0/norm/rms",
        "/blocks/0/mlp/layer",
        "/blocks/0/residual",
        "/blocks/0/mixer/mamba/time_step",
        "/blocks/1/mixer/modal_hyena",
        "/blocks/1/mixer/modal_hyena/filter/complex",
        "/blocks/2/mixer/retention",
        "/blocks/3/mixer/attention/rotary",
        "/blocks/4/mixer/hyena",
    ] {
        let more = model(&|model| model.pointer_mut(place).unwrap()["secret"] = json!(1));
        let _changed = saved.with_key("model", Some(more));
        saved.fails(&["config.json", "`model`", "secret"]);
    }
}

#[test]
fn foreign_keys_and_values_that_are_none_are_refused_by_name() {
    let cases: &[(&str, &[(&str, Value)])] = &[
        (
            "striped-hyena",
            &[
                ("num_experts", json!(4)),
                ("sliding_window", json!(128)),
                ("rope_theta", json!(1e4)),
                ("hcl_filter_groups", json!(2)),
                ("mlp_activation", json!("relu")),
                ("num_attention_heads", json!(5)),
                ("attn_layer_idxs", json!("all")),
                ("attn_layer_idxs", json!([-1])),
                ("num_hidden_layers", json!(5)),
                ("num_layers", json!(u64::MAX)),
                ("smeared_gqa", json!(true)),
                ("eps", json!("small")),
            ],
        ),
        (
            "evo2-pt",
            &[("num_experts", json!(4)), ("hyena_flip_x1x2", json!(true)), ("hcs_filter_length", json!(0))],
        ),
        (
            "jamba",
            &[
                ("num_experts", json!(16)),
                ("sliding_window", json!(128)),
                ("rope_theta", json!(1e4)),
                ("attn_layer_offset", json!(4)),
                ("attn_layer_offset", json!(-1)),
                ("num_attention_heads", json!(7)),
                ("num_hidden_layers", json!(u64::MAX)),
                ("hyena_layer_idxs", json!([0])),
            ],
        ),
        ("hybrid", &[("hidden_size", json!(4)), ("model", json!(3)), ("model", Value::Null)]),
    ];
    for (name, keys) in cases {
        let saved = saved(name);
        for (key, value) in *keys {
            let _changed = saved.with_key(key, Some(value.clone()));
            saved.fails(&["config.json", &format!("`{key}`")]);
        }
    }
}

#[test]
fn cut_files_are_refused_by_name() {
    for (name, weights) in [("striped-hyena", "model.safetensors"), ("evo2-pt", "evo2_tiny.pt")] {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(fixture(name).join("config.json"), dir.path().join("config.json")).unwrap();
        let whole = fs::read(fixture(name).join(weights)).unwrap();
        for count in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(dir.path().join(weights), &whole[..count]).unwrap();
            let message = load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
            assert!(message.contains(weights), "{name} cut at {count}: {message}");
        }
        fs::write(dir.path().join(weights), &whole).unwrap();
        load(dir.path(), DType::F32, &Device::Cpu).unwrap();
    }
}

#[test]
fn a_state_dict_may_have_any_name_but_no_rival() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "evo2_tiny.pt"] {
        fs::copy(fixture("evo2-pt").join(name), dir.path().join(name)).unwrap();
    }
    load(dir.path(), DType::F32, &Device::Cpu).unwrap();
    fs::copy(dir.path().join("evo2_tiny.pt"), dir.path().join("other.pt")).unwrap();
    let message = load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("evo2_tiny.pt, other.pt"), "{message}");
}

#[test]
fn layers_that_are_not_there_are_left_out_and_told() {
    let model = load(fixture("striped-hyena"), DType::F32, &Device::Cpu).unwrap();
    let [note] = model.notes() else { panic!("{:?}", model.notes()) };
    assert!(
        note.contains("config.json") && note.contains("`hyena_layer_idxs`") && note.contains("[4]"),
        "{note}"
    );
    assert_eq!(model.frozen().unwrap().notes(), model.notes());
    for name in ["evo-bf16", "evo2", "jamba"] {
        assert!(load(fixture(name), DType::F32, &Device::Cpu).unwrap().notes().is_empty(), "{name}");
    }
}

/// Writes the weights anew with `change` made to one of them; returns it as it is now.
fn replace(saved: &Saved, name: &str, change: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Tensor {
    let changed = change(&saved.model.parameters()[name]).unwrap();
    saved.with_tensors(|tensors| drop(tensors.insert(name.into(), changed.clone())));
    changed
}

/// A layer's poles, complex or by their logarithms, and what they are multiplied with to lie within the unit circle.
const POLES: [(&str, &str, f64); 2] =
    [("striped-hyena", "backbone.blocks.0.filter.poles", 0.01), ("evo2", "blocks.2.filter.log_poles", -0.01)];

#[test]
fn unstable_poles_are_told() {
    for (name, tensor, stable) in POLES {
        let saved = saved(name);
        let told = |factor: f64| {
            replace(&saved, tensor, |poles| poles.abs()? * factor);
            let model = saved.load().unwrap();
            model.forward(&ids()).unwrap();
            model.notes().iter().filter(|note| note.contains(tensor)).cloned().collect::<Vec<_>>()
        };
        assert!(told(stable).is_empty(), "{name}");
        let notes = told(1e3 * stable.abs());
        assert!(notes.len() == 1 && notes[0].contains("above 1"), "{name}: {notes:?}");
    }
}

#[test]
fn rounded_poles_are_refused_unless_asked_for() {
    let options = LoadOptions { rounded_poles: true, ..LoadOptions::default() };
    for (name, tensor, stable) in POLES {
        for dtype in [DType::BF16, DType::F16] {
            let saved = saved(name);
            let want = replace(&saved, tensor, |poles| (poles.abs()? * stable)?.to_dtype(dtype));
            saved.fails(&[tensor, "f32 or f64", dtype.as_str(), "rounded_poles"]);
            let model = load_with(saved.dir.path(), DType::BF16, &Device::Cpu, options).unwrap();
            let told = |note: &String| note.contains(tensor) && note.contains(dtype.as_str());
            assert!(model.notes().iter().any(told), "{:?}", model.notes());
            let got = &model.parameters()[tensor];
            assert_eq!((got.dtype(), common::bits(got)), (DType::F32, common::bits(&want)));
        }
    }
    // residues may be rounded: they only weigh
    let saved = saved("striped-hyena");
    replace(&saved, "backbone.blocks.0.filter.residues", |x| x.to_dtype(DType::BF16));
    saved.load().unwrap();
}
