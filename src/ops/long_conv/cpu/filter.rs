//! Filters as the kernels want them: taps by lag, lanes over channels, and their transforms.

use super::fft::{Complex, Fft, Leaf};
use super::{block, lanes};
use crate::Result;
use crate::backend::cpu::simd::{Element, Isa, Real, Simd};
use crate::backend::cpu::view::{Held, Outlet, Rows, with_unit_stride};
use crate::ops::long_conv::{LongConv, Sizes};
use candle_core::Tensor;
use rayon::prelude::*;

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
    fn each(
        &self,
        sizes: &Sizes,
        channels: std::ops::Range<usize>,
        count: usize,
        mut put: impl FnMut(usize, &[T]),
    ) {
        let width = sizes.channels / sizes.groups;
        let mut lanes = [T::ZERO; crate::backend::cpu::simd::MAX_LANES];
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

/// The transform of the filters, `[blocks, N, 2, LANES]`, divided by `N`; the skip weight is part of it.
pub(in super::super) struct Spectrum<T> {
    size: usize,
    values: Vec<T>,
}

impl<T: Real> Spectrum<T> {
    /// For sequences of at most `longest` tokens.
    pub(in super::super) fn new(
        isa: Isa,
        fft: &Fft<T>,
        taps: &Taps<'_, T>,
        sizes: &Sizes,
        longest: usize,
    ) -> Self {
        let lanes = lanes::<T>(isa);
        let size = fft.points() * 2 * lanes;
        let blocks = sizes.channels.div_ceil(lanes);
        let mut values: Vec<T> = Vec::new();
        {
            let outlet = Outlet::fresh(&mut values, blocks * size);
            (0..blocks).into_par_iter().for_each(|index| {
                let to = outlet.at(index * size, size);
                // SAFETY: at() checked the place, which is this block's own; zero bits are a zero of every real type.
                let values = unsafe {
                    to.write_bytes(0, size);
                    std::slice::from_raw_parts_mut(to, size)
                };
                let channels = block(index, lanes, sizes.channels);
                place_filter(fft.points(), lanes, taps, sizes, channels, longest, values);
                fft.walk(isa, values, Forwards);
            });
        }
        // SAFETY: every block was zeroed.
        unsafe { values.set_len(blocks * size) };
        Self { size, values }
    }

    /// The transform of one block.
    pub(in super::super) fn block(&self, index: usize) -> &[T] {
        &self.values[index * self.size..][..self.size]
    }
}

/// The filters of a block of channels in the places of their lags, modulo `X^(2N) + 1`, divided by `N`.
fn place_filter<T: Real>(
    points: usize,
    lanes: usize,
    taps: &Taps<'_, T>,
    sizes: &Sizes,
    channels: std::ops::Range<usize>,
    longest: usize,
    values: &mut [T],
) {
    let scale = T::ONE / T::from_f64(points as f64);
    let mut add = |place: usize, taps: &[T], scale: T| {
        let at = (place % points * 2 + place / points) * lanes;
        values[at..at + taps.len()].iter_mut().zip(taps).for_each(|(v, &tap)| *v += scale * tap);
    };
    taps.past.each(sizes, channels.clone(), sizes.taps.min(longest), |lag, taps| add(lag, taps, scale));
    if let Some(reverse) = &taps.future {
        // X^-lag = -X^(2N - lag)
        reverse.each(sizes, channels.clone(), sizes.reverse.min(longest), |lag, taps| match lag {
            0 => add(0, taps, scale),
            _ => add(2 * points - lag, taps, -scale),
        });
    }
    if let Some(d) = taps.d {
        add(0, &d[channels], scale);
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
