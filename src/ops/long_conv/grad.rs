//! The operator in candle's graph.

use super::cpu::backward::{Gradients as Found, Wanted};
use super::cpu::filter::Spectrum;
use super::cpu::signal::Signal;
use super::cpu::{Prepared, Problem};
use super::plan;
use super::{FilterCache, LongConv, Sizes};
use crate::autograd::{Gradients, record};
use crate::backend::cpu::simd::{Element, Isa, Real};
use crate::backend::cpu::view::{Held, storage, tensor, with_unit_stride};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{D, DType, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::sync::Arc;

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
        let y = problem.forward(args, &prepared)?;
        let kept = match prepared {
            Prepared::Transformed(_, kept) if args.cache.is_some() => kept,
            _ => None,
        };
        Ok((y, kept))
    };
    let (y, kept) = ready.with(args, sizes, isa, forward)?;
    if !tracked {
        return Ok(tensor(y, shape));
    }
    let saved = Saved::<E> {
        x: args.x.detach(),
        filter: args.filter.detach(),
        reverse: args.reverse.map(Tensor::detach),
        taps_first: args.taps_first,
        d: args.d.map(Tensor::detach),
        pre_gate: args.pre_gate.map(Tensor::detach),
        post_gate: args.post_gate.map(Tensor::detach),
        segments: args.segments.cloned(),
        kept,
        wanted: Wanted {
            filter: args.filter.track_op()
                || [args.reverse, args.d].into_iter().flatten().any(|x| x.track_op()),
            post_gate: args.post_gate.is_some_and(|gate| gate.track_op()),
        },
        isa,
        sizes,
    };
    let [y] = record("long_conv", &inputs, [(Storage::Cpu(storage(y)), shape.into())], move |[dy]| {
        let Some(dy) = dy else { candle_core::bail!("long_conv: expected a gradient") };
        Ok(saved.backward(dy)?)
    })?;
    Ok(y)
}

/// The arguments, detached, for the backward pass, and the filter's transform if it is kept anyway.
struct Saved<E: Element> {
    x: Tensor,
    filter: Tensor,
    reverse: Option<Tensor>,
    taps_first: bool,
    d: Option<Tensor>,
    pre_gate: Option<Tensor>,
    post_gate: Option<Tensor>,
    segments: Option<Segments>,
    kept: Option<Arc<Spectrum<E::Real>>>,
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
            taps_first: self.taps_first,
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
            let geometry = plan::by_transform(&self.sizes, problem.longest);
            // a filter that went tap by tap, or whose transform was made on the way, is transformed here
            let kept = self.kept.as_deref().filter(|kept| kept.points(problem.lanes) == geometry.points);
            problem.backward(&args, geometry, kept, held.rows()?, self.wanted)
        })?;
        self.collect(found)
    }

    fn collect(&self, found: Found<E>) -> Result<Gradients> {
        let Sizes { batch, length, channels, groups, .. } = self.sizes;
        let sequence = |values: Vec<E>| tensor(values, (batch, length, channels));
        // [K met, D] to the filter's shape, zero for the taps that no token met
        let filter = |values: Vec<E::Real>, taps: usize| -> Result<Tensor> {
            let met = values.len() / channels;
            let mut all = tensor(values, (met, channels));
            if groups < channels {
                all = all.reshape((met, groups, channels / groups))?.sum(D::Minus1)?;
            }
            if met < taps {
                all = all.pad_with_zeros(0, 0, taps - met)?;
            }
            if self.taps_first { Ok(all) } else { transposed::<E::Real>(&all) }
        };
        let wanted = self.wanted.filter;
        let d = self.d.as_ref().map(|_| wanted.then(|| tensor(found.past[..channels].to_vec(), channels)));
        let mut all = vec![Some(sequence(found.x))];
        all.push(wanted.then(|| filter(found.past, self.sizes.taps)).transpose()?);
        if self.reverse.is_some() {
            all.push(wanted.then(|| filter(found.future, self.sizes.reverse)).transpose()?);
        }
        all.extend(d);
        all.extend(self.pre_gate.as_ref().map(|_| Some(sequence(found.pre_gate))));
        let post_gate = self.wanted.post_gate.then(|| sequence(found.post_gate));
        all.extend(self.post_gate.as_ref().map(|_| post_gate));
        Ok(all)
    }
}

/// Rows and columns of a tile that is transposed at a time.
const TILE: usize = 32;

/// `[columns, rows]` of a contiguous `[rows, columns]`.
fn transposed<T: Real>(matrix: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    let held = Held::new(matrix);
    let from = held.rows::<T>()?;
    let mut to = vec![T::ZERO; rows * columns];
    to.par_chunks_mut((TILE * rows).max(1)).enumerate().for_each(|(band, to)| {
        for first in (0..rows).step_by(TILE) {
            for row in first..rows.min(first + TILE) {
                let from = &from.row([row])[band * TILE..];
                to.chunks_exact_mut(rows).zip(from).for_each(|(to, &from)| to[row] = from);
            }
        }
    });
    Ok(tensor(to, (columns, rows)))
}
