//! The CUDA path: one kernel, chunkwise on the tensor cores, is the forward pass and every gradient.
//!
//! A block has a slice of a head's values and walks a segment of time with the state in registers. Where heads and slices do
//! not fill the device, time is cut into segments: a first walk gives the state that each one ends in, begun from zero, a
//! small kernel chains these, and the segments then run side by side. With `G` the gradient of the state, going back,
//!
//! ```text
//! dq = retention(do, v, k) over S^T      dk = retention(v, do, q) over G^T      dv = retention(k, q, do) over G
//! ```
//!
//! so that nothing is kept for the backward pass but the states between segments. A few tokens outside a graph go through a
//! kernel of steps, which reads and writes the state once; a pool's states are moved on where they lie by another.
//!
//! The walk is there twice: for elements of 16 bits on Hopper's own tensor instructions, and for all else on those that every
//! GPU since Ampere has (f32 as three products of tf32). `plan` chooses.

mod call;
mod decay;
mod grad;
mod plan;
mod pool;
mod step;

pub(super) use pool::Pool;

use super::{Retention, Sizes};
use crate::Result;
use crate::backend::cuda::{Element, device_of, is_hopper, multiprocessors, within};
use candle_core::{CudaDevice, DType, Tensor};
use half::{bf16, f16};
use plan::{Plan, Target};

/// Retention of checked arguments on CUDA, tracked; `None` where no kernel takes them.
pub(super) fn on_cuda(args: &Retention, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let what = || format!("retention of q {:?}, v {:?}", args.q.dims(), args.v.dims());
    within(what, retained(args, sizes))
}

fn retained(args: &Retention, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let own = args.q.dtype();
    let sequences = [args.q, args.k, args.v];
    if all_arguments(args).any(|x| x.dtype() == DType::F64) {
        return Ok(None);
    }
    let learns_decay = args.log_decay.track_op();
    // a decay's gradient is a sum of differences, in which the roundings of few bits would grow
    let alike = sequences.iter().all(|x| x.dtype() == own) && !learns_decay;
    let device = device_of(args.q)?;
    let tracked = all_arguments(args).any(|x| x.track_op());
    let layout = |sequence| -> Result<_> {
        Ok(laid_out(&device, &sizes, sequence, learns_decay, tracked)?.map(|plan| (sequence, plan)))
    };
    // what asks for more shared memory than the device has goes through f32, which asks for less
    let chosen = match alike && own != DType::F32 {
        true => layout(own)?.map_or_else(|| layout(DType::F32), |chosen| Ok(Some(chosen)))?,
        false => layout(DType::F32)?,
    };
    let Some((sequence, plan)) = chosen else {
        return Ok(None);
    };
    let initial_state = args.initial_state.map(|state| state.to_dtype(DType::F32)).transpose()?;
    let unified = Retention {
        q: &args.q.to_dtype(sequence)?,
        k: &args.k.to_dtype(sequence)?,
        v: &args.v.to_dtype(sequence)?,
        log_decay: &args.log_decay.to_dtype(DType::F32)?,
        initial_state: initial_state.as_ref(),
        ..*args
    };
    let (o, state) = match sequence {
        DType::BF16 => grad::recorded::<bf16>(&unified, sizes, plan)?,
        DType::F16 => grad::recorded::<f16>(&unified, sizes, plan)?,
        _ => grad::recorded::<f32>(&unified, sizes, plan)?,
    };
    Ok(Some((o.to_dtype(own)?, state)))
}

fn all_arguments<'a>(args: &'a Retention) -> impl Iterator<Item = &'a Tensor> {
    [args.q, args.k, args.v, args.log_decay].into_iter().chain(args.initial_state)
}

/// A layout whose kernels the device has room for, of wide slices of values or else of narrow ones.
fn laid_out(
    device: &CudaDevice,
    sizes: &Sizes,
    sequence: DType,
    learns_decay: bool,
    tracked: bool,
) -> Result<Option<Plan>> {
    let target = Target {
        bytes: sequence.size_in_bytes(),
        multiprocessors: multiprocessors(device)?,
        hopper: is_hopper(device)?,
    };
    let element = match sequence {
        DType::BF16 => bf16::NAME,
        DType::F16 => f16::NAME,
        _ => f32::NAME,
    };
    let Some(plan) = plan::plan(sizes, target, learns_decay) else { return Ok(None) };
    for plan in [plan, Plan { narrow: true, ..plan }] {
        if plan::steps(sizes.length, tracked) || call::fit(device, sizes, &plan, element, tracked)? {
            return Ok(Some(plan));
        }
    }
    Ok(None)
}
