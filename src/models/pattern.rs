//! Hybrids by a pattern of words.

use super::config::{BlockConfig, FeedForwardConfig, MAX_BLOCKS, ModelConfig};
use super::{Family, MixerConfig};
use crate::layers::{AttentionConfig, MambaConfig, MlpConfig, ModalHyenaConfig, NormConfig, RetentionConfig};
use crate::ops::Activation;
use crate::{Error, Result};

/// The widest head of attention that a pattern gives.
const HEAD: usize = 64;
/// The inner width of an MLP is a multiple of this.
const MULTIPLE: usize = 64;

impl ModelConfig {
    /// A hybrid of one block a word, `mamba`, `hyena` (a gated modal convolution), `retention` or `attention`; `mamba*7` is
    /// seven of them. Every block has an RMS norm and a gated MLP of 8/3 the width.
    ///
    /// ```
    /// use subquadratic::models::ModelConfig;
    /// let config = ModelConfig::striped("mamba*7 attention", 256, 512)?;
    /// assert_eq!(config.blocks.len(), 8);
    /// # Ok::<(), subquadratic::Error>(())
    /// ```
    ///
    /// The blocks may be changed one by one afterwards. Such a model is saved in this crate's own layout.
    ///
    /// # Errors
    /// No words, a word that is none of these, or a count that is no number of at least 1.
    pub fn striped(pattern: &str, hidden_size: usize, vocab_size: usize) -> Result<Self> {
        let mut blocks = vec![];
        for word in pattern.split_whitespace() {
            let (name, count) = word.split_once('*').unwrap_or((word, "1"));
            let wrong = |expected: &str| Error::value("pattern", expected, word);
            let count = count.parse().ok().filter(|&n| n > 0 && n <= MAX_BLOCKS);
            let count: usize = count.ok_or_else(|| wrong("a number of blocks of at least 1 after `*`"))?;
            let mixer = match name {
                "mamba" => MixerConfig::Mamba(MambaConfig::new(hidden_size)),
                "hyena" => MixerConfig::ModalHyena(ModalHyenaConfig::new(hidden_size)),
                "retention" => MixerConfig::Retention(RetentionConfig::new(hidden_size, heads(hidden_size))),
                "attention" => MixerConfig::Attention(AttentionConfig::new(hidden_size, heads(hidden_size))),
                _ => return Err(wrong("words of mamba, hyena, retention and attention")),
            };
            let norm = NormConfig::Rms { eps: 1e-5 };
            let inner = (hidden_size.saturating_mul(8) / 3).checked_next_multiple_of(MULTIPLE);
            let layer = MlpConfig::gated(hidden_size, inner.unwrap_or(usize::MAX), Activation::Silu);
            let block = BlockConfig::new(norm, mixer, Some(FeedForwardConfig { norm, layer }));
            if blocks.len() + count > MAX_BLOCKS {
                return Err(wrong(&format!("at most {MAX_BLOCKS} blocks")));
            }
            blocks.extend(std::iter::repeat_n(block, count));
        }
        if blocks.is_empty() {
            return Err(Error::value("pattern", "words of mamba, hyena, retention and attention", "none"));
        }
        Ok(Self::new(Family::Hybrid, vocab_size, hidden_size, blocks))
    }
}

/// Heads of at most [`HEAD`] channels, an even number of them.
fn heads(hidden_size: usize) -> usize {
    let fits = |heads: &usize| hidden_size.is_multiple_of(*heads) && (hidden_size / heads).is_multiple_of(2);
    (hidden_size.div_ceil(HEAD).max(1)..=hidden_size).find(fits).unwrap_or(1)
}
