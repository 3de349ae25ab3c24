//! Models of RetNet blocks: `kernels/common/decode_retnet.cuh`.

use super::super::super::{LanguageModel, MixerState};
use super::Room;
use super::blocks::{Blocks, Kernels, Places};
use super::kernels::{POOL, Phase, Shape, Step};
use super::layout::{GRAIN, Layout, Needs, Split, TILE, WARPS};
use super::program::pieces;
use super::weights::{Common, Norm, PIECE, Weight, pointer};
use crate::backend::cuda::Module;
use crate::layers::retention::{RetentionConfig, RetentionScaling};
use crate::layers::{Linear, NormConfig};
use crate::ops::rotary::turns_of;
use crate::ops::{Activation, RotaryStyle};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Phases of a layer.
const EACH: usize = 6;
/// What heads are whole multiples of.
const PART: usize = 4;
/// Of `decode_retnet_accept.cu`: threads of a block, numbers of a state for each.
const ACCEPT_THREADS: usize = 128;
const ACCEPT_NUMBERS: usize = 4;

/// What a phase does: `enum Kind`.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Query,
    Value,
    Retain,
    Add,
    Up,
    Head,
}

/// `struct RetNetPhase`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RetNetPhase {
    common: Phase,
    weight: u64,
    state: u64,
    activation: i32,
    padding: i32,
}

/// `struct RetNetStep`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RetNetStep {
    common: Step,
    heads: i32,
    key: i32,
    value: i32,
    inner: i32,
    gated: i32,
    divided: i32,
    outside: i32,
    outer: f32,
    head_eps: f32,
    padding: i32,
    turns: u64,
    logs: u64,
    positions: u64,
    qk: u64,
    z: u64,
    u: u64,
    parts: u64,
    drafts: u64,
    own_values: i32,
    most_heads: i32,
}

/// `struct Accept` of `decode_retnet_accept.cu`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Accept {
    phases: u64,
    drafts: u64,
    logs: u64,
    slots: u64,
    counts: u64,
    each: i32,
    tokens: i32,
    heads: i32,
    key: i32,
    value: i32,
    padding: i32,
}

/// Projections that share their inputs: one or two matrices, and their biases one behind the other.
#[derive(Debug)]
struct Projection {
    matrices: [u64; 2],
    _weights: Vec<Weight>,
    bias: Option<Weight>,
}

impl Projection {
    /// Of one or two layers, whose biases' elements are in the order `order` where there is one.
    fn new(name: &str, layers: &[&Linear], dtype: DType, order: Option<&Tensor>) -> Result<Self> {
        let weight = |layer: &&Linear| Weight::new(name, &layer.weight, dtype);
        let weights: Vec<Weight> = layers.iter().map(weight).collect::<Result<_>>()?;
        let biases: Option<Vec<Tensor>> = layers.iter().map(|layer| layer.bias.clone()).collect();
        let bias = |biases: Vec<Tensor>| -> Result<Weight> {
            let ordered = biases.iter().map(|bias| match order {
                Some(order) => bias.detach().index_select(order, 0),
                None => Ok(bias.detach()),
            });
            Weight::new(name, &Tensor::cat(&ordered.collect::<candle_core::Result<Vec<_>>>()?, 0)?, dtype)
        };
        let at = |i: usize| weights.get(i).map_or(0, |weight| weight.pointer);
        Ok(Self { matrices: [at(0), at(1)], bias: biases.map(bias).transpose()?, _weights: weights })
    }

    /// The same where one matrix is both, one below the other of `half` bytes.
    fn joint(mut self, half: usize) -> Self {
        self.matrices[1] = self.matrices[0] + half as u64;
        self
    }
}

/// A block: norm, retention, norm, feed-forward layer.
#[derive(Debug)]
struct Layer {
    norms: [Norm; 2],
    query: Projection,
    value: Projection,
    head_norm: Option<Weight>,
    out: Projection,
    up: Projection,
    down: Projection,
}

/// What all layers have in common.
#[derive(Clone, Debug, PartialEq)]
struct Sizes {
    retention: RetentionConfig,
    /// Width and matrices of the feed-forward layer's first projection.
    inner: usize,
    inner_parts: usize,
    activation: Activation,
}

impl Sizes {
    /// Of shared memory, for so many rows.
    fn needs(&self, element: usize, rows: usize, split: &Split) -> Needs {
        let (c, values) = (&self.retention, self.values());
        let [own, own_inner] = [split.own(values), split.own(self.inner)];
        // heads that so many channels in a row belong to at most
        let heads = |channels: usize| ((channels + c.head_value - 2) / c.head_value + 1).min(c.heads);
        let most_heads = heads(split.part(values * element) / element);
        let queries = heads(own) * 2 * c.head_key * element;
        Needs {
            own,
            // all channels of the values at once; both sides of a gate
            tiles: own.div_ceil(TILE).max(2 * own_inner.div_ceil(TILE)),
            x: split
                .pitch(values * element)
                .max(split.pitch(self.inner * element))
                .max(queries.div_ceil(WARPS)),
            heads: most_heads,
            rooms: vec![
                WARPS * rows * most_heads * size_of::<f32>(),
                c.heads * size_of::<f32>(),
                super::MOST_ROWS * size_of::<u32>(),
                super::MOST_ROWS * size_of::<u32>(),
            ],
            slot: c.head_key * size_of::<f32>(),
        }
    }

    fn keys(&self) -> usize {
        self.retention.heads * self.retention.head_key
    }

    fn values(&self) -> usize {
        self.retention.heads * self.retention.head_value
    }

    fn gated(&self) -> bool {
        self.retention.gate.is_some()
    }

    /// Whether the halves of a head are turned together.
    fn halves(&self) -> bool {
        self.retention.rotary.is_some_and(|rotary| rotary.style == RotaryStyle::Half)
    }

    /// Whether kernels exist for these options and sizes: rows of weights in whole pieces.
    fn fit(&self, element: usize) -> bool {
        let c = &self.retention;
        let ordinary = c.heads == c.kv_heads
            && c.feature_map.is_none()
            && c.short_conv.is_none()
            && matches!(c.scaling, RetentionScaling::None | RetentionScaling::DecaySum)
            && !matches!(c.norm.kind, NormConfig::Layer { .. });
        let whole = |size: usize| size.is_multiple_of(PIECE / element);
        ordinary
            && c.head_key.is_multiple_of(PART)
            && c.head_value.is_multiple_of(PART)
            && whole(self.values())
            && whole(self.inner)
    }

    /// Where a head's channel of keys lies in the order of turned pairs, and the other way round.
    fn order(&self, device: &Device) -> Result<Option<[Tensor; 2]>> {
        if !self.halves() {
            return Ok(None);
        }
        let (key, half) = (self.retention.head_key as u32, self.retention.head_key as u32 / 2);
        let from: Vec<u32> = (0..key).map(|i| i / 2 + i % 2 * half).collect();
        let to: Vec<u32> = (0..key).map(|i| i % half * 2 + i / half).collect();
        Ok(Some([Tensor::new(from, device)?, Tensor::new(to, device)?]))
    }
}

#[derive(Debug)]
pub(super) struct RetNet {
    sizes: Sizes,
    layers: Vec<Layer>,
    order: Option<[Tensor; 2]>,
    /// Turns of a position.
    turns: Option<Weight>,
    /// Logarithms of the decays.
    logs: Weight,
}

impl RetNet {
    /// The blocks of a model of RetNet blocks alike in size and options; none if it is another.
    pub(super) fn new(model: &LanguageModel) -> Result<Option<Self>> {
        let (dtype, device) = (model.dtype, &model.device);
        let mut layers = Vec::with_capacity(model.blocks.len());
        let mut common: Option<Sizes> = None;
        for block in &model.blocks {
            let Some((norms, mixer, mlp)) = block.plain_retention() else { return Ok(None) };
            let (config, p) = (mixer.config(), mixer.parameters());
            let Some(up) = mlp.projections() else { return Ok(None) };
            let sizes = Sizes {
                retention: RetentionConfig { form: Default::default(), ..config.clone() },
                inner: up.inner,
                inner_parts: up.parts,
                activation: up.activation,
            };
            if *common.get_or_insert(sizes.clone()) != sizes || !sizes.fit(dtype.size_in_bytes()) {
                return Ok(None);
            }
            let [Some(first), Some(second)] = [Norm::new(norms[0])?, Norm::new(norms[1])?] else {
                return Ok(None);
            };
            let heads = |order: &Tensor| -> Result<Tensor> {
                let starts: Vec<u32> = (0..config.heads as u32).map(|h| h * config.head_key as u32).collect();
                let starts = Tensor::new(starts, device)?.unsqueeze(1)?;
                Ok(starts.broadcast_add(&order.unsqueeze(0)?)?.flatten_all()?)
            };
            let order = sizes.order(device)?.map(|[from, _]| heads(&from)).transpose()?;
            let values: Vec<&Linear> = [Some(p.v), p.gate].into_iter().flatten().collect();
            let inner = Projection::new("fc1", &up.first, dtype, None)?;
            let joint = up.first.len() < up.parts;
            let half = up.inner * model.config.hidden_size * dtype.size_in_bytes();
            layers.push(Layer {
                norms: [first, second],
                query: Projection::new("q_proj, k_proj", &[p.q, p.k], dtype, order.as_ref())?,
                value: Projection::new("v_proj, g_proj", &values, dtype, None)?,
                head_norm: Weight::optional("g_norm", p.norm, DType::F32)?,
                out: Projection::new("o_proj", &[p.out], dtype, None)?,
                up: if joint { inner.joint(half) } else { inner },
                down: Projection::new("fc2", &[up.second], dtype, None)?,
            });
        }
        let Some(sizes) = common else { return Ok(None) };
        let c = &sizes.retention;
        let logs: Vec<f32> = c.decay.logarithms(c.heads).iter().map(|&log| log as f32).collect();
        let turned = c.rotary.map(|rotary| -> Result<_> {
            // two's complement: the bits are what the kernel takes
            let turns: Vec<i64> =
                rotary.frequencies(c.head_key).into_iter().map(|f| turns_of(f) as i64).collect();
            Weight::new("turns", &Tensor::new(turns, device)?, DType::I64)
        });
        let logs = Weight::new("decays", &Tensor::new(logs, device)?, DType::F32)?;
        Ok(Some(Self { order: sizes.order(device)?, turns: turned.transpose()?, logs, layers, sizes }))
    }
}

impl Blocks for RetNet {
    fn layers(&self) -> usize {
        self.layers.len()
    }

    /// The state `[H, V, K]`, keys in the order of turned pairs.
    fn states(&self) -> Vec<usize> {
        vec![self.sizes.values() * self.sizes.retention.head_key]
    }

    fn to_pool(&self, state: &MixerState) -> Result<Vec<Tensor>> {
        let MixerState::Retention(own) = state else {
            return Err(Error::value("decoder: state", "one of retention blocks", state.mixer()));
        };
        let mut state = own.retention.squeeze(0)?.to_dtype(DType::F32)?;
        if let Some([from, _]) = &self.order {
            state = state.contiguous()?.index_select(from, 1)?;
        }
        Ok(vec![state.transpose(1, 2)?])
    }

    fn restore(&self, parts: Vec<Tensor>, state: &mut MixerState) -> Result<()> {
        let (MixerState::Retention(own), Ok([part])) = (&mut *state, <[Tensor; 1]>::try_from(parts)) else {
            return Err(Error::value("decoder: state", "one of retention blocks", state.mixer()));
        };
        let c = &self.sizes.retention;
        let mut part = part.reshape((c.heads, c.head_value, c.head_key))?.transpose(1, 2)?.contiguous()?;
        if let Some([_, to]) = &self.order {
            part = part.index_select(to, 1)?;
        }
        own.retention = part.unsqueeze(0)?;
        Ok(())
    }

    fn words(&self, blocks: usize) -> Vec<usize> {
        vec![
            2 * self.sizes.keys(),
            self.sizes.values(),
            self.sizes.inner,
            blocks + self.sizes.retention.heads,
        ]
    }

    fn drafts(&self) -> Vec<usize> {
        vec![self.sizes.keys(), self.sizes.values()]
    }

    fn shapes(&self, common: &Common, blocks: usize) -> Vec<Shape> {
        let (sizes, element, hidden) = (&self.sizes, common.element(), common.hidden);
        let (values, key) = (sizes.values(), sizes.retention.head_key);
        let turn = sizes.inner.div_ceil(GRAIN) % blocks;
        vec![
            Shape {
                form: if sizes.halves() { key as i32 } else { 0 },
                ..Shape::new(element, [2, sizes.keys(), hidden], 0)
            },
            Shape::new(element, [1 + sizes.gated() as usize, values, hidden], 0),
            Shape { form: POOL, ..Shape::new(size_of::<f32>(), [1, values, key], 0) },
            // both onto the same part of the stream
            Shape::new(element, [1, hidden, values], turn),
            Shape::new(element, [sizes.inner_parts, sizes.inner, hidden], 0),
            Shape::new(element, [1, hidden, sizes.inner], turn),
        ]
    }

    fn matrices(&self, _: &Common, pool: &[Vec<Room>]) -> Vec<[u64; 2]> {
        let of = |(layer, pool): (&Layer, &Vec<Room>)| {
            let [query, value] = [layer.query.matrices, layer.value.matrices];
            [query, value, [pool[0].pointer, 0], layer.out.matrices, layer.up.matrices, layer.down.matrices]
        };
        self.layers.iter().zip(pool).flat_map(of).collect()
    }

    fn phases(&self, common: &Common, pool: &[Vec<Room>], words: &[u64]) -> Vec<u64> {
        let sizes = &self.sizes;
        let (z, u) = (words[1], words[2]);
        let gate = sizes.retention.gate.unwrap_or(Activation::Identity) as i32;
        let mut phases = Vec::with_capacity(EACH * self.layers.len() + 1);
        for (index, (layer, pool)) in self.layers.iter().zip(pool).enumerate() {
            let phase = |kind: Kind, from: u64, width: usize, bias: &Option<Weight>| Phase {
                kind: kind as i32,
                layer: index as i32,
                from,
                width: width as i32,
                bias: pointer(bias),
                ..Phase::default()
            };
            let plain = |common: Phase| RetNetPhase { common, ..RetNetPhase::default() };
            let normed = |norm: usize, common: Phase| Phase { norm: layer.norms[norm].argument(), ..common };
            let out = phase(Kind::Add, z, sizes.values(), &layer.out.bias);
            phases.extend([
                plain(normed(0, phase(Kind::Query, 0, common.hidden, &layer.query.bias))),
                plain(phase(Kind::Value, 0, common.hidden, &layer.value.bias)),
                RetNetPhase {
                    weight: pointer(&layer.head_norm),
                    state: pool[0].pointer,
                    activation: gate,
                    ..plain(phase(Kind::Retain, 0, 0, &None))
                },
                plain(Phase { first: (index == 0) as i32, ..out }),
                RetNetPhase {
                    activation: sizes.activation as i32,
                    ..plain(normed(1, phase(Kind::Up, 0, common.hidden, &layer.up.bias)))
                },
                plain(phase(Kind::Add, u, sizes.inner, &layer.down.bias)),
            ]);
        }
        let head = Phase { kind: Kind::Head as i32, norm: common.norm.argument(), ..Phase::default() };
        phases.push(RetNetPhase { common: head, ..RetNetPhase::default() });
        pieces(&phases).to_vec()
    }

    fn needs(&self, common: &Common, rows: usize, split: &Split) -> Needs {
        self.sizes.needs(common.element(), rows, split)
    }

    fn step(&self, kernels: &Kernels, common: Step, layout: &Layout, places: &Places) -> Result<()> {
        let sizes = &self.sizes;
        let c = &sizes.retention;
        let (outside, eps) = match c.norm.kind {
            NormConfig::RmsOutside { eps } => (true, eps),
            NormConfig::Rms { eps } | NormConfig::Layer { eps } => (false, eps),
        };
        let step = RetNetStep {
            common,
            heads: c.heads as i32,
            key: c.head_key as i32,
            value: c.head_value as i32,
            inner: sizes.inner as i32,
            gated: sizes.gated() as i32,
            divided: (c.scaling == RetentionScaling::DecaySum) as i32,
            outside: outside as i32,
            outer: (c.head_key as f32).powf(-0.5),
            head_eps: eps as f32,
            padding: 0,
            turns: pointer(&self.turns),
            logs: self.logs.pointer,
            positions: places.io.positions,
            qk: places.words[0],
            z: places.words[1],
            u: places.words[2],
            parts: places.words[3],
            drafts: places.drafts,
            own_values: layout.own as i32,
            most_heads: layout.heads as i32,
        };
        kernels.step(Module::DecodeRetNet, "decode_retnet", common.rows as usize, layout, &step)
    }

    fn accept(&self, kernels: &Kernels, places: &Places, sequences: usize, tokens: usize) -> Result<()> {
        let c = &self.sizes.retention;
        let accept = Accept {
            phases: places.phases,
            drafts: places.drafts,
            logs: self.logs.pointer,
            slots: places.io.slots,
            counts: places.io.counts,
            each: EACH as i32,
            tokens: tokens as i32,
            heads: c.heads as i32,
            key: c.head_key as i32,
            value: c.head_value as i32,
            padding: 0,
        };
        let threads = self.sizes.values() * c.head_key / ACCEPT_NUMBERS;
        let grid = [threads.div_ceil(ACCEPT_THREADS), sequences, self.layers.len()];
        kernels.accept(Module::DecodeRetNetAccept, "decode_retnet_accept", grid, ACCEPT_THREADS, &accept)
    }
}
