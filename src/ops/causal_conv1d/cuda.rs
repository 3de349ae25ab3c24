//! The CUDA path: vectors of channels walk strips of tokens; see `kernels/causal_conv1d.cu`.

use super::{CausalConv1d, Sizes};
use crate::autograd::{Gradients, record};
use crate::backend::cuda::{
    Argument, Buffer, Element, Guards, Held, Launch, Module, Packed, contiguous, device_of, multiprocessors,
    with_unit_stride, within,
};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, DType, Tensor};
use half::{bf16, f16};

/// Threads of a block, lanes of a warp, and channels of one access, as the kernels have them.
const THREADS: usize = 128;
const LANES: usize = 32;
const WIDTH: usize = 4;
/// Columns that a block of the sum adds up.
const SUM_COLUMNS: usize = 32;
/// Filters with up to as many taps have kernels.
const TAPS: [usize; 3] = [2, 4, 8];
/// Tokens of a strip: as many as still leave each multiprocessor some blocks, in whole groups of tokens. A block has one strip
/// forward, and one for each of its warps backward, whose shares of the gradients are fewer the longer strips are.
const FORWARD_STRIPS: [usize; 3] = [32, 16, 8];
const BACKWARD_STRIPS: [usize; 4] = [128, 64, 32, 16];
const GROUP: usize = 4;
const FORWARD_BLOCKS: usize = 4;
const BACKWARD_BLOCKS: usize = 2;
/// The most blocks of a grid's second and third dimension.
const MOST_BLOCKS: usize = 65_535;

/// How a call is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    taps: usize,
    width: usize,
    strip: usize,
    /// Blocks of channels, rows, and blocks of strips.
    grid: [usize; 3],
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

impl Plan {
    /// For a device of `count` multiprocessors; `None` where no kernel takes the call.
    fn new(sizes: &Sizes, aligned: bool, pass: Pass, count: usize) -> Option<Self> {
        let Sizes { batch, length, channels, taps } = *sizes;
        let taps = TAPS.into_iter().find(|most| *most >= taps)?;
        let width = if aligned && channels.is_multiple_of(WIDTH) { WIDTH } else { 1 };
        if batch * length * channels == 0 || batch > MOST_BLOCKS || length >= i32::MAX as usize / 2 {
            return None;
        }
        let (strips, enough, lanes) = match pass {
            Pass::Forward => (&FORWARD_STRIPS[..], FORWARD_BLOCKS, THREADS),
            Pass::Backward => (&BACKWARD_STRIPS[..], BACKWARD_BLOCKS, LANES),
        };
        let (columns, together) = ((channels / width).div_ceil(lanes), THREADS / lanes);
        let blocks = |strip: usize| length.div_ceil(strip * together);
        let fitting = strips.iter().find(|strip| blocks(**strip) * columns * batch >= count * enough);
        let strip = fitting.or(strips.last()).copied().unwrap_or(GROUP);
        let strip = strip.max(length.div_ceil(MOST_BLOCKS).next_multiple_of(GROUP));
        Some(Self { taps, width, strip, grid: [columns, batch, blocks(strip)] })
    }

    fn kernel<E: Element>(&self, pass: &str) -> String {
        format!("causal_conv1d_{pass}_{}_{}_{}", E::NAME, self.taps, self.width)
    }
}

/// `struct Sequence` of `causal_conv1d.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Sequence {
    data: u64,
    row: i64,
    token: i64,
}

/// `struct Conv` of `causal_conv1d.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Call {
    x: Sequence,
    y: Sequence,
    dy: Sequence,
    dx: Sequence,
    weight: u64,
    bias: u64,
    initial: u64,
    dfinal: u64,
    last: u64,
    dinitial: u64,
    shares: u64,
    marks: u64,
    length: i32,
    channels: i32,
    taps: i32,
    strip: i32,
    silu: i32,
    wide_weight: i32,
    wide_bias: i32,
}

/// Output and final state, tracked; `None` where no kernel takes the call.
pub(super) fn on_cuda(args: &CausalConv1d, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let what = || format!("causal_conv1d of {:?}, K = {}", args.x.dims(), sizes.taps);
    within(what, filtered(args, sizes))
}

fn filtered(args: &CausalConv1d, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let f64s = [Some(args.weight), args.bias, args.initial_state].into_iter().flatten();
    if f64s.into_iter().any(|x| x.dtype() == DType::F64) {
        return Ok(None);
    }
    match args.x.dtype() {
        DType::F32 => recorded::<f32>(args, sizes),
        DType::BF16 => recorded::<bf16>(args, sizes),
        DType::F16 => recorded::<f16>(args, sizes),
        _ => Ok(None),
    }
}

/// The arguments, detached: `x` with unit stride; weight and bias contiguous, in f32 or the dtype of `x`; the state in f32.
struct Saved {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    marks: Option<Tensor>,
    silu: bool,
    sizes: Sizes,
}

fn aligned(x: &Tensor) -> bool {
    let [row, token] = [x.stride()[0], x.stride()[1]];
    [x.layout().start_offset(), row, token].iter().all(|n| n.is_multiple_of(WIDTH))
}

fn strided(x: &Tensor) -> Result<Tensor> {
    with_unit_stride(&x.detach())
}

impl Saved {
    fn new(args: &CausalConv1d, sizes: Sizes) -> Result<Self> {
        let wide = |x: &Tensor| contiguous(&x.detach().to_dtype(DType::F32)?);
        let own = |x: &Tensor| if x.dtype() == args.x.dtype() { contiguous(&x.detach()) } else { wide(x) };
        Ok(Self {
            x: strided(args.x)?,
            weight: own(args.weight)?,
            bias: args.bias.map(own).transpose()?,
            initial_state: args.initial_state.map(wide).transpose()?,
            marks: args.segments.map(|segments| segments.marks(args.x.device())).transpose()?,
            silu: args.silu,
            sizes,
        })
    }

    fn contiguous(&self, data: u64) -> Sequence {
        let Sizes { length, channels, .. } = self.sizes;
        Sequence { data, row: (length * channels) as i64, token: channels as i64 }
    }

    fn locks<'a>(&'a self, dy: Option<&'a Tensor>, dfinal: Option<&'a Tensor>) -> Locks<'a> {
        let held = |x: Option<&'a Tensor>| x.map(Held::new);
        Locks {
            x: Held::new(&self.x),
            weight: Held::new(&self.weight),
            bias: held(self.bias.as_ref()),
            initial_state: held(self.initial_state.as_ref()),
            marks: held(self.marks.as_ref()),
            dy: dy.map(|dy| (dy, Held::new(dy))),
            dfinal: held(dfinal),
        }
    }

    /// The arguments that both passes share.
    fn call<'s>(
        &self,
        locks: &'s Locks<'_>,
        plan: Plan,
        device: &CudaDevice,
        stream: &'s CudaStream,
        guards: &mut Guards<'s>,
    ) -> Result<Call> {
        let mut pointer = |name: &str, held: Option<&'s Held>| match held {
            Some(held) => held.pointer(&format!("causal_conv1d: {name}"), device, stream, guards),
            None => Ok(0),
        };
        let sequence =
            |data, x: &Tensor| Sequence { data, row: x.stride()[0] as i64, token: x.stride()[1] as i64 };
        let dy = match &locks.dy {
            Some((dy, held)) => sequence(pointer("gradient", Some(held))?, dy),
            None => Sequence::default(),
        };
        Ok(Call {
            x: sequence(pointer("x", Some(&locks.x))?, &self.x),
            dy,
            weight: pointer("weight", Some(&locks.weight))?,
            bias: pointer("bias", locks.bias.as_ref())?,
            initial: pointer("initial_state", locks.initial_state.as_ref())?,
            dfinal: pointer("gradient of the state", locks.dfinal.as_ref())?,
            marks: pointer("segments", locks.marks.as_ref())?,
            length: self.sizes.length as i32,
            channels: self.sizes.channels as i32,
            taps: self.sizes.taps as i32,
            strip: plan.strip as i32,
            silu: self.silu as i32,
            wide_weight: (self.weight.dtype() == DType::F32) as i32,
            wide_bias: self.bias.as_ref().is_some_and(|bias| bias.dtype() == DType::F32) as i32,
            ..Call::default()
        })
    }

    /// # Safety
    /// As [`Launch::run`].
    unsafe fn launch(
        &self,
        device: &CudaDevice,
        kernel: &str,
        grid: [usize; 3],
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        let what = &format!("causal_conv1d of {:?}, K = {}", self.x.dims(), self.sizes.taps);
        let launch = Launch {
            what,
            device,
            module: Module::CausalConv1d,
            kernel,
            grid,
            threads: THREADS as u32,
            dynamic: false,
        };
        // SAFETY: the caller's promise.
        unsafe { launch.run_early(arguments) }
    }

    fn forward<E: Element>(&self, plan: Plan) -> Result<(Buffer<E>, Buffer<f32>)> {
        let Sizes { batch, channels, taps, .. } = self.sizes;
        let device = &device_of(&self.x)?;
        let stream = device.cuda_stream();
        let mut y = Buffer::<E>::new(device, self.x.elem_count())?;
        let mut last = Buffer::<f32>::new(device, batch * channels * (taps - 1))?;
        let locks = self.locks(None, None);
        {
            let guards = &mut Guards::default();
            let mut call = self.call(&locks, plan, device, &stream, guards)?;
            call.y = self.contiguous(y.pointer(&stream, guards));
            call.last = last.pointer(&stream, guards);
            // SAFETY: pointers and steps of tensors whose shapes were checked, and buffers of the sizes that are filled.
            unsafe { self.launch(device, &plan.kernel::<E>("fwd"), plan.grid, &[&Packed(call)])? };
        }
        Ok((y, last))
    }

    /// The gradients of `x`, weight, bias and initial state, as far as they are there.
    fn backward<E: Element>(&self, dy: Option<&Tensor>, dfinal: Option<&Tensor>) -> Result<Gradients> {
        let Sizes { batch, length, channels, taps } = self.sizes;
        let device = &device_of(&self.x)?;
        let stream = device.cuda_stream();
        let dy = dy.map_or_else(|| Ok(self.x.zeros_like()?), strided)?;
        let dfinal = dfinal.map(|dfinal| dfinal.detach().contiguous()).transpose()?;
        let plan = self.plan(aligned(&self.x) && aligned(&dy), Pass::Backward, device)?;
        let plan =
            plan.ok_or_else(|| Error::value("causal_conv1d", "a shape that forward took", "another"))?;
        let (states, size) = (batch * channels * (taps - 1), (taps + 1) * channels);
        let count = plan.grid[2] * batch;
        let mut dx = Buffer::<E>::new(device, batch * length * channels)?;
        let mut dinitial = Buffer::<f32>::new(device, states)?;
        let mut shares = Buffer::<f32>::new(device, count * size)?;
        let (mut dweight, mut dbias) =
            (Buffer::<f32>::new(device, taps * channels)?, Buffer::<f32>::new(device, channels)?);
        let locks = self.locks(Some(&dy), dfinal.as_ref());
        {
            let guards = &mut Guards::default();
            let mut call = self.call(&locks, plan, device, &stream, guards)?;
            call.dx = self.contiguous(dx.pointer(&stream, guards));
            call.dinitial = dinitial.pointer(&stream, guards);
            call.shares = shares.pointer(&stream, guards);
            let (dweight, dbias) = (dweight.pointer(&stream, guards), dbias.pointer(&stream, guards));
            let [count, channels, taps] = [count, channels, taps].map(|n| n as i32);
            let arguments: [&dyn Argument; 6] = [&dweight, &dbias, &call.shares, &count, &channels, &taps];
            // SAFETY: pointers and steps of tensors whose shapes were checked, and buffers of the sizes that are filled.
            unsafe {
                self.launch(device, &plan.kernel::<E>("bwd"), plan.grid, &[&Packed(call)])?;
                self.launch(device, "causal_conv1d_sum", [size.div_ceil(SUM_COLUMNS), 1, 1], &arguments)?;
            }
        }
        let mut gradients = vec![
            Some(dx.tensor(device, (batch, length, channels))),
            Some(dweight.tensor(device, self.weight.shape())),
        ];
        gradients.extend(self.bias.as_ref().map(|_| Some(dbias.tensor(device, channels))));
        let shape = (batch, channels, taps - 1);
        gradients.extend(self.initial_state.as_ref().map(|_| Some(dinitial.tensor(device, shape))));
        Ok(gradients)
    }

    fn plan(&self, aligned: bool, pass: Pass, device: &CudaDevice) -> Result<Option<Plan>> {
        Ok(Plan::new(&self.sizes, aligned, pass, multiprocessors(device)?))
    }
}

/// The tensors of a call, held.
struct Locks<'a> {
    x: Held<'a>,
    weight: Held<'a>,
    bias: Option<Held<'a>>,
    initial_state: Option<Held<'a>>,
    marks: Option<Held<'a>>,
    dy: Option<(&'a Tensor, Held<'a>)>,
    dfinal: Option<Held<'a>>,
}

fn recorded<E: Element>(args: &CausalConv1d, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let device = device_of(args.x)?;
    let saved = Saved::new(args, sizes)?;
    let Some(plan) = saved.plan(aligned(&saved.x), Pass::Forward, &device)? else { return Ok(None) };
    // backward may have to read unaligned gradients
    if saved.plan(false, Pass::Backward, &device)?.is_none() {
        return Ok(None);
    }
    let (y, last) = saved.forward::<E>(plan)?;
    let mut inputs = vec![args.x, args.weight];
    inputs.extend([args.bias, args.initial_state].into_iter().flatten());
    let dtypes: Vec<DType> = inputs.iter().map(|x| x.dtype()).collect();
    let outputs = [
        (y.storage(&device), args.x.shape().clone()),
        (last.storage(&device), (sizes.batch, sizes.channels, sizes.taps - 1).into()),
    ];
    let [y, state] = record("causal_conv1d", &inputs, outputs, move |[dy, dfinal]| {
        let what = || format!("causal_conv1d of {:?}, backward", saved.x.dims());
        let gradients = within(what, saved.backward::<E>(dy, dfinal))?;
        let own =
            |(gradient, dtype): (Option<Tensor>, &DType)| gradient.map(|x| x.to_dtype(*dtype)).transpose();
        gradients.into_iter().zip(&dtypes).map(own).collect()
    })?;
    Ok(Some((y, state)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_are_long_where_there_are_many() {
        let plan = |batch, length, channels, taps, pass| {
            let sizes = Sizes { batch, length, channels, taps };
            Plan::new(&sizes, true, pass, 132).map(|plan| (plan.taps, plan.width, plan.strip, plan.grid))
        };
        assert_eq!(plan(8, 2048, 1536, 4, Pass::Forward), Some((4, 4, 32, [3, 8, 64])));
        assert_eq!(plan(2, 8192, 5120, 4, Pass::Forward), Some((4, 4, 32, [10, 2, 256])));
        assert_eq!(plan(1, 2048, 1536, 3, Pass::Forward), Some((4, 4, 8, [3, 1, 256])));
        assert_eq!(plan(1, 10, 7, 2, Pass::Forward), Some((2, 1, 8, [1, 1, 2])));
        assert_eq!(plan(8, 2048, 1536, 4, Pass::Backward), Some((4, 4, 128, [12, 8, 4])));
        assert_eq!(plan(1, 70, 8, 2, Pass::Backward), Some((2, 4, 16, [1, 1, 2])));
        assert_eq!(plan(1, 10, 8, 9, Pass::Forward), None);
        assert_eq!(plan(1, 0, 8, 4, Pass::Forward), None);
        let long = plan(1, 1 << 24, 8, 4, Pass::Forward).map(|(_, _, strip, grid)| (strip, grid[2]));
        assert_eq!(long, Some((260, 64_528)));
    }
}
