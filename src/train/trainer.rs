//! The training loop's body.

use super::loss::check_targets;
use super::{AdamW, AdamWConfig, CrossEntropy, Gradients, Group, IGNORE, Schedule, cross_entropy};
use crate::models::{LanguageModel, ModelState};
use crate::ops::Segments;
use crate::{Error, Result, autograd};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// What a [`Trainer`] needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerConfig {
    /// The optimiser's constants.
    pub optimizer: AdamWConfig,
    /// The learning rate.
    pub schedule: Schedule,
    /// Gradients of a larger norm (over all parameters) are scaled down to it; infinity leaves them. Default 1.
    #[serde(with = "super::exact")]
    pub max_gradient_norm: f64,
    /// What to do when the gradients are not finite. False (the default): the step is an error. True: it is left out,
    /// the carried states are forgotten, and the report says so. Neither way changes a parameter.
    pub skip_nonfinite: bool,
}

impl TrainerConfig {
    /// The defaults with a schedule.
    pub fn new(schedule: Schedule) -> Self {
        let optimizer = AdamWConfig::default();
        Self { optimizer, schedule, max_gradient_norm: 1.0, skip_nonfinite: false }
    }
}

/// A batch (or a part of one: see [`Trainer::step`]) to train on.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `[B, L]` of u32.
    pub inputs: Tensor,
    /// The token that follows each, `[B, L]` of u32; [`IGNORE`] where none counts.
    pub targets: Tensor,
    /// Packed sequences and padding; `None` is one sequence a row.
    pub segments: Option<Segments>,
    /// Whether the rows go on from the last batch of the same stream, rather than begin afresh. Gradients end between
    /// batches: truncated back-propagation.
    pub carry: bool,
    /// Which carried state: batches of other streams do not touch it. Default 0.
    pub stream: usize,
}

impl Batch {
    /// Rows that begin afresh, one sequence each.
    pub fn new(inputs: Tensor, targets: Tensor) -> Self {
        Self { inputs, targets, segments: None, carry: false, stream: 0 }
    }

    /// How many targets count, all of them checked: once there is a graph, an error would drop it where candle's
    /// recursion may overflow the stack.
    fn count(&self, vocabulary: usize) -> Result<usize> {
        let [_, _] = *self.inputs.dims() else {
            return Err(Error::shape("batch: inputs", "[B, L]", self.inputs.dims()));
        };
        let targets = check_targets(&self.targets, self.inputs.dims(), vocabulary)?;
        Ok(targets.iter().filter(|&&target| target != IGNORE).count())
    }
}

/// What one [`Trainer::step`] did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The number of this step, from 0.
    pub step: u64,
    /// Mean over the targets of `-log p`, in nats; divided by `ln 2` bits per token.
    pub loss: f64,
    /// The norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Tokens in the batches.
    pub tokens: usize,
    /// Wall time of the step.
    pub seconds: f64,
    /// Whether the step was left out: see [`TrainerConfig::skip_nonfinite`].
    pub skipped: bool,
}

impl StepReport {
    /// Throughput of this step.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }
}

/// A model in training: its optimiser, its schedule, the states it carries from batch to batch.
///
/// ```
/// # use candle_core::{DType, Device};
/// # use subquadratic::models::{LanguageModel, ModelConfig};
/// # use subquadratic::train::{Order, Schedule, TextBatches, Trainer, TrainerConfig};
/// # fn main() -> subquadratic::Result<()> {
/// let model = LanguageModel::init(&ModelConfig::mamba(16, 1, 256), 0, DType::F32, &Device::Cpu)?;
/// let mut text = TextBatches::bytes(&b"to be or not to be, ".repeat(8), 2, 16, Order::Sequential)?;
/// let mut trainer = Trainer::new(model, TrainerConfig::new(Schedule::cosine(1e-2, 2, 10)))?;
/// for _ in 0..10 {
///     let report = trainer.step(&[text.next_batch(&Device::Cpu)?])?;
///     println!("step {}: loss {:.3}", report.step, report.loss);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Trainer {
    pub(super) model: LanguageModel,
    pub(super) optimizer: AdamW,
    pub(super) config: TrainerConfig,
    pub(super) steps: u64,
    pub(super) tokens: u64,
    /// By stream.
    pub(super) states: BTreeMap<usize, ModelState>,
}

impl Trainer {
    /// Trains all variables of `model`, in their [usual groups](Group::usual).
    ///
    /// # Errors
    /// A model without variables, a setting outside its range.
    pub fn new(model: LanguageModel, config: TrainerConfig) -> Result<Self> {
        Self::with_groups(model, config, Group::usual)
    }

    /// The same with every parameter in the group that `group` says by name and value.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_groups(
        model: LanguageModel,
        config: TrainerConfig,
        group: impl Fn(&str, &Tensor) -> Group,
    ) -> Result<Self> {
        if model.variables().is_empty() {
            return Err(Error::value("trainer: model", "a trainable model (init, load_trainable)", "none"));
        }
        config.schedule.validate()?;
        let norm = config.max_gradient_norm;
        if norm.is_nan() || norm <= 0.0 {
            return Err(Error::value("trainer: max_gradient_norm", "a number above 0", norm));
        }
        let optimizer = AdamW::with_groups(model.variables(), config.optimizer.clone(), group)?;
        Ok(Self { model, optimizer, config, steps: 0, tokens: 0, states: BTreeMap::new() })
    }

    /// The model, as trained so far; see [`LanguageModel::frozen`] for evaluation and generation.
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// The model, to change how it is run.
    pub fn model_mut(&mut self) -> &mut LanguageModel {
        &mut self.model
    }

    /// The settings.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// Sets another schedule from the next step on.
    ///
    /// # Errors
    /// Those of [`Schedule::validate`].
    pub fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        schedule.validate()?;
        self.config.schedule = schedule;
        Ok(())
    }

    /// Steps done, those left out included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Tokens trained on.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// One step of the optimiser on the mean loss over all targets of `batches`: micro-batches, one after another in
    /// memory, that together give the gradient of one big batch (whatever number of targets each has).
    ///
    /// # Errors
    /// No targets, ids or segments that do not fit, and gradients that are not finite; nothing has changed then.
    pub fn step(&mut self, batches: &[Batch]) -> Result<StepReport> {
        let start = Instant::now();
        let vocabulary = self.model.config().vocab_size;
        let counts = batches.iter().map(|batch| batch.count(vocabulary)).collect::<Result<Vec<_>>>()?;
        let targets: usize = counts.iter().sum();
        if targets == 0 {
            return Err(Error::value("training step: targets", "at least one that is not ignored", 0));
        }
        let mut states = self.states.clone();
        let mut gradients: Option<Gradients> = None;
        let mut loss = 0.0;
        for (batch, &count) in batches.iter().zip(&counts) {
            if count == 0 {
                // moves the carried state on, and makes no graph
                forward(&self.model.frozen()?, batch, &mut states)?;
                continue;
            }
            let (share, mut store) = autograd::value_and_grad(|| {
                let total = forward(&self.model, batch, &mut states)?.total;
                Ok((total / targets as f64)?)
            })?;
            loss += share.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            let part = Gradients::take(self.model.variables(), &mut store);
            match &mut gradients {
                None => gradients = Some(part),
                Some(gradients) => gradients.add(&part)?,
            }
        }
        let Some(mut gradients) = gradients else {
            return Err(Error::value("training step: batches", "at least one", 0));
        };
        let gradient_norm = gradients.clip(self.config.max_gradient_norm)?;
        let skipped = !gradient_norm.is_finite() || !loss.is_finite();
        if skipped && !self.config.skip_nonfinite {
            let got = format!("{gradient_norm}, loss {loss}");
            return Err(Error::value(
                format!("gradient norm in step {}", self.steps),
                "a finite number",
                got,
            ));
        }
        let step = self.steps;
        let learning_rate = self.config.schedule.rate(step);
        if skipped {
            states.clear();
        } else {
            self.optimizer.step(&gradients, learning_rate)?;
        }
        let tokens = batches.iter().map(|batch| batch.inputs.elem_count()).sum();
        self.steps += 1;
        self.tokens += tokens as u64;
        self.states = states;
        let seconds = start.elapsed().as_secs_f64();
        Ok(StepReport { step, loss, gradient_norm, learning_rate, tokens, seconds, skipped })
    }

    /// The mean loss over the targets of `batches`, in nats, without training. States are carried among these batches
    /// as they ask, apart from those of the training.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn evaluate(&self, batches: impl IntoIterator<Item = Result<Batch>>) -> Result<f64> {
        let model = self.model.frozen()?;
        let mut states = BTreeMap::new();
        let (mut sum, mut targets) = (0.0, 0);
        for batch in batches {
            let loss = forward(&model, &batch?, &mut states)?;
            sum += loss.total.to_dtype(DType::F64)?.to_scalar::<f64>()?;
            targets += loss.targets;
        }
        if targets == 0 {
            return Err(Error::value("evaluation: targets", "at least one that is not ignored", 0));
        }
        Ok(sum / targets as f64)
    }
}

/// The loss of one batch; its final state, cut off from the graph, takes its place among `states`.
fn forward(
    model: &LanguageModel,
    batch: &Batch,
    states: &mut BTreeMap<usize, ModelState>,
) -> Result<CrossEntropy> {
    let rows = match *batch.inputs.dims() {
        [rows, _] => rows,
        _ => return Err(Error::shape("batch: inputs", "[B, L]", batch.inputs.dims())),
    };
    let mut state = match states.remove(&batch.stream) {
        Some(state) if batch.carry => state,
        _ => model.init_state(rows)?,
    };
    let logits = model.forward_segments(&batch.inputs, batch.segments.as_ref(), Some(&mut state))?;
    state.detach();
    states.insert(batch.stream, state);
    cross_entropy(&logits, &batch.targets)
}
