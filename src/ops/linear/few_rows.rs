//! Few rows: the weights read once, at the speed of memory.
//!
//! A task takes some rows of the weight matrix and multiplies each with up to eight rows of `x`, which stay in the
//! first cache. For every pair of rows there is one register of partial sums over the inputs and one sum over its lanes
//! at the end, however many rows come together: a row's result does not depend on its neighbours.

use super::Sizes;
use super::matrix::Matrix;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::Outlet;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of `x` that share one pass over the weights.
const TOGETHER: usize = 8;
/// Bytes of weights that make a task.
const TASK: usize = 1 << 16;
/// Weights of fewer bytes are left to one thread: waking another takes longer.
const SERIAL: usize = 1 << 18;

/// How far ahead of its use, in bytes, a weight is asked of memory.
const AHEAD: usize = 4096;

/// `x weight^T + bias`, where the rows of the weight are contiguous.
pub(super) fn product<E: Element>(
    x: Matrix<E>,
    weight: Matrix<E>,
    bias: Option<&[E]>,
    Sizes { rows, inputs, outputs }: Sizes,
) -> Vec<E> {
    let groups: Vec<Group<E::Real>> = (0..rows)
        .step_by(TOGETHER)
        .map(|first| dispatch(Pack { x: x.part([first, 0], [TOGETHER.min(rows - first), inputs]), first }))
        .collect();
    let mut y: Vec<E> = Vec::new();
    let outlet = Outlet::fresh(&mut y, rows * outputs);
    let row_bytes = (inputs * size_of::<E>()).max(1);
    let task = (TASK / row_bytes).max(1).next_multiple_of(8);
    let run = |start: usize| {
        let outputs = start..outputs.min(start + task);
        dispatch(FewRows { groups: &groups, weight, bias, outputs, y: &outlet });
    };
    let tasks = outputs.div_ceil(task);
    if outputs * row_bytes <= SERIAL {
        (0..tasks).for_each(|i| run(i * task));
    } else {
        (0..tasks).into_par_iter().for_each(|i| run(i * task));
    }
    // SAFETY: the tasks wrote every output of every row.
    unsafe { y.set_len(rows * outputs) };
    y
}

/// Rows of `x` that go through the weights together, a register of each in turn, the last filled up with zeros.
struct Group<T> {
    values: Vec<T>,
    first: usize,
    rows: usize,
}

struct Pack<'a, E> {
    x: Matrix<'a, E>,
    first: usize,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Pack<'_, E> {
    type Output = Group<T>;
    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) -> Group<T> {
        let [rows, inputs] = self.x.dims;
        let mut values = vec![T::ZERO; inputs.div_ceil(S::LANES) * rows * S::LANES];
        for r in 0..rows {
            for i in 0..inputs {
                let place = (i / S::LANES * rows + r) * S::LANES + i % S::LANES;
                values[place] = self.x.at(r, i).widen();
            }
        }
        Group { values, first: self.first, rows }
    }
}

/// One task.
struct FewRows<'a, E: Element> {
    groups: &'a [Group<E::Real>],
    weight: Matrix<'a, E>,
    bias: Option<&'a [E]>,
    outputs: Range<usize>,
    y: &'a Outlet<'a, E>,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for FewRows<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for group in self.groups {
            match group.rows {
                1 => self.all::<S, 1, 4>(s, group),
                2 => self.all::<S, 2, 4>(s, group),
                3 => self.all::<S, 3, 4>(s, group),
                4 => self.all::<S, 4, 4>(s, group),
                5 => self.all::<S, 5, 2>(s, group),
                6 => self.all::<S, 6, 2>(s, group),
                7 => self.all::<S, 7, 2>(s, group),
                _ => self.all::<S, TOGETHER, 2>(s, group),
            }
        }
    }
}

impl<T: Real, E: Element<Real = T>> FewRows<'_, E> {
    /// `R` rows of `x` with all rows of the weight, `O` at a time.
    #[inline(always)]
    fn all<S: Simd<T>, const R: usize, const O: usize>(&self, s: S, group: &Group<T>) {
        let Range { mut start, end } = self.outputs;
        while start + O <= end {
            self.some::<S, R, O>(s, group, start);
            start += O;
        }
        while start < end {
            self.some::<S, R, 1>(s, group, start);
            start += 1;
        }
    }

    /// `R` rows of `x` with `O` rows of the weight.
    #[inline(always)]
    fn some<S: Simd<T>, const R: usize, const O: usize>(&self, s: S, group: &Group<T>, output: usize) {
        let n = self.weight.dims[1];
        let w: [&[E]; O] = std::array::from_fn(|o| self.weight.row(output + o));
        let step = R * S::LANES;
        let mut sums = [[s.splat(T::ZERO); O]; R];
        let mut i = 0;
        let mut x = group.values.chunks_exact(step);
        while i + S::LANES <= n {
            let Some(x) = x.next() else { break };
            // SAFETY: i + LANES <= n, the length of all rows.
            let w = std::array::from_fn(|o| unsafe {
                prefetch(w[o].as_ptr().wrapping_add(i).wrapping_byte_add(AHEAD));
                E::load(s, w[o].as_ptr().add(i))
            });
            accumulate(s, &mut sums, &w, x);
            i += S::LANES;
        }
        if let Some(x) = x.next() {
            // SAFETY: n - i < LANES values are left in all rows.
            let w = std::array::from_fn(|o| unsafe { E::load_first(s, w[o].as_ptr().add(i), n - i) });
            accumulate(s, &mut sums, &w, x);
        }
        let outputs = self.weight.dims[0];
        for (r, sums) in sums.iter().enumerate() {
            let to = self.y.at((group.first + r) * outputs + output, O);
            for (o, &sum) in sums.iter().enumerate() {
                let mut sum = s.sum(sum);
                if let Some(bias) = self.bias {
                    sum += bias[output + o].widen();
                }
                // SAFETY: `at` checked the place; no other task has these outputs.
                unsafe { to.add(o).write(E::narrow(sum)) };
            }
        }
    }
}

/// Adds the products of `O` registers of weights with `R` of `x`.
#[inline(always)]
fn accumulate<T: Real, S: Simd<T>, const R: usize, const O: usize>(
    s: S,
    sums: &mut [[S::V; O]; R],
    w: &[S::V; O],
    x: &[T],
) {
    assert_eq!(x.len(), R * S::LANES);
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: x holds R registers.
        let x = unsafe { s.load(x.as_ptr().add(r * S::LANES)) };
        for (sum, &w) in sums.iter_mut().zip(w) {
            *sum = s.fma(w, x, *sum);
        }
    }
}

/// Asks memory for what will be read soon; any address will do.
#[inline(always)]
fn prefetch<E>(p: *const E) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of x86_64 and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
