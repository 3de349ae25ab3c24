//! The passes over memory that training makes beside the model, on CUDA: `kernels/training.cu`.

use super::kernels::Step;
use crate::autograd::record;
use crate::backend::cuda::{
    Buffer, Element, Guards, Held, Launch, Module, Packed, contiguous, device_of, with_unit_stride, within,
};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::DevicePtrMut;
use candle_core::{CpuStorage, CudaDevice, CudaStorage, DType, InplaceOp1, Layout, Tensor, Var};
use half::{bf16, f16};
use std::sync::{Mutex, PoisonError};

/// Threads of a block, and the elements that a block of the passes over all parameters takes, as the kernels have them.
const THREADS: u32 = 256;
const CHUNK: usize = 16 * THREADS as usize;
/// Blocks of one launch.
const MOST: usize = i32::MAX as usize;

/// `struct CrossEntropy` of `training.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct CrossEntropy {
    logits: u64,
    targets: u64,
    log_sums: u64,
    losses: u64,
    total: u64,
    scale: u64,
    gradient: u64,
    step: i64,
    rows: i64,
    size: i32,
}

/// The loss of `[rows, V]` logits, whose `targets` were checked; `None` where no kernel takes them.
pub(super) fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Option<Tensor>> {
    let run = match logits.dtype() {
        DType::F32 => recorded::<f32>,
        DType::BF16 => recorded::<bf16>,
        DType::F16 => recorded::<f16>,
        _ => return Ok(None),
    };
    let vocabulary = logits.dims().last().copied().unwrap_or(0);
    if targets.is_empty() || targets.len() > MOST || vocabulary > MOST - CHUNK {
        return Ok(None);
    }
    let what = || format!("cross_entropy of {:?}", logits.dims());
    within(what, run(logits, targets)).map(Some)
}

fn recorded<E: Element>(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let shape = logits.shape().clone();
    let vocabulary = shape.dims().last().copied().unwrap_or(0);
    let rows = match logits.rank() {
        2 => logits.detach(),
        _ => logits.detach().reshape((targets.len(), vocabulary))?,
    };
    let rows = with_unit_stride(&rows)?;
    let device = device_of(&rows)?;
    let stream = device.cuda_stream();
    let targets = device.clone_htod(targets)?;
    let count = rows.dims()[0];
    let (mut log_sums, mut losses) =
        (Buffer::<f32>::new(&device, count)?, Buffer::<f32>::new(&device, count)?);
    let mut total = Buffer::<f32>::new(&device, 1)?;
    let step = rows.stride()[0];
    let mut call = CrossEntropy {
        step: step as i64,
        rows: count as i64,
        size: vocabulary as i32,
        ..CrossEntropy::default()
    };
    let width = {
        let (held, mut guards) = (Held::new(&rows), Guards::default());
        call.logits = held.pointer("cross_entropy: logits", &device, &stream, &mut guards)?;
        call.targets = guards.read(&targets, &stream);
        call.log_sums = log_sums.pointer(&stream, &mut guards);
        call.losses = losses.pointer(&stream, &mut guards);
        call.total = total.pointer(&stream, &mut guards);
        let size = size_of::<E>();
        let aligned = [call.logits as usize, step * size, vocabulary * size];
        let width = if aligned.iter().all(|bytes| bytes.is_multiple_of(16)) { 16 / size } else { 1 };
        let name = format!("cross_entropy_{}_{width}", E::NAME);
        // SAFETY: the struct is laid out as the kernel's; rows, targets and buffers have the sizes it says, and every
        // target is below V or IGNORE.
        unsafe {
            launch(&device, &name, count, &call)?;
            launch(&device, "cross_entropy_total", 1, &call)?;
        }
        width
    };
    let log_sums = log_sums.tensor(&device, count);
    let outputs = [(total.storage(&device), candle_core::Shape::from(()))];
    let [loss] = record("cross_entropy", &[logits], outputs, move |[scale]| {
        let Some(scale) = scale else { return Ok(vec![None]) };
        let scale = contiguous(scale)?;
        let stream = device.cuda_stream();
        let mut gradient = Buffer::<E>::new(&device, rows.elem_count())?;
        {
            let (held, mut guards) = ([&rows, &log_sums, &scale].map(Held::new), Guards::default());
            let mut call = CrossEntropy {
                targets: guards.read(&targets, &stream),
                gradient: gradient.pointer(&stream, &mut guards),
                ..call
            };
            call.logits = held[0].pointer("cross_entropy: logits", &device, &stream, &mut guards)?;
            call.log_sums = held[1].pointer("cross_entropy: log sums", &device, &stream, &mut guards)?;
            call.scale = held[2].pointer("cross_entropy: gradient", &device, &stream, &mut guards)?;
            let name = format!("cross_entropy_grad_{}_{width}", E::NAME);
            // SAFETY: as above; the gradient has the logits' size.
            unsafe { launch(&device, &name, count, &call)? };
        }
        Ok(vec![Some(gradient.tensor(&device, shape.clone()))])
    })?;
    Ok(loss)
}

/// # Safety
/// As [`Launch::run`], for one struct.
unsafe fn launch<T: Copy>(device: &CudaDevice, kernel: &str, blocks: usize, call: &T) -> Result<()> {
    let (module, grid) = (Module::Training, [blocks, 1, 1]);
    let launch = Launch { what: "training", device, module, kernel, grid, threads: THREADS, dynamic: false };
    // SAFETY: the caller's promise.
    unsafe { launch.run(&[&Packed(*call)]) }
}

/// How the kernels name a dtype.
fn kind(dtype: DType) -> Option<i32> {
    match dtype {
        DType::F32 => Some(0),
        DType::BF16 => Some(1),
        DType::F16 => Some(2),
        _ => None,
    }
}

/// `struct Part` of `training.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Part {
    gradient: u64,
    length: i64,
    first: i32,
    kind: i32,
}

/// `struct Parts`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    parts: u64,
    sums: u64,
    count: i32,
    blocks: i32,
}

/// Tensors one after another, in blocks.
#[derive(Default)]
struct Blocks(usize);

impl Blocks {
    /// The first block of a tensor of `length` elements.
    fn next(&mut self, length: usize) -> Result<i32> {
        let first = self.0;
        self.0 += length.div_ceil(CHUNK);
        if self.0 > MOST {
            return Err(Error::value(
                "parameters in all",
                format!("at most {MOST} blocks of {CHUNK}"),
                self.0,
            ));
        }
        Ok(first as i32)
    }
}

/// The bytes of a table, as it goes to the device.
fn bytes_of<T: Copy>(table: &[T]) -> &[u8] {
    // SAFETY: the structs are `repr(C)` of numbers of whole words: no byte of them is padding.
    unsafe { std::slice::from_raw_parts(table.as_ptr().cast(), size_of_val(table)) }
}

/// Whether the kernels read a tensor of this device and dtype.
pub(super) fn has_kernels(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && kind(tensor.dtype()).is_some()
}

/// `sum x^2` in f64 over tensors that have kernels and lie on one device.
pub(super) fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    let tensors = tensors.iter().filter(|x| x.elem_count() > 0);
    let tensors = tensors.map(|x| contiguous(x)).collect::<Result<Vec<_>>>()?;
    let Some(first) = tensors.first() else { return Ok(0.0) };
    let device = device_of(first)?;
    let stream = device.cuda_stream();
    let held: Vec<Held> = tensors.iter().map(Held::new).collect();
    let (mut guards, mut blocks, mut parts) = (Guards::default(), Blocks::default(), vec![]);
    for (tensor, held) in tensors.iter().zip(&held) {
        let gradient = held.pointer("gradient", &device, &stream, &mut guards)?;
        let length = tensor.elem_count();
        let kind = kind(tensor.dtype()).unwrap_or_default();
        parts.push(Part { gradient, length: length as i64, first: blocks.next(length)?, kind });
    }
    let table = device.clone_htod(bytes_of(&parts))?;
    // SAFETY: the kernels write every element before the last of them is read.
    let mut sums = unsafe { device.alloc::<f64>(blocks.0 + 1)? };
    let mut own = Guards::default();
    let call = Parts {
        parts: own.read(&table, &stream),
        sums: sums.device_ptr_mut(&stream).0,
        count: parts.len() as i32,
        blocks: blocks.0 as i32,
    };
    // SAFETY: the table names tensors that are held, and `sums` has a place for every block and one more.
    unsafe {
        launch(&device, "sum_of_squares", blocks.0, &call)?;
        launch(&device, "sum_of_squares_total", 1, &call)?;
    }
    let total = device.clone_dtoh(&sums.slice(blocks.0..))?;
    Ok(total.first().copied().unwrap_or(f64::NAN))
}

/// `struct Parameter` of `training.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Parameter {
    part: Part,
    weight: u64,
    master: u64,
    first: u64,
    second: u64,
    keep: f32,
    size: f32,
    kind: i32,
    unused: i32,
}

/// `struct AdamW`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct AdamW {
    parameters: u64,
    count: i32,
    scale: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    root_scale: f32,
}

/// Parameters about to be stepped together; what is the same for all of them comes from the first.
#[derive(Default)]
pub(super) struct Update {
    table: Vec<Parameter>,
    blocks: Blocks,
    common: AdamW,
    /// Gradients, and everything that is written.
    gradients: Vec<Tensor>,
    written: Vec<Tensor>,
}

/// A parameter's memory on the device: f32, the master where the weight is narrower.
pub(super) struct Moments<'a> {
    pub(super) first: &'a Tensor,
    pub(super) second: &'a Tensor,
    pub(super) master: Option<&'a Tensor>,
}

impl Update {
    /// Adds a parameter; false where no kernel takes it.
    pub(super) fn push(
        &mut self,
        weight: &Var,
        moments: &Moments,
        gradient: &Tensor,
        step: &Step,
    ) -> Result<bool> {
        let kinds = (kind(weight.dtype()), kind(gradient.dtype()));
        let (Some(own), Some(of_gradient)) = kinds else { return Ok(false) };
        if !weight.device().is_cuda() || (of_gradient != own && of_gradient != 0) {
            return Ok(false);
        }
        if weight.elem_count() == 0 {
            return Ok(true);
        }
        let gradient = contiguous(gradient)?;
        let device = device_of(weight)?;
        let length = weight.elem_count();
        let part =
            Part { gradient: 0, length: length as i64, first: self.blocks.next(length)?, kind: of_gradient };
        let written = [Some(moments.first), Some(moments.second), moments.master, Some(weight.as_tensor())];
        let [first, second, master, weight] = written.map(|x| x.map(|x| Place::of(x, &device)).transpose());
        let place = |place: Result<Option<u64>>| Ok::<u64, Error>(place?.unwrap_or(0));
        self.table.push(Parameter {
            part,
            weight: place(weight)?,
            master: place(master)?,
            first: place(first)?,
            second: place(second)?,
            keep: step.keep as f32,
            size: step.size as f32,
            kind: own,
            unused: 0,
        });
        self.common = AdamW {
            scale: step.gradient_scale as f32,
            beta1: step.beta1 as f32,
            beta2: step.beta2 as f32,
            epsilon: step.epsilon as f32,
            root_scale: step.root_scale as f32,
            ..AdamW::default()
        };
        self.gradients.push(gradient);
        self.written.extend(written.into_iter().flatten().cloned());
        Ok(true)
    }

    /// Steps all of them in one launch.
    pub(super) fn run(mut self) -> Result<()> {
        let Some(first) = self.gradients.first() else { return Ok(()) };
        let device = device_of(first)?;
        let stream = device.cuda_stream();
        {
            let held: Vec<Held> = self.gradients.iter().map(Held::new).collect();
            let mut guards = Guards::default();
            for (parameter, held) in self.table.iter_mut().zip(&held) {
                parameter.part.gradient = held.pointer("AdamW: gradient", &device, &stream, &mut guards)?;
            }
            let table = device.clone_htod(bytes_of(&self.table))?;
            let mut own = Guards::default();
            let call = AdamW {
                parameters: own.read(&table, &stream),
                count: self.table.len() as i32,
                ..self.common
            };
            // SAFETY: the table names gradients that are held, and parameters and moments of the same lengths that
            // `written` keeps alive and nobody else writes: the optimiser is borrowed mutably.
            unsafe { launch(&device, "adamw", self.blocks.0, &call)? };
        }
        // what was written is new for other streams from here on
        self.written.iter().try_for_each(|x| Place::of(x, &device).map(|_| ()))
    }
}

/// Where a tensor that is about to be written lies.
#[derive(Default)]
struct Place(Mutex<u64>);

impl Place {
    fn of(tensor: &Tensor, device: &CudaDevice) -> Result<u64> {
        let own = tensor.device();
        if !own.same_device(&candle_core::Device::Cuda(device.clone())) {
            let place = format!("{:?}", own.location());
            return Err(Error::value("AdamW: device of a parameter", "that of the others", place));
        }
        let place = Self::default();
        tensor.inplace_op1(&place)?;
        Ok(place.0.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

fn address<T: CudaDType>(storage: &mut CudaStorage) -> candle_core::Result<u64> {
    let stream = storage.device().cuda_stream();
    Ok(T::as_cuda_slice_mut(storage)?.device_ptr_mut(&stream).0)
}

impl InplaceOp1 for Place {
    fn name(&self) -> &'static str {
        "place"
    }
    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("expected a tensor on CUDA")
    }
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let Some((start, _)) = layout.contiguous_offsets() else {
            candle_core::bail!("expected a contiguous tensor, got strides {:?}", layout.stride())
        };
        let dtype = storage.dtype();
        let first = match dtype {
            DType::F32 => address::<f32>(storage)?,
            DType::BF16 => address::<bf16>(storage)?,
            DType::F16 => address::<f16>(storage)?,
            other => candle_core::bail!("expected f32, bf16 or f16, got {other:?}"),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            first + (start * dtype.size_in_bytes()) as u64;
        Ok(())
    }
}
