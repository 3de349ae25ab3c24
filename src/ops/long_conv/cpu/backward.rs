//! The backward pass, by transforms whatever the forward pass was.
//!
//! With `w = post_gate dy`, `V`, `W` and `F` the transforms of `v`, `w` and the filter, and a bar for the conjugate,
//!
//! ```text
//! dv = W conj(F)        dfilter = sum over windows of W conj(V)        z = V F  (for the gradient of post_gate)
//! ```
//!
//! all three where the last stage of `W` leaves its numbers if one window is all there is: the second then takes the
//! place of `F`, the third that of `V`. And `dx = pre_gate dv`, `dpre_gate = x dv`, `dpost_gate = z dy`. The gradient of the skip weight is that of lag 0.

use super::fft::{Complex, Fft, How, Leaf};
use super::filter::{Backwards, Forwards, HeldTaps, Spectrum};
use super::signal::{Sequence, Signal, Track};
use super::window::{AHEAD, Span, Times, at, fill, lend};
use super::{Geometry, LongConv, Problem, block, cache};
use crate::Result;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows, store};
use candle_core::WithDType;
use rayon::prelude::*;
use std::ops::Range;

/// The gradients of the inputs; empty where not asked for.
pub(in super::super) struct Gradients<E: Element> {
    pub(in super::super) x: Vec<E>,
    pub(in super::super) pre_gate: Vec<E>,
    pub(in super::super) post_gate: Vec<E>,
    /// `[K, D]`, for the taps that met a token.
    pub(in super::super) past: Vec<E::Real>,
    /// `[K', D]`
    pub(in super::super) future: Vec<E::Real>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Wanted {
    pub(in super::super) filter: bool,
    pub(in super::super) post_gate: bool,
}

impl<E: Element> Problem<'_, E> {
    /// The gradients, given that of the output.
    pub(in super::super) fn backward(
        &self,
        args: &LongConv,
        geometry: Geometry,
        kept: Option<&Spectrum<E::Real>>,
        dy: Rows<'_, E>,
        wanted: Wanted,
    ) -> Result<Gradients<E>> {
        let (elements, channels) = (self.sizes.elements(), self.sizes.channels);
        let (past, future) = (self.sizes.taps.min(self.longest), self.sizes.reverse.min(self.longest));
        let taps = |count: usize| if wanted.filter { count * channels } else { 0 };
        let sequence = |wanted: bool| if wanted { elements } else { 0 };
        let counts = [elements, sequence(self.input.gate.is_some()), sequence(wanted.post_gate)];
        let filters = [taps(past), taps(future)];
        let mut of_sequences: [Vec<E>; 3] = Default::default();
        let mut of_filters: [Vec<E::Real>; 2] = Default::default();
        {
            let [x, pre_gate, post_gate] = &mut of_sequences;
            let [of_past, of_future] = &mut of_filters;
            let outlets = Outlets {
                x: Outlet::fresh_or_zeroed(x, counts[0], self.padded),
                pre_gate: Outlet::fresh_or_zeroed(pre_gate, counts[1], self.padded),
                post_gate: Outlet::fresh_or_zeroed(post_gate, counts[2], self.padded),
                past: Outlet::fresh(of_past, filters[0]),
                future: Outlet::fresh(of_future, filters[1]),
            };
            let fft = cache::plan::<E::Real>(geometry.points);
            let dz = Signal { values: dy, gate: self.post_gate };
            let size = fft.points() * 2 * self.lanes;
            HeldTaps::new(args)?.with(|taps| {
                let (how, filter) = (self.how(self.blocks()), self.filter(&fft, taps));
                let one = |block: usize, scratch: [&mut [E::Real]; 3], sum: Option<&mut [E::Real]>| {
                    match kept {
                        Some(kept) => scratch[0].copy_from_slice(kept.block(block)),
                        None => filter.transform(block, scratch[0]),
                    }
                    let (problem, fft, outlets) = (self, &*fft, &outlets);
                    let kernel =
                        Backward { problem, how, fft, geometry, dz, wanted, block, outlets, scratch, sum };
                    E::Real::dispatch_on(self.isa, kernel);
                };
                let alone = self.sequences.len() == 1 && geometry.step >= self.longest;
                (0..self.blocks()).into_par_iter().for_each(|block| match alone {
                    true => lend(size, |[f, v, w]| one(block, [f, v, w], None)),
                    false => lend(size, |[f, v, w, sum]| one(block, [f, v, w], Some(sum))),
                });
            })?;
        }
        // SAFETY: padding was zeroed; every other token, and every tap, was written, all channels of it.
        unsafe {
            of_sequences.iter_mut().zip(counts).for_each(|(values, count)| values.set_len(count));
            of_filters.iter_mut().zip(filters).for_each(|(values, count)| values.set_len(count));
        }
        let ([x, pre_gate, post_gate], [past, future]) = (of_sequences, of_filters);
        Ok(Gradients { x, pre_gate, post_gate, past, future })
    }
}

/// Where the gradients go.
struct Outlets<'a, E: Element> {
    x: Outlet<'a, E>,
    pre_gate: Outlet<'a, E>,
    post_gate: Outlet<'a, E>,
    past: Outlet<'a, E::Real>,
    future: Outlet<'a, E::Real>,
}

/// All sequences, one block of channels.
struct Backward<'a, 's, E: Element> {
    problem: &'a Problem<'a, E>,
    how: How,
    fft: &'a Fft<E::Real>,
    geometry: Geometry,
    dz: Signal<'a, E>,
    wanted: Wanted,
    block: usize,
    outlets: &'a Outlets<'a, E>,
    /// The filter's transform, room for those of `v` and `w`.
    scratch: [&'s mut [E::Real]; 3],
    /// Room to sum the filter's gradient, where windows are several.
    sum: Option<&'s mut [E::Real]>,
}

/// All three products with `value` and what they need, in place: `v` becomes `v f`, and `f` `value conj(v)`.
struct Products<'a, T> {
    v: Outlet<'a, T>,
    f: Outlet<'a, T>,
    wanted: Wanted,
}

impl<T: Real> Leaf<T> for Products<'_, T> {
    #[inline(always)]
    unsafe fn at<S: Simd<T>>(&self, s: S, index: usize, value: Complex<S::V>) -> Complex<S::V> {
        let place = index * 2 * S::LANES;
        let (v, f) = (self.v.at(place, 2 * S::LANES), self.f.at(place, 2 * S::LANES));
        // SAFETY: at() checked the places; both buffers belong to this walk alone.
        unsafe {
            let filter = Complex::load(s, f);
            if self.wanted.filter || self.wanted.post_gate {
                let input = Complex::load(s, v);
                if self.wanted.filter {
                    value.times_conjugate(s, input).store(s, f);
                }
                if self.wanted.post_gate {
                    input.times(s, filter).store(s, v);
                }
            }
            value.times_conjugate(s, filter)
        }
    }
}

/// Adds `value conj(other)` to the sum.
struct Correlate<'a, T> {
    other: &'a [T],
    /// As many numbers, which belong to this walk alone.
    sum: Outlet<'a, T>,
    /// By whose conjugate `value` is multiplied.
    spectrum: Option<&'a [T]>,
}

impl<T: Real> Leaf<T> for Correlate<'_, T> {
    #[inline(always)]
    unsafe fn at<S: Simd<T>>(&self, s: S, index: usize, value: Complex<S::V>) -> Complex<S::V> {
        let place = index * 2 * S::LANES;
        // SAFETY: all of them have as many points as the window; the sum belongs to this walk alone.
        unsafe {
            let other = Complex::load(s, self.other.as_ptr().add(place));
            let product = value.times_conjugate(s, other);
            let sum = self.sum.at(place, 2 * S::LANES);
            let old = Complex::load(s, sum);
            Complex { re: s.add(old.re, product.re), im: s.add(old.im, product.im) }.store(s, sum);
            match self.spectrum {
                Some(spectrum) => value.times_conjugate(s, Complex::load(s, spectrum.as_ptr().add(place))),
                None => value,
            }
        }
    }
}

impl<E: Element> Kernel<E::Real> for Backward<'_, '_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<E::Real>>(mut self, s: S) {
        let size = self.fft.points() * 2 * S::LANES;
        assert!(self.scratch.iter().all(|buffer| buffer.len() == size));
        match self.sum.take() {
            None => self.one_window(s),
            Some(sum) => self.windows(s, sum),
        }
    }
}

impl<E: Element> Backward<'_, '_, E> {
    /// One sequence that one window holds.
    #[inline(always)]
    fn one_window<S: Simd<E::Real>>(mut self, s: S) {
        let (p, fft, wanted) = (self.problem, self.fft, self.wanted);
        let [f, v, w] = std::mem::take(&mut self.scratch);
        let Some(sequence) = p.sequences.first() else { return };
        let channels = block(self.block, S::LANES, p.sizes.channels);
        let length = sequence.len();
        let span = Span::new(0, 0, length, length);
        if wanted.filter || wanted.post_gate {
            fill(s, v, &p.input, sequence, &span, &channels);
            fft.walk(self.how, v, Forwards);
        }
        fill(s, w, &self.dz, sequence, &span, &channels);
        fft.walk(self.how, w, Products { v: Outlet::new(v), f: Outlet::new(f), wanted });
        self.put_inputs(s, w, sequence, 0..length, 0);
        if wanted.post_gate {
            fft.walk(self.how, v, Backwards);
            self.put_post_gate(s, v, sequence, 0..length, 0);
        }
        if wanted.filter {
            fft.walk(self.how, f, Backwards);
            self.put_filter(s, f);
        }
    }

    /// Any sequences in any windows.
    #[inline(always)]
    fn windows<S: Simd<E::Real>>(mut self, s: S, sum: &mut [E::Real]) {
        let (p, fft, Geometry { before, step, behind, .. }) = (self.problem, self.fft, self.geometry);
        let [f, v, w] = std::mem::take(&mut self.scratch);
        let channels = block(self.block, S::LANES, p.sizes.channels);
        let (wants_filter, wants_gate) = (self.wanted.filter, self.wanted.post_gate);
        assert!(sum.len() == w.len());
        sum.fill(E::Real::ZERO);
        for sequence in &p.sequences {
            let length = sequence.len();
            for start in (0..length).step_by(step) {
                let end = length.min(start + step);
                if wants_filter || wants_gate {
                    let span = Span::new(start, before, start + step + behind, length);
                    fill(s, v, &p.input, sequence, &span, &channels);
                    fft.walk(self.how, v, Forwards);
                }
                // one transform of dz will do where windows do not overlap
                let apart = before + behind > 0;
                if wants_filter && apart {
                    let span = Span { positions: start..end, place: before };
                    fill(s, w, &self.dz, sequence, &span, &channels);
                    fft.walk(self.how, w, Correlate { other: v, sum: Outlet::new(sum), spectrum: None });
                }
                let span = Span::new(start, behind, start + step + before, length);
                fill(s, w, &self.dz, sequence, &span, &channels);
                if wants_filter && !apart {
                    fft.walk(self.how, w, Correlate { other: v, sum: Outlet::new(sum), spectrum: Some(f) });
                } else {
                    fft.walk(self.how, w, Times::<_, true>(f));
                }
                self.put_inputs(s, w, sequence, start..end, behind);
                if wants_gate {
                    fft.walk(self.how, v, Product(f));
                    self.put_post_gate(s, v, sequence, start..end, before);
                }
            }
        }
        if wants_filter {
            fft.walk(self.how, sum, Backwards);
            self.put_filter(s, sum);
        }
    }

    /// The channels of this block.
    #[inline(always)]
    fn channels<S: Simd<E::Real>>(&self, _: S) -> Range<usize> {
        block(self.block, S::LANES, self.problem.sizes.channels)
    }

    /// Where a token's values of `channels` lie.
    #[inline(always)]
    fn offset(&self, sequence: &Sequence, token: usize, channels: &Range<usize>) -> usize {
        let sizes = &self.problem.sizes;
        (sequence.row * sizes.length + token) * sizes.channels + channels.start
    }

    /// The gradients of the input and its gate, `dv` lying in `w` from `place` on.
    #[inline(always)]
    fn put_inputs<S: Simd<E::Real>>(
        &self,
        s: S,
        w: &[E::Real],
        sequence: &Sequence,
        positions: Range<usize>,
        place: usize,
    ) {
        let channels = self.channels(s);
        let (input, n) = (self.problem.input.track(sequence.row, &channels), channels.len());
        for position in positions.clone() {
            if position + AHEAD < positions.end {
                let token = sequence.token(position + AHEAD);
                let ahead = self.offset(sequence, token, &channels);
                s.prefetch(self.outlets.x.at(ahead, n));
                if input.gate.is_some() {
                    input.prefetch(s, token);
                    s.prefetch(self.outlets.pre_gate.at(ahead, n));
                }
            }
            let token = sequence.token(position);
            let offset = self.offset(sequence, token, &channels);
            let mut dv = at(s, w, position - positions.start + place);
            if let Some(gate) = &input.gate {
                let to = self.outlets.pre_gate.at(offset, n);
                // SAFETY: at() checked the place; no other task has these channels.
                unsafe { store(s, to, n, s.mul(dv, input.values.load(s, token))) };
                dv = s.mul(dv, gate.load(s, token));
            }
            let to = self.outlets.x.at(offset, n);
            // SAFETY: as above.
            unsafe { store(s, to, n, dv) };
        }
    }

    /// The gradient of the gate behind, `z` lying in `v` from `place` on.
    #[inline(always)]
    fn put_post_gate<S: Simd<E::Real>>(
        &self,
        s: S,
        v: &[E::Real],
        sequence: &Sequence,
        positions: Range<usize>,
        place: usize,
    ) {
        let channels = self.channels(s);
        let (dy, n) = (Track::new(&self.dz.values, sequence.row, &channels), channels.len());
        for position in positions.clone() {
            if position + AHEAD < positions.end {
                let token = sequence.token(position + AHEAD);
                s.prefetch(self.outlets.post_gate.at(self.offset(sequence, token, &channels), n));
                dy.prefetch(s, token);
            }
            let token = sequence.token(position);
            let z = at(s, v, position - positions.start + place);
            let to = self.outlets.post_gate.at(self.offset(sequence, token, &channels), n);
            // SAFETY: at() checked the place; no other task has these channels.
            unsafe { store(s, to, n, s.mul(z, dy.load(s, token))) };
        }
    }

    /// The gradients of the filters, modulo `X^(2N) + 1` in `sum`.
    #[inline(always)]
    fn put_filter<S: Simd<E::Real>>(&self, s: S, sum: &[E::Real]) {
        let (p, points, c) = (self.problem, self.fft.points(), self.block * S::LANES);
        let n = S::LANES.min(p.sizes.channels - c);
        let scale = s.splat(E::Real::ONE / E::Real::from_f64(points as f64));
        let negative = s.sub(s.splat(E::Real::ZERO), scale);
        let met = p.sizes.taps.min(p.longest);
        for lag in 0..met {
            if lag + AHEAD < met {
                s.prefetch(self.outlets.past.at((lag + AHEAD) * p.sizes.channels + c, n));
            }
            let to = self.outlets.past.at(lag * p.sizes.channels + c, n);
            // SAFETY: at() checked the place; no other task has these channels.
            unsafe { store(s, to, n, s.mul(scale, at(s, sum, lag))) };
        }
        for lag in 0..p.sizes.reverse.min(p.longest) {
            let (place, scale) = if lag == 0 { (0, scale) } else { (2 * points - lag, negative) };
            let to = self.outlets.future.at(lag * p.sizes.channels + c, n);
            // SAFETY: as above.
            unsafe { store(s, to, n, s.mul(scale, at(s, sum, place))) };
        }
    }
}

/// Numbers already transformed, times a spectrum and back.
struct Product<'a, T>(&'a [T]);

impl<T: Real> Leaf<T> for Product<'_, T> {
    const FORWARD: bool = false;
    #[inline(always)]
    unsafe fn at<S: Simd<T>>(&self, s: S, index: usize, value: Complex<S::V>) -> Complex<S::V> {
        // SAFETY: the spectrum has as many points as the window.
        value.times(s, unsafe { Complex::load(s, self.0.as_ptr().add(index * 2 * S::LANES)) })
    }
}
