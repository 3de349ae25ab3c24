//! Models of RetNet blocks: `kernels/common/decode_retnet.cuh`.

mod weights;

use super::super::super::MixerState;
use super::blocks::{Blocks, Kernels, Places};
use super::kernels::{POOL, Phase, Shape, Step};
use super::layout::{GRAIN, Layout, Needs, Split};
use super::program::pieces;
use super::rooms::Room;
use super::weights::{Common, Weight, pointer};
use crate::backend::cuda::Module;
use crate::layers::NormConfig;
use crate::layers::retention::RetentionScaling;
use crate::ops::Activation;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use weights::Layer;
pub(super) use weights::RetNet;

/// Phases of a layer.
const EACH: usize = 6;
/// Of `decode_retnet_accept.cu`: threads of a block, numbers of a state for each.
const ACCEPT_THREADS: usize = 128;
const ACCEPT_NUMBERS: usize = 4;

/// What a phase does: the kinds of `decode_phases.cuh` and `decode_retnet.cuh`.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Add,
    Head,
    Query,
    Value,
    Retain,
    Up,
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
