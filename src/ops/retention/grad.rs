//! The operator in candle's graph: forward on the CPU, backward from the arguments alone.

use super::cpu::backward::Gradients;
use super::cpu::{Operands, Prepared};
use super::plan::{Path, backward_chunk, path};
use super::{Form, Retention, Sizes};
use crate::autograd::{Gradients as Recorded, record};
use crate::backend::cpu::simd::Element;
use crate::backend::cpu::view::{Held, storage, tensor, with_unit_stride};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};

/// The retention of checked and unified arguments on the CPU.
pub(super) fn on_cpu(args: &Retention, sizes: Sizes) -> Result<(Tensor, Tensor)> {
    match args.q.dtype() {
        DType::F32 => typed::<f32>(args, sizes),
        DType::F64 => typed::<f64>(args, sizes),
        DType::BF16 => typed::<bf16>(args, sizes),
        DType::F16 => typed::<f16>(args, sizes),
        other => Err(Error::dtype("retention: q", "f32, f64, bf16 or f16", other)),
    }
}

fn typed<E: Element>(args: &Retention, sizes: Sizes) -> Result<(Tensor, Tensor)> {
    let prepared = Prepared::new(args)?;
    let held = prepared.hold();
    let operands = Operands::<E>::new(args, sizes, &held)?;
    let (o, state) = match path(&sizes, args.form) {
        Path::Step => operands.step(),
        Path::Chunks(chunk) => operands.forward(chunk),
    };
    let o_shape = (sizes.batch, sizes.length, sizes.heads, sizes.value);
    let state_shape = (sizes.batch, sizes.heads, sizes.key, sizes.value);
    let outputs =
        vec![(Storage::Cpu(storage(o)), o_shape.into()), (Storage::Cpu(storage(state)), state_shape.into())];
    let mut inputs = vec![args.q, args.k, args.v, args.log_decay];
    inputs.extend(args.initial_state);
    let saved = Saved::new(args);
    let recorded = record("retention", &inputs, outputs, move |gradients| {
        let [d_o, d_state] = gradients else { candle_core::bail!("retention: expected two gradients") };
        Ok(saved.backward::<E>(sizes, d_o.as_ref(), d_state.as_ref())?)
    })?;
    match <[Tensor; 2]>::try_from(recorded) {
        Ok([o, state]) => Ok((o, state)),
        Err(other) => Err(Error::value("retention: outputs", "2", other.len())),
    }
}

/// The arguments, detached, for the backward pass.
struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: f64,
    initial_state: Option<Tensor>,
    segments: Option<Segments>,
    form: Form,
}

impl Saved {
    fn new(args: &Retention) -> Self {
        Self {
            q: args.q.detach(),
            k: args.k.detach(),
            v: args.v.detach(),
            log_decay: args.log_decay.detach(),
            scale: args.scale,
            initial_state: args.initial_state.map(|state| state.detach()),
            segments: args.segments.cloned(),
            form: args.form,
        }
    }

    /// The gradients in the order of the recorded inputs.
    fn backward<E: Element>(
        &self,
        sizes: Sizes,
        d_o: Option<&Tensor>,
        d_state: Option<&Tensor>,
    ) -> Result<Recorded> {
        let args = Retention {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            log_decay: &self.log_decay,
            scale: self.scale,
            initial_state: self.initial_state.as_ref(),
            segments: self.segments.as_ref(),
            form: self.form,
        };
        let prepared = Prepared::new(&args)?;
        let held = prepared.hold();
        let operands = Operands::<E>::new(&args, sizes, &held)?;
        let d_o = d_o.map(with_unit_stride).transpose()?;
        let d_o = d_o.as_ref().map(Held::new);
        let d_o = d_o.as_ref().map(|d_o| d_o.rows::<E>()).transpose()?;
        let d_state = d_state.map(|d| d.flatten_all()?.to_vec1::<E::Real>()).transpose()?;
        let chunk = backward_chunk(&sizes, self.form);
        let Gradients { sequences: [q, k, v], log_decay, initial } =
            operands.backward(chunk, d_o, d_state.as_deref());
        let mut gradients = vec![
            Some(tensor(q, self.q.shape())),
            Some(tensor(k, self.k.shape())),
            Some(tensor(v, self.v.shape())),
            Some(tensor(log_decay, self.log_decay.shape())),
        ];
        gradients.extend(self.initial_state.as_ref().map(|state| Some(tensor(initial, state.shape()))));
        Ok(gradients)
    }
}
