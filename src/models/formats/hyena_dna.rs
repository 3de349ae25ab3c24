//! HyenaDNA in the layout of transformers (`LongSafari/hyenadna-*-hf`); that of its training code is [`super::safari`].
//! The two differ in the names, in the numbering of the filters, and in the shift of the filters' decay.
//!
//! What the port's code does with its config: `use_bias` is read and never used, every projection has a bias; only the
//! last norm goes by `layer_norm_epsilon`; the short filter is padded by 2 whatever its taps, so that 3 alone are
//! causal.

use super::names::Names;
use super::{Family, Keys, Object, common};
use crate::layers::hyena::{FilterOrder, HyenaFilter, ImplicitFilter};
use crate::layers::{HyenaConfig, MlpConfig, MlpGate, NormConfig};
use crate::models::{BlockConfig, FeedForwardConfig, MixerConfig, ModelConfig};
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Keys that matter to training alone, to nothing, or choose between equal ways of computing.
const HARMLESS: &[&str] = &[
    "dropout",
    "embed_dropout",
    "hyena_dropout",
    "hyena_filter_dropout",
    "resid_dropout",
    "return_hidden_state",
    "rescale_prenorm_residual",
    "train_freq",
    "use_bias",
];
/// The epsilon of the norms in the blocks.
const BLOCK_EPS: f64 = 1e-5;
/// What `architectures` says of a model with logits, and of one with labels.
const CAUSAL: &str = "HyenaDNAForCausalLM";
const CLASSIFIER: &str = "HyenaDNAForSequenceClassification";

pub(super) const NAMES: Names = Names {
    layers: "hyena.backbone.layers.",
    outer: &[
        ("backbone.embeddings.", "hyena.backbone.embeddings.word_embeddings."),
        ("backbone.norm_f.", "hyena.backbone.ln_f."),
    ],
    inner: &[("norm.", "norm1.")],
};

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
    keys.only("short_filter_order", &json!(3))?;
    let filter = ImplicitFilter {
        emb_dim: size("emb_dim", 3)?,
        width: size("filter_order", 64)?,
        inner_layers: size("num_inner_mlps", 2)?,
        w: keys.number("activation_freq", 1.0)?,
        shift: 0.05,
        ..ImplicitFilter::default()
    };
    let mixer = HyenaConfig {
        order: size("hyena_order", 2)?,
        filter: HyenaFilter::Implicit(filter),
        filter_order: FilterOrder::OrderFirst,
        ..HyenaConfig::new(hidden_size, size("max_seq_len", 1024)?)
    };
    let inner = size("d_inner", hidden_size.saturating_mul(4))?;
    let final_norm = NormConfig::Layer { eps: keys.number("layer_norm_epsilon", 1e-5)? };
    let architectures = keys.texts("architectures");
    let classifies = architectures.iter().any(|name| name == CLASSIFIER);
    let vocab_size = size("vocab_size", 12)?;
    Ok(ModelConfig {
        vocab_multiple: size("pad_vocab_size_multiple", 8)?,
        tie_embeddings: keys.flag("tie_word_embeddings", true)?,
        initializer_range: keys.number("initializer_range", 0.02)?,
        tokens: keys.tokens()?,
        final_norm: Some(final_norm),
        labels: if classifies { keys.labels()? } else { 0 },
        lm_head: !classifies || architectures.iter().any(|name| name == CAUSAL),
        ..model(Family::HyenaDna, mixer, inner, BLOCK_EPS, keys.layers("n_layer", 12)?, vocab_size)
    })
}

/// A model of Hyena blocks, all alike.
pub(super) fn model(
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

/// The layer and the MLP that all blocks share, the epsilon of their norms, and the filter.
pub(super) fn parts(config: &ModelConfig) -> Result<(&HyenaConfig, &FeedForwardConfig, f64, ImplicitFilter)> {
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
    Ok((mixer, mlp, eps, filter))
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let (mixer, mlp, _, filter) = parts(config)?;
    let Some(NormConfig::Layer { eps }) = config.final_norm else {
        return Err(Error::value("final_norm", "a layer norm", "another or none"));
    };
    let heads = [(config.lm_head, CAUSAL), (config.labels > 0, CLASSIFIER)];
    let mut keys = Object::new();
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    put("model_type", "hyenadna".into());
    put("architectures", heads.iter().filter(|(there, _)| *there).map(|&(_, name)| name).collect());
    if config.labels > 0 {
        put("num_labels", config.labels.into());
    }
    put("vocab_size", config.vocab_size.into());
    put("d_model", config.hidden_size.into());
    put("d_inner", mlp.layer.d_intermediate.into());
    put("n_layer", config.blocks.len().into());
    put("layer_norm_epsilon", eps.into());
    put("pad_vocab_size_multiple", config.vocab_multiple.into());
    put("hyena_order", mixer.order.into());
    put("max_seq_len", mixer.l_max.into());
    put("emb_dim", filter.emb_dim.into());
    put("filter_order", filter.width.into());
    put("num_inner_mlps", filter.inner_layers.into());
    put("activation_freq", filter.w.into());
    put("short_filter_order", mixer.short_filter.into());
    put("use_bias", true.into());
    put("tie_word_embeddings", config.tie_embeddings.into());
    put("initializer_range", config.initializer_range.into());
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
