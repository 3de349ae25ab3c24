//! From a model to a directory.

use super::formats;
use super::language_model::LanguageModel;
use super::weights::{write, write_file};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::fs;
use std::io::Write;
use std::path::Path;

impl LanguageModel {
    /// Writes `config.json` with the family's own keys and `model.safetensors`: what [`load`](super::load) reads.
    ///
    /// The directory is made if it is not there. Each file is written under a temporary name, synced and renamed, so
    /// that an interrupted save leaves the file that was there.
    ///
    /// # Errors
    /// A model that the family's config cannot tell of, or a path that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        let path = dir.join("config.json");
        let config = formats::write(&path, &self.config, self.dtype)?;
        let text = serde_json::to_string_pretty(&config)
            .map_err(|e| Error::File { path: path.clone(), reason: e.to_string() })?;
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let mut tensors = self.parameters().clone();
        for (name, values) in self.config.family.buffers(&self.config) {
            let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
            tensors.insert(name, Tensor::from_slice(&values, values.len(), &Device::Cpu)?);
        }
        write(&dir.join("model.safetensors"), &tensors, &[("format", "pt")])?;
        write_file(&path, |file| {
            file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n")).map_err(Error::io(&path))
        })
    }
}
