//! Few tokens, one by one: the recurrence itself, channel by channel, parameters and states read as they lie.

use super::super::Sizes;
use super::tables::Parameters;
use crate::backend::cpu::simd::Element;
use crate::backend::cpu::view::Rows;
use crate::ops::Segments;

/// Output `[B, L, D]` and final state `[B, D, C]`.
pub(in super::super) fn step<E: Element>(
    u: Rows<E>,
    parameters: &Parameters,
    sizes: &Sizes,
    initial: Option<Vec<f64>>,
    segments: Option<&Segments>,
) -> (Vec<E>, Vec<E::Real>) {
    use candle_core::WithDType;
    let Sizes { batch, length, channels, .. } = *sizes;
    let components = sizes.components();
    let segments = Segments::or_whole(segments, batch, length);
    let mut state = initial.unwrap_or_else(|| vec![0.0; batch * channels * components]);
    let mut y = vec![E::narrow(E::Real::from_f64(0.0)); batch * length * channels];
    for row in 0..batch {
        let state = &mut state[row * channels * components..(row + 1) * channels * components];
        for run in segments.row(row) {
            if run.fresh {
                state.fill(0.0);
            }
            for t in run.tokens.clone() {
                let u = u.row([row, t]);
                let y = &mut y[(row * length + t) * channels..][..channels];
                let poles = parameters.poles.chunks_exact(components);
                let residues = parameters.residues.chunks_exact(components);
                let parameters_of = poles.zip(residues).zip(state.chunks_exact_mut(components));
                for (channel, ((p, r), h)) in parameters_of.enumerate() {
                    let x = u[channel].widen().to_f64();
                    let skip = parameters.d.as_ref().map_or(0.0, |d| d[channel]);
                    let sum = if sizes.complex { complex(p, r, h, x) } else { real(p, r, h, x) };
                    y[channel] = E::narrow(E::Real::from_f64(sum + skip * x));
                }
            }
        }
    }
    (y, state.into_iter().map(E::Real::from_f64).collect())
}

#[inline(always)]
fn complex(p: &[f64], r: &[f64], h: &mut [f64], x: f64) -> f64 {
    let mut sum = 0.0;
    for ((p, r), h) in p.chunks_exact(2).zip(r.chunks_exact(2)).zip(h.chunks_exact_mut(2)) {
        let re = p[0] * h[0] - p[1] * h[1] + x;
        h[1] = p[0] * h[1] + p[1] * h[0];
        h[0] = re;
        sum += r[0] * re - r[1] * h[1];
    }
    sum
}

#[inline(always)]
fn real(p: &[f64], r: &[f64], h: &mut [f64], x: f64) -> f64 {
    let mut sum = 0.0;
    for ((p, r), h) in p.iter().zip(r).zip(h) {
        *h = p * *h + x;
        sum += r * *h;
    }
    sum
}
