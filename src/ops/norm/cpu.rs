//! The CPU path: row by row, lanes over the channels.
//!
//! A row is read once and written once; what the norm needs in between, `s`, stays in a scratch row in the first cache.
//! Per element that is 8 bytes in f32 (12 with a residual, whose sum is written too): memory is the floor.

use super::{Norm, NormInput, NormKind};
use crate::Result;
use crate::backend::cpu::math::silu;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, MAX_LANES, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Outlet, Rows, lanes, load, put, store, with_unit_stride};
use candle_core::{Tensor, WithDType};
use std::ops::Range;

/// Elements that a task has at least.
const TASK_ELEMENTS: usize = 1 << 13;
/// Tasks there are at most: each has sums of its own for the gradients of weight and bias.
const TASKS: usize = 64;

/// The tensors of a call with unit stride.
pub(super) struct Prepared {
    x: Tensor,
    residual: Option<Tensor>,
    z: Option<Tensor>,
}

impl Prepared {
    pub(super) fn new(input: &NormInput) -> Result<Self> {
        let optional = |x: Option<&Tensor>| x.map(with_unit_stride).transpose();
        Ok(Self { x: with_unit_stride(input.x)?, residual: optional(input.residual)?, z: optional(input.z)? })
    }

    pub(super) fn hold(&self) -> Locks<'_> {
        Locks {
            x: Held::new(&self.x),
            residual: self.residual.as_ref().map(Held::new),
            z: self.z.as_ref().map(Held::new),
        }
    }
}

/// The locked storages of [`Prepared`].
pub(super) struct Locks<'a> {
    x: Held<'a>,
    residual: Option<Held<'a>>,
    z: Option<Held<'a>>,
}

/// What a call computes; `R` is what the residual is stored as.
pub(super) struct Problem<'a, E: Element, R: Element<Real = E::Real>> {
    pub(super) channels: usize,
    pub(super) group: usize,
    pub(super) kind: NormKind,
    /// Whether the norm is rounded before the weight is applied.
    pub(super) rounds: bool,
    pub(super) gate_after: bool,
    pub(super) eps: E::Real,
    pub(super) weight: Option<Vec<E::Real>>,
    bias: Option<Vec<E::Real>>,
    pub(super) x: Rows<'a, E>,
    residual: Option<Rows<'a, R>>,
    pub(super) z: Option<Rows<'a, E>>,
}

/// Mean (zero for an RMS norm) and reciprocal deviation of a group.
#[derive(Clone, Copy)]
pub(super) struct Moments<T> {
    pub(super) mean: T,
    pub(super) scale: T,
}

impl<'a, E: Element, R: Element<Real = E::Real>> Problem<'a, E, R> {
    pub(super) fn new(input: &NormInput, norm: &Norm, group: usize, locks: &'a Locks<'a>) -> Result<Self> {
        let wide = |x: Option<&Tensor>| -> Result<Option<Vec<E::Real>>> {
            Ok(x.map(|x| x.detach().to_dtype(E::Real::DTYPE)?.to_vec1()).transpose()?)
        };
        Ok(Self {
            channels: locks.x.rows::<E>()?.width(),
            group,
            kind: norm.kind,
            rounds: norm.kind != NormKind::Layer && input.z.is_none(),
            gate_after: input.norm_before_gate,
            eps: E::Real::from_f64(norm.eps),
            weight: wide(norm.weight)?,
            bias: wide(norm.bias)?,
            x: locks.x.rows()?,
            residual: locks.residual.as_ref().map(|held| held.rows()).transpose()?,
            z: locks.z.as_ref().map(|held| held.rows()).transpose()?,
        })
    }

    /// Elements of the whole call.
    pub(super) fn elements(&self) -> usize {
        self.x.count() * self.channels
    }

    /// Runs `work` on pieces of the rows, cut by the shape alone; the results in order.
    pub(super) fn over_rows<K: Kernel<E::Real>>(
        &self,
        work: impl Fn(Range<usize>) -> K + Sync + Send,
    ) -> Vec<K::Output>
    where
        K::Output: Send,
    {
        let rows = self.x.count();
        let size = rows.div_ceil(TASKS).max(TASK_ELEMENTS / self.channels);
        parallel::map(&parallel::pieces(rows, size), self.elements(), |rows| dispatch(work(rows.clone())))
    }

    /// The norm `[.., D]` and, with a residual, the sum.
    pub(super) fn forward(&self) -> (Vec<E>, Option<Vec<R>>) {
        let (mut y, mut sum) = (Vec::new(), Vec::new());
        let y_outlet = Outlet::fresh(&mut y, self.elements());
        let sum_outlet = self.residual.map(|_| Outlet::fresh(&mut sum, self.elements()));
        self.over_rows(|rows| Forward { problem: self, rows, y: &y_outlet, sum: sum_outlet.as_ref() });
        // SAFETY: the pieces cover all rows, and each wrote all channels of its own.
        unsafe {
            y.set_len(self.elements());
            if self.residual.is_some() {
                sum.set_len(self.elements());
            }
        }
        (y, self.residual.map(|_| sum))
    }

    /// What the norm of row `row` is taken of: `x`, `residual + x` as it is stored, or `x SiLU(z)`; zero beyond the row.
    #[inline(always)]
    pub(super) fn gather<S: Simd<E::Real>>(&self, s: S, row: usize, to: &mut [E::Real]) {
        let x = self.x.nth(row);
        for (c, n) in lanes(s, 0..self.channels) {
            let mut value = load(s, x, c, n);
            if let Some(residual) = &self.residual {
                value = rounded::<R, S>(s, s.add(load(s, residual.nth(row), c, n), value));
            }
            if let (Some(z), false) = (&self.z, self.gate_after) {
                value = s.mul(value, silu(s, load(s, z.nth(row), c, n)));
            }
            put(s, to, c, n, value);
        }
    }

    /// The moments of one group of `s`.
    #[inline(always)]
    pub(super) fn moments<S: Simd<E::Real>>(&self, s: S, group: &[E::Real]) -> Moments<E::Real> {
        let count = E::Real::from_f64(self.group as f64);
        let sum = |term: &dyn Fn(S::V) -> S::V| {
            let mut sum = s.splat(E::Real::ZERO);
            for (c, n) in lanes(s, 0..group.len()) {
                // the lanes beyond the group count for nothing
                let value = term(load(s, group, c, n));
                sum = s.add(sum, if n == S::LANES { value } else { first(s, n, value) });
            }
            s.sum(sum)
        };
        let mean = match self.kind {
            NormKind::Rms | NormKind::RmsOutside => E::Real::ZERO,
            NormKind::Layer => sum(&|value| value) / count,
        };
        let square = |value| {
            let centred = s.sub(value, s.splat(mean));
            s.mul(centred, centred)
        };
        let square = sum(&square) / count;
        let root = match self.kind {
            NormKind::RmsOutside => square.sqrt() + self.eps,
            NormKind::Rms | NormKind::Layer => (square + self.eps).sqrt(),
        };
        Moments { mean, scale: E::Real::ONE / root }
    }

    /// The normalised values, before weight and bias.
    #[inline(always)]
    pub(super) fn normal<S: Simd<E::Real>>(&self, s: S, value: S::V, moments: Moments<E::Real>) -> S::V {
        let normal = s.mul(s.sub(value, s.splat(moments.mean)), s.splat(moments.scale));
        if self.rounds { rounded::<E, S>(s, normal) } else { normal }
    }

    /// `normal weight + bias` of the channels from `c`.
    #[inline(always)]
    pub(super) fn affine<S: Simd<E::Real>>(&self, s: S, normal: S::V, c: usize, n: usize) -> S::V {
        let y = match &self.weight {
            Some(weight) => s.mul(normal, load(s, weight, c, n)),
            None => normal,
        };
        match &self.bias {
            Some(bias) => s.add(y, load(s, bias, c, n)),
            None => y,
        }
    }
}

/// `value` as a tensor of `E` holds it.
#[inline(always)]
fn rounded<E: Element, S: Simd<E::Real>>(s: S, value: S::V) -> S::V {
    let mut lanes = [E::narrow(E::Real::ZERO); MAX_LANES];
    // SAFETY: LANES <= MAX_LANES.
    unsafe {
        E::store(s, lanes.as_mut_ptr(), value);
        E::load(s, lanes.as_ptr())
    }
}

/// The first `n` lanes, zero in the others.
#[inline(always)]
fn first<T: Real, S: Simd<T>>(s: S, n: usize, value: S::V) -> S::V {
    let mut lanes = [T::ZERO; MAX_LANES];
    // SAFETY: n <= LANES <= MAX_LANES.
    unsafe {
        s.store_first(lanes.as_mut_ptr(), n, value);
        s.load(lanes.as_ptr())
    }
}

struct Forward<'a, E: Element, R: Element<Real = E::Real>> {
    problem: &'a Problem<'a, E, R>,
    rows: Range<usize>,
    y: &'a Outlet<'a, E>,
    sum: Option<&'a Outlet<'a, R>>,
}

impl<T: Real, E: Element<Real = T>, R: Element<Real = T>> Kernel<T> for Forward<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let p = self.problem;
        let mut values = vec![T::ZERO; p.channels];
        for row in self.rows {
            let start = row * p.channels;
            p.gather(s, row, &mut values);
            if let Some(sum) = self.sum {
                let to = sum.at(start, p.channels);
                for (c, n) in lanes(s, 0..p.channels) {
                    // SAFETY: `at` checked the place; no other task has this row.
                    unsafe { store(s, to.add(c), n, load(s, &values, c, n)) };
                }
            }
            let to = self.y.at(start, p.channels);
            for group in (0..p.channels).step_by(p.group) {
                let channels = group..group + p.group;
                let moments = p.moments(s, &values[channels.clone()]);
                for (c, n) in lanes(s, channels) {
                    let mut y = p.affine(s, p.normal(s, load(s, &values, c, n), moments), c, n);
                    if let (Some(z), true) = (&p.z, p.gate_after) {
                        y = s.mul(y, silu(s, load(s, z.nth(row), c, n)));
                    }
                    // SAFETY: `at` checked the place; no other task has this row.
                    unsafe { store(s, to.add(c), n, y) };
                }
            }
        }
    }
}
