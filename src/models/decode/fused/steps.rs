//! The launches of a step and of what drafts leave.

use super::kernels::{Accept, Step};
use super::layout::THREADS;
use super::program::EACH;
use super::{CHOSEN, COUNTS, Fused, IDS, SLOTS, Shape};
use crate::backend::cuda::{Element, Launch, Module};
use crate::{Error, Result};
use candle_core::DType;
use half::{bf16, f16};

/// Of `decode_accept.cu`: threads of a block, numbers of a state for each.
const ACCEPT_THREADS: usize = 128;
const ACCEPT_NUMBERS: usize = 4;

impl Fused {
    fn element(&self) -> &'static str {
        match self.weights.dtype {
            DType::BF16 => bf16::NAME,
            DType::F16 => f16::NAME,
            _ => f32::NAME,
        }
    }

    fn io(&self, place: usize) -> u64 {
        self.io_pointer + (place * size_of::<u32>()) as u64
    }

    /// Puts a step into the stream.
    pub(super) fn enqueue(&self, shape: Shape) -> Result<()> {
        let (sizes, rows) = (self.weights.sizes, shape.sequences * shape.tokens);
        let Some(layout) = self.program.layout(rows) else {
            return Err(Error::value("decoder: rows", format!("at most {}", self.most_rows()), rows));
        };
        let [phases, weights, shapes] = self.program.pointers;
        let [stream, u, y, selected, best] = self.words.places;
        let step = Step {
            phases,
            weights,
            shapes,
            count: self.program.phases() as i32,
            shape_count: self.program.shapes() as i32,
            rows: rows as i32,
            tokens: shape.tokens as i32,
            keep: shape.keep as i32,
            hidden: sizes.hidden as i32,
            channels: sizes.channels as i32,
            states: sizes.states as i32,
            rank: sizes.rank as i32,
            filter: sizes.filter as i32,
            vocabulary: sizes.vocabulary as i32,
            wide: sizes.wide as i32,
            normed: sizes.inner_eps.is_some() as i32,
            embedding_scale: sizes.embedding_scale,
            inner_eps: sizes.inner_eps.unwrap_or(0.0),
            ids: self.io(IDS),
            slots: self.io(SLOTS),
            embedding: self.weights.embedding.pointer,
            logits: self.logits.pointer,
            chosen: if shape.greedy { self.io(CHOSEN) } else { 0 },
            stream,
            u,
            y,
            selected,
            best,
            epoch: self.words.epoch_pointer,
            drafts: self.drafts.as_ref().map_or(0, |drafts| drafts.pointer),
            own_channels: layout.own_channels as i32,
            own_hidden: layout.own_hidden as i32,
            sums_bytes: layout.sums_bytes as i32,
            x_bytes: layout.x_bytes as i32,
            ring_slots: layout.ring_slots as i32,
        };
        let kernel = format!("decode_step_{}_{}", self.element(), if rows == 1 { 1 } else { 8 });
        let grid = [self.program.blocks, 1, 1];
        self.put(Module::DecodeStep, &kernel, grid, THREADS, &step, layout.bytes)
    }

    /// Moves the states behind the counted tokens of the last draft.
    pub(super) fn enqueue_accept(&self, sequences: usize, tokens: usize) -> Result<()> {
        let sizes = self.weights.sizes;
        let Some(drafts) = &self.drafts else { return Ok(()) };
        let accept = Accept {
            phases: self.program.pointers[0],
            drafts: drafts.pointer,
            slots: self.io(SLOTS),
            counts: self.io(COUNTS),
            each: EACH as i32,
            tokens: tokens as i32,
            channels: sizes.channels as i32,
            states: sizes.states as i32,
            rank: sizes.rank as i32,
            filter: sizes.filter as i32,
        };
        let kernel = format!("decode_accept_{}", self.element());
        let threads = sizes.channels * sizes.states.div_ceil(ACCEPT_NUMBERS);
        let grid = [threads.div_ceil(ACCEPT_THREADS), sequences, self.weights.layers.len()];
        self.put(Module::DecodeAccept, &kernel, grid, ACCEPT_THREADS, &accept, 0)
    }

    /// A kernel; with shared memory to ask for, one whose blocks wait for each other.
    fn put<T: Copy>(
        &self,
        module: Module,
        kernel: &str,
        grid: [usize; 3],
        threads: usize,
        argument: &T,
        memory: usize,
    ) -> Result<()> {
        let what = "decoder: a step";
        let threads = threads as u32;
        let launch = Launch { what, device: &self.device, module, kernel, grid, threads, dynamic: false };
        // SAFETY: the struct is laid out as the kernel's; its pointers lead to weights, states and rooms of the sizes it
        // says, which live as long as `self`; ids and slots were checked against vocabulary and pool.
        unsafe { launch.with_memory(argument, memory, memory > 0) }
    }
}
