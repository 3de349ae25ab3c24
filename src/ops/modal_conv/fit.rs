//! Modal filters fitted to given ones: what makes a long convolution decode in constant time.
//!
//! For every channel the starting poles are the roots of a linear prediction (Prony's method: least squares on the Hankel
//! matrix of the filter), or spread over decays and angles, whichever ends up nearer; Levenberg and Marquardt's method
//! then refines poles and residues together in f64. Poles stay within the unit circle.
//!
//! Source: Laughing Hyena (Massaroli et al. 2023), section 3, for the problem.

mod least_squares;
mod prony;

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// A modal form of several filters.
#[derive(Clone, Debug)]
pub struct ModalFit {
    /// `[D, S, 2]`, f64 on the CPU.
    pub poles: Tensor,
    /// `[D, S, 2]`, f64 on the CPU.
    pub residues: Tensor,
    /// Per channel the norm of what is left over that of the filter.
    pub errors: Vec<f64>,
}

/// The poles and residues of `states` exponentials whose sum is nearest to each of `filters` `[D, L]` in least squares.
///
/// Costs some 100 `L S^2` operations a channel and start; channels run on all threads, with the same result for any
/// number of them. Not differentiable.
///
/// # Errors
/// Another shape, no states, or a filter that is not finite.
pub fn fit_modal(filters: &Tensor, states: usize) -> Result<ModalFit> {
    let Ok((channels, length)) = filters.dims2() else {
        return Err(Error::shape("fit_modal: filters", "[D, L]", filters.dims()));
    };
    if states == 0 {
        return Err(Error::value("fit_modal: states", "at least 1", states));
    }
    let values = filters.to_dtype(DType::F64)?.to_device(&Device::Cpu)?.to_vec2::<f64>()?;
    if let Some(channel) = values.iter().position(|k| k.iter().any(|x| !x.is_finite())) {
        return Err(Error::value(format!("fit_modal: filter {channel}"), "finite numbers", "others"));
    }
    let fits: Vec<(Vec<Mode>, f64)> = values.par_iter().map(|k| fit(k, states)).collect();
    let parts = |of: fn(&Mode) -> [f64; 2]| -> Result<Tensor> {
        let all: Vec<f64> = fits.iter().flat_map(|(modes, _)| modes.iter().flat_map(of)).collect();
        Ok(Tensor::from_vec(all, (channels, states, 2), &Device::Cpu)?)
    };
    debug_assert!(values.iter().all(|k| k.len() == length));
    Ok(ModalFit {
        poles: parts(|mode| [mode.pole.0, mode.pole.1])?,
        residues: parts(|mode| [mode.residue.0, mode.residue.1])?,
        errors: fits.iter().map(|(_, error)| *error).collect(),
    })
}

/// One exponential, `Re residue pole^t`.
#[derive(Clone, Copy, Debug)]
struct Mode {
    pole: Complex,
    residue: Complex,
}

/// Real and imaginary part.
type Complex = (f64, f64);

fn times(a: Complex, b: Complex) -> Complex {
    (a.0 * b.0 - a.1 * b.1, a.0 * b.1 + a.1 * b.0)
}

fn divided(a: Complex, b: Complex) -> Complex {
    let norm = b.0 * b.0 + b.1 * b.1;
    ((a.0 * b.0 + a.1 * b.1) / norm, (a.1 * b.0 - a.0 * b.1) / norm)
}

/// The better of the two starts, refined, and its relative error.
fn fit(filter: &[f64], states: usize) -> (Vec<Mode>, f64) {
    let norm = filter.iter().map(|x| x * x).sum::<f64>().sqrt();
    if norm == 0.0 {
        return (vec![Mode { pole: (0.0, 0.0), residue: (0.0, 0.0) }; states], 0.0);
    }
    let starts = [prony::poles(filter, states), spread(states, filter.len())];
    let refined = starts.into_iter().map(|poles| least_squares::refine(filter, &poles));
    let best = refined.min_by(|a, b| a.1.total_cmp(&b.1));
    let (modes, left) = best.unwrap_or_default();
    (modes, left.sqrt() / norm)
}

/// Poles over decays from one token to the filter's length, their angles over the half circle.
fn spread(states: usize, length: usize) -> Vec<Complex> {
    let last = (states.max(2) - 1) as f64;
    let pole = |i: usize| {
        let decay = (length.max(2) as f64).powf(-(i as f64) / last);
        // fast decays take the wide angles
        let angle = std::f64::consts::PI * 0.5 * decay;
        ((-decay).exp() * angle.cos(), (-decay).exp() * angle.sin())
    };
    (0..states).map(pole).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(modes: &[(f64, f64, f64, f64)], length: usize) -> Vec<f64> {
        let at = |t: usize| {
            let term = |&(radius, angle, re, im): &(f64, f64, f64, f64)| {
                let (sin, cos) = (angle * t as f64).sin_cos();
                radius.powi(t as i32) * (re * cos - im * sin)
            };
            modes.iter().map(term).sum()
        };
        (0..length).map(at).collect()
    }

    #[test]
    fn a_modal_filter_is_found_again() {
        let modes =
            [(0.99, 0.3, 1.0, -0.5), (0.9, 1.7, -0.7, 0.2), (0.7, 0.0, 0.4, 0.0), (0.95, 2.9, 0.3, 0.9)];
        for count in 1..=4 {
            let filter = filter(&modes[..count], 400);
            let (found, error) = fit(&filter, count);
            assert!(error < 1e-8, "{count} states: {error:.1e}, {found:?}");
            assert!(found.iter().all(|mode| mode.pole.0.hypot(mode.pole.1) < 1.0));
        }
    }

    #[test]
    fn more_states_fit_a_smooth_filter_better() {
        // no sum of exponentials, as Hyena's own filters are none
        let filter: Vec<f64> = (0..512)
            .map(|t| {
                let x = t as f64 / 512.0;
                (-4.0 * x).exp() * ((30.0 * x * x).sin() + 0.3)
            })
            .collect();
        let errors: Vec<f64> = [2, 4, 8].iter().map(|&states| fit(&filter, states).1).collect();
        assert!(errors[0] > errors[1] && errors[1] > errors[2], "{errors:?}");
        assert!(errors[2] < 2e-2, "{errors:?}");
    }
}
