//! The element types of kernels.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

/// What a sequence may be made of on CUDA.
pub(crate) trait Element: CudaDType + DeviceRepr + ValidAsZeroBits + Send + Sync + 'static {
    /// Its name in the names of kernels.
    const NAME: &'static str;
}

impl Element for f32 {
    const NAME: &'static str = "float";
}
impl Element for bf16 {
    const NAME: &'static str = "bf16";
}
impl Element for f16 {
    const NAME: &'static str = "f16";
}
