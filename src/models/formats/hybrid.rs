//! This crate's own layout, for models that no published family can tell of: every block in full.

use super::{Family, Keys, Object};
use crate::models::ModelConfig;
use crate::{Error, Result};
use serde_json::{Value, json};

/// What `model_type` says.
pub(super) const MODEL_TYPE: &str = "subquadratic";

/// Under `model`, the fields of [`ModelConfig`].
pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let value = keys.value("model").cloned().unwrap_or(Value::Null);
    let config: ModelConfig = serde_json::from_value(value).map_err(|e| {
        keys.wrong("model", "the fields of a model as this crate writes them", &e.to_string())
    })?;
    Ok(ModelConfig { family: Family::Hybrid, tokens: keys.tokens()?, ..config })
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let model = serde_json::to_value(config).map_err(|e| Error::value("config", "finite numbers", e))?;
    let mut keys = Object::new();
    keys.insert("model_type".into(), json!(MODEL_TYPE));
    keys.insert("model".into(), model);
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
