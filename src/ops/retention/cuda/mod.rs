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
use crate::backend::cuda::{device_of, is_hopper, multiprocessors, within};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use plan::Target;

/// Retention of checked arguments on CUDA, tracked; `None` where no kernel takes them.
pub(super) fn on_cuda(args: &Retention, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let what = || format!("retention of q {:?}, v {:?}", args.q.dims(), args.v.dims());
    within(what, retained(args, sizes))
}

fn retained(args: &Retention, sizes: Sizes) -> Result<Option<(Tensor, Tensor)>> {
    let own = args.q.dtype();
    let sequences = [args.q, args.k, args.v];
    let mut all = sequences.into_iter().chain([args.log_decay]).chain(args.initial_state);
    if all.any(|x| x.dtype() == DType::F64) {
        return Ok(None);
    }
    let learns_decay = args.log_decay.track_op();
    // a decay's gradient is a sum of differences, in which the roundings of few bits would grow
    let alike = sequences.iter().all(|x| x.dtype() == own) && !learns_decay;
    let sequence = if alike { own } else { DType::F32 };
    let device = device_of(args.q)?;
    let target = Target {
        bytes: sequence.size_in_bytes(),
        multiprocessors: multiprocessors(&device)?,
        hopper: is_hopper(&device)?,
    };
    let Some(plan) = plan::plan(&sizes, target, learns_decay) else {
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
