//! Decoding with a pool of states: rows join and leave, tokens are tried and taken back.

#[cfg(feature = "cuda")]
mod fused;
// What needs no CUDA of it, for its tests where there is none.
#[cfg(all(test, not(feature = "cuda")))]
#[expect(dead_code, reason = "its callers need CUDA")]
mod fused {
    mod kernels;
    mod layout;
}
mod general;

use super::{LanguageModel, ModelState};
#[cfg(feature = "cuda")]
use crate::layers::LayerState;
use crate::{Error, Result};
use candle_core::Tensor;
use std::borrow::Cow;

#[cfg(feature = "cuda")]
use fused::Fused;
use general::General;

/// Decodes sequences whose states lie in the slots of a pool.
///
/// Every call names the slot of each of its rows, or none for an idle row, so that a server's sequences join and leave a
/// batch without a copy. A call may bring several tokens a row. Tokens may also be tried ([`Decoder::draft`]): their
/// logits are given but the states stay, until [`Decoder::accept`] says how many of them to keep, as speculative decoding
/// asks for.
///
/// On CUDA, a model of Mamba or of RetNet blocks takes up to eight tokens at a time (rows times tokens) through one kernel
/// with states in place, which goes through all layers while their weights stream ahead of it; see [`Decoder::is_fused`].
/// Everything else takes the general form: the model's own forward pass, and states that are cut and joined where the rows
/// change. By the streaming law the results are the same.
///
/// ```
/// # use candle_core::{DType, Device};
/// # use subquadratic::models::{Decoder, LanguageModel, ModelConfig};
/// # fn main() -> subquadratic::Result<()> {
/// let model = LanguageModel::init(&ModelConfig::mamba(16, 1, 256), 0, DType::F32, &Device::Cpu)?.frozen()?;
/// let mut decoder = Decoder::new(&model, 4)?;
/// // slot 2 and slot 0, two tokens each
/// let logits = decoder.step(&[Some(2), Some(0)], &[1, 2, 3, 4])?;
/// assert_eq!(logits.dims(), [2, 2, 256]);
/// // three tokens tried, one kept
/// decoder.draft(&[Some(2)], &[5, 6, 7])?;
/// decoder.accept(&[1])?;
/// assert_eq!(decoder.state(2)?.positions, [3]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Decoder<'a> {
    model: Cow<'a, LanguageModel>,
    inner: Inner,
    /// Tokens that each slot's sequence has had.
    positions: Vec<usize>,
    /// The slots and the tokens a row of a draft that waits for its verdict.
    pending: Option<(Vec<Option<usize>>, usize)>,
}

#[derive(Debug)]
enum Inner {
    General(General),
    #[cfg(feature = "cuda")]
    Fused(Box<Fused>),
}

/// In the place of a token where a logit is no number.
const NONE: u32 = u32::MAX;

fn no_numbers(row: usize) -> Error {
    Error::value(format!("logits of row {row}"), "numbers", "NaN or infinity")
}

/// Slots and the tokens that their sequences have had.
#[cfg(feature = "cuda")]
fn rows(slots: &[Option<usize>], positions: &[usize]) -> Vec<fused::Row> {
    slots.iter().map(|&slot| (slot, slot.map_or(0, |slot| positions[slot]))).collect()
}

impl<'a> Decoder<'a> {
    /// A pool of `slots` fresh states. A trainable model is [frozen](LanguageModel::frozen) first.
    ///
    /// # Errors
    /// No slots, or a failed allocation.
    pub fn new(model: &'a LanguageModel, slots: usize) -> Result<Self> {
        let model = match model.variables().is_empty() {
            true => Cow::Borrowed(model),
            false => Cow::Owned(model.frozen()?),
        };
        Self::over(model, slots)
    }

    pub(crate) fn over(model: Cow<'a, LanguageModel>, slots: usize) -> Result<Self> {
        if slots == 0 {
            return Err(Error::value("decoder: slots", "at least 1", slots));
        }
        let inner = Self::inner(&model, slots)?;
        Ok(Self { model, inner, positions: vec![0; slots], pending: None })
    }

    #[cfg(feature = "cuda")]
    fn inner(model: &LanguageModel, slots: usize) -> Result<Inner> {
        Ok(match Fused::new(model, slots)? {
            Some(fused) => Inner::Fused(Box::new(fused)),
            None => Inner::General(General::new(model, slots)?),
        })
    }

    #[cfg(not(feature = "cuda"))]
    fn inner(model: &LanguageModel, slots: usize) -> Result<Inner> {
        Ok(Inner::General(General::new(model, slots)?))
    }

    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.positions.len()
    }

    /// Whether calls of so many tokens in all (rows times tokens a row) go through the one kernel. Eight do, or fewer where
    /// the activations of eight rows leave no room for weights in a multiprocessor's shared memory.
    pub fn is_fused(&self, tokens: usize) -> bool {
        match &self.inner {
            Inner::General(_) => {
                let _ = tokens;
                false
            }
            #[cfg(feature = "cuda")]
            Inner::Fused(fused) => tokens <= fused.most_rows(),
        }
    }

    /// Puts row `row` of `state` into a slot: a sequence joins, its prompt read by [`LanguageModel::prefill`].
    ///
    /// # Errors
    /// A slot or row that is not there, a state of another model.
    pub fn set_state(&mut self, slot: usize, state: &ModelState, row: usize) -> Result<()> {
        self.check_slot(slot)?;
        state.check(&self.model, state.batch())?;
        let own = state.select(&[row])?;
        let position = own.positions.first().copied().unwrap_or(0);
        match &mut self.inner {
            Inner::General(general) => general.set(slot, own)?,
            #[cfg(feature = "cuda")]
            Inner::Fused(fused) => fused.set(slot, &own)?,
        }
        self.positions[slot] = position;
        Ok(())
    }

    /// The state in a slot, as a batch of one; the slot keeps it.
    ///
    /// # Errors
    /// A slot that is not there.
    pub fn state(&self, slot: usize) -> Result<ModelState> {
        self.check_slot(slot)?;
        match &self.inner {
            Inner::General(general) => general.get(slot),
            #[cfg(feature = "cuda")]
            Inner::Fused(fused) => {
                let mut state = self.model.init_state(1)?;
                fused.get(slot, &mut state)?;
                let positions = vec![self.positions[slot]];
                for block in &mut state.blocks {
                    if let Some(own) = block.positions_mut() {
                        own.clone_from(&positions);
                    }
                }
                state.positions = positions;
                Ok(state)
            }
        }
    }

    /// Back to the state before the first token.
    ///
    /// # Errors
    /// A slot that is not there.
    pub fn reset(&mut self, slot: usize) -> Result<()> {
        self.check_slot(slot)?;
        let fresh = self.model.init_state(1)?;
        self.set_state(slot, &fresh, 0)
    }

    /// Logits `[B, T, V]` after each of `T` tokens a row; the states move behind the last.
    ///
    /// `slots[b]` is where row `b`'s state lies, each slot at most once; `None` is an idle row, whose logits mean nothing.
    /// `ids` are `T` tokens of the first row, `T` of the second and so on. A draft that still waits is dropped.
    ///
    /// # Errors
    /// A slot that is not there or comes twice, a number of tokens that is no multiple of the rows, an id outside the
    /// vocabulary.
    pub fn step(&mut self, slots: &[Option<usize>], ids: &[u32]) -> Result<Tensor> {
        let tokens = self.check(slots, ids)?;
        let logits = self.run(slots, ids, tokens, true)?;
        self.advance(slots, |_| tokens);
        Ok(logits)
    }

    /// As [`Decoder::step`] for the most probable token behind the last of each row (of equals the lowest id); for idle
    /// rows it means nothing. On CUDA only the ids come back to the host.
    ///
    /// # Errors
    /// As [`Decoder::step`]; a logit that is NaN or infinite.
    pub fn step_greedy(&mut self, slots: &[Option<usize>], ids: &[u32]) -> Result<Vec<u32>> {
        if ids.len() == slots.len() {
            let chosen = self.greedy(slots, ids, 1, &[])?;
            return Ok(chosen.into_iter().map(|row| row.first().copied().unwrap_or(0)).collect());
        }
        let tokens = self.check(slots, ids)?;
        let chosen = self.most_probable(slots, ids, tokens)?;
        self.advance(slots, |_| tokens);
        match chosen.iter().position(|&id| id == NONE) {
            Some(row) => Err(no_numbers(row)),
            None => Ok(chosen),
        }
    }

    /// Up to `steps` steps in a row: the first with one token a row, every other one with the most probable tokens of the
    /// step before (of equals the lowest id). For each row its most probable tokens, which end behind the first that is one
    /// of `stop`; none for an idle row. The state of a row has seen its `ids` and these tokens but the last.
    ///
    /// Where the rows go through the one kernel ([`Decoder::is_fused`]), up to 16 steps are one launch, and the host waits for
    /// no token but the last.
    ///
    /// # Errors
    /// As [`Decoder::step`]; another number of tokens than one a row; a logit that is NaN or infinite, behind which the row's
    /// state stays.
    pub fn greedy(
        &mut self,
        slots: &[Option<usize>],
        ids: &[u32],
        steps: usize,
        stop: &[u32],
    ) -> Result<Vec<Vec<u32>>> {
        if self.check(slots, ids)? != 1 {
            return Err(Error::value(
                "decoder: number of ids",
                format!("{}, one a row", slots.len()),
                ids.len(),
            ));
        }
        self.pending = None;
        let (mut running, mut last) = (slots.to_vec(), ids.to_vec());
        let mut rows = vec![vec![]; slots.len()];
        let mut left = steps;
        while left > 0 && running.iter().any(Option::is_some) {
            let chosen = self.steps_in_a_row(&running, &last, left, stop)?;
            left -= chosen.len();
            for (row, slot) in running.iter_mut().enumerate() {
                for ids in &chosen {
                    let (Some(own), id) = (*slot, ids[row]) else { break };
                    self.positions[own] += 1;
                    if id == NONE || stop.contains(&id) {
                        *slot = None;
                    }
                    rows[row].push(id);
                    last[row] = id;
                }
            }
            if let Some(row) = rows.iter().position(|row| row.last() == Some(&NONE)) {
                return Err(no_numbers(row));
            }
        }
        Ok(rows)
    }

    /// As many steps, of `most`, as go in a row, one at least: the rows' most probable tokens of each, `NONE` where a logit
    /// is no number. Positions stay.
    fn steps_in_a_row(
        &mut self,
        slots: &[Option<usize>],
        ids: &[u32],
        most: usize,
        stop: &[u32],
    ) -> Result<Vec<Vec<u32>>> {
        #[cfg(feature = "cuda")]
        if let Inner::Fused(fused) = &mut self.inner
            && ids.len() <= fused.most_rows()
        {
            return fused.greedy(&rows(slots, &self.positions), ids, most, stop);
        }
        let _ = (most, stop);
        Ok(vec![self.most_probable(slots, ids, 1)?])
    }

    /// The rows' most probable tokens behind the last of theirs. Positions stay.
    fn most_probable(&mut self, slots: &[Option<usize>], ids: &[u32], tokens: usize) -> Result<Vec<u32>> {
        let logits = self.run(slots, ids, tokens, true)?.narrow(1, tokens - 1, 1)?.squeeze(1)?;
        let rows = logits.to_dtype(candle_core::DType::F64)?.to_vec2::<f64>()?;
        let best = |(row, slot): (&Vec<f64>, &Option<usize>)| match slot {
            Some(_) => crate::generate::argmax(row).unwrap_or(NONE),
            None => 0,
        };
        Ok(rows.iter().zip(slots).map(best).collect())
    }

    /// As [`Decoder::step`], but the states stay as they are until [`Decoder::accept`].
    ///
    /// # Errors
    /// As [`Decoder::step`].
    pub fn draft(&mut self, slots: &[Option<usize>], ids: &[u32]) -> Result<Tensor> {
        let tokens = self.check(slots, ids)?;
        let logits = self.run(slots, ids, tokens, false)?;
        self.pending = Some((slots.to_vec(), tokens));
        Ok(logits)
    }

    /// Keeps the first `counts[b]` tokens of row `b` of the last draft, from none to all; its states move behind them.
    ///
    /// # Errors
    /// No draft that waits, another number of rows, more tokens than a row has.
    pub fn accept(&mut self, counts: &[usize]) -> Result<()> {
        let Some((slots, tokens)) = self.pending.take() else {
            return Err(Error::value("decoder: draft", "one that waits", "none"));
        };
        let wrong = counts.len() != slots.len() || counts.iter().any(|&count| count > tokens);
        if wrong {
            let expected = format!("{} counts of at most {tokens}", slots.len());
            self.pending = Some((slots, tokens));
            return Err(Error::value("decoder: counts", expected, format!("{counts:?}")));
        }
        match &mut self.inner {
            Inner::General(general) => general.accept(&self.model, counts)?,
            #[cfg(feature = "cuda")]
            Inner::Fused(fused) => fused.accept(counts, tokens)?,
        }
        self.advance(&slots, |row| counts[row]);
        Ok(())
    }

    fn run(&mut self, slots: &[Option<usize>], ids: &[u32], tokens: usize, keep: bool) -> Result<Tensor> {
        self.pending = None;
        match &mut self.inner {
            Inner::General(general) => general.run(&self.model, slots, ids, tokens, keep),
            #[cfg(feature = "cuda")]
            Inner::Fused(fused) => fused.run(&rows(slots, &self.positions), ids, tokens, keep),
        }
    }

    fn advance(&mut self, slots: &[Option<usize>], tokens: impl Fn(usize) -> usize) {
        for (row, slot) in slots.iter().enumerate() {
            if let Some(position) = slot.and_then(|slot| self.positions.get_mut(slot)) {
                *position += tokens(row);
            }
        }
    }

    fn check_slot(&self, slot: usize) -> Result<()> {
        match slot < self.slots() {
            true => Ok(()),
            false => Err(Error::value("decoder: slot", format!("below {}", self.slots()), slot)),
        }
    }

    /// The tokens a row.
    fn check(&self, slots: &[Option<usize>], ids: &[u32]) -> Result<usize> {
        let mut taken = vec![false; self.slots()];
        for &slot in slots.iter().flatten() {
            self.check_slot(slot)?;
            if std::mem::replace(&mut taken[slot], true) {
                return Err(Error::value("decoder: slots", "each at most once", format!("{slot} twice")));
            }
        }
        if slots.is_empty() || ids.is_empty() || !ids.len().is_multiple_of(slots.len()) {
            let expected = format!("a multiple of the {} rows, at least one token each", slots.len());
            return Err(Error::value("decoder: number of ids", expected, ids.len()));
        }
        let size = self.model.config().vocab_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= size) {
            return Err(Error::value("decoder: ids", format!("tokens below vocab_size = {size}"), id));
        }
        Ok(ids.len() / slots.len())
    }
}
