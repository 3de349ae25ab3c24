//! Decoding by a kernel of its own: a whole step is one launch, states in place.
//!
//! Everything a step touches lies in places that stay: weights, states, the program of phases, the words that pass between
//! the kernel's blocks, and `io`, where the host leaves ids, slots, positions and counts and finds the chosen ids. More rows
//! than the kernel takes at a time go through in turns.
//!
//! What tells families of models apart is theirs ([`blocks::Blocks`]): `mamba` and `retnet`.

mod blocks;
mod kernels;
mod layout;
mod mamba;
mod program;
mod retnet;
mod rooms;
mod weights;

use super::super::{LanguageModel, ModelState};
use crate::backend::cuda::{Buffer, Graph, multiprocessors};
use crate::{Error, Result};
use blocks::{Blocks, Kernels, Places};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaDevice, DType, Tensor};
use kernels::Step;
use mamba::Mamba;
use program::Program;
use retnet::RetNet;
use rooms::{Drafts, Room, Stops, Words, pointer_of};
use std::collections::HashMap;
use std::sync::Arc;
use weights::Common;

/// Rows (tokens of all sequences) that the kernel takes at a time at most.
const MOST_ROWS: usize = 8;
/// Steps that it takes in a row at most, each with the tokens that the one before has chosen.
const MOST_STEPS: usize = 16;
/// Where in `io` the ids, slots, positions, counts and chosen ids begin; what the host writes for a step comes first.
const IDS: usize = 0;
const SLOTS: usize = MOST_ROWS;
const POSITIONS: usize = 2 * MOST_ROWS;
const COUNTS: usize = 3 * MOST_ROWS;
const CHOSEN: usize = 4 * MOST_ROWS;
/// A slot that no row has, for the kernels.
const IDLE: u32 = u32::MAX;

/// Where the numbers of `io` lie that kernels take from there.
#[derive(Clone, Copy, Debug)]
struct Io {
    ids: u64,
    slots: u64,
    positions: u64,
    counts: u64,
    chosen: u64,
}

/// The model, its states, and what a step needs beside them.
pub(super) struct Fused {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    common: Common,
    family: Box<dyn Blocks>,
    /// The states of each layer, `[slots, ..]` each.
    pool: Vec<Vec<Room>>,
    program: Program,
    io: CudaSlice<u32>,
    io_places: Io,
    logits: Room,
    words: Words,
    stops: Stops,
    /// What drafts leave for `accept`; made by the first draft.
    drafts: Option<Drafts>,
    graphs: HashMap<Shape, Option<Graph>>,
}

/// The slot of a row, none of an idle one, and the tokens that it has had.
pub(super) type Row = (Option<usize>, usize);

/// What a graph is recorded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    sequences: usize,
    tokens: usize,
    keep: bool,
    /// Steps in a row that choose their tokens; none: one that does not.
    greedy: usize,
    /// Where the bits of the tokens behind which rows end lie, or null.
    stops: u64,
}

impl std::fmt::Debug for Fused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fused").field("layers", &self.family.layers()).finish_non_exhaustive()
    }
}

/// The blocks of a model that the kernels take; none if it is another.
fn blocks(model: &LanguageModel) -> Result<Option<Box<dyn Blocks>>> {
    if let Some(mamba) = Mamba::new(model)? {
        return Ok(Some(Box::new(mamba)));
    }
    Ok(RetNet::new(model)?.map(|retnet| Box::new(retnet) as Box<dyn Blocks>))
}

impl Fused {
    /// A pool of fresh states; none if the model is not one of those the kernel takes, or the device has no room.
    pub(super) fn new(model: &LanguageModel, slots: usize) -> Result<Option<Self>> {
        let Some((common, device)) = Common::new(model)? else { return Ok(None) };
        let Some(family) = blocks(model)? else { return Ok(None) };
        let stream = device.cuda_stream();
        let zeros = |numbers| Room::zeros(&device, &stream, numbers);
        let rooms = |_| family.states().into_iter().map(|size| zeros(slots * size)).collect();
        let pool: Vec<Vec<Room>> = (0..family.layers()).map(rooms).collect::<Result<_>>()?;
        let blocks = multiprocessors(&device)?;
        let widths = [vec![common.hidden, 2 * blocks], family.words(blocks)].concat();
        let words = Words::new(&widths, &device, &stream)?;
        let program = Program::new(&common, &*family, &pool, &words.own, blocks, &device)?;
        let Some(program) = program else { return Ok(None) };
        let mut io = device.alloc_zeros::<u32>(CHOSEN + MOST_STEPS * MOST_ROWS)?;
        let io_pointer = pointer_of(&mut io, &stream);
        let place = |place: usize| io_pointer + (place * size_of::<u32>()) as u64;
        Ok(Some(Self {
            io_places: Io {
                ids: place(IDS),
                slots: place(SLOTS),
                positions: place(POSITIONS),
                counts: place(COUNTS),
                chosen: place(CHOSEN),
            },
            io,
            logits: zeros(MOST_ROWS * common.vocabulary)?,
            stops: Stops::new(common.vocabulary, &device, &stream)?,
            program,
            words,
            drafts: None,
            graphs: HashMap::new(),
            device,
            stream,
            common,
            family,
            pool,
        }))
    }

    /// Rows that the kernel takes at a time.
    pub(super) fn most_rows(&self) -> usize {
        self.program.most_rows()
    }

    /// Logits `[B, T, V]`; rows are slots and the tokens that each has had.
    pub(super) fn run(&mut self, rows: &[Row], ids: &[u32], tokens: usize, keep: bool) -> Result<Tensor> {
        let most = self.most_rows();
        if tokens > most || (!keep && ids.len() > most) {
            return self.in_turns(rows, ids, tokens, keep);
        }
        let group = most / tokens;
        let mut parts = vec![];
        for (rows, ids) in rows.chunks(group).zip(ids.chunks(group * tokens)) {
            self.launch(rows, ids, Shape { sequences: rows.len(), tokens, keep, greedy: 0, stops: 0 })?;
            parts.push(self.logits(rows.len(), tokens)?);
        }
        match <[Tensor; 1]>::try_from(parts) {
            Ok([part]) => Ok(part),
            Err(parts) => Ok(Tensor::cat(&parts, 0)?),
        }
    }

    /// More tokens a row than the kernels take at once.
    fn in_turns(&mut self, rows: &[Row], ids: &[u32], tokens: usize, keep: bool) -> Result<Tensor> {
        let most = self.most_rows();
        if !keep {
            let expected = format!("a draft of at most {most} tokens in all rows");
            return Err(Error::value("decoder: number of ids", expected, ids.len()));
        }
        let mut parts = vec![];
        for start in (0..tokens).step_by(most) {
            let end = tokens.min(start + most);
            let part = |row: usize| &ids[row * tokens + start..row * tokens + end];
            let part: Vec<u32> = (0..rows.len()).flat_map(part).copied().collect();
            let later: Vec<Row> = rows.iter().map(|&(slot, position)| (slot, position + start)).collect();
            parts.push(self.run(&later, &part, end - start, true)?);
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    /// Steps with one token a row, each but the first with the most probable ones of the step before: those of up to `steps`
    /// steps, `u32::MAX` where a logit is no number. A row's state stays as it is behind one of `stop`, or no number.
    pub(super) fn greedy(
        &mut self,
        rows: &[Row],
        ids: &[u32],
        steps: usize,
        stop: &[u32],
    ) -> Result<Vec<Vec<u32>>> {
        let (sequences, greedy) = (rows.len(), steps.min(MOST_STEPS));
        let stops = self.stops.set(stop, &self.device)?;
        self.launch(rows, ids, Shape { sequences, tokens: 1, keep: true, greedy, stops })?;
        let chosen = self.device.clone_dtoh(&self.io.slice(CHOSEN..CHOSEN + greedy * MOST_ROWS))?;
        Ok(chosen.chunks(MOST_ROWS).map(|chosen| chosen[..sequences].to_vec()).collect())
    }

    /// The states of the last draft's rows move behind their first `counts` tokens.
    pub(super) fn accept(&mut self, counts: &[usize], tokens: usize) -> Result<()> {
        let numbers: Vec<u32> = counts.iter().map(|&count| count as u32).collect();
        self.write(COUNTS, &numbers)?;
        if self.drafts.is_none() {
            return Ok(());
        }
        self.family.accept(&self.kernels(), &self.places(), counts.len(), tokens)
    }

    /// Puts a batch of one into a slot.
    pub(super) fn set(&mut self, slot: usize, state: &ModelState) -> Result<()> {
        for (rooms, block) in self.pool.iter_mut().zip(&state.blocks) {
            for (room, tensor) in rooms.iter_mut().zip(self.family.to_pool(block)?) {
                let size = tensor.elem_count();
                let tensor = tensor.force_contiguous()?;
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
        for (rooms, block) in self.pool.iter().zip(&mut state.blocks) {
            let copy = |(room, size): (&Room, usize)| self.copy(&room.slice, slot * size, size, DType::F32);
            let parts = rooms.iter().zip(self.family.states()).map(copy).collect::<Result<Vec<_>>>()?;
            self.family.restore(parts, block)?;
        }
        Ok(())
    }

    /// The logits of the last call, copied.
    fn logits(&self, sequences: usize, tokens: usize) -> Result<Tensor> {
        let count = sequences * tokens * self.common.vocabulary;
        let logits = self.copy(&self.logits.slice, 0, count, self.common.dtype)?;
        Ok(logits.reshape((sequences, tokens, self.common.vocabulary))?)
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

    fn kernels(&self) -> Kernels<'_> {
        Kernels { device: &self.device, dtype: self.common.dtype, multiprocessors: self.program.blocks }
    }

    fn places(&self) -> Places<'_> {
        Places {
            words: &self.words.own,
            drafts: self.drafts.as_ref().map_or(0, |drafts| drafts.pointer),
            phases: self.program.pointers[0],
            io: self.io_places,
        }
    }

    /// Puts a step into the stream.
    fn enqueue(&self, shape: Shape) -> Result<()> {
        let (common, rows) = (&self.common, shape.sequences * shape.tokens);
        let Some(layout) = self.program.layout(rows) else {
            return Err(Error::value("decoder: rows", format!("at most {}", self.most_rows()), rows));
        };
        let [phases, weights, shapes] = self.program.pointers;
        let step = Step {
            phases,
            weights,
            shapes,
            count: self.program.phases() as i32,
            shape_count: self.program.shapes() as i32,
            rows: rows as i32,
            tokens: shape.tokens as i32,
            keep: shape.keep as i32,
            hidden: common.hidden as i32,
            vocabulary: common.vocabulary as i32,
            wide: common.wide as i32,
            embedding_scale: common.embedding_scale,
            ids: self.io_places.ids,
            slots: self.io_places.slots,
            embedding: common.embedding.pointer,
            logits: self.logits.pointer,
            chosen: if shape.greedy > 0 { self.io_places.chosen } else { 0 },
            steps: shape.greedy.max(1) as i32,
            stops: shape.stops,
            stream: self.words.stream,
            best: self.words.best,
            apart: self.words.apart as i32,
            epoch: self.words.epoch_pointer,
            patience: layout.patience as i32,
            own_hidden: layout.own_hidden as i32,
            sums_bytes: layout.sums_bytes as i32,
            x_bytes: layout.x_bytes as i32,
            ring_slots: layout.ring_slots as i32,
            slot_groups: layout.slot_groups as i32,
        };
        self.family.step(&self.kernels(), step, layout, &self.places())
    }

    /// One step of at most [`MOST_ROWS`] rows: launched, recorded or replayed.
    fn launch(&mut self, rows: &[Row], ids: &[u32], shape: Shape) -> Result<()> {
        let mut io = [IDLE; COUNTS];
        io[IDS..ids.len()].copy_from_slice(ids);
        for (i, &(slot, position)) in rows.iter().enumerate() {
            io[SLOTS + i] = slot.map_or(IDLE, |slot| slot as u32);
            io[POSITIONS + i] = position as u32;
        }
        self.write(IDS, &io)?;
        self.words.advance(self.program.phases() * shape.greedy.max(1), &self.stream)?;
        if !shape.keep && self.drafts.is_none() {
            let bytes = self.family.drafts().into_iter().map(|width| width * self.common.element());
            let (bytes, layers) = (bytes.collect::<Vec<_>>(), self.family.layers());
            self.drafts = Some(Drafts::new(&bytes, layers, &self.device, &self.stream)?);
        }
        let what = "decoder: a step";
        match self.graphs.get(&shape) {
            None => {
                self.enqueue(shape)?;
                self.graphs.insert(shape, None);
                return Ok(());
            }
            Some(None) => {
                // what another thread does may spoil a recording: this step then goes without, and the next one tries again
                if let Ok(graph) = Graph::record(&self.device, what, || self.enqueue(shape)) {
                    self.graphs.insert(shape, Some(graph));
                }
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
