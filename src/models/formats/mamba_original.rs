//! The original layout of the package mamba-ssm: `MambaConfig` and `MixerModel`.

use super::mamba_hf::{mamba_mixer, time_step_rank};
use super::{Family, Keys, Object, common};
use crate::layers::mamba::{TimeStepInit, TimeStepScheme};
use crate::layers::{MambaConfig, MlpConfig, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig};
use crate::{Error, Result};
use serde_json::{Value, json};

/// The epsilon of every norm, which no key sets.
const EPS: f64 = 1e-5;
/// `GatedMLP` rounds its width up to a multiple of this.
const MLP_MULTIPLE: usize = 128;

pub(super) fn upstream_name(own: &str) -> String {
    own.replacen("backbone.embeddings.", "backbone.embedding.", 1)
}

pub(super) fn own_name(upstream: &str) -> String {
    upstream.replacen("backbone.embedding.", "backbone.embeddings.", 1)
}

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("d_model")?;
    let layers = keys.required_size("n_layer")?;
    keys.layers("n_layer", layers)?;
    let mixer = mixer(&keys.object("ssm_cfg")?, hidden_size)?;
    if let Some(Value::Array(layers)) = keys.value("attn_layer_idx").filter(|v| **v != json!([])) {
        let got = format!("{} attention layers", layers.len());
        return Err(keys.wrong("attn_layer_idx", "no attention layers", &got));
    }
    keys.ignore(&["attn_cfg", "fused_add_norm"]);
    let norm = if keys.flag("rms_norm", true)? {
        NormConfig::Rms { eps: EPS }
    } else {
        NormConfig::Layer { eps: EPS }
    };
    let mlp = match keys.value("d_intermediate").and_then(Value::as_u64) {
        Some(0) => None,
        _ => keys.size("d_intermediate")?.map(|width| {
            let width = width.checked_next_multiple_of(MLP_MULTIPLE).unwrap_or(usize::MAX);
            FeedForwardConfig { norm, layer: MlpConfig::joint(hidden_size, width) }
        }),
    };
    let block = BlockConfig::new(norm, MixerConfig::Mamba(mixer), mlp);
    let vocab_size = keys.required_size("vocab_size")?;
    Ok(ModelConfig {
        vocab_multiple: keys.size("pad_vocab_size_multiple")?.unwrap_or(8),
        final_norm: Some(norm),
        tie_embeddings: keys.flag("tie_embeddings", true)?,
        residual_in_fp32: keys.flag("residual_in_fp32", true)?,
        ..ModelConfig::new(Family::MambaOriginal, vocab_size, hidden_size, vec![block; layers])
    })
}

fn mixer(keys: &Keys, hidden_size: usize) -> Result<MambaConfig> {
    keys.only("layer", &json!("Mamba1"))?;
    keys.ignore(&["use_fast_path"]);
    let expand = keys.number("expand", 2.0)?;
    let d_inner = expand * hidden_size as f64;
    if !(1.0..=f64::from(u32::MAX)).contains(&d_inner) {
        return Err(keys.wrong("expand", "a positive factor", &expand.to_string()));
    }
    let scheme = match keys.text("dt_init")?.as_deref() {
        None | Some("random") => TimeStepScheme::Random,
        Some("constant") => TimeStepScheme::Constant,
        Some(other) => return Err(keys.wrong("dt_init", "random or constant", other)),
    };
    let config = MambaConfig {
        d_model: hidden_size,
        d_inner: d_inner as usize,
        d_state: keys.size("d_state")?.unwrap_or(16),
        d_conv: keys.size("d_conv")?.unwrap_or(4),
        dt_rank: time_step_rank(keys, "dt_rank", hidden_size)?,
        bias: keys.flag("bias", false)?,
        conv_bias: keys.flag("conv_bias", true)?,
        inner_norm_eps: None,
        inner_norm_weight: false,
        time_step: TimeStepInit {
            min: keys.number("dt_min", 1e-3)?,
            max: keys.number("dt_max", 0.1)?,
            floor: keys.number("dt_init_floor", 1e-4)?,
            scale: keys.number("dt_scale", 1.0)?,
            scheme,
        },
    };
    keys.refuse_unknown()?;
    Ok(config)
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let mixer = mamba_mixer(common("mixer", config.blocks.iter().map(|block| &block.mixer))?)?;
    let norm = common("norm", config.blocks.iter().map(|block| block.norm))?;
    let mlp = common("mlp", config.blocks.iter().map(|block| block.mlp))?;
    let (NormConfig::Rms { eps } | NormConfig::RmsOutside { eps } | NormConfig::Layer { eps }) = norm;
    if eps != EPS || matches!(norm, NormConfig::RmsOutside { .. }) {
        return Err(Error::value("norm: eps", format!("{EPS}, as the original has it"), eps));
    }
    let t = &mixer.time_step;
    // the product is rounded down, so that a factor that is no whole number aims half a channel higher
    let expand = match mixer.d_inner % config.hidden_size {
        0 => json!(mixer.d_inner / config.hidden_size),
        _ => json!((mixer.d_inner as f64 + 0.5) / config.hidden_size as f64),
    };
    let value = json!({
        "d_model": config.hidden_size,
        "d_intermediate": mlp.map_or(0, |mlp| mlp.layer.d_intermediate),
        "n_layer": config.blocks.len(),
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba1",
            "d_state": mixer.d_state,
            "d_conv": mixer.d_conv,
            "expand": expand,
            "dt_rank": mixer.dt_rank,
            "dt_min": t.min,
            "dt_max": t.max,
            "dt_init_floor": t.floor,
            "dt_scale": t.scale,
            "dt_init": if t.scheme == TimeStepScheme::Random { "random" } else { "constant" },
            "bias": mixer.bias,
            "conv_bias": mixer.conv_bias,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": matches!(norm, NormConfig::Rms { .. }),
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": true,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "tie_embeddings": config.tie_embeddings,
    });
    match value {
        Value::Object(keys) => Ok(keys),
        _ => Err(Error::value("config", "an object", "something else")),
    }
}
