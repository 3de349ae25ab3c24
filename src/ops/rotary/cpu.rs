//! The CPU path: sines and cosines of a token once, then all of its heads; rows are read where they lie.
//!
//! The gradient is the same rotation the other way.

use super::angles::Angles;
use super::{Rotary, RotaryStyle};
use crate::autograd::record;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Outlet, Rows, lanes, load, storage, store, tensor, with_unit_stride};
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// Numbers that a piece of the work has about.
const PIECE: usize = 1 << 15;

/// What is done to a tensor, beside its data.
#[derive(Clone)]
struct Turn {
    positions: Vec<i64>,
    frequencies: Vec<f64>,
    style: RotaryStyle,
    inverse: bool,
}

/// `rotary` of checked arguments.
pub(super) fn on_cpu(args: &Rotary, positions: Vec<i64>) -> Result<Tensor> {
    let turn = Turn {
        positions,
        frequencies: args.inverse_frequencies.to_vec(),
        style: args.style,
        inverse: args.inverse,
    };
    match args.x.dtype() {
        DType::F32 => recorded::<f32>(args.x, turn),
        DType::F64 => recorded::<f64>(args.x, turn),
        DType::BF16 => recorded::<bf16>(args.x, turn),
        DType::F16 => recorded::<f16>(args.x, turn),
        other => Err(Error::dtype("rotary: x", "f32, f64, bf16 or f16", other)),
    }
}

fn recorded<E: Element>(x: &Tensor, turn: Turn) -> Result<Tensor> {
    let y = apply::<E>(x, &turn)?;
    let shape = x.shape().clone();
    if !x.track_op() {
        return Ok(tensor(y, shape));
    }
    let back = Turn { inverse: !turn.inverse, ..turn };
    let outputs = vec![(Storage::Cpu(storage(y)), shape.clone())];
    let recorded = record("rotary", &[x], outputs, move |gradients| {
        let Some(Some(dy)) = gradients.first() else { return Ok(vec![None]) };
        Ok(vec![Some(tensor(apply::<E>(dy, &back)?, shape.clone()))])
    })?;
    recorded.into_iter().next().ok_or_else(|| Error::value("rotary", "a result", "none"))
}

fn apply<E: Element>(x: &Tensor, turn: &Turn) -> Result<Vec<E>> {
    let (_, length, heads, width) = x.dims4()?;
    let x = with_unit_stride(x)?;
    let held = Held::new(&x);
    let rows = held.rows::<E>()?;
    let tokens = turn.positions.len();
    let elements = tokens * heads * width;
    let angles = Angles::new(&turn.frequencies, turn.inverse, tokens);
    let mut y = Vec::new();
    let outlet = Outlet::fresh(&mut y, elements);
    let pieces = parallel::pieces(tokens, PIECE.div_ceil((heads * width).max(1)));
    parallel::map(&pieces, elements, |piece| {
        let style = turn.style;
        let positions = &turn.positions;
        dispatch(Rotate { x: rows, length, heads, positions, angles: &angles, style, piece, y: &outlet });
    });
    // SAFETY: the pieces cover all tokens, and each wrote all heads and channels of its own.
    unsafe { y.set_len(elements) };
    Ok(y)
}

struct Rotate<'a, E: Element> {
    x: Rows<'a, E>,
    length: usize,
    heads: usize,
    positions: &'a [i64],
    angles: &'a Angles<'a>,
    style: RotaryStyle,
    piece: &'a Range<usize>,
    y: &'a Outlet<'a, E>,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Rotate<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let width = self.x.width();
        let mut cursor = self.angles.cursor();
        let (mut cos, mut sin) = (vec![T::ZERO; width / 2], vec![T::ZERO; width / 2]);
        let mut row = vec![T::ZERO; width];
        let mut pairs = 0;
        for token in self.piece.clone() {
            self.angles.at(self.positions[token], &mut cursor, |i, c, s| {
                (cos[i], sin[i]) = (T::from_f64(c), T::from_f64(s));
                pairs = i + 1;
            });
            let (cos, sin) = (&cos[..pairs], &sin[..pairs]);
            for head in 0..self.heads {
                let x = self.x.row([token / self.length, token % self.length, head]);
                let at = (token * self.heads + head) * width;
                match self.style {
                    RotaryStyle::Half => self.half(s, x, at, cos, sin),
                    RotaryStyle::Interleaved => self.interleaved(s, x, at, cos, sin, &mut row),
                }
                for (c, n) in lanes(s, 2 * pairs..width) {
                    // SAFETY: `at` checked the place, which is this piece's own.
                    unsafe { store(s, self.y.at(at + c, n), n, load(s, x, c, n)) };
                }
            }
        }
    }
}

impl<T: Real, E: Element<Real = T>> Rotate<'_, E> {
    #[inline(always)]
    fn half<S: Simd<T>>(&self, s: S, x: &[E], at: usize, cos: &[T], sin: &[T]) {
        let pairs = cos.len();
        for (c, n) in lanes(s, 0..pairs) {
            let (x1, x2) = (load(s, x, c, n), load(s, x, pairs + c, n));
            let (cos, sin) = (load(s, cos, c, n), load(s, sin, c, n));
            let y1 = s.nfma(x2, sin, s.mul(x1, cos));
            let y2 = s.fma(x1, sin, s.mul(x2, cos));
            // SAFETY: `at` checked the places, which are this piece's own.
            unsafe {
                store(s, self.y.at(at + c, n), n, y1);
                store(s, self.y.at(at + pairs + c, n), n, y2);
            }
        }
    }

    /// `row` is scratch for a head.
    #[inline(always)]
    fn interleaved<S: Simd<T>>(&self, s: S, x: &[E], at: usize, cos: &[T], sin: &[T], row: &mut [T]) {
        let turned = 2 * cos.len();
        for (c, n) in lanes(s, 0..turned) {
            // SAFETY: the slice holds n numbers.
            unsafe { store(s, row[c..c + n].as_mut_ptr(), n, load(s, x, c, n)) };
        }
        for (pair, (&cos, &sin)) in row.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
            let (x1, x2) = (pair[0], pair[1]);
            pair[0] = x1 * cos - x2 * sin;
            pair[1] = x2 * cos + x1 * sin;
        }
        for (c, n) in lanes(s, 0..turned) {
            // SAFETY: `at` checked the place, which is this piece's own.
            unsafe { store(s, self.y.at(at + c, n), n, load(s, row, c, n)) };
        }
    }
}
