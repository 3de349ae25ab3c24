//! How a convolution is computed: by its sizes alone, so that results do not depend on the number of threads.
//!
//! In operations on registers an output: a tap costs one, so `K` taps cost `K`, in blocks of the Toeplitz matrix that
//! registers hold; products of chunks with whole Toeplitz blocks cost up to `2 K` and could only gain where a filter
//! serves many channels or sequences at a time; windows of transforms cost about 44 whatever the filter. So blocks of the
//! Toeplitz matrix end where transforms begin.

use super::Sizes;

/// Filters of up to so many taps (both directions together) are summed tap by tap.
const DIRECT_TAPS: usize = 48;
/// Points of the windows of a filter much shorter than the sequence, at least: 16 lanes of f32 at 128 bytes a point stay
/// in a second cache of 1 MiB, with room for the spectrum.
const WINDOW: usize = 2048;

/// How a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// Blocks of the Toeplitz matrix in registers, tap by tap.
    Direct,
    /// One transform of the whole sequence.
    Fft(Geometry),
    /// Transforms of overlapping windows, of which a part each is output (overlap-save).
    Overlap(Geometry),
}

/// The windows of a convolution by transforms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Points of the complex transform; a window has twice as many real places.
    pub(crate) points: usize,
    /// Tokens of a window before its outputs.
    pub(crate) before: usize,
    /// Outputs of a window.
    pub(crate) step: usize,
    /// Tokens of a window behind its outputs.
    pub(crate) behind: usize,
}

/// The method for sequences of at most `length` tokens.
pub(crate) fn method(sizes: &Sizes, length: usize) -> Method {
    let (taps, reverse) = (sizes.taps.min(length), sizes.reverse.min(length));
    match taps + reverse <= DIRECT_TAPS {
        true => Method::Direct,
        false => match by_transform(sizes, length) {
            window if window.step == length => Method::Fft(window),
            window => Method::Overlap(window),
        },
    }
}

/// The windows of transforms, whatever the method: the backward pass goes by them.
pub(crate) fn by_transform(sizes: &Sizes, length: usize) -> Geometry {
    let (taps, reverse) = (sizes.taps.min(length), sizes.reverse.min(length));
    let longest = taps.max(reverse).max(1);
    let whole = fft_points((length + longest - 1).div_ceil(2).max(length.div_ceil(2)));
    let (before, behind) = (taps - 1, reverse.saturating_sub(1));
    let points = fft_points((4 * (before + behind)).max(WINDOW));
    if whole <= 2 * points {
        return Geometry { points: whole, before: 0, step: length, behind: 0 };
    }
    Geometry { points, before, step: 2 * points - before - behind, behind }
}

/// The cost of a butterfly stage for one point.
const COSTS: [(usize, f64); 4] = [(4, 3.5), (2, 2.2), (3, 3.6), (5, 6.0)];

/// The cheapest size of at least `least` points whose prime factors are 2, 3 and 5.
pub(crate) fn fft_points(least: usize) -> usize {
    let least = least.max(4);
    let cost = |n: usize| n as f64 * radices(n).iter().map(|&r| cost_of(r)).sum::<f64>();
    let mut best = least.next_power_of_two();
    let mut fives = 1;
    while fives < 2 * least {
        let mut odd = fives;
        while odd < 2 * least {
            // at least one stage of radix 4, where the products are taken
            let n = odd * least.div_ceil(odd).next_power_of_two().max(4);
            if cost(n) < cost(best) {
                best = n;
            }
            odd *= 3;
        }
        fives *= 5;
    }
    best
}

fn cost_of(radix: usize) -> f64 {
    COSTS.iter().find(|&&(r, _)| r == radix).map_or(f64::INFINITY, |&(_, cost)| cost)
}

/// The stages of a transform of `points`, a multiple of 4 and 5-smooth: the odd factors first, radix 4 last.
pub(crate) fn radices(points: usize) -> Vec<usize> {
    let (mut rest, mut radices) = (points, vec![]);
    for radix in [5, 3] {
        while rest.is_multiple_of(radix) {
            radices.push(radix);
            rest /= radix;
        }
    }
    if rest.trailing_zeros() % 2 == 1 {
        radices.push(2);
        rest /= 2;
    }
    while rest > 1 {
        radices.push(4);
        rest /= 4;
    }
    radices
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(length: usize, taps: usize, reverse: usize) -> Sizes {
        Sizes { batch: 1, length, channels: 16, groups: 16, taps, reverse }
    }

    #[test]
    fn sizes_are_smooth_sufficient_and_close() {
        for least in (1..3000).chain([99_991, 1 << 20, (1 << 20) + 1]) {
            let n = fft_points(least);
            assert_eq!(radices(n).iter().product::<usize>(), n);
            assert_eq!(radices(n).last(), Some(&4));
            assert!(n >= least && n <= (2 * least).max(4), "{least}: {n}");
        }
        assert_eq!(fft_points(4096), 4096);
        assert!(fft_points(4097) <= 4800);
    }

    #[test]
    fn a_causal_filter_of_the_sequences_length_takes_as_many_points() {
        let window = |points| Geometry { points, before: 0, step: 4096, behind: 0 };
        assert_eq!(method(&sizes(4096, 4096, 0), 4096), Method::Fft(window(4096)));
        assert_eq!(method(&sizes(4096, 1 << 20, 0), 4096), Method::Fft(window(4096)));
        assert_eq!(method(&sizes(4096, 4096, 4096), 4096), Method::Fft(window(4096)));
    }

    #[test]
    fn short_filters_go_tap_by_tap_and_middling_ones_in_windows() {
        assert_eq!(method(&sizes(4096, 7, 0), 4096), Method::Direct);
        assert_eq!(method(&sizes(40, 4096, 0), 40), Method::Direct);
        let Method::Overlap(window) = method(&sizes(1 << 20, 129, 100), 1 << 20) else {
            panic!("no windows")
        };
        assert_eq!((window.points, window.before, window.behind), (WINDOW, 128, 99));
        assert_eq!(window.before + window.step + window.behind, 2 * window.points);
    }
}
