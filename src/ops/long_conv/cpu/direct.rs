//! Short filters: tap by tap, [`OUTPUTS`] outputs in registers.
//!
//! A tap of an output is one multiply-add and one load from the first cache, which is what a core does in half a cycle.

use super::filter::Layout;
use super::signal::Track;
use super::{Problem, block};
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, store};

/// Outputs summed at a time.
const OUTPUTS: usize = 8;
/// Tokens of a stretch: its inputs, gated and widened, stay in the first cache.
const STRETCH: usize = 256;

/// One sequence and one block of channels.
pub(super) struct Forward<'a, E: Element> {
    pub(super) problem: &'a Problem<'a, E>,
    pub(super) layout: &'a Layout<E::Real>,
    pub(super) sequence: usize,
    pub(super) block: usize,
    pub(super) y: &'a Outlet<'a, E>,
}

impl<E: Element> Kernel<E::Real> for Forward<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<E::Real>>(self, s: S) {
        let p = self.problem;
        let sequence = &p.sequences[self.sequence];
        let channels = block(self.block, S::LANES, p.sizes.channels);
        let input = p.input.track(sequence.row, &channels);
        let post_gate = p.post_gate.as_ref().map(|gate| Track::new(gate, sequence.row, &channels));
        let (taps, lags) = (self.layout.block(self.block), self.layout.lags);
        // lags of the past, and of the future
        let (past, future) = (lags - 1 - self.layout.origin, self.layout.origin);
        let mut inputs = vec![E::Real::ZERO; (past + STRETCH + OUTPUTS + future) * S::LANES];
        for start in (0..sequence.len()).step_by(STRETCH) {
            let end = sequence.len().min(start + STRETCH);
            // the input at `position` lies at `position + past - start`
            for (i, to) in inputs.chunks_exact_mut(S::LANES).enumerate() {
                let position = (start + i).checked_sub(past).filter(|&position| position < sequence.len());
                let value = match position {
                    Some(position) => input.load(s, sequence.token(position)),
                    None => s.splat(E::Real::ZERO),
                };
                // SAFETY: the chunk is one register.
                unsafe { s.store(to.as_mut_ptr(), value) };
            }
            for first in (start..end).step_by(OUTPUTS) {
                let sums = outputs(s, taps, &inputs[(first - start) * S::LANES..], lags);
                for (position, mut y) in (first..end).zip(sums) {
                    let token = sequence.token(position);
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
}

/// `sum_lag taps[lag] inputs[i + lags - 1 - lag]` for `i` of `0..OUTPUTS`.
#[inline(always)]
pub(super) fn outputs<T: Real, S: Simd<T>>(s: S, taps: &[T], inputs: &[T], lags: usize) -> [S::V; OUTPUTS] {
    assert!(taps.len() >= lags * S::LANES && inputs.len() >= (lags + OUTPUTS - 1) * S::LANES);
    let mut sums = [s.splat(T::ZERO); OUTPUTS];
    for lag in 0..lags {
        // SAFETY: checked above.
        unsafe {
            let tap = s.load(taps.as_ptr().add(lag * S::LANES));
            let from = inputs.as_ptr().add((lags - 1 - lag) * S::LANES);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = s.fma(tap, s.load(from.add(i * S::LANES)), *sum);
            }
        }
    }
    sums
}
