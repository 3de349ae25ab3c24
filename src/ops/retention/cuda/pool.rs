//! A pool of states on CUDA, moved on in place by a kernel of its own.

use super::call::{Decays, Heads, Launcher, Locks, Walk};
use super::plan;
use super::step::{Mode, Slots};
use crate::backend::cuda::{Buffer, Element, Guards, Held, contiguous, device_of, with_unit_stride};
use crate::ops::retention::pool::{RetentionPoolConfig, Rows};
use crate::ops::retention::{Retention, Sizes};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// States, and the tokens that they have yet to take.
#[derive(Debug)]
pub(in super::super) struct Pool {
    /// `[slots, H, K, V]`, f32 or bf16. Kernels write to it and to the buffer; nobody else holds them.
    states: Tensor,
    buffer: Option<Tokens>,
    /// How many tokens each slot has in the buffer.
    buffered: Vec<usize>,
    room: usize,
    /// What the last call's rows did, here and on the device.
    rows: Option<(Vec<i32>, Tensor)>,
}

/// The buffer: tokens of one dtype, one number of heads and one kind of decay.
#[derive(Debug)]
struct Tokens {
    /// `[slots, room, Hk, K]` and `[slots, room, Hv, V]`.
    keys: Tensor,
    values: Tensor,
    /// `[slots, room, H]` if every token has its own, else `[H]`.
    decays: Tensor,
}

impl Tokens {
    fn per_token(&self) -> bool {
        self.decays.rank() == 3
    }

    /// Whether more tokens like those of a call may join.
    fn takes(&self, args: &Retention) -> bool {
        let like =
            |own: &Tensor, x: &Tensor| own.dtype() == x.dtype() && own.dims().get(2) == x.dims().get(2);
        let decays = match args.log_decay.rank() {
            3 => self.per_token(),
            _ => self.decays.id() == args.log_decay.id(),
        };
        like(&self.keys, args.k) && like(&self.values, args.v) && decays
    }
}

impl Pool {
    /// `None` where no kernel takes such states.
    pub(in super::super) fn new(config: &RetentionPoolConfig, device: &Device) -> Result<Option<Self>> {
        let RetentionPoolConfig { slots, heads, keys, values, dtype, window } = *config;
        let fits = plan::room(keys).is_some() && matches!(dtype, DType::F32 | DType::BF16);
        if !fits || heads > plan::MOST_BLOCKS {
            return Ok(None);
        }
        Ok(Some(Self {
            states: Tensor::zeros((slots, heads, keys, values), dtype, device)?,
            buffer: None,
            buffered: vec![0; slots],
            room: window - 1,
            rows: None,
        }))
    }

    /// `[1, H, K, V]`, of the states' dtype.
    pub(in super::super) fn set(&mut self, slot: usize, state: &Tensor) -> Result<()> {
        self.buffered[slot] = 0;
        Ok(self.states.slice_set(&state.contiguous()?, 0, slot)?)
    }

    /// `[1, H, K, V]`, a copy.
    pub(in super::super) fn get(&mut self, slot: usize) -> Result<Tensor> {
        self.fold(&[slot])?;
        Ok(self.states.narrow(0, slot, 1)?.force_contiguous()?)
    }

    /// The outputs of a call's rows, if they are wanted.
    pub(in super::super) fn run(
        &mut self,
        args: &Retention,
        sizes: Sizes,
        rows: &Rows,
    ) -> Result<Option<Tensor>> {
        let own = args.q.dtype();
        let alike = [args.k, args.v].iter().all(|x| x.dtype() == own);
        let dtype = match own {
            DType::BF16 | DType::F16 if alike => own,
            DType::F64 => return Err(Error::dtype("retention: q", "f32, bf16 or f16, as the states", own)),
            _ => DType::F32,
        };
        let sequence = |x: &Tensor| with_unit_stride(&x.detach().to_dtype(dtype)?);
        // the decays of the buffer are known again by the tensor they are
        let decays = match args.log_decay.dtype() {
            DType::F32 => args.log_decay.clone(),
            _ => args.log_decay.to_dtype(DType::F32)?,
        };
        let (q, k, v) = (sequence(args.q)?, sequence(args.k)?, sequence(args.v)?);
        let unified = Retention { q: &q, k: &k, v: &v, log_decay: &decays, ..*args };
        if self.buffer.as_ref().is_some_and(|buffer| !buffer.takes(&unified)) {
            let all: Vec<usize> = (0..self.buffered.len()).collect();
            self.fold(&all)?;
            self.buffer = None;
        }
        if self.buffer.is_none() && self.room > 0 {
            self.buffer = Some(self.new_buffer(&unified, sizes)?);
        }
        let mode = if rows.draft { Mode::Draft } else { Mode::Step };
        let o = self.dispatch(&unified, sizes, rows, mode)?;
        for (row, slot) in rows.slots.iter().enumerate() {
            let (Some(slot), false) = (*slot, rows.draft) else { continue };
            let now = self.buffered[slot] + rows.taken(row, sizes.length);
            self.buffered[slot] = if now > self.room { 0 } else { now };
        }
        o.map(|o| Ok(o.to_dtype(own)?)).transpose()
    }

    fn new_buffer(&self, args: &Retention, sizes: Sizes) -> Result<Tokens> {
        let (slots, device) = (self.buffered.len(), args.k.device());
        let zeros = |heads: usize, width: usize| {
            Tensor::zeros((slots, self.room, heads, width), args.k.dtype(), device)
        };
        Ok(Tokens {
            keys: zeros(sizes.groups[1], sizes.keys)?,
            values: zeros(sizes.groups[2], sizes.values)?,
            decays: match sizes.per_token {
                true => Tensor::zeros((slots, self.room, sizes.heads), DType::F32, device)?,
                false => args.log_decay.clone(),
            },
        })
    }

    /// The states of some slots take all that they have yet to.
    fn fold(&mut self, slots: &[usize]) -> Result<()> {
        let owing = |slot: &usize| self.buffered.get(*slot).is_some_and(|count| *count > 0);
        let slots: Vec<usize> = slots.iter().copied().filter(owing).collect();
        let Some(buffer) = &self.buffer else { return Ok(()) };
        if slots.is_empty() {
            return Ok(());
        }
        let (_, heads, keys, values) = self.states.dims4()?;
        let groups = [heads, buffer.keys.dim(2)?, buffer.values.dim(2)?];
        let (rows, per_token) = (slots.len(), buffer.per_token());
        let sizes = Sizes { batch: rows, length: 0, heads, keys, values, groups, per_token };
        // no tokens of the call's own: what they would be like
        let (dtype, device) = (buffer.keys.dtype(), buffer.keys.device());
        let like = |heads, width| Tensor::zeros((rows, 1, heads, width), dtype, device)?.narrow(1, 0, 0);
        let (q, k, v) = (like(heads, keys)?, like(groups[1], keys)?, like(groups[2], values)?);
        let log_decay = buffer.decays.clone();
        let args = Retention {
            q: &q,
            k: &k,
            v: &v,
            log_decay: &log_decay,
            scale: 1.0,
            initial_state: None,
            segments: None,
            form: crate::ops::Form::Auto,
        };
        let rows = Rows { slots: slots.iter().map(|slot| Some(*slot)).collect(), ..Rows::default() };
        self.dispatch(&args, sizes, &rows, Mode::Fold)?;
        slots.into_iter().for_each(|slot| self.buffered[slot] = 0);
        Ok(())
    }

    fn dispatch(
        &mut self,
        args: &Retention,
        sizes: Sizes,
        rows: &Rows,
        mode: Mode,
    ) -> Result<Option<Tensor>> {
        match (args.q.dtype(), self.states.dtype()) {
            (DType::BF16, DType::F32) => self.launch::<bf16, f32>(args, sizes, rows, mode),
            (DType::BF16, _) => self.launch::<bf16, bf16>(args, sizes, rows, mode),
            (DType::F16, DType::F32) => self.launch::<f16, f32>(args, sizes, rows, mode),
            (DType::F16, _) => self.launch::<f16, bf16>(args, sizes, rows, mode),
            (_, DType::F32) => self.launch::<f32, f32>(args, sizes, rows, mode),
            _ => self.launch::<f32, bf16>(args, sizes, rows, mode),
        }
    }

    /// Slots, tokens of the buffer and tokens that stay, `[3, B]` on the device.
    fn rows(&mut self, rows: &Rows, length: usize, device: &Device) -> Result<Tensor> {
        let slots = rows.slots.iter().map(|slot| slot.map_or(-1, |slot| slot as i32));
        let buffered = rows.slots.iter().map(|slot| slot.map_or(0, |slot| self.buffered[slot] as i32));
        let taken = (0..rows.slots.len()).map(|row| rows.taken(row, length) as i32);
        let numbers: Vec<i32> = slots.chain(buffered).chain(taken).collect();
        match &self.rows {
            Some((known, tensor)) if *known == numbers => Ok(tensor.clone()),
            _ => {
                let tensor = Tensor::from_slice(&numbers, (3, rows.slots.len()), device)?;
                self.rows = Some((numbers, tensor.clone()));
                Ok(tensor)
            }
        }
    }

    /// One launch, or several where rows and heads are more than one takes.
    fn launch<E: Element, S: Element>(
        &mut self,
        args: &Retention,
        sizes: Sizes,
        rows: &Rows,
        mode: Mode,
    ) -> Result<Option<Tensor>> {
        let most = plan::MOST_BLOCKS / sizes.heads;
        if sizes.batch <= most {
            return self.launch_once::<E, S>(args, sizes, rows, mode);
        }
        let mut parts = vec![];
        for start in (0..sizes.batch).step_by(most) {
            let batch = most.min(sizes.batch - start);
            let narrow = |x: &Tensor| x.narrow(0, start, batch);
            let (q, k, v) = (narrow(args.q)?, narrow(args.k)?, narrow(args.v)?);
            let log_decay = match args.log_decay.rank() {
                3 if mode != Mode::Fold => narrow(args.log_decay)?.contiguous()?,
                _ => args.log_decay.clone(),
            };
            let part = Retention { q: &q, k: &k, v: &v, log_decay: &log_decay, ..*args };
            parts.extend(self.launch_once::<E, S>(
                &part,
                Sizes { batch, ..sizes },
                &rows.narrow(start, batch),
                mode,
            )?);
        }
        Ok(if parts.is_empty() { None } else { Some(Tensor::cat(&parts, 0)?) })
    }

    fn launch_once<E: Element, S: Element>(
        &mut self,
        args: &Retention,
        sizes: Sizes,
        rows: &Rows,
        mode: Mode,
    ) -> Result<Option<Tensor>> {
        let Sizes { batch, length, heads, keys, values, .. } = sizes;
        let what = &format!(
            "retention from a pool, [B, T, H] = [{batch}, {length}, {heads}], K = {keys}, V = {values}"
        );
        let device = &device_of(args.q)?;
        let rows_there = self.rows(rows, length, args.q.device())?;
        let log_decay = contiguous(args.log_decay)?;
        let decays = Decays { log_decay: &log_decay, marks: None, plan: plan::one_segment(length), heads };
        let walk = Walk {
            q: args.q,
            k: args.k,
            v: args.v,
            decays,
            inner: 1.0,
            outer: args.scale as f32,
            transposed: false,
            backwards: false,
            initial: None,
        };
        let mut o = match rows.outputs {
            true => Some(Buffer::<E>::new(device, batch * length * heads * values)?),
            false => None,
        };
        let (locks, stream) = (Locks::new(&walk, None), device.cuda_stream());
        let buffer = self.buffer.as_ref().map(|b| [&b.keys, &b.values, &b.decays].map(Held::new));
        let (states, numbers) = (Held::new(&self.states), Held::new(&rows_there));
        {
            let guards = &mut Guards::default();
            let mut arguments = locks.arguments::<E>(&walk, device, &stream, guards)?;
            if let Some(o) = &mut o {
                arguments.o = Heads::contiguous(o.pointer(&stream, guards), [length, heads, values]);
            }
            arguments.state = states.pointer("retention: states", device, &stream, guards)?;
            arguments.initial = arguments.state;
            let mut slots = Slots { room: self.room as i32, mode: mode as i32, ..Slots::default() };
            let step = (batch * size_of::<i32>()) as u64;
            slots.slots = numbers.pointer("retention: slots", device, &stream, guards)?;
            (slots.buffered, slots.taken) = (slots.slots + step, slots.slots + 2 * step);
            if let Some([keys, values, decays]) = &buffer {
                slots.keys = keys.pointer("retention: buffer", device, &stream, guards)?;
                slots.values = values.pointer("retention: buffer", device, &stream, guards)?;
                slots.decays = decays.pointer("retention: buffer", device, &stream, guards)?;
            }
            // SAFETY: `Locks` gives pointers and steps of tensors whose shapes were checked; states and buffer have the
            // pool's sizes, of which `Rows` has valid slots, each once, and no more tokens than there is room for.
            unsafe { Launcher { what, device }.step_of_pool::<E, S>(&walk, arguments, slots)? };
        }
        Ok(o.map(|o| o.tensor(device, (batch, length, heads, values))))
    }
}
