//! Checkpoints of a training, and going on from one.
//!
//! A folder of checkpoints holds one folder for each, named after the steps done:
//!
//! ```text
//! step-00000200/config.json           what models::load reads:
//!               model.safetensors     the model
//!               optimizer.safetensors moments and master weights
//!               state-0.safetensors   the carried state of stream 0
//!               training.json         settings, step, groups, data position
//! ```
//!
//! A checkpoint is written under another name, every file synced, and then renamed: one that was interrupted is never
//! taken for a checkpoint, and those before it are left alone until it stands.

use super::{Group, Trainer, TrainerConfig};
use crate::models::{ModelState, load_trainable, weights};
use crate::{Error, Result};
use candle_core::{DType, Device};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

const TRAINING: &str = "training.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const VERSION: u32 = 1;
/// Endings of a folder that is being written, and of one whose successor is being put into its place.
const PARTIAL: &str = ".partial";
const REPLACED: &str = ".replaced";

/// `training.json`
#[derive(Serialize, Deserialize)]
struct Training {
    version: u32,
    dtype: String,
    steps: u64,
    optimizer_steps: u64,
    tokens: u64,
    config: TrainerConfig,
    groups: BTreeMap<String, Group>,
    streams: Vec<usize>,
    position: serde_json::Value,
}

/// The folder of the newest whole checkpoint in `folder` (or `folder` itself, if it is one); `None` if there is none.
///
/// # Errors
/// A folder that cannot be read; one that does not exist holds no checkpoint.
pub fn latest_checkpoint(folder: impl AsRef<Path>) -> Result<Option<PathBuf>> {
    let folder = folder.as_ref();
    if folder.join(TRAINING).is_file() {
        return Ok(Some(folder.to_path_buf()));
    }
    Ok(checkpoints(folder)?.pop().map(|(_, path)| path))
}

/// The whole checkpoints, the oldest first.
fn checkpoints(folder: &Path) -> Result<Vec<((u64, bool), PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let mut found = vec![];
    for entry in entries {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        let Some(name) = name.to_str().and_then(|name| name.strip_prefix("step-")) else { continue };
        let (number, current) = match name.strip_suffix(REPLACED) {
            Some(number) => (number, false),
            None => (name, true),
        };
        if let Ok(step) = number.parse() {
            found.push(((step, current), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

impl Trainer {
    /// Writes a checkpoint into `folder`, with `position` (the data's, or anything else) beside the training itself,
    /// and removes all but the newest `keep` (at least one).
    ///
    /// Returns the checkpoint's own folder.
    ///
    /// # Errors
    /// A folder that cannot be written; the checkpoints in it stay as they were.
    pub fn save(&self, folder: impl AsRef<Path>, position: &impl Serialize, keep: usize) -> Result<PathBuf> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let place = folder.join(format!("step-{:08}", self.steps));
        let beside = |ending: &str| folder.join(format!("step-{:08}{ending}", self.steps));
        let partial = beside(PARTIAL);
        remove(&partial)?;
        fs::create_dir(&partial).map_err(Error::io(&partial))?;
        self.write(&partial, position)?;
        sync(&partial)?;

        let replaced = beside(REPLACED);
        if place.exists() {
            remove(&replaced)?;
            fs::rename(&place, &replaced).map_err(Error::io(&place))?;
        }
        fs::rename(&partial, &place).map_err(Error::io(&place))?;
        sync(folder)?;
        remove(&replaced)?;
        let all = checkpoints(folder)?;
        // a later checkpoint of another training is not ours to judge: only what comes before this one is old
        let older: Vec<&PathBuf> =
            all.iter().map(|(_, path)| path).take_while(|path| **path != place).collect();
        for path in &older[..older.len().saturating_sub(keep.max(1) - 1)] {
            remove(path)?;
        }
        Ok(place)
    }

    fn write(&self, folder: &Path, position: &impl Serialize) -> Result<()> {
        self.model.save(folder)?;
        weights::write(&folder.join(OPTIMIZER), &self.optimizer.state()?, &[])?;
        for (stream, state) in &self.states {
            state.save(folder.join(format!("state-{stream}.safetensors")))?;
        }
        let path = folder.join(TRAINING);
        let file_error =
            |error: serde_json::Error| Error::File { path: path.clone(), reason: error.to_string() };
        let training = Training {
            version: VERSION,
            dtype: self.model.dtype().as_str().into(),
            steps: self.steps,
            optimizer_steps: self.optimizer.steps(),
            tokens: self.tokens,
            config: self.config.clone(),
            groups: self.optimizer.groups(),
            streams: self.states.keys().copied().collect(),
            position: serde_json::to_value(position).map_err(file_error)?,
        };
        let text = serde_json::to_string_pretty(&training).map_err(file_error)?;
        let mut file = File::create(&path).map_err(Error::io(&path))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io(&path))
    }

    /// Goes on from the newest checkpoint in `folder` (or from `folder`, if it is one): every later step gives the same
    /// numbers, bit for bit, as if the training had not been interrupted. Returns the saved position too.
    ///
    /// # Errors
    /// No checkpoint; files that are missing, damaged or do not belong together.
    pub fn resume<P: DeserializeOwned>(folder: impl AsRef<Path>, device: &Device) -> Result<(Self, P)> {
        let folder = folder.as_ref();
        let damaged = |path: &Path, reason: String| Error::File { path: path.into(), reason };
        let Some(place) = latest_checkpoint(folder)? else {
            return Err(damaged(folder, "expected a checkpoint (a folder step-N), found none".into()));
        };
        let path = place.join(TRAINING);
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let training: Training = serde_json::from_str(&text).map_err(|e| damaged(&path, e.to_string()))?;
        if training.version != VERSION {
            let reason = format!("expected a checkpoint of version {VERSION}, got {}", training.version);
            return Err(damaged(&path, reason));
        }
        let position = serde_json::from_value(training.position)
            .map_err(|e| damaged(&path, format!("position: {e}")))?;
        let dtype: DType = training
            .dtype
            .parse()
            .map_err(|_| damaged(&path, format!("expected a dtype of candle, got {:?}", training.dtype)))?;
        let model = load_trainable(&place, dtype, device)?;
        if let Some(name) = model.variables().keys().find(|name| !training.groups.contains_key(*name)) {
            return Err(damaged(&path, format!("no group for the parameter {name}")));
        }
        let group = |name: &str, value: &candle_core::Tensor| {
            training.groups.get(name).cloned().unwrap_or_else(|| Group::usual(name, value))
        };
        let mut trainer = Self::with_groups(model, training.config, group)?;
        let file = weights::SafeTensorsFile::open(&place.join(OPTIMIZER))?;
        let mut state = BTreeMap::new();
        for name in file.entries().keys() {
            state.insert(name.clone(), file.tensor(name, None, &Device::Cpu)?);
        }
        trainer.optimizer.restore(&state, training.optimizer_steps)?;
        for stream in training.streams {
            let state = ModelState::load(place.join(format!("state-{stream}.safetensors")), device)?;
            trainer.states.insert(stream, state);
        }
        (trainer.steps, trainer.tokens) = (training.steps, training.tokens);
        Ok((trainer, position))
    }
}

/// Removes a folder of ours, if there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// Makes the names in a folder last; not every system can open one.
fn sync(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
    }
    Ok(())
}
