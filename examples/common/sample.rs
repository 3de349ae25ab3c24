//! Text from a model, streamed to standard output.

use super::cli::{Outcome, Place};
use super::form::set_form;
use super::tokenizer::Tokenizer;
use candle_core::{DType, Device, Tensor};
use clap::Args;
use std::io::Write;
use std::path::Path;
use subquadratic::generate::{Generation, GenerationConfig};
use subquadratic::models::{Form, LanguageModel};
use subquadratic::train::latest_checkpoint;

/// How to draw tokens.
#[derive(Args, Clone, Debug)]
pub struct Sampling {
    /// The most tokens to generate
    #[arg(long, default_value_t = 400, help_heading = "Generation")]
    max_tokens: usize,
    /// Logits are divided by it; 0 takes the most probable token
    #[arg(long, default_value_t = 0.8, help_heading = "Generation")]
    temperature: f64,
    /// Keep the K most probable tokens
    #[arg(long, value_name = "K", help_heading = "Generation")]
    top_k: Option<usize>,
    /// Keep the most probable tokens that together reach the probability P
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Generation")]
    top_p: f64,
    /// Keep the tokens with at least the share P of the largest probability
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Generation")]
    min_p: f64,
    /// Divides the logits of tokens that came before (where positive; else multiplies)
    #[arg(long, value_name = "R", default_value_t = 1.0, help_heading = "Generation")]
    repetition_penalty: f64,
}

impl Sampling {
    fn config(&self, seed: u64, model: &LanguageModel) -> GenerationConfig {
        GenerationConfig {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            stop_tokens: model.config().tokens.eos.clone(),
            seed,
        }
    }

    /// Refuses settings outside their range, before any work is done.
    pub fn check(&self) -> Outcome<()> {
        let Self { max_tokens, temperature, top_k, top_p, min_p, repetition_penalty } = *self;
        let config = GenerationConfig {
            max_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            ..Default::default()
        };
        Ok(config.validate()?)
    }
}

/// Loads the model in `directory` (or the newest checkpoint there) and continues `prompt`, or tells the scores of its
/// labels.
pub fn from_checkpoint(
    directory: &Path,
    prompt: &str,
    seed: u64,
    form: Form,
    sampling: &Sampling,
    place: Place,
) -> Outcome<()> {
    let directory = match latest_checkpoint(directory)? {
        Some(checkpoint) => checkpoint,
        None => directory.to_path_buf(),
    };
    let mut model = place.load(&directory, &place.device()?)?;
    set_form(&mut model, form)?;
    let tokenizer = Tokenizer::of(&directory, &model)?;
    if model.config().labels > 0 {
        let ids = Tensor::new(vec![tokenizer.encode(prompt)?], &Device::Cpu)?;
        let scores = model.classify(&ids)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        println!("scores of the labels: {scores:.4?}");
    }
    if !model.config().lm_head {
        return Ok(());
    }
    stream(&model, &tokenizer, prompt, seed, sampling)
}

/// Writes `prompt` and what the model makes of it.
pub fn stream(
    model: &LanguageModel,
    tokenizer: &Tokenizer,
    prompt: &str,
    seed: u64,
    sampling: &Sampling,
) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    let mut decode = tokenizer.decoder();
    let generation = Generation::new(model, &[tokenizer.encode(prompt)?], sampling.config(seed, model))?;
    write!(out, "{prompt}")?;
    for step in generation {
        for token in step? {
            write!(out, "{}", decode(token.id)?)?;
        }
        out.flush()?;
    }
    Ok(writeln!(out)?)
}
