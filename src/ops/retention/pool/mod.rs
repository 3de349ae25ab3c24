//! A pool of states for generation: rows that come and go, tokens that are tried and taken back.

mod slot;

use super::{Retention, Sizes, accumulation_dtype};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use slot::{Slot, Tokens};

/// The most tokens of a [`RetentionPoolConfig::window`].
const LONGEST_WINDOW: usize = 64;

/// The sizes and options of a [`RetentionPool`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetentionPoolConfig {
    /// States.
    pub slots: usize,
    /// Heads of each, `H`.
    pub heads: usize,
    /// Numbers of a key, `K`.
    pub keys: usize,
    /// Numbers of a value, `V`.
    pub values: usize,
    /// What states are kept in: f32, f64 (for sequences of f64), or bf16 at half the memory and traffic.
    ///
    /// A state of bf16 is rounded whenever it is written, and outputs drift away from those of f32, up to a level that
    /// depends on how long the head remembers. Measured over 4096 tokens of RetNet's eight heads, relative to the outputs, over
    /// the last 512 tokens: 6.4e-3 for the fastest decay (`1 - 2^-5`) to 8.5e-2 for the slowest (`1 - 2^-12`) with a window of
    /// 1; 2.2e-3 to 2.0e-2 with one of 8.
    pub dtype: DType,
    /// Tokens from one writing of a state to the next, at least 1. With more than 1 the tokens between wait in a buffer and
    /// are taken anew at every step, in order, so that outputs are those of a window of 1 (to the bit, for states of f32),
    /// while the state is only read.
    pub window: usize,
}

impl RetentionPoolConfig {
    /// States of f32, each written at every step.
    pub fn new(slots: usize, heads: usize, keys: usize, values: usize) -> Self {
        Self { slots, heads, keys, values, dtype: DType::F32, window: 1 }
    }

    fn validate(&self) -> Result<()> {
        let sizes =
            [("slots", self.slots), ("heads", self.heads), ("keys", self.keys), ("values", self.values)];
        for (name, size) in sizes {
            if size == 0 || size > i32::MAX as usize {
                return Err(Error::value(format!("retention pool: {name}"), "1 to 2^31 - 1", size));
            }
        }
        if self.window == 0 || self.window > LONGEST_WINDOW {
            let expected = format!("1 to {LONGEST_WINDOW} tokens");
            return Err(Error::value("retention pool: window", expected, self.window));
        }
        match self.dtype {
            DType::F32 | DType::F64 | DType::BF16 => Ok(()),
            other => Err(Error::dtype("retention pool: dtype", "f32, f64 or bf16", other)),
        }
    }
}

/// States of many sequences, for [`retention`](super::retention) a few tokens at a time.
///
/// Every call names the slot of each of its rows, or none for an idle row, whose outputs are zero. On CUDA the states move
/// on where they lie; a call is one kernel. Elsewhere they are replaced. Tokens may also be tried ([`RetentionPool::draft`]):
/// their outputs are given but the states stay until [`RetentionPool::accept`] says how many of them to keep. Not
/// differentiable.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use subquadratic::ops::{Form, Retention, RetentionPool, RetentionPoolConfig};
/// # fn main() -> subquadratic::Result<()> {
/// let mut pool = RetentionPool::new(RetentionPoolConfig::new(4, 2, 8, 16), &Device::Cpu)?;
/// let tokens = |n| Tensor::randn(0f32, 1.0, n, &Device::Cpu);
/// let (q, k, v) = (tokens((2, 3, 2, 8))?, tokens((2, 3, 2, 8))?, tokens((2, 3, 2, 16))?);
/// let args = Retention {
///     q: &q,
///     k: &k,
///     v: &v,
///     log_decay: &Tensor::new(&[-0.1f32, -0.01], &Device::Cpu)?,
///     scale: 1.0,
///     initial_state: None,
///     segments: None,
///     form: Form::Auto,
/// };
/// // three tokens each for the sequences in slots 3 and 0
/// let o = pool.step(&args, &[Some(3), Some(0)])?;
/// assert_eq!(o.dims(), [2, 3, 2, 16]);
/// // three more tried: two of the first row kept, none of the second
/// pool.draft(&args, &[Some(3), Some(0)])?;
/// pool.accept(&[2, 0])?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct RetentionPool {
    config: RetentionPoolConfig,
    device: Device,
    inner: Inner,
    draft: Option<Draft>,
}

#[derive(Debug)]
enum Inner {
    Slots(Vec<Slot>),
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Pool),
}

/// What [`RetentionPool::accept`] goes by.
#[derive(Debug)]
struct Draft {
    slots: Vec<Option<usize>>,
    tokens: Tokens,
    length: usize,
}

/// What a call does with its rows.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// Where their states lie.
    pub(super) slots: Vec<Option<usize>>,
    /// How many of their tokens stay; all if empty.
    pub(super) counts: Vec<usize>,
    /// None of them stays.
    pub(super) draft: bool,
    pub(super) outputs: bool,
}

impl Rows {
    /// How many of a row's `length` tokens its state takes, sooner or later.
    pub(super) fn taken(&self, row: usize, length: usize) -> usize {
        let all = self.counts.get(row).copied().unwrap_or(length);
        if self.draft { 0 } else { all }
    }

    #[cfg(feature = "cuda")]
    pub(super) fn narrow(&self, start: usize, count: usize) -> Self {
        let counts = self.counts.iter().skip(start).take(count).copied().collect();
        Self { slots: self.slots[start..start + count].to_vec(), counts, ..*self }
    }
}

impl RetentionPool {
    /// Fresh states, on a device.
    ///
    /// # Errors
    /// A size of nothing, another dtype, or a failed allocation.
    pub fn new(config: RetentionPoolConfig, device: &Device) -> Result<Self> {
        config.validate()?;
        let inner = Self::inner(&config, device)?;
        Ok(Self { config, device: device.clone(), inner, draft: None })
    }

    fn inner(config: &RetentionPoolConfig, device: &Device) -> Result<Inner> {
        #[cfg(feature = "cuda")]
        if device.is_cuda()
            && let Some(pool) = super::cuda::Pool::new(config, device)?
        {
            return Ok(Inner::Cuda(pool));
        }
        let RetentionPoolConfig { slots, heads, keys, values, dtype, .. } = *config;
        let fresh = Tensor::zeros((1, heads, keys, values), dtype, device)?;
        Ok(Inner::Slots(vec![Slot::new(fresh); slots]))
    }

    /// What it was made with.
    pub fn config(&self) -> &RetentionPoolConfig {
        &self.config
    }

    /// Puts a state `[H, K, V]` or `[1, H, K, V]` into a slot.
    ///
    /// # Errors
    /// A slot that is not there, another shape or device.
    pub fn set_state(&mut self, slot: usize, state: &Tensor) -> Result<()> {
        let RetentionPoolConfig { heads, keys, values, dtype, .. } = self.config;
        self.check_slot(slot)?;
        let state = if state.rank() == 3 { state.unsqueeze(0)? } else { state.clone() };
        if state.dims() != [1, heads, keys, values] {
            let expected = format!("[H, K, V] = [{heads}, {keys}, {values}]");
            return Err(Error::shape("retention pool: state", expected, state.dims()));
        }
        if !state.device().same_device(&self.device) {
            let (expected, got) = (self.device.location(), state.device().location());
            return Err(Error::value(
                "retention pool: state: device",
                format!("{expected:?}"),
                format!("{got:?}"),
            ));
        }
        let state = state.detach().to_dtype(dtype)?;
        match &mut self.inner {
            Inner::Slots(slots) => slots[slot] = Slot::new(state),
            #[cfg(feature = "cuda")]
            Inner::Cuda(pool) => pool.set(slot, &state)?,
        }
        Ok(())
    }

    /// Back to zeros.
    ///
    /// # Errors
    /// A slot that is not there.
    pub fn reset(&mut self, slot: usize) -> Result<()> {
        let RetentionPoolConfig { heads, keys, values, dtype, .. } = self.config;
        self.set_state(slot, &Tensor::zeros((heads, keys, values), dtype, &self.device)?)
    }

    /// The state in a slot behind all its tokens, `[1, H, K, V]` in f32 (f64 if it is kept in that); the slot keeps it.
    ///
    /// # Errors
    /// A slot that is not there.
    pub fn state(&mut self, slot: usize) -> Result<Tensor> {
        self.check_slot(slot)?;
        let state = match &mut self.inner {
            Inner::Slots(slots) => slots[slot].fold(self.config.dtype)?,
            #[cfg(feature = "cuda")]
            Inner::Cuda(pool) => pool.get(slot)?,
        };
        Ok(state.to_dtype(accumulation_dtype(self.config.dtype))?)
    }

    /// Outputs `[B, T, H, V]` in the dtype of `q`, as [`retention`](super::retention) has them; the states move behind the last token.
    ///
    /// `slots[b]` is where row `b`'s state lies, each slot at most once; `None` is an idle row. `initial_state` and
    /// `segments` must be `None`, for states come from the pool; the form is the recurrent one. A draft that still waits is
    /// dropped.
    ///
    /// # Errors
    /// A slot that is not there or comes twice, shapes that do not fit the pool's or one another, as [`retention`](super::retention).
    pub fn step(&mut self, args: &Retention, slots: &[Option<usize>]) -> Result<Tensor> {
        self.outputs(args, slots, false)
    }

    /// As [`RetentionPool::step`], but the states stay as they are until [`RetentionPool::accept`].
    ///
    /// # Errors
    /// As [`RetentionPool::step`].
    pub fn draft(&mut self, args: &Retention, slots: &[Option<usize>]) -> Result<Tensor> {
        let o = self.outputs(args, slots, true)?;
        let tokens = Tokens { k: args.k.detach(), v: args.v.detach(), log_decay: args.log_decay.detach() };
        self.draft = Some(Draft { slots: slots.to_vec(), tokens, length: args.q.dim(1)? });
        Ok(o)
    }

    /// Keeps the first `counts[b]` tokens of row `b` of the last draft, from none to all; its state moves behind them.
    ///
    /// # Errors
    /// No draft that waits, another number of rows, more tokens than a row has; the draft then goes on waiting.
    pub fn accept(&mut self, counts: &[usize]) -> Result<()> {
        let Some(draft) = &self.draft else {
            return Err(Error::value("retention pool: draft", "one that waits", "none"));
        };
        if counts.len() != draft.slots.len() || counts.iter().any(|&count| count > draft.length) {
            let expected = format!("{} counts of at most {}", draft.slots.len(), draft.length);
            return Err(Error::value("retention pool: counts", expected, format!("{counts:?}")));
        }
        let Some(Draft { slots, tokens, .. }) = self.draft.take() else { return Ok(()) };
        if counts.iter().all(|&count| count == 0) {
            return Ok(());
        }
        // nothing is asked
        let heads = self.config.heads;
        let (batch, length, _, keys) = tokens.k.dims4()?;
        let q = tokens.k.narrow(2, 0, 1)?.broadcast_as((batch, length, heads, keys))?;
        let args = tokens.args(&q, 1.0);
        let rows = Rows { slots, counts: counts.to_vec(), ..Rows::default() };
        self.run(&args, &rows)?;
        Ok(())
    }

    fn outputs(&mut self, args: &Retention, slots: &[Option<usize>], draft: bool) -> Result<Tensor> {
        self.draft = None;
        let rows = Rows { slots: slots.to_vec(), counts: vec![], draft, outputs: true };
        self.run(args, &rows)?.ok_or_else(|| Error::value("retention pool", "outputs", "none"))
    }

    fn run(&mut self, args: &Retention, rows: &Rows) -> Result<Option<Tensor>> {
        let sizes = args.check()?;
        self.check(args, sizes, &rows.slots)?;
        if sizes.batch * sizes.length == 0 {
            let dims = (sizes.batch, sizes.length, sizes.heads, sizes.values);
            return Ok(Some(Tensor::zeros(dims, args.q.dtype(), &self.device)?));
        }
        let config = self.config;
        match &mut self.inner {
            Inner::Slots(slots) => {
                let mut outputs = vec![];
                for (row, slot) in rows.slots.iter().enumerate() {
                    outputs.push(match slot {
                        Some(slot) => slots[*slot].run(args, row, rows, &config)?,
                        None => {
                            let dims = (1, sizes.length, sizes.heads, sizes.values);
                            Tensor::zeros(dims, args.q.dtype(), &self.device)?
                        }
                    });
                }
                Ok(if rows.outputs { Some(Tensor::cat(&outputs, 0)?) } else { None })
            }
            #[cfg(feature = "cuda")]
            Inner::Cuda(pool) => pool.run(args, sizes, rows),
        }
    }

    fn check_slot(&self, slot: usize) -> Result<()> {
        match slot < self.config.slots {
            true => Ok(()),
            false => Err(Error::value("retention pool: slot", format!("below {}", self.config.slots), slot)),
        }
    }

    fn check(&self, args: &Retention, sizes: Sizes, slots: &[Option<usize>]) -> Result<()> {
        let c = &self.config;
        if [sizes.heads, sizes.keys, sizes.values] != [c.heads, c.keys, c.values] {
            let expected = format!("[H, K, V] = {:?}, as the pool has", [c.heads, c.keys, c.values]);
            let got = [sizes.heads, sizes.keys, sizes.values];
            return Err(Error::shape("retention pool: q, k and v", expected, &got));
        }
        if (c.dtype == DType::F64) != (args.q.dtype() == DType::F64) {
            let expected = format!("one whose states are {:?}", c.dtype);
            return Err(Error::dtype("retention pool: q", expected, args.q.dtype()));
        }
        if args.initial_state.is_some() || args.segments.is_some() {
            let got = if args.segments.is_some() { "segments" } else { "an initial state" };
            return Err(Error::value("retention pool: args", "no initial state and no segments", got));
        }
        if !args.q.device().same_device(&self.device) {
            let (expected, got) = (self.device.location(), args.q.device().location());
            return Err(Error::value("retention: q: device", format!("{expected:?}"), format!("{got:?}")));
        }
        if slots.len() != sizes.batch {
            let expected = format!("one for each of {} rows", sizes.batch);
            return Err(Error::value("retention pool: slots", expected, slots.len()));
        }
        let mut taken = vec![false; c.slots];
        for &slot in slots.iter().flatten() {
            self.check_slot(slot)?;
            if std::mem::replace(&mut taken[slot], true) {
                let got = format!("{slot} twice");
                return Err(Error::value("retention pool: slots", "each at most once", got));
            }
        }
        Ok(())
    }
}
