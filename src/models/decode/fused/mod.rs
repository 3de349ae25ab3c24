//! Decoding by a kernel of its own: a whole step is one launch, states in place.
//!
//! Everything a step touches lies in places that stay: weights, states, the program of phases, the words that pass between
//! the kernel's blocks, and `io`, where the host leaves ids, slots and counts and finds the chosen ids. More rows than the
//! kernel takes at a time go through in turns.

mod kernels;
mod layout;
mod program;
mod steps;
mod weights;

use super::super::{LanguageModel, MixerState, ModelState};
use crate::backend::cuda::{Buffer, Graph, multiprocessors};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, DType, Tensor};
use program::Program;
use std::collections::HashMap;
use std::sync::Arc;
use weights::{Sizes, Weights};

/// Rows (tokens of all sequences) that the kernel takes at a time at most.
const MOST_ROWS: usize = 8;
/// Where in `io` the ids, slots, counts and chosen ids begin; what the host writes comes first.
const IDS: usize = 0;
const SLOTS: usize = MOST_ROWS;
const COUNTS: usize = 2 * MOST_ROWS;
const CHOSEN: usize = 3 * MOST_ROWS;
/// A slot that no row has, for the kernels.
const IDLE: u32 = u32::MAX;
/// Marks that words bear before all of them are taken back.
const MOST_MARKS: usize = 1 << 31;

/// The model, its states, and what a step needs beside them.
pub(super) struct Fused {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    weights: Weights,
    pool: Vec<Pool>,
    program: Program,
    io: CudaSlice<u32>,
    io_pointer: u64,
    logits: Room,
    words: Words,
    /// What drafts leave for `accept`; made by the first draft.
    drafts: Option<Drafts>,
    graphs: HashMap<Shape, Option<Graph>>,
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

/// The words that pass between blocks, for [`MOST_ROWS`] rows, and the marks that they bear.
struct Words {
    slice: CudaSlice<u64>,
    /// The kernel's mark, and how many of its blocks are done.
    epoch: CudaSlice<u32>,
    epoch_pointer: u64,
    /// Where the stream, u, y, what is selected and the best logits begin.
    places: [u64; 5],
    /// Marks since they were zeros.
    marks: usize,
}

/// What drafts leave, for [`MOST_ROWS`] rows: of each layer `x`, `u`, what was selected, delta.
struct Drafts {
    _rooms: Vec<[Room; 4]>,
    _table: CudaSlice<u64>,
    pointer: u64,
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

impl Words {
    fn new(sizes: &Sizes, blocks: usize, device: &CudaDevice, stream: &CudaStream) -> Result<Self> {
        // pairs of words are whole pieces of 16 bytes
        let widths = [sizes.hidden, sizes.channels, sizes.channels, sizes.selected() + 2, 2 * blocks];
        let counts = widths.map(|width| (MOST_ROWS * width).next_multiple_of(2));
        let mut slice = device.alloc_zeros::<u64>(counts.iter().sum())?;
        let mut place = pointer_of(&mut slice, stream);
        let places = counts.map(|count| {
            let own = place;
            place += (count * size_of::<u64>()) as u64;
            own
        });
        let mut epoch = device.alloc_zeros::<u32>(2)?;
        let epoch_pointer = pointer_of(&mut epoch, stream);
        Ok(Self { slice, epoch, epoch_pointer, places, marks: 0 })
    }

    /// Room for so many marks more: none comes twice as long as a word may bear it.
    fn advance(&mut self, marks: usize, stream: &Arc<CudaStream>) -> Result<()> {
        if self.marks + marks > MOST_MARKS {
            let fail = |error| crate::backend::cuda::failed("decoder: clearing its words", error);
            stream.memset_zeros(&mut self.slice).map_err(fail)?;
            stream.memset_zeros(&mut self.epoch).map_err(fail)?;
            self.marks = 0;
        }
        self.marks += marks;
        Ok(())
    }
}

impl Drafts {
    fn new(
        sizes: &Sizes,
        dtype: DType,
        layers: usize,
        device: &CudaDevice,
        stream: &CudaStream,
    ) -> Result<Self> {
        let room = |width: usize| {
            Room::zeros(device, stream, (MOST_ROWS * width * dtype.size_in_bytes()).div_ceil(4))
        };
        let layer = |_| -> Result<[Room; 4]> {
            Ok([room(sizes.channels)?, room(sizes.channels)?, room(sizes.selected())?, room(sizes.channels)?])
        };
        let rooms: Vec<[Room; 4]> = (0..layers).map(layer).collect::<Result<_>>()?;
        let draft = |[x, u, selected, delta]: &[Room; 4]| kernels::Draft {
            x: x.pointer,
            u: u.pointer,
            selected: selected.pointer,
            delta: delta.pointer,
        };
        let table: Vec<kernels::Draft> = rooms.iter().map(draft).collect();
        let mut table = program::to_device(&table, device)?;
        let pointer = pointer_of(&mut table, stream);
        Ok(Self { _rooms: rooms, _table: table, pointer })
    }
}

impl Fused {
    /// A pool of fresh states; none if the model is not one of those the kernel takes, or the device has no room.
    pub(super) fn new(model: &LanguageModel, slots: usize) -> Result<Option<Self>> {
        let Some((weights, device)) = Weights::new(model)? else { return Ok(None) };
        let stream = device.cuda_stream();
        let sizes = weights.sizes;
        let zeros = |numbers| Room::zeros(&device, &stream, numbers);
        let pool = |_| {
            Ok(Pool {
                window: zeros(slots * sizes.channels * (sizes.filter - 1))?,
                state: zeros(slots * sizes.channels * sizes.states)?,
            })
        };
        let pool: Vec<Pool> = (0..weights.layers.len()).map(pool).collect::<Result<_>>()?;
        let blocks = multiprocessors(&device)?;
        let words = Words::new(&sizes, blocks, &device, &stream)?;
        let Some(program) = Program::new(&weights, &pool, &words.places, blocks, &device)? else {
            return Ok(None);
        };
        let mut io = device.alloc_zeros::<u32>(CHOSEN + MOST_ROWS)?;
        Ok(Some(Self {
            io_pointer: pointer_of(&mut io, &stream),
            io,
            logits: zeros(MOST_ROWS * sizes.vocabulary)?,
            program,
            words,
            drafts: None,
            graphs: HashMap::new(),
            device,
            stream,
            weights,
            pool,
        }))
    }

    /// Rows that the kernel takes at a time.
    pub(super) fn most_rows(&self) -> usize {
        self.program.most_rows()
    }

    /// Logits `[B, T, V]`.
    pub(super) fn run(
        &mut self,
        slots: &[Option<usize>],
        ids: &[u32],
        tokens: usize,
        keep: bool,
    ) -> Result<Tensor> {
        let most = self.most_rows();
        if tokens > most || (!keep && ids.len() > most) {
            return self.in_turns(slots, ids, tokens, keep);
        }
        let group = most / tokens;
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
        let most = self.most_rows();
        if !keep {
            let expected = format!("a draft of at most {most} tokens in all rows");
            return Err(Error::value("decoder: number of ids", expected, ids.len()));
        }
        let mut parts = vec![];
        for start in (0..tokens).step_by(most) {
            let end = tokens.min(start + most);
            let part = |row: usize| &ids[row * tokens + start..row * tokens + end];
            let part: Vec<u32> = (0..slots.len()).flat_map(part).copied().collect();
            parts.push(self.run(slots, &part, end - start, true)?);
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// The most probable token after one token a row; `u32::MAX` where a logit is no number.
    pub(super) fn greedy(&mut self, slots: &[Option<usize>], ids: &[u32]) -> Result<Vec<u32>> {
        self.launch(slots, ids, Shape { sequences: slots.len(), tokens: 1, keep: true, greedy: true })?;
        let chosen = self.io.slice(CHOSEN..CHOSEN + slots.len());
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
        let logits = self.copy(&self.logits.slice, 0, count, self.weights.dtype)?;
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
        let mut place = self.io.slice_mut(start..start + numbers.len());
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
        self.words.advance(self.program.phases(), &self.stream)?;
        if !shape.keep && self.drafts.is_none() {
            let (sizes, dtype, layers) = (&self.weights.sizes, self.weights.dtype, self.weights.layers.len());
            self.drafts = Some(Drafts::new(sizes, dtype, layers, &self.device, &self.stream)?);
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
