//! Published checkpoint families: one small file each, `config.json` to [`ModelConfig`] and back, tensor names to ours
//! and back.
//!
//! | family | `config.json` says | layout |
//! |---|---|---|
//! | [`Family::Mamba`] | `"model_type": "mamba"` | transformers (`state-spaces/mamba-*-hf`) |
//! | [`Family::FalconMamba`] | `"model_type": "falcon_mamba"` | transformers (`tiiuae/falcon-mamba-*`) |
//! | [`Family::MambaOriginal`] | `d_model` and `n_layer`, no `model_type` | mamba-ssm (`state-spaces/mamba-*`) |
//! | [`Family::StripedHyena`] | `"model_type": "stripedhyena"`, or `hyena_layer_idxs` | stripedhyena (StripedHyena, Evo) |
//! | [`Family::Evo2`] | `hcl_layer_idxs` | vtx (Evo 2) |
//! | [`Family::Jamba`] | `"model_type": "jamba"` | transformers (`ai21labs/Jamba-*`), without experts |
//! | [`Family::Hybrid`] | `"model_type": "subquadratic"` | this crate's own, for any blocks |
//! | [`Family::RetNet`] | `"model_type": "retnet"` | fla (`fla-hub/retnet-*`) |
//! | [`Family::RetNetTorchscale`] | `decoder_embed_dim`, no `model_type` | torchscale's `RetNetDecoder` |
//! | [`Family::RetNetPort`] | `decoder_embed_dim` and `"model_type": "retnet"` | torchscale's, ported to transformers by syncdoth |
//! | [`Family::HyenaDna`] | `"model_type": "hyenadna"` | transformers (`LongSafari/hyenadna-*-hf`) |
//! | [`Family::HyenaDnaTraining`] | `d_model` and `layer`, no `model_type` | hyena-dna's training code (`LongSafari/hyenadna-*`) |
//! | [`Family::Safari`] | the same (and tensors without `model.`), or `model_config` | safari's Hyena language models |
//!
//! # Keys
//! Every key of a config is one of these, in this order:
//!
//! 1. it changes the function: honoured, or refused by name where its value asks for something not supported;
//! 2. it only matters to a fresh initialisation, or names a special token: kept, and saved again;
//! 3. it is known to change no logit (who made the file, how it is cached, which fused kernel runs): ignored, by a list;
//! 4. it is unknown, but `null`, `false` or empty, as an absent feature is written: ignored;
//! 5. anything else is refused by name, for it might change the function.

mod evo2;
mod falcon_mamba;
mod hybrid;
mod hyena_dna;
mod jamba;
mod keys;
mod mamba_hf;
mod mamba_original;
mod names;
mod retnet_fla;
mod retnet_torchscale;
mod safari;
mod striped_hyena;

use super::{MixerConfig, ModelConfig, SpecialTokens};
use crate::{Error, Result};
use candle_core::DType;
use keys::Keys;
use serde_json::{Map, Value, json};
use std::path::Path;

/// A checkpoint family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Family {
    /// transformers' `mamba`.
    Mamba,
    /// The original layout of the package mamba-ssm.
    MambaOriginal,
    /// transformers' `falcon_mamba`.
    FalconMamba,
    /// The package stripedhyena and its directories for transformers: StripedHyena, Evo.
    StripedHyena,
    /// The package vtx: Evo 2.
    Evo2,
    /// transformers' `jamba`, without experts.
    Jamba,
    /// This crate's own layout, for any blocks.
    #[default]
    Hybrid,
    /// fla's `retnet`.
    RetNet {
        /// Whether the norm of the heads is named for being fused with the gate.
        fused_norm: bool,
    },
    /// torchscale's `RetNetDecoder`.
    RetNetTorchscale,
    /// The port of torchscale's RetNet to transformers, `syncdoth/RetNet`.
    RetNetPort {
        /// Whether the MLPs are gated.
        glu: bool,
    },
    /// HyenaDNA in transformers.
    HyenaDna,
    /// HyenaDNA as its training code saves it.
    HyenaDnaTraining,
    /// safari's language models of Hyena layers.
    Safari,
}

impl Family {
    /// A name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mamba => "mamba",
            Self::MambaOriginal => "mamba (original)",
            Self::FalconMamba => "falcon_mamba",
            Self::StripedHyena => "stripedhyena",
            Self::Evo2 => "evo2",
            Self::Jamba => "jamba",
            Self::Hybrid => "hybrid",
            Self::RetNet { .. } => "retnet",
            Self::RetNetTorchscale => "retnet (torchscale)",
            Self::RetNetPort { .. } => "retnet (torchscale, transformers)",
            Self::HyenaDna => "hyenadna",
            Self::HyenaDnaTraining => "hyenadna (training)",
            Self::Safari => "hyena (safari)",
        }
    }

    /// The name that this family's files have for a parameter of ours.
    pub(crate) fn upstream_name(self, own: &str) -> String {
        match self {
            Self::Mamba | Self::FalconMamba | Self::Hybrid => own.to_string(),
            Self::MambaOriginal => mamba_original::upstream_name(own),
            Self::StripedHyena => striped_hyena::upstream_name(own, "backbone."),
            Self::Evo2 => striped_hyena::upstream_name(own, ""),
            Self::Jamba => jamba::upstream_name(own),
            Self::RetNet { fused_norm } => retnet_fla::names(fused_norm).upstream(own),
            Self::RetNetTorchscale | Self::RetNetPort { .. } => retnet_torchscale::names(self).upstream(own),
            Self::HyenaDna => hyena_dna::NAMES.upstream(own),
            Self::HyenaDnaTraining | Self::Safari => safari::names(self).upstream(own),
        }
    }

    /// Our name for a tensor in this family's files.
    pub(crate) fn own_name(self, upstream: &str) -> String {
        match self {
            // files converted early call the embedding as the original does; transformers reads them too
            Self::Mamba | Self::MambaOriginal => mamba_original::own_name(upstream),
            Self::FalconMamba | Self::Hybrid => upstream.to_string(),
            Self::StripedHyena | Self::Evo2 => striped_hyena::own_name(upstream),
            Self::Jamba => jamba::own_name(upstream),
            Self::RetNet { fused_norm } => retnet_fla::names(fused_norm).own(upstream),
            Self::RetNetTorchscale | Self::RetNetPort { .. } => retnet_torchscale::names(self).own(upstream),
            Self::HyenaDna => hyena_dna::NAMES.own(upstream),
            Self::HyenaDnaTraining | Self::Safari => safari::own_name(upstream),
        }
    }

    /// The parameter that a tensor of ours by name is another name of.
    pub(crate) fn shared(self, own: &str) -> Option<String> {
        match self {
            Self::HyenaDna | Self::HyenaDnaTraining | Self::Safari => hyena_dna::shared(own),
            _ => None,
        }
    }

    /// Whether files of a model of this family hold the tensor without need.
    pub(crate) fn ignores(self, config: &ModelConfig, upstream: &str) -> bool {
        match self {
            Self::StripedHyena | Self::Evo2 => striped_hyena::ignores(upstream),
            Self::HyenaDnaTraining | Self::Safari => safari::ignores(config, upstream),
            _ => false,
        }
    }

    /// Tensors that this family's files hold though they follow from the config: upstream name and values.
    pub(crate) fn buffers(self, config: &ModelConfig) -> Vec<(String, Vec<f64>)> {
        match self {
            Self::RetNetTorchscale | Self::RetNetPort { .. } => retnet_torchscale::buffers(config),
            _ => vec![],
        }
    }

    /// Whether the config names the dtype of the weights.
    fn names_dtype(self) -> bool {
        !matches!(self, Self::MambaOriginal | Self::RetNetTorchscale | Self::HyenaDnaTraining | Self::Safari)
    }
}

/// What `model_type` may say.
const MODEL_TYPES: &str = "mamba, falcon_mamba, retnet, hyenadna, stripedhyena, evo2, jamba or subquadratic";

/// The model that a `config.json` describes, and what was tolerated in it.
pub(crate) fn read(path: &Path, value: Value) -> Result<(ModelConfig, Vec<String>)> {
    let keys = Keys::new(path, value)?;
    let config = match keys.text("model_type")?.as_deref() {
        Some("mamba") => mamba_hf::read(&keys)?,
        Some("falcon_mamba") => falcon_mamba::read(&keys)?,
        Some("stripedhyena") => striped_hyena::read(&keys)?,
        Some("evo2") => evo2::read(&keys)?,
        Some("jamba") => jamba::read(&keys)?,
        Some(hybrid::MODEL_TYPE) => hybrid::read(&keys)?,
        Some("retnet") if keys.has("decoder_embed_dim") => retnet_torchscale::read(&keys, true)?,
        Some("retnet") => retnet_fla::read(&keys)?,
        Some("hyenadna") => hyena_dna::read(&keys)?,
        Some(other) => return Err(keys.wrong("model_type", MODEL_TYPES, other)),
        None if keys.has(safari::MODEL_CONFIG) => {
            keys.ignore(&["model_name", "tokenizer_name"]);
            let inner = keys.object(safari::MODEL_CONFIG)?;
            let config = safari::read(&inner, Family::Safari)?;
            inner.refuse_unknown()?;
            config
        }
        None if keys.has("d_model") && keys.has("layer") => safari::read(&keys, Family::HyenaDnaTraining)?,
        None if keys.has("decoder_embed_dim") => retnet_torchscale::read(&keys, false)?,
        None if keys.has("d_model") && keys.has("n_layer") => mamba_original::read(&keys)?,
        None if keys.has("hcl_layer_idxs") => evo2::read(&keys)?,
        None if keys.has("hyena_layer_idxs") || keys.has("attn_layer_idxs") => striped_hyena::read(&keys)?,
        None => {
            let expected = format!(
                "{MODEL_TYPES} (or the keys d_model and n_layer of mamba-ssm, decoder_embed_dim of torchscale, \
                 hyena_layer_idxs of stripedhyena, hcl_layer_idxs of vtx, d_model and layer of hyena-dna, or model_config of safari)"
            );
            return Err(keys.wrong("model_type", &expected, "nothing"));
        }
    };
    keys.refuse_unknown()?;
    config.validate().map_err(|e| Error::File { path: path.into(), reason: e.to_string() })?;
    Ok((config, keys.notes()))
}

/// What the names of a checkpoint's tensors decide where its config and its family's code disagree, or the config does
/// not tell: fla's model never passes `use_short_conv` on to its layers, so that checkpoints which ask for short
/// convolutions have none; safari's and HyenaDNA's training code share their keys.
pub(crate) fn settle<'a>(config: ModelConfig, mut names: impl Iterator<Item = &'a str>) -> ModelConfig {
    if config.family == Family::HyenaDnaTraining {
        return safari::settle(config, names);
    }
    let mut config = config;
    if matches!(config.family, Family::RetNet { .. }) && !names.any(|name| name.contains("conv1d.")) {
        for block in &mut config.blocks {
            if let MixerConfig::Retention(mixer) = &mut block.mixer {
                mixer.short_conv = None;
            }
        }
    }
    config
}

/// The `config.json` of a model whose weights are `dtype`.
pub(crate) fn write(path: &Path, config: &ModelConfig, dtype: DType) -> Result<Value> {
    let mut keys = match config.family {
        Family::Mamba => mamba_hf::write(config),
        Family::MambaOriginal => mamba_original::write(config),
        Family::FalconMamba => falcon_mamba::write(config),
        Family::StripedHyena => striped_hyena::write(config),
        Family::Evo2 => evo2::write(config),
        Family::Jamba => jamba::write(config),
        Family::Hybrid => hybrid::write(config),
        Family::RetNet { fused_norm } => retnet_fla::write(config, fused_norm),
        Family::RetNetTorchscale | Family::RetNetPort { .. } => retnet_torchscale::write(config),
        Family::HyenaDna => hyena_dna::write(config),
        Family::HyenaDnaTraining | Family::Safari => safari::write(config),
    }?;
    if config.family.names_dtype() {
        let name = match dtype {
            DType::F64 => "float64",
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        keys.insert("torch_dtype".into(), name.into());
    }
    let value = Value::Object(keys);
    // what cannot be told in the family's keys would come back as another model
    let (mut back, _) = read(path, value.clone())?;
    back.tokens = config.tokens.clone();
    back.rescale_residual = config.rescale_residual;
    if back != *config {
        let reason = format!("the config of the family {} cannot tell of this model", config.family.name());
        return Err(Error::File { path: path.into(), reason });
    }
    Ok(value)
}

type Object = Map<String, Value>;

/// The keys of token ids with a meaning of their own.
fn token_keys(tokens: &SpecialTokens) -> Object {
    let eos = match tokens.eos.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let keys =
        [("bos_token_id", json!(tokens.bos)), ("eos_token_id", eos), ("pad_token_id", json!(tokens.pad))];
    keys.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

/// The one value that all blocks share, as the families here have it.
fn common<T: PartialEq>(name: &str, mut values: impl Iterator<Item = T>) -> Result<T> {
    let first = values.next().ok_or_else(|| Error::value(name, "at least one block", "none"))?;
    if values.all(|value| value == first) {
        return Ok(first);
    }
    Err(Error::value(name, "the same in every block", "different values"))
}
