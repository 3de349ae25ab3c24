//! What a device has.

use super::failed;
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::sys;

/// The multiprocessors of a device.
pub(crate) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(attribute);
    Ok(count.map_err(|error| failed("the number of multiprocessors", error))?.max(1) as usize)
}

/// Whether a device runs the kernels made for Hopper's tensor cores, and this build has them.
pub(crate) fn is_hopper(device: &CudaDevice) -> Result<bool> {
    let parts = [
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    ];
    let context = device.cuda_stream();
    let [major, minor] = parts.map(|part| context.context().attribute(part));
    let known =
        |part: std::result::Result<i32, _>| part.map_err(|error| failed("the compute capability", error));
    Ok(cfg!(hopper_kernels) && (known(major)?, known(minor)?) == (9, 0))
}

/// The shared memory that a block may ask for.
pub(crate) fn shared_memory(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let bytes = device.cuda_stream().context().attribute(attribute);
    Ok(bytes.map_err(|error| failed("the shared memory of a block", error))?.max(0) as usize)
}

/// The shared memory that the blocks of a multiprocessor have together.
pub(super) fn shared_memory_of_multiprocessor(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR;
    let bytes = device.cuda_stream().context().attribute(attribute);
    Ok(bytes.map_err(|error| failed("the shared memory of a multiprocessor", error))?.max(0) as usize)
}
