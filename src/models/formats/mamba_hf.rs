//! transformers' `mamba`, and what `falcon_mamba` shares with it.

use super::{Family, Keys, Object, common};
use crate::layers::mamba::{TimeStepInit, TimeStepScheme};
use crate::layers::{MambaConfig, NormConfig};
use crate::models::{BlockConfig, MixerConfig, ModelConfig};
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that choose between equal ways of computing, or that early conversions kept from the original config.
const HARMLESS: &[&str] = &[
    "fused_add_norm",
    "pad_vocab_size_multiple",
    "use_associative_scan",
    "use_falcon_mambapy",
    "use_mambapy",
];

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let config = read_shared(keys, Family::Mamba, None)?;
    // what an early conversion kept of the original config must not contradict the rest
    keys.only("d_model", &json!(config.hidden_size))?;
    keys.only("n_layer", &json!(config.blocks.len()))?;
    let mixer = mamba_mixer(&config.blocks[0].mixer)?;
    keys.only("d_inner", &json!(mixer.d_inner))?;
    keys.only("rms_norm", &json!(true))?;
    keys.ignore(&["ssm_cfg"]);
    Ok(config)
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    write_shared(config, "mamba", "MambaForCausalLM")
}

/// The keys that `mamba` and `falcon_mamba` have in common.
pub(super) fn read_shared(keys: &Keys, family: Family, inner_norm_eps: Option<f64>) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("hidden_size")?;
    let layers = keys.required_size("num_hidden_layers")?;
    keys.layers("num_hidden_layers", layers)?;
    let act = keys.text("hidden_act")?.unwrap_or_else(|| "silu".into());
    if !matches!(act.as_str(), "silu" | "swish") {
        return Err(keys.wrong("hidden_act", "silu (or its other name, swish)", &act));
    }
    // intermediate_size, where given, is what counts; falcon-mamba-7b says expand 16 and means 2
    let expand = keys.number("expand", 2.0)?;
    let d_inner = match keys.size("intermediate_size")? {
        Some(size) => size,
        None => {
            let product = expand * hidden_size as f64;
            if !(1.0..=f64::from(u32::MAX)).contains(&product) {
                return Err(keys.wrong("expand", "a positive factor", &expand.to_string()));
            }
            product as usize
        }
    };
    let scheme = match keys.text("time_step_init_scheme")?.as_deref() {
        None | Some("random") => TimeStepScheme::Random,
        Some("constant") => TimeStepScheme::Constant,
        Some(other) => return Err(keys.wrong("time_step_init_scheme", "random or constant", other)),
    };
    let mixer = MambaConfig {
        d_model: hidden_size,
        d_inner,
        d_state: keys.size("state_size")?.unwrap_or(16),
        d_conv: keys.size("conv_kernel")?.unwrap_or(4),
        dt_rank: time_step_rank(keys, "time_step_rank", hidden_size)?,
        bias: keys.flag("use_bias", false)?,
        conv_bias: keys.flag("use_conv_bias", true)?,
        inner_norm_eps,
        inner_norm_weight: false,
        time_step: TimeStepInit {
            min: keys.number("time_step_min", 1e-3)?,
            max: keys.number("time_step_max", 0.1)?,
            floor: keys.number("time_step_floor", 1e-4)?,
            scale: keys.number("time_step_scale", 1.0)?,
            scheme,
        },
    };
    keys.ignore(HARMLESS);
    if let Some(types) = keys.value("layer_types") {
        let mamba = |name: &Value| matches!(name.as_str(), Some("linear_attention" | "mamba"));
        if types.as_array().is_none_or(|all| all.len() != layers || !all.iter().all(mamba)) {
            let expected = format!("`linear_attention` (transformers' name for it) {layers} times");
            return Err(keys.wrong("layer_types", &expected, &types.to_string()));
        }
    }
    let norm = NormConfig::Rms { eps: keys.number("layer_norm_epsilon", 1e-5)? };
    let block = BlockConfig::new(norm, MixerConfig::Mamba(mixer), None);
    let vocab_size = keys.size("vocab_size")?.unwrap_or(50280);
    Ok(ModelConfig {
        final_norm: Some(norm),
        tie_embeddings: keys.flag("tie_word_embeddings", true)?,
        residual_in_fp32: keys.flag("residual_in_fp32", true)?,
        initializer_range: keys.number("initializer_range", 0.1)?,
        rescale_residual: keys.flag("rescale_prenorm_residual", false)?,
        tokens: keys.tokens()?,
        ..ModelConfig::new(family, vocab_size, hidden_size, vec![block; layers])
    })
}

/// The config of a Mamba, which is all that these families can tell of.
pub(super) fn mamba_mixer(mixer: &MixerConfig) -> Result<&MambaConfig> {
    match mixer {
        MixerConfig::Mamba(config) => Ok(config),
        _ => Err(Error::value("mixer", "a Mamba, as the family has it", "another")),
    }
}

/// A whole number, or "auto" for a sixteenth of the width.
pub(super) fn time_step_rank(keys: &Keys, key: &str, width: usize) -> Result<usize> {
    match keys.value(key) {
        None => Ok(width.div_ceil(16)),
        Some(Value::String(text)) if text == "auto" => Ok(width.div_ceil(16)),
        Some(_) => keys.required_size(key),
    }
}

pub(super) fn write_shared(config: &ModelConfig, model_type: &str, architecture: &str) -> Result<Object> {
    let mixer = mamba_mixer(common("mixer", config.blocks.iter().map(|block| &block.mixer))?)?;
    let NormConfig::Rms { eps } = common("norm", config.blocks.iter().map(|block| block.norm))? else {
        return Err(Error::value("norm", "an RMS norm, as transformers has it", "a layer norm"));
    };
    let t = &mixer.time_step;
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("model_type", model_type.into());
    put("architectures", json!([architecture]));
    put("vocab_size", config.vocab_size.into());
    put("hidden_size", config.hidden_size.into());
    put("num_hidden_layers", config.blocks.len().into());
    put("state_size", mixer.d_state.into());
    put("conv_kernel", mixer.d_conv.into());
    put("intermediate_size", mixer.d_inner.into());
    // a whole number for transformers; where the width is no multiple, intermediate_size alone counts
    put("expand", (mixer.d_inner / config.hidden_size).max(1).into());
    put("time_step_rank", mixer.dt_rank.into());
    put("time_step_min", t.min.into());
    put("time_step_max", t.max.into());
    put("time_step_floor", t.floor.into());
    put("time_step_scale", t.scale.into());
    let scheme = if t.scheme == TimeStepScheme::Random { "random" } else { "constant" };
    put("time_step_init_scheme", scheme.into());
    put("use_bias", mixer.bias.into());
    put("use_conv_bias", mixer.conv_bias.into());
    put("hidden_act", "silu".into());
    put("layer_norm_epsilon", eps.into());
    put("residual_in_fp32", config.residual_in_fp32.into());
    put("tie_word_embeddings", config.tie_embeddings.into());
    put("initializer_range", config.initializer_range.into());
    // a fresh model's business: transformers would scale the weights it loads once more
    put("rescale_prenorm_residual", false.into());
    if let Some(eps) = mixer.inner_norm_eps {
        put("mixer_rms_eps", eps.into());
    }
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
