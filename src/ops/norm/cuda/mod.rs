//! The CUDA path: a team of threads per group of a row, its values in registers; see `kernels/norm.cu`. Norms of heads that a
//! gate follows have kernels of their own, in [`heads`].

mod heads;
mod plan;

use self::plan::{ACCESS, LANES, MOST, Plan, THREADS};
use super::{Norm, NormInput, NormKind};
use crate::autograd::{Gradients, record_all};
use crate::backend::cuda::{
    Argument, Buffer, Element, Guards, Held, Launch, Module, Packed, contiguous, device_of, multiprocessors,
    with_unit_stride, within,
};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, DType, Tensor};
use half::{bf16, f16};

/// Blocks of a pass for each multiprocessor: forward as many as rows take, within bounds; backward as run at a time, for each
/// leaves shares of the gradients of weight and bias.
const FORWARD_BLOCKS: usize = 64;
const BACKWARD_BLOCKS: usize = 2;
/// Threads of a block of `norm_sum`.
const SUM_THREADS: usize = 1024;

/// `struct Rows` of `norm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Rows {
    data: u64,
    outer_step: i64,
    inner_step: i32,
}

/// `struct Norm` of `norm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Call {
    x: Rows,
    residual: Rows,
    z: Rows,
    y: Rows,
    sum: Rows,
    dy: Rows,
    dsum: Rows,
    dx: Rows,
    dresidual: Rows,
    dz: Rows,
    weight: u64,
    bias: u64,
    shares: u64,
    rows: i64,
    inner: i32,
    channels: i32,
    group: i32,
    layer: i32,
    outside: i32,
    rounds: i32,
    gate_after: i32,
    eps: f32,
}

/// Norm and sum of checked arguments on CUDA; `None` where no kernel takes them.
pub(super) fn on_cuda(
    name: &'static str,
    input: &NormInput,
    norm: &Norm,
    group: usize,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    // kernels stage one of the two
    if input.residual.is_some() && input.z.is_some() {
        return Ok(None);
    }
    let run = match (input.x.dtype(), input.residual.map(Tensor::dtype)) {
        (DType::F32, _) => recorded::<f32, f32>,
        (DType::BF16, Some(DType::F32)) => recorded::<bf16, f32>,
        (DType::BF16, _) => recorded::<bf16, bf16>,
        (DType::F16, Some(DType::F32)) => recorded::<f16, f32>,
        (DType::F16, _) => recorded::<f16, f16>,
        _ => return Ok(None),
    };
    if let Some(y) = heads::on_cuda(name, input, norm, group)? {
        return Ok(Some((y, None)));
    }
    let rows = input.x.elem_count() / input.x.dims().last().copied().unwrap_or(1).max(1);
    if rows == 0 || rows > i32::MAX as usize {
        return Ok(None);
    }
    within(|| format!("{name} of {:?}", input.x.dims()), run(name, input, norm, group))
}

/// The arguments, detached: sequences whose rows lie in two steps, parameters in f32.
struct Saved {
    name: &'static str,
    x: Tensor,
    residual: Option<Tensor>,
    z: Option<Tensor>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    gate_after: bool,
    kind: NormKind,
    eps: f64,
    group: usize,
}

/// A tensor of which the kernels can address the rows: unit stride, and at most two dimensions of rows unless contiguous.
fn addressable(x: &Tensor) -> Result<Tensor> {
    let x = x.detach();
    let near = x.stride().iter().all(|stride| *stride <= i32::MAX as usize);
    if x.is_contiguous() || x.rank() <= 3 && near { with_unit_stride(&x) } else { Ok(x.contiguous()?) }
}

impl Saved {
    fn new(name: &'static str, input: &NormInput, norm: &Norm, group: usize) -> Result<Self> {
        let sequence = |x: Option<&Tensor>| x.map(addressable).transpose();
        let wide = |x: Option<&Tensor>| x.map(|x| contiguous(&x.detach().to_dtype(DType::F32)?)).transpose();
        Ok(Self {
            name,
            x: addressable(input.x)?,
            residual: sequence(input.residual)?,
            z: sequence(input.z)?,
            weight: wide(norm.weight)?,
            bias: wide(norm.bias)?,
            gate_after: input.norm_before_gate,
            kind: norm.kind,
            eps: norm.eps,
            group,
        })
    }

    fn channels(&self) -> usize {
        self.x.dims().last().copied().unwrap_or(1)
    }

    fn rows(&self) -> usize {
        self.x.elem_count() / self.channels()
    }

    /// Rows of the innermost of two steps.
    fn inner(&self) -> usize {
        match self.x.dims() {
            [_, inner, _] => *inner,
            _ => self.rows(),
        }
    }

    fn contiguous(&self, data: u64) -> Rows {
        let step = self.channels() as i32;
        Rows { data, outer_step: i64::from(step) * self.inner() as i64, inner_step: step }
    }

    /// Whether a tensor can be read `width` channels at once, wherever a row begins.
    fn aligned(x: &Tensor, width: usize) -> bool {
        let (offset, strides) = (x.layout().start_offset(), x.stride());
        offset.is_multiple_of(width)
            && strides.iter().rev().skip(1).all(|stride| stride.is_multiple_of(width))
    }

    /// How both passes go; `None` where no kernel takes the call.
    fn plan(&self) -> Option<Plan> {
        let bytes = self.x.dtype().size_in_bytes();
        let tensors = [Some(&self.x), self.residual.as_ref(), self.z.as_ref()];
        let aligned = tensors.into_iter().flatten().all(|x| Self::aligned(x, ACCESS / bytes));
        Plan::new(self.channels(), self.group, bytes, aligned)
    }

    /// A gradient that the kernels of `plan` can read.
    fn readable(gradient: Option<&Tensor>, plan: Plan) -> Result<Option<Tensor>> {
        let Some(gradient) = gradient.map(addressable).transpose()? else { return Ok(None) };
        let fits = Self::aligned(&gradient, plan.width);
        Ok(Some(if fits { gradient } else { gradient.force_contiguous()? }))
    }

    /// The arguments that both passes share.
    fn call<'s>(
        &self,
        locks: &'s Locks<'_>,
        device: &CudaDevice,
        stream: &'s CudaStream,
        guards: &mut Guards<'s>,
    ) -> Result<Call> {
        let mut pointer = |argument: &str, held: &'s Option<(&Tensor, Held)>| match held {
            Some((_, held)) => held.pointer(&format!("{}: {argument}", self.name), device, stream, guards),
            None => Ok(0),
        };
        // whether the rows of all tensors lie in one step, which spares the kernels a division
        let mut even = true;
        let mut rows = |argument: &str, held: &'s Option<(&Tensor, Held)>| {
            let data = pointer(argument, held)?;
            let Some((tensor, _)) = held else { return Ok::<_, Error>(Rows::default()) };
            Ok(match *tensor.stride() {
                [outer, inner, _] => {
                    even &= outer == inner * self.inner();
                    Rows { data, outer_step: outer as i64, inner_step: inner as i32 }
                }
                [inner, _] => Rows { data, outer_step: 0, inner_step: inner as i32 },
                _ => self.contiguous(data),
            })
        };
        let mut call = Call {
            x: rows("x", &locks.x)?,
            residual: rows("residual", &locks.residual)?,
            z: rows("z", &locks.z)?,
            dy: rows("gradient", &locks.dy)?,
            dsum: rows("gradient of the sum", &locks.dsum)?,
            rows: self.rows() as i64,
            inner: self.inner() as i32,
            channels: self.channels() as i32,
            group: self.group as i32,
            layer: (self.kind == NormKind::Layer) as i32,
            outside: (self.kind == NormKind::RmsOutside) as i32,
            rounds: (self.kind != NormKind::Layer && self.z.is_none()) as i32,
            gate_after: self.gate_after as i32,
            eps: self.eps as f32,
            ..Call::default()
        };
        if even {
            call.inner = call.rows as i32;
        }
        call.weight = pointer("weight", &locks.weight)?;
        call.bias = pointer("bias", &locks.bias)?;
        Ok(call)
    }

    fn locks<'a>(&'a self, dy: Option<&'a Tensor>, dsum: Option<&'a Tensor>) -> Locks<'a> {
        let held = |x: Option<&'a Tensor>| x.map(|x| (x, Held::new(x)));
        Locks {
            x: held(Some(&self.x)),
            residual: held(self.residual.as_ref()),
            z: held(self.z.as_ref()),
            weight: held(self.weight.as_ref()),
            bias: held(self.bias.as_ref()),
            dy: held(dy),
            dsum: held(dsum),
        }
    }

    fn forward<E: Element, R: Element>(&self, plan: Plan) -> Result<(Buffer<E>, Option<Buffer<R>>)> {
        let device = &device_of(&self.x)?;
        let stream = device.cuda_stream();
        let mut y = Buffer::<E>::new(device, self.x.elem_count())?;
        let mut sum = self.residual.as_ref().map(|x| Buffer::<R>::new(device, x.elem_count())).transpose()?;
        let locks = self.locks(None, None);
        {
            let guards = &mut Guards::default();
            let mut call = self.call(&locks, device, &stream, guards)?;
            call.y = self.contiguous(y.pointer(&stream, guards));
            call.sum =
                sum.as_mut().map_or(Rows::default(), |sum| self.contiguous(sum.pointer(&stream, guards)));
            let blocks = self.blocks(plan, multiprocessors(device)? * FORWARD_BLOCKS);
            // SAFETY: pointers and steps of tensors whose shapes were checked, and buffers of the same shape.
            unsafe { self.launch::<E, R>(device, plan, "fwd", blocks, call)? };
        }
        Ok((y, sum))
    }

    fn blocks(&self, plan: Plan, most: usize) -> [usize; 3] {
        [self.rows().div_ceil(plan.rows()).min(most), self.channels() / self.group, 1]
    }

    /// # Safety
    /// As [`Launch::run`].
    unsafe fn launch<E: Element, R: Element>(
        &self,
        device: &CudaDevice,
        plan: Plan,
        pass: &str,
        grid: [usize; 3],
        call: Call,
    ) -> Result<()> {
        let what = &format!("{} of {:?}", self.name, self.x.dims());
        let launch = Launch {
            what,
            device,
            module: Module::Norm,
            kernel: &plan.kernel::<E, R>(pass),
            grid,
            threads: THREADS as u32,
            dynamic: true,
        };
        // SAFETY: the caller's promise.
        unsafe { launch.run(&[&Packed(call)]) }
    }

    /// The gradients of `x`, residual, `z`, weight and bias, as far as they are there.
    fn backward<E: Element, R: Element>(
        &self,
        plan: Plan,
        dy: Option<&Tensor>,
        dsum: Option<&Tensor>,
    ) -> Result<Gradients> {
        let device = &device_of(&self.x)?;
        let stream = device.cuda_stream();
        let (dy, dsum) = (Self::readable(dy, plan)?, Self::readable(dsum, plan)?);
        let (elements, channels) = (self.x.elem_count(), self.channels());
        let mut dx = Buffer::<E>::new(device, elements)?;
        let mut dresidual = self.residual.as_ref().map(|_| Buffer::<R>::new(device, elements)).transpose()?;
        let mut dz = self.z.as_ref().map(|_| Buffer::<E>::new(device, elements)).transpose()?;
        let grid = self.blocks(plan, multiprocessors(device)? * BACKWARD_BLOCKS);
        let mut shares = Buffer::<f32>::new(device, grid[0] * 2 * channels)?;
        let mut total = Buffer::<f32>::new(device, 2 * channels)?;
        let locks = self.locks(dy.as_ref(), dsum.as_ref());
        {
            let guards = &mut Guards::default();
            let mut call = self.call(&locks, device, &stream, guards)?;
            call.dx = self.contiguous(dx.pointer(&stream, guards));
            if let Some(dresidual) = &mut dresidual {
                call.dresidual = self.contiguous(dresidual.pointer(&stream, guards));
            }
            if let Some(dz) = &mut dz {
                call.dz = self.contiguous(dz.pointer(&stream, guards));
            }
            call.shares = shares.pointer(&stream, guards);
            let total = total.pointer(&stream, guards);
            // SAFETY: pointers and steps of tensors whose shapes were checked, and buffers of the sizes that are filled.
            unsafe {
                self.launch::<E, R>(device, plan, "bwd", grid, call)?;
                add_shares(self.name, device, total, call.shares, grid[0], 2 * channels)?;
            }
        }
        let shape = self.x.shape();
        let total = total.tensor(device, (2, channels));
        let mut gradients = vec![Some(dx.tensor(device, shape))];
        gradients.extend(dresidual.map(|dresidual| Some(dresidual.tensor(device, shape))));
        gradients.extend(dz.map(|dz| Some(dz.tensor(device, shape))));
        for (row, parameter) in [(0, &self.weight), (1, &self.bias)] {
            if parameter.is_some() {
                gradients.push(Some(total.get(row)?));
            }
        }
        Ok(gradients)
    }
}

/// Adds up `count` shares of `size` numbers.
///
/// # Safety
/// The shares are there, and room for their sum.
unsafe fn add_shares(
    what: &str,
    device: &CudaDevice,
    total: u64,
    shares: u64,
    count: usize,
    size: usize,
) -> Result<()> {
    let launch = Launch {
        what,
        device,
        module: Module::Norm,
        kernel: "norm_sum",
        grid: [size.div_ceil(LANES), 1, 1],
        threads: SUM_THREADS as u32,
        dynamic: false,
    };
    let arguments: [&dyn Argument; 4] = [&total, &shares, &(count as i32), &(size as i32)];
    // SAFETY: the caller's promise.
    unsafe { launch.run(&arguments) }
}

/// The tensors of a call, held.
struct Locks<'a> {
    x: Option<(&'a Tensor, Held<'a>)>,
    residual: Option<(&'a Tensor, Held<'a>)>,
    z: Option<(&'a Tensor, Held<'a>)>,
    weight: Option<(&'a Tensor, Held<'a>)>,
    bias: Option<(&'a Tensor, Held<'a>)>,
    dy: Option<(&'a Tensor, Held<'a>)>,
    dsum: Option<(&'a Tensor, Held<'a>)>,
}

fn recorded<E: Element, R: Element>(
    name: &'static str,
    input: &NormInput,
    norm: &Norm,
    group: usize,
) -> Result<Option<(Tensor, Option<Tensor>)>> {
    let saved = Saved::new(name, input, norm, group)?;
    let Some(plan) = saved.plan() else { return Ok(None) };
    let (y, sum) = saved.forward::<E, R>(plan)?;
    let (device, shape) = (device_of(input.x)?, input.x.shape());
    let mut inputs = vec![input.x];
    inputs.extend([input.residual, input.z, norm.weight, norm.bias].into_iter().flatten());
    let dtypes: Vec<DType> = inputs.iter().map(|x| x.dtype()).collect();
    let mut outputs = vec![(y.storage(&device), shape.clone())];
    outputs.extend(sum.map(|sum| (sum.storage(&device), shape.clone())));
    let outputs = record_all(name, &inputs, outputs, move |gradients| {
        let dsum = gradients.get(1).and_then(Option::as_ref);
        let dy = gradients.first().and_then(Option::as_ref);
        let what = || format!("{name} of {:?}, backward", saved.x.dims());
        let gradients = within(what, saved.backward::<E, R>(plan, dy, dsum))?;
        let own =
            |(gradient, dtype): (Option<Tensor>, &DType)| gradient.map(|x| x.to_dtype(*dtype)).transpose();
        gradients.into_iter().zip(&dtypes).map(own).collect()
    })?;
    let mut outputs = outputs.into_iter();
    let y = outputs.next().ok_or_else(|| Error::value(name, "a result", "none"))?;
    Ok(Some((y, outputs.next())))
}
