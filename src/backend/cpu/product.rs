//! Small matrix products on one thread, for operands that were just made and lie in the caches.
//!
//! A tile of the result, 8 rows of two registers, stays in registers while the inner dimension runs: 16 multiply-adds for
//! 10 loads, which keeps both units of a core busy without packing anything. The left operand is read number by number
//! with any strides, the right one by registers (it is [`super::padded`]). A triangle in either place costs its own area
//! alone, to the grain of a tile.
//!
//! Retention of one row of 8 heads of K 256, V 512 over 4096 tokens, f32, two cores of an AMD EPYC with AVX-512: 77 % of the
//! rate of a large product forward, 64 % with backward. At K 64, V 128 it is 57 % and 40 %: there the arguments come from
//! beyond the second cache as fast as they are computed with (3.4 bytes for every 100 operations forward), and the
//! gradients go through three more passes on their way out of the graph.

use super::matrix::Matrix;
use super::padded::{Right, Target};
use super::simd::{Isa, Kernel, Real, Simd};
use super::view::{lanes, load};
use std::ops::Range;

/// Inner products are added up so many terms at a time: that much of two registers of columns lies in the first cache.
const DEPTH: usize = 256;

/// Rows [`Ahead`] that are asked for at every tile.
const ROWS_A_TILE: usize = 2;

/// Rows that will be wanted soon, to be asked for while a product is computed: nothing else hides how far away they are.
#[derive(Clone, Copy)]
pub(crate) struct Ahead<T> {
    start: *const T,
    stride: usize,
    rows: usize,
    lines: usize,
}

impl<T> Ahead<T> {
    /// None.
    pub(crate) const NONE: Self = Self { start: std::ptr::null(), stride: 0, rows: 0, lines: 0 };

    /// The rows of a matrix.
    pub(crate) fn rows(a: Matrix<T>) -> Self {
        let lines = (a.dims[1] * size_of::<T>()).div_ceil(64);
        Self { start: a.as_ptr(), stride: a.strides[0], rows: a.dims[0], lines }
    }

    /// Asks for some of them, as the tile of number `tile` begins.
    #[inline(always)]
    fn ask<S: Simd<T>>(&self, s: S, tile: usize)
    where
        T: Real,
    {
        let first = (tile * ROWS_A_TILE).min(self.rows);
        for row in first..(first + ROWS_A_TILE).min(self.rows) {
            for line in 0..self.lines {
                s.prefetch(self.start.wrapping_add(row * self.stride + line * (64 / size_of::<T>())));
            }
        }
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
    /// To be asked for on the way.
    pub(crate) ahead: [Ahead<T>; 2],
}

impl<'a, T: Real> Product<'a, T> {
    /// `a b`
    pub(crate) fn new(a: Matrix<'a, T>, b: Right<'a, T>) -> Self {
        assert_eq!(a.dims[1], b.rows, "the inner dimensions of a product");
        Self { a, b, part: Part::Whole, weights: None, plus: None, single: false, ahead: [Ahead::NONE; 2] }
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

    pub(crate) fn ahead(self, ahead: [Ahead<T>; 2]) -> Self {
        Self { ahead, ..self }
    }

    /// Computes it.
    ///
    /// # Safety
    /// `to` has a place for every element, which nobody else touches; what is added has one too, filled. These may be the
    /// same places.
    pub(crate) unsafe fn write(self, isa: Isa, to: Target<T>) {
        T::dispatch_on(isa, Run { product: self, to, tiles: 0 });
    }
}

struct Run<'a, T> {
    product: Product<'a, T>,
    to: Target<T>,
    /// Begun so far.
    tiles: usize,
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
    fn panel<S: Simd<T>, const N: usize>(&mut self, s: S, depth: &Range<usize>, column: usize) {
        // 32 registers hold 8 rows, 16 hold 4
        let wide = S::LANES * size_of::<T>() == 64;
        let rows = self.product.a.dims[0];
        let mut row = match self.product.part {
            Part::Lower(n) => column.saturating_sub(n),
            _ => 0,
        };
        while row < rows {
            for ahead in &self.product.ahead {
                ahead.ask(s, self.tiles);
            }
            self.tiles += 1;
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
    #[allow(clippy::needless_range_loop)]
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
        // by numbers, so that the sums stay in their registers
        for r in 0..M {
            let weight = weights.map(|weights| s.splat(weights[row + r]));
            for c in 0..N {
                let (mut sum, place) = (sums[r][c], column + c * S::LANES);
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
