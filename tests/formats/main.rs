//! Checkpoints on disk: what is read as what, what comes back from a save, and that anything else is a clear error.

#[path = "../common/mod.rs"]
mod common;
mod config;
mod damage;
mod hyena;
mod pickles;
mod round_trip;
mod state;
mod striped;
mod weights;

use candle_core::{DType, Device, Tensor};
use common::Random;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use subquadratic::layers::MlpConfig;
use subquadratic::models::{
    Family, FeedForwardConfig, LanguageModel, MixerConfig, ModelConfig, NormConfig, load, write_safetensors,
};
use tempfile::TempDir;

const FAMILIES: [Family; 3] = [Family::Mamba, Family::MambaOriginal, Family::FalconMamba];

/// A small model of a family with every option that changes the tensors away from its default.
fn config(family: Family) -> ModelConfig {
    let mut config = ModelConfig::mamba(12, 2, 21);
    config.family = family;
    // what only a fresh model needs is no part of a saved one, except where the family says so itself
    config.rescale_residual = family == Family::MambaOriginal;
    for block in &mut config.blocks {
        let MixerConfig::Mamba(mixer) = &mut block.mixer else { panic!("a Mamba") };
        (mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.dt_rank) = (36, 5, 3, 2);
        mixer.bias = true;
        if family == Family::FalconMamba {
            mixer.inner_norm_eps = Some(1e-6);
        }
    }
    if family == Family::MambaOriginal {
        config.vocab_multiple = 8;
        for block in &mut config.blocks {
            block.mlp = Some(FeedForwardConfig {
                norm: NormConfig::Rms { eps: 1e-5 },
                layer: MlpConfig::joint(12, 128),
            });
        }
    }
    config
}

/// Weights of the size that training leaves: at initialisation some options make no difference yet.
fn model(config: &ModelConfig, dtype: DType) -> LanguageModel {
    let model = LanguageModel::init(config, 1, dtype, &Device::Cpu).unwrap();
    let mut random = Random::new(2);
    for variable in model.variables().values() {
        let change = (random.normal(variable.shape()) * 0.3).unwrap().to_dtype(variable.dtype()).unwrap();
        variable.set(&(variable.as_tensor() + change).unwrap()).unwrap();
    }
    model.frozen().unwrap()
}

/// A saved model that may be tampered with.
struct Saved {
    dir: TempDir,
    model: LanguageModel,
}

impl Saved {
    fn new(config: &ModelConfig) -> Self {
        let (dir, model) = (tempfile::tempdir().unwrap(), model(config, DType::F32));
        model.save(dir.path()).unwrap();
        Self { dir, model }
    }

    fn of(family: Family) -> Self {
        Self::new(&config(family))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn load(&self) -> subquadratic::Result<LanguageModel> {
        load(self.dir.path(), DType::F32, &Device::Cpu)
    }

    /// The error of loading it, which must name all of `words`.
    #[track_caller]
    fn fails(&self, words: &[&str]) {
        let error = self.load().expect_err("expected an error").to_string();
        assert!(words.iter().all(|word| error.contains(word)), "expected {words:?} in: {error}");
        assert!(error.len() < 4000, "{} bytes of message", error.len());
    }

    fn keys(&self) -> Map<String, Value> {
        match serde_json::from_slice(&fs::read(self.path("config.json")).unwrap()).unwrap() {
            Value::Object(keys) => keys,
            other => panic!("{other}"),
        }
    }

    fn write_keys(&self, keys: Map<String, Value>) {
        fs::write(self.path("config.json"), Value::Object(keys).to_string()).unwrap();
    }

    /// Sets one key; a dot leads into an object, as in `ssm_cfg.d_state`. `None` removes it.
    fn with_key(&self, key: &str, value: Option<Value>) -> Changed<'_> {
        let before = self.keys();
        let mut keys = before.clone();
        let (object, last) = match key.split_once('.') {
            None => (&mut keys, key),
            Some((outer, inner)) => match keys.get_mut(outer) {
                Some(Value::Object(object)) => (object, inner),
                other => panic!("{key}: {other:?}"),
            },
        };
        match value {
            Some(value) => drop(object.insert(last.into(), value)),
            None => drop(object.remove(last)),
        }
        self.write_keys(keys);
        Changed { saved: self, before }
    }

    /// Writes the weights anew.
    fn with_tensors(&self, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
        let mut tensors = self.model.parameters().clone();
        change(&mut tensors);
        write_safetensors(&self.path("model.safetensors"), &tensors, &[]).unwrap();
    }

    /// Spreads the weights over `shards` files with an index.
    fn shard(&self, shards: usize) {
        let mut parts = vec![BTreeMap::new(); shards];
        let mut index = Map::new();
        for (i, (name, tensor)) in self.model.parameters().iter().enumerate() {
            parts[i % shards].insert(name.clone(), tensor.clone());
            index.insert(name.clone(), shard_name(i % shards).into());
        }
        for (i, part) in parts.iter().enumerate() {
            write_safetensors(&self.path(&shard_name(i)), part, &[]).unwrap();
        }
        fs::remove_file(self.path("model.safetensors")).unwrap();
        let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": index });
        fs::write(self.path(INDEX), index.to_string()).unwrap();
    }
}

const INDEX: &str = "model.safetensors.index.json";

fn shard_name(i: usize) -> String {
    format!("model-{i}.safetensors")
}

/// A changed config, put back at the end.
struct Changed<'a> {
    saved: &'a Saved,
    before: Map<String, Value>,
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        self.saved.write_keys(std::mem::take(&mut self.before));
    }
}

fn ids() -> Tensor {
    Tensor::new(&[[1u32, 20, 3, 4, 5, 6, 7], [8, 9, 10, 11, 0, 13, 14]], &Device::Cpu).unwrap()
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}
