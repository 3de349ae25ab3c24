//! Few rows: the weights read once, at the speed of memory.
//!
//! A task takes some rows of the weight matrix, one after another, so that memory is read in one stream, and multiplies
//! each with up to eight rows of `x`, which stay in the first cache. For every pair of rows there are two registers of
//! partial sums over the inputs and one sum over their lanes at the end, however many rows come together: a row's result
//! does not depend on its neighbours.

use super::Sizes;
use crate::backend::cpu::matrix::Matrix;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::Outlet;
use rayon::prelude::*;
use std::ops::Range;

/// Rows of `x` that share one pass over the weights.
const TOGETHER: usize = 8;
/// Bytes of weights that make a task.
const TASK: usize = 1 << 17;
/// Weights of fewer bytes are left to one thread: waking another takes longer.
const SERIAL: usize = 1 << 18;

/// How far ahead of its use, in bytes, a weight is asked of memory: as much as comes in while memory answers.
const AHEAD: usize = 3072;
/// Bytes that memory hands out together.
const LINE: usize = 64;

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
    let task = (TASK / row_bytes).max(8);
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
                1 => self.all::<S, 1>(s, group),
                2 => self.all::<S, 2>(s, group),
                3 => self.all::<S, 3>(s, group),
                4 => self.all::<S, 4>(s, group),
                5 => self.all::<S, 5>(s, group),
                6 => self.all::<S, 6>(s, group),
                7 => self.all::<S, 7>(s, group),
                _ => self.all::<S, TOGETHER>(s, group),
            }
        }
    }
}

impl<T: Real, E: Element<Real = T>> FewRows<'_, E> {
    /// `R` rows of `x` with all rows of the weight.
    #[inline(always)]
    fn all<S: Simd<T>, const R: usize>(&self, s: S, group: &Group<T>) {
        let outputs = self.weight.dims[0];
        for output in self.outputs.clone() {
            let sums = sums::<T, E, S, R>(s, self.weight.row(output), &group.values);
            for (r, [even, odd]) in sums.into_iter().enumerate() {
                let mut sum = s.sum(s.add(even, odd));
                if let Some(bias) = self.bias {
                    sum += bias[output].widen();
                }
                let to = self.y.at((group.first + r) * outputs + output, 1);
                // SAFETY: `at` checked the place; no other task has this output.
                unsafe { to.write(E::narrow(sum)) };
            }
        }
    }
}

/// One row of the weight with `R` rows of `x`: partial sums of the registers of even and of odd number.
#[inline(always)]
fn sums<T: Real, E: Element<Real = T>, S: Simd<T>, const R: usize>(
    s: S,
    weight: &[E],
    x: &[T],
) -> [[S::V; 2]; R] {
    let mut sums = [[s.splat(T::ZERO); 2]; R];
    let mut pairs = weight.chunks_exact(2 * S::LANES);
    let mut x = x.chunks(2 * R * S::LANES);
    for (w, x) in (&mut pairs).zip(&mut x) {
        for byte in (0..2 * S::LANES * size_of::<E>()).step_by(LINE) {
            prefetch(w.as_ptr().wrapping_byte_add(AHEAD + byte));
        }
        // SAFETY: w holds two registers.
        let w = unsafe { [E::load(s, w.as_ptr()), E::load(s, w.as_ptr().add(S::LANES))] };
        accumulate(s, &mut sums, w, x);
    }
    if let Some(x) = x.next() {
        // a last register or two, the last of them not full: x has zeros there, and as many registers
        let mut rest = pairs.remainder().chunks(S::LANES).map(|w| {
            // SAFETY: w holds as many values.
            unsafe {
                if w.len() == S::LANES {
                    E::load(s, w.as_ptr())
                } else {
                    E::load_first(s, w.as_ptr(), w.len())
                }
            }
        });
        if let Some(even) = rest.next() {
            match rest.next() {
                Some(odd) => accumulate(s, &mut sums, [even, odd], x),
                None => accumulate(s, &mut sums, [even], x),
            }
        }
    }
    sums
}

/// Adds the products of `U` registers of the weight with as many of each row of `x`.
#[inline(always)]
fn accumulate<T: Real, S: Simd<T>, const R: usize, const U: usize>(
    s: S,
    sums: &mut [[S::V; 2]; R],
    w: [S::V; U],
    x: &[T],
) {
    assert_eq!(x.len(), U * R * S::LANES);
    for (u, &w) in w.iter().enumerate() {
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: x holds U times R registers.
            let x = unsafe { s.load(x.as_ptr().add((u * R + r) * S::LANES)) };
            sums[u] = s.fma(w, x, sums[u]);
        }
    }
}

/// Asks memory for what will be read soon; any address will do.
#[inline(always)]
fn prefetch<E>(p: *const E) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is part of x86_64 and never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
