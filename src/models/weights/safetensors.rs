//! One safetensors file: its header, checked against the file's length.

use super::Entry;
use super::convert::read_tensor;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The largest header that the format allows.
const MAX_HEADER: u64 = 100_000_000;

/// A safetensors file whose header has been read.
pub(crate) struct SafeTensorsFile {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafeTensorsFile {
    /// Reads and checks the header.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let wrong = |reason: String| Error::File { path: path.into(), reason };
        let mut file = File::open(path).map_err(Error::io(path))?;
        let length = file.metadata().map_err(Error::io(path))?.len();
        let mut size = [0; 8];
        if length < 8 {
            return Err(wrong(format!("expected a safetensors file, got {length} bytes")));
        }
        file.read_exact(&mut size).map_err(Error::io(path))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size > length - 8 {
            return Err(wrong(format!(
                "truncated or no safetensors file: a header of {size} bytes in {length}"
            )));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(Error::io(path))?;
        let parsed: Metadata =
            serde_json::from_slice(&header).map_err(|e| wrong(format!("not a safetensors header: {e}")))?;
        let data = length - 8 - size;
        if parsed.data_len() as u64 != data {
            let expected = parsed.data_len();
            return Err(wrong(format!(
                "truncated or damaged: the header tells of {expected} bytes, {data} follow it"
            )));
        }
        let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
            let entry = Entry {
                path: path.into(),
                dtype: dtype(info.dtype),
                shape: info.shape.clone(),
                offset: 8 + size + info.data_offsets.0 as u64,
            };
            (name, entry)
        };
        let metadata = parsed.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { path: path.into(), entries: parsed.tensors().into_iter().map(entry).collect(), metadata })
    }

    /// A value of the header's metadata.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The tensors by name.
    pub(crate) fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// Reads a tensor, as it is stored if `dtype` is `None`.
    pub(crate) fn tensor(&self, name: &str, dtype: Option<DType>, device: &Device) -> Result<Tensor> {
        let missing = || Error::Tensors {
            path: self.path.clone(),
            missing: vec![name.into()],
            unexpected: vec![],
            wrong: vec![],
        };
        let entry = self.entries.get(name).ok_or_else(missing)?;
        let stored = entry.dtype.clone().unwrap_or(DType::F32);
        read_tensor(name, entry, dtype.unwrap_or(stored), device)
    }
}

fn dtype(dtype: Dtype) -> Result<DType, String> {
    match dtype {
        Dtype::F64 => Ok(DType::F64),
        Dtype::F32 => Ok(DType::F32),
        Dtype::BF16 => Ok(DType::BF16),
        Dtype::F16 => Ok(DType::F16),
        Dtype::I64 => Ok(DType::I64),
        other => Err(format!("{other:?}")),
    }
}
