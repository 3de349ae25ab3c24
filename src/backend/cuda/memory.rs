//! The device's pool of memory.

use super::failed;
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, result, sys};
use std::ffi::c_void;

/// Lets a device's pool keep what is freed for the next tensor.
///
/// By default the pool gives idle memory back to the system at every synchronisation, and the next tensor has it mapped
/// anew: some 10 microseconds a megabyte, more than a kernel takes to fill it. The price is that the process keeps as much
/// memory of the device as it ever used, as those of PyTorch do.
pub(super) fn keep_freed(context: &CudaContext) -> Result<()> {
    let mut most = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    if !context.has_async_alloc() {
        return Ok(());
    }
    // SAFETY: the device is that of a live context, the pool its own, and the attribute a number of 64 bits.
    let set = unsafe {
        result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            result::mem_pool::set_attribute(pool, threshold, (&raw mut most).cast::<c_void>())
        })
    };
    set.map_err(|error| failed("the device's memory pool", error))
}

/// The most that the device's pool ever had given out at a time; none if it has no pool.
pub(in crate::backend) fn peak_bytes(device: &CudaDevice) -> Option<u64> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let (mut most, attribute) = (0u64, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH);
    if !context.has_async_alloc() {
        return None;
    }
    // SAFETY: as above.
    let got = unsafe {
        result::device::get_default_mem_pool(context.cu_device()).and_then(|pool| {
            result::mem_pool::get_attribute(pool, attribute, (&raw mut most).cast::<c_void>())
        })
    };
    got.ok().map(|()| most)
}
