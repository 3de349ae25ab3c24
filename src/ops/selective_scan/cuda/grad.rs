//! The operator in candle's graph, and its backward pass.

use super::call::{Launcher, Locks, contiguous};
use super::forward::{Scanned, forward};
use super::plan::{KEPT, THREADS};
use super::{Plan, Plans, Prepared, name};
use crate::Result;
use crate::autograd::{Gradients, record};
use crate::backend::cuda::{
    self, Argument, Buffer, Element, Guards, Held, Module, device_of, with_unit_stride, within,
};
use crate::ops::selective_scan::{SelectiveScan, Sizes};
use candle_core::{DType, Tensor};

/// The scan of unified arguments.
pub(super) fn recorded<E: Element>(
    args: &SelectiveScan,
    sizes: Sizes,
    plans: Plans,
) -> Result<(Tensor, Tensor)> {
    let optional = [args.d, args.z, args.delta_bias, args.initial_state];
    let mut inputs = vec![args.u, args.delta, args.a, args.b, args.c];
    inputs.extend(optional.iter().flatten());
    let keep = inputs.iter().any(|x| x.track_op());
    let device = device_of(args.u)?;
    let prepared = Prepared::new(args)?.detached();
    let Scanned { y, state, kept, ungated } = forward::<E>(&prepared, &sizes, &plans, keep)?;
    let y_shape = (sizes.batch, sizes.length, sizes.channels);
    let state_shape = (sizes.batch, sizes.channels, sizes.states);
    let Some(kept) = kept else {
        return Ok((y.tensor(&device, y_shape), state.tensor(&device, state_shape)));
    };
    let tiles = sizes.length.div_ceil(KEPT);
    let kept = kept.tensor(&device, (sizes.batch, tiles, sizes.channels, sizes.states));
    let ungated = ungated.map(|ungated| ungated.tensor(&device, y_shape));
    let outputs = [(y.storage(&device), y_shape.into()), (state.storage(&device), state_shape.into())];
    let [y, state] = record("selective_scan", &inputs, outputs, move |[dy, dstate]| {
        let kept = (&kept, ungated.as_ref());
        let gradients = backward::<E>(&prepared, &sizes, &plans.backward, kept, dy, dstate);
        Ok(within(|| name(&sizes) + ", backward", gradients)?)
    })?;
    Ok((y, state))
}

impl Prepared {
    fn detached(self) -> Self {
        let optional = |x: Option<Tensor>| x.map(|x| x.detach());
        Self {
            u: self.u.detach(),
            delta: self.delta.detach(),
            a: self.a.detach(),
            b: self.b.detach(),
            c: self.c.detach(),
            d: optional(self.d),
            z: optional(self.z),
            delta_bias: optional(self.delta_bias),
            initial_state: optional(self.initial_state),
            ..self
        }
    }
}

/// The gradients in the order of the recorded inputs, from what forward kept: states, and `y` before the gate if there is one.
fn backward<E: Element>(
    prepared: &Prepared,
    sizes: &Sizes,
    plan: &Plan,
    (kept, ungated): (&Tensor, Option<&Tensor>),
    dy: Option<&Tensor>,
    dstate: Option<&Tensor>,
) -> Result<Gradients> {
    let Sizes { batch, length, channels, states, .. } = *sizes;
    let device = &device_of(&prepared.u)?;
    let stream = device.cuda_stream();
    let (numbers, tokens) = (batch * channels * states, batch * length);
    let dy = match dy {
        Some(dy) => with_unit_stride(dy)?,
        None => Tensor::zeros((batch, length, channels), prepared.u.dtype(), prepared.u.device())?,
    };
    let dstate = dstate.map(cuda::contiguous).transpose()?;
    let sequence = || Buffer::<E>::new(device, tokens * channels);
    let (mut du, mut ddelta, mut dz) =
        (sequence()?, sequence()?, prepared.z.as_ref().map(|_| sequence()).transpose()?);
    let wide = |length| Buffer::<f32>::new(device, length);
    let mut dinitial = wide(numbers)?;
    let slots = plan.slots();
    let (mut carried, mut span) = (wide(numbers * slots)?, wide(batch * slots * channels)?);
    let mut sums = wide(plan.columns() * tokens * 2 * states)?;
    let mut da = wide(numbers * plan.chunks)?;
    let (mut dd, mut dbias) = (wide(batch * plan.chunks * channels)?, wide(batch * plan.chunks * channels)?);
    let (mut total_a, mut total_d) = (wide(channels * states)?, wide(channels)?);
    let mut total_bias = wide(channels)?;
    let mut coefficients = [Output::new(&prepared.b, device)?, Output::new(&prepared.c, device)?];

    let args = prepared.args();
    let locks = Locks::new(&args, prepared.marks.as_ref(), Some(&dy));
    let (kept, ungated, dstate) = (Held::new(kept), ungated.map(Held::new), dstate.as_ref().map(Held::new));
    {
        let guards = &mut Guards::default();
        let mut scan = locks.scan::<E>(sizes, plan, prepared.softplus, device, &stream, guards)?;
        scan.kept = kept.pointer("selective_scan: kept states", device, &stream, guards)?;
        if let Some(ungated) = &ungated {
            scan.ungated = ungated.pointer("selective_scan: y before the gate", device, &stream, guards)?;
        }
        scan.initial = match &dstate {
            Some(dstate) => {
                dstate.pointer("selective_scan: gradient of the state", device, &stream, guards)?
            }
            None => 0,
        };
        scan.du = contiguous(du.pointer(&stream, guards), sizes);
        scan.ddelta = contiguous(ddelta.pointer(&stream, guards), sizes);
        if let Some(dz) = &mut dz {
            scan.dz = contiguous(dz.pointer(&stream, guards), sizes);
        }
        scan.state = dinitial.pointer(&stream, guards);
        scan.sums = sums.pointer(&stream, guards);
        scan.da = da.pointer(&stream, guards);
        scan.dd = dd.pointer(&stream, guards);
        scan.dbias = dbias.pointer(&stream, guards);
        let launch = Launcher { what: &(name(sizes) + ", backward"), device, sizes, plan };
        // SAFETY: `Locks` gives pointers and steps of tensors whose shapes were checked, and the buffers have the sizes
        // that the kernels read and fill.
        unsafe {
            if plan.chunks > 1 {
                scan.carried = carried.pointer(&stream, guards);
                scan.span = span.pointer(&stream, guards);
                launch.scan::<E>(Module::ScanCarry, "selective_scan_back_summary", scan, slots - 1)?;
                launch.carry(&scan, scan.initial, true)?;
            }
            launch.scan::<E>(Module::ScanBackward, "selective_scan_bwd", scan, plan.chunks)?;
            let arguments: [&dyn Argument; 9] = [
                &total_a.pointer(&stream, guards),
                &scan.da,
                &total_d.pointer(&stream, guards),
                &scan.dd,
                &total_bias.pointer(&stream, guards),
                &scan.dbias,
                &(states as i32),
                &(channels as i32),
                &((batch * plan.chunks) as i32),
            ];
            let grid = [(channels * (states + 2)).div_ceil(THREADS), 1, 1];
            launch.plain(Module::ScanCarry, "selective_scan_sums", grid, &arguments)?;
            for (side, output) in coefficients.iter_mut().enumerate() {
                let kernel = output.kernel(sizes.groups[side].is_none());
                let out = output.pointer(&stream, guards);
                let (first, tokens, n) = ((side * states) as i32, tokens as i64, states as i32);
                match sizes.groups[side] {
                    Some(groups) => {
                        let per = (channels / groups / plan.part * plan.blocks) as i32;
                        let grid = [(tokens as usize * states).div_ceil(THREADS), groups, 1];
                        let arguments: [&dyn Argument; 7] =
                            [&out, &scan.sums, &per, &first, &tokens, &n, &(groups as i32)];
                        launch.plain(Module::ScanCarry, &kernel, grid, &arguments)?;
                    }
                    None => {
                        let arguments: [&dyn Argument; 5] = [&out, &scan.sums, &first, &tokens, &n];
                        launch.plain(Module::ScanCarry, &kernel, [states, channels, 1], &arguments)?;
                    }
                }
            }
        }
    }
    let [db, dc] = coefficients;
    let shape = (batch, length, channels);
    let mut gradients = vec![
        Some(du.tensor(device, shape)),
        Some(ddelta.tensor(device, shape)),
        Some(total_a.tensor(device, (channels, states))),
        Some(db.tensor(device, &prepared.b)),
        Some(dc.tensor(device, &prepared.c)),
    ];
    gradients.extend(prepared.d.as_ref().map(|_| Some(total_d.tensor(device, channels))));
    gradients.extend(dz.map(|dz| Some(dz.tensor(device, shape))));
    gradients.extend(prepared.delta_bias.as_ref().map(|_| Some(total_bias.tensor(device, channels))));
    let state = (batch, channels, states);
    gradients.extend(prepared.initial_state.as_ref().map(|_| Some(dinitial.tensor(device, state))));
    Ok(gradients)
}

/// The gradient of `B` or `C`, of its dtype.
enum Output {
    F32(Buffer<f32>),
    BF16(Buffer<half::bf16>),
    F16(Buffer<half::f16>),
}

impl Output {
    fn new(like: &Tensor, device: &candle_core::CudaDevice) -> Result<Self> {
        let length = like.elem_count();
        Ok(match like.dtype() {
            DType::BF16 => Self::BF16(Buffer::new(device, length)?),
            DType::F16 => Self::F16(Buffer::new(device, length)?),
            _ => Self::F32(Buffer::new(device, length)?),
        })
    }

    fn kernel(&self, constant: bool) -> String {
        let element = match self {
            Self::F32(_) => f32::NAME,
            Self::BF16(_) => half::bf16::NAME,
            Self::F16(_) => half::f16::NAME,
        };
        format!("selective_scan_{}_{element}", if constant { "constant" } else { "coefficients" })
    }

    fn pointer<'s>(
        &'s mut self,
        stream: &'s candle_core::cuda_backend::cudarc::driver::CudaStream,
        guards: &mut Guards<'s>,
    ) -> u64 {
        match self {
            Self::F32(buffer) => buffer.pointer(stream, guards),
            Self::BF16(buffer) => buffer.pointer(stream, guards),
            Self::F16(buffer) => buffer.pointer(stream, guards),
        }
    }

    fn tensor(self, device: &candle_core::CudaDevice, like: &Tensor) -> Tensor {
        match self {
            Self::F32(buffer) => buffer.tensor(device, like.shape()),
            Self::BF16(buffer) => buffer.tensor(device, like.shape()),
            Self::F16(buffer) => buffer.tensor(device, like.shape()),
        }
    }
}
