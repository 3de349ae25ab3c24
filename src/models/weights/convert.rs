//! Reading numbers of one type into a buffer of another.

use super::Entry;
use crate::backend::cpu::memory;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// Bytes read at a time.
const BLOCK: usize = 1 << 18;

/// A number in a file.
trait Stored: Sized {
    const BYTES: usize;
    fn read(bytes: &[u8]) -> Self;
    fn wide(self) -> f64;
    fn narrow(self) -> f32;
}

/// A number in a tensor.
trait Number: WithDType {
    fn from_stored<S: Stored>(stored: S) -> Self;
}

macro_rules! stored {
    ($ty:ty, $bytes:literal, $wide:expr, $narrow:expr) => {
        impl Stored for $ty {
            const BYTES: usize = $bytes;
            #[inline(always)]
            fn read(bytes: &[u8]) -> Self {
                let mut own = [0; $bytes];
                own.copy_from_slice(&bytes[..$bytes]);
                <$ty>::from_le_bytes(own)
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                ($wide)(self)
            }
            #[inline(always)]
            fn narrow(self) -> f32 {
                ($narrow)(self)
            }
        }
    };
}

stored!(f64, 8, |x| x, |x| x as f32);
stored!(f32, 4, f64::from, |x| x);
stored!(bf16, 2, bf16::to_f64, bf16::to_f32);
stored!(f16, 2, f16::to_f64, f16::to_f32);

impl Number for f64 {
    fn from_stored<S: Stored>(stored: S) -> Self {
        stored.wide()
    }
}

impl Number for f32 {
    fn from_stored<S: Stored>(stored: S) -> Self {
        stored.narrow()
    }
}

impl Number for bf16 {
    fn from_stored<S: Stored>(stored: S) -> Self {
        if S::BYTES == 8 { Self::from_f64(stored.wide()) } else { Self::from_f32(stored.narrow()) }
    }
}

impl Number for f16 {
    fn from_stored<S: Stored>(stored: S) -> Self {
        if S::BYTES == 8 { Self::from_f64(stored.wide()) } else { Self::from_f32(stored.narrow()) }
    }
}

/// Reads a tensor as `dtype`; the memory it takes is the result's and one block.
pub(super) fn read_tensor(name: &str, entry: &Entry, dtype: DType, device: &Device) -> Result<Tensor> {
    let wrong =
        |reason: String| Error::File { path: entry.path.clone(), reason: format!("`{name}`: {reason}") };
    let unreadable = |got: &str| wrong(format!("expected f64, f32, bf16 or f16, got {got}"));
    let stored = entry.dtype.clone().map_err(|got| unreadable(&got))?;
    // an empty tensor too has strides, which are products of the other sizes
    let elements = entry.shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n.max(1)));
    if elements.is_none_or(|count| count > isize::MAX as usize / 8) {
        return Err(wrong(format!("expected a shape that fits in memory, got {:?}", entry.shape)));
    }
    let read = match dtype {
        DType::F64 => read_as::<f64>,
        DType::F32 => read_as::<f32>,
        DType::BF16 => read_as::<bf16>,
        DType::F16 => read_as::<f16>,
        DType::I64 if stored == DType::I64 => read_integers,
        _ => return Err(unreadable(&format!("{stored:?}"))),
    };
    read(entry, stored, device)?.ok_or_else(|| unreadable(&format!("{stored:?}")))
}

/// `None` for a stored dtype that is no float.
fn read_as<T: Number>(entry: &Entry, stored: DType, device: &Device) -> Result<Option<Tensor>> {
    let values = match stored {
        DType::F64 => numbers(entry, |b| T::from_stored(f64::read(b)), f64::BYTES),
        DType::F32 => numbers(entry, |b| T::from_stored(f32::read(b)), f32::BYTES),
        DType::BF16 => numbers(entry, |b| T::from_stored(bf16::read(b)), bf16::BYTES),
        DType::F16 => numbers(entry, |b| T::from_stored(f16::read(b)), f16::BYTES),
        _ => return Ok(None),
    }?;
    Ok(Some(Tensor::from_vec(values, entry.shape.as_slice(), device)?))
}

fn read_integers(entry: &Entry, _: DType, device: &Device) -> Result<Option<Tensor>> {
    let integer = |bytes: &[u8]| {
        let mut own = [0; 8];
        own.copy_from_slice(&bytes[..8]);
        i64::from_le_bytes(own)
    };
    let values = numbers(entry, integer, 8)?;
    Ok(Some(Tensor::from_vec(values, entry.shape.as_slice(), device)?))
}

/// Whether two tensors are of one dtype and shape and equal bit for bit.
pub(super) fn same_bytes(a: &Entry, b: &Entry) -> Result<bool> {
    let (Ok(dtype), true) = (&a.dtype, a.dtype == b.dtype && a.shape == b.shape) else { return Ok(false) };
    if (&a.path, a.offset) == (&b.path, b.offset) {
        return Ok(true);
    }
    let mut left = a.shape.iter().product::<usize>() * dtype.size_in_bytes();
    let (mut file_a, mut file_b) = (open_at(a)?, open_at(b)?);
    let (mut block_a, mut block_b) = (vec![0; BLOCK.min(left)], vec![0; BLOCK.min(left)]);
    while left > 0 {
        let part = left.min(BLOCK);
        file_a.read_exact(&mut block_a[..part]).map_err(Error::io(&a.path))?;
        file_b.read_exact(&mut block_b[..part]).map_err(Error::io(&b.path))?;
        if block_a[..part] != block_b[..part] {
            return Ok(false);
        }
        left -= part;
    }
    Ok(true)
}

fn open_at(entry: &Entry) -> Result<File> {
    let mut file = File::open(&entry.path).map_err(Error::io(&entry.path))?;
    file.seek(SeekFrom::Start(entry.offset)).map_err(Error::io(&entry.path))?;
    Ok(file)
}

#[inline(always)]
fn numbers<T>(entry: &Entry, convert: impl Fn(&[u8]) -> T, bytes: usize) -> Result<Vec<T>> {
    let count: usize = entry.shape.iter().product();
    let mut file = open_at(entry)?;
    let mut values = memory::with_capacity(count);
    let mut block = vec![0; BLOCK.min(count * bytes)];
    while values.len() < count {
        let part = &mut block[..((count - values.len()) * bytes).min(BLOCK)];
        file.read_exact(part).map_err(Error::io(&entry.path))?;
        values.extend(part.chunks_exact(bytes).map(&convert));
    }
    Ok(values)
}
