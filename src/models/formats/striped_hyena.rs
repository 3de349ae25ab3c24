//! StripedHyena and Evo: hybrids of gated modal convolutions and attention, after the package stripedhyena.
//!
//! Evo 2's package (vtx) went on from there; what the two share is here, the rest in `evo2`.

use super::{Family, Keys, Object};
use crate::layers::attention::{QkvLayout, RotaryConfig};
use crate::layers::modal_hyena::{ChannelOrder, HyenaFilter};
use crate::layers::{AttentionConfig, MlpConfig, ModalHyenaConfig, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig};
use crate::ops::{Activation, RotaryStyle};
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that change no logit.
const HARMLESS: &[&str] = &[
    "attn_block_dtype",
    "compile",
    "depthwise_dtype",
    "hyena_block_dtype",
    "inference_mode",
    "initializer_range",
    "log_intermediate_values",
    "low_mem_mode",
    "make_vocab_size_divisible_by",
    "max_batch_size",
    "max_sequence_length",
    "mha_use_flash_attn",
    "mlp_dtype",
    "mlp_init_method",
    "mlp_output_init_method",
    "model_name",
    "params_dtype",
    "pipe_parallel_size",
    "prefill_style",
    "print_activations",
    "seqlen",
    "split_k0",
    "tokenizer_type",
    "use_cache",
    "use_flash_attention_2",
    "use_flash_attn",
    "use_flash_depthwise",
    "use_flashfft",
    "use_fp8_input_projections",
    "use_hcl_kernel",
    "use_hcm_kernel",
    "use_hcs_kernel",
    "use_laughing_hyena",
    "vocab_file",
];

/// Our part of a block's names, and theirs.
const PARTS: &[(&str, &str)] = &[
    ("norm.weight", "pre_norm.scale"),
    ("norm2.weight", "post_norm.scale"),
    ("mlp.fc1.", "mlp.l2."),
    ("mlp.gate.", "mlp.l1."),
    ("mlp.fc2.", "mlp.l3."),
    ("mixer.Wqkv.", "inner_mha_cls.Wqkv."),
    ("mixer.out_proj.", "inner_mha_cls.out_proj."),
    ("mixer.", ""),
];

/// Our names outside the blocks, and theirs.
const WHOLE: &[(&str, &str)] = &[
    ("backbone.embeddings.weight", "embedding_layer.weight"),
    ("backbone.norm_f.weight", "norm.scale"),
    ("lm_head.weight", "unembed.weight"),
];

/// The name in files; `prefix` is `backbone.` in transformers' directories, else empty.
pub(super) fn upstream_name(own: &str, prefix: &str) -> String {
    if let Some((_, theirs)) = WHOLE.iter().find(|(ours, _)| *ours == own) {
        return format!("{prefix}{theirs}");
    }
    let Some((block, part)) = own.strip_prefix("backbone.layers.").and_then(|rest| rest.split_once('.'))
    else {
        return own.to_string();
    };
    for (ours, theirs) in PARTS {
        if let Some(rest) = part.strip_prefix(ours) {
            return format!("{prefix}blocks.{block}.{theirs}{rest}");
        }
    }
    own.to_string()
}

/// Our name of a tensor, with or without the prefix.
pub(super) fn own_name(upstream: &str) -> String {
    let bare = upstream.strip_prefix("backbone.").unwrap_or(upstream);
    if let Some((ours, _)) = WHOLE.iter().find(|(_, theirs)| *theirs == bare) {
        return ours.to_string();
    }
    let Some((block, part)) = bare.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) else {
        return upstream.to_string();
    };
    // the last part has no name of its own upstream
    for (ours, theirs) in PARTS {
        if let Some(rest) = part.strip_prefix(theirs) {
            return format!("backbone.layers.{block}.{ours}{rest}");
        }
    }
    upstream.to_string()
}

/// Tensors that files hold and no model needs: frequencies and times that the config says, the state of FP8 layers.
pub(super) fn ignores(upstream: &str) -> bool {
    upstream.ends_with(".rotary_emb.inv_freq")
        || upstream.ends_with("._extra_state")
        || upstream.ends_with(".filter.t")
}

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("hidden_size")?;
    let heads = keys.required_size("num_attention_heads")?;
    if let Some(groups) = keys.size("hyena_filter_groups")?.filter(|&groups| groups != 1) {
        let expected = "1: filters in groups never worked in the package";
        return Err(keys.wrong("hyena_filter_groups", expected, &groups.to_string()));
    }
    if let Some(filters) = keys.size("num_filters")?.filter(|&filters| filters != hidden_size) {
        let expected = format!("hidden_size = {hidden_size}");
        return Err(keys.wrong("num_filters", &expected, &filters.to_string()));
    }
    let columns = keys.flag("column_split_hyena", true)?;
    let hyena = ModalHyenaConfig {
        d_model: hidden_size,
        short_taps: keys.size("short_filter_length")?.unwrap_or(3),
        filter: HyenaFilter::Complex { states: keys.required_size("state_size")? },
        order: if columns { ChannelOrder::Columns { heads } } else { ChannelOrder::Thirds },
        projection_bias: true,
        short_bias: keys.flag("short_filter_bias", true)?,
        out_bias: true,
    };
    keys.ignore(&["column_split"]);
    let layers = layers(keys)?;
    let attention = indices(keys, "attn_layer_idxs", layers)?.unwrap_or_default();
    let listed = indices(keys, "hyena_layer_idxs", layers)?;
    let activation = activation(keys, Activation::Silu)?;
    let mixers = (0..layers).map(|i| {
        let is_attention = attention.contains(&i);
        if !is_attention && listed.as_ref().is_some_and(|listed| !listed.contains(&i)) {
            let got = format!("no mixer for layer {i}");
            return Err(keys.wrong("hyena_layer_idxs", "every layer here or in attn_layer_idxs", &got));
        }
        Ok(match is_attention {
            true => MixerConfig::Attention(attention_config(keys, QkvLayout::Joint, 10_000.0)?),
            false => MixerConfig::ModalHyena(hyena.clone()),
        })
    });
    let mixers = mixers.collect::<Result<Vec<_>>>()?;
    model(keys, Family::StripedHyena, mixers, &vec![activation; layers])
}

/// The number of blocks.
pub(super) fn layers(keys: &Keys) -> Result<usize> {
    let layers = keys.required_size("num_layers")?;
    if let Some(other) = keys.size("num_hidden_layers")?.filter(|&other| other != layers) {
        return Err(keys.wrong("num_hidden_layers", &format!("num_layers = {layers}"), &other.to_string()));
    }
    if layers > crate::models::config::MAX_BLOCKS {
        return Err(keys.wrong("num_layers", "fewer layers", &layers.to_string()));
    }
    Ok(layers)
}

/// A list of layers. Those beyond the last are left out: published configs name one too many.
pub(super) fn indices(keys: &Keys, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
    let Some(value) = keys.value(key) else { return Ok(None) };
    let index = |value: &Value| value.as_u64().and_then(|i| usize::try_from(i).ok());
    let all = value.as_array().and_then(|all| all.iter().map(index).collect::<Option<Vec<_>>>());
    let all = all.ok_or_else(|| keys.wrong(key, "a list of layers", &value.to_string()))?;
    let beyond: Vec<_> = all.iter().filter(|&&i| i >= layers).collect();
    if !beyond.is_empty() {
        keys.note(key, &format!("the layers {beyond:?} are left out, for there are {layers}"));
    }
    Ok(Some(all.into_iter().filter(|&i| i < layers).collect()))
}

pub(super) fn activation(keys: &Keys, default: Activation) -> Result<Activation> {
    match keys.text("mlp_activation")?.as_deref() {
        None => Ok(default),
        Some("silu") => Ok(Activation::Silu),
        Some("gelu") => Ok(Activation::Gelu),
        Some(other) => Err(keys.wrong("mlp_activation", "silu or gelu", other)),
    }
}

pub(super) fn attention_config(keys: &Keys, layout: QkvLayout, base: f64) -> Result<AttentionConfig> {
    let d_model = keys.required_size("hidden_size")?;
    let heads = keys.required_size("num_attention_heads")?;
    let shared = keys.size("proj_groups")?.unwrap_or(1);
    if d_model % heads != 0 || heads % shared != 0 {
        let got = format!("hidden_size {d_model}, num_attention_heads {heads}, proj_groups {shared}");
        return Err(keys.wrong(
            "num_attention_heads",
            "a divisor of hidden_size, a multiple of proj_groups",
            &got,
        ));
    }
    if shared > 1 {
        keys.only("smeared_gqa", &json!(false))?;
    }
    keys.ignore(&["smeared_gqa"]);
    let interpolated = keys.flag("use_interpolated_rotary_pos_emb", false)?;
    let factor = keys.number("rotary_emb_scaling_factor", 1.0)?;
    let rotary = RotaryConfig {
        base: keys.number("rotary_emb_base", base)?,
        scaling: if interpolated { factor } else { 1.0 },
        style: RotaryStyle::Half,
    };
    Ok(AttentionConfig {
        d_model,
        heads,
        kv_heads: heads / shared,
        head_dim: d_model / heads,
        layout,
        qkv_bias: keys.flag("qkv_proj_bias", true)?,
        out_bias: keys.flag("mha_out_proj_bias", true)?,
        rotary: Some(rotary),
        window: None,
        max_length: keys.size("max_seqlen")?,
    })
}

/// A model of `mixers`, with the activation of each block's MLP.
pub(super) fn model(
    keys: &Keys,
    family: Family,
    mixers: Vec<MixerConfig>,
    activations: &[Activation],
) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("hidden_size")?;
    let eps = keys.number("eps", 1e-5)?;
    let norm = match keys.flag("use_flash_rmsnorm", false)? {
        true => NormConfig::Rms { eps },
        false => NormConfig::RmsOutside { eps },
    };
    // the keys of attention count as known in models without it
    attention_config(keys, QkvLayout::Joint, 1e4)?;
    let parallel = keys.size("model_parallel_size")?.unwrap_or(1);
    let multiple = keys.size("inner_size_multiple_of")?.unwrap_or(64).saturating_mul(parallel);
    let automatic = hidden_size.saturating_mul(8) / 3;
    let automatic = automatic.checked_next_multiple_of(multiple).unwrap_or(usize::MAX);
    let inner = keys.size("inner_mlp_size")?.unwrap_or(automatic);
    let block = |(mixer, &activation): (MixerConfig, &Activation)| {
        let layer = MlpConfig::gated(hidden_size, inner, activation);
        BlockConfig::new(norm, mixer, Some(FeedForwardConfig { norm, layer }))
    };
    keys.ignore(HARMLESS);
    let vocab_size = keys.required_size("vocab_size")?;
    let blocks = mixers.into_iter().zip(activations).map(block).collect();
    let tied = keys.value("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false);
    Ok(ModelConfig {
        final_norm: if keys.flag("final_norm", true)? { Some(norm) } else { None },
        tie_embeddings: keys.flag("tie_embeddings", tied)?,
        residual_in_fp32: false,
        tokens: keys.tokens()?,
        ..ModelConfig::new(family, vocab_size, hidden_size, blocks)
    })
}

/// The keys that StripedHyena and Evo 2 share.
pub(super) fn write_shared(config: &ModelConfig) -> Result<Object> {
    let wrong = |name: &str, expected: &str, got: &str| Error::value(name, expected, got);
    let first = config.blocks.first().ok_or_else(|| wrong("blocks", "at least one", "none"))?;
    let (eps, flash) = match first.norm {
        NormConfig::Rms { eps } => (eps, true),
        NormConfig::RmsOutside { eps } => (eps, false),
        NormConfig::Layer { .. } => return Err(wrong("norm", "an RMS norm", "a layer norm")),
    };
    let mlp = first.mlp.ok_or_else(|| wrong("mlp", "one in every block", "none"))?;
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("vocab_size", config.vocab_size.into());
    put("hidden_size", config.hidden_size.into());
    put("num_filters", config.hidden_size.into());
    put("num_layers", config.blocks.len().into());
    put("inner_mlp_size", mlp.layer.d_intermediate.into());
    put("mlp_activation", mlp.layer.activation.name().into());
    put("eps", eps.into());
    put("use_flash_rmsnorm", flash.into());
    put("final_norm", config.final_norm.is_some().into());
    put("tie_embeddings", config.tie_embeddings.into());
    put("attn_layer_idxs", json!(positions(config, |mixer| matches!(mixer, MixerConfig::Attention(_)))));
    let attention = config.blocks.iter().find_map(|block| match &block.mixer {
        MixerConfig::Attention(attention) => Some(attention),
        _ => None,
    });
    let hyena = config.blocks.iter().find_map(|block| match &block.mixer {
        MixerConfig::ModalHyena(hyena) => Some(hyena),
        _ => None,
    });
    if let Some(hyena) = hyena {
        put("short_filter_length", hyena.short_taps.into());
        put("short_filter_bias", hyena.short_bias.into());
        let columns = matches!(hyena.order, ChannelOrder::Columns { .. });
        put("column_split_hyena", columns.into());
        if let ChannelOrder::Columns { heads } = hyena.order {
            put("num_attention_heads", heads.into());
        }
    }
    if let Some(attention) = attention {
        put("num_attention_heads", attention.heads.into());
        put("proj_groups", (attention.heads / attention.kv_heads).into());
        put("qkv_proj_bias", attention.qkv_bias.into());
        put("mha_out_proj_bias", attention.out_bias.into());
        if let Some(rotary) = attention.rotary {
            put("rotary_emb_base", rotary.base.into());
            put("use_interpolated_rotary_pos_emb", (rotary.scaling != 1.0).into());
            put("rotary_emb_scaling_factor", rotary.scaling.into());
        }
        put("max_seqlen", json!(attention.max_length));
    } else if !keys.contains_key("num_attention_heads") {
        keys.insert("num_attention_heads".into(), 1.into());
    }
    Ok(keys)
}

/// The blocks whose mixer is as asked.
pub(super) fn positions(config: &ModelConfig, is: impl Fn(&MixerConfig) -> bool) -> Vec<usize> {
    (0..config.blocks.len()).filter(|&i| is(&config.blocks[i].mixer)).collect()
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let mut keys = write_shared(config)?;
    keys.insert("model_type".into(), "stripedhyena".into());
    let hyena = positions(config, |mixer| matches!(mixer, MixerConfig::ModalHyena(_)));
    keys.insert("hyena_layer_idxs".into(), json!(hyena));
    keys.insert("hyena_filter_groups".into(), 1.into());
    let states = config.blocks.iter().find_map(|block| match &block.mixer {
        MixerConfig::ModalHyena(ModalHyenaConfig { filter: HyenaFilter::Complex { states }, .. }) => {
            Some(*states)
        }
        _ => None,
    });
    keys.insert("state_size".into(), states.unwrap_or(1).into());
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
