//! A text, cut into what is trained on and what the model is judged by.

use super::cli::Outcome;
use super::dna;
use flate2::{Compression, write::GzEncoder};
use std::io::Write;
use std::path::Path;
use subquadratic::train::{Order, TextBatches};

/// The King James Bible; see `examples/data/README.md`.
const BUNDLED: &[u8] = include_bytes!("../data/king_james.txt");

/// Rows and length of the batches that validation is read in.
const ROWS: usize = 16;
const LENGTH: usize = 256;

/// The bytes of a text. The last twentieth is kept for validation.
pub struct Text {
    bytes: Vec<u8>,
    /// Where validation begins.
    split: usize,
}

impl Text {
    /// Reads `file`, or the letters of `fasta` as tokens, or takes the bundled text.
    pub fn read(file: Option<&Path>, fasta: Option<&Path>) -> Outcome<Self> {
        let bytes = match file {
            _ if fasta.is_some() => fasta.map(dna::read).transpose()?.unwrap_or_default(),
            None => BUNDLED.to_vec(),
            Some(file) => std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?,
        };
        let name = fasta.or(file).map_or("the bundled text".to_string(), |file| file.display().to_string());
        // whole batches, so that every byte of the part is predicted once
        let part = bytes.len() / 20;
        let validation = if part >= ROWS * LENGTH { part - part % (ROWS * LENGTH) } else { part };
        if validation == 0 {
            return Err(format!("{name}: expected at least 20 bytes of text, got {}", bytes.len()).into());
        }
        Ok(Self { split: bytes.len() - validation, bytes })
    }

    /// Bytes of the whole text.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What is trained on.
    pub fn training(&self) -> &[u8] {
        &self.bytes[..self.split]
    }

    /// What the model never sees in training.
    pub fn validation(&self) -> &[u8] {
        &self.bytes[self.split..]
    }

    /// The first `limit` bytes of the validation part (about; `None`: all, exactly) as batches. The first byte is
    /// predicted from the one before it. `short`: no row is longer than a few hundred tokens, whatever the text.
    pub fn validation_batches(&self, limit: Option<usize>, short: bool) -> Outcome<TextBatches> {
        let whole = self.validation().len();
        let block = ROWS * LENGTH;
        let (rows, length, bytes) = match limit.unwrap_or(whole).min(whole) {
            bytes if whole >= block => (ROWS, LENGTH, (bytes / block).max(1) * block),
            bytes if short && bytes > LENGTH => (1, LENGTH, bytes / LENGTH * LENGTH),
            bytes => (1, bytes, bytes),
        };
        let part = &self.bytes[self.split - 1..self.split + bytes];
        Ok(TextBatches::bytes(part, rows, length, Order::Sequential)?)
    }

    /// What `gzip -9` needs for the validation part, in bits per byte.
    pub fn gzip_bits_per_byte(&self) -> Outcome<f64> {
        let part = self.validation();
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(part)?;
        Ok(8.0 * encoder.finish()?.len() as f64 / part.len() as f64)
    }
}
