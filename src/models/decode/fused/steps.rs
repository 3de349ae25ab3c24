//! The kernels of a step, in order.

use super::kernels::{Argmax, Embed, Filter, Project, State};
use super::weights::{Norm, Weight, pointer};
use super::{CHOSEN, COUNTS, Fused, IDS, MOST_ROWS, SLOTS, Shape};
use crate::Result;
use crate::backend::cuda::{Element, Launch, Module};
use crate::ops::norm::NormKind;
use candle_core::DType;
use half::{bf16, f16};

/// Threads of a block, as the kernels have them.
const PROJECT_THREADS: usize = 256;
const STATE_THREADS: usize = 128;
const ARGMAX_THREADS: usize = 1024;
const LANES: usize = 32;
const WARPS: usize = PROJECT_THREADS / LANES;
/// Numbers of a state in one lane, and lanes that one may be spread over.
const STATE_NUMBERS: usize = 4;
const SPLITS: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Warps that fill a GPU.
const ENOUGH_WARPS: usize = 4096;

/// Rows that the kernels of a projection are made for, the outputs of a warp with each.
const KERNELS: [(usize, usize); 4] = [(1, 1), (2, 2), (4, 2), (MOST_ROWS, 4)];

/// How one projection is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// Rows of the kernel.
    rows: usize,
    /// Warps that share an output.
    split: usize,
    blocks: usize,
}

impl Layout {
    /// For `rows` rows of `inputs` numbers of `bytes` bytes.
    fn new(rows: usize, inputs: usize, outputs: usize, bytes: usize) -> Self {
        let kernel = KERNELS.into_iter().find(|(most, _)| *most >= rows);
        let (rows, own) = kernel.unwrap_or((MOST_ROWS, 4));
        let (groups, piece) = (outputs.div_ceil(own), LANES * 16 / bytes);
        let mut split = 1;
        while split < WARPS && groups * split < ENOUGH_WARPS && inputs >= 2 * split * piece {
            split *= 2;
        }
        Self { rows, split, blocks: (groups * split).div_ceil(WARPS) }
    }
}

impl Fused {
    fn element(&self) -> &'static str {
        match self.weights.dtype {
            DType::BF16 => bf16::NAME,
            DType::F16 => f16::NAME,
            _ => f32::NAME,
        }
    }

    fn io(&self, place: usize) -> u64 {
        self.scratch.io_pointer + (place * size_of::<u32>()) as u64
    }

    /// Puts a step into the stream.
    pub(super) fn enqueue(&self, shape: Shape) -> Result<()> {
        let (sizes, scratch) = (self.weights.sizes, &self.scratch);
        let rows = shape.sequences * shape.tokens;
        let embed = Embed {
            embedding: self.weights.embedding.pointer,
            x: scratch.streams[0].pointer,
            ids: self.io(IDS),
            width: sizes.hidden as i32,
            wide: sizes.wide as i32,
            scale: sizes.embedding_scale,
        };
        let kernel = format!("decode_embed_{}", self.element());
        let grid = [sizes.hidden.div_ceil(STATE_THREADS), rows, 1];
        // the first kernel reads what the host wrote
        self.put(Module::DecodeState, &kernel, grid, STATE_THREADS, &embed, 0, false)?;
        for index in 0..self.weights.layers.len() {
            self.layer(index, shape)?;
        }
        let last = self.weights.layers.len();
        let head = self.normed(&self.weights.norm, last, rows);
        let head = Project { y: scratch.logits.pointer, outputs: sizes.vocabulary as i32, ..head };
        self.project(&self.weights.head, head)?;
        if shape.greedy {
            let argmax = Argmax {
                logits: scratch.logits.pointer,
                ids: self.io(CHOSEN),
                size: sizes.vocabulary as i32,
            };
            let kernel = format!("decode_argmax_{}", self.element());
            let grid = [rows, 1, 1];
            self.put(Module::DecodeState, &kernel, grid, ARGMAX_THREADS, &argmax, 0, self.early)?;
        }
        Ok(())
    }

    fn layer(&self, index: usize, shape: Shape) -> Result<()> {
        let (sizes, scratch) = (self.weights.sizes, &self.scratch);
        let (layer, pool) = (&self.weights.layers[index], &self.pool[index]);
        let between = if shape.keep { &scratch.between } else { &self.drafts[index] };
        let rows = shape.sequences * shape.tokens;
        let bytes = self.weights.dtype.size_in_bytes();
        let first = Project {
            sum: scratch.streams[(index + 1) % 2].pointer,
            bias: pointer(&layer.in_bias),
            y: between.xz.pointer,
            taps: layer.taps.pointer,
            shift: pointer(&layer.shift),
            window: pool.window.pointer,
            u: between.u.pointer,
            slots: self.io(SLOTS),
            outputs: 2 * sizes.channels as i32,
            channels: sizes.channels as i32,
            filter: sizes.filter as i32,
            tokens: shape.tokens as i32,
            keep: shape.keep as i32,
            ..self.normed(&layer.norm, index, rows)
        };
        self.project(&layer.in_proj, first)?;
        let plain = |x, y, inputs: usize, outputs: usize| Project {
            x,
            y,
            rows: rows as i32,
            inputs: inputs as i32,
            outputs: outputs as i32,
            ..Project::default()
        };
        let second = plain(between.u.pointer, between.selected.pointer, sizes.channels, sizes.selected());
        self.project(&layer.x_proj, second)?;
        let state = State {
            u: between.u.pointer,
            z: between.xz.pointer + (sizes.channels * bytes) as u64,
            z_step: 2 * sizes.channels as i64,
            selected: between.selected.pointer,
            kept: if shape.keep { 0 } else { between.normed.pointer },
            dt: layer.dt_proj.pointer,
            delta: if shape.keep { 0 } else { between.delta.pointer },
            weights: [0, 1, 2].map(|kind: usize| pointer(&layer.inner_norms[kind])),
            y: scratch.y.pointer,
            keep: shape.keep as i32,
            normed: sizes.inner_eps.is_some() as i32,
            eps: sizes.inner_eps.unwrap_or(0.0),
            ..self.state(index, shape.sequences, shape.tokens)
        };
        self.put_state(&state)?;
        let third = plain(scratch.y.pointer, scratch.update.pointer, sizes.channels, sizes.hidden);
        self.project(&layer.out_proj, Project { bias: pointer(&layer.out_bias), ..third })
    }

    /// Moves the states behind the counted tokens of the last draft.
    pub(super) fn enqueue_accept(&self, sequences: usize, tokens: usize) -> Result<()> {
        let sizes = self.weights.sizes;
        for (index, draft) in self.drafts.iter().enumerate() {
            let (layer, pool) = (&self.weights.layers[index], &self.pool[index]);
            let filter = Filter {
                x: draft.xz.pointer,
                x_step: 2 * sizes.channels as i64,
                taps: layer.taps.pointer,
                window: pool.window.pointer,
                slots: self.io(SLOTS),
                counts: self.io(COUNTS),
                tokens: tokens as i32,
                channels: sizes.channels as i32,
                filter: sizes.filter as i32,
                keep: 1,
                ..Filter::default()
            };
            let kernel = format!("decode_filter_{}", self.element());
            let grid = [sizes.channels.div_ceil(STATE_THREADS), sequences, 1];
            self.put(Module::DecodeState, &kernel, grid, STATE_THREADS, &filter, 0, false)?;
            let state = State {
                u: draft.u.pointer,
                selected: draft.normed.pointer,
                delta: draft.delta.pointer,
                counts: self.io(COUNTS),
                keep: 1,
                ..self.state(index, sequences, tokens)
            };
            self.put_state(&state)?;
        }
        Ok(())
    }

    /// What both uses of the kernel of states have in common.
    fn state(&self, index: usize, sequences: usize, tokens: usize) -> State {
        let (sizes, layer) = (self.weights.sizes, &self.weights.layers[index]);
        State {
            a: layer.a.pointer,
            d: layer.d.pointer,
            bias: layer.dt_bias.pointer,
            state: self.pool[index].state.pointer,
            slots: self.io(SLOTS),
            rows: (sequences * tokens) as i32,
            tokens: tokens as i32,
            channels: sizes.channels as i32,
            states: sizes.states as i32,
            rank: sizes.rank as i32,
            ..State::default()
        }
    }

    fn put_state(&self, state: &State) -> Result<()> {
        let sizes = self.weights.sizes;
        let split = SPLITS.into_iter().find(|split| split * STATE_NUMBERS >= sizes.states).unwrap_or(LANES);
        let kernel = format!("decode_state_{}_{split}", self.element());
        let grid = [sizes.channels.div_ceil(STATE_THREADS / split), 1, 1];
        let memory = state.rows as usize * sizes.selected() * size_of::<f32>();
        let early = self.early && state.dt != 0;
        self.put(Module::DecodeState, &kernel, grid, STATE_THREADS, state, memory, early)
    }

    /// A projection of the norm of the stream before layer `index`.
    fn normed(&self, norm: &Norm, index: usize, rows: usize) -> Project {
        Project {
            x: self.scratch.streams[index % 2].pointer,
            update: if index > 0 { self.scratch.update.pointer } else { 0 },
            norm: norm.weight.pointer,
            norm_bias: pointer(&norm.bias),
            rows: rows as i32,
            inputs: self.weights.sizes.hidden as i32,
            wide: self.weights.sizes.wide as i32,
            layer: (norm.kind == NormKind::Layer) as i32,
            outside: (norm.kind == NormKind::RmsOutside) as i32,
            eps: norm.eps,
            ..Project::default()
        }
    }

    fn project(&self, weight: &Weight, project: Project) -> Result<()> {
        let bytes = self.weights.dtype.size_in_bytes();
        let [rows, inputs, outputs] = [project.rows, project.inputs, project.outputs].map(|n| n as usize);
        let layout = Layout::new(rows, inputs, outputs, bytes);
        let normed = project.norm != 0;
        let kind = if normed { "normed" } else { "project" };
        let kernel = format!("decode_{kind}_{}_{}", self.element(), layout.rows);
        let project = Project { weight: weight.pointer, split: layout.split as i32, ..project };
        let memory = if normed { rows * inputs * bytes } else { 0 };
        let grid = [layout.blocks, 1, 1];
        self.put(Module::DecodeProject, &kernel, grid, PROJECT_THREADS, &project, memory, self.early)
    }

    #[allow(clippy::too_many_arguments)]
    fn put<T: Copy>(
        &self,
        module: Module,
        kernel: &str,
        grid: [usize; 3],
        threads: usize,
        argument: &T,
        memory: usize,
        early: bool,
    ) -> Result<()> {
        let what = "decoder: a step";
        let threads = threads as u32;
        let launch = Launch { what, device: &self.device, module, kernel, grid, threads, dynamic: false };
        // SAFETY: the struct is laid out as the kernel's; its pointers lead to weights, states and rooms of the sizes it
        // says, which live as long as `self`; ids and slots were checked against vocabulary and pool.
        unsafe { launch.follow(argument, memory, early) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_outputs_are_shared_by_warps() {
        let layout = |rows, inputs, outputs| {
            let layout = Layout::new(rows, inputs, outputs, 2);
            (layout.rows, layout.split, layout.blocks)
        };
        assert_eq!(layout(1, 2560, 10240), (1, 1, 1280));
        assert_eq!(layout(1, 5120, 2560), (1, 2, 640));
        assert_eq!(layout(1, 5120, 192), (1, 8, 192));
        assert_eq!(layout(1, 64, 256), (1, 1, 32));
        assert_eq!(layout(3, 2560, 10240), (4, 1, 640));
        assert_eq!(layout(8, 2560, 50280), (8, 1, 1572));
    }
}
