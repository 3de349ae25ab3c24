//! From the logits of one position to a token.

use super::GenerationConfig;
use crate::backend::cpu::math;
use crate::backend::cpu::simd::{Kernel, Simd, dispatch};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cmp::Ordering;
use std::collections::HashSet;

/// Draws the tokens of one row: its settings, its random stream, the tokens it has seen.
///
/// Arithmetic is f64. The cost for a vocabulary of V is O(V): top-k and top-p select, and sort only what they keep.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: GenerationConfig,
    random: StdRng,
    seen: HashSet<u32>,
}

/// A token that may be drawn: id, logit over temperature (the largest is 0), unnormalised probability.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: u32,
    logit: f64,
    weight: f64,
}

impl Candidate {
    /// The more probable first; of equals the lower id.
    fn rank(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.id.cmp(&other.id))
    }
}

impl Sampler {
    /// A sampler for row `row` of a batch; see [`GenerationConfig::seed`].
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn new(config: &GenerationConfig, row: usize) -> Result<Self> {
        config.validate()?;
        let random = StdRng::seed_from_u64(config.seed.wrapping_add(row as u64));
        Ok(Self { config: config.clone(), random, seen: HashSet::new() })
    }

    /// Lets the repetition penalty know of `tokens`, as those of the prompt.
    pub fn observe(&mut self, tokens: &[u32]) {
        if self.config.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// Draws a token from the logits `[V]` (any float dtype, any device), and observes it.
    ///
    /// # Errors
    /// Logits of another rank, none, or among them NaN or +infinity; -infinity everywhere.
    pub fn sample(&mut self, logits: &Tensor) -> Result<u32> {
        if logits.rank() != 1 {
            return Err(Error::shape("sample: logits", "[V]", logits.dims()));
        }
        self.draw(&mut logits.to_dtype(DType::F64)?.to_vec1::<f64>()?)
    }

    /// [`Sampler::sample`] on logits that may be overwritten.
    pub(super) fn draw(&mut self, logits: &mut [f64]) -> Result<u32> {
        let penalty = self.config.repetition_penalty;
        for &id in &self.seen {
            if let Some(x) = logits.get_mut(id as usize) {
                *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            }
        }
        let best = argmax(logits)?;
        let id = if self.config.temperature == 0.0 {
            best
        } else {
            let candidates = candidates(&self.config, logits, logits[best as usize]);
            pick(&candidates, self.random.random::<f64>())
        };
        self.observe(&[id]);
        Ok(id)
    }
}

/// The largest logit's id, the lowest of equals.
pub(crate) fn argmax(logits: &[f64]) -> Result<u32> {
    let mut best = 0;
    for (id, &x) in logits.iter().enumerate() {
        if x.is_nan() || x == f64::INFINITY {
            return Err(Error::value(format!("logit of token {id}"), "a number", x));
        }
        if x > logits[best] {
            best = id;
        }
    }
    match logits.get(best) {
        Some(&x) if x > f64::NEG_INFINITY => Ok(best as u32),
        Some(_) => Err(Error::value("logits", "one above -infinity", "none")),
        None => Err(Error::value("logits", "at least one", 0)),
    }
}

/// The tokens the filters leave, by id; `largest` is the largest logit.
fn candidates(config: &GenerationConfig, logits: &[f64], largest: f64) -> Vec<Candidate> {
    let scaled: Vec<f64> = logits.iter().map(|x| (x - largest) / config.temperature).collect();
    let mut weights = vec![0.0; scaled.len()];
    dispatch(Exp { x: &scaled, y: &mut weights });
    let mut kept: Vec<Candidate> = (0u32..)
        .zip(scaled.into_iter().zip(weights))
        .map(|(id, (logit, weight))| Candidate { id, logit, weight })
        .collect();
    if let Some(k) = config.top_k
        && k < kept.len()
    {
        kept.select_nth_unstable_by(k - 1, Candidate::rank);
        kept.truncate(k);
    }
    if config.top_p < 1.0 {
        keep_mass(&mut kept, config.top_p);
    }
    if config.min_p > 0.0 {
        // the largest weight is e^0 = 1, and no filter drops it
        kept.retain(|c| c.weight >= config.min_p);
    }
    kept.sort_unstable_by_key(|c| c.id);
    kept
}

/// Keeps the fewest candidates of highest rank whose weights reach the share `mass` of the sum.
fn keep_mass(candidates: &mut Vec<Candidate>, mass: f64) {
    let target = mass * candidates.iter().map(|c| c.weight).sum::<f64>();
    let (mut sum, mut start, mut size) = (0.0, 0, 64);
    while start < candidates.len() {
        // ranks start..end, in order; the next round is larger, so that a flat distribution costs few
        let end = candidates.len().min(start + size);
        if end < candidates.len() {
            candidates[start..].select_nth_unstable_by(end - start - 1, Candidate::rank);
        }
        candidates[start..end].sort_unstable_by(Candidate::rank);
        for (i, c) in candidates.iter().enumerate().take(end).skip(start) {
            sum += c.weight;
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        (start, size) = (end, 4 * size);
    }
}

/// The candidate at the share `u` (from 0, below 1) of the cumulative weights.
fn pick(candidates: &[Candidate], u: f64) -> u32 {
    let mut left = u * candidates.iter().map(|c| c.weight).sum::<f64>();
    let mut last = 0;
    for c in candidates.iter().filter(|c| c.weight > 0.0) {
        if left < c.weight {
            return c.id;
        }
        left -= c.weight;
        last = c.id;
    }
    // rounding of the sum
    last
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

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
