//! The operator in candle's graph: forward on the CPU, backward from the states it kept.

use super::cpu::backward::Gradients;
use super::cpu::forward::Scanned;
use super::cpu::{self, Operands, Prepared};
use super::plan::is_step;
use super::{SelectiveScan, Sizes};
use crate::autograd::record;
use crate::backend::cpu::simd::{Element, Isa};
use crate::backend::cpu::view::{Held, storage, tensor, with_unit_stride};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};

/// The scan of checked and unified arguments on the CPU.
pub(super) fn on_cpu(args: &SelectiveScan, sizes: Sizes, isa: Isa) -> Result<(Tensor, Tensor)> {
    match args.u.dtype() {
        DType::F32 => typed::<f32>(args, sizes, isa),
        DType::F64 => typed::<f64>(args, sizes, isa),
        DType::BF16 => typed::<bf16>(args, sizes, isa),
        DType::F16 => typed::<f16>(args, sizes, isa),
        other => Err(Error::dtype("selective_scan: u", "f32, f64, bf16 or f16", other)),
    }
}

fn typed<E: Element>(args: &SelectiveScan, sizes: Sizes, isa: Isa) -> Result<(Tensor, Tensor)> {
    let y_shape = (sizes.batch, sizes.length, sizes.channels);
    let state_shape = (sizes.batch, sizes.channels, sizes.states);
    let optional = [args.d, args.z, args.delta_bias, args.initial_state];
    let mut inputs = vec![args.u, args.delta, args.a, args.b, args.c];
    inputs.extend(optional.iter().flatten());
    if !inputs.iter().any(|x| x.track_op()) {
        let Scanned { y, state, .. } = match is_step(&sizes) {
            true => cpu::step::<E>(isa, args, sizes)?,
            false => forward::<E>(args, sizes, isa, false)?,
        };
        return Ok((tensor(y, y_shape), tensor(state, state_shape)));
    }
    let Scanned { y, state, kept } = forward::<E>(args, sizes, isa, true)?;
    let outputs =
        [(Storage::Cpu(storage(y)), y_shape.into()), (Storage::Cpu(storage(state)), state_shape.into())];
    let saved = Saved::new(args);
    let [y, state] = record("selective_scan", &inputs, outputs, move |[dy, dstate]| {
        Ok(saved.backward::<E>(sizes, isa, &kept, dy, dstate)?)
    })?;
    Ok((y, state))
}

fn forward<E: Element>(args: &SelectiveScan, sizes: Sizes, isa: Isa, keep: bool) -> Result<Scanned<E>> {
    let prepared = Prepared::new(args)?;
    let locks = prepared.hold();
    Ok(Operands::<E>::new(isa, args, sizes, &locks)?.forward(keep))
}

/// The arguments, detached, for the backward pass.
struct Saved {
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Option<Tensor>,
    z: Option<Tensor>,
    delta_bias: Option<Tensor>,
    softplus: bool,
    initial_state: Option<Tensor>,
    segments: Option<Segments>,
}

impl Saved {
    fn new(args: &SelectiveScan) -> Self {
        Self {
            u: args.u.detach(),
            delta: args.delta.detach(),
            a: args.a.detach(),
            b: args.b.detach(),
            c: args.c.detach(),
            d: args.d.map(|d| d.detach()),
            z: args.z.map(|z| z.detach()),
            delta_bias: args.delta_bias.map(|bias| bias.detach()),
            softplus: args.softplus,
            initial_state: args.initial_state.map(|state| state.detach()),
            segments: args.segments.cloned(),
        }
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
            segments: self.segments.as_ref(),
        }
    }

    /// The gradients in the order of the recorded inputs.
    fn backward<E: Element>(
        &self,
        sizes: Sizes,
        isa: Isa,
        kept: &[E::Real],
        dy: Option<&Tensor>,
        dstate: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let args = self.args();
        let prepared = Prepared::new(&args)?;
        let locks = prepared.hold();
        let operands = Operands::<E>::new(isa, &args, sizes, &locks)?;
        let dy = dy.map(with_unit_stride).transpose()?;
        let dy = dy.as_ref().map(Held::new);
        let dy = dy.as_ref().map(|dy| dy.rows::<E>()).transpose()?;
        let dstate = dstate.map(|d| d.flatten_all()?.to_vec1::<E::Real>()).transpose()?;
        let Gradients { u, delta, z, a, b, c, d, bias, initial } =
            operands.backward(kept, dy, dstate.as_deref());
        let mut gradients = vec![
            Some(tensor(u, self.u.shape())),
            Some(tensor(delta, self.delta.shape())),
            Some(tensor(a, self.a.shape())),
            Some(tensor(b, self.b.shape())),
            Some(tensor(c, self.c.shape())),
        ];
        gradients.extend(self.d.as_ref().map(|x| Some(tensor(d, x.shape()))));
        gradients.extend(self.z.as_ref().zip(z).map(|(x, z)| Some(tensor(z, x.shape()))));
        gradients.extend(self.delta_bias.as_ref().map(|x| Some(tensor(bias, x.shape()))));
        gradients.extend(self.initial_state.as_ref().map(|x| Some(tensor(initial, x.shape()))));
        Ok(gradients)
    }
}
