//! The fast path on the CPU: [`filter`]s laid out and transformed, windows of [`signal`]s convolved with them by
//! [`fft`] ([`window`]) or tap by tap ([`direct`]).
//!
//! Work is cut into blocks of as many channels as a register has lanes, and sequences; a task goes through the windows
//! of one sequence (forward) or of all sequences (backward, where the filter's gradient is summed in their order).
//!
//! Floor of a causal transform of `N` points: `2 (3.5 log4 N)` operations on registers a point and 16 for the product,
//! about 100 at `N = 4096`, while memory sees 3 numbers a point and channel (input, output and half the spectrum's).

pub(super) mod backward;
mod butterfly;
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
use fft::{Fft, How};
use filter::{Filter, HeldTaps, Layout, Spectrum, Taps};
use rayon::prelude::*;
use signal::{Sequence, Signal};
use std::ops::Range;
use std::sync::Arc;
use window::lend;

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
    /// The transform where it is kept from call to call; else each block's is made where it is needed, so that there
    /// are never all of them.
    Transformed(Geometry, Option<Arc<Spectrum<T>>>),
}

/// Blocks a thread, at least, for whole blocks to be its tasks.
const BLOCKS: usize = 2;

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
        let geometry = match plan::method(&self.sizes, self.longest) {
            Method::Direct => {
                let layout = |taps: &Taps<_>| Layout::new(self.isa, taps, &self.sizes, self.longest);
                return Ok(Prepared::Direct(HeldTaps::new(args)?.with(layout)?));
            }
            Method::Fft(geometry) | Method::Overlap(geometry) => geometry,
        };
        let held = HeldTaps::new(args)?;
        let shared = self.sequences.len() > 1 && self.blocks() < BLOCKS * rayon::current_num_threads();
        let made = held.with(|taps: &Taps<'_, E::Real>| {
            let fft = cache::plan::<E::Real>(geometry.points);
            let make = || Spectrum::new(&self.filter(&fft, taps));
            match args.cache {
                Some(cache) => {
                    let key = cache::Key::new(taps, &self.sizes, self.longest, geometry.points, self.lanes);
                    Some(cache.get_or_make(key, make))
                }
                None => shared.then(|| Arc::new(make())),
            }
        })?;
        Ok(Prepared::Transformed(geometry, made))
    }

    /// How walks go where there are so many `tasks`.
    fn how(&self, tasks: usize) -> How {
        How { isa: self.isa, spread: tasks < rayon::current_num_threads() }
    }

    fn filter<'f>(&'f self, fft: &'f Fft<E::Real>, taps: &'f Taps<'f, E::Real>) -> Filter<'f, E::Real> {
        Filter { how: self.how(self.blocks()), fft, taps, sizes: &self.sizes, longest: self.longest }
    }

    /// The output, `[B, L, D]`.
    pub(super) fn forward(&self, args: &LongConv, prepared: &Prepared<E::Real>) -> Result<Vec<E>> {
        let elements = self.sizes.elements();
        let mut y: Vec<E> = Vec::new();
        {
            let y = Outlet::fresh_or_zeroed(&mut y, elements, self.padded);
            match prepared {
                Prepared::Direct(layout) => self.tasks().par_iter().for_each(|&(sequence, block)| {
                    let kernel = direct::Forward { problem: self, layout, sequence, block, y: &y };
                    E::Real::dispatch_on(self.isa, kernel);
                }),
                Prepared::Transformed(geometry, kept) => {
                    let fft = cache::plan::<E::Real>(geometry.points);
                    let size = fft.points() * 2 * self.lanes;
                    let how = self.how(self.blocks() * self.sequences.len());
                    let convolve = |sequence, block, spectrum: &[E::Real], window: &mut [E::Real]| {
                        let (problem, fft, geometry, y) = (self, &*fft, *geometry, &y);
                        let kernel = window::Forward {
                            problem,
                            how,
                            fft,
                            geometry,
                            spectrum,
                            sequence,
                            block,
                            y,
                            window,
                        };
                        E::Real::dispatch_on(self.isa, kernel);
                    };
                    if let Some(kept) = kept {
                        self.tasks().par_iter().for_each(|&(sequence, block)| {
                            lend(size, |[window]| convolve(sequence, block, kept.block(block), window));
                        });
                    } else {
                        HeldTaps::new(args)?.with(|taps| {
                            let filter = self.filter(&fft, taps);
                            (0..self.blocks()).into_par_iter().for_each(|block| {
                                lend(size, |[spectrum, window]| {
                                    filter.transform(block, spectrum);
                                    let sequences = 0..self.sequences.len();
                                    sequences
                                        .for_each(|sequence| convolve(sequence, block, spectrum, window));
                                });
                            });
                        })?;
                    }
                }
            }
        }
        // SAFETY: padding was zeroed; every other token lies in a sequence, whose tasks wrote all of its channels.
        unsafe { y.set_len(elements) };
        Ok(y)
    }

    /// All sequences and blocks; a row's blocks one after another: neighbours read the same lines.
    fn tasks(&self) -> Vec<(usize, usize)> {
        let blocks = self.blocks();
        (0..self.sequences.len())
            .flat_map(|sequence| (0..blocks).map(move |block| (sequence, block)))
            .collect()
    }
}

/// The transform of one size, for a type.
pub(super) type Plan<T> = Arc<Fft<T>>;
