//! What a language model is made of.

use super::Family;
use super::mixer::MixerConfig;
use crate::layers::{MambaConfig, MlpConfig, NormConfig, Parameter, RetentionConfig, parameter::check_sizes};
use crate::ops::Activation;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The largest number of blocks a config may ask for.
pub(crate) const MAX_BLOCKS: usize = 65_536;

/// A language model: embedding, blocks, final norm, head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The checkpoint family: its names in files, and what [`LanguageModel::save`](super::LanguageModel::save) writes.
    #[serde(skip)]
    pub family: Family,
    /// Tokens with logits, `V`.
    pub vocab_size: usize,
    /// The embedding has `vocab_size` rows rounded up to a multiple of this; the rest are never used.
    pub vocab_multiple: usize,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// The blocks in order.
    pub blocks: Vec<BlockConfig>,
    /// The embedding is multiplied by this.
    pub embedding_scale: f64,
    /// A norm behind the embedding.
    pub embedding_norm: Option<NormConfig>,
    /// The norm before the head.
    pub final_norm: Option<NormConfig>,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// Whether there is a head for tokens: logits.
    #[serde(default = "yes")]
    pub lm_head: bool,
    /// Labels of sequences that a second head, `score.weight` `[labels, D]`, gives scores to; 0 without it.
    #[serde(default)]
    pub labels: usize,
    /// The residual stream of bf16 and f16 models is f32.
    pub residual_in_fp32: bool,
    /// Standard deviation of a fresh embedding.
    pub initializer_range: f64,
    /// Whether a fresh model scales its output projections down by the square root of the number of residual sums.
    pub rescale_residual: bool,
    /// Token ids with a meaning of their own.
    #[serde(skip)]
    pub tokens: SpecialTokens,
}

fn yes() -> bool {
    true
}

/// Token ids that a checkpoint's config names; they change no logit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Any of these ends a text.
    pub eos: Vec<u32>,
    /// Fills rows up.
    pub pad: Option<u32>,
}

/// One block: `x + mixer(norm(x))`, then with an MLP `x + mlp(mlp.norm(x))`; see [`Residual`] for other sums.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// The norm of the mixer.
    pub norm: NormConfig,
    /// The mixer.
    pub mixer: MixerConfig,
    /// The MLP, if the block has one.
    pub mlp: Option<FeedForwardConfig>,
    /// How the two are added to the stream.
    pub residual: Residual,
}

/// The MLP of a block and its norm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedForwardConfig {
    /// The norm.
    pub norm: NormConfig,
    /// The layer.
    pub layer: MlpConfig,
}

/// How a block adds a layer `f` to the stream `x`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Residual {
    /// The stream is multiplied by this: 1, but for deepnorm.
    pub scale: f64,
    /// `norm(scale x + f(x))` in the place of `scale x + f(norm(x))`.
    pub post_norm: bool,
}

impl Default for Residual {
    fn default() -> Self {
        Self { scale: 1.0, post_norm: false }
    }
}

impl ModelConfig {
    /// A model of `blocks` with nothing out of the ordinary: RMS norm before the head, tied embedding, f32 stream.
    pub fn new(family: Family, vocab_size: usize, hidden_size: usize, blocks: Vec<BlockConfig>) -> Self {
        Self {
            family,
            vocab_size,
            vocab_multiple: 1,
            hidden_size,
            blocks,
            embedding_scale: 1.0,
            embedding_norm: None,
            final_norm: Some(NormConfig::Rms { eps: 1e-5 }),
            tie_embeddings: true,
            lm_head: true,
            labels: 0,
            residual_in_fp32: true,
            initializer_range: 0.02,
            rescale_residual: true,
            tokens: SpecialTokens::default(),
        }
    }

    /// A Mamba of the published shape, in the layout of transformers: 16 states, 4 taps, twice the width inside, RMS
    /// norms, the head tied to the embedding.
    pub fn mamba(hidden_size: usize, layers: usize, vocab_size: usize) -> Self {
        let mixer = MixerConfig::Mamba(MambaConfig::new(hidden_size));
        let block = BlockConfig::new(NormConfig::Rms { eps: 1e-5 }, mixer, None);
        Self::new(Family::Mamba, vocab_size, hidden_size, vec![block; layers])
    }

    /// A RetNet as torchscale has it: values and feed-forward layers twice as wide as the model, heads of 64 channels
    /// (as many as fit, at least one), gated by SiLU, RMS norms, a head of its own.
    pub fn retnet(hidden_size: usize, layers: usize, vocab_size: usize) -> Self {
        let norm = NormConfig::Rms { eps: 1e-6 };
        let heads = (1..=hidden_size.div_ceil(64)).rev().find(|&heads| hidden_size.is_multiple_of(2 * heads));
        let mixer = RetentionConfig::new(hidden_size, heads.unwrap_or(1));
        let layer = MlpConfig::gated(hidden_size, hidden_size.saturating_mul(2), Activation::Silu);
        let mlp = Some(FeedForwardConfig { norm, layer });
        let block = BlockConfig::new(norm, MixerConfig::Retention(mixer), mlp);
        Self {
            final_norm: Some(norm),
            tie_embeddings: false,
            initializer_range: (hidden_size.max(1) as f64).powf(-0.5),
            rescale_residual: false,
            ..Self::new(Family::RetNetTorchscale, vocab_size, hidden_size, vec![block; layers])
        }
    }

    /// Rows of the embedding: `vocab_size` rounded up.
    pub fn vocab_rows(&self) -> usize {
        self.vocab_size.checked_next_multiple_of(self.vocab_multiple.max(1)).unwrap_or(usize::MAX)
    }

    /// Checks that the parts fit together.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, u32::MAX as usize),
            ("vocab_multiple", self.vocab_multiple, u32::MAX as usize),
            ("hidden_size", self.hidden_size, u32::MAX as usize),
            ("blocks", self.blocks.len(), MAX_BLOCKS),
        ];
        for (name, size, most) in sizes {
            if size == 0 || size > most {
                return Err(Error::value(format!("model: {name}"), format!("1 to {most}"), size));
            }
        }
        if !(self.initializer_range >= 0.0 && self.initializer_range.is_finite()) {
            let expected = "a finite number of at least 0";
            return Err(Error::value("model: initializer_range", expected, self.initializer_range));
        }
        for (name, norm) in [("embedding_norm", &self.embedding_norm), ("final_norm", &self.final_norm)] {
            norm.as_ref().map_or(Ok(()), |norm| norm.validate(name))?;
        }
        if !self.lm_head && self.labels == 0 {
            return Err(Error::value("model: lm_head", "a head for tokens or for labels", "neither"));
        }
        if self.labels > u32::MAX as usize {
            return Err(Error::value("model: labels", "less than 2^32", self.labels));
        }
        if !self.embedding_scale.is_finite() {
            return Err(Error::value("model: embedding_scale", "a finite number", self.embedding_scale));
        }
        for (i, block) in self.blocks.iter().enumerate() {
            block.validate(i, self.hidden_size)?;
        }
        check_sizes(&self.parameters())
    }

    /// All parameters of the model, in order, under this crate's own names: those of transformers' `mamba`. A
    /// checkpoint's names come from its [`Family`].
    pub fn parameters(&self) -> Vec<Parameter> {
        let rows = self.vocab_rows();
        let mut all = vec![Parameter::new("backbone.embeddings.weight", &[rows, self.hidden_size])];
        for (i, block) in self.blocks.iter().enumerate() {
            all.extend(block.parameters(self.hidden_size).into_iter().map(|p| p.under(&block_name(i))));
        }
        let norms = [(EMBEDDING_NORM, &self.embedding_norm), (FINAL_NORM, &self.final_norm)];
        for (name, norm) in norms {
            let parameters = norm.iter().flat_map(|norm| norm.parameters(self.hidden_size));
            all.extend(parameters.map(|p| p.under(name)));
        }
        if self.lm_head && !self.tie_embeddings {
            all.push(Parameter::new("lm_head.weight", &[rows, self.hidden_size]));
        }
        if self.labels > 0 {
            all.push(Parameter::new(SCORE, &[self.labels, self.hidden_size]));
        }
        all
    }

    /// The number of weights.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().filter_map(Parameter::elements).sum()
    }
}

impl BlockConfig {
    /// A block with plain sums.
    pub fn new(norm: NormConfig, mixer: MixerConfig, mlp: Option<FeedForwardConfig>) -> Self {
        Self { norm, mixer, mlp, residual: Residual::default() }
    }

    /// Checks block `i` of a model of width `hidden_size`.
    fn validate(&self, i: usize, hidden_size: usize) -> Result<()> {
        self.norm.validate(&format!("block {i}: norm"))?;
        self.mixer.validate()?;
        let mut widths = vec![("d_model", self.mixer.width())];
        if let Some(mlp) = &self.mlp {
            mlp.norm.validate(&format!("block {i}: mlp.norm"))?;
            mlp.layer.validate()?;
            widths.push(("mlp.d_model", mlp.layer.d_model));
        }
        for (name, width) in widths {
            if width != hidden_size {
                let expected = format!("hidden_size = {hidden_size}");
                return Err(Error::value(format!("block {i}: {name}"), expected, width));
            }
        }
        if !self.residual.scale.is_finite() {
            return Err(Error::value(
                format!("block {i}: residual.scale"),
                "a finite number",
                self.residual.scale,
            ));
        }
        Ok(())
    }

    /// The parameters of one block in a model of width `hidden_size`.
    fn parameters(&self, hidden_size: usize) -> Vec<Parameter> {
        let under = |prefix: &'static str, all: Vec<Parameter>| all.into_iter().map(|p| p.under(prefix));
        let mut all: Vec<Parameter> = under("norm", self.norm.parameters(hidden_size)).collect();
        all.extend(under("mixer", self.mixer.parameters()));
        if let Some(mlp) = &self.mlp {
            all.extend(under("norm2", mlp.norm.parameters(hidden_size)));
            all.extend(under("mlp", mlp.layer.parameters()));
        }
        all
    }
}

/// The prefixes of the norms outside the blocks.
pub(crate) const EMBEDDING_NORM: &str = "backbone.embedding_norm";
pub(crate) const FINAL_NORM: &str = "backbone.norm_f";
/// The head for labels.
pub(crate) const SCORE: &str = "score.weight";

/// The prefix of block `i`.
pub(crate) fn block_name(i: usize) -> String {
    format!("backbone.layers.{i}")
}
