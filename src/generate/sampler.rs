//! From the logits of one position to a token.

use super::GenerationConfig;
use super::candidates::{Candidates, largest};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashSet;

/// Draws the tokens of one row: its settings, its random stream, the tokens it has seen.
///
/// Arithmetic is f64. The cost for a vocabulary of V is O(V): top-k and top-p sort only what lies at their border.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: GenerationConfig,
    random: StdRng,
    seen: HashSet<u32>,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler for row `row` of a batch; see [`GenerationConfig::seed`].
    ///
    /// # Errors
    /// A setting outside its range.
    pub fn new(config: &GenerationConfig, row: usize) -> Result<Self> {
        config.validate()?;
        let random = StdRng::seed_from_u64(config.seed.wrapping_add(row as u64));
        Ok(Self { config: config.clone(), random, seen: HashSet::new(), candidates: Candidates::default() })
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
            self.candidates.find(&self.config, logits, logits[best as usize]);
            self.candidates.pick(self.random.random::<f64>())
        };
        self.observe(&[id]);
        Ok(id)
    }
}

/// The largest logit's id, the lowest of equals.
pub(crate) fn argmax(logits: &[f64]) -> Result<u32> {
    let number = |x: f64| x < f64::INFINITY;
    if logits.iter().filter(|x| !number(**x)).count() > 0
        && let Some((id, &x)) = logits.iter().enumerate().find(|(_, x)| !number(**x))
    {
        return Err(Error::value(format!("logit of token {id}"), "a number", x));
    }
    let largest = largest(logits);
    match logits.iter().position(|&x| x == largest) {
        Some(best) if largest > f64::NEG_INFINITY => Ok(best as u32),
        Some(_) => Err(Error::value("logits", "one above -infinity", "none")),
        None => Err(Error::value("logits", "at least one", 0)),
    }
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
