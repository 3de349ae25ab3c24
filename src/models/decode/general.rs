//! Decoding by the model's own forward pass, on any device and with any mixer.

use super::super::{LanguageModel, ModelState};
use crate::{Error, Result};
use candle_core::Tensor;

/// The states of a pool. Those of the last call's rows stay joined, for as long as the same rows come again.
#[derive(Debug)]
pub(super) struct General {
    slots: Vec<Option<ModelState>>,
    joined: Joined,
    draft: Option<Draft>,
}

/// The states of some slots, in order, in one batch, or one batch each where they cannot be joined. Their places in the
/// pool are empty.
#[derive(Clone, Debug, Default)]
struct Joined {
    slots: Vec<usize>,
    states: Vec<ModelState>,
}

/// What a draft was, to keep some of it.
#[derive(Debug)]
struct Draft {
    /// The row of the call for each joined slot.
    rows: Vec<usize>,
    /// Its tokens, `[B, T]`, and the states behind them.
    ids: Tensor,
    after: Vec<ModelState>,
}

impl Joined {
    /// The state of row `row`.
    fn select(states: &[ModelState], mut row: usize) -> Result<ModelState> {
        for state in states {
            if row < state.batch() {
                return state.select(&[row]);
            }
            row -= state.batch();
        }
        Err(Error::value("decoder: row", "one of the joined states", row))
    }
}

impl General {
    pub(super) fn new(model: &LanguageModel, slots: usize) -> Result<Self> {
        let fresh = model.init_state(1)?;
        Ok(Self { slots: vec![Some(fresh); slots], joined: Joined::default(), draft: None })
    }

    pub(super) fn set(&mut self, slot: usize, state: ModelState) -> Result<()> {
        self.part()?;
        self.slots[slot] = Some(state);
        Ok(())
    }

    pub(super) fn get(&self, slot: usize) -> Result<ModelState> {
        if let Some(row) = self.joined.slots.iter().position(|own| *own == slot) {
            return Joined::select(&self.joined.states, row);
        }
        self.slots[slot].clone().ok_or_else(|| Error::value("decoder: state", "one in every slot", "none"))
    }

    /// Gives the joined states back to their slots.
    fn part(&mut self) -> Result<()> {
        self.draft = None;
        for (row, &slot) in self.joined.slots.iter().enumerate() {
            self.slots[slot] = Some(Joined::select(&self.joined.states, row)?);
        }
        self.joined = Joined::default();
        Ok(())
    }

    fn join(&mut self, slots: Vec<usize>) -> Result<()> {
        if self.joined.slots == slots {
            return Ok(());
        }
        self.part()?;
        let all: Vec<&ModelState> = slots.iter().filter_map(|&slot| self.slots[slot].as_ref()).collect();
        let states = match ModelState::cat(&all)? {
            Some(state) => vec![state],
            None => all.into_iter().cloned().collect(),
        };
        slots.iter().for_each(|&slot| self.slots[slot] = None);
        self.joined = Joined { slots, states };
        Ok(())
    }

    /// Logits `[B, T, V]`; the states move if `keep`.
    pub(super) fn run(
        &mut self,
        model: &LanguageModel,
        slots: &[Option<usize>],
        ids: &[u32],
        tokens: usize,
        keep: bool,
    ) -> Result<Tensor> {
        self.draft = None;
        let (rows, own): (Vec<usize>, Vec<usize>) =
            slots.iter().enumerate().filter_map(|(row, slot)| Some((row, (*slot)?))).unzip();
        if rows.is_empty() {
            let shape = (slots.len(), tokens, model.config().vocab_size);
            return Ok(Tensor::zeros(shape, model.dtype(), model.device())?);
        }
        self.join(own)?;
        let active: Vec<u32> =
            rows.iter().flat_map(|row| &ids[row * tokens..(row + 1) * tokens]).copied().collect();
        let active = Tensor::from_vec(active, (rows.len(), tokens), model.device())?;
        let mut after = self.joined.states.clone();
        let (mut logits, mut start) = (vec![], 0);
        for state in &mut after {
            let ids = active.narrow(0, start, state.batch())?;
            start += state.batch();
            logits.push(model.forward_with_state(&ids, state)?);
        }
        let logits = Tensor::cat(&logits, 0)?;
        if keep {
            self.joined.states = after;
        } else {
            self.draft = Some(Draft { rows: rows.clone(), ids: active, after });
        }
        if rows.len() == slots.len() {
            return Ok(logits);
        }
        // idle rows take any row's logits
        let place = |row: usize| rows.iter().position(|own| *own == row).unwrap_or(0) as u32;
        let places: Vec<u32> = (0..slots.len()).map(place).collect();
        Ok(logits.index_select(&Tensor::from_vec(places, slots.len(), model.device())?, 0)?)
    }

    /// Keeps the first `counts[row]` tokens of the draft: what all rows keep in full is there already, the rest is read
    /// again.
    pub(super) fn accept(&mut self, model: &LanguageModel, counts: &[usize]) -> Result<()> {
        let Some(draft) = self.draft.take() else { return Ok(()) };
        let tokens = draft.ids.dim(1)?;
        if draft.rows.iter().all(|&row| counts[row] == tokens) {
            self.joined.states = draft.after;
            return Ok(());
        }
        let before = std::mem::take(&mut self.joined);
        for (i, (&row, slot)) in draft.rows.iter().zip(before.slots).enumerate() {
            let count = counts[row];
            let state = if count == tokens {
                Joined::select(&draft.after, i)?
            } else {
                let mut state = Joined::select(&before.states, i)?;
                if count > 0 {
                    let ids = draft.ids.narrow(0, i, 1)?.narrow(1, 0, count)?;
                    model.hidden_states(&ids, None, Some(&mut state))?;
                }
                state
            };
            self.slots[slot] = Some(state);
        }
        Ok(())
    }
}
