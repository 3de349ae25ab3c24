//! Decoding by kernels of its own: four a block, states in place, the whole step one CUDA graph.
//!
//! Everything a step touches lies in places that stay: weights, states, what passes between kernels, and `io`, where the
//! host leaves ids, slots and counts and finds the chosen ids. A shape of call runs once as it is, which loads the kernels,
//! is recorded at its second use and launched as a graph from then on. More rows than the kernels take at a time go through
//! in turns.

mod kernels;
mod steps;
mod weights;

use super::super::{LanguageModel, MixerState, ModelState};
use crate::backend::cuda::{Buffer, Graph, starts_early};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, DType, Tensor};
use std::collections::HashMap;
use std::sync::Arc;
use weights::{Sizes, Weights};

/// Rows (tokens of all sequences) that the kernels take at a time.
pub(super) const MOST_ROWS: usize = 8;
const LONGEST_FILTER: usize = 4;
const WIDEST_STATE: usize = 128;
/// Shared memory that a block may ask for.
const MOST_SHARED: usize = 160 << 10;
/// Where in `io` the ids, slots, counts and chosen ids begin; what the host writes comes first.
const IDS: usize = 0;
const SLOTS: usize = MOST_ROWS;
const COUNTS: usize = 2 * MOST_ROWS;
const CHOSEN: usize = 3 * MOST_ROWS;
/// A slot that no row has, for the kernels.
const IDLE: u32 = u32::MAX;

/// The model, its states, and what a step needs beside them.
pub(super) struct Fused {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    weights: Weights,
    pool: Vec<Pool>,
    scratch: Scratch,
    /// What drafts leave for `accept`, one a layer; made by the first draft.
    drafts: Vec<Draft>,
    graphs: HashMap<Shape, Option<Graph>>,
    /// Whether kernels may begin before the ones ahead have ended.
    early: bool,
}

/// The states of one layer.
struct Pool {
    /// `[slots, D, K - 1]`
    window: Room,
    /// `[slots, D, N]`
    state: Room,
}

/// Memory that stays where it is.
struct Room {
    slice: CudaSlice<f32>,
    pointer: u64,
}

/// What passes between kernels, for [`MOST_ROWS`] rows.
struct Scratch {
    io: CudaSlice<u32>,
    io_pointer: u64,
    /// The residual stream before and behind a layer.
    streams: [Room; 2],
    y: Room,
    update: Room,
    logits: Room,
    between: Draft,
}

/// What lies between a mixer's projections, and what `accept` needs of it.
struct Draft {
    /// `[R, 2 D]`
    xz: Room,
    /// `[R, D]`
    u: Room,
    /// `[R, rank + 2 N]`, before and behind the inner norms.
    selected: Room,
    normed: Room,
    /// `[R, D]`
    delta: Room,
}

/// What a graph is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    sequences: usize,
    tokens: usize,
    keep: bool,
    greedy: bool,
}

impl std::fmt::Debug for Fused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fused").field("sizes", &self.weights.sizes).finish_non_exhaustive()
    }
}

impl Room {
    fn zeros(device: &CudaDevice, stream: &CudaStream, numbers: usize) -> Result<Self> {
        let mut slice = device.alloc_zeros::<f32>(numbers.max(1))?;
        let pointer = pointer_of(&mut slice, stream);
        Ok(Self { slice, pointer })
    }
}

fn pointer_of<T>(slice: &mut CudaSlice<T>, stream: &CudaStream) -> u64 {
    use candle_core::cuda_backend::cudarc::driver::DevicePtrMut;
    slice.device_ptr_mut(stream).0
}

impl Draft {
    fn new(sizes: &Sizes, dtype: DType, device: &CudaDevice, stream: &CudaStream) -> Result<Self> {
        let room = |width: usize| {
            Room::zeros(device, stream, (MOST_ROWS * width * dtype.size_in_bytes()).div_ceil(4))
        };
        Ok(Self {
            xz: room(2 * sizes.channels)?,
            u: room(sizes.channels)?,
            selected: room(sizes.selected())?,
            normed: room(sizes.selected())?,
            delta: room(sizes.channels)?,
        })
    }
}

impl Fused {
    /// A pool of fresh states; none if the model is not one of those the kernels take.
    pub(super) fn new(model: &LanguageModel, slots: usize) -> Result<Option<Self>> {
        let Some((weights, device)) = Weights::new(model)? else { return Ok(None) };
        let stream = device.cuda_stream();
        let (sizes, dtype) = (weights.sizes, weights.dtype);
        let zeros = |numbers| Room::zeros(&device, &stream, numbers);
        let pool = |_| {
            Ok(Pool {
                window: zeros(slots * sizes.channels * (sizes.filter - 1))?,
                state: zeros(slots * sizes.channels * sizes.states)?,
            })
        };
        let pool = (0..weights.layers.len()).map(pool).collect::<Result<_>>()?;
        let mut io = device.alloc_zeros::<u32>(CHOSEN + MOST_ROWS)?;
        let scratch = Scratch {
            io_pointer: pointer_of(&mut io, &stream),
            io,
            streams: [zeros(MOST_ROWS * sizes.hidden)?, zeros(MOST_ROWS * sizes.hidden)?],
            y: zeros(MOST_ROWS * sizes.channels)?,
            update: zeros(MOST_ROWS * sizes.hidden)?,
            logits: zeros(MOST_ROWS * sizes.vocabulary)?,
            between: Draft::new(&sizes, dtype, &device, &stream)?,
        };
        let early = starts_early(&device)?;
        let (drafts, graphs) = (vec![], HashMap::new());
        Ok(Some(Self { device, stream, weights, pool, scratch, drafts, graphs, early }))
    }

    /// Logits `[B, T, V]`.
    pub(super) fn run(
        &mut self,
        slots: &[Option<usize>],
        ids: &[u32],
        tokens: usize,
        keep: bool,
    ) -> Result<Tensor> {
        if tokens > MOST_ROWS || (!keep && ids.len() > MOST_ROWS) {
            return self.in_turns(slots, ids, tokens, keep);
        }
        let group = MOST_ROWS / tokens;
        let mut parts = vec![];
        for (slots, ids) in slots.chunks(group).zip(ids.chunks(group * tokens)) {
            self.launch(slots, ids, Shape { sequences: slots.len(), tokens, keep, greedy: false })?;
            parts.push(self.logits(slots.len(), tokens)?);
        }
        match <[Tensor; 1]>::try_from(parts) {
            Ok([part]) => Ok(part),
            Err(parts) => Ok(Tensor::cat(&parts, 0)?),
        }
    }

    /// More tokens a row than the kernels take at once.
    fn in_turns(
        &mut self,
        slots: &[Option<usize>],
        ids: &[u32],
        tokens: usize,
        keep: bool,
    ) -> Result<Tensor> {
        if !keep {
            let expected = format!("a draft of at most {MOST_ROWS} tokens in all rows");
            return Err(Error::value("decoder: number of ids", expected, ids.len()));
        }
        let mut parts = vec![];
        for start in (0..tokens).step_by(MOST_ROWS) {
            let end = tokens.min(start + MOST_ROWS);
            let part = |row: usize| &ids[row * tokens + start..row * tokens + end];
            let part: Vec<u32> = (0..slots.len()).flat_map(part).copied().collect();
            parts.push(self.run(slots, &part, end - start, true)?);
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// The most probable token after one token a row; `u32::MAX` where a logit is no number.
    pub(super) fn greedy(&mut self, slots: &[Option<usize>], ids: &[u32]) -> Result<Vec<u32>> {
        self.launch(slots, ids, Shape { sequences: slots.len(), tokens: 1, keep: true, greedy: true })?;
        let chosen = self.scratch.io.slice(CHOSEN..CHOSEN + slots.len());
        Ok(self.device.clone_dtoh(&chosen)?)
    }

    /// The states of the last draft's rows move behind their first `counts` tokens.
    pub(super) fn accept(&mut self, slots: &[Option<usize>], counts: &[usize], tokens: usize) -> Result<()> {
        let counts: Vec<u32> = counts.iter().map(|&count| count as u32).collect();
        self.write(COUNTS, &counts)?;
        self.enqueue_accept(slots.len(), tokens)
    }

    /// Puts a batch of one into a slot.
    pub(super) fn set(&mut self, slot: usize, state: &ModelState) -> Result<()> {
        for (pool, block) in self.pool.iter_mut().zip(&state.blocks) {
            let MixerState::Mamba(own) = block else {
                return Err(Error::value("decoder: state", "one of Mamba blocks", block.mixer()));
            };
            for (room, tensor) in [(&mut pool.window, &own.conv), (&mut pool.state, &own.scan)] {
                let size = tensor.elem_count();
                let tensor = tensor.to_dtype(DType::F32)?.force_contiguous()?;
                let (storage, _) = tensor.storage_and_layout();
                let candle_core::Storage::Cuda(storage) = &*storage else {
                    return Err(Error::value("decoder: state", "one on the model's device", "another"));
                };
                let mut place = room.slice.slice_mut(slot * size..(slot + 1) * size);
                self.device.memcpy_dtod(&storage.as_cuda_slice::<f32>()?.slice(..size), &mut place)?;
            }
        }
        Ok(())
    }

    /// Fills `state`, a batch of one, from a slot.
    pub(super) fn get(&self, slot: usize, state: &mut ModelState) -> Result<()> {
        for (pool, block) in self.pool.iter().zip(&mut state.blocks) {
            let MixerState::Mamba(own) = block else {
                return Err(Error::value("decoder: state", "one of Mamba blocks", block.mixer()));
            };
            for (room, tensor) in [(&pool.window, &mut own.conv), (&pool.state, &mut own.scan)] {
                let size = tensor.elem_count();
                *tensor = self.copy(&room.slice, slot * size, size, DType::F32)?.reshape(tensor.shape())?;
            }
        }
        Ok(())
    }

    /// The logits of the last call, copied.
    fn logits(&self, sequences: usize, tokens: usize) -> Result<Tensor> {
        let count = sequences * tokens * self.weights.sizes.vocabulary;
        let logits = self.copy(&self.scratch.logits.slice, 0, count, self.weights.dtype)?;
        Ok(logits.reshape((sequences, tokens, self.weights.sizes.vocabulary))?)
    }

    /// `count` elements of `dtype` from element `start` of a room, as a tensor.
    fn copy(&self, from: &CudaSlice<f32>, start: usize, count: usize, dtype: DType) -> Result<Tensor> {
        macro_rules! copied {
            ($type:ty) => {{
                // SAFETY: rooms hold elements of the model's dtype from their beginning, as many as are asked for.
                let from = unsafe { from.transmute::<$type>(start + count) };
                let from = from.ok_or_else(|| Error::value("decoder: room", "enough of it", start + count))?;
                let mut to = Buffer::<$type>::new(&self.device, count)?;
                self.device.memcpy_dtod(&from.slice(start..), to.slice_mut())?;
                Ok(to.tensor(&self.device, count))
            }};
        }
        match dtype {
            DType::BF16 => copied!(half::bf16),
            DType::F16 => copied!(half::f16),
            _ => copied!(f32),
        }
    }

    /// Writes numbers into `io`, behind what is in the stream.
    fn write(&mut self, start: usize, numbers: &[u32]) -> Result<()> {
        let mut place = self.scratch.io.slice_mut(start..start + numbers.len());
        Ok(self.device.memcpy_htod(numbers, &mut place)?)
    }

    /// One step of at most [`MOST_ROWS`] rows: launched, recorded or replayed.
    fn launch(&mut self, slots: &[Option<usize>], ids: &[u32], shape: Shape) -> Result<()> {
        let mut io = [IDLE; SLOTS + MOST_ROWS];
        io[IDS..ids.len()].copy_from_slice(ids);
        for (to, slot) in io[SLOTS..].iter_mut().zip(slots) {
            *to = slot.map_or(IDLE, |slot| slot as u32);
        }
        self.write(IDS, &io)?;
        if !shape.keep && self.drafts.is_empty() {
            let (sizes, dtype) = (&self.weights.sizes, self.weights.dtype);
            let draft = |_| Draft::new(sizes, dtype, &self.device, &self.stream);
            self.drafts = (0..self.weights.layers.len()).map(draft).collect::<Result<_>>()?;
        }
        let what = "decoder: a step";
        match self.graphs.get(&shape) {
            None => {
                self.enqueue(shape)?;
                self.graphs.insert(shape, None);
                return Ok(());
            }
            Some(None) => {
                let graph = Graph::record(&self.device, what, || self.enqueue(shape))?;
                self.graphs.insert(shape, Some(graph));
            }
            Some(Some(_)) => {}
        }
        match self.graphs.get(&shape) {
            // SAFETY: the graph reads and writes weights, states and rooms that live as long as it does.
            Some(Some(graph)) => unsafe { graph.launch(what) },
            _ => self.enqueue(shape),
        }
    }
}
