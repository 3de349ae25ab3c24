//! The weights of a checkpoint directory, whichever way they are stored.

use super::convert::{read_tensor, same_bytes};
use super::{Entry, SafeTensorsFile, pytorch};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The tensors of a directory by name.
pub(crate) struct WeightFiles {
    /// The file that names them all: the weights or their index.
    pub(crate) path: PathBuf,
    pub(crate) entries: BTreeMap<String, Entry>,
}

impl WeightFiles {
    /// Finds the weights of `dir` and reads their headers.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        type Open = fn(&Path) -> Result<BTreeMap<String, Entry>>;
        let candidates: [(&str, Open); 5] = [
            ("model.safetensors", |path| Ok(SafeTensorsFile::open(path)?.entries().clone())),
            ("model.safetensors.index.json", |path| {
                sharded(path, |p| Ok(SafeTensorsFile::open(p)?.entries().clone()))
            }),
            ("pytorch_model.bin", pytorch::entries),
            ("pytorch_model.bin.index.json", |path| sharded(path, pytorch::entries)),
            ("weights.ckpt", pytorch::entries),
        ];
        for (name, open) in candidates {
            let path = dir.join(name);
            if path.exists() {
                return Ok(Self { entries: open(&path)?, path });
            }
        }
        // state dicts that are named after their model, as Evo 2's
        let files = fs::read_dir(dir).map_err(Error::io(dir))?.flatten().map(|entry| entry.path());
        let mut named: Vec<PathBuf> =
            files.filter(|path| path.extension().is_some_and(|e| e == "pt")).collect();
        named.sort();
        let reason = match named.as_slice() {
            [path] => return Ok(Self { entries: pytorch::entries(path)?, path: path.clone() }),
            [] => {
                let names: Vec<_> = candidates.iter().map(|(name, _)| *name).collect();
                format!("no weights: expected one of {}, or a file *.pt", names.join(", "))
            }
            several => {
                let names = several.iter().filter_map(|path| Some(path.file_name()?.display().to_string()));
                format!("expected one file *.pt, got {}", names.collect::<Vec<_>>().join(", "))
            }
        };
        Err(Error::File { path: dir.into(), reason })
    }

    /// Whether two tensors, both of which are there, hold the same values.
    pub(crate) fn same(&self, a: &str, b: &str) -> Result<bool> {
        match (self.entries.get(a), self.entries.get(b)) {
            (Some(a), Some(b)) => same_bytes(a, b),
            _ => Ok(false),
        }
    }

    /// Reads a tensor as `dtype`.
    pub(crate) fn read(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let missing = || Error::Tensors {
            path: self.path.clone(),
            missing: vec![name.into()],
            unexpected: vec![],
            wrong: vec![],
        };
        read_tensor(name, self.entries.get(name).ok_or_else(missing)?, dtype, device)
    }
}

/// The tensors that an index spreads over several files.
fn sharded(
    path: &Path,
    open: impl Fn(&Path) -> Result<BTreeMap<String, Entry>>,
) -> Result<BTreeMap<String, Entry>> {
    let wrong = |reason: String| Error::File { path: path.into(), reason };
    let text = fs::read(path).map_err(Error::io(path))?;
    let index: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| wrong(format!("not a JSON index: {e}")))?;
    let map = index.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| wrong("expected an object `weight_map`, tensor name to file name".into()))?;
    let mut shards: BTreeMap<&str, BTreeMap<String, Entry>> = BTreeMap::new();
    let mut entries = BTreeMap::new();
    let (mut absent, mut lost) = (vec![], vec![]);
    for (tensor, file) in map {
        let file =
            file.as_str().ok_or_else(|| wrong(format!("`{tensor}`: expected a file name, got {file}")))?;
        let plain = Path::new(file).file_name().is_some_and(|name| name == file);
        if !plain {
            return Err(wrong(format!("`{tensor}`: expected a file name without a folder, got `{file}`")));
        }
        if !shards.contains_key(file) {
            let shard = path.with_file_name(file);
            if !shard.is_file() {
                shards.insert(file, BTreeMap::new());
                lost.push(format!("`{file}`"));
                continue;
            }
            shards.insert(file, open(&shard)?);
        }
        match shards.get(file).and_then(|shard| shard.get(tensor)) {
            Some(entry) => drop(entries.insert(tensor.clone(), entry.clone())),
            None => absent.push(format!("{tensor} in {file}")),
        }
    }
    if !lost.is_empty() {
        return Err(wrong(format!("names shards that are not there: {}", lost.join(", "))));
    }
    if !absent.is_empty() {
        return Err(Error::Tensors { path: path.into(), missing: absent, unexpected: vec![], wrong: vec![] });
    }
    // what a shard holds beyond the index is read too, to be refused if the model does not know it
    for (name, entry) in shards.into_values().flatten() {
        entries.entry(name).or_insert(entry);
    }
    Ok(entries)
}
