//! From a directory to a model.

use super::config::ModelConfig;
use super::formats;
use super::language_model::{LanguageModel, check_dtype};
use super::weights::WeightFiles;
use crate::ops::Poles;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

const EMBEDDING: &str = "backbone.embeddings.weight";
const HEAD: &str = "lm_head.weight";

/// The largest `config.json` that is read.
const MAX_CONFIG: u64 = 1 << 24;

/// How [`load_with`] takes what a directory holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// The parameters are variables, for training.
    pub trainable: bool,
    /// Poles that are stored in bf16 or f16 are taken as they are. Without it they are refused: rounded, a pole is another
    /// filter (0.999 becomes 1 in bf16).
    pub rounded_poles: bool,
}

/// Loads a model for inference from a directory of any supported family; see [`formats`].
///
/// The weights are converted to `dtype`, one tensor at a time: loading takes the memory of the weights once. Decays stay
/// f32 or wider. What was tolerated on the way is in [`LanguageModel::notes`].
///
/// # Errors
/// A missing, damaged or unsupported file, naming it and the key; all tensors that are missing, unexpected, or of the
/// wrong shape or dtype, at once.
pub fn load(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<LanguageModel> {
    load_with(dir, dtype, device, LoadOptions::default())
}

/// The same for training: the parameters are variables.
///
/// # Errors
/// As [`load`].
pub fn load_trainable(dir: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<LanguageModel> {
    load_with(dir, dtype, device, LoadOptions { trainable: true, ..LoadOptions::default() })
}

/// [`load`] with options.
///
/// # Errors
/// As [`load`].
pub fn load_with(
    dir: impl AsRef<Path>,
    dtype: DType,
    device: &Device,
    options: LoadOptions,
) -> Result<LanguageModel> {
    check_dtype(dtype)?;
    let dir = dir.as_ref();
    let (config, mut notes) = read_with_notes(dir)?;
    let files = WeightFiles::open(dir)?;
    let config = formats::settle(config, files.entries.keys().map(String::as_str));
    let names = match_names(&config, &files, options.rounded_poles, &mut notes)?;
    let mut tensors = HashMap::new();
    for parameter in config.parameters() {
        let stored = names.get(&parameter.name).unwrap_or(&parameter.name);
        let mut tensor = files.read(stored, parameter.dtype(dtype), device)?;
        notes.extend(unstable(&parameter.name, &tensor)?.map(|what| format!("{stored}: {what}")));
        if options.trainable {
            tensor = Var::from_tensor(&tensor)?.into_inner();
        }
        tensors.insert(parameter.name, tensor);
    }
    let mut model = LanguageModel::from_tensors(&config, tensors, dtype, device)?;
    model.notes = notes;
    Ok(model)
}

/// Reads the config of a directory alone.
///
/// # Errors
/// A missing, damaged or unsupported `config.json`, naming the key.
pub fn read_config(dir: impl AsRef<Path>) -> Result<ModelConfig> {
    Ok(read_with_notes(dir.as_ref())?.0)
}

fn read_with_notes(dir: &Path) -> Result<(ModelConfig, Vec<String>)> {
    let path = dir.join("config.json");
    let size = fs::metadata(&path).map_err(Error::io(&path))?.len();
    if size > MAX_CONFIG {
        return Err(Error::File { path, reason: format!("expected a config, got {size} bytes") });
    }
    let text = fs::read(&path).map_err(Error::io(&path))?;
    let value: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| Error::File { path: path.clone(), reason: format!("not JSON: {e}") })?;
    formats::read(&path, value)
}

/// Tells of poles outside the unit circle: the model is what its file says, but its filters grow with the length.
fn unstable(name: &str, tensor: &Tensor) -> Result<Option<String>> {
    let poles = match name {
        name if name.ends_with("filter.log_poles") => Poles::Log(tensor),
        name if name.ends_with("filter.poles") => Poles::Complex(tensor),
        _ => return Ok(None),
    };
    let largest = poles.largest()?;
    let what = || format!("a pole of absolute value {largest}: above 1, its filter grows without bound");
    Ok((largest > 1.0).then(what))
}

/// Whether a stored buffer holds these values, up to the rounding of a half.
fn agrees(stored: &Tensor, values: &[f64]) -> Result<bool> {
    let stored = stored.flatten_all()?.to_vec1::<f64>()?;
    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 + 5e-3 * b.abs();
    Ok(stored.len() == values.len() && stored.iter().zip(values).all(near))
}

/// The file's name of each parameter, or all that does not fit.
fn match_names(
    config: &ModelConfig,
    files: &WeightFiles,
    rounded_poles: bool,
    notes: &mut Vec<String>,
) -> Result<HashMap<String, String>> {
    let mut names = HashMap::new();
    let (mut missing, mut wrong) = (vec![], vec![]);
    for name in files.entries.keys().filter(|name| !config.family.ignores(config, name)) {
        if let Some(other) = names.insert(config.family.own_name(name), name.clone()) {
            wrong.push(format!("{name}: another name of {other}, which is there too"));
        }
    }
    let head = if config.tie_embeddings { names.remove(HEAD) } else { None };
    for (name, values) in config.family.buffers(config) {
        if names.remove(&name).is_some() && !agrees(&files.read(&name, DType::F64, &Device::Cpu)?, &values)? {
            wrong.push(format!("{name}: expected the values that follow from the config, {values:.6?}"));
        }
    }
    let mut shared: Vec<(String, String)> =
        names.keys().filter_map(|own| Some((own.clone(), config.family.shared(own)?))).collect();
    shared.sort();
    for (own, parameter) in shared {
        let Some(name) = names.remove(&own) else { continue };
        match names.get(&parameter) {
            Some(first) if !files.same(&name, first)? => {
                wrong.push(format!("{name}: expected the values of {first}, which it shares"));
            }
            Some(_) => {}
            None => drop(names.insert(parameter, name)),
        }
    }
    let parameters = config.parameters();
    // a tied head may be stored too, or alone, but must be the embedding
    match (head, names.get(EMBEDDING)) {
        (Some(head), Some(embedding)) if !files.same(&head, embedding)? => {
            wrong.push(format!("{head}: expected the values of {embedding}, to which the config ties it"));
        }
        (Some(head), None) => drop(names.insert(EMBEDDING.into(), head)),
        _ => {}
    }
    for parameter in &parameters {
        let upstream = config.family.upstream_name(&parameter.name);
        let Some(entry) = names.get(&parameter.name).and_then(|name| files.entries.get(name)) else {
            missing.push(upstream);
            continue;
        };
        if entry.shape != parameter.shape {
            wrong.push(format!("{upstream}: expected shape {:?}, got {:?}", parameter.shape, entry.shape));
        }
        match &entry.dtype {
            Ok(dtype @ (DType::BF16 | DType::F16)) if parameter.name.ends_with("poles") => {
                let dtype = dtype.as_str();
                if rounded_poles {
                    notes.push(format!("{upstream}: poles in {dtype}: rounded, they make another filter"));
                } else {
                    wrong.push(format!(
                        "{upstream}: expected poles of f32 or f64, got {dtype}: rounded, they make another filter \
                         (the option rounded_poles takes them)"
                    ));
                }
            }
            Ok(DType::F64 | DType::F32 | DType::BF16 | DType::F16) => {}
            Ok(dtype) => wrong.push(format!("{upstream}: expected a float dtype, got {dtype:?}")),
            Err(name) => wrong.push(format!("{upstream}: expected f64, f32, bf16 or f16, got {name}")),
        }
    }
    let known: HashSet<_> = parameters.iter().map(|p| p.name.as_str()).collect();
    let mut unexpected: Vec<String> = vec![];
    for (own, name) in &names {
        if !known.contains(own.as_str()) {
            unexpected.push(name.clone());
        }
    }
    if missing.is_empty() && wrong.is_empty() && unexpected.is_empty() {
        return Ok(names);
    }
    unexpected.sort();
    Err(Error::Tensors { path: files.path.clone(), missing, unexpected, wrong })
}
