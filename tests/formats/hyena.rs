//! HyenaDNA's two layouts and safari's: what is saved comes back, every key counts or is refused, damage is named.

use super::*;
use serde_json::json;
use subquadratic::layers::hyena::{FilterOrder, HyenaFilter};
use subquadratic::models::read_config;

const LAYOUTS: [Family; 3] = [Family::HyenaDna, Family::HyenaDnaTraining, Family::Safari];

fn small(family: Family) -> ModelConfig {
    let mut config = ModelConfig::hyena(8, 2, 12, 24);
    config.family = family;
    config.vocab_multiple = 8;
    config.rescale_residual = false;
    for block in config.blocks.iter_mut().filter(|_| family != Family::HyenaDna) {
        let MixerConfig::Hyena(mixer) = &mut block.mixer else { panic!("a Hyena") };
        (mixer.order, mixer.filter_order) = (3, FilterOrder::ChannelFirst);
        let HyenaFilter::Implicit(filter) = &mut mixer.filter else { panic!("an implicit filter") };
        filter.normalized_first = family == Family::Safari;
    }
    config
}

fn saved(family: Family) -> (TempDir, LanguageModel) {
    let (dir, model) = (tempfile::tempdir().unwrap(), model(&small(family), DType::F32));
    model.save(dir.path()).unwrap();
    (dir, model)
}

/// Saved with `key` of the config (within `layer.` where so named) set to `value`, and loaded.
fn with_key(family: Family, key: &str, value: Value) -> subquadratic::Result<LanguageModel> {
    let (dir, _) = saved(family);
    let path = dir.path().join("config.json");
    let mut keys: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let model = if family == Family::Safari { &mut keys["model_config"] } else { &mut keys };
    match key.split_once('.') {
        Some((outer, inner)) => model[outer][inner] = value,
        None => model[key] = value,
    }
    fs::write(&path, keys.to_string()).unwrap();
    load(dir.path(), DType::F32, &Device::Cpu)
}

fn rows() -> Tensor {
    Tensor::new(&[[7u32, 8, 9, 10, 11, 7, 7, 4, 1], [10, 9, 8, 7, 0, 6, 11, 11, 8]], &Device::Cpu).unwrap()
}

#[test]
fn models_come_back_bit_for_bit() {
    for family in LAYOUTS {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            let (dir, model) = (tempfile::tempdir().unwrap(), model(&small(family), dtype));
            model.save(dir.path()).unwrap();
            assert_eq!(read_config(dir.path()).unwrap().blocks, model.config().blocks);
            let back = load(dir.path(), dtype, &Device::Cpu).unwrap();
            for (name, tensor) in model.parameters() {
                assert_eq!(common::bits(&back.parameters()[name]), common::bits(tensor), "{family:?} {name}");
            }
            let logits = |model: &LanguageModel| common::bits(&model.forward(&rows()).unwrap());
            assert_eq!(logits(&back), logits(&model), "{family:?} {dtype:?}");
        }
    }
}

/// Keys that change tensors are refused by the name of a tensor, those not supported by their own.
#[test]
fn wrong_keys_are_named() {
    let cases = [
        (Family::HyenaDna, "d_model", json!(9), "embeddings"),
        (Family::HyenaDna, "n_layer", json!(1), "layers.1."),
        (Family::HyenaDna, "hyena_order", json!(3), "in_proj"),
        (Family::HyenaDna, "hyena_order", json!(1), "order"),
        (Family::HyenaDna, "emb_dim", json!(7), "pos_emb.z"),
        (Family::HyenaDna, "emb_dim", json!(4), "emb_dim"),
        (Family::HyenaDna, "filter_order", json!(32), "implicit_filter"),
        (Family::HyenaDna, "num_inner_mlps", json!(3), "implicit_filter.6"),
        (Family::HyenaDna, "max_seq_len", json!(25), "pos_emb"),
        (Family::HyenaDna, "max_seq_len", json!(0), "max_seq_len"),
        (Family::HyenaDna, "short_filter_order", json!(4), "short_filter"),
        (Family::HyenaDna, "d_inner", json!(16), "mlp.fc1"),
        (Family::HyenaDna, "bidirectional", json!(true), "bidirectional"),
        (Family::HyenaDna, "secret_option", json!(2), "secret_option"),
        (Family::HyenaDnaTraining, "layer.l_max", json!(30), "pos_emb"),
        (Family::HyenaDnaTraining, "layer.num_heads", json!(2), "filter_fn.bias"),
        (Family::HyenaDnaTraining, "layer.num_heads", json!(3), "heads"),
        (Family::HyenaDnaTraining, "layer.post_order_ffn", json!(true), "ord_proj_w"),
        (Family::HyenaDnaTraining, "layer.inner_factor", json!(2), "inner_factor"),
        (Family::HyenaDnaTraining, "layer.linear_mixer", json!(true), "implicit_filter.0"),
        (Family::HyenaDnaTraining, "layer.activation", json!("tanh"), "layer.activation"),
        (Family::HyenaDnaTraining, "layer.filter_cls", json!("long-conv"), "filter_cls"),
        (Family::HyenaDnaTraining, "layer.bias", json!(false), "layer.bias"),
        (Family::HyenaDnaTraining, "attn_layer_idx", json!([1]), "attn_layer_idx"),
        (Family::HyenaDnaTraining, "max_position_embeddings", json!(64), "max_position_embeddings"),
        (Family::Safari, "layer.bidirectional", json!(true), "model_config.layer.bidirectional"),
        (Family::Safari, "layer.l_max", json!(30), "pos_emb"),
        (Family::HyenaDnaTraining, "layer.secret_option", json!(2), "secret_option"),
        (Family::HyenaDnaTraining, "layer._name_", json!("s4"), "_name_"),
    ];
    for (family, key, value, named) in cases {
        let message = with_key(family, key, value.clone()).unwrap_err().to_string();
        assert!(message.contains(named), "{family:?} {key} = {value}: {message}");
    }
}

#[test]
fn keys_change_the_logits_or_nothing() {
    let cases = [
        (Family::HyenaDna, "layer_norm_epsilon", json!(0.5), true),
        (Family::HyenaDna, "initializer_range", json!(0.5), false),
        (Family::HyenaDna, "embed_dropout", json!(0.5), false),
        (Family::HyenaDnaTraining, "layer.shift", json!(0.4), true),
        (Family::HyenaDnaTraining, "layer.normalized", json!(true), true),
        (Family::HyenaDnaTraining, "layer.lr_pos_emb", json!(0.1), false),
        (Family::HyenaDnaTraining, "layer.outer_mixing", json!(true), true),
        (Family::HyenaDnaTraining, "layer.activation", json!("silu"), true),
        (Family::HyenaDnaTraining, "layer.activation", json!("id"), false),
        (Family::HyenaDnaTraining, "layer.bidirectional", json!(true), true),
        (Family::HyenaDnaTraining, "layer.num_blocks", json!(3), true),
        (Family::HyenaDnaTraining, "attn_layer_idx", json!([]), false),
        (Family::HyenaDnaTraining, "max_position_embeddings", json!(0), false),
        (Family::Safari, "layer.normalized", json!(true), true),
        (Family::Safari, "layer.modulate", json!(false), true),
        (Family::HyenaDna, "hyena_dropout", json!(0.5), false),
        (Family::HyenaDna, "use_bias", json!(false), false),
    ];
    for (family, key, value, changes) in cases {
        let logits = |model: &LanguageModel| common::bits(&model.forward(&rows()).unwrap());
        let changed = logits(&with_key(family, key, value).unwrap()) != logits(&saved(family).1);
        assert_eq!(changed, changes, "{family:?} {key}");
    }
}

#[test]
fn cut_files_are_refused_by_name() {
    for family in LAYOUTS {
        let (dir, _) = saved(family);
        let path = dir.path().join("model.safetensors");
        let whole = fs::read(&path).unwrap();
        for count in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
            fs::write(&path, &whole[..count]).unwrap();
            let message = load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
            assert!(message.contains("model.safetensors"), "{family:?} cut at {count}: {message}");
        }
    }
}

/// The port gives `layer_norm_epsilon` to its last norm alone.
#[test]
fn the_norms_in_the_blocks_have_their_own_epsilon() {
    let model = with_key(Family::HyenaDna, "layer_norm_epsilon", json!(0.25)).unwrap();
    assert_eq!(model.config().final_norm, Some(NormConfig::Layer { eps: 0.25 }));
    assert!(model.config().blocks.iter().all(|block| block.norm == NormConfig::Layer { eps: 1e-5 }));
    let model = with_key(Family::Safari, "layer_norm_epsilon", json!(0.25)).unwrap();
    assert!(model.config().blocks.iter().all(|block| block.norm == NormConfig::Layer { eps: 0.25 }));
}

/// A model may have both heads, and says so in its config.
#[test]
fn labels_come_beside_tokens_or_alone() {
    for lm_head in [true, false] {
        for tie_embeddings in [true, false] {
            let config = ModelConfig { labels: 5, lm_head, tie_embeddings, ..small(Family::HyenaDna) };
            let (dir, model) = (tempfile::tempdir().unwrap(), model(&config, DType::F32));
            model.save(dir.path()).unwrap();
            let back = load(dir.path(), DType::F32, &Device::Cpu).unwrap();
            assert_eq!((back.config().labels, back.config().lm_head), (5, lm_head));
            assert_eq!(back.config().tie_embeddings, tie_embeddings);
            let scores = |model: &LanguageModel| common::bits(&model.classify(&rows()).unwrap());
            assert_eq!(scores(&back), scores(&model));
            assert_eq!(back.forward(&rows()).is_ok(), lm_head);
        }
    }
    let neither = ModelConfig { lm_head: false, ..small(Family::HyenaDna) };
    assert!(neither.validate().unwrap_err().to_string().contains("lm_head"));
}
