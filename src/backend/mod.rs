//! What the operators stand on, per kind of device: [`cpu`] (SIMD, vectorised functions, strided views) and `cuda`
//! (embedded kernels, launches, views).

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

/// The most memory in use at a time since the process began, in bytes: on CUDA by what lies on the device, on the CPU by
/// the process. None where the system does not say.
pub fn peak_bytes(device: &candle_core::Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        candle_core::Device::Cuda(device) => cuda::peak_bytes(device),
        candle_core::Device::Cpu => cpu::memory::peak_bytes(),
        _ => None,
    }
}
