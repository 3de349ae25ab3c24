//! The weights of RetNet blocks, and which the kernels take.

use super::super::super::super::LanguageModel;
use super::super::layout::{Needs, Split, TILE, WARPS};
use super::super::weights::{Norm, PIECE, Weight};
use crate::Result;
use crate::layers::retention::{RetentionConfig, RetentionScaling};
use crate::layers::{Linear, NormConfig};
use crate::ops::rotary::turns_of;
use crate::ops::{Activation, RotaryStyle};
use candle_core::{DType, Device, Tensor};

/// What heads are whole multiples of.
const PART: usize = 4;

/// Projections that share their inputs: one or two matrices, and their biases one behind the other.
#[derive(Debug)]
pub(super) struct Projection {
    pub(super) matrices: [u64; 2],
    _weights: Vec<Weight>,
    pub(super) bias: Option<Weight>,
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
pub(super) struct Layer {
    pub(super) norms: [Norm; 2],
    pub(super) query: Projection,
    pub(super) value: Projection,
    pub(super) head_norm: Option<Weight>,
    pub(super) out: Projection,
    pub(super) up: Projection,
    pub(super) down: Projection,
}

/// What all layers have in common.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sizes {
    pub(super) retention: RetentionConfig,
    /// Width and matrices of the feed-forward layer's first projection.
    pub(super) inner: usize,
    pub(super) inner_parts: usize,
    pub(super) activation: Activation,
}

impl Sizes {
    /// Of shared memory, for so many rows.
    pub(super) fn needs(&self, element: usize, rows: usize, split: &Split) -> Needs {
        let (c, values) = (&self.retention, self.values());
        let [own, own_inner] = [split.own(values), split.own(self.inner)];
        // heads that so many channels in a row belong to at most
        let heads = |channels: usize| ((channels + c.head_value - 2) / c.head_value + 1).min(c.heads);
        let most_heads = split.pieces(values * element) * heads(split.part(values * element) / element);
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
                super::super::MOST_ROWS * size_of::<u32>(),
            ],
            slot: c.head_key * size_of::<f32>(),
        }
    }

    pub(super) fn keys(&self) -> usize {
        self.retention.heads * self.retention.head_key
    }

    pub(super) fn values(&self) -> usize {
        self.retention.heads * self.retention.head_value
    }

    pub(super) fn gated(&self) -> bool {
        self.retention.gate.is_some()
    }

    /// Whether the halves of a head are turned together.
    pub(super) fn halves(&self) -> bool {
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
pub(in super::super) struct RetNet {
    pub(super) sizes: Sizes,
    pub(super) layers: Vec<Layer>,
    pub(super) order: Option<[Tensor; 2]>,
    /// Turns of a position.
    pub(super) turns: Option<Weight>,
    /// Logarithms of the decays.
    pub(super) logs: Weight,
}

impl RetNet {
    /// The blocks of a model of RetNet blocks alike in size and options; none if it is another.
    pub(in super::super) fn new(model: &LanguageModel) -> Result<Option<Self>> {
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
