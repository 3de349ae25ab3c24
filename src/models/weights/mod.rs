//! Weights in files: safetensors (whole or sharded with an index) and PyTorch state dicts, read straight into their
//! final buffers, and safetensors written so that a failure leaves what was there.

mod convert;
mod directory;
mod pickle;
mod pytorch;
mod safetensors;
mod write;
mod zip;

pub(crate) use directory::WeightFiles;
pub(crate) use safetensors::SafeTensorsFile;
pub use write::write;
pub(crate) use write::write_file;

use candle_core::DType;
use std::path::PathBuf;

/// Where a tensor lies in a file, contiguous and little-endian.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) path: PathBuf,
    /// `Err` names a dtype that cannot be read.
    pub(crate) dtype: Result<DType, String>,
    pub(crate) shape: Vec<usize>,
    /// In bytes, from the beginning of the file; checked against its length.
    pub(crate) offset: u64,
}
