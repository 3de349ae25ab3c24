//! Files that are whole or not there: written beside, synced, renamed.

use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Storage, Tensor};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Files written so far.
static WRITES: AtomicU64 = AtomicU64::new(0);

/// Writes a file under a temporary name, syncs it and gives it its name; a failure leaves what was at `path`.
pub(crate) fn write_file(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let Some(name) = path.file_name() else {
        return Err(Error::File { path: path.into(), reason: "expected the name of a file".into() });
    };
    // no other writer of this path, in this process or another, has the same
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{number}.part", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let result = (|| {
        let file = File::create(&temporary).map_err(Error::io(path))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        write(&mut writer)?;
        let file = writer.into_inner().map_err(|e| Error::io(path)(e.into_error()))?;
        file.sync_all().map_err(Error::io(path))?;
        fs::rename(&temporary, path).map_err(Error::io(path))?;
        if let (true, Some(folder)) = (cfg!(unix), path.parent()) {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(path))?;
        }
        Ok(())
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Writes a safetensors file with string metadata, one tensor at a time, from any device.
///
/// The file is written under a temporary name beside `path`, synced and renamed, so that a failure leaves what was
/// there. Tensors of f64, f32, bf16, f16, i64, u32 or u8.
///
/// # Errors
/// A path that cannot be written, or another dtype.
pub fn write(path: &Path, tensors: &BTreeMap<String, Tensor>, metadata: &[(&str, &str)]) -> Result<()> {
    let mut header = serde_json::Map::new();
    let metadata = metadata.iter().map(|&(k, v)| (k.to_string(), v.into())).collect();
    header.insert("__metadata__".into(), serde_json::Value::Object(metadata));
    let mut offset = 0;
    for (name, tensor) in tensors {
        let end = offset + tensor.elem_count() * tensor.dtype().size_in_bytes();
        header.insert(
            name.clone(),
            serde_json::json!({
                "dtype": dtype_name(name, tensor.dtype())?,
                "shape": tensor.dims(),
                "data_offsets": [offset, end],
            }),
        );
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    write_file(path, |file| {
        let io = |result: std::io::Result<()>| result.map_err(Error::io(path));
        io(file.write_all(&(header.len() as u64).to_le_bytes()))?;
        io(file.write_all(&header))?;
        for tensor in tensors.values() {
            io(write_values(file, tensor)?)?;
        }
        Ok(())
    })
}

fn write_values(file: &mut impl Write, tensor: &Tensor) -> Result<std::io::Result<()>> {
    let tensor = tensor.to_device(&candle_core::Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, count) = (layout.start_offset(), tensor.elem_count());
    macro_rules! all {
        ($values:expr) => {
            $values[start..start + count].iter().try_for_each(|x| file.write_all(&x.to_le_bytes()))
        };
    }
    let Storage::Cpu(storage) = &*storage else {
        return Err(Error::value("tensor", "one on the CPU", "another device"));
    };
    Ok(match storage {
        CpuStorage::F64(values) => all!(values),
        CpuStorage::F32(values) => all!(values),
        CpuStorage::BF16(values) => all!(values),
        CpuStorage::F16(values) => all!(values),
        CpuStorage::I64(values) => all!(values),
        CpuStorage::U32(values) => all!(values),
        CpuStorage::U8(values) => file.write_all(&values[start..start + count]),
        _ => return Err(Error::dtype("tensor", "f64, f32, bf16, f16, i64, u32 or u8", tensor.dtype())),
    })
}

fn dtype_name(name: &str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F64 => Ok("F64"),
        DType::F32 => Ok("F32"),
        DType::BF16 => Ok("BF16"),
        DType::F16 => Ok("F16"),
        DType::I64 => Ok("I64"),
        DType::U32 => Ok("U32"),
        DType::U8 => Ok("U8"),
        other => Err(Error::dtype(name, "f64, f32, bf16, f16, i64, u32 or u8", other)),
    }
}
