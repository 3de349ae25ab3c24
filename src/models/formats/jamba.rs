//! Jamba, as transformers has it: Mamba with norms of dt, B and C, and attention without positions.
//!
//! Layers of experts are refused by name.

use super::mamba_hf::time_step_rank;
use super::{Family, Keys, Object, token_keys};
use crate::layers::{AttentionConfig, MambaConfig, MlpConfig, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig};
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that change no logit of a model without experts.
const HARMLESS: &[&str] = &[
    "attention_dropout",
    "calc_logits_for_entire_prompt",
    "expert_layer_offset",
    "expert_layer_period",
    "max_position_embeddings",
    "num_experts_per_tok",
    "num_logits_to_keep",
    "output_router_logits",
    "router_aux_loss_coef",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
];

/// Our part of a block's names, and theirs; `mixer` depends on the block.
const PARTS: &[(&str, &str)] = &[
    ("norm.", "input_layernorm."),
    ("norm2.", "pre_ff_layernorm."),
    ("mlp.fc1.", "feed_forward.up_proj."),
    ("mlp.gate.", "feed_forward.gate_proj."),
    ("mlp.fc2.", "feed_forward.down_proj."),
];

/// Our names outside the blocks, and theirs.
const WHOLE: &[(&str, &str)] = &[
    ("backbone.embeddings.weight", "model.embed_tokens.weight"),
    ("backbone.norm_f.weight", "model.final_layernorm.weight"),
];

/// The projections of attention; every other part of a mixer is Mamba's.
const ATTENTION: &[&str] = &["q_proj.", "k_proj.", "v_proj.", "o_proj."];

pub(super) fn upstream_name(own: &str) -> String {
    if let Some((_, theirs)) = WHOLE.iter().find(|(ours, _)| *ours == own) {
        return theirs.to_string();
    }
    let Some((block, part)) = own.strip_prefix("backbone.layers.").and_then(|rest| rest.split_once('.'))
    else {
        return own.to_string();
    };
    if let Some(rest) = part.strip_prefix("mixer.") {
        let attention = ATTENTION.iter().any(|name| rest.starts_with(name));
        let mixer = if attention { "self_attn" } else { "mamba" };
        return format!("model.layers.{block}.{mixer}.{rest}");
    }
    let renamed =
        PARTS.iter().find_map(|(ours, theirs)| Some(format!("{theirs}{}", part.strip_prefix(ours)?)));
    format!("model.layers.{block}.{}", renamed.unwrap_or(part.to_string()))
}

pub(super) fn own_name(upstream: &str) -> String {
    if let Some((ours, _)) = WHOLE.iter().find(|(_, theirs)| *theirs == upstream) {
        return ours.to_string();
    }
    let Some((block, part)) = upstream.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
    else {
        return upstream.to_string();
    };
    for mixer in ["mamba.", "self_attn."] {
        if let Some(rest) = part.strip_prefix(mixer) {
            return format!("backbone.layers.{block}.mixer.{rest}");
        }
    }
    let renamed =
        PARTS.iter().find_map(|(ours, theirs)| Some(format!("{ours}{}", part.strip_prefix(theirs)?)));
    format!("backbone.layers.{block}.{}", renamed.unwrap_or(part.to_string()))
}

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size = keys.size("hidden_size")?.unwrap_or(4096);
    let layers = keys.size("num_hidden_layers")?.unwrap_or(32);
    if layers > crate::models::config::MAX_BLOCKS {
        return Err(keys.wrong("num_hidden_layers", "fewer layers", &layers.to_string()));
    }
    let experts = keys.size("num_experts")?.unwrap_or(16);
    if experts != 1 {
        let expected = "1: mixtures of experts are not supported";
        return Err(keys.wrong("num_experts", expected, &experts.to_string()));
    }
    keys.ignore(&["num_local_experts"]);
    let eps = keys.number("rms_norm_eps", 1e-6)?;
    let norm = NormConfig::Rms { eps };
    let mamba = MambaConfig {
        d_inner: hidden_size.saturating_mul(keys.size("mamba_expand")?.unwrap_or(2)),
        d_state: keys.size("mamba_d_state")?.unwrap_or(16),
        d_conv: keys.size("mamba_d_conv")?.unwrap_or(4),
        dt_rank: time_step_rank(keys, "mamba_dt_rank", hidden_size)?,
        bias: keys.flag("mamba_proj_bias", false)?,
        conv_bias: keys.flag("mamba_conv_bias", true)?,
        inner_norm_eps: Some(eps),
        inner_norm_weight: true,
        ..MambaConfig::new(hidden_size)
    };
    let heads = keys.size("num_attention_heads")?.unwrap_or(32);
    if hidden_size % heads != 0 {
        let expected = format!("a divisor of hidden_size = {hidden_size}");
        return Err(keys.wrong("num_attention_heads", &expected, &heads.to_string()));
    }
    let kv_heads = match keys.has("num_key_value_heads") {
        true => keys.size("num_key_value_heads")?.unwrap_or(heads),
        false => 8,
    };
    let head_dim = keys.size("head_dim")?.unwrap_or(hidden_size / heads);
    let attention =
        AttentionConfig { kv_heads, head_dim, rotary: None, ..AttentionConfig::new(hidden_size, heads) };
    keys.only("hidden_act", &json!("silu"))?;
    let (period, offset) = (keys.size("attn_layer_period")?.unwrap_or(8), offset(keys)?);
    if offset >= period {
        let expected = format!("below attn_layer_period = {period}");
        return Err(keys.wrong("attn_layer_offset", &expected, &offset.to_string()));
    }
    let inner = keys.size("intermediate_size")?.unwrap_or(14336);
    let mlp = FeedForwardConfig { norm, layer: MlpConfig::gated(hidden_size, inner, Activation::Silu) };
    let block = |i: usize| {
        let mixer = match i % period == offset {
            true => MixerConfig::Attention(attention.clone()),
            false => MixerConfig::Mamba(mamba.clone()),
        };
        BlockConfig::new(norm, mixer, Some(mlp))
    };
    keys.ignore(HARMLESS);
    keys.ignore(&["layers_block_type", "layer_types", "layers_num_experts"]);
    let vocab_size = keys.size("vocab_size")?.unwrap_or(65536);
    Ok(ModelConfig {
        final_norm: Some(norm),
        tie_embeddings: keys.flag("tie_word_embeddings", false)?,
        residual_in_fp32: false,
        initializer_range: keys.number("initializer_range", 0.02)?,
        tokens: keys.tokens()?,
        ..ModelConfig::new(Family::Jamba, vocab_size, hidden_size, (0..layers).map(block).collect())
    })
}

fn offset(keys: &Keys) -> Result<usize> {
    let offset = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    match keys.value("attn_layer_offset") {
        None => Ok(4),
        Some(value) => {
            offset(value).ok_or_else(|| keys.wrong("attn_layer_offset", "a whole number", &value.to_string()))
        }
    }
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let wrong = |name: &str, expected: &str| Error::value(name, expected, "none");
    let first = config.blocks.first().ok_or_else(|| wrong("blocks", "at least one"))?;
    let NormConfig::Rms { eps } = first.norm else {
        return Err(Error::value("norm", "an RMS norm", "another"));
    };
    let mlp = first.mlp.ok_or_else(|| wrong("mlp", "one in every block"))?;
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("model_type", "jamba".into());
    put("architectures", json!(["JambaForCausalLM"]));
    put("vocab_size", config.vocab_size.into());
    put("hidden_size", config.hidden_size.into());
    put("intermediate_size", mlp.layer.d_intermediate.into());
    put("num_hidden_layers", config.blocks.len().into());
    put("num_experts", 1.into());
    put("rms_norm_eps", eps.into());
    put("hidden_act", "silu".into());
    put("initializer_range", config.initializer_range.into());
    put("tie_word_embeddings", config.tie_embeddings.into());
    let attention: Vec<usize> = (0..config.blocks.len())
        .filter(|&i| matches!(config.blocks[i].mixer, MixerConfig::Attention(_)))
        .collect();
    let period = match attention.as_slice() {
        [first, second, ..] => second - first,
        _ => config.blocks.len().max(2),
    };
    // with no attention an offset beyond the last layer
    let (period, offset) = match attention.first() {
        Some(&offset) => (period.max(offset + 1), offset),
        None => (config.blocks.len() + 1, config.blocks.len()),
    };
    put("attn_layer_period", period.into());
    put("attn_layer_offset", offset.into());
    for block in &config.blocks {
        match &block.mixer {
            MixerConfig::Mamba(mamba) => {
                put("mamba_expand", (mamba.d_inner / config.hidden_size.max(1)).into());
                put("mamba_d_state", mamba.d_state.into());
                put("mamba_d_conv", mamba.d_conv.into());
                put("mamba_dt_rank", mamba.dt_rank.into());
                put("mamba_proj_bias", mamba.bias.into());
                put("mamba_conv_bias", mamba.conv_bias.into());
            }
            MixerConfig::Attention(attention) => {
                put("num_attention_heads", attention.heads.into());
                put("num_key_value_heads", attention.kv_heads.into());
                put("head_dim", attention.head_dim.into());
            }
            _ => return Err(Error::value("mixer", "Mamba or attention", "another")),
        }
    }
    keys.extend(token_keys(&config.tokens));
    Ok(keys)
}
