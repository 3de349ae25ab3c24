//! Launches.

use super::{Module, failed, module};
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg, sys};
use std::ffi::c_void;

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

impl Launch<'_> {
    /// Puts a kernel of one struct into the stream, with `memory` bytes of shared memory a block. If its blocks wait for
    /// each other, it runs once there is room for all of them.
    ///
    /// # Safety
    /// As [`Launch::run`], for the one argument.
    pub(crate) unsafe fn with_memory<T: Copy>(
        &self,
        argument: &T,
        memory: usize,
        together: bool,
    ) -> Result<()> {
        let kernel = module::kernel(self.device, self.module, self.kernel, false)?;
        let fail =
            |error| failed(&format!("{}: kernel {}, grid {:?}", self.what, self.kernel, self.grid), error);
        if memory > FREE_SHARED_MEMORY {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.function.set_attribute(most, memory as i32).map_err(fail)?;
        }
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().map_err(fail)?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { cooperative: 1 },
        };
        let [x, y, z] = self.grid.map(|n| n as u32);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: memory as u32,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: together as u32,
        };
        let mut arguments = [(&raw const *argument).cast_mut().cast::<c_void>()];
        // SAFETY: the configuration and the one argument live through the call, which copies them; the rest is the
        // caller's promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                kernel.function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        result.result().map_err(fail)
    }
}

/// Shared memory that a block gets without asking for more.
const FREE_SHARED_MEMORY: usize = 48 << 10;

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
