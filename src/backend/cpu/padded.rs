//! Matrices made for products: their rows can be read by whole registers.

use super::matrix::Matrix;
use super::simd::{MAX_LANES, Real, Simd};
use super::view::{lanes, load, put};
use std::ops::Range;

/// Rows of a buffer of the thread, zero behind their columns up to a whole register. An odd number of cache lines lies
/// between two of them, so that those of one column do not contend for one set of the cache.
pub(crate) struct Padded<T> {
    values: Vec<T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<T: Real> Padded<T> {
    /// All zero.
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        let line = 64 / size_of::<T>();
        let lines = columns.next_multiple_of(MAX_LANES) / line;
        let stride = (lines + 1 - lines % 2) * line;
        Self { values: vec![T::ZERO; rows * stride], rows, columns, stride }
    }

    /// The first `rows` rows.
    pub(crate) fn matrix(&self, rows: usize) -> Matrix<'_, T> {
        Matrix::new(&self.values, [rows, self.columns], [self.stride, 1])
    }

    /// All rows.
    pub(crate) fn whole(&self) -> Matrix<'_, T> {
        self.matrix(self.rows)
    }

    /// Some rows and the first `columns` columns as right operand of a product.
    pub(crate) fn right(&self, rows: Range<usize>, columns: usize) -> Right<'_, T> {
        assert!(rows.end <= self.rows && columns <= self.columns);
        let values = &self.values[rows.start * self.stride..];
        Right { values, rows: rows.len(), columns, stride: self.stride }
    }

    /// Where to write.
    pub(crate) fn target(&mut self) -> Target<T> {
        Target { start: self.values.as_mut_ptr(), stride: self.stride }
    }

    /// One row.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &[T] {
        &self.values[i * self.stride..][..self.columns]
    }

    /// One row.
    #[inline(always)]
    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.values[i * self.stride..][..self.columns]
    }

    /// All numbers, with the zeros between the rows.
    pub(crate) fn all(&self) -> &[T] {
        &self.values
    }

    /// Zeros everywhere.
    pub(crate) fn clear(&mut self) {
        self.values.fill(T::ZERO);
    }

    /// All rows, one behind the other, to the end of `to`.
    pub(crate) fn append_to(&self, to: &mut Vec<T>) {
        (0..self.rows).for_each(|i| to.extend_from_slice(self.row(i)));
    }

    /// All rows, one behind the other, to `to`.
    ///
    /// # Safety
    /// There is place for them that nobody else touches.
    pub(crate) unsafe fn copy_to(&self, to: *mut T) {
        for i in 0..self.rows {
            let from = self.row(i);
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.add(i * self.columns), self.columns) };
        }
    }

    /// `weight(i) a[i]` in row `i`.
    #[inline(always)]
    pub(crate) fn fill<S: Simd<T>>(&mut self, s: S, a: Matrix<T>, weight: impl Fn(usize) -> T) {
        assert!(a.dims[0] <= self.rows && a.dims[1] == self.columns);
        for i in 0..a.dims[0] {
            let (from, weight, to) = (a.row(i), s.splat(weight(i)), self.row_mut(i));
            for (c, n) in lanes(s, 0..from.len()) {
                put(s, to, c, n, s.mul(weight, load(s, from, c, n)));
            }
        }
    }

    /// The rows of `a` in the first columns.
    #[inline(always)]
    pub(crate) fn fill_transposed<S: Simd<T>>(&mut self, s: S, a: Matrix<T>) {
        let [m, n] = a.dims;
        assert!(n <= self.rows && m <= self.columns && (a.strides[1] == 1 || n <= 1));
        let square = S::LANES;
        let (whole, to) = ([m - m % square, n - n % square], self.target());
        // SAFETY: squares within both matrices.
        unsafe {
            for i in (0..whole[0]).step_by(square) {
                for j in (0..whole[1]).step_by(square) {
                    let from = a.as_ptr().add(i * a.strides[0] + j);
                    s.transpose(from, a.strides[0], to.start.add(j * to.stride + i), to.stride);
                }
            }
        }
        for i in 0..m {
            let first = if i < whole[0] { whole[1] } else { 0 };
            for j in first..n {
                self.values[j * self.stride + i] = *a.at(i, j);
            }
        }
    }
}

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, T> {
    pub(super) values: &'a [T],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
}

/// A matrix to write: `[i, j]` lies `stride i + j` from the start.
#[derive(Clone, Copy)]
pub(crate) struct Target<T> {
    pub(crate) start: *mut T,
    pub(crate) stride: usize,
}

impl<T> Target<T> {
    /// From an element on, which need not be.
    #[inline(always)]
    pub(super) fn at(self, row: usize, column: usize) -> Self {
        Self { start: self.start.wrapping_add(row * self.stride + column), ..self }
    }

    /// From row `row` on.
    ///
    /// # Safety
    /// There is such a row.
    pub(crate) unsafe fn from(self, row: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { start: unsafe { self.start.add(row * self.stride) }, ..self }
    }
}
