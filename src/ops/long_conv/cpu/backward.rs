//! The backward pass, by transforms whatever the forward pass was.
//!
//! With `w = post_gate dy`, `V`, `W` and `F` the transforms of `v`, `w` and the filter, and a bar for the conjugate,
//!
//! ```text
//! dv = W conj(F)        dfilter = sum over windows of W conj(V)        z = V F  (for the gradient of post_gate)
//! ```
//!
//! and `dx = pre_gate dv`, `dpre_gate = x dv`, `dpost_gate = z dy`. The gradient of the skip weight is that of lag 0.

use super::fft::{Complex, Fft, Leaf};
use super::filter::{Backwards, Forwards, Spectrum};
use super::signal::Signal;
use super::window::{AHEAD, Pool, Scratch, Span, Times, at, fill};
use super::{Geometry, Problem, block, cache};
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows, load, store};
use candle_core::WithDType;
use rayon::prelude::*;

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
        geometry: Geometry,
        spectrum: &Spectrum<E::Real>,
        dy: Rows<'_, E>,
        wanted: Wanted,
    ) -> Gradients<E> {
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
            let scratch = || -> [Scratch<E::Real>; 3] {
                // the third sums the filter's gradient
                std::array::from_fn(|_| Scratch::new(&fft, self.lanes))
            };
            let pool = Pool::new();
            (0..self.blocks()).into_par_iter().for_each(|block| {
                pool.lend(scratch, |scratch| {
                    let (problem, fft, outlets) = (self, &*fft, &outlets);
                    let kernel =
                        Backward { problem, fft, geometry, spectrum, dz, wanted, block, outlets, scratch };
                    E::Real::dispatch_on(self.isa, kernel);
                });
            });
        }
        // SAFETY: padding was zeroed; every other token, and every tap, was written, all channels of it.
        unsafe {
            of_sequences.iter_mut().zip(counts).for_each(|(values, count)| values.set_len(count));
            of_filters.iter_mut().zip(filters).for_each(|(values, count)| values.set_len(count));
        }
        let ([x, pre_gate, post_gate], [past, future]) = (of_sequences, of_filters);
        Gradients { x, pre_gate, post_gate, past, future }
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
    fft: &'a Fft<E::Real>,
    geometry: Geometry,
    spectrum: &'a Spectrum<E::Real>,
    dz: Signal<'a, E>,
    wanted: Wanted,
    block: usize,
    outlets: &'a Outlets<'a, E>,
    scratch: &'s mut [Scratch<E::Real>; 3],
}

/// Adds `value conj(other)` to the sum, and multiplies `value` by the conjugate of the spectrum.
struct Correlate<'a, T> {
    other: &'a [T],
    /// As many numbers, which belong to this walk alone.
    sum: Outlet<'a, T>,
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
    fn run<S: Simd<E::Real>>(self, s: S) {
        let Self { problem: p, fft, geometry: Geometry { before, step, behind, .. }, .. } = self;
        let channels = block(self.block, S::LANES, p.sizes.channels);
        let (c, n) = (channels.start, channels.len());
        let spectrum = self.spectrum.block(self.block);
        let [v, w, sum] = self.scratch;
        let (v, w) = (v.values(), w.values());
        let sum = sum.values();
        assert!(v.len() == w.len() && v.len() == spectrum.len());
        sum.fill(E::Real::ZERO);
        let (wants_filter, wants_gate) = (self.wanted.filter, self.wanted.post_gate);
        for sequence in &p.sequences {
            let length = sequence.len();
            for start in (0..length).step_by(step) {
                let end = length.min(start + step);
                let offset = |token: usize| (sequence.row * p.sizes.length + token) * p.sizes.channels + c;
                if wants_filter || wants_gate {
                    let span = Span::new(start, before, start + step + behind, length);
                    fill(s, v, &p.input, sequence, &span, &channels);
                    fft.walk(p.isa, v, Forwards);
                }
                // one transform of dz will do where windows do not overlap
                let apart = before + behind > 0;
                if wants_filter && apart {
                    let span = Span { positions: start..end, place: before };
                    fill(s, w, &self.dz, sequence, &span, &channels);
                    fft.walk(p.isa, w, Correlate { other: v, sum: Outlet::new(sum), spectrum: None });
                }
                let span = Span::new(start, behind, start + step + before, length);
                fill(s, w, &self.dz, sequence, &span, &channels);
                if wants_filter && !apart {
                    fft.walk(
                        p.isa,
                        w,
                        Correlate { other: v, sum: Outlet::new(sum), spectrum: Some(spectrum) },
                    );
                } else {
                    fft.walk(p.isa, w, Times::<_, true>(spectrum));
                }
                for position in start..end {
                    let token = sequence.token(position);
                    if position + AHEAD < end {
                        let ahead = sequence.token(position + AHEAD);
                        s.prefetch(self.outlets.x.at(offset(ahead), n));
                        if p.input.gate.is_some() {
                            p.input.prefetch(s, [sequence.row, ahead], c);
                            s.prefetch(self.outlets.pre_gate.at(offset(ahead), n));
                        }
                    }
                    let mut dv = at(s, w, position - start + behind);
                    if let Some(gate) = &p.input.gate {
                        let x = load(s, p.input.values.row([sequence.row, token]), c, n);
                        let to = self.outlets.pre_gate.at(offset(token), n);
                        // SAFETY: at() checked the place; no other task has these channels.
                        unsafe { store(s, to, n, s.mul(dv, x)) };
                        dv = s.mul(dv, load(s, gate.row([sequence.row, token]), c, n));
                    }
                    let to = self.outlets.x.at(offset(token), n);
                    // SAFETY: as above.
                    unsafe { store(s, to, n, dv) };
                }
                if wants_gate {
                    fft.walk(p.isa, v, Product(spectrum));
                    for position in start..end {
                        let token = sequence.token(position);
                        if position + AHEAD < end {
                            let ahead = sequence.token(position + AHEAD);
                            s.prefetch(self.outlets.post_gate.at(offset(ahead), n));
                            s.prefetch(self.dz.values.row([sequence.row, ahead])[c..].as_ptr());
                        }
                        let z = at(s, v, position - start + before);
                        let dy = load(s, self.dz.values.row([sequence.row, token]), c, n);
                        let to = self.outlets.post_gate.at(offset(token), n);
                        // SAFETY: as above.
                        unsafe { store(s, to, n, s.mul(z, dy)) };
                    }
                }
            }
        }
        if wants_filter {
            fft.walk(p.isa, sum, Backwards);
            let scale = s.splat(E::Real::ONE / E::Real::from_f64(fft.points() as f64));
            let negative = s.sub(s.splat(E::Real::ZERO), scale);
            let met = p.sizes.taps.min(p.longest);
            for lag in 0..met {
                if lag + AHEAD < met {
                    s.prefetch(self.outlets.past.at((lag + AHEAD) * p.sizes.channels + c, n));
                }
                let to = self.outlets.past.at(lag * p.sizes.channels + c, n);
                // SAFETY: as above.
                unsafe { store(s, to, n, s.mul(scale, at(s, sum, lag))) };
            }
            for lag in 0..p.sizes.reverse.min(p.longest) {
                let (place, scale) = if lag == 0 { (0, scale) } else { (2 * fft.points() - lag, negative) };
                let to = self.outlets.future.at(lag * p.sizes.channels + c, n);
                // SAFETY: as above.
                unsafe { store(s, to, n, s.mul(scale, at(s, sum, place))) };
            }
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
