//! What a language model is made of.

use super::Family;
use crate::layers::{GatedMlpConfig, MambaConfig, NormConfig, Parameter, parameter::check_sizes};
use crate::{Error, Result};

/// The largest number of blocks a config may ask for.
pub(crate) const MAX_BLOCKS: usize = 65_536;

/// A language model: embedding, blocks, final norm, head.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The checkpoint family: its names in files, and what [`LanguageModel::save`](super::LanguageModel::save) writes.
    pub family: Family,
    /// Tokens with logits, `V`.
    pub vocab_size: usize,
    /// The embedding has `vocab_size` rows rounded up to a multiple of this; the rest are never used.
    pub vocab_multiple: usize,
    /// Width of the residual stream, `D`.
    pub hidden_size: usize,
    /// The blocks in order.
    pub blocks: Vec<BlockConfig>,
    /// The norm before the head.
    pub final_norm: NormConfig,
    /// The head is the embedding.
    pub tie_embeddings: bool,
    /// The residual stream of bf16 and f16 models is f32.
    pub residual_in_fp32: bool,
    /// Standard deviation of a fresh embedding.
    pub initializer_range: f64,
    /// Whether a fresh model scales its output projections down by the square root of the number of residual sums.
    pub rescale_residual: bool,
    /// Token ids with a meaning of their own.
    pub tokens: SpecialTokens,
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

/// One block: `x + mixer(norm(x))`, then with an MLP `x + mlp(mlp.norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockConfig {
    /// The norm before the mixer.
    pub norm: NormConfig,
    /// The mixer.
    pub mixer: MixerConfig,
    /// The MLP, if the block has one.
    pub mlp: Option<MlpConfig>,
}

/// The MLP of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpConfig {
    /// The norm before it.
    pub norm: NormConfig,
    /// Its inner width.
    pub d_intermediate: usize,
}

/// What mixes along the sequence.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MixerConfig {
    /// [`layers::Mamba`](crate::layers::Mamba)
    Mamba(MambaConfig),
}

impl MixerConfig {
    /// Its parameters by upstream name.
    pub fn parameters(&self) -> Vec<Parameter> {
        match self {
            Self::Mamba(config) => config.parameters(),
        }
    }

    fn width(&self) -> usize {
        match self {
            Self::Mamba(config) => config.d_model,
        }
    }

    fn validate(&self) -> Result<()> {
        match self {
            Self::Mamba(config) => config.validate(),
        }
    }
}

impl MlpConfig {
    /// The layer's sizes in a model of width `hidden_size`.
    pub(crate) fn layer(&self, hidden_size: usize) -> GatedMlpConfig {
        GatedMlpConfig { d_model: hidden_size, d_intermediate: self.d_intermediate }
    }
}

impl ModelConfig {
    /// A Mamba of the published shape, in the layout of transformers: 16 states, 4 taps, twice the width inside, RMS
    /// norms, the head tied to the embedding.
    pub fn mamba(hidden_size: usize, layers: usize, vocab_size: usize) -> Self {
        let norm = NormConfig::Rms { eps: 1e-5 };
        let mixer = MixerConfig::Mamba(MambaConfig::new(hidden_size));
        Self {
            family: Family::Mamba,
            vocab_size,
            vocab_multiple: 1,
            hidden_size,
            blocks: vec![BlockConfig { norm, mixer, mlp: None }; layers],
            final_norm: norm,
            tie_embeddings: true,
            residual_in_fp32: true,
            initializer_range: 0.02,
            rescale_residual: true,
            tokens: SpecialTokens::default(),
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
        check_norm("final_norm", &self.final_norm)?;
        for (i, block) in self.blocks.iter().enumerate() {
            check_norm(&format!("block {i}: norm"), &block.norm)?;
            block.mixer.validate()?;
            if block.mixer.width() != self.hidden_size {
                let expected = format!("hidden_size = {}", self.hidden_size);
                return Err(Error::value(format!("block {i}: d_model"), expected, block.mixer.width()));
            }
            if let Some(mlp) = &block.mlp {
                check_norm(&format!("block {i}: mlp.norm"), &mlp.norm)?;
                if mlp.d_intermediate == 0 {
                    return Err(Error::value(format!("block {i}: d_intermediate"), "at least 1", 0));
                }
            }
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
        let norm = self.final_norm.parameters(self.hidden_size);
        all.extend(norm.into_iter().map(|p| p.under("backbone.norm_f")));
        if !self.tie_embeddings {
            all.push(Parameter::new("lm_head.weight", &[rows, self.hidden_size]));
        }
        all
    }

    /// The number of weights.
    pub fn parameter_count(&self) -> usize {
        self.parameters().iter().filter_map(Parameter::elements).sum()
    }
}

impl BlockConfig {
    /// The parameters of one block in a model of width `hidden_size`.
    fn parameters(&self, hidden_size: usize) -> Vec<Parameter> {
        let under = |prefix: &'static str, all: Vec<Parameter>| all.into_iter().map(|p| p.under(prefix));
        let mut all: Vec<Parameter> = under("norm", self.norm.parameters(hidden_size)).collect();
        all.extend(under("mixer", self.mixer.parameters()));
        if let Some(mlp) = &self.mlp {
            all.extend(under("norm2", mlp.norm.parameters(hidden_size)));
            all.extend(under("mlp", mlp.layer(hidden_size).parameters()));
        }
        all
    }
}

/// The prefix of block `i`.
pub(crate) fn block_name(i: usize) -> String {
    format!("backbone.layers.{i}")
}

fn check_norm(name: &str, norm: &NormConfig) -> Result<()> {
    let (NormConfig::Rms { eps } | NormConfig::Layer { eps }) = *norm;
    if eps >= 0.0 && eps.is_finite() {
        return Ok(());
    }
    Err(Error::value(format!("{name}: eps"), "a finite number of at least 0", eps))
}
