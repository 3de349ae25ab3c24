//! The operator in candle's graph.

use super::cpu::backward::{Gradients as Found, Wanted};
use super::cpu::signal::Signal;
use super::cpu::{Prepared, Problem};
use super::plan::{self, Method};
use super::{FilterCache, LongConv, Sizes};
use crate::autograd::{Gradients, record};
use crate::backend::cpu::simd::{Element, Isa};
use crate::backend::cpu::view::{Held, storage, tensor, with_unit_stride};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{D, DType, Storage, Tensor};
use half::{bf16, f16};

/// The convolution of checked and unified arguments on the CPU.
pub(super) fn on_cpu(args: &LongConv, sizes: Sizes, isa: Isa) -> Result<Tensor> {
    match args.x.dtype() {
        DType::F32 => typed::<f32>(args, sizes, isa),
        DType::F64 => typed::<f64>(args, sizes, isa),
        DType::BF16 => typed::<bf16>(args, sizes, isa),
        DType::F16 => typed::<f16>(args, sizes, isa),
        other => Err(Error::dtype("long_conv: x", "f32, f64, bf16 or f16", other)),
    }
}

/// The arguments with rows that kernels can read.
struct Ready {
    x: Tensor,
    pre_gate: Option<Tensor>,
    post_gate: Option<Tensor>,
}

impl Ready {
    fn new(args: &LongConv) -> Result<Self> {
        let ready = |x: Option<&Tensor>| x.map(with_unit_stride).transpose();
        Ok(Self {
            x: with_unit_stride(args.x)?,
            pre_gate: ready(args.pre_gate)?,
            post_gate: ready(args.post_gate)?,
        })
    }

    /// What `f` makes of the problem.
    fn with<E: Element, R>(
        &self,
        args: &LongConv,
        sizes: Sizes,
        isa: Isa,
        f: impl FnOnce(Problem<'_, E>) -> Result<R>,
    ) -> Result<R> {
        let x = Held::new(&self.x);
        let (pre, post) = (self.pre_gate.as_ref().map(Held::new), self.post_gate.as_ref().map(Held::new));
        let gate = pre.as_ref().map(|gate| gate.rows::<E>()).transpose()?;
        let post_gate = post.as_ref().map(|gate| gate.rows::<E>()).transpose()?;
        f(Problem::new(isa, args, sizes, Signal { values: x.rows()?, gate }, post_gate))
    }
}

fn typed<E: Element>(args: &LongConv, sizes: Sizes, isa: Isa) -> Result<Tensor> {
    let shape = (sizes.batch, sizes.length, sizes.channels);
    let ready = Ready::new(args)?;
    let optional = [args.reverse, args.d, args.pre_gate, args.post_gate];
    let mut inputs = vec![args.x, args.filter];
    inputs.extend(optional.iter().flatten());
    let tracked = inputs.iter().any(|x| x.track_op());
    let forward = |problem: Problem<E>| {
        let prepared = problem.prepare(args)?;
        let y = problem.forward(&prepared);
        Ok((y, prepared))
    };
    let (y, prepared) = ready.with(args, sizes, isa, forward)?;
    if !tracked {
        return Ok(tensor(y, shape));
    }
    let saved = Saved::<E> {
        x: args.x.detach(),
        filter: args.filter.detach(),
        reverse: args.reverse.map(Tensor::detach),
        d: args.d.map(Tensor::detach),
        pre_gate: args.pre_gate.map(Tensor::detach),
        post_gate: args.post_gate.map(Tensor::detach),
        segments: args.segments.cloned(),
        prepared,
        wanted: Wanted {
            filter: args.filter.track_op()
                || [args.reverse, args.d].into_iter().flatten().any(|x| x.track_op()),
            post_gate: args.post_gate.is_some_and(|gate| gate.track_op()),
        },
        isa,
        sizes,
    };
    let outputs = vec![(Storage::Cpu(storage(y)), shape.into())];
    let mut recorded = record("long_conv", &inputs, outputs, move |gradients| {
        let [Some(dy)] = gradients else { candle_core::bail!("long_conv: expected one gradient") };
        Ok(saved.backward(dy)?)
    })?;
    recorded.pop().ok_or_else(|| Error::value("long_conv: outputs", "1", 0))
}

/// The arguments, detached, for the backward pass, and the filter's transform.
struct Saved<E: Element> {
    x: Tensor,
    filter: Tensor,
    reverse: Option<Tensor>,
    d: Option<Tensor>,
    pre_gate: Option<Tensor>,
    post_gate: Option<Tensor>,
    segments: Option<Segments>,
    prepared: Prepared<E::Real>,
    wanted: Wanted,
    isa: Isa,
    sizes: Sizes,
}

impl<E: Element> Saved<E> {
    /// The gradients in the order of the recorded inputs.
    fn backward(&self, dy: &Tensor) -> Result<Gradients> {
        let no_cache: Option<&FilterCache> = None;
        let args = LongConv {
            x: &self.x,
            filter: &self.filter,
            reverse: self.reverse.as_ref(),
            d: self.d.as_ref(),
            pre_gate: self.pre_gate.as_ref(),
            post_gate: self.post_gate.as_ref(),
            past: None,
            segments: self.segments.as_ref(),
            cache: no_cache,
        };
        let dy = with_unit_stride(dy)?;
        let found = Ready::new(&args)?.with(&args, self.sizes, self.isa, |problem: Problem<E>| {
            let held = Held::new(&dy);
            let (geometry, spectrum) = match &self.prepared {
                Prepared::Transformed(geometry, spectrum) => (*geometry, spectrum.clone()),
                Prepared::Direct(_) => match plan::by_transform(&self.sizes, problem.longest) {
                    Method::Fft(geometry) | Method::Overlap(geometry) => {
                        (geometry, problem.spectrum(&args, geometry)?)
                    }
                    Method::Direct => {
                        return Err(Error::value("long_conv: method", "a transform", "another"));
                    }
                },
            };
            Ok(problem.backward(geometry, &spectrum, held.rows()?, self.wanted))
        })?;
        self.collect(found)
    }

    fn collect(&self, found: Found<E>) -> Result<Gradients> {
        let Sizes { batch, length, channels, groups, .. } = self.sizes;
        let sequence = |values: Vec<E>| tensor(values, (batch, length, channels));
        // [K met, D] to [G, K], zero for the taps that no token met
        let filter = |values: &[E::Real], like: &Tensor| -> Result<Tensor> {
            let met = values.len() / channels;
            let met = tensor(values.to_vec(), (met, groups, channels / groups)).sum(D::Minus1)?;
            let missing = like.dim(1)?.saturating_sub(met.dim(0)?);
            Ok(met.pad_with_zeros(0, 0, missing)?.t()?)
        };
        let wanted = self.wanted.filter;
        let mut all = vec![Some(sequence(found.x))];
        all.push(wanted.then(|| filter(&found.past, &self.filter)).transpose()?);
        if let Some(reverse) = &self.reverse {
            all.push(wanted.then(|| filter(&found.future, reverse)).transpose()?);
        }
        if self.d.is_some() {
            all.push(wanted.then(|| tensor(found.past[..channels].to_vec(), channels)));
        }
        all.extend(self.pre_gate.as_ref().map(|_| Some(sequence(found.pre_gate))));
        let post_gate = self.wanted.post_gate.then(|| sequence(found.post_gate));
        all.extend(self.post_gate.as_ref().map(|_| post_gate));
        Ok(all)
    }
}
