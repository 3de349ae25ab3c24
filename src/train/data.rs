//! Text as batches of windows.

use super::Batch;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

/// In which order the windows of a text come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Each row reads its own part of the text from beginning to end, window after window, and every batch but the
    /// first of an epoch carries the state of the one before: truncated back-propagation through time.
    Sequential,
    /// Windows from all over the text, each starting afresh; another cut and another order every epoch.
    Shuffled {
        /// The same seed gives the same order.
        seed: u64,
    },
}

/// Where a [`TextBatches`] stands: all that a checkpoint has to keep of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the text that are done.
    pub epoch: u64,
    /// Batches of this pass that are done.
    pub batch: u64,
}

/// Cuts a text into batches `[B, L]` of inputs and the tokens that follow them.
#[derive(Clone, Debug)]
pub struct TextBatches {
    tokens: Vec<u32>,
    rows: usize,
    length: usize,
    order: Order,
    position: Position,
    /// The first tokens of this epoch's windows, `rows` a batch.
    windows: Vec<usize>,
}

impl TextBatches {
    /// Batches of `rows` windows of `length` tokens.
    ///
    /// # Errors
    /// No rows, no length, or a text too short for one batch.
    pub fn new(tokens: Vec<u32>, rows: usize, length: usize, order: Order) -> Result<Self> {
        if rows == 0 || length == 0 {
            return Err(Error::value("text batches: rows and length", "at least 1", rows.min(length)));
        }
        // a shuffled epoch may begin up to length - 1 tokens late
        let late = if order == Order::Sequential { 0 } else { length - 1 };
        let least = rows.saturating_mul(length).saturating_add(1 + late);
        if tokens.len() < least {
            let name = format!("text for {rows} rows of {length} tokens");
            return Err(Error::value(name, format!("at least {least} tokens"), tokens.len()));
        }
        let mut batches =
            Self { tokens, rows, length, order, position: Position::default(), windows: vec![] };
        batches.windows = batches.windows_of(0);
        Ok(batches)
    }

    /// The bytes of a text as tokens: a vocabulary of 256.
    ///
    /// # Errors
    /// As [`TextBatches::new`].
    pub fn bytes(text: &[u8], rows: usize, length: usize, order: Order) -> Result<Self> {
        Self::new(text.iter().copied().map(u32::from).collect(), rows, length, order)
    }

    /// Where it stands.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Goes on from `position`: the same text, sizes and order give the same batches as if never interrupted.
    ///
    /// # Errors
    /// A position beyond the epoch.
    pub fn seek(&mut self, position: Position) -> Result<()> {
        let windows = self.windows_of(position.epoch);
        let batches = (windows.len() / self.rows) as u64;
        if position.batch > batches {
            return Err(Error::value("text position: batch", format!("at most {batches}"), position.batch));
        }
        (self.position, self.windows) = (position, windows);
        Ok(())
    }

    /// Batches in this pass over the text.
    pub fn batches_per_epoch(&self) -> usize {
        self.windows.len() / self.rows
    }

    /// The next batch, forever: after an epoch comes another.
    ///
    /// # Errors
    /// Those of candle.
    pub fn next_batch(&mut self, device: &Device) -> Result<Batch> {
        if self.position.batch as usize >= self.batches_per_epoch() {
            let epoch = self.position.epoch + 1;
            (self.position, self.windows) = (Position { epoch, batch: 0 }, self.windows_of(epoch));
        }
        let first = self.position.batch as usize * self.rows;
        let starts = &self.windows[first..first + self.rows];
        let cut = |shift: usize| {
            let ids =
                starts.iter().flat_map(|&start| &self.tokens[start + shift..start + shift + self.length]);
            Tensor::from_vec(ids.copied().collect::<Vec<_>>(), (self.rows, self.length), device)
        };
        let mut batch = Batch::new(cut(0)?, cut(1)?);
        batch.carry = self.order == Order::Sequential && self.position.batch > 0;
        self.position.batch += 1;
        Ok(batch)
    }

    fn windows_of(&self, epoch: u64) -> Vec<usize> {
        match self.order {
            Order::Sequential => {
                // the last token is a target only
                let part = (self.tokens.len() - 1) / self.rows;
                let window = |i: usize| (0..self.rows).map(move |row| row * part + i * self.length);
                (0..part / self.length).flat_map(window).collect()
            }
            Order::Shuffled { seed } => {
                let mut random = StdRng::seed_from_u64(epoch_seed(seed, epoch));
                let late = random.random_range(0..self.length);
                let count = (self.tokens.len() - 1 - late) / self.length;
                let mut windows: Vec<usize> = (0..count).map(|i| late + i * self.length).collect();
                windows.shuffle(&mut random);
                windows
            }
        }
    }
}

/// Another seed for every epoch; neighbouring seeds share none of them (a step of the splitmix64 generator).
fn epoch_seed(seed: u64, epoch: u64) -> u64 {
    let mut x = seed.wrapping_add(epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
