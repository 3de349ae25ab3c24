//! One block of channels of one sequence, token by token.

use crate::Result;
use crate::backend::cpu::simd::{Element, Isa, Kernel, MAX_LANES, Real, Simd};
use crate::backend::cpu::view::{Outlet, load, store};
use crate::ops::Segments;
use crate::ops::long_conv::Sizes;
use crate::ops::long_conv::cpu::fft::{Complex, Fft, How};
use crate::ops::long_conv::cpu::filter::{Forwards, HeldTaps, Layout};
use crate::ops::long_conv::cpu::window::{Times, at};
use crate::ops::long_conv::cpu::{block, cache, lanes};
use crate::ops::long_conv::plan::fft_points;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::OnceLock;

/// Tiles and blocks below this go tap by tap.
const SMALL: usize = 32;
/// The shortest horizon.
const HORIZON: usize = 64;
/// The number of numbers to compute below which one thread does it.
const SERIAL: usize = 1 << 14;

/// The taps of a causal filter and their transforms for tiles of every size.
pub(super) struct StreamFilter<T> {
    isa: Isa,
    lanes: usize,
    sizes: Sizes,
    layout: Layout<T>,
    /// By the logarithm of the tile: taps `0..2 U`, `U` points.
    tiles: [Levels<T>; 2],
}

type Levels<T> = Vec<OnceLock<Vec<T>>>;

impl<T> std::fmt::Debug for StreamFilter<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamFilter").field("sizes", &self.sizes).finish()
    }
}

/// What one block of channels of one sequence has behind it.
#[derive(Clone, Debug, Default)]
pub(super) struct Lane<T> {
    /// The last inputs, up to as many as taps meet: `[.., LANES]`.
    pub(super) past: Vec<T>,
    /// Tokens since the origin.
    since: usize,
    /// Sums of the outputs of the horizon, as far as they are known: `[.., LANES]`.
    pending: Vec<T>,
}

impl<T: Real> StreamFilter<T> {
    pub(super) fn new(isa: Isa, taps: &HeldTaps, sizes: Sizes) -> Result<Self> {
        let layout = taps.with(|taps| Layout::new(isa, taps, &sizes, sizes.taps))?;
        let levels = || (0..usize::BITS).map(|_| OnceLock::new()).collect();
        Ok(Self { isa, lanes: lanes::<T>(isa), sizes, layout, tiles: [levels(), levels()] })
    }

    /// Blocks of channels.
    pub(super) fn blocks(&self) -> usize {
        self.sizes.channels.div_ceil(self.lanes)
    }

    /// Lanes of a block.
    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }

    /// Feeds `v` `[B, L, D]` to `rows`, a list of blocks each, and writes the outputs to `y` where it is given.
    pub(super) fn feed(
        &self,
        rows: &mut [Vec<Lane<T>>],
        v: &[T],
        channels: usize,
        segments: &Segments,
        y: Option<&mut Vec<T>>,
    ) {
        let length = segments.length();
        let y = y.map(|y| Outlet::new(y));
        let tile = |lane: &Lane<T>| lane.tile(length);
        let work: usize = rows.iter().flatten().map(|lane| (length + tile(lane)) * self.lanes).sum();
        let feed = |(index, lane): (usize, &mut Lane<T>)| {
            let (row, block) = (index / self.blocks(), index % self.blocks());
            let kernel = Feed { filter: self, lane, row, block, v, channels, segments, y: y.as_ref() };
            T::dispatch_on(self.isa, kernel);
        };
        let mut all: Vec<&mut Lane<T>> = rows.iter_mut().flatten().collect();
        if work < SERIAL {
            all.into_iter().enumerate().for_each(feed);
        } else {
            all.par_iter_mut().enumerate().for_each(|(index, lane)| feed((index, lane)));
        }
    }

    /// The transform of the first `taps` taps of a block in `fft.points()`, divided by their number.
    fn transform(&self, fft: &Fft<T>, block: usize, taps: usize) -> Vec<T> {
        let (lanes, points) = (self.lanes, fft.points());
        let scale = T::ONE / T::from_f64(points as f64);
        let mut values = vec![T::ZERO; points * 2 * lanes];
        for (lag, tap) in self.layout.block(block).chunks_exact(lanes).take(taps).enumerate() {
            let to = &mut values[(lag % points * 2 + lag / points) * lanes..][..lanes];
            to.iter_mut().zip(tap).for_each(|(to, &tap)| *to = scale * tap);
        }
        fft.walk(How { isa: self.isa, spread: false }, &mut values, Forwards);
        values
    }

    /// The transform for tiles (`far`) or blocks of `size`, kept.
    fn kept(&self, size: usize, block: usize, far: bool) -> &[T] {
        let fft = cache::plan::<T>(size);
        let taps = if far { 2 * size } else { size };
        let make =
            || (0..self.blocks()).into_par_iter().flat_map_iter(|b| self.transform(&fft, b, taps)).collect();
        let all = self.tiles[usize::from(far)][size.ilog2() as usize].get_or_init(make);
        let width = size * 2 * self.lanes;
        &all[block * width..][..width]
    }
}

impl<T> Lane<T> {
    /// From the inputs before.
    pub(super) fn after(past: Vec<T>) -> Self {
        Self { past, since: 0, pending: vec![] }
    }

    /// How many numbers it holds.
    pub(super) fn len(&self) -> usize {
        self.past.len() + self.pending.len()
    }

    /// The largest tile that `count` more tokens complete.
    fn tile(&self, count: usize) -> usize {
        let (before, after) = (self.since, self.since + count);
        1 << (before ^ after).checked_ilog2().unwrap_or(0)
    }
}

/// The tokens of a row that go to one lane.
struct Feed<'a, 'l, T: Element> {
    filter: &'a StreamFilter<T>,
    lane: &'l mut Lane<T>,
    row: usize,
    block: usize,
    v: &'a [T],
    channels: usize,
    segments: &'a Segments,
    y: Option<&'a Outlet<'a, T>>,
}

impl<T: Real> Kernel<T> for Feed<'_, '_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(mut self, s: S) {
        for run in self.segments.row(self.row) {
            if run.fresh {
                *self.lane = Lane::after(vec![]);
            }
            match self.y {
                None => {
                    run.tokens.clone().for_each(|token| self.push(s, token));
                    self.close();
                }
                Some(_) => self.tokens(s, run.tokens.clone()),
            }
        }
    }
}

impl<T: Real> Feed<'_, '_, T> {
    fn channels(&self) -> Range<usize> {
        block(self.block, self.filter.lanes, self.channels)
    }

    fn taps(&self) -> &[T] {
        self.filter.layout.block(self.block)
    }

    /// Inputs that are kept.
    fn past(&self) -> usize {
        self.lane.past.len() / self.filter.lanes
    }

    #[inline(always)]
    fn input<S: Simd<T>>(&self, s: S, token: usize) -> S::V {
        let channels = self.channels();
        let start = (self.row * self.segments.length() + token) * self.channels;
        load(s, &self.v[start..start + self.channels], channels.start, channels.len())
    }

    #[inline(always)]
    fn push<S: Simd<T>>(&mut self, s: S, token: usize) {
        let mut lanes = [T::ZERO; MAX_LANES];
        // SAFETY: LANES <= MAX_LANES.
        unsafe { s.store(lanes.as_mut_ptr(), self.input(s, token)) };
        self.lane.past.extend_from_slice(&lanes[..S::LANES]);
    }

    #[inline(always)]
    fn output<S: Simd<T>>(&self, s: S, token: usize, value: S::V) {
        let channels = self.channels();
        if let Some(y) = self.y {
            let start = (self.row * self.segments.length() + token) * self.channels + channels.start;
            // SAFETY: at() checks the place; no other lane has this row and these channels.
            unsafe { store(s, y.at(start, channels.len()), channels.len(), value) };
        }
    }

    /// Moves the origin behind the last input, and forgets inputs that no tap will meet.
    fn close(&mut self) {
        let keep = self.filter.sizes.taps - 1;
        let excess = self.past().saturating_sub(keep);
        self.lane.past.drain(..excess * self.filter.lanes);
        self.lane.pending.clear();
        self.lane.since = 0;
    }

    /// Opens a horizon: what the past contributes to its outputs.
    #[inline(always)]
    fn open<S: Simd<T>>(&mut self, s: S) {
        self.close();
        let past = self.past();
        let horizon = past.next_power_of_two().max(HORIZON);
        self.lane.pending.resize(horizon * S::LANES, T::ZERO);
        if past == 0 {
            return;
        }
        let fft = cache::plan::<T>(fft_points((past + horizon).div_ceil(2)));
        let spectrum = self.filter.transform(&fft, self.block, past + horizon);
        let window = self.convolve(s, &fft, &spectrum, 0..past, None);
        for place in 0..horizon {
            put_register(s, &mut self.lane.pending, place, at(s, &window, past + place));
        }
    }

    /// The convolution of kept inputs, then of tokens to come, with a spectrum.
    #[inline(always)]
    fn convolve<S: Simd<T>>(
        &self,
        s: S,
        fft: &Fft<T>,
        spectrum: &[T],
        kept: Range<usize>,
        tokens: Option<Range<usize>>,
    ) -> Vec<T> {
        let tokens = tokens.unwrap_or(0..0);
        let count = kept.len() + tokens.len();
        let value = |place: usize| match place.checked_sub(kept.len()) {
            None => load(s, &self.lane.past, (kept.start + place) * S::LANES, S::LANES),
            Some(i) if place < count => self.input(s, tokens.start + i),
            Some(_) => s.splat(T::ZERO),
        };
        let mut window = vec![T::ZERO; fft.points() * 2 * S::LANES];
        for (place, point) in window.chunks_exact_mut(2 * S::LANES).enumerate() {
            let both = Complex { re: value(place), im: value(place + fft.points()) };
            // SAFETY: a point is two registers.
            unsafe { both.store(s, point.as_mut_ptr()) };
        }
        assert_eq!(spectrum.len(), window.len());
        fft.walk(How { isa: self.filter.isa, spread: false }, &mut window, Times::<_, false>(spectrum));
        window
    }

    /// Tokens of one sequence, any number.
    #[inline(always)]
    fn tokens<S: Simd<T>>(&mut self, s: S, mut tokens: Range<usize>) {
        while !tokens.is_empty() {
            let past = self.past();
            if tokens.len() >= HORIZON && 2 * tokens.len() >= past.min(self.filter.sizes.taps) {
                return self.all(s, tokens);
            }
            let mut horizon = self.lane.pending.len() / S::LANES;
            if self.lane.since == horizon {
                self.open(s);
                horizon = self.lane.pending.len() / S::LANES;
            }
            let since = self.lane.since;
            let room = tokens.len().min(horizon - since);
            let aligned = if since == 0 { room } else { room.min(1 << since.trailing_zeros()) };
            let count = 1 << aligned.ilog2();
            let now = tokens.start..tokens.start + if count < SMALL { 1 } else { count };
            tokens.start = now.end;
            self.aligned(s, now, horizon);
        }
    }

    /// Tokens no fewer than came before: one convolution of everything.
    #[inline(always)]
    fn all<S: Simd<T>>(&mut self, s: S, tokens: Range<usize>) {
        self.close();
        let (past, count) = (self.past(), tokens.len());
        let taps = self.filter.sizes.taps.min(past + count);
        let fft = cache::plan::<T>(fft_points((past + count).max(count + taps).div_ceil(2)));
        let spectrum = self.filter.transform(&fft, self.block, taps);
        let window = self.convolve(s, &fft, &spectrum, 0..past, Some(tokens.clone()));
        for (i, token) in tokens.enumerate() {
            self.output(s, token, at(s, &window, past + i));
            self.push(s, token);
        }
        self.close();
    }

    /// A power of two of tokens that divides their place; then the tile that they complete.
    #[inline(always)]
    fn aligned<S: Simd<T>>(&mut self, s: S, tokens: Range<usize>, horizon: usize) {
        let (since, count) = (self.lane.since, tokens.len());
        if count == 1 {
            let own = s.mul(self.input(s, tokens.start), load(s, self.taps(), 0, S::LANES));
            let y = s.add(own, load(s, &self.lane.pending, since * S::LANES, S::LANES));
            self.output(s, tokens.start, y);
            self.push(s, tokens.start);
        } else {
            let fft = cache::plan::<T>(count);
            let spectrum = self.filter.kept(count, self.block, false);
            let window = self.convolve(s, &fft, spectrum, 0..0, Some(tokens.clone()));
            for (i, token) in tokens.enumerate() {
                let pending = load(s, &self.lane.pending, (since + i) * S::LANES, S::LANES);
                self.output(s, token, s.add(pending, at(s, &window, i)));
                self.push(s, token);
            }
        }
        self.lane.since += count;
        if self.lane.since < horizon {
            self.tile(s, 1 << self.lane.since.trailing_zeros());
        }
    }

    /// The last `size` inputs to the next `size` outputs.
    #[inline(always)]
    fn tile<S: Simd<T>>(&mut self, s: S, size: usize) {
        let (past, since) = (self.past(), self.lane.since);
        let inputs = past - size..past;
        if size < SMALL {
            let taps = self.filter.layout.block(self.block);
            let count = taps.len() / S::LANES;
            for output in 0..size {
                let mut sum = load(s, &self.lane.pending, (since + output) * S::LANES, S::LANES);
                for (i, input) in inputs.clone().enumerate() {
                    let lag = size + output - i;
                    if lag < count {
                        let tap = load(s, taps, lag * S::LANES, S::LANES);
                        sum = s.fma(tap, load(s, &self.lane.past, input * S::LANES, S::LANES), sum);
                    }
                }
                put_register(s, &mut self.lane.pending, since + output, sum);
            }
            return;
        }
        let fft = cache::plan::<T>(size);
        let spectrum = self.filter.kept(size, self.block, true);
        let window = self.convolve(s, &fft, spectrum, inputs, None);
        for output in 0..size {
            let pending = load(s, &self.lane.pending, (since + output) * S::LANES, S::LANES);
            let sum = s.add(pending, at(s, &window, size + output));
            put_register(s, &mut self.lane.pending, since + output, sum);
        }
    }
}

/// `values[place]`, registers counted.
#[inline(always)]
fn put_register<T: Real, S: Simd<T>>(s: S, values: &mut [T], place: usize, value: S::V) {
    crate::backend::cpu::view::put(s, values, place * S::LANES, S::LANES, value);
}
