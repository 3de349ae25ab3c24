//! The operator in candle's graph: forward on the CPU, backward from the states it kept.

use super::Sizes;
use super::cpu::backward::Gradients;
use super::cpu::forward::{Scan, Scanned};
use super::cpu::step::step;
use super::cpu::tables::{Parameters, Tables};
use super::plan::is_step;
use crate::autograd::record;
use crate::backend::cpu::simd::Element;
use crate::backend::cpu::view::{Held, storage, tensor, with_unit_stride};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor, WithDType};
use half::{bf16, f16};

/// Checked arguments: all but `u` in f64.
pub(super) struct Arguments<'a> {
    pub(super) u: &'a Tensor,
    pub(super) poles: &'a Tensor,
    pub(super) residues: &'a Tensor,
    pub(super) d: Option<&'a Tensor>,
    pub(super) initial: Option<&'a Tensor>,
    pub(super) segments: Option<&'a Segments>,
    /// The poles are logarithms.
    pub(super) log: bool,
    pub(super) sizes: Sizes,
}

/// Output and final state.
pub(super) fn recorded(args: &Arguments) -> Result<(Tensor, Tensor)> {
    match args.u.dtype() {
        DType::F32 => typed::<f32>(args),
        DType::F64 => typed::<f64>(args),
        DType::BF16 => typed::<bf16>(args),
        DType::F16 => typed::<f16>(args),
        other => Err(Error::dtype("modal_conv: u", "f32, f64, bf16 or f16", other)),
    }
}

fn flat(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

fn typed<E: Element>(args: &Arguments) -> Result<(Tensor, Tensor)> {
    let sizes = args.sizes;
    let mut poles = flat(args.poles)?;
    if args.log {
        poles.iter_mut().for_each(|p| *p = p.exp());
    }
    let d = args.d.map(flat).transpose()?;
    let parameters = Parameters { poles, residues: flat(args.residues)?, d };
    let initial = args.initial.map(flat).transpose()?;
    let u = with_unit_stride(args.u)?;
    let held = Held::new(&u);
    let (y_shape, state_shape) = (args.u.shape().clone(), sizes.state_dims());
    let mut inputs = vec![args.u, args.poles, args.residues];
    inputs.extend([args.d, args.initial].into_iter().flatten());
    let tracked = inputs.iter().any(|x| x.track_op());
    if !tracked && is_step(&sizes) {
        let (y, state) = step::<E>(held.rows()?, &parameters, &sizes, initial, args.segments);
        return Ok((tensor(y, y_shape), tensor(state, state_shape)));
    }
    let tables = Tables::<E::Real>::new(&parameters, &sizes);
    let scan = Scan::<E>::new(held.rows()?, &tables, sizes, args.segments);
    let Scanned { y, state, kept } = scan.forward(initial.as_deref(), tracked);
    if !tracked {
        return Ok((tensor(y, y_shape), tensor(state, state_shape)));
    }
    let outputs = [(Storage::Cpu(storage(y)), y_shape), (Storage::Cpu(storage(state)), state_shape.into())];
    drop(held);
    let saved = Saved {
        u: u.detach(),
        parameters,
        segments: args.segments.cloned(),
        log: args.log,
        skip: args.d.is_some(),
        shapes: inputs.iter().map(|x| x.shape().clone()).collect(),
        sizes,
        kept,
    };
    let [y, state] =
        record("modal_conv", &inputs, outputs, move |[dy, dstate]| Ok(saved.backward::<E>(dy, dstate)?))?;
    Ok((y, state))
}

/// What the backward pass needs.
struct Saved {
    u: Tensor,
    parameters: Parameters,
    segments: Option<Segments>,
    log: bool,
    /// Whether there is a `D`.
    skip: bool,
    /// Of the recorded inputs.
    shapes: Vec<candle_core::Shape>,
    sizes: Sizes,
    kept: Vec<Vec<f64>>,
}

impl Saved {
    /// The gradients in the order of the recorded inputs.
    fn backward<E: Element>(
        &self,
        dy: Option<&Tensor>,
        dstate: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let held = Held::new(&self.u);
        let tables = Tables::<E::Real>::new(&self.parameters, &self.sizes);
        let scan = Scan::<E>::new(held.rows()?, &tables, self.sizes, self.segments.as_ref());
        let dy = dy.map(with_unit_stride).transpose()?;
        let dy = dy.as_ref().map(Held::new);
        let dy = dy.as_ref().map(|dy| dy.rows::<E>()).transpose()?;
        let dstate = match dstate {
            Some(dstate) => {
                let values = dstate.flatten_all()?.to_vec1::<E::Real>()?;
                Some(values.into_iter().map(WithDType::to_f64).collect::<Vec<f64>>())
            }
            None => None,
        };
        let Gradients { u, mut poles, residues, d, initial } =
            scan.backward(&self.parameters, &self.kept, dy, dstate.as_deref());
        if self.log {
            poles.iter_mut().zip(&self.parameters.poles).for_each(|(g, p)| *g *= p);
        }
        let mut shapes = self.shapes.iter();
        let mut next = |data: Vec<f64>| shapes.next_back().map(|shape| tensor(data, shape));
        // the initial state comes last, where there is one
        let count = 3 + usize::from(self.skip);
        let initial = if self.shapes.len() > count { next(initial) } else { None };
        let d = if self.skip { next(d) } else { None };
        let (residues, poles) = (next(residues), next(poles));
        let mut gradients = vec![Some(tensor(u, self.u.shape())), poles, residues];
        gradients.extend(d.map(Some));
        gradients.extend(initial.map(Some));
        Ok(gradients)
    }
}
