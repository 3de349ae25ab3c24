//! How the rows of a batch are cut into sequences: packing, resets and padding.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// A stretch of tokens of one row that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Whether a new sequence begins here: the state carried so far (the initial state included) is forgotten.
    pub fresh: bool,
}

/// How the `[B, L]` tokens of a batch are cut into sequences.
///
/// A row is a list of [`Run`]s in order. Tokens in no run are padding: no state changes there, outputs are zero and
/// nothing receives a gradient. The final state of a row is the state after its last run, so that a padded row ends
/// in the same state as the bare one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    rows: Vec<Vec<Run>>,
    length: usize,
}

/// Marks of [`Segments::marks`]: the token carries the state on.
pub const CONTINUE: u8 = 0;
/// Marks of [`Segments::marks`]: the token begins a new sequence.
pub const START: u8 = 1;
/// Marks of [`Segments::marks`]: the token is padding.
pub const PAD: u8 = 2;

impl Segments {
    /// Rows of whole sequences packed one after another: row `b` holds sequences of `lengths[b]` tokens (a zero is an
    /// empty sequence), every one of them starting afresh; what is left of the `length` tokens is padding.
    ///
    /// # Errors
    /// A row whose lengths add up to more than `length`.
    pub fn packed(lengths: &[Vec<usize>], length: usize) -> Result<Self> {
        let row = |lengths: &Vec<usize>| {
            let mut start = 0usize;
            let cut = |&n: &usize| {
                let tokens = start..start.saturating_add(n);
                start = tokens.end;
                Run { tokens, fresh: true }
            };
            let runs = lengths.iter().filter(|&&n| n > 0).map(cut).collect();
            fits("packed lengths", start, length)?;
            Ok(runs)
        };
        Ok(Self { rows: lengths.iter().map(row).collect::<Result<_>>()?, length })
    }

    /// One sequence a row, `lengths[b]` tokens at its end, padding before; it carries the row's state on.
    ///
    /// # Errors
    /// A length above `length`.
    pub fn left_padded(lengths: &[usize], length: usize) -> Result<Self> {
        Self::one_run(lengths, length, |n| length - n..length)
    }

    /// One sequence a row, `lengths[b]` tokens at its start, padding behind; it carries the row's state on.
    ///
    /// # Errors
    /// A length above `length`.
    pub fn right_padded(lengths: &[usize], length: usize) -> Result<Self> {
        Self::one_run(lengths, length, |n| 0..n)
    }

    fn one_run(lengths: &[usize], length: usize, tokens: impl Fn(usize) -> Range<usize>) -> Result<Self> {
        let row = |&n: &usize| {
            fits("sequence length", n, length)?;
            Ok(if n == 0 { vec![] } else { vec![Run { tokens: tokens(n), fresh: false }] })
        };
        Ok(Self { rows: lengths.iter().map(row).collect::<Result<_>>()?, length })
    }

    /// From a mark per token: `[B, L]` of u8, [`CONTINUE`], [`START`] or [`PAD`].
    ///
    /// # Errors
    /// Another dtype, rank or mark.
    pub fn from_marks(marks: &Tensor) -> Result<Self> {
        if marks.dtype() != DType::U8 {
            return Err(Error::dtype("segment marks", "u8", marks.dtype()));
        }
        if marks.rank() != 2 {
            return Err(Error::shape("segment marks", "[B, L]", marks.dims()));
        }
        let row = |marks: &Vec<u8>| {
            let mut runs: Vec<Run> = vec![];
            for (t, &mark) in marks.iter().enumerate() {
                match (mark, runs.last_mut()) {
                    (CONTINUE, Some(run)) if run.tokens.end == t => run.tokens.end += 1,
                    (CONTINUE | START, _) => runs.push(Run { tokens: t..t + 1, fresh: mark == START }),
                    (PAD, _) => {}
                    _ => return Err(Error::value("segment mark", "0, 1 or 2", mark)),
                }
            }
            Ok(runs)
        };
        let rows = marks.to_vec2::<u8>()?.iter().map(row).collect::<Result<_>>()?;
        Ok(Self { rows, length: marks.dim(1)? })
    }

    /// The mark of every token, `[B, L]` of u8: the inverse of [`Segments::from_marks`].
    pub fn marks(&self, device: &Device) -> Result<Tensor> {
        let mut marks = vec![PAD; self.rows.len() * self.length];
        for (row, runs) in marks.chunks_mut(self.length.max(1)).zip(&self.rows) {
            for run in runs {
                row[run.tokens.clone()].fill(CONTINUE);
                if run.fresh {
                    row[run.tokens.start] = START;
                }
            }
        }
        Ok(Tensor::from_vec(marks, (self.rows.len(), self.length), device)?)
    }

    /// The runs of row `b`, in order.
    pub fn row(&self, b: usize) -> &[Run] {
        &self.rows[b]
    }

    /// `B`
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// `L`, padding included.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The part that lies in `tokens`, for a sequence that is processed in chunks.
    pub fn narrow(&self, tokens: Range<usize>) -> Self {
        let clip = |run: &Run| {
            let start = run.tokens.start.max(tokens.start);
            let end = run.tokens.end.min(tokens.end);
            let fresh = run.fresh && start == run.tokens.start;
            (start < end).then(|| Run { tokens: start - tokens.start..end - tokens.start, fresh })
        };
        let rows = self.rows.iter().map(|runs| runs.iter().filter_map(clip).collect()).collect();
        Self { rows, length: tokens.len() }
    }

    /// The tokens of each sequence of row `b`, in order.
    pub(crate) fn sequences(&self, b: usize) -> Vec<Vec<usize>> {
        let mut all: Vec<Vec<usize>> = vec![];
        for run in self.row(b) {
            if run.fresh || all.is_empty() {
                all.push(vec![]);
            }
            if let Some(sequence) = all.last_mut() {
                sequence.extend(run.tokens.clone());
            }
        }
        all
    }

    /// Whether some token is padding.
    pub(crate) fn any_padding(&self) -> bool {
        let tokens = |runs: &Vec<Run>| runs.iter().map(|run| run.tokens.len()).sum::<usize>();
        self.rows.iter().any(|runs| tokens(runs) < self.length)
    }

    /// Checks that this describes `[batch, length]` tokens.
    pub(crate) fn check(&self, name: &str, batch: usize, length: usize) -> Result<()> {
        if (self.batch(), self.length) == (batch, length) {
            return Ok(());
        }
        let expected = format!("[B, L] = [{batch}, {length}]");
        Err(Error::shape(format!("{name}: segments"), expected, &[self.batch(), self.length]))
    }

    /// The runs of `[B, L]` tokens where no segments were given: each row one sequence that carries its state on.
    pub(crate) fn or_whole(segments: Option<&Self>, batch: usize, length: usize) -> Self {
        let whole = || {
            let run = Run { tokens: 0..length, fresh: false };
            Self { rows: vec![vec![run]; batch], length }
        };
        segments.cloned().unwrap_or_else(whole)
    }
}

fn fits(name: &str, tokens: usize, length: usize) -> Result<()> {
    if tokens <= length {
        return Ok(());
    }
    Err(Error::value(name, format!("at most L = {length} tokens"), tokens))
}
