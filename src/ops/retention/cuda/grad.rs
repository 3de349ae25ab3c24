//! The operator in candle's graph, and its backward pass.

use super::call::{Decays, Walk};
use super::decay::DecayGradient;
use super::plan;
use crate::Result;
use crate::autograd::{Gradients, record, storage_of};
use crate::backend::cuda::{Element, contiguous, with_unit_stride, within};
use crate::ops::retention::{Retention, Sizes};
use candle_core::{DType, Tensor};

/// Retention of unified arguments in segments of so many tokens.
pub(super) fn recorded<E: Element>(
    args: &Retention,
    sizes: Sizes,
    segment: usize,
) -> Result<(Tensor, Tensor)> {
    let mut inputs = vec![args.q, args.k, args.v, args.log_decay];
    inputs.extend(args.initial_state);
    let saved = Saved::new(args, sizes, segment)?;
    let (what, forward) = (saved.what(), saved.forward());
    let tracked = inputs.iter().any(|x| x.track_op());
    if plan::steps(sizes.length, tracked) {
        let [o, state] = forward.steps::<E>(&what)?.tensors();
        return Ok((o, state));
    }
    let states = forward.states::<E>(&what)?;
    let results = forward.outputs::<E>(&what, states.as_ref())?;
    if !tracked {
        let [o, state] = results.tensors();
        return Ok((o, state));
    }
    // the decay's gradient needs the outputs, which the graph takes away
    let (outputs, o) = match saved.learns_decay {
        true => {
            let [o, state] = results.tensors();
            ([storage_of(&o)?, storage_of(&state)?], Some(o))
        }
        false => (results.storages(), None),
    };
    let [y, state] = record("retention", &inputs, outputs, move |[d, dstate]| {
        let what = || format!("retention of q {:?}, v {:?}, backward", saved.q.dims(), saved.v.dims());
        Ok(within(what, saved.backward::<E>(states.as_ref(), o.as_ref(), d, dstate))?)
    })?;
    Ok((y, state))
}

/// The arguments, detached: sequences with unit stride, the rest contiguous.
struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    learns_decay: bool,
    initial_state: Option<Tensor>,
    marks: Option<Tensor>,
    scale: f32,
    sizes: Sizes,
    segment: usize,
}

impl Saved {
    fn new(args: &Retention, sizes: Sizes, segment: usize) -> Result<Self> {
        let sequence = |x: &Tensor| with_unit_stride(&x.detach());
        let wide = |x: &Tensor| contiguous(&x.detach());
        Ok(Self {
            q: sequence(args.q)?,
            k: sequence(args.k)?,
            v: sequence(args.v)?,
            log_decay: wide(args.log_decay)?,
            learns_decay: args.log_decay.track_op(),
            initial_state: args.initial_state.map(wide).transpose()?,
            marks: args.segments.map(|segments| segments.marks(args.q.device())).transpose()?,
            scale: args.scale as f32,
            sizes,
            segment,
        })
    }

    /// The operator and its sizes, for errors.
    fn what(&self) -> String {
        let Sizes { batch, length, heads, keys, values, .. } = self.sizes;
        format!("retention [B, T, H] = [{batch}, {length}, {heads}], K = {keys}, V = {values}")
    }

    fn decays(&self) -> Decays<'_> {
        Decays {
            log_decay: &self.log_decay,
            marks: self.marks.as_ref(),
            segment: self.segment,
            heads: self.sizes.heads,
        }
    }

    fn forward(&self) -> Walk<'_> {
        Walk {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            decays: self.decays(),
            inner: 1.0,
            outer: self.scale,
            transposed: false,
            backwards: false,
            initial: self.initial_state.as_ref(),
        }
    }

    /// The gradients in the order of the recorded inputs; `o` where the decay learns.
    fn backward<E: Element>(
        &self,
        states: Option<&Tensor>,
        o: Option<&Tensor>,
        d: Option<&Tensor>,
        dstate: Option<&Tensor>,
    ) -> Result<Gradients> {
        let what = &(self.what() + ", backward");
        let Sizes { batch, length, heads, values, .. } = self.sizes;
        let d = &match d {
            Some(d) => with_unit_stride(d)?,
            None => Tensor::zeros((batch, length, heads, values), self.q.dtype(), self.q.device())?,
        };
        let dstate = dstate.map(contiguous).transpose()?;
        let forward = self.forward();
        let towards_q = Walk { q: d, k: &self.v, v: &self.k, transposed: true, ..forward };
        let [dq, _] = towards_q.outputs::<E>(what, states)?.tensors();
        let (inner, initial) = (self.scale, dstate.as_ref());
        let back =
            Walk { q: &self.k, k: &self.q, v: d, inner, outer: 1.0, backwards: true, initial, ..forward };
        let gradients = back.states::<E>(what)?;
        let [dv, dinitial] = back.outputs::<E>(what, gradients.as_ref())?.tensors();
        let towards_k = Walk { q: &self.v, k: d, v: &self.q, transposed: true, ..back };
        let [dk, _] = towards_k.outputs::<E>(what, gradients.as_ref())?.tensors();
        let dlog_decay = match o {
            Some(o) => {
                let gradient = DecayGradient {
                    sequences: [&self.v, &dv, o, d],
                    states,
                    gradients: gradients.as_ref(),
                    initial: self.initial_state.as_ref(),
                    dinitial: &dinitial,
                    decays: self.decays(),
                };
                let gradient = gradient.compute::<E>(what)?;
                Some(if self.sizes.per_token { gradient } else { gradient.sum((0, 1))? })
            }
            None => None,
        };
        let [dq, dk, dv] = [(dq, &self.q), (dk, &self.k), (dv, &self.v)].map(|(d, x)| grouped(d, x));
        let mut all = vec![Some(dq?), Some(dk?), Some(dv?), dlog_decay];
        all.extend(self.initial_state.as_ref().map(|_| Some(dinitial)));
        Ok(all)
    }
}

/// The gradient of `[B, T, Hx, width]` from that of every head, added up in f32.
fn grouped(gradient: Tensor, like: &Tensor) -> Result<Tensor> {
    let (batch, length, heads, width) = gradient.dims4()?;
    let groups = like.dim(2)?;
    if groups == heads {
        return Ok(gradient);
    }
    let gradient = gradient.reshape((batch, length, groups, heads / groups, width))?;
    Ok(gradient.to_dtype(DType::F32)?.sum(3)?.to_dtype(like.dtype())?)
}
