//! HyenaDNA: the layout of transformers (`LongSafari/hyenadna-*-hf`), and that of its training code, which is safari's
//! (`state_dict` of PyTorch Lightning beside a `config.json`).
//!
//! The two differ in the names, in the numbering of the filters, and in the shift of the filters' decay.

use super::names::Names;
use super::{Family, Keys, Object, common};
use crate::layers::hyena::{FilterOrder, HyenaFilter, ImplicitFilter};
use crate::layers::{HyenaConfig, MlpConfig, MlpGate, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig};
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that matter to training alone, or choose between equal ways of computing.
const HARMLESS: &[&str] = &[
    "checkpoint_mixer",
    "checkpoint_mlp",
    "dropout",
    "embed_dropout",
    "fused_bias_fc",
    "fused_dropout_add_ln",
    "fused_mlp",
    "hyena_filter_dropout",
    "resid_dropout",
    "return_hidden_state",
    "rescale_prenorm_residual",
    "train_freq",
];
/// The same within `layer`.
const HARMLESS_IN_LAYER: &[&str] =
    &["lr", "wd", "lr_pos_emb", "modulation_lr", "fused_fft_conv", "jit_filter", "dropout", "filter_dropout"];

macro_rules! names {
    ($prefix:literal, $head:literal) => {
        Names {
            layers: concat!($prefix, "layers."),
            outer: &[
                ("backbone.embeddings.", concat!($prefix, "embeddings.word_embeddings.")),
                ("backbone.norm_f.", concat!($prefix, "ln_f.")),
                ("lm_head.", $head),
            ],
            inner: &[("norm.", "norm1.")],
        }
    };
}

/// The names of transformers' layout, or of Lightning's.
pub(super) fn names(family: Family) -> Names {
    match family {
        Family::HyenaDnaTraining => names!("model.backbone.", "model.lm_head."),
        _ => names!("hyena.backbone.", "lm_head."),
    }
}

/// Our name for a tensor in the files. Layers that were trained with activation checkpointing have a `layer.` more.
pub(super) fn own_name(family: Family, upstream: &str) -> String {
    let plain = upstream.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.");
    names(family).own(&plain)
}

/// The parameter that a tensor is another name of: the sines of a filter share one frequency, which files of PyTorch
/// hold several times and safetensors once, under any of its names.
pub(super) fn shared(own: &str) -> Option<String> {
    let (before, rest) = own.split_once("filter_fn.implicit_filter.")?;
    let place: usize = rest.strip_suffix(".freq")?.parse().ok()?;
    (place > 1).then(|| format!("{before}filter_fn.implicit_filter.1.freq"))
}

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let size = |key: &str, default: usize| Ok::<_, Error>(keys.size(key)?.unwrap_or(default));
    let hidden_size = size("d_model", 256)?;
    keys.ignore(HARMLESS);
    keys.only("bidirectional", &json!(false))?;
    let order = size("hyena_order", 2)?;
    let bias = keys.flag("use_bias", true)?;
    let filter = ImplicitFilter {
        emb_dim: size("emb_dim", 3)?,
        width: size("filter_order", 64)?,
        inner_layers: size("num_inner_mlps", 2)?,
        w: keys.number("activation_freq", 1.0)?,
        shift: 0.05,
        ..ImplicitFilter::default()
    };
    let mixer = HyenaConfig {
        order,
        short_filter: size("short_filter_order", 3)?,
        in_bias: bias,
        out_bias: bias,
        filter: HyenaFilter::Implicit(filter),
        filter_order: FilterOrder::OrderFirst,
        ..HyenaConfig::new(hidden_size, size("max_seq_len", 1024)?)
    };
    let inner = size("d_inner", hidden_size.saturating_mul(4))?;
    let eps = keys.number("layer_norm_epsilon", 1e-5)?;
    let vocab_size = size("vocab_size", 12)?;
    Ok(ModelConfig {
        vocab_multiple: size("pad_vocab_size_multiple", 8)?,
        tie_embeddings: keys.flag("tie_word_embeddings", true)?,
        initializer_range: keys.number("initializer_range", 0.02)?,
        tokens: keys.tokens()?,
        ..model(Family::HyenaDna, mixer, inner, eps, keys.layers("n_layer", 12)?, vocab_size)
    })
}

/// The `config.json` of the training code: the arguments of its `ConvLMHeadModel`.
pub(super) fn read_training(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("d_model")?;
    keys.ignore(HARMLESS);
    keys.only("residual_in_fp32", &json!(true))?;
    let layer = keys.object("layer")?;
    layer.ignore(HARMLESS_IN_LAYER);
    layer.only("_name_", &json!("hyena"))?;
    for key in ["num_heads", "num_blocks", "inner_factor"] {
        layer.only(key, &json!(1))?;
    }
    for key in ["outer_mixing", "post_order_ffn", "bidirectional", "linear_mixer"] {
        layer.only(key, &json!(false))?;
    }
    layer.only("activation", &json!("id"))?;
    let size = |key: &str, default: usize| Ok::<_, Error>(layer.size(key)?.unwrap_or(default));
    // `local_order` is what older configs call it, without effect
    layer.ignore(&["local_order", "short_filter_order"]);
    let filter = ImplicitFilter {
        emb_dim: size("emb_dim", 3)?,
        width: size("filter_order", 64)?,
        inner_layers: size("num_inner_mlps", 2)?,
        w: layer.number("w", 1.0)?,
        modulate: layer.flag("modulate", true)?,
        shift: layer.number("shift", 0.0)?,
        normalized: layer.flag("normalized", false)?,
        ..ImplicitFilter::default()
    };
    let mixer = HyenaConfig {
        order: size("order", 2)?,
        short_filter: size("short_filter_order", 3)?,
        filter: HyenaFilter::Implicit(filter),
        filter_order: FilterOrder::ChannelFirst,
        ..HyenaConfig::new(hidden_size, layer.required_size("l_max")?)
    };
    layer.refuse_unknown()?;
    let inner = keys.size("d_inner")?.unwrap_or(hidden_size.saturating_mul(4));
    let eps = keys.number("layer_norm_epsilon", 1e-5)?;
    let (layers, vocab_size) = (keys.layers("n_layer", 12)?, keys.required_size("vocab_size")?);
    Ok(ModelConfig {
        vocab_multiple: keys.size("pad_vocab_size_multiple")?.unwrap_or(1),
        ..model(Family::HyenaDnaTraining, mixer, inner, eps, layers, vocab_size)
    })
}

fn model(
    family: Family,
    mixer: HyenaConfig,
    inner: usize,
    eps: f64,
    layers: usize,
    vocab_size: usize,
) -> ModelConfig {
    let norm = NormConfig::Layer { eps };
    let hidden_size = mixer.d_model;
    let layer = MlpConfig {
        d_model: hidden_size,
        d_intermediate: inner,
        activation: Activation::GeluTanh,
        gate: MlpGate::None,
        bias: true,
        inner_norm: None,
    };
    let mlp = Some(FeedForwardConfig { norm, layer });
    let block = BlockConfig::new(norm, MixerConfig::Hyena(mixer), mlp);
    ModelConfig {
        final_norm: Some(norm),
        ..ModelConfig::new(family, vocab_size, hidden_size, vec![block; layers])
    }
}

impl ModelConfig {
    /// A HyenaDNA of the published shape, in the layout of transformers, for sequences of up to `l_max` tokens.
    pub fn hyena(hidden_size: usize, layers: usize, vocab_size: usize, l_max: usize) -> Self {
        let inner = hidden_size.saturating_mul(4);
        model(Family::HyenaDna, HyenaConfig::new(hidden_size, l_max), inner, 1e-5, layers, vocab_size)
    }
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let block = common("block", config.blocks.iter())?;
    let (MixerConfig::Hyena(mixer), Some(mlp)) = (&block.mixer, &block.mlp) else {
        return Err(Error::value("blocks", "Hyena and an MLP, as the family has them", "others"));
    };
    let NormConfig::Layer { eps } = block.norm else {
        return Err(Error::value("norm", "a layer norm", "an RMS norm"));
    };
    let HyenaFilter::Implicit(filter) = mixer.filter else {
        return Err(Error::value("filter", "an implicit one", "an explicit one"));
    };
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("vocab_size", config.vocab_size.into());
    put("d_model", config.hidden_size.into());
    put("d_inner", mlp.layer.d_intermediate.into());
    put("n_layer", config.blocks.len().into());
    put("layer_norm_epsilon", eps.into());
    put("pad_vocab_size_multiple", config.vocab_multiple.into());
    if config.family == Family::HyenaDnaTraining {
        let layer = json!({
            "_name_": "hyena", "order": mixer.order, "l_max": mixer.l_max, "emb_dim": filter.emb_dim,
            "filter_order": filter.width, "num_inner_mlps": filter.inner_layers, "w": filter.w,
            "modulate": filter.modulate, "shift": filter.shift, "normalized": filter.normalized,
            "short_filter_order": mixer.short_filter,
        });
        put("layer", layer);
        return Ok(keys);
    }
    put("model_type", "hyenadna".into());
    put("architectures", json!(["HyenaDNAForCausalLM"]));
    put("hyena_order", mixer.order.into());
    put("max_seq_len", mixer.l_max.into());
    put("emb_dim", filter.emb_dim.into());
    put("filter_order", filter.width.into());
    put("num_inner_mlps", filter.inner_layers.into());
    put("activation_freq", filter.w.into());
    put("short_filter_order", mixer.short_filter.into());
    put("use_bias", mixer.in_bias.into());
    put("tie_word_embeddings", config.tie_embeddings.into());
    put("initializer_range", config.initializer_range.into());
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
