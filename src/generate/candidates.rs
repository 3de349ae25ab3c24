//! The tokens that may be drawn.

use super::GenerationConfig;
use crate::backend::cpu::math;
use crate::backend::cpu::simd::{Kernel, Simd, dispatch};
use std::cmp::Ordering;

/// Bins of logits below the largest, as many for each natural factor of the probability.
const BINS: usize = 1024;
const BINS_A_FACTOR: f64 = 32.0;
/// Weights that are summed together.
const BLOCK: usize = 64;

/// The tokens that the filters leave, by id. Filters pass over the vocabulary, and sort only what lies at their border. The
/// rooms stay from draw to draw: to ask for them anew would take longer than all else.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    /// Empty: all tokens.
    ids: Vec<u32>,
    /// Over temperature; the largest is 0.
    logits: Vec<f64>,
    /// Unnormalised probabilities.
    weights: Vec<f64>,
}

impl Candidates {
    /// Those of logits whose largest is `largest`.
    pub(super) fn find(&mut self, config: &GenerationConfig, logits: &[f64], largest: f64) {
        self.ids.clear();
        self.logits.clear();
        self.logits.extend(logits.iter().map(|x| (x - largest) / config.temperature));
        if let Some(k) = config.top_k.filter(|&k| k < logits.len()) {
            self.ids = most_probable(&self.logits, k);
            for (i, &id) in self.ids.iter().enumerate() {
                self.logits[i] = self.logits[id as usize];
            }
            self.logits.truncate(k);
        }
        self.weights.resize(self.logits.len(), 0.0);
        dispatch(Exp { x: &self.logits, y: &mut self.weights });
        if config.top_p < 1.0 {
            self.keep_mass(config.top_p);
        }
        if config.min_p > 0.0 {
            // the largest weight is e^0 = 1, and no filter drops it
            self.retain(|_, _, weight| weight >= config.min_p);
        }
    }

    #[cfg(test)]
    pub(super) fn ids(&self) -> Vec<u32> {
        (0..self.logits.len()).map(|i| self.id(i)).collect()
    }

    fn id(&self, i: usize) -> u32 {
        self.ids.get(i).copied().unwrap_or(i as u32)
    }

    /// Those whose place, logit and weight fit: one at least.
    fn retain(&mut self, fits: impl Fn(usize, f64, f64) -> bool) {
        let all = self.ids.is_empty();
        let mut kept = 0;
        for i in 0..self.logits.len() {
            let (logit, weight) = (self.logits[i], self.weights[i]);
            if !fits(i, logit, weight) {
                continue;
            }
            (self.logits[kept], self.weights[kept]) = (logit, weight);
            match all {
                true => self.ids.push(i as u32),
                false => self.ids[kept] = self.ids[i],
            }
            kept += 1;
        }
        self.ids.truncate(kept);
        self.logits.truncate(kept);
        self.weights.truncate(kept);
    }

    /// Keeps the fewest candidates of highest rank whose weights reach the share `mass` of the sum.
    fn keep_mass(&mut self, mass: f64) {
        let bin = |logit: f64| ((-logit * BINS_A_FACTOR) as usize).min(BINS - 1);
        let mut masses = [0.0; BINS];
        for (&logit, weight) in self.logits.iter().zip(&self.weights) {
            masses[bin(logit)] += weight;
        }
        let mut left = mass * masses.iter().sum::<f64>();
        let mut border = 0;
        while border < BINS && masses[border] < left {
            left -= masses[border];
            border += 1;
        }
        let mut at_border: Vec<usize> =
            (0..self.logits.len()).filter(|&i| bin(self.logits[i]) == border).collect();
        at_border.sort_unstable_by(|&a, &b| rank(&self.logits, a, b));
        let reached = |i: &&usize| {
            left -= self.weights[**i];
            left <= 0.0
        };
        // by rounding, all of them or all there are may not reach it
        let last = at_border.iter().find(reached).or(at_border.last()).copied();
        let least = last.map_or(f64::NEG_INFINITY, |last| self.logits[last]);
        self.retain(|i, logit, _| match bin(logit).cmp(&border) {
            Ordering::Less => true,
            Ordering::Equal => logit > least || (logit == least && last.is_some_and(|last| i <= last)),
            Ordering::Greater => false,
        });
    }

    /// The one at the share `u` (from 0, below 1) of the cumulative weights.
    pub(super) fn pick(&self, u: f64) -> u32 {
        let sums: Vec<f64> = self.weights.chunks(BLOCK).map(sum).collect();
        let mut left = u * sums.iter().sum::<f64>();
        // rounding may leave something behind the last weight: it is the last one's
        let (mut block, mut inside) = (0, left);
        for (i, &sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            (block, inside) = (i, left);
            if left < sum {
                break;
            }
            left -= sum;
        }
        let mut last = block * BLOCK;
        for (i, &weight) in self.weights.iter().enumerate().skip(last).take(BLOCK) {
            if weight > 0.0 {
                last = i;
                if inside < weight {
                    break;
                }
                inside -= weight;
            }
        }
        self.id(last)
    }
}

/// The more probable of two places first; of equals the lower.
fn rank(logits: &[f64], a: usize, b: usize) -> Ordering {
    logits[b].total_cmp(&logits[a]).then(a.cmp(&b))
}

/// The `k` most probable places, in their order.
fn most_probable(logits: &[f64], k: usize) -> Vec<u32> {
    // the k-th largest of the maxima of pieces is no larger than the k-th largest of all
    let size = (logits.len() / (8 * k)).max(1);
    let mut maxima: Vec<f64> = logits.chunks(size).map(largest).collect();
    let (_, least, _) = maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let least = *least;
    let mut ids: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] >= least).collect();
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, |&a, &b| rank(logits, a, b));
        ids.truncate(k);
    }
    ids.sort_unstable();
    ids.into_iter().map(|id| id as u32).collect()
}

/// Numbers folded in a fixed order, several at once.
fn fold(numbers: &[f64], first: f64, both: impl Fn(f64, f64) -> f64) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [first; LANES];
    let (whole, rest) = numbers.as_chunks::<LANES>();
    for numbers in whole {
        lanes.iter_mut().zip(numbers).for_each(|(lane, &x)| *lane = both(*lane, x));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane = both(*lane, x));
    lanes.into_iter().fold(first, both)
}

fn sum(weights: &[f64]) -> f64 {
    fold(weights, 0.0, |a, b| a + b)
}

/// -infinity if there are none.
pub(super) fn largest(numbers: &[f64]) -> f64 {
    fold(numbers, f64::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// `y = e^x`
struct Exp<'a> {
    x: &'a [f64],
    y: &'a mut [f64],
}

impl Kernel<f64> for Exp<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<f64>>(self, s: S) {
        for (x, y) in self.x.chunks(S::LANES).zip(self.y.chunks_mut(S::LANES)) {
            let n = x.len().min(y.len());
            // SAFETY: both slices hold n values, and n <= LANES.
            unsafe { s.store_first(y.as_mut_ptr(), n, math::exp(s, s.load_first(x.as_ptr(), n))) }
        }
    }
}
