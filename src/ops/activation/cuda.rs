//! The CUDA path: one read and one write, forward and backward; see `kernels/activation.cu`.

use super::Activation;
use crate::Result;
use crate::autograd::{Gradients, record};
use crate::backend::cuda::{
    Buffer, Element, Guards, Held, Launch, Module, Packed, device_of, multiprocessors, within,
};
use candle_core::{DType, Tensor};
use half::{bf16, f16};

const THREADS: usize = 256;
/// Blocks of a grid for each multiprocessor.
const BLOCKS: usize = 16;
/// Bytes of one access.
const ACCESS: usize = 16;
/// The most pieces that kernels count.
const MOST: usize = 1 << 31;

/// `struct Matrix` of `activation.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Matrix {
    data: u64,
    step: i64,
}

/// `struct Call` of `activation.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Call {
    x: Matrix,
    z: Matrix,
    y: Matrix,
    dy: Matrix,
    dx: Matrix,
    dz: Matrix,
    pieces: u32,
    count: u32,
    width: i32,
}

/// `x act(z)`, or `act(x)`, of checked arguments; `None` where no kernel takes them.
pub(super) fn on_cuda(activation: Activation, x: &Tensor, z: Option<&Tensor>) -> Result<Option<Tensor>> {
    let run = match x.dtype() {
        DType::F32 => recorded::<f32>,
        DType::BF16 => recorded::<bf16>,
        DType::F16 => recorded::<f16>,
        _ => return Ok(None),
    };
    if x.rank() == 0 || x.elem_count() == 0 || x.elem_count() >= MOST {
        return Ok(None);
    }
    within(|| format!("{} of {:?}", activation.name(), x.dims()), run(activation, x, z)).map(Some)
}

/// The arguments, detached, as rows one step apart.
struct Saved {
    activation: Activation,
    x: Tensor,
    z: Option<Tensor>,
}

fn recorded<E: Element>(activation: Activation, x: &Tensor, z: Option<&Tensor>) -> Result<Tensor> {
    let saved = Saved { activation, x: rows(x)?, z: z.map(rows).transpose()? };
    let (device, shape) = (device_of(x)?, x.shape().clone());
    let y = saved.launch::<E>(None)?;
    let y = y.into_iter().map(|y| (y.storage(&device), shape.clone())).next();
    let y = y.ok_or_else(|| crate::Error::value(activation.name(), "a result", "none"))?;
    let mut inputs = vec![x];
    inputs.extend(z);
    let [y] = record(activation.name(), &inputs, [y], move |[dy]| {
        let Some(dy) = dy else { return Ok(vec![None; 1 + saved.z.is_some() as usize]) };
        let what = || format!("{} of {:?}, backward", saved.activation.name(), dy.dims());
        let gradients = within(what, saved.launch::<E>(Some(&rows(dy)?)))?;
        Ok(gradients.into_iter().map(|d| Some(d.tensor(&device, &shape))).collect::<Gradients>())
    })?;
    Ok(y)
}

/// A tensor whose rows lie one step apart: itself, or a contiguous copy.
fn rows(x: &Tensor) -> Result<Tensor> {
    let x = x.detach();
    let (dims, strides) = (x.dims(), x.stride());
    let outer = dims.len() - 1;
    // dimensions before the last one that are not one after another
    let even = (1..outer).all(|i| strides[i - 1] == strides[i] * dims[i] || dims[i - 1] == 1);
    Ok(if strides[outer] == 1 && even { x } else { x.contiguous()? })
}

/// The step from row to row.
fn step(x: &Tensor) -> usize {
    match x.rank() {
        0 | 1 => x.elem_count(),
        rank if x.is_contiguous() => x.dims()[rank - 1],
        rank => x.stride()[rank - 2],
    }
}

impl Saved {
    /// The result, or with the gradient `dy` of it those of `x` and `z`.
    fn launch<E: Element>(&self, dy: Option<&Tensor>) -> Result<Vec<Buffer<E>>> {
        let device = &device_of(&self.x)?;
        let (stream, elements) = (device.cuda_stream(), self.x.elem_count());
        let read = [Some(&self.x), self.z.as_ref(), dy];
        let contiguous = read.iter().flatten().all(|x| x.is_contiguous());
        // all of it is one row where nothing lies between rows
        let width = if contiguous { elements } else { self.x.dims().last().copied().unwrap_or(1) };
        let results = if dy.is_some() { 1 + self.z.is_some() as usize } else { 1 };
        let mut buffers: Vec<Buffer<E>> =
            (0..results).map(|_| Buffer::new(device, elements)).collect::<Result<_>>()?;
        let held = read.map(|x| x.map(|x| (x, Held::new(x))));
        {
            let guards = &mut Guards::default();
            let per_access = ACCESS / size_of::<E>();
            let mut aligned = width.is_multiple_of(per_access);
            let mut matrices = [Matrix::default(); 3];
            for (matrix, held) in matrices.iter_mut().zip(&held) {
                let Some((x, held)) = held else { continue };
                let data = held.pointer(self.activation.name(), device, &stream, guards)?;
                let step = if contiguous { width } else { step(x) };
                aligned &= data.is_multiple_of(ACCESS as u64) && step.is_multiple_of(per_access);
                *matrix = Matrix { data, step: step as i64 };
            }
            let mut made =
                buffers.iter_mut().map(|y| Matrix { data: y.pointer(&stream, guards), step: width as i64 });
            let [x, z, dy_matrix] = matrices;
            let piece = if aligned { per_access } else { 1 };
            let mut call = Call {
                x,
                z,
                pieces: (width / piece) as u32,
                count: (elements / piece) as u32,
                width: width.min(i32::MAX as usize) as i32,
                ..Call::default()
            };
            let mut next = || made.next().unwrap_or_default();
            match dy {
                Some(_) => (call.dy, call.dx, call.dz) = (dy_matrix, next(), next()),
                None => call.y = next(),
            }
            let pass = if dy.is_some() { "bwd" } else { "fwd" };
            let size = if aligned { "pieces" } else { "singles" };
            let blocks = (elements / piece).div_ceil(THREADS).min(multiprocessors(device)? * BLOCKS);
            let launch = Launch {
                what: self.activation.name(),
                device,
                module: Module::Activation,
                kernel: &format!(
                    "activation_{pass}_{}_{size}_{}",
                    E::NAME,
                    self.activation.name().to_uppercase()
                ),
                grid: [blocks, 1, 1],
                threads: THREADS as u32,
                dynamic: false,
            };
            // SAFETY: pointers and steps of tensors of one shape, and buffers of the same.
            unsafe { launch.run(&[&Packed(call)])? };
        }
        Ok(buffers)
    }
}
