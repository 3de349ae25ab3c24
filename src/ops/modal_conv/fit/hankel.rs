//! Starting poles, and a bound on what is left, from the filter's Hankel matrix.
//!
//! `S` complex exponentials make a Hankel matrix `k[i + j]` of rank `2 S` at most. Here it is scaled on both sides,
//!
//! ```text
//! W[i, j] = d[i] k[i + j] d[j],        d[i]^2 = (2 i)! / (4^i i!^2),        i, j < n,
//! ```
//!
//! because `sum_(i + j = t) d[i]^2 d[j]^2 = 1` for `t < n` and less beyond: what a filter differs by from another has at
//! least the norm of the difference of their `W`. So no filter of rank `r` is nearer than the eigenvalues of `W` behind the
//! `r` largest say (Eckart and Young), and their eigenvectors `U` span a space near that of the best poles: with
//! `O = U / d`, the eigenvalues of the `A` for which `O[1..] = O[..n - 1] A` in least squares (Kung 1978).
//!
//! The largest eigenvalues come from subspace iteration; a product with `W` is a long convolution.

use super::least_squares::{energies, factor, substitute};
use super::{Complex, eigen};
use crate::Result;
use crate::ops::long_conv::{FilterCache, LongConv, long_conv};
use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// Vectors beyond those that are asked for.
const SPARE: usize = 8;
/// Products with the matrix at most, and the gain (of all squares) that ends them earlier.
const ROUNDS: usize = 40;
const GAIN: f64 = 1e-9;
/// A pole is at most so large.
const LARGEST: f64 = 1.0 - 1e-6;

/// What the matrices of all filters of one length have in common.
pub(super) struct Scale {
    /// `d`, `[n]`
    d: Vec<f64>,
    /// How often tap `t` counts, `[2 n - 1]`.
    weights: Vec<f64>,
}

impl Scale {
    pub(super) fn new(length: usize) -> Result<Self> {
        let n = length.div_ceil(2);
        let mut squares = vec![1.0; n];
        for i in 1..n {
            squares[i] = squares[i - 1] * (2 * i - 1) as f64 / (2 * i) as f64;
        }
        let mut padded = squares.clone();
        padded.resize((2 * n).saturating_sub(1), 0.0);
        let weights = if n == 0 { vec![] } else { convolve(&padded, &padded, 1, None)? };
        Ok(Self { d: squares.into_iter().map(f64::sqrt).collect(), weights })
    }

    fn n(&self) -> usize {
        self.d.len()
    }
}

/// `[L, q]` convolved with `[L]`.
fn convolve(x: &[f64], filter: &[f64], q: usize, cache: Option<&FilterCache>) -> Result<Vec<f64>> {
    let length = filter.len();
    let x = Tensor::from_slice(x, (1, length, q), &Device::Cpu)?;
    let filter = Tensor::from_slice(filter, (1, length), &Device::Cpu)?;
    Ok(long_conv(&LongConv { cache, ..LongConv::new(&x, &filter) })?.flatten_all()?.to_vec1()?)
}

/// Up to `states` poles, filled up with fast ones where there are fewer, and the least norm that any others leave.
pub(super) fn poles(filter: &[f64], states: usize, scale: &Scale) -> Result<(Vec<Complex>, f64)> {
    let n = scale.n();
    let rank = (2 * states).min(n);
    let Basis { values, vectors, all } = basis(filter, rank, scale)?;
    let own: f64 = values.iter().take(rank).map(|x| x * x).sum();
    let next: f64 = values.iter().skip(rank).map(|x| x * x).sum();
    // both are below what is left: the first but for what the iteration lacks, the second for sure
    let bound = (all - own - 1e2 * GAIN * all).max(next).sqrt();

    let reliable = values.iter().take(rank).filter(|x| x.abs() > 1e-13 * values[0].abs()).count();
    let observed: Vec<f64> =
        (0..n * reliable).map(|i| vectors[i % reliable * n + i / reliable] / scale.d[i / reliable]).collect();
    let mut found = vec![];
    for value in transition(&observed, n, reliable).map_or(vec![], |a| eigen::general(&a, reliable)) {
        let radius = value.0.hypot(value.1);
        // one of each pair; what grows is brought into the circle
        if value.1 < -1e-12 || !radius.is_finite() || radius < 1e-6 {
            continue;
        }
        let factor = radius.min(LARGEST) / radius;
        found.push((value.0 * factor, value.1 * factor));
    }
    // those that carry most of the filter
    let mut ranked: Vec<(f64, Complex)> = energies(filter, &found).into_iter().zip(found).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut poles: Vec<Complex> = ranked.into_iter().map(|(_, pole)| pole).take(states).collect();
    let missing = states - poles.len();
    poles.extend((0..missing).map(|i| (0.3 / (i + 1) as f64, 0.1)));
    Ok((poles, bound))
}

/// The largest eigenvalues of `W`, the first first.
struct Basis {
    values: Vec<f64>,
    /// One row of `[n]` after another.
    vectors: Vec<f64>,
    /// The sum of the squares of all of them.
    all: f64,
}

fn basis(filter: &[f64], rank: usize, scale: &Scale) -> Result<Basis> {
    let n = scale.n();
    let q = (rank + SPARE).min(n);
    let taps = &filter[..(2 * n).saturating_sub(1)];
    let all = taps.iter().zip(&scale.weights).map(|(k, w)| w * k * k).sum();
    let cache = FilterCache::default();
    let rng = &mut StdRng::seed_from_u64(0);
    let mut rows: Vec<f64> = (0..q * n).map(|_| rng.random_range(-1.0..1.0)).collect();
    orthonormalize(&mut rows, n);
    let (mut inner, mut before) = (vec![], 0.0);
    for _ in 0..ROUNDS {
        let next = product(&rows, taps, scale, q, &cache)?;
        inner = (0..q * q).map(|i| dot(row(&rows, i / q, n), row(&next, i % q, n))).collect();
        let captured: f64 = inner.iter().map(|x| x * x).sum();
        if captured - before <= GAIN * all {
            break;
        }
        before = captured;
        rows = next;
        orthonormalize(&mut rows, n);
    }
    for i in 0..q {
        for j in 0..i {
            let mean = (inner[i * q + j] + inner[j * q + i]) / 2.0;
            (inner[i * q + j], inner[j * q + i]) = (mean, mean);
        }
    }
    let (values, turn) = eigen::symmetric(inner, q);
    let mut order: Vec<usize> = (0..q).collect();
    order.sort_by(|&a, &b| values[b].abs().total_cmp(&values[a].abs()));
    let mut vectors = vec![0.0; q * n];
    for (to, &from) in vectors.chunks_exact_mut(n.max(1)).zip(&order) {
        for (i, row) in rows.chunks_exact(n).enumerate() {
            add(to, turn[i * q + from], row);
        }
    }
    Ok(Basis { values: order.iter().map(|&i| values[i]).collect(), vectors, all })
}

/// `W` times each of `q` rows of `[n]`.
fn product(rows: &[f64], taps: &[f64], scale: &Scale, q: usize, cache: &FilterCache) -> Result<Vec<f64>> {
    let n = scale.n();
    let mut x = vec![0.0; taps.len() * q];
    for (c, row) in rows.chunks_exact(n).enumerate() {
        for (j, (value, d)) in row.iter().zip(&scale.d).enumerate() {
            x[(n - 1 - j) * q + c] = d * value;
        }
    }
    let y = convolve(&x, taps, q, Some(cache))?;
    Ok((0..q * n).map(|i| scale.d[i % n] * y[(n - 1 + i % n) * q + i / n]).collect())
}

/// `A` with `x[1..] = x[..n - 1] A` in least squares, `x` being `[n, r]`.
fn transition(x: &[f64], n: usize, r: usize) -> Option<Vec<f64>> {
    let (mut matrix, mut right) = (vec![0.0; r * r], vec![0.0; r * r]);
    for t in 0..n.saturating_sub(1) {
        let (now, next) = (row(x, t, r), row(x, t + 1, r));
        for i in 0..r {
            add(&mut matrix[i * r..(i + 1) * r], now[i], now);
            add(&mut right[i * r..(i + 1) * r], now[i], next);
        }
    }
    let largest = (0..r).map(|i| matrix[i * r + i]).fold(0.0, f64::max);
    (0..r).for_each(|i| matrix[i * r + i] += 1e-14 * largest);
    let lower = factor(&matrix, r)?;
    let mut a = vec![0.0; r * r];
    for column in 0..r {
        let solved = substitute(&lower, (0..r).map(|i| right[i * r + column]).collect());
        solved.into_iter().enumerate().for_each(|(i, x)| a[i * r + column] = x);
    }
    Some(a)
}

/// Rows of `[n]` made orthogonal to each other and of norm 1: Gram and Schmidt's method, twice.
fn orthonormalize(rows: &mut [f64], n: usize) {
    for _ in 0..2 {
        for i in 0..rows.len() / n.max(1) {
            let (before, own) = rows.split_at_mut(i * n);
            let own = &mut own[..n];
            for other in before.chunks_exact(n) {
                add(own, -dot(own, other), other);
            }
            let norm = dot(own, own).sqrt();
            let scale = if norm > 0.0 { 1.0 / norm } else { 0.0 };
            own.iter_mut().for_each(|x| *x *= scale);
        }
    }
}

fn row(x: &[f64], i: usize, n: usize) -> &[f64] {
    &x[i * n..(i + 1) * n]
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (parts, others) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = parts.remainder().iter().zip(others.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in parts.zip(others) {
        (0..8).for_each(|i| sums[i] += a[i] * b[i]);
    }
    rest + sums.iter().sum::<f64>()
}

/// `to += factor x`
fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}
