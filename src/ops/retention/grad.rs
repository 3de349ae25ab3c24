//! The operator in candle's graph: forward on the CPU, backward from the states it kept.

use super::cpu::backward::{Given, Gradients};
use super::cpu::forward::Retained;
use super::cpu::{Operands, Prepared};
use super::plan::{self, Path};
use super::{Form, Retention, Sizes};
use crate::autograd::record;
use crate::backend::cpu::simd::{Isa, Real};
use crate::backend::cpu::view::{Held, storage, tensor, with_unit_stride};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};

/// Retention of checked arguments, all of one dtype, on the CPU.
pub(super) fn on_cpu(args: &Retention, sizes: Sizes, isa: Isa) -> Result<(Tensor, Tensor)> {
    match args.q.dtype() {
        DType::F32 => typed::<f32>(args, sizes, isa),
        DType::F64 => typed::<f64>(args, sizes, isa),
        other => Err(Error::dtype("retention: q", "f32 or f64", other)),
    }
}

fn typed<T: Real>(args: &Retention, sizes: Sizes, isa: Isa) -> Result<(Tensor, Tensor)> {
    let o_shape = (sizes.batch, sizes.length, sizes.heads, sizes.values);
    let state_shape = (sizes.batch, sizes.heads, sizes.keys, sizes.values);
    let mut inputs = vec![args.q, args.k, args.v, args.log_decay];
    inputs.extend(args.initial_state);
    let tracked = inputs.iter().any(|x| x.track_op());
    let path = plan::path(args.form, &sizes);
    let Retained { o, state, kept } = {
        let prepared = Prepared::new(args)?;
        let locks = prepared.hold();
        let operands = Operands::<T>::new(isa, args, sizes, &locks)?;
        match path {
            Path::Recurrent => operands.step(),
            // only the pieces of the backward pass are of use to it
            Path::Chunks(chunk) => operands.forward(chunk, tracked && chunk == plan::chunk(&sizes)),
        }
    };
    if !tracked {
        return Ok((tensor(o, o_shape), tensor(state, state_shape)));
    }
    let outputs =
        [(Storage::Cpu(storage(o)), o_shape.into()), (Storage::Cpu(storage(state)), state_shape.into())];
    let saved = Saved::new(args);
    let [o, state] = record("retention", &inputs, outputs, move |[o, state]| {
        Ok(saved.backward::<T>(sizes, isa, &kept, o, state)?)
    })?;
    Ok((o, state))
}

/// The arguments, detached, for the backward pass.
struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    /// Whether the decay gets a gradient.
    learns_decay: bool,
    scale: f64,
    initial_state: Option<Tensor>,
    segments: Option<Segments>,
}

impl Saved {
    fn new(args: &Retention) -> Self {
        Self {
            q: args.q.detach(),
            k: args.k.detach(),
            v: args.v.detach(),
            log_decay: args.log_decay.detach(),
            learns_decay: args.log_decay.track_op(),
            scale: args.scale,
            initial_state: args.initial_state.map(|state| state.detach()),
            segments: args.segments.cloned(),
        }
    }

    fn args(&self) -> Retention<'_> {
        Retention {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            log_decay: &self.log_decay,
            scale: self.scale,
            initial_state: self.initial_state.as_ref(),
            segments: self.segments.as_ref(),
            form: Form::Auto,
        }
    }

    /// The gradients in the order of the recorded inputs.
    fn backward<T: Real>(
        &self,
        sizes: Sizes,
        isa: Isa,
        kept: &[Vec<T>],
        o: Option<&Tensor>,
        state: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let args = self.args();
        let prepared = Prepared::new(&args)?;
        let locks = prepared.hold();
        let operands = Operands::<T>::new(isa, &args, sizes, &locks)?;
        let o = o.map(with_unit_stride).transpose()?;
        let o = o.as_ref().map(Held::new);
        let o = o.as_ref().map(|o| o.rows::<T>()).transpose()?;
        let state = state.map(|state| state.flatten_all()?.to_vec1::<T>()).transpose()?;
        let given = Given { kept, o, state: state.as_deref() };
        let Gradients { q, k, v, log_decay, initial } =
            operands.backward(plan::chunk(&sizes), &given, self.learns_decay);
        let Sizes { batch, length, heads, keys, values, .. } = sizes;
        let mut gradients = vec![
            Some(grouped(tensor(q, (batch, length, heads, keys)), &self.q)?),
            Some(grouped(tensor(k, (batch, length, heads, keys)), &self.k)?),
            Some(grouped(tensor(v, (batch, length, heads, values)), &self.v)?),
        ];
        gradients.push(match self.learns_decay {
            true => {
                let gradient = tensor(log_decay, (batch, length, heads));
                Some(if sizes.per_token { gradient } else { gradient.sum((0, 1))? })
            }
            false => None,
        });
        gradients.extend(self.initial_state.as_ref().map(|x| Some(tensor(initial, x.shape()))));
        Ok(gradients)
    }
}

/// The gradient of `[B, T, Hx, width]` from that of every head.
fn grouped(gradient: Tensor, like: &Tensor) -> Result<Tensor> {
    let (batch, length, heads, width) = gradient.dims4()?;
    let groups = like.dim(2)?;
    if groups == heads {
        return Ok(gradient);
    }
    Ok(gradient.reshape((batch, length, groups, heads / groups, width))?.sum(3)?)
}
