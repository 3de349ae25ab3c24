//! Small matrix products on one thread, for operands that were just made and lie in the caches.
//!
//! A tile of the result, 8 rows of two registers, stays in registers while the inner dimension runs: 16 multiply-adds for
//! 10 loads, which keeps both units of a core busy without packing anything. The left operand is read number by number
//! with any strides, the right one by registers (it is [`super::padded`]). A triangle in either place costs its own area
//! alone, to the grain of a tile.
//!
//! Retention of one row of 8 heads over 4096 tokens, f32, two cores of an AMD EPYC with AVX-512, in shares of the rate of
//! a large product: K 256, V 512 80 to 84 % forward, 66 to 70 % with backward; K 64, V 128 64 to 66 % forward, 43 to 50 %
//! with backward. Where all lies in the caches (256 tokens of 2 heads) the latter is 65 %: what limits it is memory, a good
//! part of it candle's own, which clears a tensor for every gradient and adds the gradient to it.

use super::matrix::Matrix;
use super::padded::{Right, Target};
use super::simd::{Isa, Kernel, Real, Simd};
use super::view::{lanes, load};
use std::ops::Range;

/// Inner products are added up so many terms at a time: that much of two registers of columns lies in the first cache.
const DEPTH: usize = 256;

/// The largest tile: rows, and bytes of columns.
const ROWS: usize = 8;
const COLUMNS: usize = 128;

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

    /// Asks for its share of them, as the tile of number `tile` of `tiles` begins.
    #[inline(always)]
    fn ask<S: Simd<T>>(&self, s: S, tile: usize, tiles: usize)
    where
        T: Real,
    {
        let share = self.rows.div_ceil(tiles);
        let first = (tile * share).min(self.rows);
        for row in first..(first + share).min(self.rows) {
            for line in 0..self.lines {
                s.prefetch(self.start.wrapping_add(row * self.stride + line * (64 / size_of::<T>())));
            }
        }
    }
}

/// What of a product is to be computed. Where there are two terms, an operand of zeros is that of the second.
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

/// Two matrices to multiply.
#[derive(Clone, Copy)]
struct Term<'a, T> {
    a: Matrix<'a, T>,
    b: Right<'a, T>,
}

impl<'a, T> Term<'a, T> {
    fn new(a: Matrix<'a, T>, b: Right<'a, T>) -> Self {
        assert_eq!(a.dims[1], b.rows, "the inner dimensions of a product");
        Self { a, b }
    }
}

/// `to[i] = weights[i] (a b)[i] + (c d)[i] + factor plus[i]`, of which only the first term need be.
pub(crate) struct Product<'a, T> {
    term: Term<'a, T>,
    weights: Option<&'a [T]>,
    then: Option<Term<'a, T>>,
    plus: Option<(Target<T>, T)>,
    part: Part,
    single: bool,
    ahead: [Ahead<T>; 2],
}

impl<'a, T: Real> Product<'a, T> {
    /// `a b`
    pub(crate) fn new(a: Matrix<'a, T>, b: Right<'a, T>) -> Self {
        Self {
            term: Term::new(a, b),
            weights: None,
            then: None,
            plus: None,
            part: Part::Whole,
            single: false,
            ahead: [Ahead::NONE; 2],
        }
    }

    /// One for each row of `a`.
    pub(crate) fn weights(self, weights: &'a [T]) -> Self {
        assert!(weights.len() >= self.term.a.dims[0], "a weight for every row");
        Self { weights: Some(weights), ..self }
    }

    /// `c d`, a second term, added up in the same registers.
    pub(crate) fn then(self, c: Matrix<'a, T>, d: Right<'a, T>) -> Self {
        let term = Term::new(c, d);
        let shape = |term: &Term<T>| [term.a.dims[0], term.b.columns];
        assert_eq!(shape(&term), shape(&self.term), "the shapes of two terms");
        Self { then: Some(term), ..self }
    }

    pub(crate) fn plus(self, plus: Option<(Target<T>, T)>) -> Self {
        Self { plus, ..self }
    }

    pub(crate) fn part(self, part: Part) -> Self {
        Self { part, ..self }
    }

    /// Whether rows are taken one by one, so that no zero of a triangle meets a number: where one may not be finite.
    pub(crate) fn single(self, single: bool) -> Self {
        Self { single, ..self }
    }

    /// To be asked for on the way.
    pub(crate) fn ahead(self, ahead: [Ahead<T>; 2]) -> Self {
        Self { ahead, ..self }
    }

    /// Computes it.
    ///
    /// # Safety
    /// `to` has a place for every element, which nobody else touches; what is added has one too, filled. These may be the
    /// same places.
    pub(crate) unsafe fn write(self, isa: Isa, to: Target<T>) {
        let Self { term, weights, then, plus, part, single, ahead } = self;
        let (first, last) = match then {
            Some(then) => (Some(term), then),
            None => (None, term),
        };
        let tiles = last.a.dims[0].div_ceil(ROWS) * last.b.columns.div_ceil(COLUMNS / size_of::<T>());
        let tiles = tiles.max(1);
        T::dispatch_on(isa, Run { first, last, weights, plus, part, single, ahead, to, tiles, begun: 0 });
    }
}

struct Run<'a, T> {
    /// The weighted term, where there are two.
    first: Option<Term<'a, T>>,
    last: Term<'a, T>,
    weights: Option<&'a [T]>,
    plus: Option<(Target<T>, T)>,
    part: Part,
    single: bool,
    ahead: [Ahead<T>; 2],
    to: Target<T>,
    /// Tiles of the whole, about, and those begun so far.
    tiles: usize,
    begun: usize,
}

impl<T: Real> Kernel<T> for Run<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, s: S) {
        let [mut first, mut last] = [0..self.first.map_or(0, |term| term.b.rows), 0..self.last.b.rows];
        loop {
            // both at once where they fit
            let some = first.start..first.end.min(first.start + DEPTH);
            let left = if some.end < first.end { 0 } else { DEPTH - some.len() };
            let all = some.is_empty() || last.len() <= left;
            let then = last.start..if all { last.end.min(last.start + left) } else { last.start };
            self.pass(s, &some, &then);
            (first.start, last.start) = (some.end, then.end);
            if first.is_empty() && last.is_empty() {
                return;
            }
            self.plus = Some((self.to, T::ONE));
        }
    }
}

impl<T: Real> Run<'_, T> {
    /// Some inner places of the two terms.
    #[inline(always)]
    fn pass<S: Simd<T>>(&mut self, s: S, first: &Range<usize>, last: &Range<usize>) {
        let columns = self.last.b.columns;
        let mut column = 0;
        while column < columns {
            if columns - column > S::LANES {
                self.panel::<S, 2>(s, [first, last], column);
                column += 2 * S::LANES;
            } else {
                self.panel::<S, 1>(s, [first, last], column);
                column += S::LANES;
            }
        }
    }

    /// `N` registers of columns.
    #[inline(always)]
    fn panel<S: Simd<T>, const N: usize>(&mut self, s: S, depths: [&Range<usize>; 2], column: usize) {
        // 32 registers hold 8 rows, 16 hold 4
        let wide = S::LANES * size_of::<T>() == 64;
        let rows = self.last.a.dims[0];
        // rows before the first one want nothing of the panel, those before the second only its first register
        let (mut row, both) = match self.part {
            Part::Lower(n) => (column.saturating_sub(n), (column + S::LANES).saturating_sub(n)),
            _ => (0, 0),
        };
        while row < rows {
            for ahead in &self.ahead {
                ahead.ask(s, self.begun, self.tiles);
            }
            self.begun += 1;
            let left = if self.single { 1 } else { rows - row };
            row += match (wide && left >= 8, left >= 4) {
                (true, _) if row + 8 <= both => self.tile::<S, 8, 1>(s, depths, row, column),
                (true, _) => self.tile::<S, 8, N>(s, depths, row, column),
                (_, true) if row + 4 <= both => self.tile::<S, 4, 1>(s, depths, row, column),
                (_, true) => self.tile::<S, 4, N>(s, depths, row, column),
                _ => self.tile::<S, 1, N>(s, depths, row, column),
            };
        }
    }

    /// `M` rows of `N` registers; returns `M`.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    fn tile<S: Simd<T>, const M: usize, const N: usize>(
        &self,
        s: S,
        [first, last]: [&Range<usize>; 2],
        row: usize,
        column: usize,
    ) -> usize {
        let mut sums = [[s.splat(T::ZERO); N]; M];
        if let Some(term) = &self.first {
            add(s, term, first.clone(), row, column, &mut sums);
            self.weigh(s, row, &mut sums);
        }
        let last = match self.part {
            Part::LowerLeft(n) => last.start..last.end.min(row + M + n),
            Part::UpperLeft(n) => last.start.max(row.saturating_sub(n))..last.end,
            Part::Whole | Part::Lower(_) => last.clone(),
        };
        add(s, &self.last, last, row, column, &mut sums);
        if self.first.is_none() {
            self.weigh(s, row, &mut sums);
        }
        // every loop small enough to be unrolled, for the sums to stay in their registers
        let to = self.to.at(row, column);
        if column + N * S::LANES <= self.last.b.columns {
            // SAFETY: the promise made to `write`, for whole registers.
            unsafe {
                if let Some((plus, factor)) = self.plus {
                    let (plus, factor) = (plus.at(row, column), s.splat(factor));
                    for r in 0..M {
                        for c in 0..N {
                            let old = s.load(plus.start.wrapping_add(r * plus.stride + c * S::LANES));
                            sums[r][c] = s.fma(factor, old, sums[r][c]);
                        }
                    }
                }
                for r in 0..M {
                    for c in 0..N {
                        s.store(to.start.wrapping_add(r * to.stride + c * S::LANES), sums[r][c]);
                    }
                }
            }
            return M;
        }
        let sums = sums;
        for (r, sums) in sums.into_iter().enumerate() {
            for (c, mut sum) in sums.into_iter().enumerate() {
                let n = S::LANES.min(self.last.b.columns - column - c * S::LANES);
                let place = |target: Target<T>| target.start.wrapping_add(r * target.stride + c * S::LANES);
                // SAFETY: the promise made to `write`, for the columns that there are.
                unsafe {
                    if let Some((plus, factor)) = self.plus {
                        sum = s.fma(s.splat(factor), s.load_first(place(plus.at(row, column)), n), sum);
                    }
                    s.store_first(place(to), n, sum);
                }
            }
        }
        M
    }

    /// Multiplies rows by their weights.
    #[inline(always)]
    fn weigh<S: Simd<T>, const M: usize, const N: usize>(&self, s: S, row: usize, sums: &mut [[S::V; N]; M]) {
        if let Some(weights) = self.weights {
            for (sums, weight) in sums.iter_mut().zip(&weights[row..row + M]) {
                let weight = s.splat(*weight);
                sums.iter_mut().for_each(|sum| *sum = s.mul(weight, *sum));
            }
        }
    }
}

/// Adds some inner places of a term.
#[inline(always)]
fn add<T: Real, S: Simd<T>, const M: usize, const N: usize>(
    s: S,
    term: &Term<T>,
    depth: Range<usize>,
    row: usize,
    column: usize,
    sums: &mut [[S::V; N]; M],
) {
    let [by_row, by_column] = term.a.strides;
    // SAFETY: rows below dims[0] and inner places below b.rows = dims[1]; the rows of b can be read up to a whole
    // register, as Padded made them.
    unsafe {
        let left = term.a.as_ptr().wrapping_add(row * by_row);
        let right = term.b.values.as_ptr().wrapping_add(column);
        for k in depth {
            let right = right.wrapping_add(k * term.b.stride);
            let mut registers = [s.splat(T::ZERO); N];
            for (c, register) in registers.iter_mut().enumerate() {
                *register = s.load(right.wrapping_add(c * S::LANES));
            }
            let left = left.wrapping_add(k * by_column);
            for (r, sums) in sums.iter_mut().enumerate() {
                let number = s.splat(*left.wrapping_add(r * by_row));
                for (sum, register) in sums.iter_mut().zip(registers) {
                    *sum = s.fma(number, register, *sum);
                }
            }
        }
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
