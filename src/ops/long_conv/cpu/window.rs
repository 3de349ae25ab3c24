//! Convolution window by window: load, transform, multiply, transform back, store.

use super::fft::{Complex, Fft, Leaf};
use super::filter::Spectrum;
use super::signal::{Sequence, Signal};
use super::{Geometry, Problem, block};
use crate::backend::cpu::memory;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, load, put, store};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// One window of registers, which a thread uses again and again.
pub(in super::super) struct Scratch<T>(Vec<T>);

impl<T: Real> Scratch<T> {
    pub(in super::super) fn new(fft: &Fft<T>, lanes: usize) -> Self {
        let size = fft.points() * 2 * lanes;
        let mut values = memory::with_capacity(size);
        values.resize(size, T::ZERO);
        Self(values)
    }

    pub(in super::super) fn values(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// Scratch that is free: as many as threads that have been at work.
pub(in super::super) struct Pool<S>(Mutex<Vec<S>>);

impl<S> Pool<S> {
    pub(in super::super) fn new() -> Self {
        Self(Mutex::new(vec![]))
    }

    /// Lends free scratch, or what `make` makes, to `f`.
    pub(in super::super) fn lend<R>(&self, make: impl FnOnce() -> S, f: impl FnOnce(&mut S) -> R) -> R {
        let free = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = free().pop();
        let mut scratch = found.unwrap_or_else(make);
        let result = f(&mut scratch);
        free().push(scratch);
        result
    }
}

/// Where the tokens of a window lie.
#[derive(Clone, Debug)]
pub(in super::super) struct Span {
    /// Positions in the sequence that are loaded.
    pub(in super::super) positions: Range<usize>,
    /// The place of the first of them in the window.
    pub(in super::super) place: usize,
}

impl Span {
    /// The positions `start - before..end`, those that are there, in a window whose place 0 is `start - before`.
    pub(in super::super) fn new(start: usize, before: usize, end: usize, length: usize) -> Self {
        let first = start.saturating_sub(before);
        Self { positions: first..end.min(length), place: before - (start - first) }
    }
}

/// Tokens ahead of which lines of memory are asked for: they lie a row apart, which no hardware foresees.
pub(in super::super) const AHEAD: usize = 24;

/// Loads a span of `signal` into a window of `points`, zeros elsewhere.
#[inline(always)]
pub(in super::super) fn fill<E: Element, S: Simd<E::Real>>(
    s: S,
    window: &mut [E::Real],
    signal: &Signal<E>,
    sequence: &Sequence,
    span: &Span,
    channels: &Range<usize>,
) {
    let points = window.len() / (2 * S::LANES);
    let zero = s.splat(E::Real::ZERO);
    let (first, end) = (span.place, span.place + span.positions.len());
    assert!(end <= 2 * points && span.positions.end <= sequence.len());
    // straight loops over each half, and no closures: those would be compiled without the instructions of S
    for half in 0..2 {
        let base = half * points;
        let (from, to) = (first.clamp(base, base + points), end.clamp(base, base + points));
        for place in (base..from).chain(to..base + points) {
            put(s, window, (2 * (place - base) + half) * S::LANES, S::LANES, zero);
        }
        for place in from..to {
            let position = span.positions.start + (place - first);
            if position + AHEAD < span.positions.end {
                signal.prefetch(s, [sequence.row, sequence.token(position + AHEAD)], channels.start);
            }
            let at = [sequence.row, sequence.token(position)];
            let value = signal.load(s, at, channels.start, channels.len());
            put(s, window, (2 * (place - base) + half) * S::LANES, S::LANES, value);
        }
    }
}

/// The value at `place` of a window.
#[inline(always)]
pub(in super::super) fn at<T: Real, S: Simd<T>>(s: S, window: &[T], place: usize) -> S::V {
    let points = window.len() / (2 * S::LANES);
    let (point, half) = if place < points { (place, 0) } else { (place - points, 1) };
    load(s, window, (2 * point + half) * S::LANES, S::LANES)
}

/// Times a spectrum, or its conjugate.
pub(in super::super) struct Times<'a, T, const CONJUGATE: bool>(pub(in super::super) &'a [T]);

impl<T: Real, const CONJUGATE: bool> Leaf<T> for Times<'_, T, CONJUGATE> {
    #[inline(always)]
    unsafe fn at<S: Simd<T>>(&self, s: S, index: usize, value: Complex<S::V>) -> Complex<S::V> {
        // SAFETY: the spectrum has as many points as the window.
        let factor = unsafe { Complex::load(s, self.0.as_ptr().add(index * 2 * S::LANES)) };
        if CONJUGATE { value.times_conjugate(s, factor) } else { value.times(s, factor) }
    }
}

/// One sequence and one block of channels, forward.
pub(in super::super) struct Forward<'a, 's, E: Element> {
    pub(in super::super) problem: &'a Problem<'a, E>,
    pub(in super::super) fft: &'a Fft<E::Real>,
    pub(in super::super) geometry: Geometry,
    pub(in super::super) spectrum: &'a Spectrum<E::Real>,
    pub(in super::super) sequence: usize,
    pub(in super::super) block: usize,
    pub(in super::super) y: &'a Outlet<'a, E>,
    pub(in super::super) scratch: &'s mut Scratch<E::Real>,
}

impl<E: Element> Kernel<E::Real> for Forward<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<E::Real>>(self, s: S) {
        let (p, Geometry { before, step, behind, .. }) = (self.problem, self.geometry);
        let sequence = &p.sequences[self.sequence];
        let channels = block(self.block, S::LANES, p.sizes.channels);
        let spectrum = self.spectrum.block(self.block);
        let window = self.scratch.values();
        assert!(spectrum.len() == window.len());
        for start in (0..sequence.len()).step_by(step) {
            let end = sequence.len().min(start + step);
            let span = Span::new(start, before, start + step + behind, sequence.len());
            fill(s, window, &p.input, sequence, &span, &channels);
            self.fft.walk(p.isa, window, Times::<_, false>(spectrum));
            for position in start..end {
                let token = sequence.token(position);
                if position + AHEAD < end {
                    let ahead = sequence.token(position + AHEAD);
                    let place = (sequence.row * p.sizes.length + ahead) * p.sizes.channels + channels.start;
                    s.prefetch(self.y.at(place, channels.len()));
                    if let Some(gate) = &p.post_gate {
                        s.prefetch(gate.row([sequence.row, ahead])[channels.start..].as_ptr());
                    }
                }
                let mut y = at(s, window, position - start + before);
                if let Some(gate) = &p.post_gate {
                    y = s.mul(y, load(s, gate.row([sequence.row, token]), channels.start, channels.len()));
                }
                let place = (sequence.row * p.sizes.length + token) * p.sizes.channels + channels.start;
                let to = self.y.at(place, channels.len());
                // SAFETY: at() checked the place; no other task has this sequence and these channels.
                unsafe { store(s, to, channels.len(), y) };
            }
        }
    }
}
