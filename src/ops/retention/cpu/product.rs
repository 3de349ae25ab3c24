//! Small matrix products, and row by row what goes into them.

use crate::backend::cpu::matrix::{self, Matrix};
use crate::backend::cpu::simd::{Real, Simd};
use crate::backend::cpu::view::{lanes, load, put};

/// A matrix to write: `[i, j]` lies `stride i + j` from the start.
#[derive(Clone, Copy)]
pub(super) struct Target<T> {
    pub(super) start: *mut T,
    pub(super) stride: usize,
}

impl<T> Target<T> {
    /// Of a buffer of rows of `columns` numbers.
    pub(super) fn new(values: &mut [T], columns: usize) -> Self {
        Self { start: values.as_mut_ptr(), stride: columns }
    }

    /// From row `row` on.
    ///
    /// # Safety
    /// There is such a row.
    pub(super) unsafe fn from(self, row: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { start: unsafe { self.start.add(row * self.stride) }, ..self }
    }
}

/// `to = keep to + a b`; without `keep` whatever is there is overwritten.
///
/// # Safety
/// `to` has a place for every element of the product, filled if it is kept, that nobody else touches.
pub(super) unsafe fn multiply<T: Real>(to: Target<T>, keep: Option<T>, a: Matrix<T>, b: Matrix<T>) {
    assert_eq!(a.dims[1], b.dims[0]);
    // SAFETY: the matrices hold what their dims say, the target by the caller's promise.
    unsafe { matrix::multiply(a, b, to.start, to.stride, keep) }
}

/// `to[i] = weights[i] a[i]`, rows of a contiguous buffer.
#[inline(always)]
pub(super) fn weigh<'t, T: Real, S: Simd<T>>(
    s: S,
    a: Matrix<T>,
    weight: impl Fn(usize) -> T,
    to: &'t mut [T],
) -> Matrix<'t, T> {
    let [rows, columns] = a.dims;
    let to = &mut to[..rows * columns];
    for (i, to) in to.chunks_mut(columns).enumerate() {
        let (from, weight) = (a.row(i), s.splat(weight(i)));
        for (c, n) in lanes(s, 0..columns) {
            put(s, to, c, n, s.mul(weight, load(s, from, c, n)));
        }
    }
    Matrix::new(to, [rows, columns], [columns, 1])
}

/// Whether all values are finite.
#[inline(always)]
pub(super) fn all_finite<T: Real, S: Simd<T>>(s: S, a: Matrix<T>) -> bool {
    let zero = s.splat(T::ZERO);
    let mut sum = zero;
    for i in 0..a.dims[0] {
        let row = a.row(i);
        for (c, n) in lanes(s, 0..row.len()) {
            // zero times infinity or NaN is NaN
            sum = s.fma(load(s, row, c, n), zero, sum);
        }
    }
    s.sum(sum) == T::ZERO
}

/// The inner product of two rows.
#[inline(always)]
pub(super) fn dot<T: Real, S: Simd<T>>(s: S, a: &[T], b: &[T]) -> T {
    let mut sum = s.splat(T::ZERO);
    for (c, n) in lanes(s, 0..a.len()) {
        sum = s.fma(load(s, a, c, n), load(s, b, c, n), sum);
    }
    s.sum(sum)
}
