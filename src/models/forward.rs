//! The forward pass: checks, chunks, blocks with or without recomputation, head.

use super::Form;
use super::block::{Block, Stream};
use super::language_model::LanguageModel;
use super::mixer::{MixerConfig, MixerState};
use super::state::ModelState;
use crate::autograd::checkpoint;
use crate::layers::{LayerState, state::advance};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Tokens of a batch that go through the stack together where nothing is tracked: enough for full speed, few enough for
/// the caches. By the streaming law the cut changes nothing.
const CHUNK: usize = 512;
/// With long convolutions: one of a whole prompt costs less than its pieces.
const LONG_CHUNK: usize = 32_768;
/// On a GPU: enough to fill it, few enough for its memory.
const CUDA_CHUNK: usize = 16_384;

/// Which tokens' hidden states are wanted.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    All,
    Last,
}

impl LanguageModel {
    /// Logits `[B, L, V]` of `ids` `[B, L]`, each row one sequence from its beginning.
    ///
    /// # Errors
    /// No tokens, an id that is not below `vocab_size`, or another dtype.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.forward_segments(ids, None, None)
    }

    /// The same for sequences that go on from `state`, which moves behind the last token.
    ///
    /// # Errors
    /// As [`LanguageModel::forward`], or a state of another model or batch; `state` is left as it was.
    pub fn forward_with_state(&self, ids: &Tensor, state: &mut ModelState) -> Result<Tensor> {
        self.forward_segments(ids, None, Some(state))
    }

    /// The general form: rows cut by `segments` into packed sequences and padding, with or without a state to carry on.
    ///
    /// Ids at padding may be any in the vocabulary; the logits there mean nothing.
    ///
    /// # Errors
    /// As [`LanguageModel::forward_with_state`], or segments of another batch or length.
    pub fn forward_segments(
        &self,
        ids: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut ModelState>,
    ) -> Result<Tensor> {
        self.logits(&self.hidden_states(ids, segments, state)?)
    }

    /// Logits `[B, V]` of each row's last token, the head computed for these alone; `state` moves behind it.
    ///
    /// # Errors
    /// As [`LanguageModel::forward_segments`], or a row of nothing but padding.
    pub fn prefill(
        &self,
        ids: &Tensor,
        segments: Option<&Segments>,
        state: &mut ModelState,
    ) -> Result<Tensor> {
        let hidden = self.run(ids, segments, Some(state), Wanted::Last)?;
        Ok(self.logits(&hidden)?.squeeze(1)?)
    }

    /// What the head sees, `[B, L, D]`: the residual stream after the final norm.
    ///
    /// # Errors
    /// As [`LanguageModel::forward_segments`].
    pub fn hidden_states(
        &self,
        ids: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut ModelState>,
    ) -> Result<Tensor> {
        self.run(ids, segments, state, Wanted::All)
    }

    fn run(
        &self,
        ids: &Tensor,
        segments: Option<&Segments>,
        mut state: Option<&mut ModelState>,
        wanted: Wanted,
    ) -> Result<Tensor> {
        let ids = self.check_ids(ids)?;
        let (batch, length) = ids.dims2()?;
        if let Some(segments) = segments {
            segments.check("model", batch, length)?;
        }
        if let Some(state) = state.as_deref() {
            state.check(self, batch)?;
        }
        let last = match wanted {
            Wanted::All => None,
            Wanted::Last => Some(last_tokens(segments, batch, length)?),
        };
        let mut ends = state.as_deref().map_or(vec![0; batch], |state| state.positions.clone());
        advance(&mut ends, segments, length);
        self.check_ends(&ends)?;
        // states that grow with the sequence are moved on in place: a copy at every token would cost more than the token
        let in_place = state.as_deref().is_some_and(|state| !state.blocks.iter().all(MixerState::is_tensors));
        let mut carried = state.as_deref_mut().map(|state| match in_place {
            true => std::mem::take(&mut state.blocks),
            false => state.blocks.clone(),
        });
        let result = self.in_chunks(&ids, segments, &mut carried, last);
        if let (Some(state), Some(blocks)) = (state, carried) {
            if in_place || result.is_ok() {
                state.blocks = blocks;
            }
            if result.is_ok() {
                state.positions = ends;
            }
        }
        result
    }

    /// Refuses sequences longer than some block takes.
    fn check_ends(&self, ends: &[usize]) -> Result<()> {
        let longest = self.config.blocks.iter().filter_map(|block| block.mixer.longest()).min();
        let Some((longest, name)) = longest else { return Ok(()) };
        match ends.iter().find(|&&end| end > longest) {
            Some(end) => {
                Err(Error::value("ids: tokens of a sequence", format!("at most {name} = {longest}"), end))
            }
            None => Ok(()),
        }
    }

    /// Checked ids, as many tokens at a time as memory should hold.
    fn in_chunks(
        &self,
        ids: &Tensor,
        segments: Option<&Segments>,
        carried: &mut Option<Vec<MixerState>>,
        last: Option<Vec<usize>>,
    ) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let tracked = !self.variables().is_empty() || carried.iter().flatten().any(is_tracked);
        let streams = self.config.blocks.iter().all(|block| block.mixer.streams());
        let whole = tracked || !streams || self.form == Form::Parallel;
        let long = self.config.blocks.iter().any(|block| matches!(block.mixer, MixerConfig::Hyena(_)));
        let most = match self.device.is_cuda() {
            true => CUDA_CHUNK,
            false if long => LONG_CHUNK,
            false => CHUNK,
        };
        let chunk = if whole { length } else { (most / batch).max(most / 8) };
        if chunk < length {
            let blocks = match carried.take() {
                Some(blocks) => blocks,
                None => self.init_state(batch)?.blocks,
            };
            carried.insert(blocks).iter_mut().try_for_each(|block| block.reserve(length))?;
        }
        let mut pieces = vec![];
        let mut picked: Vec<Option<Stream>> = vec![None; batch];
        for start in (0..length).step_by(chunk.max(1)) {
            let end = length.min(start + chunk);
            let part = segments.map(|segments| segments.narrow(start..end));
            let stream = self.embed(&ids.narrow(1, start, end - start)?)?;
            let stream = self.through_blocks(stream, part.as_ref(), carried.as_mut())?;
            let Some(last) = &last else {
                pieces.push(self.finish(stream)?);
                continue;
            };
            for (row, &token) in last.iter().enumerate().filter(|(_, token)| (start..end).contains(token)) {
                picked[row] = Some(stream.token(row, token - start)?);
            }
        }
        if last.is_some() {
            let picked: Vec<Stream> = picked.into_iter().flatten().collect();
            pieces.push(self.finish(Stream::cat(&picked)?)?);
        }
        match <[Tensor; 1]>::try_from(pieces) {
            Ok([piece]) => Ok(piece),
            Err(pieces) => Ok(Tensor::cat(&pieces, 1)?),
        }
    }

    fn through_blocks(
        &self,
        mut stream: Stream,
        segments: Option<&Segments>,
        mut states: Option<&mut Vec<MixerState>>,
    ) -> Result<Stream> {
        for (i, block) in self.blocks.iter().enumerate() {
            let state = states.as_deref_mut().and_then(|states| states.get_mut(i));
            stream = if self.recompute && !self.variables().is_empty() {
                self.recomputed(block, &self.block_variables[i], stream, segments, state)?
            } else {
                block.forward(stream, self.dtype, segments, state)?
            };
        }
        Ok(stream)
    }

    /// A block whose activations are computed again on the way back.
    fn recomputed(
        &self,
        block: &Arc<Block>,
        variables: &[Tensor],
        stream: Stream,
        segments: Option<&Segments>,
        state: Option<&mut MixerState>,
    ) -> Result<Stream> {
        let mut inputs = vec![stream.sum.clone()];
        inputs.extend(stream.update.clone());
        let streams = inputs.len();
        if let Some(state) = state.as_deref() {
            inputs.extend(carried_tensors(state)?);
        }
        let length = stream.sum.dim(1)?;
        let ends_in_norm = block.ends_in_norm();
        let (block, cuts, dtype) = (block.clone(), segments.cloned(), self.dtype);
        let template = state.as_deref().map(|state| state.detach());
        let forward = move |inputs: &[Tensor]| {
            let update = if streams > 1 { inputs.get(1).cloned() } else { None };
            let stream = Stream { sum: inputs[0].clone(), update };
            let mut state = template.clone();
            if let Some(state) = &mut state {
                put_tensors(state, &inputs[streams..])?;
            }
            let stream = block.forward(stream, dtype, cuts.as_ref(), state.as_mut())?;
            let mut outputs = vec![stream.sum];
            outputs.extend(stream.update);
            if let Some(state) = &state {
                outputs.extend(carried_tensors(state)?);
            }
            Ok(outputs)
        };
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let variables: Vec<&Tensor> = variables.iter().collect();
        let mut outputs = checkpoint(&inputs, &variables, forward)?.into_iter();
        let sum = outputs.next();
        // a block that ends in a norm leaves nothing pending
        let update = if ends_in_norm { None } else { outputs.next() };
        if let Some(state) = state {
            if let Some(positions) = state.positions_mut() {
                advance(positions, segments, length);
            }
            put_tensors(state, outputs.as_slice())?;
        }
        let sum = sum.ok_or_else(|| Error::value("checkpoint", "an output for the stream", "none"))?;
        Ok(Stream { sum, update })
    }

    /// The ids as u32, each below the vocabulary's size.
    fn check_ids(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, length) = match *ids.dims() {
            [batch, length] if batch > 0 && length > 0 => (batch, length),
            _ => return Err(Error::shape("ids", "[B, L] with B >= 1 rows of L >= 1 tokens", ids.dims())),
        };
        if !matches!(ids.dtype(), DType::U32 | DType::U8 | DType::I64) {
            return Err(Error::dtype("ids", "u32, u8 or i64", ids.dtype()));
        }
        let values = ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
        let size = self.config.vocab_size;
        if let Some(i) = values.iter().position(|&id| id < 0 || id as usize >= size) {
            let name = format!("ids: row {}, position {}", i / length, i % length);
            return Err(Error::value(name, format!("a token below vocab_size = {size}"), values[i]));
        }
        let ids: Vec<u32> = values.into_iter().map(|id| id as u32).collect();
        Ok(Tensor::from_vec(ids, (batch, length), &self.device)?)
    }
}

/// What a state consists of, as tensors through which gradients pass.
fn carried_tensors(state: &MixerState) -> Result<Vec<Tensor>> {
    let of = |all: Vec<(&'static str, Tensor)>| all.into_iter().map(|(_, tensor)| tensor).collect();
    match state.is_tensors() {
        true => Ok(state.tensors().into_iter().map(|(_, tensor)| tensor.clone()).collect()),
        false => Ok(of(state.saved()?)),
    }
}

/// The inverse of [`carried_tensors`], into a state that has the positions already.
fn put_tensors(state: &mut MixerState, tensors: &[Tensor]) -> Result<()> {
    if state.is_tensors() {
        state.replace(tensors);
        return Ok(());
    }
    let names: Vec<&str> = state.saved()?.into_iter().map(|(name, _)| name).collect();
    let get = |name: &str| {
        let place = names.iter().position(|&known| known == name);
        let found = place.and_then(|place| tensors.get(place)).cloned();
        found.ok_or_else(|| Error::value(format!("state: {name}"), "a tensor", "none"))
    };
    let positions = state.positions_mut().map(|positions| positions.clone()).unwrap_or_default();
    if let Some(new) = MixerState::from_tensors(state.mixer(), get, &positions)? {
        *state = new;
    }
    Ok(())
}

/// Where each row's last token is.
fn last_tokens(segments: Option<&Segments>, batch: usize, length: usize) -> Result<Vec<usize>> {
    let Some(segments) = segments else { return Ok(vec![length - 1; batch]) };
    let last = |row| match segments.row(row).last() {
        Some(run) if run.tokens.end > 0 => Ok(run.tokens.end - 1),
        _ => Err(Error::value(format!("prefill: row {row}"), "at least one token", "nothing but padding")),
    };
    (0..batch).map(last).collect()
}

fn is_tracked(state: &MixerState) -> bool {
    LayerState::is_tracked(state)
}

impl ModelState {
    /// Checks that this is a state of `batch` rows of `model`.
    pub(super) fn check(&self, model: &LanguageModel, batch: usize) -> Result<()> {
        if self.model != model.kind || self.blocks.len() != model.blocks.len() {
            let got = format!("{} ({} blocks)", self.model, self.blocks.len());
            return Err(Error::value("state", format!("one of the model ({})", model.kind), got));
        }
        if self.batch() != batch {
            let got = format!("one of {}", self.batch());
            return Err(Error::value("state", format!("a batch of {batch}, as the ids have"), got));
        }
        for block in &self.blocks {
            let dtype = block.dtype(model.dtype);
            for (name, tensor) in block.tensors() {
                if tensor.dtype() != dtype {
                    return Err(Error::dtype(format!("state: {name}"), format!("{dtype:?}"), tensor.dtype()));
                }
            }
        }
        Ok(())
    }
}
