//! fla's `retnet` (the package flash-linear-attention, `fla-hub/retnet-*`).

use super::names::Names;
use super::{Family, Keys, Object, common};
use crate::layers::retention::{
    HeadDecay, HeadNorm, RetentionConfig, RetentionRotary, RetentionScaling, RotaryAngles, ShortConv,
};
use crate::layers::{MlpConfig, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig};
use crate::ops::{Activation, Form, RotaryStyle};
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that choose between equal ways of computing.
const HARMLESS: &[&str] = &[
    "attn_mode",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_swiglu",
    "max_position_embeddings",
    "use_l2warp",
];

/// The tables differ in the name of the heads' norm.
macro_rules! names {
    ($norm:literal) => {
        Names {
            layers: "model.layers.",
            outer: &[("backbone.embeddings.", "model.embeddings."), ("backbone.norm_f.", "model.norm.")],
            inner: &[
                ("mixer.g_norm.", $norm),
                ("mixer.", "attn."),
                ("norm.", "attn_norm."),
                ("norm2.", "mlp_norm."),
                ("mlp.fc1.", "mlp.up_proj."),
                ("mlp.gate.", "mlp.gate_proj."),
                ("mlp.fc2.", "mlp.down_proj."),
            ],
        }
    };
}

pub(super) fn names(fused_norm: bool) -> Names {
    if fused_norm { names!("attn.g_norm_swish_gate.") } else { names!("attn.g_norm.") }
}

/// The multiple that the inner width of the MLP is rounded up to.
const MLP_MULTIPLE: usize = 256;

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size = keys.size("hidden_size")?.unwrap_or(2048);
    let layers = keys.layers("num_hidden_layers", 24)?;
    let heads = keys.size("num_heads")?.unwrap_or(8);
    let kv_heads = keys.size("num_kv_heads")?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(keys.wrong(
            "num_kv_heads",
            &format!("a divisor of num_heads = {heads}"),
            &kv_heads.to_string(),
        ));
    }
    let width = |key: &str, default: f64| -> Result<usize> {
        let factor = keys.number(key, default)?;
        let width = hidden_size as f64 * factor;
        let whole = width.round();
        if !(1.0..=f64::from(u32::MAX)).contains(&whole) || (width - whole).abs() > 1e-9 * whole {
            let expected = format!("a factor that makes a whole number of hidden_size = {hidden_size}");
            return Err(keys.wrong(key, &expected, &factor.to_string()));
        }
        if !(whole as usize).is_multiple_of(heads) {
            let expected = format!("a width that num_heads = {heads} divides");
            return Err(keys.wrong(key, &expected, &format!("{factor}, a width of {whole}")));
        }
        Ok(whole as usize / heads)
    };
    let eps = keys.number("norm_eps", 1e-6)?;
    let norm = NormConfig::Rms { eps };
    let gate = keys.activation("hidden_act", Activation::Silu)?;
    if gate != Activation::Silu {
        return Err(keys.wrong("hidden_act", "swish, the only one that fla's MLP has", gate.name()));
    }
    let gated = keys.flag("use_output_gate", true)?;
    let feature_map = match keys.value("feature_map") {
        Some(_) => Some(keys.activation("feature_map", Activation::Relu)?),
        None => None,
    };
    let conv_width = keys.size("conv_size")?.unwrap_or(4);
    let conv_bias = keys.flag("conv_bias", false)?;
    let short_conv =
        keys.flag("use_short_conv", false)?.then_some(ShortConv { width: conv_width, bias: conv_bias });
    keys.only("attn", &Value::Null)?;
    keys.only("attnres_block_size", &Value::Null)?;
    let fused_norm = keys.flag("fuse_norm", true)? && gated;
    let mixer = RetentionConfig {
        d_model: hidden_size,
        heads,
        kv_heads,
        head_key: width("expand_k", 1.0)?,
        head_value: width("expand_v", 2.0)?,
        decay: HeadDecay::Geometric,
        rotary: Some(RetentionRotary {
            style: RotaryStyle::Half,
            angles: RotaryAngles::Open,
            base: 10_000.0,
        }),
        scaling: RetentionScaling::None,
        norm: HeadNorm { kind: norm, affine: keys.flag("elementwise_affine", true)? },
        gate: gated.then_some(gate),
        feature_map,
        short_conv,
        bias: false,
        form: Form::Auto,
    };
    let ratio = keys.number("hidden_ratio", 4.0)?;
    let inner = match keys.size("intermediate_size")? {
        Some(size) => size,
        None => {
            let inner = (hidden_size as f64 * ratio * 2.0 / 3.0).floor();
            if !(1.0..=f64::from(u32::MAX)).contains(&inner) {
                return Err(keys.wrong("hidden_ratio", "a positive factor", &ratio.to_string()));
            }
            (inner as usize).next_multiple_of(MLP_MULTIPLE)
        }
    };
    keys.ignore(HARMLESS);
    let mlp = FeedForwardConfig { norm, layer: MlpConfig::gated(hidden_size, inner, gate) };
    let block = BlockConfig::new(norm, MixerConfig::Retention(mixer), Some(mlp));
    let vocab_size = keys.size("vocab_size")?.unwrap_or(32_000);
    let family = Family::RetNet { fused_norm };
    Ok(ModelConfig {
        final_norm: Some(norm),
        tie_embeddings: keys.flag("tie_word_embeddings", false)?,
        initializer_range: keys.number("initializer_range", 0.02)?,
        rescale_residual: false,
        tokens: keys.tokens()?,
        ..ModelConfig::new(family, vocab_size, hidden_size, vec![block; layers])
    })
}

pub(super) fn write(config: &ModelConfig, fused_norm: bool) -> Result<Object> {
    let block = common("block", config.blocks.iter())?;
    let (MixerConfig::Retention(mixer), Some(mlp)) = (&block.mixer, &block.mlp) else {
        return Err(Error::value("blocks", "retention and an MLP, as the family has them", "others"));
    };
    let NormConfig::Rms { eps } = block.norm else {
        return Err(Error::value("norm", "an RMS norm", "a layer norm"));
    };
    let factor = |width: usize| -> Value {
        let total = width * mixer.heads;
        match total % config.hidden_size {
            0 => json!(total / config.hidden_size),
            _ => json!(total as f64 / config.hidden_size as f64),
        }
    };
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("model_type", "retnet".into());
    put("architectures", json!(["RetNetForCausalLM"]));
    put("vocab_size", config.vocab_size.into());
    put("hidden_size", config.hidden_size.into());
    put("num_hidden_layers", config.blocks.len().into());
    put("num_heads", mixer.heads.into());
    put("num_kv_heads", mixer.kv_heads.into());
    put("expand_k", factor(mixer.head_key));
    put("expand_v", factor(mixer.head_value));
    put("intermediate_size", mlp.layer.d_intermediate.into());
    put("hidden_act", "swish".into());
    put("feature_map", mixer.feature_map.map_or(Value::Null, |map| map.name().into()));
    put("use_short_conv", mixer.short_conv.is_some().into());
    put("conv_size", mixer.short_conv.map_or(4, |conv| conv.width).into());
    put("conv_bias", mixer.short_conv.is_some_and(|conv| conv.bias).into());
    put("use_output_gate", mixer.gate.is_some().into());
    put("elementwise_affine", mixer.norm.affine.into());
    put("norm_eps", eps.into());
    put("fuse_norm", fused_norm.into());
    put("tie_word_embeddings", config.tie_embeddings.into());
    put("initializer_range", config.initializer_range.into());
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
