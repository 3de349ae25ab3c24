//! The gradient on CUDA: `kernels/embedding.cu`.

use super::Runs;
use crate::backend::cuda::{Guards, Held, Launch, Module, Packed, device_of, with_unit_stride};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{DevicePtrMut, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::{CudaDType, CudaStorage};
use candle_core::op::BackpropOp;
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};

const THREADS: usize = 128;

/// `struct Embedding` of `embedding.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Call {
    dy: u64,
    gradient: u64,
    order: u64,
    ids: u64,
    starts: u64,
    step: i64,
    width: i32,
}

/// The gradient of `like` from that of the rows.
pub(super) fn gradient(dy: &Tensor, runs: &Runs, like: &Tensor) -> Result<Tensor> {
    match dy.dtype() {
        DType::F32 => run::<f32>("float", dy, runs, like),
        DType::F64 => run::<f64>("double", dy, runs, like),
        DType::BF16 => run::<bf16>("bf16", dy, runs, like),
        DType::F16 => run::<f16>("f16", dy, runs, like),
        other => Err(Error::dtype("embedding: gradient", "f32, f64, bf16 or f16", other)),
    }
}

fn run<E: CudaDType + DeviceRepr + ValidAsZeroBits>(
    element: &str,
    dy: &Tensor,
    runs: &Runs,
    like: &Tensor,
) -> Result<Tensor> {
    let dy = with_unit_stride(dy)?;
    let device = device_of(&dy)?;
    let stream = device.cuda_stream();
    let width = like.dim(1)?;
    let mut gradient = device.alloc_zeros::<E>(like.elem_count())?;
    if !runs.ids.is_empty() && width > 0 {
        let [order, ids, starts] = [&runs.order, &runs.ids, &runs.starts];
        let (order, ids) = (device.clone_htod(order)?, device.clone_htod(ids)?);
        let starts = device.clone_htod(starts)?;
        let (held, mut guards) = (Held::new(&dy), Guards::default());
        let call = Call {
            dy: held.pointer("embedding: gradient", &device, &stream, &mut guards)?,
            gradient: gradient.device_ptr_mut(&stream).0,
            order: guards.read(&order, &stream),
            ids: guards.read(&ids, &stream),
            starts: guards.read(&starts, &stream),
            step: dy.stride()[0] as i64,
            width: width as i32,
        };
        let kernel = &format!("embedding_grad_{element}");
        let (module, grid) = (Module::Embedding, [runs.ids.len(), width.div_ceil(THREADS), 1]);
        let (what, device, threads) = ("embedding, backward", &device, THREADS as u32);
        let launch = Launch { what, device, module, kernel, grid, threads, dynamic: false };
        // SAFETY: the struct is laid out as the kernel's; tokens are rows of `dy` and ids rows of the gradient.
        unsafe { launch.run(&[&Packed(call)])? };
    }
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(gradient, device));
    Ok(Tensor::from_storage(storage, like.shape(), BackpropOp::none(), false))
}
