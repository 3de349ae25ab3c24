//! Starting poles: the roots of a linear prediction.

use super::least_squares::solve;
use super::{Complex, divided, times};

/// Rounds of Weierstrass's iteration for the roots.
const ROUNDS: usize = 200;
/// Added to the normal equations, relative to their size.
const RIDGE: f64 = 1e-12;

/// Up to `states` poles, filled up with a fast one where there are fewer.
pub(super) fn poles(filter: &[f64], states: usize) -> Vec<Complex> {
    let order = (2 * states).min(filter.len() / 2);
    let mut poles = vec![];
    for root in roots(&prediction(filter, order)) {
        let radius = root.0.hypot(root.1);
        // one of each pair; what grows is reflected into the circle
        if root.1 < -1e-9 || !radius.is_finite() || radius < 1e-6 {
            continue;
        }
        let scale =
            if radius < 1.0 { radius.min(1.0 - 1e-6) } else { (1.0 / radius).min(1.0 - 1e-6) } / radius;
        poles.push((root.0 * scale, root.1 * scale));
    }
    // the slowest matter most
    poles.sort_by(|a, b| b.0.hypot(b.1).total_cmp(&a.0.hypot(a.1)));
    poles.truncate(states);
    let missing = states - poles.len();
    poles.extend((0..missing).map(|i| (0.3 / (i + 1) as f64, 0.1)));
    poles
}

/// `a` with `k[t] = sum_j a[j] k[t - 1 - j]` in least squares.
fn prediction(filter: &[f64], order: usize) -> Vec<f64> {
    let mut matrix = vec![0.0; order * order];
    let mut right = vec![0.0; order];
    for t in order..filter.len() {
        for i in 0..order {
            let x = filter[t - 1 - i];
            right[i] += x * filter[t];
            for j in 0..=i {
                matrix[i * order + j] += x * filter[t - 1 - j];
            }
        }
    }
    let trace: f64 = (0..order).map(|i| matrix[i * order + i]).sum();
    for i in 0..order {
        matrix[i * order + i] += RIDGE * trace + f64::MIN_POSITIVE;
        for j in 0..i {
            matrix[j * order + i] = matrix[i * order + j];
        }
    }
    solve(&matrix, &right).unwrap_or_else(|| vec![0.0; order])
}

/// The roots of `z^n - a[0] z^(n-1) - .. - a[n-1]`.
fn roots(a: &[f64]) -> Vec<Complex> {
    let value = |z: Complex| {
        a.iter().fold((1.0, 0.0), |sum: Complex, a| {
            let next = times(sum, z);
            (next.0 - a, next.1)
        })
    };
    // on a circle, with no symmetry that the iteration could not leave
    let start = |i: usize| {
        let (sin, cos) = (0.4 + std::f64::consts::TAU * i as f64 / a.len() as f64).sin_cos();
        (0.9 * cos, 0.9 * sin)
    };
    let mut roots: Vec<Complex> = (0..a.len()).map(start).collect();
    for _ in 0..ROUNDS {
        let mut largest: f64 = 0.0;
        for i in 0..roots.len() {
            let z = roots[i];
            let others = roots.iter().enumerate().filter(|&(j, _)| j != i);
            let product =
                others.fold((1.0, 0.0), |product, (_, other)| times(product, (z.0 - other.0, z.1 - other.1)));
            let step = divided(value(z), product);
            if step.0.is_finite() && step.1.is_finite() {
                roots[i] = (z.0 - step.0, z.1 - step.1);
                largest = largest.max(step.0.hypot(step.1));
            }
        }
        if largest < 1e-14 {
            break;
        }
    }
    roots
}
