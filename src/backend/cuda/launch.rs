//! Launches.

use super::device::shared_memory_of_multiprocessor;
use super::{Module, failed, module, multiprocessors};
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, DriverError, sys};
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
    /// Of a block; zero: as many as the kernel is compiled for.
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
        // SAFETY: the caller's promise.
        unsafe { self.put(&kernel, arguments, kernel.memory, None) }
    }

    /// The same, before the kernel ahead has ended, where the device and the kernel can. It pays where blocks are many: few
    /// that all fit at once would be spread unevenly, wherever there happens to be room first.
    ///
    /// # Safety
    /// As [`Launch::run`].
    pub(crate) unsafe fn run_early(&self, arguments: &[&dyn Argument]) -> Result<()> {
        let kernel = module::kernel(self.device, self.module, self.kernel, self.dynamic)?;
        // SAFETY: the caller's promise.
        unsafe { self.put(&kernel, arguments, kernel.memory, kernel.early.then(early)) }
    }

    /// The same for blocks that are few: only as many of them as share out evenly have room on a multiprocessor at a time.
    ///
    /// # Safety
    /// As [`Launch::run`].
    pub(crate) unsafe fn run_early_spread(&self, arguments: &[&dyn Argument]) -> Result<()> {
        let kernel = module::kernel(self.device, self.module, self.kernel, self.dynamic)?;
        let blocks = self.grid.iter().product::<usize>().div_ceil(multiprocessors(self.device)?);
        let share = shared_memory_of_multiprocessor(self.device)? / (blocks + 1);
        let memory = if kernel.early { kernel.memory.max(share as u32) } else { kernel.memory };
        // SAFETY: the caller's promise.
        unsafe { self.put(&kernel, arguments, memory, kernel.early.then(early)) }
    }

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
        if memory > FREE_SHARED_MEMORY {
            // all there is, since another thread may ask for more before this launch
            module::allow_memory(self.device, &kernel.function)?;
        }
        // SAFETY: the caller's promise.
        unsafe { self.put(&kernel, &[&Packed(*argument)], memory as u32, together.then(all_at_once)) }
    }

    /// # Safety
    /// As [`Launch::run`].
    unsafe fn put(
        &self,
        kernel: &module::Kernel,
        arguments: &[&dyn Argument],
        memory: u32,
        mut attribute: Option<sys::CUlaunchAttribute>,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().map_err(|error| self.failed(error))?;
        let mut arguments: Vec<_> = arguments.iter().map(|argument| argument.place()).collect();
        let [x, y, z] = self.grid.map(|n| n as u32);
        let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let threads = match self.threads {
            0 => kernel.function.get_attribute(most).map_err(|error| self.failed(error))? as u32,
            own => own,
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: memory,
            hStream: stream.cu_stream(),
            attrs: attribute.as_mut().map_or(std::ptr::null_mut(), |one| &raw mut *one),
            numAttrs: attribute.is_some() as u32,
        };
        // SAFETY: the configuration and the arguments live through the call, which copies them; the rest is the caller's
        // promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                kernel.function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        result.result().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: DriverError) -> crate::Error {
        failed(&format!("{}: kernel {}, grid {:?}", self.what, self.kernel, self.grid), error)
    }
}

/// Of kernels whose blocks wait for each other.
fn all_at_once() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { cooperative: 1 },
    }
}

/// Of kernels that come while the one ahead of them ends; `take_turn` in `kernels/common/types.cuh` makes them wait for it.
fn early() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// Shared memory that a block gets without asking for more.
const FREE_SHARED_MEMORY: usize = 48 << 10;

/// An argument of a kernel: a number, a pointer (`u64`) or a [`Packed`] struct.
pub(crate) trait Argument {
    /// Where it lies.
    fn place(&self) -> *mut c_void;
}

impl<T: DeviceRepr> Argument for T {
    fn place(&self) -> *mut c_void {
        (&raw const *self).cast_mut().cast()
    }
}
