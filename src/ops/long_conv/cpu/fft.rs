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

pub(in super::super) use super::butterfly::Complex;
use super::butterfly::{backward, forward};
use crate::backend::cpu::simd::{Isa, Kernel, Real, Simd};
use crate::backend::cpu::view::Outlet;
use crate::ops::long_conv::plan::radices;
use rayon::prelude::*;
use std::ops::Range;

/// Points that go through all remaining stages at a time: 32 KiB of f32 in AVX-512 registers, the first cache.
const BLOCK: usize = 256;

/// Points from which on a walk is worth the while of several threads.
const SPREAD: usize = 1 << 13;
/// Pieces of a stage that several threads take.
const PIECES: usize = 16;

/// How a walk is computed.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct How {
    pub(in super::super) isa: Isa,
    /// Whether threads are idle unless several share a walk. The result is the same either way.
    pub(in super::super) spread: bool,
}

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
pub(in super::super) trait Leaf<T: Real>: Sync {
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

    /// Walks `data`, `[N]` pairs of registers, through the stages forward, `leaf`, and the stages backward: depth first,
    /// so that what fits in the cache stays there. Backward nothing is scaled: the result is `N` times too large.
    pub(in super::super) fn walk<L: Leaf<T>>(&self, how: How, data: &mut [T], leaf: L) {
        assert!(data.len().is_multiple_of(2 * self.points));
        let isa = how.isa;
        let (data, leaf) = (Outlet::new(data), &leaf);
        let walk = |level: usize, part: Range<usize>| {
            T::dispatch_on(isa, Walk { fft: self, data: &data, leaf, level, part });
        };
        if !how.spread || self.points < SPREAD {
            return walk(0, 0..self.points);
        }
        let top = &self.stages[0];
        let part = self.points / top.radix;
        let stage = |forward: bool| {
            (0..PIECES).into_par_iter().for_each(|i| {
                let places = i * part / PIECES..(i + 1) * part / PIECES;
                T::dispatch_on(isa, Top { stage: top, data: &data, places, forward });
            });
        };
        if L::FORWARD {
            stage(true);
        }
        (0..top.radix).into_par_iter().for_each(|residue| walk(1, residue * part..(residue + 1) * part));
        if L::BACKWARD {
            stage(false);
        }
    }

    /// The points `part`, whole residues of stage `level`, through that stage and those that follow.
    ///
    /// # Safety
    /// `data` holds all points; nobody else uses those of `part`.
    #[inline(always)]
    unsafe fn walk_with<S: Simd<T>, L: Leaf<T>>(
        &self,
        s: S,
        data: *mut T,
        leaf: &L,
        level: usize,
        part: Range<usize>,
    ) {
        let last = self.stages.len() - 1;
        let small = self.stages.iter().position(|stage| stage.size <= BLOCK).unwrap_or(last).max(level);
        let size = self.stages[small].size;
        let large = &self.stages[level..small];
        for start in part.step_by(size) {
            for stage in large.iter().filter(|stage| L::FORWARD && start.is_multiple_of(stage.size)) {
                // SAFETY: the residue that begins at `start` lies within the part.
                unsafe { stage.run::<S, true>(s, data, start / stage.size, 0..stage.part()) };
            }
            for stage in self.stages[small..last].iter().filter(|_| L::FORWARD) {
                for residue in start / stage.size..(start + size) / stage.size {
                    // SAFETY: as above.
                    unsafe { stage.run::<S, true>(s, data, residue, 0..stage.part()) };
                }
            }
            for residue in start / 4..(start + size) / 4 {
                // SAFETY: as above; the last stage has radix 4.
                unsafe { self.stages[last].last(s, data, residue, leaf) };
            }
            for stage in self.stages[small..last].iter().rev().filter(|_| L::BACKWARD) {
                for residue in start / stage.size..(start + size) / stage.size {
                    // SAFETY: as above.
                    unsafe { stage.run::<S, false>(s, data, residue, 0..stage.part()) };
                }
            }
            let end = start + size;
            for stage in large.iter().rev().filter(|stage| L::BACKWARD && end.is_multiple_of(stage.size)) {
                // SAFETY: as above.
                unsafe { stage.run::<S, false>(s, data, end / stage.size - 1, 0..stage.part()) };
            }
        }
    }
}

/// A walk as a kernel of its own: compiled once for each leaf, not for each dtype that windows are loaded from.
struct Walk<'a, T, L> {
    fft: &'a Fft<T>,
    data: &'a Outlet<'a, T>,
    leaf: &'a L,
    level: usize,
    part: Range<usize>,
}

impl<T: Real, L: Leaf<T>> Kernel<T> for Walk<'_, T, L> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let data = self.data.at(0, self.fft.points * 2 * S::LANES);
        // SAFETY: at() checked that all points are there; parts that are walked at a time do not overlap.
        unsafe { self.fft.walk_with(s, data, self.leaf, self.level, self.part) };
    }
}

/// Some places of the first stage.
struct Top<'a, T> {
    stage: &'a Stage<T>,
    data: &'a Outlet<'a, T>,
    places: Range<usize>,
    forward: bool,
}

impl<T: Real> Kernel<T> for Top<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let data = self.data.at(0, self.stage.size * 2 * S::LANES);
        // SAFETY: at() checked that the residue is there; nobody else uses these places of its parts.
        unsafe {
            match self.forward {
                true => self.stage.run::<S, true>(s, data, 0, self.places),
                false => self.stage.run::<S, false>(s, data, 0, self.places),
            }
        }
    }
}

impl<T: Real> Stage<T> {
    /// Places of a part.
    fn part(&self) -> usize {
        self.size / self.radix
    }

    /// One residue, some places of its parts, forward or backward.
    ///
    /// # Safety
    /// `data` points at more than `residue` residues of this stage's size; `places` are below `part()`.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const FORWARD: bool>(
        &self,
        s: S,
        data: *mut T,
        residue: usize,
        places: Range<usize>,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.radix {
                4 => self.parts::<S, 4, FORWARD>(s, data, residue, places),
                2 => self.parts::<S, 2, FORWARD>(s, data, residue, places),
                3 => self.parts::<S, 3, FORWARD>(s, data, residue, places),
                _ => self.parts::<S, 5, FORWARD>(s, data, residue, places),
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
        places: Range<usize>,
    ) {
        let twiddles = self.twiddles::<S, R>(s, residue);
        let width = 2 * S::LANES;
        let part = self.size / R * width;
        // SAFETY: the residue is of R parts, each of `part` numbers.
        unsafe {
            let data = data.add(residue * R * part);
            for place in (places.start * width..places.end * width).step_by(width) {
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
