//! Models of Mamba blocks: `kernels/common/decode_mamba.cuh`.

use super::super::super::{LanguageModel, MixerState};
use super::blocks::{Blocks, Kernels, Places};
use super::kernels::{Phase, Shape, Step};
use super::layout::{GRAIN, GROUP, Layout, Needs, Split, TILE, WARPS, pitch};
use super::program::pieces;
use super::rooms::Room;
use super::weights::{Common, Norm, PIECE, Weight, pointer};
use crate::backend::cuda::Module;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Phases of a layer.
const EACH: usize = 4;
const FILTERS: std::ops::RangeInclusive<usize> = 2..=4;
const WIDEST_STATE: usize = 128;
/// Of `decode_mamba_accept.cu`: threads of a block, numbers of a state for each.
const ACCEPT_THREADS: usize = 128;
const ACCEPT_NUMBERS: usize = 4;

/// What a phase does: the kinds of `decode_phases.cuh` and `decode_mamba.cuh`.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Add,
    Head,
    Mix,
    Select,
    State,
}

/// `struct MambaPhase`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct MambaPhase {
    common: Phase,
    taps: u64,
    shift: u64,
    window: u64,
    a: u64,
    d: u64,
    dt_bias: u64,
    inner: [u64; 3],
    state: u64,
}

/// `struct MambaStep`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct MambaStep {
    common: Step,
    channels: i32,
    states: i32,
    rank: i32,
    filter: i32,
    normed: i32,
    inner_eps: f32,
    u: u64,
    y: u64,
    selected: u64,
    drafts: u64,
    own_channels: i32,
    padding: i32,
}

/// `struct Accept` of `decode_mamba_accept.cu`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Accept {
    phases: u64,
    drafts: u64,
    slots: u64,
    counts: u64,
    each: i32,
    tokens: i32,
    channels: i32,
    states: i32,
    rank: i32,
    filter: i32,
}

/// A block: norm, projections, convolution, recurrence.
#[derive(Debug)]
struct Layer {
    norm: Norm,
    in_proj: Weight,
    in_bias: Option<Weight>,
    taps: Weight,
    shift: Option<Weight>,
    x_proj: Weight,
    inner_norms: [Option<Weight>; 3],
    dt_proj: Weight,
    dt_bias: Weight,
    a: Weight,
    d: Weight,
    out_proj: Weight,
    out_bias: Option<Weight>,
}

/// What all layers have in common: the sizes of channels, state, filter, dt's projection.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sizes {
    channels: usize,
    states: usize,
    filter: usize,
    rank: usize,
    inner_eps: Option<f32>,
}

impl Sizes {
    /// Of shared memory, for so many rows.
    fn needs(&self, element: usize, rows: usize, split: &Split) -> Needs {
        let own = split.own(self.channels);
        let selected_words = self.selected().div_ceil(size_of::<u32>() / element).next_multiple_of(2);
        let selected = (selected_words * size_of::<u32>()).div_ceil(GROUP);
        Needs {
            own,
            // a recurrence has all of its products at once, what else there is takes turns
            tiles: own.div_ceil(TILE),
            x: split.pitch(self.channels * element),
            // what was selected is read as one piece
            slot: if split.pieces(self.padded_rank(element) * element) > 1 { usize::MAX } else { 0 },
            // with what the last warp reads behind the end
            rooms: vec![rows * pitch(selected + selected / WARPS)],
            ..Needs::default()
        }
    }

    /// Numbers that the second projection selects: dt, B and C.
    fn selected(&self) -> usize {
        self.rank + 2 * self.states
    }

    /// Columns of dt's projection: whole pieces.
    fn padded_rank(&self, element: usize) -> usize {
        self.rank.next_multiple_of(PIECE / element)
    }
}

#[derive(Debug)]
pub(super) struct Mamba {
    sizes: Sizes,
    layers: Vec<Layer>,
}

impl Mamba {
    /// The blocks of a model of plain Mamba blocks alike in size; none if it is another.
    pub(super) fn new(model: &LanguageModel) -> Result<Option<Self>> {
        let dtype = model.dtype;
        let mut layers = Vec::with_capacity(model.blocks.len());
        let mut common: Option<Sizes> = None;
        for block in &model.blocks {
            let Some((norm, mixer)) = block.plain_mamba() else { return Ok(None) };
            let c = mixer.config();
            let sizes = Sizes {
                channels: c.d_inner,
                states: c.d_state,
                filter: c.d_conv,
                rank: c.dt_rank,
                inner_eps: c.inner_norm_eps.map(|eps| eps as f32),
            };
            let fits = sizes.channels.is_multiple_of(PIECE / dtype.size_in_bytes())
                && FILTERS.contains(&sizes.filter)
                && sizes.states <= WIDEST_STATE;
            if *common.get_or_insert(sizes) != sizes || !fits {
                return Ok(None);
            }
            let Some(norm) = Norm::new(norm)? else { return Ok(None) };
            let p = mixer.parameters()?;
            let own = |name: &str, tensor: &Tensor| Weight::new(name, tensor, dtype);
            let wide = |name: &str, tensor: &Tensor| Weight::new(name, tensor, DType::F32);
            let optional =
                |name: &str, tensor: &Option<Tensor>| Weight::optional(name, tensor.as_ref(), DType::F32);
            let [of_dt, of_b, of_c] = p.inner_norms;
            layers.push(Layer {
                norm,
                in_proj: own("in_proj", &p.in_proj.weight)?,
                in_bias: Weight::optional("in_proj: bias", p.in_proj.bias.as_ref(), dtype)?,
                taps: wide("conv1d", p.conv_weight)?,
                shift: Weight::optional("conv1d: bias", p.conv_bias, DType::F32)?,
                x_proj: own("x_proj", p.x_proj)?,
                inner_norms: [
                    optional("dt_layernorm", of_dt)?,
                    optional("b_layernorm", of_b)?,
                    optional("c_layernorm", of_c)?,
                ],
                dt_proj: Weight::padded("dt_proj", p.dt_weight, dtype)?,
                dt_bias: wide("dt_proj: bias", p.dt_bias)?,
                a: wide("A", &p.a)?,
                d: wide("D", p.d)?,
                out_proj: own("out_proj", &p.out_proj.weight)?,
                out_bias: Weight::optional("out_proj: bias", p.out_proj.bias.as_ref(), dtype)?,
            });
        }
        Ok(common.map(|sizes| Self { sizes, layers }))
    }
}

impl Blocks for Mamba {
    fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The window `[D, K - 1]`, the state `[D, N]`.
    fn states(&self) -> Vec<usize> {
        let Sizes { channels, states, filter, .. } = self.sizes;
        vec![channels * (filter - 1), channels * states]
    }

    fn to_pool(&self, state: &MixerState) -> Result<Vec<Tensor>> {
        match state {
            MixerState::Mamba(own) => {
                Ok(vec![own.conv.to_dtype(DType::F32)?, own.scan.to_dtype(DType::F32)?])
            }
            _ => Err(Error::value("decoder: state", "one of Mamba blocks", state.mixer())),
        }
    }

    fn restore(&self, parts: Vec<Tensor>, state: &mut MixerState) -> Result<()> {
        let (MixerState::Mamba(own), Ok([conv, scan])) = (&mut *state, <[Tensor; 2]>::try_from(parts)) else {
            return Err(Error::value("decoder: state", "one of Mamba blocks", state.mixer()));
        };
        (own.conv, own.scan) = (conv.reshape(own.conv.shape())?, scan.reshape(own.scan.shape())?);
        Ok(())
    }

    fn words(&self, _: usize) -> Vec<usize> {
        vec![self.sizes.channels, self.sizes.channels, self.sizes.selected() + 2]
    }

    fn drafts(&self) -> Vec<usize> {
        let channels = self.sizes.channels;
        vec![channels, channels, self.sizes.selected(), channels]
    }

    fn shapes(&self, common: &Common, blocks: usize) -> Vec<Shape> {
        let (sizes, element) = (&self.sizes, common.element());
        let extra = sizes.channels.div_ceil(GRAIN) % blocks;
        vec![
            Shape::new(element, [2, sizes.channels, common.hidden], 0),
            Shape::new(element, [1, sizes.selected(), sizes.channels], blocks / 3),
            Shape::new(element, [1, sizes.channels, sizes.padded_rank(element)], 0),
            Shape::new(element, [1, common.hidden, sizes.channels], extra),
        ]
    }

    fn matrices(&self, common: &Common, _: &[Vec<Room>]) -> Vec<[u64; 2]> {
        let half = (self.sizes.channels * common.hidden * common.element()) as u64;
        let of = |layer: &Layer| {
            let z = layer.in_proj.pointer + half;
            [
                [layer.in_proj.pointer, z],
                [layer.x_proj.pointer, 0],
                [layer.dt_proj.pointer, 0],
                [layer.out_proj.pointer, 0],
            ]
        };
        self.layers.iter().flat_map(of).collect()
    }

    fn phases(&self, common: &Common, pool: &[Vec<Room>], words: &[u64]) -> Vec<u64> {
        let sizes = &self.sizes;
        let (u, y, selected) = (words[0], words[1], words[2]);
        let mut phases = Vec::with_capacity(EACH * self.layers.len() + 1);
        for (index, (layer, pool)) in self.layers.iter().zip(pool).enumerate() {
            let phase = |kind: Kind, from: u64, width: usize| Phase {
                kind: kind as i32,
                layer: index as i32,
                from,
                width: width as i32,
                ..Phase::default()
            };
            let bias = pointer(&layer.in_bias);
            phases.push(MambaPhase {
                common: Phase { norm: layer.norm.argument(), bias, ..phase(Kind::Mix, 0, common.hidden) },
                taps: layer.taps.pointer,
                shift: pointer(&layer.shift),
                window: pool[0].pointer,
                ..MambaPhase::default()
            });
            phases
                .push(MambaPhase { common: phase(Kind::Select, u, sizes.channels), ..MambaPhase::default() });
            phases.push(MambaPhase {
                common: phase(Kind::State, selected, sizes.selected()),
                a: layer.a.pointer,
                d: layer.d.pointer,
                dt_bias: layer.dt_bias.pointer,
                inner: [0, 1, 2].map(|kind: usize| pointer(&layer.inner_norms[kind])),
                state: pool[1].pointer,
                ..MambaPhase::default()
            });
            let (first, bias) = ((index == 0) as i32, pointer(&layer.out_bias));
            let common = Phase { first, bias, ..phase(Kind::Add, y, sizes.channels) };
            phases.push(MambaPhase { common, ..MambaPhase::default() });
        }
        let head = Phase { kind: Kind::Head as i32, norm: common.norm.argument(), ..Phase::default() };
        phases.push(MambaPhase { common: head, ..MambaPhase::default() });
        pieces(&phases).to_vec()
    }

    fn needs(&self, common: &Common, rows: usize, split: &Split) -> Needs {
        self.sizes.needs(common.element(), rows, split)
    }

    fn step(&self, kernels: &Kernels, common: Step, layout: &Layout, places: &Places) -> Result<()> {
        let sizes = &self.sizes;
        let step = MambaStep {
            common,
            channels: sizes.channels as i32,
            states: sizes.states as i32,
            rank: sizes.rank as i32,
            filter: sizes.filter as i32,
            normed: sizes.inner_eps.is_some() as i32,
            inner_eps: sizes.inner_eps.unwrap_or(0.0),
            u: places.words[0],
            y: places.words[1],
            selected: places.words[2],
            drafts: places.drafts,
            own_channels: layout.own as i32,
            padding: 0,
        };
        kernels.step(Module::DecodeMamba, "decode_mamba", common.rows as usize, layout, &step)
    }

    fn accept(&self, kernels: &Kernels, places: &Places, sequences: usize, tokens: usize) -> Result<()> {
        let sizes = &self.sizes;
        let accept = Accept {
            phases: places.phases,
            drafts: places.drafts,
            slots: places.io.slots,
            counts: places.io.counts,
            each: EACH as i32,
            tokens: tokens as i32,
            channels: sizes.channels as i32,
            states: sizes.states as i32,
            rank: sizes.rank as i32,
            filter: sizes.filter as i32,
        };
        let threads = sizes.channels * sizes.states.div_ceil(ACCEPT_NUMBERS);
        let grid = [threads.div_ceil(ACCEPT_THREADS), sequences, self.layers.len()];
        kernels.accept(Module::DecodeMambaAccept, "decode_mamba_accept", grid, ACCEPT_THREADS, &accept)
    }
}
