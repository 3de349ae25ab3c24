//! The CUDA path: blocks of channels, states in registers, time cut into chunks where channels do not fill the device.
//! How many numbers of how many channels a lane has, and how many chunks there are, `plan` finds by a model of the time.
//!
//! A chunk that does not begin the sequence needs the state before it: a first walk gives what every chunk hands on from
//! a state of zero (cheap where decays soon make the past negligible), a small kernel chains these, and the chunks then
//! run side by side. Backward likewise, in the other direction, from the states before every tile that forward kept. Where
//! channels do fill the device, but not evenly, blocks take equal shares of all tokens and hand states on to each other.

mod call;
mod forward;
mod grad;
mod plan;
mod step;

use super::{SelectiveScan, Sizes};
use crate::backend::cuda::{
    Element, Module, contiguous, device_of, fits, multiprocessors, with_unit_stride, within,
};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use plan::{Pass, Plan};

/// Bytes that the shares of `dB` and `dC` may take.
const MOST_SHARES: usize = 8 << 30;

/// The scan of checked arguments on CUDA, tracked; `None` where no kernel takes them.
pub(super) fn on_cuda(args: &SelectiveScan, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    within(|| name(&sizes), scanned(args, sizes))
}

fn scanned(args: &SelectiveScan, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let sequence = sequence_dtype(args);
    let (Some(sequence), true) = (sequence, vectors(args).all(|x| x.dtype().is_float())) else {
        return Ok(None);
    };
    let Some(plans) = Plans::new(args, sizes, sequence)? else { return Ok(None) };
    let optional = |x: Option<&Tensor>, dtype| x.map(|x| x.to_dtype(dtype)).transpose();
    let coefficient = |x: &Tensor| x.to_dtype(if x.dtype() == sequence { sequence } else { DType::F32 });
    let (d, z) = (optional(args.d, DType::F32)?, optional(args.z, sequence)?);
    let delta_bias = optional(args.delta_bias, DType::F32)?;
    let initial_state = optional(args.initial_state, DType::F32)?;
    let unified = SelectiveScan {
        u: &args.u.to_dtype(sequence)?,
        delta: &args.delta.to_dtype(sequence)?,
        a: &args.a.to_dtype(DType::F32)?,
        b: &coefficient(args.b)?,
        c: &coefficient(args.c)?,
        d: d.as_ref(),
        z: z.as_ref(),
        delta_bias: delta_bias.as_ref(),
        initial_state: initial_state.as_ref(),
        ..*args
    };
    let (y, state) = match sequence {
        DType::F32 => grad::recorded::<f32>(&unified, sizes, plans)?,
        DType::BF16 => grad::recorded::<bf16>(&unified, sizes, plans)?,
        DType::F16 => grad::recorded::<f16>(&unified, sizes, plans)?,
        other => return Err(Error::dtype("selective_scan: u", "f32, bf16 or f16", other)),
    };
    Ok(Some((y.to_dtype(args.u.dtype())?, state)))
}

/// The one dtype that the sequences are read in: their own if they have one, else f32; `None` with f64 among them.
fn sequence_dtype(args: &SelectiveScan) -> Option<DType> {
    let own = args.u.dtype();
    let all: Vec<DType> =
        [Some(args.u), Some(args.delta), args.z].into_iter().flatten().map(Tensor::dtype).collect();
    let taken = |dtype: &DType| matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
    if !all.iter().all(taken) {
        return None;
    }
    Some(if all.iter().all(|dtype| *dtype == own) { own } else { DType::F32 })
}

fn vectors<'a>(args: &SelectiveScan<'a>) -> impl Iterator<Item = &'a Tensor> {
    [Some(args.a), Some(args.b), Some(args.c), args.d, args.delta_bias, args.initial_state]
        .into_iter()
        .flatten()
}

/// The layouts of both passes.
#[derive(Clone, Copy, Debug)]
struct Plans {
    aligned: Plan,
    forward: Plan,
    backward: Plan,
}

impl Plans {
    /// For sequences of `sequence`; `None` where a device's blocks have too little shared memory, too.
    fn new(args: &SelectiveScan, sizes: Sizes, sequence: DType) -> Result<Option<Self>> {
        let device = &device_of(args.u)?;
        let count = multiprocessors(device)?;
        let plan = |pass| Plan::new(&sizes, pass, count);
        let (Some(aligned), Some(forward), Some(backward)) =
            (plan(Pass::Aligned(sequence.size_in_bytes())), plan(Pass::Forward), plan(Pass::Backward))
        else {
            return Ok(None);
        };
        let shares = backward.columns() * sizes.batch * sizes.length * 2 * sizes.states * size_of::<f32>();
        let tracked = vectors(args).chain([args.u, args.delta]).chain(args.z).any(|x| x.track_op());
        if tracked && shares > MOST_SHARES {
            return Ok(None);
        }
        let element = match sequence {
            DType::BF16 => bf16::NAME,
            DType::F16 => f16::NAME,
            _ => f32::NAME,
        };
        for (module, name, plan, asked) in [
            (Module::ScanForward, "selective_scan_fwd", &aligned, true),
            (Module::ScanForward, "selective_scan_fwd", &forward, true),
            (Module::ScanBackward, "selective_scan_bwd", &backward, tracked),
        ] {
            if asked && !fits(device, module, &format!("{name}_{element}_{}", plan.kernel()))? {
                return Ok(None);
            }
        }
        Ok(Some(Self { aligned, forward, backward }))
    }
}

/// The tensors of a call as kernels take them: sequences with unit stride, the rest contiguous.
struct Prepared {
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Option<Tensor>,
    z: Option<Tensor>,
    delta_bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    marks: Option<Tensor>,
    softplus: bool,
}

impl Prepared {
    fn new(args: &SelectiveScan) -> Result<Self> {
        let optional = |x: Option<&Tensor>| x.map(contiguous).transpose();
        Ok(Self {
            u: with_unit_stride(args.u)?,
            delta: with_unit_stride(args.delta)?,
            a: contiguous(args.a)?,
            b: with_unit_stride(args.b)?,
            c: with_unit_stride(args.c)?,
            d: optional(args.d)?,
            z: args.z.map(with_unit_stride).transpose()?,
            delta_bias: optional(args.delta_bias)?,
            initial_state: optional(args.initial_state)?,
            marks: args.segments.map(|segments| segments.marks(args.u.device())).transpose()?,
            softplus: args.softplus,
        })
    }

    /// Whether a sequence's rows of a part of so many channels begin on 16 bytes and are whole vectors of as many.
    fn aligned(&self, part: usize) -> bool {
        let bytes = self.u.dtype().size_in_bytes();
        let whole = |x: &Tensor| {
            let places = [x.layout().start_offset(), x.stride()[0], x.stride()[1], part];
            places.iter().all(|place| (place * bytes).is_multiple_of(16))
        };
        [Some(&self.u), Some(&self.delta), self.z.as_ref()].into_iter().flatten().all(whole)
    }

    fn args(&self) -> SelectiveScan<'_> {
        SelectiveScan {
            u: &self.u,
            delta: &self.delta,
            a: &self.a,
            b: &self.b,
            c: &self.c,
            d: self.d.as_ref(),
            z: self.z.as_ref(),
            delta_bias: self.delta_bias.as_ref(),
            softplus: self.softplus,
            initial_state: self.initial_state.as_ref(),
            segments: None,
        }
    }
}

/// The operator and its sizes, for errors.
fn name(sizes: &Sizes) -> String {
    let Sizes { batch, length, channels, states, .. } = sizes;
    format!("selective_scan [B, L, D] = [{batch}, {length}, {channels}], N = {states}")
}
