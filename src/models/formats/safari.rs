//! The language models of safari, and those of HyenaDNA as its training code (a copy of safari) saves them: a state dict,
//! of PyTorch Lightning (`model.` before every name) or plain, beside a `config.json` that holds the arguments of their
//! `ConvLMHeadModel`, as they are or under `model_config`.
//!
//! The two differ where filters are `normalized`: safari does it before they decay, HyenaDNA after. `bidirectional` and
//! `linear_mixer` are HyenaDNA's alone.

use super::hyena_dna::{model, parts};
use super::names::Names;
use super::{Family, Keys, Object};
use crate::layers::HyenaConfig;
use crate::layers::hyena::{Direction, FilterOrder, HyenaFilter, ImplicitFilter};
use crate::models::{MixerConfig, ModelConfig};
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Where safari's own files of settings have the model's.
pub(super) const MODEL_CONFIG: &str = "model_config";

/// Keys that matter to training alone, or choose between equal ways of computing.
const HARMLESS: &[&str] = &[
    "checkpoint_mixer",
    "checkpoint_mlp",
    "device",
    "dropout",
    "dropout_cls",
    "dtype",
    "embed_dropout",
    "fused_bias_fc",
    "fused_dropout_add_ln",
    "fused_mlp",
    "initializer_cfg",
    "process_group",
    "resid_dropout",
    "rescale_prenorm_residual",
    "return_hidden_state",
    "sequence_parallel",
    "use_flashfftconv",
];
/// The same within `layer`, and keys that only say where learned or stored numbers began.
const HARMLESS_IN_LAYER: &[&str] = &[
    "channels",
    "dropout",
    "fast_decay_pct",
    "filter_dropout",
    "fused_bias_fc",
    "fused_fft_conv",
    "jit_filter",
    // what older configs call `short_filter_order`, without effect
    "local_order",
    "lr",
    "lr_pos_emb",
    "modulation_lr",
    "return_state",
    "slow_decay_pct",
    "target",
    "use_flashfftconv",
    "wd",
];

macro_rules! names {
    ($prefix:literal) => {
        Names {
            layers: concat!($prefix, "backbone.layers."),
            outer: &[
                ("backbone.embeddings.", concat!($prefix, "backbone.embeddings.word_embeddings.")),
                ("backbone.norm_f.", concat!($prefix, "backbone.ln_f.")),
                ("lm_head.", concat!($prefix, "lm_head.")),
            ],
            inner: &[("norm.", "norm1.")],
        }
    };
}

/// The names of a state dict, plain or Lightning's.
pub(super) fn names(family: Family) -> Names {
    if family == Family::Safari { names!("") } else { names!("model.") }
}

/// Our name for a tensor in the files. Layers that were trained with activation checkpointing have a `layer.` more.
pub(super) fn own_name(upstream: &str) -> String {
    let plain = upstream.strip_prefix("model.").unwrap_or(upstream);
    let plain = plain.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.");
    names(Family::Safari).own(&plain)
}

/// Whether a file of `config` holds the tensor without need: rates of a decay that is switched off, and counters of
/// training.
pub(super) fn ignores(config: &ModelConfig, upstream: &str) -> bool {
    let decays = |mixer: &MixerConfig| match mixer {
        MixerConfig::Hyena(HyenaConfig { filter: HyenaFilter::Implicit(filter), .. }) => filter.modulate,
        _ => true,
    };
    let unused = upstream.ends_with(".filter_fn.modulation.deltas")
        && !config.blocks.iter().all(|block| decays(&block.mixer));
    unused || upstream.contains("torchmetrics.")
}

/// What the names of the tensors say: without `model.`, safari wrote them.
pub(super) fn settle<'a>(mut config: ModelConfig, mut names: impl Iterator<Item = &'a str>) -> ModelConfig {
    if config.family == Family::HyenaDnaTraining && !names.any(|name| name.starts_with("model.")) {
        config.family = Family::Safari;
        for block in &mut config.blocks {
            if let MixerConfig::Hyena(HyenaConfig { filter: HyenaFilter::Implicit(filter), .. }) =
                &mut block.mixer
            {
                filter.normalized_first = true;
            }
        }
    }
    config
}

/// The arguments of `ConvLMHeadModel`.
pub(super) fn read(keys: &Keys, family: Family) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("d_model")?;
    keys.ignore(HARMLESS);
    keys.only("max_position_embeddings", &json!(0))?;
    if let Some(layers) = keys.value("attn_layer_idx").filter(|layers| **layers != json!([])) {
        return Err(keys.wrong("attn_layer_idx", "no attention among the Hyena layers", &layers.to_string()));
    }
    keys.ignore(&["attn_cfg"]);
    let layer = keys.object("layer")?;
    let mixer = read_layer(&layer, hidden_size, family)?;
    layer.refuse_unknown()?;
    let inner = keys.size("d_inner")?.unwrap_or(hidden_size.saturating_mul(4));
    let eps = keys.number("layer_norm_epsilon", 1e-5)?;
    let (layers, vocab_size) = (keys.layers("n_layer", 12)?, keys.required_size("vocab_size")?);
    Ok(ModelConfig {
        vocab_multiple: keys.size("pad_vocab_size_multiple")?.unwrap_or(1),
        residual_in_fp32: keys.flag("residual_in_fp32", true)?,
        ..model(family, mixer, inner, eps, layers, vocab_size)
    })
}

/// The arguments of `HyenaOperator` and `HyenaFilter`.
fn read_layer(layer: &Keys, hidden_size: usize, family: Family) -> Result<HyenaConfig> {
    layer.ignore(HARMLESS_IN_LAYER);
    layer.only("_name_", &json!("hyena"))?;
    layer.only("filter_cls", &json!("hyena-filter"))?;
    layer.only("bias", &json!(true))?;
    // the widths of upstream's projections fit together for no other
    layer.only("inner_factor", &json!(1))?;
    let size = |key: &str, default: usize| Ok::<_, Error>(layer.size(key)?.unwrap_or(default));
    let training = family == Family::HyenaDnaTraining;
    if !training {
        for key in ["bidirectional", "linear_mixer"] {
            layer.only(key, &json!(false))?;
        }
    }
    let filter = ImplicitFilter {
        emb_dim: size("emb_dim", 3)?,
        width: size("filter_order", 64)?,
        inner_layers: layer.count("num_inner_mlps", 2)?,
        linear: layer.flag("linear_mixer", false)?,
        w: layer.number("w", 1.0)?,
        modulate: layer.flag("modulate", true)?,
        shift: layer.number("shift", 0.0)?,
        normalized: layer.flag("normalized", false)?,
        normalized_first: !training,
        ..ImplicitFilter::default()
    };
    let name = layer.text("activation")?.unwrap_or_else(|| "id".into());
    let activation = match name.as_str() {
        "id" | "linear" => Some(Activation::Identity),
        other => Activation::from_name(other),
    };
    let expected = "id (or identity, linear), relu, gelu or silu (or swish)";
    Ok(HyenaConfig {
        order: size("order", 2)?,
        short_filter: size("short_filter_order", 3)?,
        filter: HyenaFilter::Implicit(filter),
        filter_order: FilterOrder::ChannelFirst,
        direction: if layer.flag("bidirectional", false)? { Direction::Centred } else { Direction::Causal },
        heads: size("num_heads", 1)?,
        outer_mixing: layer.flag("outer_mixing", false)?,
        post_order_ffn: layer.flag("post_order_ffn", false)?,
        num_blocks: size("num_blocks", 1)?,
        activation: activation.ok_or_else(|| layer.wrong("activation", expected, &name))?,
        ..HyenaConfig::new(hidden_size, layer.required_size("l_max")?)
    })
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let (mixer, mlp, eps, filter) = parts(config)?;
    let mut layer = json!({
        "_name_": "hyena", "order": mixer.order, "l_max": mixer.l_max, "emb_dim": filter.emb_dim,
        "filter_order": filter.width, "num_inner_mlps": filter.inner_layers, "w": filter.w,
        "modulate": filter.modulate, "shift": filter.shift, "normalized": filter.normalized,
        "short_filter_order": mixer.short_filter, "num_heads": mixer.heads,
        "outer_mixing": mixer.outer_mixing, "post_order_ffn": mixer.post_order_ffn,
        "num_blocks": mixer.num_blocks, "activation": mixer.activation.name(),
    });
    if config.family == Family::HyenaDnaTraining {
        layer["bidirectional"] = (mixer.direction == Direction::Centred).into();
        layer["linear_mixer"] = filter.linear.into();
    }
    let model = json!({
        "vocab_size": config.vocab_size, "d_model": config.hidden_size,
        "d_inner": mlp.layer.d_intermediate, "n_layer": config.blocks.len(), "layer_norm_epsilon": eps,
        "pad_vocab_size_multiple": config.vocab_multiple, "residual_in_fp32": config.residual_in_fp32,
        "layer": layer,
    });
    let keys = if config.family == Family::Safari { json!({ MODEL_CONFIG: model }) } else { model };
    match keys {
        Value::Object(keys) => Ok(keys),
        other => Err(Error::value("config", "an object", other)),
    }
}
