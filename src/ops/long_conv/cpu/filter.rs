//! Filters as the kernels want them: taps by lag, lanes over channels, and their transforms.

use super::fft::{Complex, Fft, How, Leaf};
use super::window::AHEAD;
use super::{block, lanes};
use crate::Result;
use crate::backend::cpu::memory;
use crate::backend::cpu::simd::{Element, Isa, Kernel, MAX_LANES, Real, Simd};
use crate::backend::cpu::view::{Held, Rows, load, with_unit_stride};
use crate::ops::long_conv::{LongConv, Sizes};
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;

/// The filters of a call, held for reading.
pub(in super::super) struct HeldTaps {
    past: (Tensor, bool),
    future: Option<(Tensor, bool)>,
    d: Option<Tensor>,
}

/// The taps of all groups in one direction.
#[derive(Clone, Copy)]
pub(in super::super) struct Direction<'a, T: Element> {
    rows: Rows<'a, T>,
    /// Whether rows are taps of all groups, not groups of all taps.
    by_tap: bool,
}

/// Filters and skip weight.
pub(in super::super) struct Taps<'a, T: Element> {
    pub(in super::super) past: Direction<'a, T>,
    pub(in super::super) future: Option<Direction<'a, T>>,
    pub(in super::super) d: Option<&'a [T]>,
}

/// A filter whose rows are contiguous either way, without a copy where that can be.
fn laid_out(filter: &Tensor, taps_first: bool) -> Result<(Tensor, bool)> {
    if taps_first {
        return Ok((with_unit_stride(filter)?, true));
    }
    let by_tap = filter.stride()[0] == 1 && filter.dim(0)? > 1;
    let filter = if by_tap { filter.t()? } else { with_unit_stride(filter)? };
    Ok((filter, by_tap))
}

impl HeldTaps {
    /// The filters of `args`, in the arithmetic's type.
    pub(in super::super) fn new(args: &LongConv) -> Result<Self> {
        Ok(Self {
            past: laid_out(args.filter, args.taps_first)?,
            future: args.reverse.map(|filter| laid_out(filter, args.taps_first)).transpose()?,
            d: args.d.map(|d| d.contiguous()).transpose()?,
        })
    }

    /// What `f` makes of them.
    pub(in super::super) fn with<T: Real, R>(&self, f: impl FnOnce(&Taps<'_, T>) -> R) -> Result<R> {
        let (past, d) = (Held::new(&self.past.0), self.d.as_ref().map(Held::new));
        let future = self.future.as_ref().map(|(filter, by_tap)| (Held::new(filter), by_tap));
        let taps = Taps {
            past: Direction { rows: past.rows()?, by_tap: self.past.1 },
            future: match &future {
                Some((filter, by_tap)) => Some(Direction { rows: filter.rows()?, by_tap: **by_tap }),
                None => None,
            },
            d: d.as_ref().map(|d| d.rows::<T>()).transpose()?.map(|rows| rows.row([])),
        };
        Ok(f(&taps))
    }
}

impl<T: Real> Direction<'_, T> {
    /// The number of rows, and the row of each number: what a fingerprint reads.
    pub(in super::super) fn rows(&self) -> impl Iterator<Item = &[T]> {
        (0..self.rows.count()).map(|index| self.rows.nth(index))
    }

    /// The first `count` taps of the block's channels, each given to `put` with its lag: a register's worth.
    fn each(&self, sizes: &Sizes, channels: Range<usize>, count: usize, mut put: impl FnMut(usize, &[T])) {
        let width = sizes.channels / sizes.groups;
        let mut lanes = [T::ZERO; MAX_LANES];
        let lanes = &mut lanes[..channels.len()];
        if self.by_tap {
            for lag in 0..count {
                let row = self.rows.row([lag]);
                if width == 1 {
                    put(lag, &row[channels.clone()]);
                } else {
                    lanes.iter_mut().zip(channels.clone()).for_each(|(lane, c)| *lane = row[c / width]);
                    put(lag, lanes);
                }
            }
            return;
        }
        let rows: Vec<&[T]> = channels.map(|c| self.rows.row([c / width])).collect();
        for lag in 0..count {
            lanes.iter_mut().zip(&rows).for_each(|(lane, row)| *lane = row[lag]);
            put(lag, lanes);
        }
    }
}

/// Taps by lag, `[blocks, lags, LANES]`: from the last of the future to the last of the past. The skip weight is part of
/// lag 0.
pub(in super::super) struct Layout<T> {
    /// The place of lag 0.
    pub(in super::super) origin: usize,
    /// Lags of a block.
    pub(in super::super) lags: usize,
    lanes: usize,
    values: Vec<T>,
}

impl<T: Real> Layout<T> {
    /// The taps that sequences of `longest` tokens meet.
    pub(in super::super) fn new(isa: Isa, taps: &Taps<'_, T>, sizes: &Sizes, longest: usize) -> Self {
        let lanes = lanes::<T>(isa);
        let (past, future) = (sizes.taps.min(longest), sizes.reverse.min(longest));
        let origin = future.saturating_sub(1);
        let lags = origin + past;
        let blocks = sizes.channels.div_ceil(lanes);
        let mut values = vec![T::ZERO; blocks * lags * lanes];
        let fill = |(index, values): (usize, &mut [T])| {
            let channels = block(index, lanes, sizes.channels);
            let mut add = |place: usize, taps: &[T]| {
                values[place * lanes..][..taps.len()].iter_mut().zip(taps).for_each(|(v, &tap)| *v += tap);
            };
            taps.past.each(sizes, channels.clone(), past, |lag, taps| add(origin + lag, taps));
            if let Some(reverse) = &taps.future {
                reverse.each(sizes, channels.clone(), future, |lag, taps| add(origin - lag, taps));
            }
            if let Some(d) = taps.d {
                add(origin, &d[channels]);
            }
        };
        values.par_chunks_mut((lags * lanes).max(1)).enumerate().for_each(fill);
        Self { origin, lags, lanes, values }
    }

    /// The taps of one block, `[lags, LANES]`.
    pub(in super::super) fn block(&self, index: usize) -> &[T] {
        let size = self.lags * self.lanes;
        &self.values[index * size..][..size]
    }
}

/// What the transforms of filters are made of.
#[derive(Clone, Copy)]
pub(in super::super) struct Filter<'a, T: Real> {
    pub(in super::super) how: How,
    pub(in super::super) fft: &'a Fft<T>,
    pub(in super::super) taps: &'a Taps<'a, T>,
    pub(in super::super) sizes: &'a Sizes,
    /// The most tokens of a sequence.
    pub(in super::super) longest: usize,
}

impl<T: Real> Filter<'_, T> {
    /// Numbers of a block's transform.
    pub(in super::super) fn size(&self) -> usize {
        self.fft.points() * 2 * lanes::<T>(self.how.isa)
    }

    /// The transform of one block, `[N, 2, LANES]`, divided by `N`; the skip weight is part of it.
    pub(in super::super) fn transform(&self, index: usize, to: &mut [T]) {
        assert_eq!(to.len(), self.size());
        let Self { how, fft, taps, sizes, longest } = *self;
        let channels = block(index, lanes::<T>(how.isa), sizes.channels);
        T::dispatch_on(
            how.isa,
            Place { points: fft.points(), taps, sizes, channels, longest, to: to.as_mut_ptr() },
        );
        fft.walk(how, to, Forwards);
    }
}

/// The transforms of all blocks, one behind another.
pub(in super::super) struct Spectrum<T> {
    size: usize,
    values: Vec<T>,
}

impl<T: Real> Spectrum<T> {
    pub(in super::super) fn new(filter: &Filter<T>) -> Self {
        let size = filter.size();
        let blocks = filter.sizes.channels.div_ceil(lanes::<T>(filter.how.isa));
        let mut values: Vec<T> = memory::with_capacity(blocks * size);
        values.resize(blocks * size, T::ZERO);
        values.par_chunks_mut(size).enumerate().for_each(|(index, to)| filter.transform(index, to));
        Self { size, values }
    }

    /// Points of a transform of so many lanes.
    pub(in super::super) fn points(&self, lanes: usize) -> usize {
        self.size / (2 * lanes)
    }

    /// The transform of one block.
    pub(in super::super) fn block(&self, index: usize) -> &[T] {
        &self.values[index * self.size..][..self.size]
    }
}

/// The filters of a block of channels in the places of their lags, modulo `X^(2N) + 1`, divided by `N`.
struct Place<'a, T: Real> {
    points: usize,
    taps: &'a Taps<'a, T>,
    sizes: &'a Sizes,
    channels: Range<usize>,
    longest: usize,
    /// Room for `[points, 2, LANES]`.
    to: *mut T,
}

impl<T: Real> Kernel<T> for Place<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let Self { points, taps, sizes, channels, longest, to } = self;
        let (count, behind) = (sizes.taps.min(longest), sizes.reverse.min(longest));
        let past = taps.past.of(sizes, channels.clone());
        let future = taps.future.as_ref().map(|future| future.of(sizes, channels.clone()));
        let scale = T::ONE / T::from_f64(points as f64);
        let (scale, negative) = (s.splat(scale), s.splat(-scale));
        let each = Tap { past, future, points, count, behind, scale, negative };
        for place in 0..points {
            let mut both = Complex { re: each.at(s, place), im: each.at(s, place + points) };
            if place == 0 {
                // lag 0 of both directions, and the skip weight
                if let Some(future) = &each.future {
                    both.re = s.fma(scale, future.load(s, 0), both.re);
                }
                if let Some(d) = taps.d {
                    both.re = s.fma(scale, load(s, d, channels.start, channels.len()), both.re);
                }
            }
            // SAFETY: there is room for so many points, of two registers each.
            unsafe { both.store(s, to.add(place * 2 * S::LANES)) };
        }
    }
}

/// What lies at each place modulo `X^(2N) + 1`.
struct Tap<'a, T: Element, V> {
    past: OfBlock<'a, T>,
    future: Option<OfBlock<'a, T>>,
    points: usize,
    count: usize,
    behind: usize,
    scale: V,
    negative: V,
}

impl<T: Real, V: Copy> Tap<'_, T, V> {
    /// The lags of the past from 0 up; those of the future from 2N down, for `X^-lag = -X^(2N - lag)`.
    #[inline(always)]
    fn at<S: Simd<T, V = V>>(&self, s: S, place: usize) -> V {
        if place < self.count {
            if place + AHEAD < self.count {
                self.past.prefetch(s, place + AHEAD);
            }
            return s.mul(self.scale, self.past.load(s, place));
        }
        match (&self.future, 2 * self.points - place) {
            (Some(future), lag) if lag < self.behind => s.mul(self.negative, future.load(s, lag)),
            _ => s.splat(T::ZERO),
        }
    }
}

/// The taps of one block of channels in one direction.
struct OfBlock<'a, T: Element> {
    by_tap: Option<Rows<'a, T>>,
    /// The channels' rows, else.
    rows: [&'a [T]; MAX_LANES],
    channels: Range<usize>,
    /// Channels of a group.
    width: usize,
}

impl<'a, T: Real> Direction<'a, T> {
    fn of(&self, sizes: &Sizes, channels: Range<usize>) -> OfBlock<'a, T> {
        let width = sizes.channels / sizes.groups;
        let mut rows: [&[T]; MAX_LANES] = [&[]; MAX_LANES];
        if !self.by_tap {
            rows.iter_mut().zip(channels.clone()).for_each(|(row, c)| *row = self.rows.row([c / width]));
        }
        OfBlock { by_tap: self.by_tap.then_some(self.rows), rows, channels, width }
    }
}

impl<T: Real> OfBlock<'_, T> {
    /// Asks for the memory of one lag, where lags lie apart.
    #[inline(always)]
    fn prefetch<S: Simd<T>>(&self, s: S, lag: usize) {
        if let (Some(rows), 1) = (&self.by_tap, self.width) {
            s.prefetch(rows.row([lag])[self.channels.start..].as_ptr());
        }
    }

    /// The taps of one lag.
    #[inline(always)]
    fn load<S: Simd<T>>(&self, s: S, lag: usize) -> S::V {
        let (start, count) = (self.channels.start, self.channels.len());
        let mut lanes = [T::ZERO; MAX_LANES];
        match &self.by_tap {
            Some(rows) if self.width == 1 => return load(s, rows.row([lag]), start, count),
            Some(rows) => {
                let row = rows.row([lag]);
                lanes.iter_mut().zip(self.channels.clone()).for_each(|(lane, c)| *lane = row[c / self.width]);
            }
            None => lanes.iter_mut().zip(&self.rows[..count]).for_each(|(lane, row)| *lane = row[lag]),
        }
        // SAFETY: LANES <= MAX_LANES.
        unsafe { s.load(lanes.as_ptr()) }
    }
}

/// Forward alone.
pub(in super::super) struct Forwards;

impl<T: Real> Leaf<T> for Forwards {
    const BACKWARD: bool = false;
    #[inline(always)]
    unsafe fn at<S: Simd<T>>(&self, _: S, _: usize, value: Complex<S::V>) -> Complex<S::V> {
        value
    }
}

/// Backward alone.
pub(in super::super) struct Backwards;

impl<T: Real> Leaf<T> for Backwards {
    const FORWARD: bool = false;
    #[inline(always)]
    unsafe fn at<S: Simd<T>>(&self, _: S, _: usize, value: Complex<S::V>) -> Complex<S::V> {
        value
    }
}
