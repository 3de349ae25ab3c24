//! What a long convolution carries from one call to the next: its past inputs.

use super::lane::{Lane, StreamFilter};
use crate::backend::cpu::simd::Real;
use crate::ops::long_conv::cpu::block;
use crate::ops::long_conv::{LongConv, long_conv};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::any::Any;
use std::sync::Arc;

/// The state of a causal long convolution for `B` sequences: all inputs that a tap may still meet, and what is known of
/// the outputs to come. It grows with the sequence, up to the filter's length.
///
/// A clone is cheap; what it shares is copied when one of them goes on.
#[derive(Clone, Debug)]
pub struct LongConvState {
    batch: usize,
    channels: usize,
    dtype: DType,
    store: Store,
}

#[derive(Clone, Debug)]
enum Store {
    /// Inputs of every row, `[P, D]`, differentiable.
    Tensors(Vec<Tensor>),
    /// By row and block of channels.
    F32(Arc<Vec<Vec<Lane<f32>>>>),
    F64(Arc<Vec<Vec<Lane<f64>>>>),
}

impl LongConvState {
    /// The state before the first token of `batch` sequences of `channels`, in f32 or f64.
    ///
    /// # Errors
    /// Another dtype, or a failed allocation.
    pub fn new(batch: usize, channels: usize, dtype: DType, device: &Device) -> Result<Self> {
        Self::from_past(&Tensor::zeros((batch, 0, channels), dtype, device)?, &vec![0; batch])
    }

    /// From inputs that came before: the first `lengths[b]` of row `b` of `past` `[B, P, D]`, oldest first.
    ///
    /// # Errors
    /// Another shape or dtype, or lengths that do not fit.
    pub fn from_past(past: &Tensor, lengths: &[usize]) -> Result<Self> {
        let Ok((batch, most, channels)) = past.dims3() else {
            return Err(Error::shape("long_conv state: past", "[B, P, D]", past.dims()));
        };
        if !matches!(past.dtype(), DType::F32 | DType::F64) {
            return Err(Error::dtype("long_conv state: past", "f32 or f64", past.dtype()));
        }
        if lengths.len() != batch || lengths.iter().any(|&length| length > most) {
            let expected = format!("{batch} lengths of at most {most}");
            return Err(Error::value("long_conv state: lengths", expected, format!("{lengths:?}")));
        }
        let row = |(row, &length): (usize, &usize)| Ok(past.get(row)?.narrow(0, 0, length)?);
        let rows = lengths.iter().enumerate().map(row).collect::<Result<_>>()?;
        Ok(Self { batch, channels, dtype: past.dtype(), store: Store::Tensors(rows) })
    }

    /// The inputs of every row, oldest first, filled up with zeros: `[B, P, D]`; and how many each row has.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn past(&self) -> Result<(Tensor, Vec<usize>)> {
        let rows = self.rows()?;
        let lengths = rows.iter().map(|row| Ok(row.dim(0)?)).collect::<Result<Vec<usize>>>()?;
        let most = lengths.iter().copied().max().unwrap_or(0);
        if rows.is_empty() {
            return Ok((Tensor::zeros((0, 0, self.channels), self.dtype, &Device::Cpu)?, lengths));
        }
        let fill = |(row, length): (&Tensor, &usize)| row.pad_with_zeros(0, 0, most - length);
        let rows = rows.iter().zip(&lengths).map(fill).collect::<candle_core::Result<Vec<_>>>()?;
        Ok((Tensor::stack(&rows, 0)?, lengths))
    }

    /// `B`
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// `D`
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// f32 or f64.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Back to the state before the first token.
    pub fn reset(&mut self) {
        let rows = (0..self.batch).map(|_| Tensor::zeros((0, self.channels), self.dtype, &Device::Cpu));
        if let Ok(rows) = rows.collect() {
            self.store = Store::Tensors(rows);
        }
    }

    /// The same values without their history.
    pub fn detach(&self) -> Self {
        let mut state = self.clone();
        if let Store::Tensors(rows) = &mut state.store {
            rows.iter_mut().for_each(|row| *row = row.detach());
        }
        state
    }

    /// The states of `rows`, in that order; a row may come more than once.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        if let Some(row) = rows.iter().find(|&&row| row >= self.batch) {
            return Err(Error::value("state: row", format!("below the batch of {}", self.batch), row));
        }
        let store = match &self.store {
            Store::Tensors(all) => Store::Tensors(rows.iter().map(|&row| all[row].clone()).collect()),
            Store::F32(all) => Store::F32(Arc::new(rows.iter().map(|&row| all[row].clone()).collect())),
            Store::F64(all) => Store::F64(Arc::new(rows.iter().map(|&row| all[row].clone()).collect())),
        };
        Ok(Self { batch: rows.len(), store, ..self.clone() })
    }

    /// The memory it takes, in bytes.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::Tensors(rows) => rows.iter().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum(),
            Store::F32(rows) => 4 * rows.iter().flatten().map(Lane::len).sum::<usize>(),
            Store::F64(rows) => 8 * rows.iter().flatten().map(Lane::len).sum::<usize>(),
        }
    }

    pub(super) fn check(&self, batch: usize, channels: usize) -> Result<()> {
        if (self.batch, self.channels) == (batch, channels) {
            return Ok(());
        }
        let expected = format!("a batch of {batch} and {channels} channels");
        Err(Error::value("long_conv state", expected, format!("{} and {}", self.batch, self.channels)))
    }

    /// Whether a gradient may pass through it.
    pub fn is_tracked(&self) -> bool {
        matches!(&self.store, Store::Tensors(rows) if rows.iter().any(|row| row.track_op()))
    }

    /// Whether no row has had a token.
    pub(super) fn is_fresh(&self) -> bool {
        match &self.store {
            Store::Tensors(rows) => rows.iter().all(|row| row.elem_count() == 0),
            Store::F32(rows) => rows.iter().flatten().all(|lane| lane.past.is_empty()),
            Store::F64(rows) => rows.iter().flatten().all(|lane| lane.past.is_empty()),
        }
    }

    /// The inputs of every row, `[P, D]`.
    fn rows(&self) -> Result<Vec<Tensor>> {
        match &self.store {
            Store::Tensors(rows) => Ok(rows.clone()),
            Store::F32(rows) => rows.iter().map(|row| joined(row, self.channels)).collect(),
            Store::F64(rows) => rows.iter().map(|row| joined(row, self.channels)).collect(),
        }
    }

    /// The rows as lanes of `filter`.
    pub(super) fn rows_mut<T: Real>(&mut self, filter: &StreamFilter<T>) -> Result<&mut Vec<Vec<Lane<T>>>> {
        if self.dtype != T::DTYPE {
            return Err(Error::dtype("long_conv state", T::DTYPE.as_str(), self.dtype));
        }
        if let Store::Tensors(rows) = &self.store {
            let lanes: Vec<Vec<Lane<T>>> =
                rows.iter().map(|row| split(row, filter)).collect::<Result<_>>()?;
            let mut lanes: Box<dyn Any> = Box::new(Arc::new(lanes));
            self.store = match lanes.downcast_mut::<Arc<Vec<Vec<Lane<f32>>>>>() {
                Some(lanes) => Store::F32(lanes.clone()),
                None => match lanes.downcast_mut::<Arc<Vec<Vec<Lane<f64>>>>>() {
                    Some(lanes) => Store::F64(lanes.clone()),
                    None => return Err(Error::dtype("long_conv state", "f32 or f64", T::DTYPE)),
                },
            };
        }
        let rows: &mut dyn Any = match &mut self.store {
            Store::F32(rows) => rows,
            Store::F64(rows) => rows,
            Store::Tensors(rows) => rows,
        };
        let rows = rows.downcast_mut::<Arc<Vec<Vec<Lane<T>>>>>();
        let rows = rows.ok_or_else(|| Error::dtype("long_conv state", T::DTYPE.as_str(), self.dtype))?;
        Ok(Arc::make_mut(rows))
    }

    /// The general form: the past convolved again, in candle's graph.
    pub(super) fn differentiably(&mut self, args: &LongConv, v: &Tensor) -> Result<Tensor> {
        let mut rows = self.rows()?;
        let (batch, length, _) = v.dims3()?;
        let keep = args.check()?.taps - 1;
        let segments = crate::ops::Segments::or_whole(args.segments, batch, length);
        let mut ys = vec![];
        for (row, past) in rows.iter_mut().enumerate() {
            let part = |x: &Tensor, tokens: &std::ops::Range<usize>| {
                x.narrow(0, row, 1)?.narrow(1, tokens.start, tokens.len())
            };
            let mut y = vec![];
            let mut done = 0;
            for run in segments.row(row) {
                if run.fresh {
                    *past = past.narrow(0, 0, 0)?;
                }
                y.push(v.zeros_like()?.narrow(0, row, 1)?.narrow(1, done, run.tokens.start - done)?);
                done = run.tokens.end;
                let (v, before) = (part(v, &run.tokens)?, past.unsqueeze(0)?);
                let gate = args.post_gate.map(|gate| part(gate, &run.tokens)).transpose()?;
                let run = LongConv {
                    x: &v,
                    pre_gate: None,
                    post_gate: gate.as_ref(),
                    past: Some(&before),
                    segments: None,
                    ..*args
                };
                y.push(long_conv(&run)?);
                let all = Tensor::cat(&[&*past, &v.squeeze(0)?], 0)?;
                let excess = all.dim(0)?.saturating_sub(keep);
                *past = all.narrow(0, excess, all.dim(0)? - excess)?;
            }
            y.push(v.zeros_like()?.narrow(0, row, 1)?.narrow(1, done, length - done)?);
            ys.push(Tensor::cat(&y, 1)?);
        }
        let y = Tensor::cat(&ys, 0)?.to_dtype(args.x.dtype())?;
        self.store = Store::Tensors(rows);
        Ok(y)
    }
}

/// `[P, D]` of the lanes of one row.
fn joined<T: Real>(row: &[Lane<T>], channels: usize) -> Result<Tensor> {
    let lanes = crate::ops::long_conv::cpu::lanes::<T>(crate::backend::cpu::simd::Isa::best());
    let count = row.first().map_or(0, |lane| lane.past.len() / lanes);
    let mut values = vec![T::ZERO; count * channels];
    for (index, lane) in row.iter().enumerate() {
        let channels_of = block(index, lanes, channels);
        for (to, from) in values.chunks_exact_mut(channels).zip(lane.past.chunks_exact(lanes)) {
            to[channels_of.clone()].copy_from_slice(&from[..channels_of.len()]);
        }
    }
    Ok(crate::backend::cpu::view::tensor(values, (count, channels)))
}

/// The inverse of [`joined`].
fn split<T: Real>(row: &Tensor, filter: &StreamFilter<T>) -> Result<Vec<Lane<T>>> {
    let (count, channels) = row.dims2()?;
    let values: Vec<T> = row.contiguous()?.flatten_all()?.to_vec1()?;
    let lanes = filter.lanes();
    let lane = |index: usize| {
        let channels_of = block(index, lanes, channels);
        let mut past = vec![T::ZERO; count * lanes];
        for (to, from) in past.chunks_exact_mut(lanes).zip(values.chunks_exact(channels)) {
            to[..channels_of.len()].copy_from_slice(&from[channels_of.clone()]);
        }
        Lane::after(past)
    };
    Ok((0..filter.blocks()).map(lane).collect())
}
