//! The backward pass: row by row and group by group, weights computed again tile by tile.
//!
//! With `w` the weights and `s` the scaled products, `ds = w (dw - sum_j w dw)`, and the sum is that of `y dy`.

use super::super::Sizes;
use super::{M, Problem, Tile, product};
use crate::backend::cpu::math::exp;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Rows, lanes, load, put};
use candle_core::WithDType;
use std::ops::Range;

/// Each in its argument's layout.
pub(in super::super) struct Gradients<E> {
    pub(in super::super) q: Vec<E>,
    pub(in super::super) k: Vec<E>,
    pub(in super::super) v: Vec<E>,
}

/// Of one row and group: `[L, heads of the group, K]`, `[M, K]`, `[M, V]`.
struct Part<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<E: Element> Problem<'_, E> {
    /// From the output, the logarithms of its sums and its gradient.
    pub(in super::super) fn backward(&self, y: Rows<E>, logs: &[E::Real], dy: Rows<E>) -> Gradients<E> {
        let Sizes { batch, queries, keys, heads, groups, width, values } = self.sizes;
        let tiles = self.tiles();
        let owners: Vec<(usize, usize)> =
            (0..batch).flat_map(|row| (0..groups).map(move |group| (row, group))).collect();
        let parts = parallel::map(&owners, batch * queries * heads * keys * width, |&(row, group)| {
            let mut part = Part {
                q: Vec::with_capacity(queries * self.shared() * width),
                k: vec![E::Real::ZERO; keys * width],
                v: vec![E::Real::ZERO; keys * values],
            };
            for tile in tiles.iter().filter(|tile| (tile.row, tile.group) == (row, group)) {
                self.back(tile, [&y, &dy], logs, &mut part);
            }
            part
        });
        let mut gradients = Gradients {
            q: vec![E::narrow(E::Real::ZERO); batch * queries * heads * width],
            k: vec![E::narrow(E::Real::ZERO); batch * keys * groups * width],
            v: vec![E::narrow(E::Real::ZERO); batch * keys * groups * values],
        };
        for (&(row, group), part) in owners.iter().zip(&parts) {
            let place = |to: &mut [E], from: &[E::Real], size: usize| {
                let stride = (groups * size).max(1);
                let start = to.len() / batch * row + group * size;
                let to = to.get_mut(start..).unwrap_or_default();
                for (to, from) in to.chunks_mut(stride).zip(from.chunks(size.max(1))) {
                    to.iter_mut().zip(from).for_each(|(to, &from)| *to = E::narrow(from));
                }
            };
            place(&mut gradients.q, &part.q, self.shared() * width);
            place(&mut gradients.k, &part.k, width);
            place(&mut gradients.v, &part.v, values);
        }
        gradients
    }

    fn back(&self, tile: &Tile, [y, dy]: [&Rows<E>; 2], logs: &[E::Real], part: &mut Part<E::Real>) {
        let Sizes { queries, heads, width, values, .. } = self.sizes;
        let shared = self.shared();
        let rows = tile.queries.len() * shared;
        let (mut q, mut out, mut dout) = (vec![], vec![], vec![]);
        self.queries(&self.q, tile, self.scale, &mut q);
        self.queries(y, tile, 1.0, &mut out);
        self.queries(dy, tile, 1.0, &mut dout);
        let sums: Vec<E::Real> = (0..rows)
            .map(|i| {
                let (a, b) = (&out[i * values..(i + 1) * values], &dout[i * values..(i + 1) * values]);
                E::Real::from_f64(a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum())
            })
            .collect();
        let (mut k, mut v) = (vec![], vec![]);
        let mut dq = vec![E::Real::ZERO; rows * width];
        let (mut weights, mut slopes) = (vec![], vec![]);
        for keys in self.key_tiles(tile) {
            let count = keys.len();
            self.rows(&self.k, tile, &keys, &mut k);
            self.rows(&self.v, tile, &keys, &mut v);
            weights.resize(rows * count, E::Real::ZERO);
            slopes.resize(rows * count, E::Real::ZERO);
            product(M::new(&q, rows, width), M::new(&k, count, width).t(), &mut weights, false);
            product(M::new(&dout, rows, values), M::new(&v, count, values).t(), &mut slopes, false);
            let pairs = weights.chunks_mut(count).zip(slopes.chunks_mut(count)).enumerate();
            for (i, (weights, slopes)) in pairs {
                let (t, head) = (tile.queries.start + i / shared, tile.group * shared + i % shared);
                let seen = self.seen(tile.row, t);
                let clip = |x: usize| x.clamp(keys.start, keys.end) - keys.start;
                let seen = clip(seen.start)..clip(seen.end).max(clip(seen.start));
                let log = logs[(tile.row * queries + t) * heads + head];
                blank(weights, &seen);
                blank(slopes, &seen);
                let (weights, slopes) = (&mut weights[seen.clone()], &mut slopes[seen]);
                dispatch(Slopes { weights, slopes, log, sum: sums[i] });
            }
            let at = |size: usize| keys.start * size..keys.end * size;
            let (w, ds) = (M::new(&weights, rows, count), M::new(&slopes, rows, count));
            product(w.t(), M::new(&dout, rows, values), &mut part.v[at(values)], true);
            // q is scaled already
            product(ds.t(), M::new(&q, rows, width), &mut part.k[at(width)], true);
            product(ds, M::new(&k, count, width), &mut dq, true);
        }
        let scale = E::Real::from_f64(self.scale);
        part.q.extend(dq.into_iter().map(|x| x * scale));
    }
}

fn blank<T: Real>(row: &mut [T], seen: &Range<usize>) {
    row[..seen.start].fill(T::ZERO);
    row[seen.end..].fill(T::ZERO);
}

/// Products to weights, and the weights' gradients to those of the products.
struct Slopes<'a, T> {
    weights: &'a mut [T],
    slopes: &'a mut [T],
    log: T,
    sum: T,
}

impl<T: Real> Kernel<T> for Slopes<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let (log, sum) = (s.splat(self.log), s.splat(self.sum));
        for (c, n) in lanes(s, 0..self.weights.len()) {
            let w = exp(s, s.sub(load(s, self.weights, c, n), log));
            put(s, self.weights, c, n, w);
            put(s, self.slopes, c, n, s.mul(w, s.sub(load(s, self.slopes, c, n), sum)));
        }
    }
}
