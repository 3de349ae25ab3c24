//! What tells families of blocks apart.

use super::super::super::MixerState;
use super::Io;
use super::kernels::{Shape, Step};
use super::layout::{Layout, Needs, Split};
use super::rooms::Room;
use super::weights::Common;
use crate::Result;
use crate::backend::cuda::{Element, Launch, Module};
use candle_core::{CudaDevice, DType, Tensor};
use half::{bf16, f16};

/// Where words, drafts and the host's numbers lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places<'a> {
    /// The words that pass between blocks: those of [`Blocks::words`].
    pub(super) words: &'a [u64],
    /// What drafts leave, a table of [`Blocks::drafts`] of each layer; null if there are none.
    pub(super) drafts: u64,
    pub(super) phases: u64,
    pub(super) io: Io,
}

/// The blocks of a model, all alike in size, with kernels of their own.
pub(super) trait Blocks {
    fn layers(&self) -> usize;

    /// Numbers of each of a layer's states in a slot.
    fn states(&self) -> Vec<usize>;
    /// A layer's state of a batch of one as the pool has it, f32.
    fn to_pool(&self, state: &MixerState) -> Result<Vec<Tensor>>;
    /// The other way round.
    fn restore(&self, parts: Vec<Tensor>, state: &mut MixerState) -> Result<()>;

    /// Words of a row, beside those of the stream.
    fn words(&self, blocks: usize) -> Vec<usize>;
    /// Elements of a row of what drafts leave of each layer.
    fn drafts(&self) -> Vec<usize>;
    /// The shapes of a layer's weights, phase by phase. Turns have blocks with more of one phase have less of the next.
    fn shapes(&self, common: &Common, blocks: usize) -> Vec<Shape>;
    /// Where the first two segments of each phase's weights lie, layer by layer; null for a second one that is not there.
    fn matrices(&self, common: &Common, pool: &[Vec<Room>]) -> Vec<[u64; 2]>;
    /// The phases as the kernel has them, layer by layer, and the head's.
    fn phases(&self, common: &Common, pool: &[Vec<Room>], words: &[u64]) -> Vec<u64>;
    /// Of shared memory, for so many rows.
    fn needs(&self, common: &Common, rows: usize, split: &Split) -> Needs;

    /// Puts a step into the stream.
    fn step(&self, kernels: &Kernels, step: Step, layout: &Layout, places: &Places) -> Result<()>;
    /// Moves the states behind the counted tokens of the last draft of so many sequences.
    fn accept(&self, kernels: &Kernels, places: &Places, sequences: usize, tokens: usize) -> Result<()>;
}

/// Launches kernels.
pub(super) struct Kernels<'a> {
    pub(super) device: &'a CudaDevice,
    pub(super) dtype: DType,
    pub(super) multiprocessors: usize,
}

impl Kernels<'_> {
    fn element(&self) -> &'static str {
        match self.dtype {
            DType::BF16 => bf16::NAME,
            DType::F16 => f16::NAME,
            _ => f32::NAME,
        }
    }

    /// A step of so many rows, a kernel whose blocks wait for each other.
    pub(super) fn step<T: Copy>(
        &self,
        module: Module,
        name: &str,
        rows: usize,
        layout: &Layout,
        step: &T,
    ) -> Result<()> {
        let kernel = format!("{name}_{}_{}", self.element(), if rows == 1 { 1 } else { 8 });
        self.put(module, &kernel, [self.multiprocessors, 1, 1], None, step, layout.bytes)
    }

    /// A kernel that moves states.
    pub(super) fn accept<T: Copy>(
        &self,
        module: Module,
        name: &str,
        grid: [usize; 3],
        threads: usize,
        accept: &T,
    ) -> Result<()> {
        self.put(module, &format!("{name}_{}", self.element()), grid, Some(threads), accept, 0)
    }

    /// With shared memory to ask for, one whose blocks wait for each other. Without a number of threads, as many as it is
    /// compiled for.
    fn put<T: Copy>(
        &self,
        module: Module,
        kernel: &str,
        grid: [usize; 3],
        threads: Option<usize>,
        argument: &T,
        memory: usize,
    ) -> Result<()> {
        let what = "decoder: a step";
        let threads = threads.unwrap_or(0) as u32;
        let launch = Launch { what, device: self.device, module, kernel, grid, threads, dynamic: false };
        // SAFETY: the struct is laid out as the kernel's; its pointers lead to weights, states and rooms of the sizes it
        // says, which live as long as the decoder; ids and slots were checked against vocabulary and pool.
        unsafe { launch.with_memory(argument, memory, memory > 0) }
    }
}
