//! Modal filters fitted to given ones: what makes a long convolution decode in constant time.
//!
//! For every channel the starting poles are those of the space that the largest eigenvectors of the filter's Hankel matrix
//! span; Levenberg and Marquardt's method then refines poles and residues together in f64. Poles stay within the unit
//! circle. The eigenvalues left out tell how near any such filter can come.
//!
//! Sources: Laughing Hyena (Massaroli et al. 2023), section 3, for the problem; Kung 1978 for the start.

mod eigen;
mod hankel;
mod least_squares;

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use hankel::Scale;
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
    /// What no filter of so many states can have as its error; how near it comes to the least error is not known.
    pub bounds: Vec<f64>,
}

/// The poles and residues of `states` exponentials whose sum is nearest to each of `filters` `[D, L]` in least squares.
///
/// Costs some 100 products with the filter's Hankel matrix and steps of `O(L S + S^3)` a channel; channels run on all
/// threads, with the same result for any number of them. Not differentiable.
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
    let scale = Scale::new(length)?;
    let fits = values.par_iter().map(|k| fit(k, states, &scale)).collect::<Result<Vec<Fit>>>()?;
    let parts = |of: fn(&Mode) -> [f64; 2]| -> Result<Tensor> {
        let all: Vec<f64> = fits.iter().flat_map(|fit| fit.modes.iter().flat_map(of)).collect();
        Ok(Tensor::from_vec(all, (channels, states, 2), &Device::Cpu)?)
    };
    Ok(ModalFit {
        poles: parts(|mode| [mode.pole.0, mode.pole.1])?,
        residues: parts(|mode| [mode.residue.0, mode.residue.1])?,
        errors: fits.iter().map(|fit| fit.error).collect(),
        bounds: fits.iter().map(|fit| fit.bound).collect(),
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

/// What comes of one filter.
struct Fit {
    modes: Vec<Mode>,
    error: f64,
    bound: f64,
}

fn fit(filter: &[f64], states: usize, scale: &Scale) -> Result<Fit> {
    let norm = filter.iter().map(|x| x * x).sum::<f64>().sqrt();
    if norm == 0.0 {
        let nothing = Mode { pole: (0.0, 0.0), residue: (0.0, 0.0) };
        return Ok(Fit { modes: vec![nothing; states], error: 0.0, bound: 0.0 });
    }
    let (poles, bound) = hankel::poles(filter, states, scale)?;
    let (modes, left) = least_squares::refine(filter, &poles);
    Ok(Fit { modes, error: left.sqrt() / norm, bound: bound / norm })
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

    fn fit(filter: &[f64], states: usize) -> Fit {
        let fit = super::fit(filter, states, &Scale::new(filter.len()).unwrap()).unwrap();
        assert!(fit.bound <= fit.error * (1.0 + 1e-9) + 1e-12, "{} above {}", fit.bound, fit.error);
        assert!(
            fit.modes.len() == states && fit.modes.iter().all(|mode| mode.pole.0.hypot(mode.pole.1) < 1.0)
        );
        fit
    }

    #[test]
    fn a_modal_filter_is_found_again() {
        let modes =
            [(0.99, 0.3, 1.0, -0.5), (0.9, 1.7, -0.7, 0.2), (0.7, 0.0, 0.4, 0.0), (0.95, 2.9, 0.3, 0.9)];
        for length in [60, 400, 401] {
            for count in 1..=4 {
                let error = fit(&filter(&modes[..count], length), count).error;
                assert!(error < 1e-8, "{count} states, {length} taps: {error:.1e}");
            }
        }
    }

    #[test]
    fn filters_of_few_taps_are_met_in_full() {
        for length in 1..=6 {
            let filter: Vec<f64> = (0..length).map(|t| (1.3 * t as f64).cos() + 0.2 * t as f64).collect();
            let error = fit(&filter, 4).error;
            assert!(error < 1e-6, "{length} taps: {error:.1e}");
        }
        assert_eq!(fit(&[0.0; 10], 3).error, 0.0);
        assert_eq!(fit(&[], 3).error, 0.0);
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
        let fits: Vec<Fit> = [2, 4, 8].iter().map(|&states| fit(&filter, states)).collect();
        let errors: Vec<f64> = fits.iter().map(|fit| fit.error).collect();
        assert!(errors[0] > errors[1] && errors[1] > errors[2], "{errors:?}");
        assert!(errors[2] < 1e-2, "{errors:?}");
        // and not far from the best
        assert!(fits[..2].iter().all(|fit| fit.error < 6.0 * fit.bound), "{errors:?}");
    }
}
