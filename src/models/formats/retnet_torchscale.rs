//! torchscale's `RetNetDecoder`, and the port of it to transformers (syncdoth's `RetNet`), whose configs share the keys.

use super::names::Names;
use super::{Family, Keys, Object, common};
use crate::layers::retention::{HeadDecay, HeadNorm, RetentionConfig};
use crate::layers::{MlpConfig, MlpGate, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig, Residual};
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that matter to training alone, choose between equal ways of computing, or are read by other models of the
/// package.
const HARMLESS: &[&str] = &[
    "activation_dropout",
    "checkpoint_activations",
    "chunkwise_recurrent",
    "ddp_rank",
    "disable_fused_ops",
    "drop_path_rate",
    "dropout",
    "forward_impl",
    "fsdp",
    "max_rel_pos",
    "max_target_positions",
    "moe_eval_capacity_token_fraction",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_normalize_gate_prob_before_dropping",
    "moe_second_expert_policy",
    "moe_top1_expert",
    "output_retentions",
    "recurrent_chunk_size",
    "rel_pos_buckets",
    "xpos_rel_pos",
    "xpos_scale_base",
    "z_loss_coeff",
];

/// The tables differ in what stands before the names, in the head, and in what `fc1` is.
macro_rules! names {
    ($prefix:literal, $head:literal, [$($mlp:expr),*]) => {
        Names {
            layers: concat!($prefix, "layers."),
            outer: &[
                ("backbone.embeddings.", concat!($prefix, "embed_tokens.")),
                ("backbone.embedding_norm.", concat!($prefix, "layernorm_embedding.")),
                ("backbone.norm_f.", concat!($prefix, "layer_norm.")),
                ("lm_head.", $head),
            ],
            inner: &[
                ("norm.", "retention_layer_norm."),
                ("mixer.o_proj.", "retention.out_proj."),
                ("mixer.", "retention."),
                ("norm2.", "final_layer_norm."),
                ("mlp.norm.", "ffn.ffn_layernorm."),
                $($mlp,)*
                ("mlp.", "ffn."),
            ],
        }
    };
}

/// The names of torchscale, or of the port with gated or plain MLPs.
pub(super) fn names(family: Family) -> Names {
    match family {
        Family::RetNetPort { glu: true } => {
            names!("model.", "lm_head.", [("mlp.gate.", "ffn.fc1."), ("mlp.fc1.", "ffn.gate.")])
        }
        Family::RetNetPort { glu: false } => names!("model.", "lm_head.", []),
        _ => names!("", "output_projection.", [("mlp.gate.", "ffn.fc1."), ("mlp.fc1.", "ffn.gate.")]),
    }
}

/// The tensors of a checkpoint that follow from its config: name and values.
pub(super) fn buffers(config: &ModelConfig) -> Vec<(String, Vec<f64>)> {
    let Some(MixerConfig::Retention(mixer)) = config.blocks.first().map(|block| &block.mixer) else {
        return vec![];
    };
    let prefix = if matches!(config.family, Family::RetNetPort { .. }) { "model." } else { "" };
    let angles = mixer.rotary.map_or(vec![], |rotary| rotary.frequencies(mixer.head_key));
    vec![
        (format!("{prefix}retnet_rel_pos.angle"), angles.into_iter().flat_map(|w| [w, w]).collect()),
        (format!("{prefix}retnet_rel_pos.decay"), mixer.decay.logarithms(mixer.heads)),
    ]
}

pub(super) fn read(keys: &Keys, port: bool) -> Result<ModelConfig> {
    let size = |key: &str, default: usize| Ok::<_, Error>(keys.size(key)?.unwrap_or(default));
    let hidden_size = size("decoder_embed_dim", 768)?;
    let value_size = size("decoder_value_embed_dim", 1280)?;
    let heads = size("decoder_retention_heads", 3)?;
    let inner = size("decoder_ffn_embed_dim", 1280)?;
    let layers = keys.layers("decoder_layers", 12)?;
    for (key, width) in [("decoder_embed_dim", hidden_size), ("decoder_value_embed_dim", value_size)] {
        if !width.is_multiple_of(heads) {
            let expected = format!("a multiple of decoder_retention_heads = {heads}");
            return Err(keys.wrong(key, &expected, &width.to_string()));
        }
    }
    keys.only("moe_freq", &json!(0))?;
    keys.only("use_xmoe", &json!(false))?;
    keys.only("multiway", &json!(false))?;
    keys.only("no_output_layer", &json!(false))?;
    keys.ignore(HARMLESS);
    // the package's own order: sub-layer norm, its default, overrules deep norm once that has turned it off
    let (mut deep, mut sub) = (keys.flag("deepnorm", false)?, keys.flag("subln", true)?);
    let mut before = keys.flag("decoder_normalize_before", true)?;
    if deep {
        (before, sub) = (false, false);
    }
    if sub {
        (before, deep) = (true, false);
    }
    let activation = keys.activation("activation_fn", Activation::Gelu)?;
    let eps = keys.number("layernorm_eps", 1e-6)?;
    let norm = NormConfig::Rms { eps };
    let glu = !port || keys.flag("use_glu", true)?;
    let rms = port && keys.flag("use_ffn_rms_norm", false)?;
    let layer = if glu {
        MlpConfig::gated(hidden_size, inner, activation)
    } else {
        let kind = if rms { norm } else { NormConfig::Layer { eps } };
        let inner_norm = sub.then_some(kind);
        MlpConfig {
            d_model: hidden_size,
            d_intermediate: inner,
            activation,
            gate: MlpGate::None,
            bias: true,
            inner_norm,
        }
    };
    let decay =
        if port && keys.flag("use_lm_decay", false)? { HeadDecay::LogLinear } else { HeadDecay::Geometric };
    let mixer = RetentionConfig {
        head_value: value_size / heads,
        decay,
        norm: HeadNorm { kind: norm, affine: false },
        ..RetentionConfig::new(hidden_size, heads)
    };
    let scale = if deep { (2.0 * layers as f64).powf(0.25) } else { 1.0 };
    let block = BlockConfig {
        norm,
        mixer: MixerConfig::Retention(mixer),
        mlp: Some(FeedForwardConfig { norm, layer }),
        residual: Residual { scale, post_norm: !before },
    };
    let scaled = !keys.flag("no_scale_embedding", true)?;
    let tied = if port { "tie_word_embeddings" } else { "share_decoder_input_output_embed" };
    let vocab_size = if port { size("vocab_size", 50_257)? } else { keys.required_size("vocab_size")? };
    let family = if port { Family::RetNetPort { glu } } else { Family::RetNetTorchscale };
    let width = hidden_size as f64;
    Ok(ModelConfig {
        embedding_scale: if scaled { width.sqrt() } else { 1.0 },
        embedding_norm: keys.flag("layernorm_embedding", false)?.then_some(norm),
        final_norm: before.then_some(norm),
        tie_embeddings: keys.flag(tied, false)?,
        initializer_range: if port { keys.number("initializer_range", 0.02)? } else { width.powf(-0.5) },
        rescale_residual: false,
        tokens: keys.tokens()?,
        ..ModelConfig::new(family, vocab_size, hidden_size, vec![block; layers])
    })
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let block = common("block", config.blocks.iter())?;
    let (MixerConfig::Retention(mixer), Some(mlp)) = (&block.mixer, &block.mlp) else {
        return Err(Error::value("blocks", "retention and an MLP, as the family has them", "others"));
    };
    let NormConfig::Rms { eps } = block.norm else {
        return Err(Error::value("norm", "an RMS norm", "a layer norm"));
    };
    let port = matches!(config.family, Family::RetNetPort { .. });
    let activation = match mlp.layer.activation {
        Activation::Silu => "swish",
        other => other.name(),
    };
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("vocab_size", config.vocab_size.into());
    put("decoder_embed_dim", config.hidden_size.into());
    put("decoder_value_embed_dim", (mixer.head_value * mixer.heads).into());
    put("decoder_retention_heads", mixer.heads.into());
    put("decoder_ffn_embed_dim", mlp.layer.d_intermediate.into());
    put("decoder_layers", config.blocks.len().into());
    put("decoder_normalize_before", (!block.residual.post_norm).into());
    put("activation_fn", activation.into());
    put("layernorm_eps", eps.into());
    put("no_scale_embedding", (config.embedding_scale == 1.0).into());
    put("layernorm_embedding", config.embedding_norm.is_some().into());
    put("deepnorm", (block.residual.scale != 1.0).into());
    // in a gated MLP it does nothing but forbid norms behind the sums
    let sub = if mlp.layer.gate == MlpGate::None {
        mlp.layer.inner_norm.is_some()
    } else {
        !block.residual.post_norm
    };
    put("subln", sub.into());
    if port {
        put("model_type", "retnet".into());
        put("architectures", json!(["RetNetForCausalLM"]));
        put("use_glu", (mlp.layer.gate != MlpGate::None).into());
        put("use_ffn_rms_norm", matches!(mlp.layer.inner_norm, Some(NormConfig::Rms { .. })).into());
        put("use_lm_decay", (mixer.decay == HeadDecay::LogLinear).into());
        put("tie_word_embeddings", config.tie_embeddings.into());
        put("initializer_range", config.initializer_range.into());
        keys.extend(super::token_keys(&config.tokens));
    } else {
        put("share_decoder_input_output_embed", config.tie_embeddings.into());
    }
    Ok(keys)
}
