//! The CPU path: lanes are channels.
//!
//! [`tables`] makes the powers, [`forward`] scans, [`backward`] goes back, [`step`] takes few tokens one by one.

pub(super) mod backward;
pub(super) mod forward;
pub(super) mod step;
pub(super) mod tables;

use super::plan::CHUNK;
use crate::backend::cpu::simd::{Element, Isa, Kernel, Real, Simd};
use crate::backend::cpu::view::Rows;
use tables::Block;

/// How many `T` a register holds.
pub(super) fn lanes_of<T: Real>() -> usize {
    struct Lanes;
    impl<T: Real> Kernel<T> for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd<T>>(self, _: S) -> usize {
            S::LANES
        }
    }
    T::dispatch_on(Isa::best(), Lanes)
}

/// `[.., D, width]` in blocks of `[width, LANES]`, zero in lanes beyond the channels.
pub(super) fn to_blocks<T: Real>(values: &[f64], channels: usize, width: usize, lanes: usize) -> Vec<T> {
    let mut blocks = vec![];
    for row in values.chunks((channels * width).max(1)) {
        for block in row.chunks(lanes * width) {
            let start = blocks.len();
            blocks.resize(start + lanes * width, T::ZERO);
            for (lane, channel) in block.chunks(width).enumerate() {
                for (i, &x) in channel.iter().enumerate() {
                    blocks[start + i * lanes + lane] = T::from_f64(x);
                }
            }
        }
    }
    blocks
}

/// The inverse of [`to_blocks`].
pub(super) fn from_blocks<T: Real>(blocks: &[f64], channels: usize, width: usize, lanes: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(blocks.len());
    let row = channels.div_ceil(lanes) * lanes * width;
    for row in blocks.chunks(row.max(1)) {
        for channel in 0..channels {
            let block = &row[channel / lanes * lanes * width..][..lanes * width];
            values.extend((0..width).map(|i| T::from_f64(block[i * lanes + channel % lanes])));
        }
    }
    values
}

/// Which way a chunk is gone through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From inputs to outputs, first token first.
    Forward,
    /// From gradients of outputs to those of inputs, last token first: the transposed tables.
    Backward,
}

/// The first `count` tokens of `x` through a chunk: returns the outputs, and moves the state on. Both ways are
///
/// ```text
/// y[i] = sum_(j <= i) k[i - j] x[j] + sum_c out[c, i] state[c]
/// state = power(count) state + sum_j into[c, count - 1 - j] x[j]
/// ```
#[inline(always)]
fn chunk<T: Real, S: Simd<T>>(
    s: S,
    block: &Block<T>,
    way: Way,
    x: &[S::V; CHUNK],
    count: usize,
    state: &mut [f64],
    scratch: &mut [T],
) -> [S::V; CHUNK] {
    let components = state.len() / S::LANES;
    let (out, into) = match way {
        Way::Forward => (block.out, block.into),
        Way::Backward => (block.into, block.out),
    };
    assert!(out.len() == components * CHUNK * S::LANES && into.len() == out.len());
    assert!(block.kernel.len() == CHUNK * S::LANES && scratch.len() == state.len() && count <= CHUNK);
    for (to, &from) in scratch.iter_mut().zip(state.iter()) {
        *to = T::from_f64(from);
    }
    let zero = s.splat(T::ZERO);
    let mut y = [zero; CHUNK];
    // SAFETY (of all loads below): the tables hold CHUNK registers for every component, scratch one; asserted above.
    for c in 0..components {
        // SAFETY: as said above.
        let h = unsafe { s.load(scratch.as_ptr().add(c * S::LANES)) };
        for (i, y) in y.iter_mut().enumerate() {
            // SAFETY: as said above.
            *y = s.fma(unsafe { s.load(out.as_ptr().add((c * CHUNK + i) * S::LANES)) }, h, *y);
        }
    }
    for e in 0..CHUNK {
        // SAFETY: as said above.
        let k = unsafe { s.load(block.kernel.as_ptr().add(e * S::LANES)) };
        for i in e..CHUNK {
            y[i] = s.fma(k, x[i - e], y[i]);
        }
    }
    for c in 0..components {
        let mut sums = [zero; 4];
        let at = |e: usize| (c * CHUNK + e) * S::LANES;
        if count == CHUNK {
            for (j, &x) in x.iter().enumerate() {
                // SAFETY: as said above.
                let weight = unsafe { s.load(into.as_ptr().add(at(CHUNK - 1 - j))) };
                sums[j % 4] = s.fma(weight, x, sums[j % 4]);
            }
        } else {
            for (j, &x) in x[..count].iter().enumerate() {
                // SAFETY: as said above.
                let weight = unsafe { s.load(into.as_ptr().add(at(count - 1 - j))) };
                sums[0] = s.fma(weight, x, sums[0]);
            }
        }
        let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
        // SAFETY: as said above.
        unsafe { s.store(scratch.as_mut_ptr().add(c * S::LANES), sum) };
    }
    advance::<T>(block, way, count, state, scratch, S::LANES);
    y
}

/// `state = power(count) state + local`, in f64.
#[inline(always)]
fn advance<T: Real>(block: &Block<T>, way: Way, count: usize, state: &mut [f64], local: &[T], lanes: usize) {
    let power = &block.powers[count * state.len()..(count + 1) * state.len()];
    if !block.complex {
        for ((h, &p), &l) in state.iter_mut().zip(power).zip(local) {
            *h = p * *h + l.to_f64();
        }
        return;
    }
    let sign = if way == Way::Forward { 1.0 } else { -1.0 };
    let pairs = state.chunks_exact_mut(2 * lanes);
    for ((h, p), l) in pairs.zip(power.chunks_exact(2 * lanes)).zip(local.chunks_exact(2 * lanes)) {
        let (re, im) = h.split_at_mut(lanes);
        let ((pr, pi), (lr, li)) = (p.split_at(lanes), l.split_at(lanes));
        for lane in 0..lanes {
            let (hr, hi, pi) = (re[lane], im[lane], sign * pi[lane]);
            re[lane] = pr[lane] * hr - pi * hi + lr[lane].to_f64();
            im[lane] = pr[lane] * hi + pi * hr + li[lane].to_f64();
        }
    }
}

/// The tokens of a chunk in registers, in the order of `way`; zero beyond `count`.
#[inline(always)]
fn gather<E: Element, S: Simd<E::Real>>(
    s: S,
    rows: &Rows<E>,
    row: usize,
    chunk: &super::plan::Chunk,
    way: Way,
    channels: std::ops::Range<usize>,
) -> [S::V; CHUNK] {
    let mut x = [s.splat(E::Real::ZERO); CHUNK];
    for (i, x) in x.iter_mut().enumerate().take(chunk.count) {
        let t = chunk.start + if way == Way::Forward { i } else { chunk.count - 1 - i };
        let from = &rows.row([row, t])[channels.clone()];
        *x = crate::backend::cpu::view::load(s, from, 0, from.len());
    }
    x
}
