//! Refinement of poles and residues: Levenberg and Marquardt's method.
//!
//! A pole is `p = exp(-e^a + i b)`, so that it stays within the unit circle; the parameters of a state are `a`, `b` and the
//! two parts of its residue `R`. The slopes of the filter are all of the form `Re c t^m p^t`,
//!
//! ```text
//! a: c = -e^a R, m = 1      b: c = i R, m = 1      Re R: c = 1, m = 0      Im R: c = i, m = 0
//! ```
//!
//! and their products sum up to `Re (c c' T(p p') + c c'* T(p p'*)) / 2` with `T(z) = sum_t t^(m + m') z^t`, which takes
//! `log L` operations: a step of the method costs `O(L S + S^2 log L + S^3)`.

use super::{Complex, Mode, times};

/// Steps at most.
const STEPS: usize = 100;
/// Dampings tried in a step at most, each 4 times the one before.
const TRIES: usize = 24;
/// A step that gains less than this part of what is left is the last.
const GAIN: f64 = 1e-10;
/// Of a pole, per token.
const LEAST_DECAY: f64 = 1e-10;

/// The modes nearest to `filter` from a start of `poles`, and the sum of squares that is left.
pub(super) fn refine(filter: &[f64], poles: &[Complex]) -> (Vec<Mode>, f64) {
    let mut parameters = start(filter, poles);
    let (mut rest, mut left) = difference(filter, &parameters);
    let mut damping = 1e-3;
    for _ in 0..STEPS {
        let matrix = products(&parameters, filter.len());
        let right = slopes(&rest, &parameters);
        let mut gained = None;
        for _ in 0..TRIES {
            let Some(step) = damped(&matrix, &right, damping) else {
                damping *= 4.0;
                continue;
            };
            let moved: Vec<f64> = parameters.iter().zip(&step).map(|(p, s)| p + s).collect();
            let (after, sum) = difference(filter, &moved);
            if sum < left {
                gained = Some((left - sum) / left);
                (parameters, rest, left) = (moved, after, sum);
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

/// The parameters of `poles` with the residues that fit best.
fn start(filter: &[f64], poles: &[Complex]) -> Vec<f64> {
    let angles = |&(re, im): &Complex| {
        let decay = -re.hypot(im).clamp(1e-8, 1.0 - 1e-9).ln();
        [decay.ln(), im.atan2(re), 0.0, 0.0]
    };
    let mut parameters: Vec<f64> = poles.iter().flat_map(angles).collect();
    let (matrix, right) = (products(&parameters, filter.len()), slopes(filter, &parameters));
    let n = right.len();
    let places: Vec<usize> = (0..n).filter(|i| i % 4 >= 2).collect();
    let part: Vec<f64> =
        places.iter().flat_map(|i| places.iter().map(|j| matrix[i * n + j]).collect::<Vec<_>>()).collect();
    let right: Vec<f64> = places.iter().map(|&i| right[i]).collect();
    if let Some(residues) = damped(&part, &right, 1e-10) {
        places.iter().zip(residues).for_each(|(&i, x)| parameters[i] = x);
    }
    parameters
}

/// How much each of `poles` carries of a filter that all of them together fit.
pub(super) fn energies(filter: &[f64], poles: &[Complex]) -> Vec<f64> {
    let energy = |p: &[f64]| {
        let Mode { pole: (re, im), residue: (a, b) } = mode(p);
        // a real pole has no use for an imaginary residue
        let residue = if im.abs() < 1e-9 { a * a } else { a * a + b * b };
        residue / (1.0 - (re * re + im * im)).max(1e-9)
    };
    start(filter, poles).chunks_exact(4).map(energy).collect()
}

fn mode(p: &[f64]) -> Mode {
    let radius = (-p[0].exp().max(LEAST_DECAY)).exp();
    Mode { pole: (radius * p[1].cos(), radius * p[1].sin()), residue: (p[2], p[3]) }
}

/// The powers of all poles, token by token.
struct Powers {
    re: Vec<f64>,
    im: Vec<f64>,
    poles: Vec<Complex>,
}

impl Powers {
    fn new(modes: &[Mode]) -> Self {
        let poles: Vec<Complex> = modes.iter().map(|mode| mode.pole).collect();
        Self { re: vec![1.0; poles.len()], im: vec![0.0; poles.len()], poles }
    }

    fn step(&mut self) {
        for ((re, im), p) in self.re.iter_mut().zip(&mut self.im).zip(&self.poles) {
            (*re, *im) = (*re * p.0 - *im * p.1, *re * p.1 + *im * p.0);
        }
    }
}

/// `filter` without the modes' sum, and its sum of squares.
fn difference(filter: &[f64], parameters: &[f64]) -> (Vec<f64>, f64) {
    let modes: Vec<Mode> = parameters.chunks_exact(4).map(mode).collect();
    let mut powers = Powers::new(&modes);
    let left = |&k: &f64| {
        let terms = modes.iter().zip(&powers.re).zip(&powers.im);
        let sum: f64 = terms.map(|((mode, re), im)| mode.residue.0 * re - mode.residue.1 * im).sum();
        powers.step();
        k - sum
    };
    let left: Vec<f64> = filter.iter().map(left).collect();
    let squares: f64 = left.iter().map(|x| x * x).sum();
    (left, if squares.is_finite() { squares } else { f64::INFINITY })
}

/// The factors `c` of a mode's four slopes; the first two have `m = 1`.
fn factors(p: &[f64]) -> [Complex; 4] {
    let decay = -p[0].exp();
    [(decay * p[2], decay * p[3]), (-p[3], p[2]), (1.0, 0.0), (0.0, 1.0)]
}

/// The sums over time of `left` times every slope.
fn slopes(left: &[f64], parameters: &[f64]) -> Vec<f64> {
    let modes: Vec<Mode> = parameters.chunks_exact(4).map(mode).collect();
    let mut powers = Powers::new(&modes);
    // of left p^t and t left p^t
    let mut sums = [0; 4].map(|_| vec![0.0; modes.len()]);
    let [re, im, t_re, t_im] = &mut sums;
    for (t, &left) in left.iter().enumerate() {
        let times = t as f64 * left;
        for s in 0..modes.len() {
            re[s] += left * powers.re[s];
            im[s] += left * powers.im[s];
            t_re[s] += times * powers.re[s];
            t_im[s] += times * powers.im[s];
        }
        powers.step();
    }
    let mut all = Vec::with_capacity(parameters.len());
    for (s, p) in parameters.chunks_exact(4).enumerate() {
        for (i, c) in factors(p).into_iter().enumerate() {
            let sum = if i < 2 { (t_re[s], t_im[s]) } else { (re[s], im[s]) };
            all.push(times(c, sum).0);
        }
    }
    all
}

/// `sum_(t < length) t^m z^t` for `m` of 0 to 2, by doubling.
fn sums(z: Complex, length: usize) -> [Complex; 3] {
    let mut sums = [(0.0, 0.0); 3];
    let (mut n, mut power) = (0.0, (1.0, 0.0));
    let plus = |a: Complex, factor: f64, b: Complex| (a.0 + factor * b.0, a.1 + factor * b.1);
    for bit in (0..usize::BITS - length.leading_zeros()).rev() {
        let [zero, one, two] = sums;
        let shifted = [zero, plus(one, n, zero), plus(plus(two, 2.0 * n, one), n * n, zero)];
        sums = [0, 1, 2].map(|m| plus(sums[m], 1.0, times(power, shifted[m])));
        (n, power) = (2.0 * n, times(power, power));
        if length >> bit & 1 == 1 {
            sums = [plus(sums[0], 1.0, power), plus(sums[1], n, power), plus(sums[2], n * n, power)];
            (n, power) = (n + 1.0, times(power, z));
        }
    }
    sums
}

/// The sums over time of every product of two slopes.
fn products(parameters: &[f64], length: usize) -> Vec<f64> {
    let n = parameters.len();
    let modes: Vec<(Complex, [Complex; 4])> =
        parameters.chunks_exact(4).map(|p| (mode(p).pole, factors(p))).collect();
    let mut matrix = vec![0.0; n * n];
    for (i, (p, left)) in modes.iter().enumerate() {
        for (j, (q, right)) in modes[..=i].iter().enumerate() {
            let (plain, conjugate) = (sums(times(*p, *q), length), sums(times(*p, (q.0, -q.1)), length));
            for (u, &c) in left.iter().enumerate() {
                for (v, &d) in right.iter().enumerate() {
                    let m = usize::from(u < 2) + usize::from(v < 2);
                    let sum = times(times(c, d), plain[m]).0 + times(times(c, (d.0, -d.1)), conjugate[m]).0;
                    matrix[(4 * i + u) * n + 4 * j + v] = sum / 2.0;
                    matrix[(4 * j + v) * n + 4 * i + u] = sum / 2.0;
                }
            }
        }
    }
    matrix
}

/// The step of `(matrix + damping diagonal) step = right`.
fn damped(matrix: &[f64], right: &[f64], damping: f64) -> Option<Vec<f64>> {
    let n = right.len();
    let mut matrix = matrix.to_vec();
    let largest = (0..n).map(|i| matrix[i * n + i]).fold(0.0, f64::max);
    for i in 0..n {
        matrix[i * n + i] += damping * matrix[i * n + i].max(1e-12 * largest);
    }
    Some(substitute(&factor(&matrix, n)?, right.to_vec()))
}

/// The lower factor of a symmetric positive matrix, by Cholesky's method; none if it is not.
pub(super) fn factor(matrix: &[f64], n: usize) -> Option<Vec<f64>> {
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
    Some(lower)
}

/// `x` with `lower lower^T x = right`.
pub(super) fn substitute(lower: &[f64], right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    let mut x = right;
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| lower[i * n + k] * x[k]).sum();
        x[i] = (x[i] - sum) / lower[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| lower[k * n + i] * x[k]).sum();
        x[i] = (x[i] - sum) / lower[i * n + i];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_slopes_are_those_of_finite_differences() {
        let parameters = [-2.0, 0.4, 0.7, -0.3, -5.0, 1.9, -1.1, 0.6, 0.3, 0.0, 0.2, 0.5];
        for length in [1, 2, 37, 64] {
            let filter: Vec<f64> = (0..length).map(|t| (t as f64 * 0.3).cos()).collect();
            let columns: Vec<Vec<f64>> = (0..parameters.len())
                .map(|i| {
                    let at = |change: f64| {
                        let mut moved = parameters;
                        moved[i] += change;
                        difference(&filter, &moved).0
                    };
                    at(-1e-6).iter().zip(at(1e-6)).map(|(a, b)| (a - b) / 2e-6).collect()
                })
                .collect();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let (matrix, right) = (products(&parameters, length), slopes(&filter, &parameters));
            for (i, a) in columns.iter().enumerate() {
                let scale = dot(a, a).sqrt() + 1e-9;
                assert!((right[i] - dot(a, &filter)).abs() < 1e-6 * (1.0 + scale), "{length}, slope {i}");
                for (j, b) in columns.iter().enumerate() {
                    let (got, want) = (matrix[i * parameters.len() + j], dot(a, b));
                    assert!(
                        (got - want).abs() < 1e-6 * (1.0 + scale * dot(b, b).sqrt()),
                        "{length}, {i} {j}"
                    );
                }
            }
        }
    }
}
