//! transformers' `falcon_mamba`: Mamba with weightless RMS norms on dt, B and C.

use super::mamba_hf::{read_shared, write_shared};
use super::{Family, Keys, Object};
use crate::Result;
use crate::models::ModelConfig;

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let eps = keys.number("mixer_rms_eps", 1e-6)?;
    read_shared(keys, Family::FalconMamba, Some(eps))
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    write_shared(config, "falcon_mamba", "FalconMambaForCausalLM")
}
