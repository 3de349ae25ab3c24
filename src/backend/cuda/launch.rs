//! Launches.

use super::{Module, failed, module};
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg, sys};

/// A struct that a kernel takes by value.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Packed<T: Copy>(pub(crate) T);

// SAFETY: kernels read the bytes of a `Copy` struct; that the struct is laid out as the kernel's is its author's promise.
unsafe impl<T: Copy> DeviceRepr for Packed<T> {}

/// A kernel about to run.
pub(crate) struct Launch<'a> {
    /// The operator and its shape, for errors.
    pub(crate) what: &'a str,
    pub(crate) device: &'a CudaDevice,
    pub(crate) module: Module,
    pub(crate) kernel: &'a str,
    pub(crate) grid: [usize; 3],
    pub(crate) threads: u32,
    /// Whether the kernel's blocks ask for shared memory at launch.
    pub(crate) dynamic: bool,
}

impl Launch<'_> {
    /// Puts the kernel into the device's stream.
    ///
    /// # Safety
    /// The arguments are the kernel's, in order and type, and every place it reads or writes exists.
    pub(crate) unsafe fn run(&self, arguments: &[&dyn Argument]) -> Result<()> {
        let kernel = module::kernel(self.device, self.module, self.kernel, self.dynamic)?;
        let stream = self.device.cuda_stream();
        let mut launch = stream.launch_builder(&kernel.function);
        for argument in arguments {
            argument.push(&mut launch);
        }
        let [x, y, z] = self.grid.map(|n| n as u32);
        let config = LaunchConfig {
            grid_dim: (x, y, z),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: kernel.memory,
        };
        // SAFETY: the caller's promise.
        unsafe { launch.launch(config) }.map(|_| ()).map_err(|error| {
            failed(&format!("{}: kernel {}, grid {:?}", self.what, self.kernel, self.grid), error)
        })
    }
}

/// An argument of a kernel: a number, a pointer (`u64`) or a [`Packed`] struct.
pub(crate) trait Argument {
    /// Adds it to a launch.
    fn push<'a>(&'a self, launch: &mut candle_core::cuda_backend::cudarc::driver::LaunchArgs<'a>);
}

impl<T: DeviceRepr> Argument for T {
    fn push<'a>(&'a self, launch: &mut candle_core::cuda_backend::cudarc::driver::LaunchArgs<'a>) {
        launch.arg(self);
    }
}

/// The multiprocessors of a device.
pub(crate) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(attribute);
    Ok(count.map_err(|error| failed("the number of multiprocessors", error))?.max(1) as usize)
}
