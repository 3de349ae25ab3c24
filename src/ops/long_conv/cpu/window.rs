//! Convolution window by window: load, transform, multiply, transform back, store.

use super::fft::{Complex, Fft, How, Leaf};
use super::signal::{Sequence, Signal, Track};
use super::{Geometry, Problem, block};
use crate::backend::cpu::memory;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, load, put, store};
use std::any::Any;
use std::cell::RefCell;
use std::ops::Range;

/// What a thread keeps of its scratch between calls, at most.
const KEPT: usize = 8 << 20;
/// The first address of scratch is a multiple of this: registers that lie across two lines take twice as long.
const LINE: usize = 64;

/// Lends `f` so many buffers of `size` numbers of whatever was there before: a thread uses them again and again.
pub(in super::super) fn lend<T: Real, R, const N: usize>(
    size: usize,
    f: impl FnOnce([&mut [T]; N]) -> R,
) -> R {
    thread_local! {
        static SCRATCH: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(vec![]) };
    }
    let step = size.next_multiple_of(LINE / size_of::<T>());
    let take = |all: &RefCell<Vec<Box<dyn Any>>>| {
        let mut all = all.borrow_mut();
        let place = all.iter().position(|kept| kept.is::<Vec<T>>())?;
        all.swap_remove(place).downcast::<Vec<T>>().ok()
    };
    let mut values = SCRATCH.with(take).unwrap_or_default();
    let needed = N * step + LINE / size_of::<T>();
    if values.len() < needed {
        *values = memory::with_capacity(needed);
        values.resize(needed, T::ZERO);
    }
    let ahead = values.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
    let mut rest = &mut values[ahead..];
    let buffers = std::array::from_fn(|_| {
        let (buffer, behind) = std::mem::take(&mut rest).split_at_mut(step);
        rest = behind;
        &mut buffer[..size]
    });
    let result = f(buffers);
    if values.len() * size_of::<T>() <= KEPT {
        SCRATCH.with(|all| all.borrow_mut().push(values));
    }
    result
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
    let signal = signal.track(sequence.row, channels);
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
                signal.prefetch(s, sequence.token(position + AHEAD));
            }
            let value = signal.load(s, sequence.token(position));
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
    pub(in super::super) how: How,
    pub(in super::super) fft: &'a Fft<E::Real>,
    pub(in super::super) geometry: Geometry,
    /// Of this block.
    pub(in super::super) spectrum: &'a [E::Real],
    pub(in super::super) sequence: usize,
    pub(in super::super) block: usize,
    pub(in super::super) y: &'a Outlet<'a, E>,
    pub(in super::super) window: &'s mut [E::Real],
}

impl<E: Element> Kernel<E::Real> for Forward<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<E::Real>>(self, s: S) {
        let (p, Geometry { before, step, behind, .. }) = (self.problem, self.geometry);
        let sequence = &p.sequences[self.sequence];
        let channels = block(self.block, S::LANES, p.sizes.channels);
        let (spectrum, window) = (self.spectrum, self.window);
        let post_gate = p.post_gate.as_ref().map(|gate| Track::new(gate, sequence.row, &channels));
        assert!(spectrum.len() == window.len());
        for start in (0..sequence.len()).step_by(step) {
            let end = sequence.len().min(start + step);
            let span = Span::new(start, before, start + step + behind, sequence.len());
            fill(s, window, &p.input, sequence, &span, &channels);
            self.fft.walk(self.how, window, Times::<_, false>(spectrum));
            for position in start..end {
                let token = sequence.token(position);
                if position + AHEAD < end {
                    let ahead = sequence.token(position + AHEAD);
                    let place = (sequence.row * p.sizes.length + ahead) * p.sizes.channels + channels.start;
                    s.prefetch(self.y.at(place, channels.len()));
                    if let Some(gate) = &post_gate {
                        gate.prefetch(s, ahead);
                    }
                }
                let mut y = at(s, window, position - start + before);
                if let Some(gate) = &post_gate {
                    y = s.mul(y, gate.load(s, token));
                }
                let place = (sequence.row * p.sizes.length + token) * p.sizes.channels + channels.start;
                let to = self.y.at(place, channels.len());
                // SAFETY: at() checked the place; no other task has this sequence and these channels.
                unsafe { store(s, to, channels.len(), y) };
            }
        }
    }
}
