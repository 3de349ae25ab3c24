//! Small matrix products on one thread, for operands that were just made and lie in the caches.
//!
//! A tile of the result, 8 rows of two registers, stays in registers while the inner dimension runs: 16 multiply-adds for
//! 10 loads, which keeps both units of a core busy without packing anything. The left operand is read number by number
//! with any strides; the right one by registers, and so is [`Padded`]. A triangle in either place costs its own area
//! alone, to the grain of a tile.

use super::matrix::Matrix;
use super::simd::{Isa, Kernel, MAX_LANES, Real, Simd};
use super::view::{lanes, load, put};
use std::ops::Range;

/// Inner products are added up so many terms at a time: that much of two registers of columns lies in the first cache.
const DEPTH: usize = 256;

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
    values: &'a [T],
    rows: usize,
    columns: usize,
    stride: usize,
}

/// A matrix to write: `[i, j]` lies `stride i + j` from the start.
#[derive(Clone, Copy)]
pub(crate) struct Target<T> {
    pub(crate) start: *mut T,
    pub(crate) stride: usize,
}

impl<T> Target<T> {
    /// From row `row` on.
    ///
    /// # Safety
    /// There is such a row.
    pub(crate) unsafe fn from(self, row: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { start: unsafe { self.start.add(row * self.stride) }, ..self }
    }
}

/// What of a product is to be computed.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// The left operand `a[i, k]` is zero for `k > i + n`.
    LowerLeft(usize),
    /// The left operand `a[i, k]` is zero for `k + n < i`.
    UpperLeft(usize),
    /// Elements `[i, j]` of the result with `j > i + n` are not wanted: they may be left as they are.
    Lower(usize),
}

/// `to[i] = weights[i] (a b)[i] + factor plus[i]`, for `plus` of that factor; no weights are ones.
pub(crate) struct Product<'a, T> {
    pub(crate) a: Matrix<'a, T>,
    pub(crate) b: Right<'a, T>,
    pub(crate) part: Part,
    pub(crate) weights: Option<&'a [T]>,
    pub(crate) plus: Option<(Target<T>, T)>,
    /// Whether rows are taken one by one, so that no zero of a triangle meets a number: where one may not be finite.
    pub(crate) single: bool,
}

impl<'a, T: Real> Product<'a, T> {
    /// `a b`
    pub(crate) fn new(a: Matrix<'a, T>, b: Right<'a, T>) -> Self {
        assert_eq!(a.dims[1], b.rows, "the inner dimensions of a product");
        Self { a, b, part: Part::Whole, weights: None, plus: None, single: false }
    }

    pub(crate) fn part(self, part: Part) -> Self {
        Self { part, ..self }
    }

    pub(crate) fn weights(self, weights: &'a [T]) -> Self {
        assert!(weights.len() >= self.a.dims[0], "a weight for every row");
        Self { weights: Some(weights), ..self }
    }

    pub(crate) fn plus(self, plus: Option<(Target<T>, T)>) -> Self {
        Self { plus, ..self }
    }

    pub(crate) fn single(self, single: bool) -> Self {
        Self { single, ..self }
    }

    /// Computes it.
    ///
    /// # Safety
    /// `to` has a place for every element, which nobody else touches; what is added has one too, filled. These may be the
    /// same places.
    pub(crate) unsafe fn write(self, isa: Isa, to: Target<T>) {
        T::dispatch_on(isa, Run { product: self, to });
    }
}

struct Run<'a, T> {
    product: Product<'a, T>,
    to: Target<T>,
}

impl<T: Real> Kernel<T> for Run<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, s: S) {
        let [inner, columns] = [self.product.b.rows, self.product.b.columns];
        let mut depth = 0..inner.min(DEPTH);
        loop {
            let mut column = 0;
            while column < columns {
                if columns - column > S::LANES {
                    self.panel::<S, 2>(s, &depth, column);
                    column += 2 * S::LANES;
                } else {
                    self.panel::<S, 1>(s, &depth, column);
                    column += S::LANES;
                }
            }
            if depth.end >= inner {
                return;
            }
            depth = depth.end..inner.min(depth.end + DEPTH);
            self.product.plus = Some((self.to, T::ONE));
        }
    }
}

impl<T: Real> Run<'_, T> {
    /// `N` registers of columns.
    #[inline(always)]
    fn panel<S: Simd<T>, const N: usize>(&self, s: S, depth: &Range<usize>, column: usize) {
        // 32 registers hold 8 rows, 16 hold 4
        let wide = S::LANES * size_of::<T>() == 64;
        let rows = self.product.a.dims[0];
        let mut row = match self.product.part {
            Part::Lower(n) => column.saturating_sub(n),
            _ => 0,
        };
        while row < rows {
            let left = if self.product.single { 1 } else { rows - row };
            row += if wide && left >= 8 {
                self.tile::<S, 8, N>(s, depth, row, column)
            } else if left >= 4 {
                self.tile::<S, 4, N>(s, depth, row, column)
            } else {
                self.tile::<S, 1, N>(s, depth, row, column)
            };
        }
    }

    /// `M` rows of `N` registers; returns `M`.
    #[inline(always)]
    fn tile<S: Simd<T>, const M: usize, const N: usize>(
        &self,
        s: S,
        depth: &Range<usize>,
        row: usize,
        column: usize,
    ) -> usize {
        let Product { a, b, part, weights, plus, .. } = &self.product;
        let (first, end) = match *part {
            Part::LowerLeft(n) => (depth.start, depth.end.min(row + M + n)),
            Part::UpperLeft(n) => (depth.start.max(row.saturating_sub(n)), depth.end),
            Part::Whole | Part::Lower(_) => (depth.start, depth.end),
        };
        let [by_row, by_column] = a.strides;
        let mut sums = [[s.splat(T::ZERO); N]; M];
        // SAFETY: rows below dims[0] and inner places below b.rows = dims[1]; the rows of b can be read up to a whole
        // register, as Padded made them.
        unsafe {
            let left = a.as_ptr().add(row * by_row);
            let right = b.values.as_ptr().add(column);
            for k in first..end {
                let mut registers = [s.splat(T::ZERO); N];
                for (c, register) in registers.iter_mut().enumerate() {
                    *register = s.load(right.add(k * b.stride + c * S::LANES));
                }
                let left = left.add(k * by_column);
                for (r, sums) in sums.iter_mut().enumerate() {
                    let number = s.splat(*left.add(r * by_row));
                    for (sum, register) in sums.iter_mut().zip(registers) {
                        *sum = s.fma(number, register, *sum);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let weight = weights.map(|weights| s.splat(weights[row + r]));
            for (c, mut sum) in sums.into_iter().enumerate() {
                let place = column + c * S::LANES;
                let n = S::LANES.min(b.columns - place);
                if let Some(weight) = weight {
                    sum = s.mul(weight, sum);
                }
                // SAFETY: the promise made to `write`.
                unsafe {
                    if let Some((plus, factor)) = plus {
                        let from = plus.start.add((row + r) * plus.stride + place);
                        let old = if n == S::LANES { s.load(from) } else { s.load_first(from, n) };
                        sum = s.fma(s.splat(*factor), old, sum);
                    }
                    let to = self.to.start.add((row + r) * self.to.stride + place);
                    if n == S::LANES {
                        s.store(to, sum)
                    } else {
                        s.store_first(to, n, sum)
                    };
                }
            }
        }
        M
    }
}

/// Whether all values are finite.
#[inline(always)]
pub(crate) fn all_finite<T: Real, S: Simd<T>>(s: S, a: Matrix<T>) -> bool {
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
pub(crate) fn dot<T: Real, S: Simd<T>>(s: S, a: &[T], b: &[T]) -> T {
    let mut sum = s.splat(T::ZERO);
    for (c, n) in lanes(s, 0..a.len()) {
        sum = s.fma(load(s, a, c, n), load(s, b, c, n), sum);
    }
    s.sum(sum)
}
