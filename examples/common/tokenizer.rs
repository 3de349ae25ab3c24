//! From text to token ids and back, as they come.

use super::cli::Outcome;
use super::dna;
use std::path::Path;
use subquadratic::models::LanguageModel;

/// How a model reads and writes text.
pub enum Tokenizer {
    /// A token is a byte.
    Bytes,
    /// A token is a letter of DNA, or one of HyenaDNA's special tokens.
    Dna,
    /// What the model's directory holds as `tokenizer.json`.
    Trained(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// The tokenizer of the model in `directory`: its `tokenizer.json`, bytes for a vocabulary of 256, letters for
    /// HyenaDNA's.
    pub fn of(directory: &Path, model: &LanguageModel) -> Outcome<Self> {
        let file = directory.join("tokenizer.json");
        if file.is_file() {
            let tokenizer = tokenizers::Tokenizer::from_file(&file);
            return Ok(Self::Trained(
                tokenizer.map_err(|error| format!("{}: {error}", file.display()))?.into(),
            ));
        }
        match model.config().vocab_size {
            256 => Ok(Self::Bytes),
            dna::VOCABULARY => Ok(Self::Dna),
            size => Err(format!("{}: expected this file for a vocabulary of {size}", file.display()).into()),
        }
    }

    /// The token ids of a text.
    pub fn encode(&self, text: &str) -> Outcome<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Dna => Ok(text.bytes().map(|letter| dna::token(letter).0.into()).collect()),
            Self::Trained(tokenizer) => Ok(tokenizer.encode(text, true)?.get_ids().to_vec()),
        }
    }

    /// A decoder of tokens that come one by one: gives text as soon as it is whole characters.
    pub fn decoder(&self) -> Box<dyn FnMut(u32) -> Outcome<String> + '_> {
        match self {
            Self::Bytes => {
                let mut pending = vec![];
                Box::new(move |id| {
                    pending.push(id as u8);
                    let unfinished =
                        std::str::from_utf8(&pending).is_err_and(|error| error.error_len().is_none());
                    let whole = if unfinished { vec![] } else { std::mem::take(&mut pending) };
                    Ok(String::from_utf8_lossy(&whole).into_owned())
                })
            }
            Self::Dna => Box::new(|id| Ok(dna::text(id))),
            Self::Trained(tokenizer) => {
                let mut stream = tokenizer.decode_stream(false);
                Box::new(move |id| Ok(stream.step(id)?.unwrap_or_default()))
            }
        }
    }
}
