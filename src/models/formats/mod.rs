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
mod jamba;
mod keys;
mod mamba_hf;
mod mamba_original;
mod striped_hyena;

use super::{ModelConfig, SpecialTokens};
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
        }
    }

    /// Whether files of this family hold the tensor without need.
    pub(crate) fn ignores(self, upstream: &str) -> bool {
        matches!(self, Self::StripedHyena | Self::Evo2) && striped_hyena::ignores(upstream)
    }
}

/// The model that a `config.json` describes.
pub(crate) fn read(path: &Path, value: Value) -> Result<ModelConfig> {
    let keys = Keys::new(path, value)?;
    let config = match keys.text("model_type")?.as_deref() {
        Some("mamba") => mamba_hf::read(&keys)?,
        Some("falcon_mamba") => falcon_mamba::read(&keys)?,
        Some("stripedhyena") => striped_hyena::read(&keys)?,
        Some("evo2") => evo2::read(&keys)?,
        Some("jamba") => jamba::read(&keys)?,
        Some(hybrid::MODEL_TYPE) => hybrid::read(&keys)?,
        Some(other) => {
            return Err(keys.wrong(
                "model_type",
                "mamba, falcon_mamba, stripedhyena, evo2, jamba or subquadratic",
                other,
            ));
        }
        None if keys.has("d_model") && keys.has("n_layer") => mamba_original::read(&keys)?,
        None if keys.has("hcl_layer_idxs") => evo2::read(&keys)?,
        None if keys.has("hyena_layer_idxs") || keys.has("attn_layer_idxs") => striped_hyena::read(&keys)?,
        None => {
            let expected = "mamba, falcon_mamba, stripedhyena, evo2, jamba or subquadratic (or the keys by which a layout without it is known)";
            return Err(keys.wrong("model_type", expected, "nothing"));
        }
    };
    keys.refuse_unknown()?;
    config.validate().map_err(|e| Error::File { path: path.into(), reason: e.to_string() })?;
    Ok(config)
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
    }?;
    if config.family != Family::MambaOriginal {
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
    let mut back = read(path, value.clone())?;
    back.tokens = config.tokens.clone();
    back.rescale_residual = config.rescale_residual;
    if back != *config {
        let reason = format!("the config of the family {} cannot tell of this model", config.family.name());
        return Err(Error::File { path: path.into(), reason });
    }
    Ok(value)
}

type Object = Map<String, Value>;

/// `bos_token_id`, `eos_token_id` (one or several) and `pad_token_id`.
fn put_tokens(keys: &mut Object, tokens: &SpecialTokens) {
    let eos = match tokens.eos.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    keys.insert("bos_token_id".into(), json!(tokens.bos));
    keys.insert("eos_token_id".into(), eos);
    keys.insert("pad_token_id".into(), json!(tokens.pad));
}

/// The one value that all blocks share, as the families here have it.
fn common<T: PartialEq>(name: &str, mut values: impl Iterator<Item = T>) -> Result<T> {
    let first = values.next().ok_or_else(|| Error::value(name, "at least one block", "none"))?;
    if values.all(|value| value == first) {
        return Ok(first);
    }
    Err(Error::value(name, "the same in every block", "different values"))
}
