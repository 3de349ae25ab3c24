//! What to generate and how to draw it.

use crate::{Error, Result};

/// The settings of a generation. The defaults draw from the model's own distribution, unfiltered.
///
/// A token is drawn as follows, each filter seeing what the one before it left, renormalised:
/// repetition penalty, temperature, top-k, top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// The most tokens to generate for each prompt. Default 128.
    pub max_tokens: usize,
    /// Logits are divided by this; 0 takes the most probable token (the lowest id of equals) and ignores the filters.
    /// Default 1.
    pub temperature: f64,
    /// Keep the `k` most probable tokens (of equals at the border those with the lowest ids). Default: all.
    pub top_k: Option<usize>,
    /// Keep the fewest most probable tokens whose probabilities reach this sum (at least one). Default 1: all.
    pub top_p: f64,
    /// Keep the tokens with at least this share of the largest probability. Default 0: all.
    pub min_p: f64,
    /// The logits of tokens in the prompt or generated so far are divided by this where positive, multiplied where
    /// negative, as transformers does. Default 1: none.
    pub repetition_penalty: f64,
    /// Tokens that end a row; the stop token is the row's last. Default: none.
    pub stop_tokens: Vec<u32>,
    /// Row `r` of a batch draws from a random stream of its own, seeded with `seed + r`: it gets the same tokens as the
    /// same prompt alone with the seed `seed + r`. Default 0.
    pub seed: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_tokens: 128,
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            stop_tokens: vec![],
            seed: 0,
        }
    }
}

impl GenerationConfig {
    /// The most probable token each time, at most `max_tokens` of them.
    pub fn greedy(max_tokens: usize) -> Self {
        Self { max_tokens, temperature: 0.0, ..Self::default() }
    }

    /// Whether the tokens are those of the largest logits as they come.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// The first setting outside its range.
    pub fn validate(&self) -> Result<()> {
        let check = |name: &str, value: f64, fits: bool, expected: &str| {
            if fits { Ok(()) } else { Err(Error::value(format!("generation: {name}"), expected, value)) }
        };
        let t = self.temperature;
        check("temperature", t, t >= 0.0 && t.is_finite(), "a finite number, at least 0")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0, at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        let penalty = self.repetition_penalty;
        check(
            "repetition_penalty",
            penalty,
            penalty > 0.0 && penalty.is_finite(),
            "a finite number above 0 (1: none)",
        )?;
        match self.top_k {
            Some(0) => Err(Error::value("generation: top_k", "at least 1, or none for all tokens", 0)),
            _ => Ok(()),
        }
    }
}
