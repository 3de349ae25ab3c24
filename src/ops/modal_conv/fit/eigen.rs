//! Eigenvalues of small matrices, rows one after another.

use super::{Complex, times};

/// Sweeps of Jacobi's method at most.
const SWEEPS: usize = 40;
/// Steps for one eigenvalue of a general matrix at most.
const STEPS: usize = 60;

/// Eigenvalues and eigenvectors (in columns) of a symmetric matrix, by Jacobi's rotations.
pub(super) fn symmetric(mut m: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; n * n];
    (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    let scale: f64 = m.iter().map(|x| x * x).sum();
    for _ in 0..SWEEPS {
        let mut off = 0.0;
        for p in 0..n {
            for q in p + 1..n {
                let x = m[p * n + q];
                off += x * x;
                if x == 0.0 {
                    continue;
                }
                let slope = (m[q * n + q] - m[p * n + p]) / (2.0 * x);
                let t = slope.signum() / (slope.abs() + slope.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                let s = t * c;
                let turn = |x: &mut [f64], a: usize, b: usize| {
                    (x[a], x[b]) = (c * x[a] - s * x[b], s * x[a] + c * x[b]);
                };
                for k in 0..n {
                    turn(&mut m, k * n + p, k * n + q);
                    turn(&mut vectors, k * n + p, k * n + q);
                }
                for k in 0..n {
                    turn(&mut m, p * n + k, q * n + k);
                }
            }
        }
        if off <= 1e-32 * scale {
            break;
        }
    }
    ((0..n).map(|i| m[i * n + i]).collect(), vectors)
}

/// Eigenvalues of a real matrix: Hessenberg's form, then QR steps with shifts.
pub(super) fn general(m: &[f64], n: usize) -> Vec<Complex> {
    let mut h: Vec<Complex> = hessenberg(m.to_vec(), n).into_iter().map(|x| (x, 0.0)).collect();
    let mut values = vec![];
    let (mut end, mut steps) = (n, 0);
    while end > 0 {
        let size = |x: Complex| x.0.abs() + x.1.abs();
        let is_split = |k: usize| {
            let around = size(h[k * n + k]) + size(h[(k - 1) * n + k - 1]);
            size(h[k * n + k - 1]) <= f64::EPSILON * around
        };
        let start = (1..end).rev().find(|&k| is_split(k)).unwrap_or(0);
        if start + 1 == end || steps == STEPS {
            values.push(h[(end - 1) * n + end - 1]);
            (end, steps) = (end - 1, 0);
            continue;
        }
        steps += 1;
        // now and then another shift, for what goes round in circles
        let shift = match steps % 10 {
            0 => (size(h[(end - 1) * n + end - 2]), 0.0),
            _ => corner(&h, n, end),
        };
        step(&mut h, n, start, end, shift);
    }
    values
}

/// The same eigenvalues, zero below the first subdiagonal; by elimination with pivots.
fn hessenberg(mut m: Vec<f64>, n: usize) -> Vec<f64> {
    for k in 1..n.saturating_sub(1) {
        let pivot = (k..n).max_by(|&a, &b| m[a * n + k - 1].abs().total_cmp(&m[b * n + k - 1].abs()));
        let pivot = pivot.unwrap_or(k);
        if m[pivot * n + k - 1] == 0.0 {
            continue;
        }
        for j in 0..n {
            m.swap(k * n + j, pivot * n + j);
        }
        for i in 0..n {
            m.swap(i * n + k, i * n + pivot);
        }
        for i in k + 1..n {
            let factor = m[i * n + k - 1] / m[k * n + k - 1];
            for j in 0..n {
                m[i * n + j] -= factor * m[k * n + j];
            }
            for j in 0..n {
                m[j * n + k] += factor * m[j * n + i];
            }
            m[i * n + k - 1] = 0.0;
        }
    }
    m
}

/// The eigenvalue of the last two rows and columns before `end` that is nearer to the last element.
fn corner(h: &[Complex], n: usize, end: usize) -> Complex {
    let at = |i: usize, j: usize| h[(end - 1 - i) * n + end - 1 - j];
    let (a, d) = (at(1, 1), at(0, 0));
    let bc = times(at(1, 0), at(0, 1));
    let half = ((a.0 - d.0) / 2.0, (a.1 - d.1) / 2.0);
    let square = times(half, half);
    let root = root((square.0 + bc.0, square.1 + bc.1));
    let middle = ((a.0 + d.0) / 2.0, (a.1 + d.1) / 2.0);
    let [one, two] = [1.0, -1.0].map(|sign| (middle.0 + sign * root.0, middle.1 + sign * root.1));
    let distance = |x: Complex| (x.0 - d.0).hypot(x.1 - d.1);
    if distance(one) < distance(two) { one } else { two }
}

fn root(x: Complex) -> Complex {
    let (radius, angle) = (x.0.hypot(x.1).sqrt(), x.1.atan2(x.0) / 2.0);
    (radius * angle.cos(), radius * angle.sin())
}

/// `H - shift = Q R`, then `R Q + shift`, of the rows and columns `start..end`.
fn step(h: &mut [Complex], n: usize, start: usize, end: usize, shift: Complex) {
    let shifted = |h: &mut [Complex], sign: f64| {
        for k in start..end {
            h[k * n + k].0 += sign * shift.0;
            h[k * n + k].1 += sign * shift.1;
        }
    };
    shifted(h, -1.0);
    let mut rotations = vec![];
    for k in start..end - 1 {
        let (x, y) = (h[k * n + k], h[(k + 1) * n + k]);
        let norm = (x.0 * x.0 + x.1 * x.1 + y.0 * y.0 + y.1 * y.1).sqrt();
        let [c, s] =
            if norm == 0.0 { [(1.0, 0.0), (0.0, 0.0)] } else { [x, y].map(|z| (z.0 / norm, z.1 / norm)) };
        for j in k..end {
            let (a, b) = (h[k * n + j], h[(k + 1) * n + j]);
            h[k * n + j] = sum(times(conjugate(c), a), times(conjugate(s), b));
            h[(k + 1) * n + j] = difference(times(c, b), times(s, a));
        }
        rotations.push([c, s]);
    }
    for (k, [c, s]) in (start..).zip(rotations) {
        for i in start..end.min(k + 3) {
            let (a, b) = (h[i * n + k], h[i * n + k + 1]);
            h[i * n + k] = sum(times(a, c), times(b, s));
            h[i * n + k + 1] = difference(times(b, conjugate(c)), times(a, conjugate(s)));
        }
    }
    shifted(h, 1.0);
}

fn conjugate(x: Complex) -> Complex {
    (x.0, -x.1)
}

fn sum(a: Complex, b: Complex) -> Complex {
    (a.0 + b.0, a.1 + b.1)
}

fn difference(a: Complex, b: Complex) -> Complex {
    (a.0 - b.0, a.1 - b.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_of_a_companion_matrix() {
        // (z - 0.5)(z + 2)(z^2 - 2 z + 5), and the same in another basis
        let companion = [0.5, -1.0, -9.5, 5.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0];
        let mut values = general(&companion, 4);
        values.sort_by(|a, b| (a.0, a.1).partial_cmp(&(b.0, b.1)).unwrap());
        let want = [(-2.0, 0.0), (0.5, 0.0), (1.0, -2.0), (1.0, 2.0)];
        for (got, want) in values.iter().zip(want) {
            assert!((got.0 - want.0).hypot(got.1 - want.1) < 1e-12, "{values:?}");
        }
        assert!(general(&[], 0).is_empty() && general(&[3.0], 1) == [(3.0, 0.0)]);
    }

    #[test]
    fn vectors_of_a_symmetric_matrix() {
        let n = 12;
        let mut m = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                m[i * n + j] = ((i + j) as f64 * 0.7).sin() / (1.0 + i.abs_diff(j) as f64);
            }
        }
        let (values, vectors) = symmetric(m.clone(), n);
        for v in 0..n {
            for i in 0..n {
                let got: f64 = (0..n).map(|j| m[i * n + j] * vectors[j * n + v]).sum();
                assert!((got - values[v] * vectors[i * n + v]).abs() < 1e-12);
            }
        }
    }
}
