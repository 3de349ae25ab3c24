//! Generation, token by token.

use super::{GenerationConfig, Sampler};
use crate::models::{Decoder, LanguageModel, ModelState};
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use std::borrow::Cow;
use std::collections::VecDeque;

/// Greedy tokens that a decoder draws at a time, before they are given out one by one.
const AHEAD: usize = 8;

/// Why a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// It drew one of the stop tokens.
    Stop,
    /// It has [`GenerationConfig::max_tokens`].
    Length,
}

/// One generated token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The prompt it belongs to.
    pub row: usize,
    /// Its id.
    pub id: u32,
    /// Set on the row's last token.
    pub finish: Option<Finish>,
}

/// A generation under way: an iterator over steps, each giving one token of every row that is still running, in the
/// order of the rows.
///
/// The prompts are read in one call (padded to one length, which no row notices); then every step feeds the tokens just
/// drawn, one a row. Rows that have ended are taken out of the batch. After an error the iterator ends. Where the model has
/// a [`Decoder`] with kernels of its own, the steps go through that; greedy ones then come eight at a time.
///
/// ```
/// # use candle_core::{DType, Device};
/// # use subquadratic::generate::{Generation, GenerationConfig};
/// # use subquadratic::models::{LanguageModel, ModelConfig};
/// # fn main() -> subquadratic::Result<()> {
/// let model = LanguageModel::init(&ModelConfig::mamba(16, 1, 256), 0, DType::F32, &Device::Cpu)?.frozen()?;
/// let config = GenerationConfig { max_tokens: 5, ..Default::default() };
/// for step in Generation::new(&model, &[b"Once".map(u32::from)], config)? {
///     for token in step? {
///         print!("{}", char::from(token.id as u8));
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Generation<'a> {
    model: Cow<'a, LanguageModel>,
    config: GenerationConfig,
    rows: Vec<Row>,
    /// The rows still running: row `running[i]` is row `i` of `state` and `logits`.
    running: Vec<usize>,
    state: ModelState,
    /// Holds the rows' states instead, row `r` in slot `r`, where it has kernels for them; `state` is then that behind the
    /// prompts.
    decoder: Option<Decoder<'a>>,
    /// Of the last token fed, `[rows running, V]`; none once they are drawn from.
    logits: Option<Tensor>,
}

#[derive(Debug)]
struct Row {
    sampler: Sampler,
    drawn: Vec<u32>,
    /// What the decoder has drawn ahead.
    ahead: VecDeque<u32>,
    /// Once it has ended.
    state: Option<ModelState>,
}

impl<'a> Generation<'a> {
    /// Begins after `prompts`, one row each, with fresh states. Reads the prompts.
    ///
    /// # Errors
    /// No prompt or an empty one, an id outside the vocabulary, a setting outside its range.
    pub fn new(
        model: &'a LanguageModel,
        prompts: &[impl AsRef<[u32]>],
        config: GenerationConfig,
    ) -> Result<Self> {
        let state = model.init_state(prompts.len().max(1))?;
        Self::with_state(model, prompts, state, config)
    }

    /// Begins after `prompts` that continue `state`, one row each: a prefix read once serves many prompts
    /// ([`ModelState::select`] makes rows of one, [`ModelState::save`] keeps it). The repetition penalty counts the
    /// tokens of `prompts` alone.
    ///
    /// # Errors
    /// As [`Generation::new`]; a state of another batch or model.
    pub fn with_state(
        model: &'a LanguageModel,
        prompts: &[impl AsRef<[u32]>],
        mut state: ModelState,
        config: GenerationConfig,
    ) -> Result<Self> {
        config.validate()?;
        let prompts: Vec<&[u32]> = prompts.iter().map(AsRef::as_ref).collect();
        check(&prompts, &config, model.config().vocab_size)?;
        if state.batch() != prompts.len() {
            return Err(Error::value(
                "generation: rows of the state",
                format!("{} (one a prompt)", prompts.len()),
                state.batch(),
            ));
        }
        let row = |(i, prompt): (usize, &&[u32])| {
            let mut sampler = Sampler::new(&config, i)?;
            sampler.observe(prompt);
            Ok(Row { sampler, drawn: vec![], ahead: VecDeque::new(), state: None })
        };
        let rows: Vec<Row> = prompts.iter().enumerate().map(row).collect::<Result<_>>()?;
        // a trainable model would build a graph with every step, to no end
        let model = match model.variables().is_empty() {
            true => Cow::Borrowed(model),
            false => Cow::Owned(model.frozen()?),
        };
        let logits = read(&model, &prompts, &mut state)?;
        let running = if config.max_tokens == 0 { vec![] } else { (0..rows.len()).collect() };
        let decoder = decoder(&model, &state)?;
        Ok(Self { model, config, rows, running, state, decoder, logits: Some(logits) })
    }

    /// The state of every row, to go on from: it has seen the prompt and all tokens of the row but the last.
    ///
    /// # Errors
    /// Those of candle.
    pub fn into_states(self) -> Result<Vec<ModelState>> {
        let place = |row: usize| self.running.iter().position(|&r| r == row).unwrap_or(row);
        let state = |(row, own): (usize, &Row)| match (&own.state, &self.decoder) {
            (Some(state), _) => Ok(state.clone()),
            (None, Some(decoder)) if own.ahead.is_empty() => decoder.state(row),
            (None, Some(_)) => self.read_again(row, &own.drawn),
            (None, None) => self.state.select(&[place(row)]),
        };
        self.rows.iter().enumerate().map(state).collect()
    }

    /// The state of a row that the decoder has taken further: the tokens given out, but the last, behind the prompt.
    fn read_again(&self, row: usize, drawn: &[u32]) -> Result<ModelState> {
        let mut state = self.state.select(&[row])?;
        if let Some((_, seen)) = drawn.split_last()
            && !seen.is_empty()
        {
            read(&self.model, &[seen], &mut state)?;
        }
        Ok(state)
    }

    /// The most probable tokens of the running rows. The device looks for them itself, some steps ahead.
    fn greedy(&mut self, last: &[u32], slots: &[Option<usize>]) -> Result<Vec<u32>> {
        let Self { decoder: Some(decoder), running, rows, config, .. } = self else { return Ok(vec![]) };
        // all that run have drawn as many, and as many are ahead of them
        if let Some(drawn) = running.first().map(|&row| &rows[row]).filter(|row| row.ahead.is_empty()) {
            let steps = AHEAD.min(config.max_tokens - drawn.drawn.len());
            let chosen = decoder.greedy(slots, last, steps, &config.stop_tokens)?;
            running.iter().zip(chosen).for_each(|(&row, ids)| rows[row].ahead = ids.into());
        }
        Ok(running.iter().filter_map(|&row| rows[row].ahead.pop_front()).collect())
    }

    fn step(&mut self) -> Result<Vec<Token>> {
        let last = |row: usize| self.rows[row].drawn.last().copied().unwrap_or(0);
        let last: Vec<u32> = self.running.iter().map(|&row| last(row)).collect();
        let slots: Vec<Option<usize>> = self.running.iter().copied().map(Some).collect();
        let ids = match (self.logits.take(), &mut self.decoder) {
            (Some(logits), _) => self.draw(&logits)?,
            (None, Some(_)) if self.config.is_greedy() => self.greedy(&last, &slots)?,
            (None, Some(decoder)) => {
                let logits = decoder.step(&slots, &last)?.squeeze(1)?;
                self.draw(&logits)?
            }
            (None, None) => {
                let ids = Tensor::from_vec(last, (self.running.len(), 1), self.model.device())?;
                let logits = feed(&self.model, &ids, None, &mut self.state)?;
                self.draw(&logits)?
            }
        };
        let mut tokens = Vec::with_capacity(self.running.len());
        for (&row, id) in self.running.iter().zip(ids) {
            let own = &mut self.rows[row];
            own.drawn.push(id);
            let finish = if self.config.stop_tokens.contains(&id) {
                Some(Finish::Stop)
            } else {
                (own.drawn.len() >= self.config.max_tokens).then_some(Finish::Length)
            };
            tokens.push(Token { row, id, finish });
        }
        self.retire(&tokens)?;
        Ok(tokens)
    }

    /// Draws from the logits `[B, V]` of the running rows.
    fn draw(&mut self, logits: &Tensor) -> Result<Vec<u32>> {
        let mut logits = logits.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let rows = self.running.iter().zip(&mut logits);
        rows.map(|(&row, logits)| self.rows[row].sampler.draw(logits)).collect()
    }

    /// Takes the rows that have ended out of the batch.
    fn retire(&mut self, tokens: &[Token]) -> Result<()> {
        let staying: Vec<usize> = (0..tokens.len()).filter(|&i| tokens[i].finish.is_none()).collect();
        if staying.len() == tokens.len() {
            return Ok(());
        }
        // a decoder's slots stay as their rows left them
        if self.decoder.is_none() {
            for (i, token) in tokens.iter().enumerate().filter(|(_, token)| token.finish.is_some()) {
                self.rows[token.row].state = Some(self.state.select(&[i])?);
            }
            if !staying.is_empty() {
                self.state = self.state.select(&staying)?;
            }
        }
        self.running = staying.into_iter().map(|i| tokens[i].row).collect();
        Ok(())
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Vec<Token>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.running.is_empty() {
            return None;
        }
        let tokens = self.step();
        if tokens.is_err() {
            self.running.clear();
        }
        Some(tokens)
    }
}

/// Generates to the end: of every prompt the tokens that follow it, a stop token included.
///
/// # Errors
/// Those of [`Generation`].
pub fn generate(
    model: &LanguageModel,
    prompts: &[impl AsRef<[u32]>],
    config: GenerationConfig,
) -> Result<Vec<Vec<u32>>> {
    let mut rows = vec![vec![]; prompts.len()];
    for step in Generation::new(model, prompts, config)? {
        for token in step? {
            rows[token.row].push(token.id);
        }
    }
    Ok(rows)
}

/// A decoder with the rows of `state` in its slots, if it has kernels for as many.
fn decoder<'a>(model: &Cow<'a, LanguageModel>, state: &ModelState) -> Result<Option<Decoder<'a>>> {
    if !model.device().is_cuda() {
        return Ok(None);
    }
    let rows = state.batch();
    let mut decoder = Decoder::over(model.clone(), rows)?;
    if !decoder.is_fused(rows) {
        return Ok(None);
    }
    (0..rows).try_for_each(|row| decoder.set_state(row, state, row))?;
    Ok(Some(decoder))
}

fn check(prompts: &[&[u32]], config: &GenerationConfig, vocabulary: usize) -> Result<()> {
    if prompts.is_empty() {
        return Err(Error::value("generation: prompts", "at least one", 0));
    }
    if let Some(row) = prompts.iter().position(|prompt| prompt.is_empty()) {
        return Err(Error::value(format!("generation: prompt {row}"), "at least one token", "none"));
    }
    let known = |name: &str, ids: &[u32]| match ids.iter().find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(id) => {
            let expected = format!("token ids below the vocabulary of {vocabulary}");
            Err(Error::value(format!("generation: {name}"), expected, id))
        }
    };
    known("stop_tokens", &config.stop_tokens)?;
    prompts.iter().enumerate().try_for_each(|(row, prompt)| known(&format!("prompt {row}"), prompt))
}

/// The prompts as one batch; the logits of each one's last token.
fn read(model: &LanguageModel, prompts: &[&[u32]], state: &mut ModelState) -> Result<Tensor> {
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let mut ids = vec![0u32; prompts.len() * longest];
    for (row, prompt) in ids.chunks_mut(longest).zip(prompts) {
        row[..prompt.len()].copy_from_slice(prompt);
    }
    let ids = Tensor::from_vec(ids, (prompts.len(), longest), model.device())?;
    let padded = lengths.iter().any(|&length| length != longest);
    let segments = padded.then(|| Segments::right_padded(&lengths, longest)).transpose()?;
    feed(model, &ids, segments.as_ref(), state)
}

/// The model's logits `[B, V]` of each row's last token, without their history.
fn feed(
    model: &LanguageModel,
    ids: &Tensor,
    segments: Option<&Segments>,
    state: &mut ModelState,
) -> Result<Tensor> {
    let logits = model.prefill(ids, segments, state)?.detach();
    state.detach();
    Ok(logits)
}
