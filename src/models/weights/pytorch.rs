//! PyTorch state dicts: a zip file of one pickle, which names the tensors, and one stored entry per storage.

use super::Entry;
use super::pickle::{Id, Pickle, Value};
use super::zip::ZipFile;
use crate::Result;
use candle_core::DType;
use std::collections::BTreeMap;
use std::path::Path;

/// The largest pickle that is read: names and shapes alone.
const MAX_PICKLE: u64 = 1 << 27;

/// The tensors of a state dict, plain or under the key `state_dict`.
pub(super) fn entries(path: &Path) -> Result<BTreeMap<String, Entry>> {
    let mut zip = ZipFile::open(path)?;
    let pickle = zip.names().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let Some(pickle) = pickle.map(String::from) else { return Err(zip.wrong("no entry data.pkl")) };
    let folder = pickle.trim_end_matches("data.pkl").to_string();
    if let Some(order) = zip.find(&format!("{folder}byteorder"))?
        && zip.read(order.offset, order.size.min(8))? != b"little"
    {
        return Err(zip.wrong("numbers that are not little-endian"));
    }
    let Some(place) = zip.find(&pickle)?.filter(|place| place.size <= MAX_PICKLE) else {
        return Err(zip.wrong("data.pkl is too large"));
    };
    let pickle = Pickle::parse(&zip.read(place.offset, place.size)?).map_err(|e| zip.wrong(&e))?;
    let Value::Dict(items) = state_dict(&pickle) else { return Err(zip.wrong("not a dict")) };

    let mut entries = BTreeMap::new();
    for &(key, value) in items {
        let name = pickle.text(key).ok_or_else(|| zip.wrong("a key that is no string"))?;
        let tensor = match tensor(&pickle, value) {
            // what a layer keeps beside its weights, in whatever form
            Err(_) if name.ends_with("._extra_state") => continue,
            tensor => tensor.map_err(|e| zip.wrong(&format!("`{name}`: {e}")))?,
        };
        let storage = zip.find(&format!("{folder}data/{}", tensor.storage))?;
        let storage = storage.ok_or_else(|| zip.wrong(&format!("the data of `{name}` is missing")))?;
        let width = tensor.dtype.as_ref().map_or(1, |dtype| dtype.size_in_bytes());
        let bytes = |count: usize| count.checked_mul(width).map(|n| n as u64);
        let count = tensor.shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        let end = count.and_then(|count| count.checked_add(tensor.offset)).and_then(bytes);
        if end.is_none_or(|end| end > storage.size) {
            return Err(zip.wrong(&format!("`{name}` is larger than its data")));
        }
        let offset = storage.offset + (tensor.offset * width) as u64;
        let entry = Entry { path: path.into(), dtype: tensor.dtype, shape: tensor.shape, offset };
        entries.insert(name.to_string(), entry);
    }
    Ok(entries)
}

/// The root, or what a training checkpoint calls `state_dict`.
fn state_dict(pickle: &Pickle) -> &Value {
    if let Value::Dict(items) = pickle.root() {
        let nested = items.iter().find(|(key, _)| pickle.text(*key) == Some("state_dict"));
        if let Some(&(_, id)) = nested {
            return pickle.get(id);
        }
    }
    pickle.root()
}

/// A tensor as the pickle describes it.
struct Pickled<'a> {
    storage: &'a str,
    dtype: Result<DType, String>,
    shape: Vec<usize>,
    /// In elements.
    offset: usize,
}

/// Reads `_rebuild_tensor_v2(storage, offset, size, stride, ..)`, perhaps within `_rebuild_parameter(..)`.
fn tensor(pickle: &Pickle, id: Id) -> Result<Pickled<'_>, String> {
    let call = |id| match pickle.get(id) {
        Value::Call(function, arguments) => pickle.name(*function).zip(pickle.tuple(*arguments)),
        _ => None,
    };
    let expected = || "expected a tensor".to_string();
    let (mut function, mut arguments) = call(id).ok_or_else(expected)?;
    if let ("torch._utils._rebuild_parameter", Some(&data)) = (function, arguments.first()) {
        (function, arguments) = call(data).ok_or_else(expected)?;
    }
    let ("torch._utils._rebuild_tensor_v2", [storage, offset, shape, strides, ..]) = (function, arguments)
    else {
        return Err(format!("expected a plain tensor, got {function}"));
    };
    let Value::Outside(storage) = pickle.get(*storage) else { return Err("a tensor without data".into()) };
    let Some([_, kind, key, ..]) = pickle.tuple(*storage) else { return Err("a tensor without data".into()) };
    let shape = pickle.sizes(*shape).ok_or("a tensor without shape")?;
    let strides = pickle.sizes(*strides).ok_or("a tensor without strides")?;
    if !is_contiguous(&shape, &strides) {
        return Err(format!("expected a contiguous tensor, got shape {shape:?} with strides {strides:?}"));
    }
    let offset =
        pickle.number(*offset).and_then(|n| usize::try_from(n).ok()).ok_or("a tensor without offset")?;
    Ok(Pickled {
        storage: pickle.text(*key).ok_or("a tensor without data")?,
        dtype: dtype(pickle.name(*kind).unwrap_or("nothing")),
        shape,
        offset,
    })
}

fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut step = 1usize;
    shape.len() == strides.len()
        && shape.iter().zip(strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == step;
            step = step.saturating_mul(size);
            fits
        })
}

fn dtype(storage: &str) -> Result<DType, String> {
    match storage {
        "torch.DoubleStorage" => Ok(DType::F64),
        "torch.FloatStorage" => Ok(DType::F32),
        "torch.BFloat16Storage" => Ok(DType::BF16),
        "torch.HalfStorage" => Ok(DType::F16),
        "torch.LongStorage" => Ok(DType::I64),
        other => Err(other.trim_start_matches("torch.").to_string()),
    }
}
