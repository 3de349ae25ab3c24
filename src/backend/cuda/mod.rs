//! CUDA: embedded kernels, loaded once for each device; tensors as kernels see them; launches.
//!
//! Everything runs on the stream of candle's device, in its order. A tensor's guard is held until the kernel that uses
//! it is in the stream.

mod device;
mod element;
mod graph;
mod launch;
mod memory;
mod module;
mod view;

pub(crate) use device::{is_hopper, multiprocessors, shared_memory};
pub(crate) use element::Element;
pub(crate) use graph::Graph;
pub(crate) use launch::{Argument, Launch, Packed};
pub(super) use memory::peak_bytes;
pub(crate) use module::{Module, fits};
pub(crate) use view::{Buffer, Guards, Held, contiguous, device_of, with_unit_stride};

use candle_core::cuda_backend::CudaError;
use candle_core::cuda_backend::cudarc::driver::DriverError;

/// `result`; an error of candle or of the driver (no memory, a lost device) with what was being done.
pub(crate) fn within<T>(what: impl FnOnce() -> String, result: crate::Result<T>) -> crate::Result<T> {
    result.map_err(|error| match error {
        crate::Error::Candle(error) => crate::Error::Candle(error.context(what())),
        named => named,
    })
}

/// The driver's error with what was being done.
pub(crate) fn failed(what: &str, error: DriverError) -> crate::Error {
    let error = CudaError::Load { cuda: error, module_name: what.to_string() };
    crate::Error::Candle(candle_core::Error::Cuda(Box::new(error)))
}
