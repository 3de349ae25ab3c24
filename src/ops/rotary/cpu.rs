//! The CPU path: one read and one write; the turn back is its gradient.

use super::{Rotary, RotaryStyle};
use crate::autograd::record;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Outlet, storage, with_unit_stride};
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor, WithDType};
use half::{bf16, f16};

/// What all rows share.
struct Turn {
    cos: Vec<f64>,
    sin: Vec<f64>,
    pairs: usize,
    /// Tokens with an angle of their own: `L`, or `B L`.
    tokens: usize,
    style: RotaryStyle,
}

/// [`rotary`](super::rotary) of checked arguments.
pub(super) fn on_cpu(args: &Rotary) -> Result<Tensor> {
    let (cos, sin) = args.table();
    let (pairs, tokens) = (args.frequencies.len(), args.positions.len());
    let turn = Turn { cos, sin, pairs, tokens, style: args.style };
    let y = turn.apply(args.x)?;
    let back = Turn { sin: turn.sin.iter().map(|s| -s).collect(), ..turn };
    let [y] = record("rotary", &[args.x], [(y, args.x.shape().clone())], move |[dy]| {
        let Some(dy) = dy else { return Ok(vec![None]) };
        let dx = back.apply(dy)?;
        let none = candle_core::op::BackpropOp::none();
        Ok(vec![Some(Tensor::from_storage(dx, dy.shape().clone(), none, false))])
    })?;
    Ok(y)
}

impl Turn {
    fn apply(&self, x: &Tensor) -> Result<Storage> {
        match x.dtype() {
            DType::F32 => self.typed::<f32>(x),
            DType::F64 => self.typed::<f64>(x),
            DType::BF16 => self.typed::<bf16>(x),
            DType::F16 => self.typed::<f16>(x),
            other => Err(Error::dtype("rotary: x", "f32, f64, bf16 or f16", other)),
        }
    }

    fn typed<E: Element>(&self, x: &Tensor) -> Result<Storage> {
        let (batch, length, heads, width) = x.dims4()?;
        let x = with_unit_stride(x)?;
        let held = Held::new(&x);
        let rows = held.rows::<E>()?;
        let table = |values: &[f64]| values.iter().map(|&x| E::Real::from_f64(x)).collect::<Vec<_>>();
        let (cos, sin) = (table(&self.cos), table(&self.sin));
        let mut y = Vec::new();
        let elements = batch * length * heads * width;
        let outlet = Outlet::fresh(&mut y, elements);
        let pieces = parallel::pieces(batch * length, (1usize << 14).div_ceil((heads * width).max(1)));
        parallel::map(&pieces, elements, |tokens| {
            for token in tokens.clone() {
                let at = token % self.tokens * self.pairs;
                let (cos, sin) = (&cos[at..at + self.pairs], &sin[at..at + self.pairs]);
                for head in 0..heads {
                    let from = rows.row([token / length, token % length, head]);
                    let to = outlet.at((token * heads + head) * width, width);
                    // the place lies in the buffer and belongs to this piece
                    dispatch(Row { from, to, cos, sin, style: self.style });
                }
            }
        });
        // SAFETY: the pieces wrote every row.
        unsafe { y.set_len(elements) };
        Ok(Storage::Cpu(storage(y)))
    }
}

/// One head of one token; `to` has a place for each element of `from`.
struct Row<'a, E: Element> {
    from: &'a [E],
    to: *mut E,
    cos: &'a [E::Real],
    sin: &'a [E::Real],
    style: RotaryStyle,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Row<'_, E> {
    type Output = ();

    /// Plain loops: the compiler vectorises them for the instruction set.
    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) {
        let pairs = self.cos.len();
        let (step, apart) = match self.style {
            RotaryStyle::Half => (1, pairs),
            RotaryStyle::Interleaved => (2, 1),
        };
        let turned = &self.from[..2 * pairs];
        for (i, (&cos, &sin)) in self.cos.iter().zip(self.sin).enumerate() {
            let (a, b) = (turned[step * i].widen(), turned[step * i + apart].widen());
            // SAFETY: the places of a and b, which `to` has as `from` does.
            unsafe {
                self.to.add(step * i).write(E::narrow(a * cos - b * sin));
                self.to.add(step * i + apart).write(E::narrow(a * sin + b * cos));
            }
        }
        for (i, &x) in self.from.iter().enumerate().skip(2 * pairs) {
            // SAFETY: as above.
            unsafe { self.to.add(i).write(x) };
        }
    }
}
