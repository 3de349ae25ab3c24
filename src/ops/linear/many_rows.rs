//! Many rows: tiles of the result, each one call of the crate gemm on one thread.
//!
//! gemm reads its factors with any strides and packs what it needs; tiles of f32 and f64 are given to it where they
//! lie. Of bf16 and f16 it gets f32 copies, [`DEPTH`] deep, and the f32 tile is rounded once in the end. (gemm's own
//! half-precision product loses accuracy, candle's widens the whole weight.)

use crate::backend::cpu::matrix::{Matrix, multiply};
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::Outlet;
use rayon::prelude::*;
use std::any::TypeId;

/// The largest tile, in rows and columns: gemm packs its factors anew for each.
const TILE: [usize; 2] = [512, 384];
/// How much of the inner dimension of half-precision factors is widened at a time.
const DEPTH: usize = 512;

/// `a b + bias`, `[m, n]` contiguous.
pub(super) fn product<E: Element>(a: Matrix<E>, b: Matrix<E>, bias: Option<&[E]>) -> Vec<E> {
    let ([m, k], [_, n]) = (a.dims, b.dims);
    assert_eq!(k, b.dims[0]);
    let mut y: Vec<E> = Vec::new();
    let outlet = Outlet::fresh(&mut y, m * n);
    let [height, width] = tile(m, n);
    let columns = n.div_ceil(width);
    let run = |scratch: &mut Scratch<E::Real>, i: usize| {
        let start = [i / columns * height, i % columns * width];
        let dims = [height.min(m - start[0]), width.min(n - start[1])];
        let a = a.part([start[0], 0], [dims[0], k]);
        let b = b.part([0, start[1]], [k, dims[1]]);
        let bias = bias.map(|bias| &bias[start[1]..start[1] + dims[1]]);
        // SAFETY: the tile lies in y, and no other task has it.
        let y = |r: usize| outlet.at((start[0] + r) * n + start[1], dims[1]);
        scratch.tile(a, b, bias, y, n);
    };
    let tiles = m.div_ceil(height) * columns;
    (0..tiles).into_par_iter().for_each_init(Scratch::new, run);
    // SAFETY: the tasks wrote every tile.
    unsafe { y.set_len(m * n) };
    y
}

/// The size of the tiles of an `[m, n]` result: even parts, at most [`TILE`].
fn tile(m: usize, n: usize) -> [usize; 2] {
    let even = |length: usize, most: usize, unit: usize| {
        let parts = length.div_ceil(most).max(1);
        length.div_ceil(parts).next_multiple_of(unit).max(1)
    };
    // a narrow result is cut across, to be work for several threads
    let most = if n <= TILE[1] { TILE[0] / 2 } else { TILE[0] };
    [even(m, most, 8), even(n, TILE[1], 16)]
}

/// What a thread reuses from tile to tile.
struct Scratch<T> {
    a: Vec<T>,
    b: Vec<T>,
    y: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Self { a: vec![], b: vec![], y: vec![] }
    }

    /// One tile of the result, whose row `r` lies at `y(r)`, `stride` from the next.
    fn tile<E: Element<Real = T>>(
        &mut self,
        a: Matrix<E>,
        b: Matrix<E>,
        bias: Option<&[E]>,
        y: impl Fn(usize) -> *mut E,
        stride: usize,
    ) {
        let ([m, k], [_, n]) = (a.dims, b.dims);
        if let (Some(a), Some(b)) = (as_real(a), as_real(b)) {
            for r in 0..m {
                let to = y(r);
                for (i, bias) in bias.iter().flat_map(|bias| bias.iter()).enumerate() {
                    // SAFETY: n places from `y`.
                    unsafe { to.add(i).write(*bias) };
                }
            }
            // SAFETY: m rows of n places, filled where they are read; E is T.
            unsafe { multiply(a, b, y(0).cast::<T>(), stride, bias.is_some().then_some(T::ONE)) };
            return;
        }
        let Self { a: wide_a, b: wide_b, y: sums } = self;
        sums.clear();
        for _ in 0..m {
            match bias {
                Some(bias) => sums.extend(bias.iter().map(|bias| bias.widen())),
                None => sums.resize(sums.len() + n, T::ZERO),
            }
        }
        for start in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - start);
            let a = widened(a.part([0, start], [m, depth]), wide_a);
            let b = widened(b.part([start, 0], [depth, n]), wide_b);
            // SAFETY: `sums` holds m rows of n.
            unsafe { multiply(a, b, sums.as_mut_ptr(), n, Some(T::ONE)) };
        }
        for (r, sums) in sums.chunks(n).enumerate() {
            // SAFETY: n places from `y`.
            dispatch(Narrow(sums, y(r)));
        }
    }
}

/// The same matrix, if its elements are what is computed with.
fn as_real<'a, E: Element>(matrix: Matrix<'a, E>) -> Option<Matrix<'a, E::Real>> {
    // SAFETY: the two types are one.
    (TypeId::of::<E>() == TypeId::of::<E::Real>()).then(|| unsafe { matrix.cast() })
}

/// A copy in the type to compute in, neighbours staying neighbours.
fn widened<'a, E: Element>(matrix: Matrix<E>, to: &'a mut Vec<E::Real>) -> Matrix<'a, E::Real> {
    if matrix.strides[1] > matrix.strides[0] {
        return widened(matrix.transposed(), to).transposed();
    }
    let [rows, columns] = matrix.dims;
    to.resize(rows * columns, E::Real::ZERO);
    if columns > 0 {
        for (r, to) in to.chunks_mut(columns).enumerate() {
            if matrix.strides[1] == 1 {
                dispatch(Widen(matrix.row(r), to));
            } else {
                to.iter_mut().enumerate().for_each(|(i, to)| *to = matrix.at(r, i).widen());
            }
        }
    }
    Matrix::new(to, [rows, columns], [columns, 1])
}

struct Widen<'a, E: Element>(&'a [E], &'a mut [E::Real]);

impl<T: Real, E: Element<Real = T>> Kernel<T> for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for (from, to) in self.0.chunks(S::LANES).zip(self.1.chunks_mut(S::LANES)) {
            let n = from.len().min(to.len());
            // SAFETY: both chunks hold n <= LANES values.
            unsafe {
                if n == S::LANES {
                    s.store(to.as_mut_ptr(), E::load(s, from.as_ptr()));
                } else {
                    s.store_first(to.as_mut_ptr(), n, E::load_first(s, from.as_ptr(), n));
                }
            }
        }
    }
}

/// Rounds to as many places.
struct Narrow<'a, E: Element>(&'a [E::Real], *mut E);

impl<T: Real, E: Element<Real = T>> Kernel<T> for Narrow<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for (i, from) in self.0.chunks(S::LANES).enumerate() {
            // SAFETY: the maker vouches for the places.
            unsafe {
                let to = self.1.add(i * S::LANES);
                if from.len() == S::LANES {
                    E::store(s, to, s.load(from.as_ptr()));
                } else {
                    E::store_first(s, to, from.len(), s.load_first(from.as_ptr(), from.len()));
                }
            }
        }
    }
}
