//! The CPU path: tiles of queries, all heads of a group together, meet tiles of keys in matrix products.

pub(super) mod backward;
mod forward;

use super::Sizes;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Rows, lanes, load, put};
use gemm::{Parallelism, gemm};
use std::ops::Range;

/// Rows (queries times heads of a group) of a tile.
const ROWS: usize = 64;
/// Keys of a tile.
const KEYS: usize = 128;

/// Arguments as the kernels read them.
pub(super) struct Problem<'a, E: Element> {
    pub(super) q: Rows<'a, E>,
    pub(super) k: Rows<'a, E>,
    pub(super) v: Rows<'a, E>,
    pub(super) scale: f64,
    pub(super) keys: &'a [Range<usize>],
    pub(super) sizes: Sizes,
}

/// Queries of one row and group.
#[derive(Clone, Debug)]
struct Tile {
    row: usize,
    group: usize,
    queries: Range<usize>,
}

impl<E: Element> Problem<'_, E> {
    /// Heads of a group.
    fn shared(&self) -> usize {
        self.sizes.heads / self.sizes.groups
    }

    /// All tiles, those of one row and group together.
    fn tiles(&self) -> Vec<Tile> {
        let Sizes { batch, queries, groups, .. } = self.sizes;
        let size = (ROWS / self.shared()).max(1);
        let of = |row: usize, group: usize| {
            let starts = (0..queries).step_by(size);
            starts.map(move |start| Tile { row, group, queries: start..queries.min(start + size) })
        };
        (0..batch).flat_map(|row| (0..groups).flat_map(move |group| of(row, group))).collect()
    }

    /// The keys that query `t` of a row sees.
    fn seen(&self, row: usize, t: usize) -> Range<usize> {
        self.keys[row * self.sizes.queries + t].clone()
    }

    /// The tiles of keys that some query of the tile sees.
    fn key_tiles(&self, tile: &Tile) -> Vec<Range<usize>> {
        let seen = || tile.queries.clone().map(|t| self.seen(tile.row, t)).filter(|keys| !keys.is_empty());
        let Some(start) = seen().map(|keys| keys.start).min() else { return vec![] };
        let end = seen().map(|keys| keys.end).max().unwrap_or(start);
        (start..end).step_by(KEYS).map(|at| at..end.min(at + KEYS)).collect()
    }

    /// `[queries, heads of the group, width]` of `from`, widened and multiplied by `factor`.
    fn queries(&self, from: &Rows<E>, tile: &Tile, factor: f64, to: &mut Vec<E::Real>) {
        let shared = self.shared();
        to.clear();
        for t in tile.queries.clone() {
            for head in tile.group * shared..(tile.group + 1) * shared {
                widen(from.row([tile.row, t, head]), factor, to);
            }
        }
    }

    /// `[keys, width]` of `from`, widened.
    fn rows(&self, from: &Rows<E>, tile: &Tile, keys: &Range<usize>, to: &mut Vec<E::Real>) {
        to.clear();
        for j in keys.clone() {
            widen(from.row([tile.row, j, tile.group]), 1.0, to);
        }
    }
}

fn widen<E: Element>(from: &[E], factor: f64, to: &mut Vec<E::Real>) {
    let start = to.len();
    to.resize(start + from.len(), E::Real::ZERO);
    let factor = <E::Real as candle_core::WithDType>::from_f64(factor);
    dispatch(Widen { from, factor, to: &mut to[start..] });
}

struct Widen<'a, E: Element> {
    from: &'a [E],
    factor: E::Real,
    to: &'a mut [E::Real],
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let factor = s.splat(self.factor);
        for (c, n) in lanes(s, 0..self.from.len()) {
            put(s, self.to, c, n, s.mul(factor, load(s, self.from, c, n)));
        }
    }
}

/// A matrix by rows, perhaps to be read with rows and columns exchanged.
#[derive(Clone, Copy)]
struct M<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl<'a, T> M<'a, T> {
    fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        Self { data, rows, columns, transposed: false }
    }

    fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    fn dims(&self) -> [usize; 2] {
        if self.transposed { [self.columns, self.rows] } else { [self.rows, self.columns] }
    }

    /// Of rows and columns.
    fn strides(&self) -> [isize; 2] {
        let stride = self.columns as isize;
        if self.transposed { [1, stride] } else { [stride, 1] }
    }
}

/// `y = a b`, or `y += a b`.
fn product<T: Real>(a: M<T>, b: M<T>, y: &mut [T], add: bool) {
    let ([m, k], [inner, n]) = (a.dims(), b.dims());
    assert!(k == inner && y.len() == m * n);
    if m * n == 0 {
        return;
    }
    let ([ar, ac], [br, bc]) = (a.strides(), b.strides());
    let alpha = if add { T::ONE } else { T::ZERO };
    // SAFETY: the three hold as many numbers as their dims say, asserted here and in `M::new`.
    unsafe {
        gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            ac,
            ar,
            b.data.as_ptr(),
            bc,
            br,
            alpha,
            T::ONE,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}
