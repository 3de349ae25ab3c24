//! The transform: real numbers modulo `X^(2N) + 1`, as complex ones modulo `X^N - i`, lanes over channels.
//!
//! `X^(2N) + 1 = (X^N - i)(X^N + i)`, and for real polynomials the two residues are conjugates, so one tells all: with
//! `a[n] + i a[n + N]` at place `n`, the product of two residues is the residue of the product. A stage of radix `r`
//! reduces modulo `X^n - c` to `r` residues modulo `X^(n/r) - c^(1/r) w^j`, in place: part `q` of the residue is
//! multiplied by `c^(q/r)`, the same for all places of the part, before a butterfly over the parts. The last stage leaves
//! numbers, in an order that nobody needs to know; the stages backward undo them in turn. (It is how number theoretic
//! transforms are written; the twist of a "right-angle" convolution comes for free, as the first `c`.)
//!
//! Data is `[N]` of a register of real and a register of imaginary parts. A stage of radix 4 takes 28 operations on
//! registers for 4 points, 8 loads and 8 stores.

use crate::backend::cpu::simd::{Isa, Kernel, Real, Simd};
use crate::ops::long_conv::plan::radices;

/// Points that go through all remaining stages at a time: 32 KiB of f32 in AVX-512 registers, the first cache.
const BLOCK: usize = 256;

/// The transform of one size.
#[derive(Debug)]
pub(in super::super) struct Fft<T> {
    points: usize,
    stages: Vec<Stage<T>>,
}

#[derive(Debug)]
struct Stage<T> {
    radix: usize,
    /// Places of a residue before this stage.
    size: usize,
    /// `c^(q/r)` for `q` of `1..r`, real and imaginary part, of every residue.
    twiddles: Vec<T>,
}

/// What is done with the numbers that the last stage leaves.
pub(in super::super) trait Leaf<T: Real> {
    /// Whether the stages forward are walked before.
    const FORWARD: bool = true;
    /// Whether the stages backward are walked after.
    const BACKWARD: bool = true;
    /// The number at `index`, replaced.
    ///
    /// # Safety
    /// `index` is below the number of points.
    unsafe fn at<S: Simd<T>>(&self, s: S, index: usize, value: Complex<S::V>) -> Complex<S::V>;
}

/// A complex number a lane.
#[derive(Clone, Copy)]
pub(in super::super) struct Complex<V> {
    pub(in super::super) re: V,
    pub(in super::super) im: V,
}

impl<V: Copy> Complex<V> {
    /// `self w`
    #[inline(always)]
    pub(in super::super) fn times<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        let re = s.nfma(self.im, w.im, s.mul(self.re, w.re));
        let im = s.fma(self.im, w.re, s.mul(self.re, w.im));
        Self { re, im }
    }
    /// `self conj(w)`
    #[inline(always)]
    pub(in super::super) fn times_conjugate<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        let re = s.fma(self.im, w.im, s.mul(self.re, w.re));
        let im = s.nfma(self.re, w.im, s.mul(self.im, w.re));
        Self { re, im }
    }
    #[inline(always)]
    fn plus<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        Self { re: s.add(self.re, w.re), im: s.add(self.im, w.im) }
    }
    #[inline(always)]
    fn minus<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        Self { re: s.sub(self.re, w.re), im: s.sub(self.im, w.im) }
    }
    /// `self + x w`, for real `x`
    #[inline(always)]
    fn plus_scaled<T: Real, S: Simd<T, V = V>>(self, s: S, x: T, w: Self) -> Self {
        Self { re: s.fma(s.splat(x), w.re, self.re), im: s.fma(s.splat(x), w.im, self.im) }
    }
    /// `i self`
    #[inline(always)]
    fn turned<T: Real, S: Simd<T, V = V>>(self, s: S) -> Self {
        Self { re: s.sub(s.splat(T::ZERO), self.im), im: self.re }
    }
    /// Real and imaginary part exchanged: a transform of such is the transform back, so exchanged.
    #[inline(always)]
    fn swapped(self) -> Self {
        Self { re: self.im, im: self.re }
    }
    /// From where the registers lie one after the other.
    ///
    /// # Safety
    /// `p` points at two registers.
    #[inline(always)]
    pub(in super::super) unsafe fn load<T: Real, S: Simd<T, V = V>>(s: S, p: *const T) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self { re: s.load(p), im: s.load(p.add(S::LANES)) } }
    }
    /// To where two registers have room.
    ///
    /// # Safety
    /// `p` points at two registers.
    #[inline(always)]
    pub(in super::super) unsafe fn store<T: Real, S: Simd<T, V = V>>(self, s: S, p: *mut T) {
        // SAFETY: the caller's promise.
        unsafe {
            s.store(p, self.re);
            s.store(p.add(S::LANES), self.im);
        }
    }
}

/// `sum_q a[q] w^(jq)` for every `j`, with `w = e^(2 pi i / R)`.
#[inline(always)]
fn butterfly<T: Real, S: Simd<T>, const R: usize>(s: S, a: &mut [Complex<S::V>; R]) {
    match R {
        2 => (a[0], a[1]) = (a[0].plus(s, a[1]), a[0].minus(s, a[1])),
        3 => {
            let (sum, difference) = (a[1].plus(s, a[2]), a[1].minus(s, a[2]));
            let middle = a[0].plus_scaled(s, T::from_f64(-0.5), sum);
            let turned = difference.turned(s);
            let sine = T::from_f64(0.75f64.sqrt());
            a[0] = a[0].plus(s, sum);
            a[1] = middle.plus_scaled(s, sine, turned);
            a[2] = middle.plus_scaled(s, -sine, turned);
        }
        4 => {
            let (even, odd) = (a[0].plus(s, a[2]), a[1].plus(s, a[3]));
            let (low, high) = (a[0].minus(s, a[2]), a[1].minus(s, a[3]));
            a[0] = even.plus(s, odd);
            a[2] = even.minus(s, odd);
            a[1] = Complex { re: s.sub(low.re, high.im), im: s.add(low.im, high.re) };
            a[3] = Complex { re: s.add(low.re, high.im), im: s.sub(low.im, high.re) };
        }
        5 => {
            let turn = |k: f64| (k * std::f64::consts::TAU / 5.0).sin_cos();
            let [(s1, c1), (s2, c2)] = [turn(1.0), turn(2.0)];
            let [s1, c1, s2, c2] = [s1, c1, s2, c2].map(T::from_f64);
            let (p1, p2) = (a[1].plus(s, a[4]), a[2].plus(s, a[3]));
            let (m1, m2) = (a[1].minus(s, a[4]).turned(s), a[2].minus(s, a[3]).turned(s));
            let zero = Complex { re: s.splat(T::ZERO), im: s.splat(T::ZERO) };
            let middle = [
                a[0].plus_scaled(s, c1, p1).plus_scaled(s, c2, p2),
                a[0].plus_scaled(s, c2, p1).plus_scaled(s, c1, p2),
            ];
            let side = [
                zero.plus_scaled(s, s1, m1).plus_scaled(s, s2, m2),
                zero.plus_scaled(s, s2, m1).plus_scaled(s, -s1, m2),
            ];
            a[0] = a[0].plus(s, p1).plus(s, p2);
            (a[1], a[4]) = (middle[0].plus(s, side[0]), middle[0].minus(s, side[0]));
            (a[2], a[3]) = (middle[1].plus(s, side[1]), middle[1].minus(s, side[1]));
        }
        _ => {}
    }
}

impl<T: Real> Fft<T> {
    /// The transform of `points`, a multiple of 4 without prime factors above 5.
    pub(in super::super) fn new(points: usize) -> Self {
        let mut size = points;
        // the angle of c in turns
        let mut angles = vec![0.25f64];
        let stage = |radix: usize| {
            let turns = std::f64::consts::TAU / radix as f64;
            let power = |angle: f64, q: usize| (angle * q as f64 * turns).sin_cos();
            let twiddles = angles.iter().flat_map(|&angle| (1..radix).map(move |q| power(angle, q)));
            let twiddles = twiddles.flat_map(|(sin, cos)| [T::from_f64(cos), T::from_f64(sin)]).collect();
            let stage = Stage { radix, size, twiddles };
            size /= radix;
            angles =
                angles.iter().flat_map(|&c| (0..radix).map(move |j| (c + j as f64) / radix as f64)).collect();
            stage
        };
        let stages = radices(points).into_iter().map(stage).collect();
        Self { points, stages }
    }

    /// Its number of points.
    pub(in super::super) fn points(&self) -> usize {
        self.points
    }

    /// Walks `data`, `[N]` pairs of registers of `isa`, through the stages forward, `leaf`, and the stages backward: depth
    /// first, so that what fits in the cache stays there. Backward nothing is scaled: the result is `N` times too large.
    pub(in super::super) fn walk<L: Leaf<T>>(&self, isa: Isa, data: &mut [T], leaf: L) {
        T::dispatch_on(isa, Walk { fft: self, data, leaf });
    }

    #[inline(always)]
    fn walk_with<S: Simd<T>, L: Leaf<T>>(&self, s: S, data: &mut [T], leaf: &L) {
        assert_eq!(data.len(), self.points * 2 * S::LANES);
        let data = data.as_mut_ptr();
        let last = self.stages.len() - 1;
        let small = self.stages.iter().position(|stage| stage.size <= BLOCK).unwrap_or(last);
        let size = self.stages[small].size;
        for block in 0..self.points / size {
            let start = block * size;
            for stage in
                self.stages[..small].iter().filter(|stage| L::FORWARD && start.is_multiple_of(stage.size))
            {
                // SAFETY: the residue that begins at `start` lies within the data.
                unsafe { stage.run::<S, true>(s, data, start / stage.size) };
            }
            for stage in self.stages[small..last].iter().filter(|_| L::FORWARD) {
                for residue in start / stage.size..(start + size) / stage.size {
                    // SAFETY: as above.
                    unsafe { stage.run::<S, true>(s, data, residue) };
                }
            }
            for residue in start / 4..(start + size) / 4 {
                // SAFETY: as above; the last stage has radix 4.
                unsafe { self.stages[last].last(s, data, residue, leaf) };
            }
            for stage in self.stages[small..last].iter().rev().filter(|_| L::BACKWARD) {
                for residue in start / stage.size..(start + size) / stage.size {
                    // SAFETY: as above.
                    unsafe { stage.run::<S, false>(s, data, residue) };
                }
            }
            let end = start + size;
            for stage in self.stages[..small]
                .iter()
                .rev()
                .filter(|stage| L::BACKWARD && end.is_multiple_of(stage.size))
            {
                // SAFETY: as above.
                unsafe { stage.run::<S, false>(s, data, end / stage.size - 1) };
            }
        }
    }
}

/// A walk as a kernel of its own: compiled once for each leaf, not for each dtype that windows are loaded from.
struct Walk<'a, T, L> {
    fft: &'a Fft<T>,
    data: &'a mut [T],
    leaf: L,
}

impl<T: Real, L: Leaf<T>> Kernel<T> for Walk<'_, T, L> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        self.fft.walk_with(s, self.data, &self.leaf);
    }
}

impl<T: Real> Stage<T> {
    /// One residue, forward or backward.
    ///
    /// # Safety
    /// `data` points at more than `residue` residues of this stage's size.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const FORWARD: bool>(&self, s: S, data: *mut T, residue: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.radix {
                4 => self.parts::<S, 4, FORWARD>(s, data, residue),
                2 => self.parts::<S, 2, FORWARD>(s, data, residue),
                3 => self.parts::<S, 3, FORWARD>(s, data, residue),
                _ => self.parts::<S, 5, FORWARD>(s, data, residue),
            }
        }
    }

    /// The twiddles of one residue; the first is 1.
    #[inline(always)]
    fn twiddles<S: Simd<T>, const R: usize>(&self, s: S, residue: usize) -> [Complex<S::V>; R] {
        let own = &self.twiddles[residue * 2 * (R - 1)..][..2 * (R - 1)];
        let mut all = [Complex { re: s.splat(T::ONE), im: s.splat(T::ZERO) }; R];
        for (w, own) in all[1..].iter_mut().zip(own.chunks_exact(2)) {
            *w = Complex { re: s.splat(own[0]), im: s.splat(own[1]) };
        }
        all
    }

    /// # Safety
    /// As [`Stage::run`], `R` being the radix.
    #[inline(always)]
    unsafe fn parts<S: Simd<T>, const R: usize, const FORWARD: bool>(
        &self,
        s: S,
        data: *mut T,
        residue: usize,
    ) {
        let twiddles = self.twiddles::<S, R>(s, residue);
        let part = self.size / R * 2 * S::LANES;
        // SAFETY: the residue is of R parts, each of `part` numbers.
        unsafe {
            let data = data.add(residue * R * part);
            for place in (0..part).step_by(2 * S::LANES) {
                let mut a: [Complex<S::V>; R] =
                    std::array::from_fn(|q| Complex::load(s, data.add(q * part + place)));
                if FORWARD {
                    forward(s, &mut a, &twiddles);
                } else {
                    backward(s, &mut a, &twiddles);
                }
                for (q, a) in a.into_iter().enumerate() {
                    a.store(s, data.add(q * part + place));
                }
            }
        }
    }

    /// The last stage, whose parts are single numbers, and what comes of them.
    ///
    /// # Safety
    /// As [`Stage::run`], the radix being 4.
    #[inline(always)]
    unsafe fn last<S: Simd<T>, L: Leaf<T>>(&self, s: S, data: *mut T, residue: usize, leaf: &L) {
        let twiddles = self.twiddles::<S, 4>(s, residue);
        let width = 2 * S::LANES;
        // SAFETY: the residue is of 4 numbers.
        unsafe {
            let data = data.add(residue * 4 * width);
            let mut a: [Complex<S::V>; 4] = std::array::from_fn(|q| Complex::load(s, data.add(q * width)));
            if L::FORWARD {
                forward(s, &mut a, &twiddles);
            }
            for (q, a) in a.iter_mut().enumerate() {
                *a = leaf.at(s, residue * 4 + q, *a);
            }
            if L::BACKWARD {
                backward(s, &mut a, &twiddles);
            }
            for (q, a) in a.into_iter().enumerate() {
                a.store(s, data.add(q * width));
            }
        }
    }
}

#[inline(always)]
fn forward<T: Real, S: Simd<T>, const R: usize>(s: S, a: &mut [Complex<S::V>; R], w: &[Complex<S::V>; R]) {
    for q in 1..R {
        a[q] = a[q].times(s, w[q]);
    }
    butterfly(s, a);
}

#[inline(always)]
fn backward<T: Real, S: Simd<T>, const R: usize>(s: S, a: &mut [Complex<S::V>; R], w: &[Complex<S::V>; R]) {
    *a = a.map(Complex::swapped);
    butterfly(s, a);
    *a = a.map(Complex::swapped);
    for q in 1..R {
        a[q] = a[q].times_conjugate(s, w[q]);
    }
}
