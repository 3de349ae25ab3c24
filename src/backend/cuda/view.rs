//! Tensors on CUDA as kernels see them: a pointer and strides.

use super::{Element, failed};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Shape, Storage, StorageRef, Tensor};
use half::{bf16, f16};

/// The CUDA device of a tensor.
pub(crate) fn device_of(tensor: &Tensor) -> Result<CudaDevice> {
    Ok(tensor.device().as_cuda_device()?.clone())
}

/// `tensor` itself if its last dimension is contiguous, else a contiguous copy.
pub(crate) fn with_unit_stride(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.dims().last(), tensor.stride().last()) {
        (Some(&length), Some(&stride)) if stride != 1 && length > 1 => Ok(tensor.contiguous()?),
        _ => Ok(tensor.clone()),
    }
}

/// `tensor` itself if it is contiguous and begins on 16 bytes, else a copy that does.
pub(crate) fn contiguous(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let begins = (tensor.layout().start_offset() * tensor.dtype().size_in_bytes()).is_multiple_of(16);
    Ok(if begins { tensor } else { tensor.force_contiguous()? })
}

/// What keeps the tensors of a launch in order with other streams until it is in its own.
#[derive(Default)]
pub(crate) struct Guards<'a>(Vec<SyncOnDrop<'a>>);

impl<'a> Guards<'a> {
    /// Where a slice lies that the launch reads.
    pub(crate) fn read<T>(&mut self, slice: &'a CudaSlice<T>, stream: &'a CudaStream) -> u64 {
        let (pointer, guard) = slice.device_ptr(stream);
        self.0.push(guard);
        pointer
    }
}

/// A tensor held for reading.
pub(crate) struct Held<'a> {
    storage: StorageRef<'a>,
    tensor: &'a Tensor,
}

impl<'a> Held<'a> {
    /// Locks the storage of a tensor.
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        Self { storage: tensor.storage_and_layout().0, tensor }
    }

    /// Where its first element lies.
    ///
    /// # Errors
    /// Another device than `device`, or a dtype that no kernel reads.
    pub(crate) fn pointer<'s>(
        &'s self,
        name: &str,
        device: &CudaDevice,
        stream: &'s CudaStream,
        guards: &mut Guards<'s>,
    ) -> Result<u64> {
        let Storage::Cuda(storage) = &*self.storage else {
            let place = self.tensor.device().location();
            return Err(Error::value(format!("{name}: device"), "a CUDA device", format!("{place:?}")));
        };
        let own: &Device = self.tensor.device();
        if !own.same_device(&Device::Cuda(device.clone())) {
            let (expected, got) = (Device::Cuda(device.clone()).location(), own.location());
            return Err(Error::value(format!("{name}: device"), format!("{expected:?}"), format!("{got:?}")));
        }
        let dtype = self.tensor.dtype();
        let start = match dtype {
            DType::F32 => address::<f32>(storage, stream, guards)?,
            DType::BF16 => address::<bf16>(storage, stream, guards)?,
            DType::F16 => address::<f16>(storage, stream, guards)?,
            DType::F64 => address::<f64>(storage, stream, guards)?,
            DType::U8 => address::<u8>(storage, stream, guards)?,
            DType::I32 => address::<i32>(storage, stream, guards)?,
            DType::I64 => address::<i64>(storage, stream, guards)?,
            other => return Err(Error::dtype(name, "f32, bf16 or f16", other)),
        };
        Ok(start + (self.tensor.layout().start_offset() * dtype.size_in_bytes()) as u64)
    }
}

fn address<'s, T: candle_core::cuda_backend::CudaDType + 's>(
    storage: &'s CudaStorage,
    stream: &'s CudaStream,
    guards: &mut Guards<'s>,
) -> Result<u64> {
    let (pointer, guard) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
    guards.0.push(guard);
    Ok(pointer)
}

/// New memory for a kernel to fill.
pub(crate) struct Buffer<E: Element> {
    slice: CudaSlice<E>,
}

impl<E: Element> Buffer<E> {
    /// Room for `length >= 1` elements.
    pub(crate) fn new(device: &CudaDevice, length: usize) -> Result<Self> {
        // SAFETY: the kernel it is made for writes every element before any is read.
        let slice = unsafe { device.alloc::<E>(length.max(1)) };
        let wanted = || format!("asking the device for {} bytes", length * size_of::<E>());
        Ok(Self { slice: slice.map_err(|error| error.context(wanted()))? })
    }

    /// Room for `length` elements, all zero.
    pub(crate) fn zeros(device: &CudaDevice, length: usize) -> Result<Self> {
        let mut buffer = Self::new(device, length)?;
        device.cuda_stream().memset_zeros(&mut buffer.slice).map_err(|error| failed("zeros", error))?;
        Ok(buffer)
    }

    /// Where its first element lies.
    pub(crate) fn pointer<'s>(&'s mut self, stream: &'s CudaStream, guards: &mut Guards<'s>) -> u64 {
        let (pointer, guard) = self.slice.device_ptr_mut(stream);
        guards.0.push(guard);
        pointer
    }

    /// To be filled.
    pub(crate) fn slice_mut(&mut self) -> &mut CudaSlice<E> {
        &mut self.slice
    }

    /// As candle holds it.
    pub(crate) fn storage(self, device: &CudaDevice) -> Storage {
        Storage::Cuda(CudaStorage::wrap_cuda_slice(self.slice, device.clone()))
    }

    /// As a tensor of `shape`, untracked.
    pub(crate) fn tensor(self, device: &CudaDevice, shape: impl Into<Shape>) -> Tensor {
        Tensor::from_storage(self.storage(device), shape, candle_core::op::BackpropOp::none(), false)
    }
}
