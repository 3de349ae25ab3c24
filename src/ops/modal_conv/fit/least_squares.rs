//! Refinement of poles and residues: Levenberg and Marquardt's method.
//!
//! A pole is `exp(-e^a + i b)`, so that it stays within the unit circle; the parameters of a state are `a`, `b` and the
//! two parts of its residue.

use super::{Complex, Mode, times};

/// Steps at most.
const STEPS: usize = 100;
/// A step that gains less than this part of what is left is the last.
const GAIN: f64 = 1e-10;

/// The modes nearest to `filter` from a start of `poles`, and the sum of squares that is left.
pub(super) fn refine(filter: &[f64], poles: &[Complex]) -> (Vec<Mode>, f64) {
    let angles = |&(re, im): &Complex| {
        let decay = -re.hypot(im).clamp(1e-8, 1.0 - 1e-9).ln();
        [decay.ln(), im.atan2(re), 0.0, 0.0]
    };
    let mut parameters: Vec<f64> = poles.iter().flat_map(angles).collect();
    fit_residues(filter, &mut parameters);
    let mut left = squares(filter, &parameters);
    let mut damping = 1e-3;
    for _ in 0..STEPS {
        let (matrix, right) = normal_equations(filter, &parameters);
        let mut gained = None;
        for _ in 0..8 {
            let Some(step) = damped(&matrix, &right, damping) else {
                damping *= 4.0;
                continue;
            };
            let moved: Vec<f64> = parameters.iter().zip(&step).map(|(p, s)| p + s).collect();
            let after = squares(filter, &moved);
            if after < left {
                gained = Some((left - after) / left);
                (parameters, left) = (moved, after);
                damping = (damping / 3.0).max(1e-12);
                break;
            }
            damping *= 4.0;
        }
        if gained.is_none_or(|gain| gain < GAIN) {
            break;
        }
    }
    (parameters.chunks_exact(4).map(mode).collect(), left)
}

fn mode(p: &[f64]) -> Mode {
    let radius = (-p[0].exp()).exp();
    Mode { pole: (radius * p[1].cos(), radius * p[1].sin()), residue: (p[2], p[3]) }
}

/// Calls `each(t, terms)` with `R p^t` and `p^t` of every state.
fn walk(parameters: &[f64], length: usize, mut each: impl FnMut(usize, &[[Complex; 2]])) {
    let modes: Vec<Mode> = parameters.chunks_exact(4).map(mode).collect();
    let mut terms: Vec<[Complex; 2]> = modes.iter().map(|mode| [mode.residue, (1.0, 0.0)]).collect();
    for t in 0..length {
        each(t, &terms);
        for (term, mode) in terms.iter_mut().zip(&modes) {
            *term = term.map(|x| times(x, mode.pole));
        }
    }
}

fn squares(filter: &[f64], parameters: &[f64]) -> f64 {
    let mut sum = 0.0;
    walk(parameters, filter.len(), |t, terms| {
        let left = filter[t] - terms.iter().map(|[x, _]| x.0).sum::<f64>();
        sum += left * left;
    });
    if sum.is_finite() { sum } else { f64::INFINITY }
}

/// `J^T J` and `J^T left`.
fn normal_equations(filter: &[f64], parameters: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let n = parameters.len();
    let (mut matrix, mut right, mut row) = (vec![0.0; n * n], vec![0.0; n], vec![0.0; n]);
    walk(parameters, filter.len(), |t, terms| {
        let mut left = filter[t];
        for ((slopes, [x, power]), p) in row.chunks_exact_mut(4).zip(terms).zip(parameters.chunks_exact(4)) {
            left -= x.0;
            slopes.copy_from_slice(&[-(t as f64) * p[0].exp() * x.0, -(t as f64) * x.1, power.0, -power.1]);
        }
        for i in 0..n {
            right[i] += row[i] * left;
            for j in 0..=i {
                matrix[i * n + j] += row[i] * row[j];
            }
        }
    });
    for i in 0..n {
        for j in 0..i {
            matrix[j * n + i] = matrix[i * n + j];
        }
    }
    (matrix, right)
}

/// The step of `(matrix + damping diagonal) step = right`.
fn damped(matrix: &[f64], right: &[f64], damping: f64) -> Option<Vec<f64>> {
    let n = right.len();
    let mut matrix = matrix.to_vec();
    let largest = (0..n).map(|i| matrix[i * n + i]).fold(0.0, f64::max);
    for i in 0..n {
        matrix[i * n + i] += damping * matrix[i * n + i].max(1e-12 * largest);
    }
    solve(&matrix, right)
}

/// The residues alone, which are linear.
fn fit_residues(filter: &[f64], parameters: &mut [f64]) {
    let (matrix, right) = normal_equations(filter, parameters);
    let n = right.len();
    let places: Vec<usize> = (0..n).filter(|i| i % 4 >= 2).collect();
    let m = places.len();
    let mut part = vec![0.0; m * m];
    for (i, &row) in places.iter().enumerate() {
        for (j, &column) in places.iter().enumerate() {
            part[i * m + j] = matrix[row * n + column];
        }
    }
    let right: Vec<f64> = places.iter().map(|&i| right[i]).collect();
    if let Some(residues) = damped(&part, &right, 1e-10) {
        places.iter().zip(residues).for_each(|(&i, x)| parameters[i] = x);
    }
}

/// `matrix x = right` for a symmetric positive matrix, by Cholesky's method; none if it is not.
pub(super) fn solve(matrix: &[f64], right: &[f64]) -> Option<Vec<f64>> {
    let n = right.len();
    let mut lower = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| lower[i * n + k] * lower[j * n + k]).sum();
            let rest = matrix[i * n + j] - sum;
            if i == j {
                if !(rest > 0.0 && rest.is_finite()) {
                    return None;
                }
                lower[i * n + i] = rest.sqrt();
            } else {
                lower[i * n + j] = rest / lower[j * n + j];
            }
        }
    }
    let mut x = right.to_vec();
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| lower[i * n + k] * x[k]).sum();
        x[i] = (x[i] - sum) / lower[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| lower[k * n + i] * x[k]).sum();
        x[i] = (x[i] - sum) / lower[i * n + i];
    }
    Some(x)
}
