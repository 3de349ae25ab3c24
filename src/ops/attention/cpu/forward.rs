//! The forward pass: a tile of queries goes through its keys with a running maximum and sum.

use super::super::Sizes;
use super::{M, Problem, Tile, product};
use crate::backend::cpu::math::exp;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Outlet, lanes, load, put, store};

impl<E: Element> Problem<'_, E> {
    /// The output `[B, L, H, V]`, and the logarithm of each query's sum `[B, L, H]`.
    pub(in super::super) fn forward(&self) -> (Vec<E>, Vec<E::Real>) {
        let Sizes { batch, queries, keys, heads, width, values, .. } = self.sizes;
        let rows = batch * queries * heads;
        let (mut y, mut logs) = (Vec::new(), Vec::new());
        let outlet = Outlet::fresh(&mut y, rows * values);
        let log_outlet = Outlet::fresh(&mut logs, rows);
        parallel::map(&self.tiles(), rows * keys * width, |tile| {
            let mut run = Running::new(self, tile);
            for keys in self.key_tiles(tile) {
                run.meet(self, tile, &keys);
            }
            run.finish(self, tile, &outlet, &log_outlet);
        });
        // SAFETY: the tiles cover all rows, queries and groups, and each wrote its own.
        unsafe {
            y.set_len(rows * values);
            logs.set_len(rows);
        }
        (y, logs)
    }
}

/// A tile of queries on its way through the keys.
struct Running<T> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    /// `[rows, keys]`
    weights: Vec<T>,
    /// `[rows, V]`, relative to the largest products so far.
    y: Vec<T>,
    largest: Vec<T>,
    sums: Vec<T>,
}

impl<T: Real> Running<T> {
    fn new<E: Element<Real = T>>(problem: &Problem<E>, tile: &Tile) -> Self {
        let rows = tile.queries.len() * problem.shared();
        let mut q = vec![];
        problem.queries(&problem.q, tile, problem.scale, &mut q);
        Self {
            q,
            k: vec![],
            v: vec![],
            weights: vec![],
            y: vec![T::ZERO; rows * problem.sizes.values],
            largest: vec![T::from_f64(f64::NEG_INFINITY); rows],
            sums: vec![T::ZERO; rows],
        }
    }

    fn meet<E: Element<Real = T>>(
        &mut self,
        problem: &Problem<E>,
        tile: &Tile,
        keys: &std::ops::Range<usize>,
    ) {
        let Sizes { width, values, .. } = problem.sizes;
        let (rows, count) = (self.sums.len(), keys.len());
        problem.rows(&problem.k, tile, keys, &mut self.k);
        problem.rows(&problem.v, tile, keys, &mut self.v);
        self.weights.resize(rows * count, T::ZERO);
        product(M::new(&self.q, rows, width), M::new(&self.k, count, width).t(), &mut self.weights, false);
        let shared = problem.shared();
        for (i, weights) in self.weights.chunks_mut(count).enumerate() {
            let seen = problem.seen(tile.row, tile.queries.start + i / shared);
            let seen = seen.start.clamp(keys.start, keys.end) - keys.start
                ..seen.end.clamp(keys.start, keys.end) - keys.start;
            let y = &mut self.y[i * values..(i + 1) * values];
            let (largest, sum) = (&mut self.largest[i], &mut self.sums[i]);
            weights[..seen.start].fill(T::ZERO);
            weights[seen.end.max(seen.start)..].fill(T::ZERO);
            if !seen.is_empty() {
                dispatch(Soften { weights: &mut weights[seen], y, largest, sum });
            }
        }
        product(M::new(&self.weights, rows, count), M::new(&self.v, count, values), &mut self.y, true);
    }

    fn finish<E: Element<Real = T>>(
        self,
        problem: &Problem<E>,
        tile: &Tile,
        y: &Outlet<E>,
        logs: &Outlet<T>,
    ) {
        let Sizes { queries, heads, values, .. } = problem.sizes;
        let shared = problem.shared();
        for (i, sums) in self.y.chunks(values.max(1)).enumerate().take(self.sums.len()) {
            let (t, head) = (tile.queries.start + i / shared, tile.group * shared + i % shared);
            let at = (tile.row * queries + t) * heads + head;
            let sum = self.sums[i];
            let factor = if sum > T::ZERO { T::ONE / sum } else { T::ZERO };
            dispatch(Scaled { from: sums, factor, to: y.at(at * values, values) });
        }
        for (i, (&sum, &largest)) in self.sums.iter().zip(&self.largest).enumerate() {
            let (t, head) = (tile.queries.start + i / shared, tile.group * shared + i % shared);
            let log = T::from_f64(largest.to_f64() + sum.to_f64().ln());
            // SAFETY: `at` checked the place, which is this tile's own.
            unsafe { *logs.at((tile.row * queries + t) * heads + head, 1) = log };
        }
    }
}

/// Products to weights relative to the largest so far; what was summed up before is brought to that too.
struct Soften<'a, T> {
    weights: &'a mut [T],
    y: &'a mut [T],
    largest: &'a mut T,
    sum: &'a mut T,
}

impl<T: Real> Kernel<T> for Soften<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let count = self.weights.len();
        let before = *self.largest;
        let mut largest = before;
        // NaN is never the larger, but comes through in the products themselves
        for &w in self.weights.iter() {
            largest = if w > largest { w } else { largest };
        }
        let shift = s.splat(largest);
        let mut sums = s.splat(T::ZERO);
        for (c, n) in lanes(s, 0..count) {
            let w = exp(s, s.sub(load(s, self.weights, c, n), shift));
            put(s, self.weights, c, n, w);
            sums = s.add(sums, load(s, self.weights, c, n));
        }
        if largest > before {
            let factor = if *self.sum > T::ZERO {
                T::from_f64((before.to_f64() - largest.to_f64()).exp())
            } else {
                T::ZERO
            };
            let factors = s.splat(factor);
            for (c, n) in lanes(s, 0..self.y.len()) {
                put(s, self.y, c, n, s.mul(factors, load(s, self.y, c, n)));
            }
            *self.sum *= factor;
            *self.largest = largest;
        }
        *self.sum += s.sum(sums);
    }
}

/// `to = factor from`, rounded.
struct Scaled<'a, E: Element> {
    from: &'a [E::Real],
    factor: E::Real,
    to: *mut E,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Scaled<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let factor = s.splat(self.factor);
        for (c, n) in lanes(s, 0..self.from.len()) {
            // SAFETY: the maker has as many places there, and no other thread writes them.
            unsafe { store(s, self.to.add(c), n, s.mul(factor, load(s, self.from, c, n))) };
        }
    }
}
