//! The fast path on the CPU: [`filter`]s laid out and transformed, windows of [`signal`]s convolved with them by
//! [`fft`] ([`window`]) or tap by tap ([`direct`]).
//!
//! Work is cut into blocks of as many channels as a register has lanes, and sequences; a task goes through the windows
//! of one sequence (forward) or of all sequences (backward, where the filter's gradient is summed in their order).
//!
//! Floor of a causal transform of `N` points: `2 (3.5 log4 N)` operations on registers a point and 16 for the product,
//! about 100 at `N = 4096`, while memory sees 3 numbers a point and channel (input, output and half the spectrum's).

pub(super) mod backward;
pub(super) mod cache;
pub(super) mod direct;
pub(super) mod fft;
pub(super) mod filter;
pub(super) mod signal;
pub(super) mod window;

use super::plan::{self, Geometry, Method};
use super::{LongConv, Segments, Sizes};
use crate::Result;
use crate::backend::cpu::simd::{Element, Isa, Real, Simd};
use crate::backend::cpu::view::{Outlet, Rows};
use fft::Fft;
use filter::{HeldTaps, Layout, Spectrum, Taps};
use rayon::prelude::*;
use signal::{Sequence, Signal};
use std::ops::Range;
use std::sync::Arc;
use window::{Pool, Scratch};

/// Lanes of `isa` for `T`.
pub(super) fn lanes<T: Real>(isa: Isa) -> usize {
    struct Lanes;
    impl<T: Real> crate::backend::cpu::simd::Kernel<T> for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd<T>>(self, _: S) -> usize {
            S::LANES
        }
    }
    T::dispatch_on(isa, Lanes)
}

/// A block of channels.
pub(super) fn block(index: usize, lanes: usize, channels: usize) -> Range<usize> {
    index * lanes..channels.min((index + 1) * lanes)
}

/// What a call computes with, whatever the method.
pub(super) struct Problem<'a, E: Element> {
    pub(super) isa: Isa,
    pub(super) lanes: usize,
    pub(super) sizes: Sizes,
    /// `v`: the input and its gate.
    pub(super) input: Signal<'a, E>,
    pub(super) post_gate: Option<Rows<'a, E>>,
    pub(super) sequences: Vec<Sequence>,
    /// The tokens of the longest sequence.
    pub(super) longest: usize,
    /// Whether some tokens belong to no sequence.
    pub(super) padded: bool,
}

/// How a filter was prepared for the method.
pub(super) enum Prepared<T> {
    Direct(Layout<T>),
    Transformed(Geometry, Arc<Spectrum<T>>),
}

impl<'a, E: Element> Problem<'a, E> {
    pub(super) fn new(
        isa: Isa,
        args: &LongConv,
        sizes: Sizes,
        input: Signal<'a, E>,
        post_gate: Option<Rows<'a, E>>,
    ) -> Self {
        let sequences = Sequence::all(args.segments, sizes.batch, sizes.length);
        let longest = sequences.iter().map(Sequence::len).max().unwrap_or(0);
        let padded = args.segments.is_some_and(Segments::any_padding);
        Self { isa, lanes: lanes::<E::Real>(isa), sizes, input, post_gate, sequences, longest, padded }
    }

    /// Blocks of channels.
    pub(super) fn blocks(&self) -> usize {
        self.sizes.channels.div_ceil(self.lanes)
    }

    /// The filter in the form the method wants it in, from the cache if it is there.
    pub(super) fn prepare(&self, args: &LongConv) -> Result<Prepared<E::Real>> {
        match plan::method(&self.sizes, self.longest) {
            Method::Direct => {
                let layout = |taps: &Taps<_>| Layout::new(self.isa, taps, &self.sizes, self.longest);
                Ok(Prepared::Direct(HeldTaps::new(args)?.with(layout)?))
            }
            Method::Fft(window) | Method::Overlap(window) => {
                Ok(Prepared::Transformed(window, self.spectrum(args, window)?))
            }
        }
    }

    /// The filter's transform for windows of `geometry`.
    pub(super) fn spectrum(&self, args: &LongConv, geometry: Geometry) -> Result<Arc<Spectrum<E::Real>>> {
        let held = HeldTaps::new(args)?;
        let make = |taps: &Taps<'_, E::Real>| {
            let fft = cache::plan::<E::Real>(geometry.points);
            Spectrum::new(self.isa, &fft, taps, &self.sizes, self.longest)
        };
        match args.cache {
            Some(cache) => held.with(|taps| {
                let key = cache::Key::new(taps, &self.sizes, self.longest, geometry.points, self.lanes);
                cache.get_or_make(key, || make(taps))
            }),
            None => held.with(|taps| Arc::new(make(taps))),
        }
    }

    /// The output, `[B, L, D]`.
    pub(super) fn forward(&self, prepared: &Prepared<E::Real>) -> Vec<E> {
        let elements = self.sizes.elements();
        let mut y: Vec<E> = Vec::new();
        {
            let y = Outlet::fresh_or_zeroed(&mut y, elements, self.padded);
            let blocks = self.blocks();
            // a row's blocks one after another: neighbours read the same lines
            let tasks: Vec<(usize, usize)> =
                (0..self.sequences.len()).flat_map(|q| (0..blocks).map(move |b| (q, b))).collect();
            match prepared {
                Prepared::Direct(layout) => tasks.par_iter().for_each(|&(sequence, block)| {
                    let kernel = direct::Forward { problem: self, layout, sequence, block, y: &y };
                    E::Real::dispatch_on(self.isa, kernel);
                }),
                Prepared::Transformed(geometry, spectrum) => {
                    let fft = cache::plan::<E::Real>(geometry.points);
                    let pool = Pool::new();
                    let make = || Scratch::<E::Real>::new(&fft, self.lanes);
                    tasks.par_iter().for_each(|&(sequence, block)| {
                        pool.lend(make, |scratch| {
                            let (problem, fft, geometry) = (self, &*fft, *geometry);
                            let kernel = window::Forward {
                                problem,
                                fft,
                                geometry,
                                spectrum,
                                sequence,
                                block,
                                y: &y,
                                scratch,
                            };
                            E::Real::dispatch_on(self.isa, kernel);
                        });
                    });
                }
            }
        }
        // SAFETY: padding was zeroed; every other token lies in a sequence, whose tasks wrote all of its channels.
        unsafe { y.set_len(elements) };
        y
    }
}

/// The transform of one size, for a type.
pub(super) type Plan<T> = Arc<Fft<T>>;
