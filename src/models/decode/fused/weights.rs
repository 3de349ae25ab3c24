//! A model's weights as the kernels of decoding take them.

use super::super::super::LanguageModel;
use crate::Result;
use crate::backend::cuda::{Guards, Held, contiguous, device_of};
use crate::layers::NormLayer;
use crate::ops::norm::NormKind;
use candle_core::{CudaDevice, DType, Tensor};

/// Bytes of a copy.
const PIECE: usize = 16;
const FILTERS: std::ops::RangeInclusive<usize> = 2..=4;
const WIDEST_STATE: usize = 128;

/// A contiguous tensor and where it lies. Nothing writes to it.
#[derive(Debug)]
pub(super) struct Weight {
    pub(super) pointer: u64,
    _tensor: Tensor,
}

impl Weight {
    pub(super) fn new(name: &str, tensor: &Tensor, dtype: DType) -> Result<Self> {
        let tensor = contiguous(&tensor.detach().to_dtype(dtype)?)?;
        let device = device_of(&tensor)?;
        let pointer = {
            let (stream, held) = (device.cuda_stream(), Held::new(&tensor));
            held.pointer(name, &device, &stream, &mut Guards::default())?
        };
        Ok(Self { pointer, _tensor: tensor })
    }

    /// A matrix whose rows are whole pieces of 16 bytes, with zeros at their ends.
    fn padded(name: &str, tensor: &Tensor, dtype: DType) -> Result<Self> {
        let width = tensor.dim(1)?;
        let padded = width.next_multiple_of(PIECE / dtype.size_in_bytes());
        Self::new(name, &tensor.detach().pad_with_zeros(1, 0, padded - width)?, dtype)
    }

    fn wide(name: &str, tensor: Option<&Tensor>) -> Result<Option<Self>> {
        tensor.map(|tensor| Self::new(name, tensor, DType::F32)).transpose()
    }
}

/// Where an optional weight lies; null if it is not there.
pub(super) fn pointer(weight: &Option<Weight>) -> u64 {
    weight.as_ref().map_or(0, |weight| weight.pointer)
}

/// A norm over the residual stream.
#[derive(Debug)]
pub(super) struct Norm {
    pub(super) weight: Weight,
    pub(super) bias: Option<Weight>,
    pub(super) kind: NormKind,
    pub(super) eps: f32,
}

impl Norm {
    fn new(layer: &NormLayer) -> Result<Option<Self>> {
        let norm = layer.arguments();
        let Some(weight) = norm.weight else { return Ok(None) };
        Ok(Some(Self {
            weight: Weight::new("norm: weight", weight, DType::F32)?,
            bias: Weight::wide("norm: bias", norm.bias)?,
            kind: norm.kind,
            eps: norm.eps as f32,
        }))
    }
}

/// A block: norm, projections, convolution, recurrence.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) norm: Norm,
    pub(super) in_proj: Weight,
    pub(super) in_bias: Option<Weight>,
    pub(super) taps: Weight,
    pub(super) shift: Option<Weight>,
    pub(super) x_proj: Weight,
    pub(super) inner_norms: [Option<Weight>; 3],
    pub(super) dt_proj: Weight,
    pub(super) dt_bias: Weight,
    pub(super) a: Weight,
    pub(super) d: Weight,
    pub(super) out_proj: Weight,
    pub(super) out_bias: Option<Weight>,
}

/// What all layers have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sizes {
    /// Of the residual stream, the mixer's channels, the state, the filter, dt's projection, the logits.
    pub(super) hidden: usize,
    pub(super) channels: usize,
    pub(super) states: usize,
    pub(super) filter: usize,
    pub(super) rank: usize,
    pub(super) vocabulary: usize,
    pub(super) inner_eps: Option<f32>,
    /// Whether the residual stream is f32.
    pub(super) wide: bool,
    pub(super) embedding_scale: f32,
}

impl Sizes {
    /// Numbers that the second projection selects: dt, B and C.
    pub(super) fn selected(&self) -> usize {
        self.rank + 2 * self.states
    }

    /// Columns of dt's projection: whole pieces.
    pub(super) fn padded_rank(&self, element: usize) -> usize {
        self.rank.next_multiple_of(PIECE / element)
    }
}

#[derive(Debug)]
pub(super) struct Weights {
    pub(super) sizes: Sizes,
    pub(super) dtype: DType,
    pub(super) embedding: Weight,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    pub(super) head: Weight,
}

impl Weights {
    /// The weights of a model that the kernels take, and its device: on CUDA, of plain Mamba blocks alike in size, with an
    /// ordinary embedding and a final norm.
    pub(super) fn new(model: &LanguageModel) -> Result<Option<(Self, CudaDevice)>> {
        let dtype = model.dtype;
        let config = &model.config;
        if !model.device.is_cuda()
            || dtype == DType::F64
            || model.blocks.is_empty()
            || model.embedding_norm.is_some()
        {
            return Ok(None);
        }
        let Some(final_norm) = &model.final_norm else { return Ok(None) };
        let Some(norm) = Norm::new(final_norm)? else { return Ok(None) };
        let mut layers = Vec::with_capacity(model.blocks.len());
        let mut common: Option<Sizes> = None;
        for block in &model.blocks {
            let Some((norm, mixer)) = block.plain_mamba() else { return Ok(None) };
            let c = mixer.config();
            let sizes = Sizes {
                hidden: config.hidden_size,
                channels: c.d_inner,
                states: c.d_state,
                filter: c.d_conv,
                rank: c.dt_rank,
                vocabulary: config.vocab_size,
                inner_eps: c.inner_norm_eps.map(|eps| eps as f32),
                wide: config.residual_in_fp32 || dtype == DType::F32,
                embedding_scale: config.embedding_scale as f32,
            };
            if *common.get_or_insert(sizes) != sizes || !fits(&sizes, dtype) {
                return Ok(None);
            }
            let Some(norm) = Norm::new(norm)? else { return Ok(None) };
            let p = mixer.parameters()?;
            let own = |name: &str, tensor: &Tensor| Weight::new(name, tensor, dtype);
            let wide = |name: &str, tensor: &Tensor| Weight::new(name, tensor, DType::F32);
            let [of_dt, of_b, of_c] = p.inner_norms;
            layers.push(Layer {
                norm,
                in_proj: own("in_proj", &p.in_proj.weight)?,
                in_bias: p.in_proj.bias.as_ref().map(|bias| own("in_proj: bias", bias)).transpose()?,
                taps: wide("conv1d", p.conv_weight)?,
                shift: Weight::wide("conv1d: bias", p.conv_bias)?,
                x_proj: own("x_proj", p.x_proj)?,
                inner_norms: [
                    Weight::wide("dt_layernorm", of_dt.as_ref())?,
                    Weight::wide("b_layernorm", of_b.as_ref())?,
                    Weight::wide("c_layernorm", of_c.as_ref())?,
                ],
                dt_proj: Weight::padded("dt_proj", p.dt_weight, dtype)?,
                dt_bias: wide("dt_proj: bias", p.dt_bias)?,
                a: wide("A", &p.a)?,
                d: wide("D", p.d)?,
                out_proj: own("out_proj", &p.out_proj.weight)?,
                out_bias: p.out_proj.bias.as_ref().map(|bias| own("out_proj: bias", bias)).transpose()?,
            });
        }
        let Some(sizes) = common else { return Ok(None) };
        let embedding = Weight::new("embeddings", &model.embedding, dtype)?;
        let head = Weight::new("lm_head", &model.head, dtype)?;
        let device = model.device.as_cuda_device()?.clone();
        Ok(Some((Self { sizes, dtype, embedding, layers, norm, head }, device)))
    }
}

/// Whether kernels exist for these sizes: rows of weights in whole pieces.
fn fits(sizes: &Sizes, dtype: DType) -> bool {
    let piece = PIECE / dtype.size_in_bytes();
    [sizes.hidden, sizes.channels].iter().all(|n| n.is_multiple_of(piece))
        && FILTERS.contains(&sizes.filter)
        && sizes.states <= WIDEST_STATE
}
