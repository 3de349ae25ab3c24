//! The operator in candle's graph.

use super::cpu::{Problem, backward::Gradients};
use super::{Attention, Sizes};
use crate::autograd::record;
use crate::backend::cpu::simd::Element;
use crate::backend::cpu::view::{Held, tensor, with_unit_stride};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// The attention of checked arguments on the CPU.
pub(super) fn recorded(args: &Attention, sizes: Sizes) -> Result<Tensor> {
    match args.q.dtype() {
        DType::F32 => typed::<f32>(args, sizes),
        DType::F64 => typed::<f64>(args, sizes),
        DType::BF16 => typed::<bf16>(args, sizes),
        DType::F16 => typed::<f16>(args, sizes),
        other => Err(Error::dtype("attention: q", "f32, f64, bf16 or f16", other)),
    }
}

fn typed<E: Element>(args: &Attention, sizes: Sizes) -> Result<Tensor> {
    let shape = (sizes.batch, sizes.queries, sizes.heads, sizes.values);
    let saved = Saved {
        q: with_unit_stride(args.q)?.detach(),
        k: with_unit_stride(args.k)?.detach(),
        v: with_unit_stride(args.v)?.detach(),
        scale: args.scale,
        keys: args.keys.to_vec(),
        sizes,
    };
    let locks = saved.hold();
    let (y, logs) = saved.problem::<E>(&locks)?.forward();
    drop(locks);
    let inputs = [args.q, args.k, args.v];
    if !inputs.iter().any(|x| x.track_op()) {
        return Ok(tensor(y, shape));
    }
    let y = tensor(y, shape);
    let copy = crate::autograd::storage_of(&y)?;
    let [recorded] = record("attention", &inputs, [copy], move |[dy]| {
        let Some(dy) = dy else { return Ok(vec![None; 3]) };
        Ok(saved.backward::<E>(&y, &logs, dy)?)
    })?;
    Ok(recorded)
}

/// The arguments, detached.
struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
    keys: Vec<Range<usize>>,
    sizes: Sizes,
}

impl Saved {
    fn hold(&self) -> [Held<'_>; 3] {
        [&self.q, &self.k, &self.v].map(Held::new)
    }

    fn problem<'a, E: Element>(&'a self, locks: &'a [Held<'a>; 3]) -> Result<Problem<'a, E>> {
        let [q, k, v] = locks;
        let (q, k, v) = (q.rows()?, k.rows()?, v.rows()?);
        Ok(Problem { q, k, v, scale: self.scale, keys: &self.keys, sizes: self.sizes })
    }

    fn backward<E: Element>(&self, y: &Tensor, logs: &[E::Real], dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let locks = self.hold();
        let dy = with_unit_stride(dy)?;
        let (y, dy) = (Held::new(y), Held::new(&dy));
        let Gradients { q, k, v } = self.problem::<E>(&locks)?.backward(y.rows()?, logs, dy.rows()?);
        let gradients = [(q, &self.q), (k, &self.k), (v, &self.v)];
        Ok(gradients.into_iter().map(|(data, like)| Some(tensor(data, like.shape()))).collect())
    }
}
