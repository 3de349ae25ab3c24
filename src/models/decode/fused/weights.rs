//! A model's weights as the kernels of decoding take them: what all families have.

use super::super::super::LanguageModel;
use super::kernels;
use crate::Result;
use crate::backend::cuda::{Guards, Held, contiguous, device_of};
use crate::layers::NormLayer;
use crate::ops::norm::NormKind;
use candle_core::{CudaDevice, DType, Tensor};

/// Bytes of a copy.
pub(super) const PIECE: usize = 16;

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
    pub(super) fn padded(name: &str, tensor: &Tensor, dtype: DType) -> Result<Self> {
        let width = tensor.dim(1)?;
        let padded = width.next_multiple_of(PIECE / dtype.size_in_bytes());
        Self::new(name, &tensor.detach().pad_with_zeros(1, 0, padded - width)?, dtype)
    }

    pub(super) fn optional(name: &str, tensor: Option<&Tensor>, dtype: DType) -> Result<Option<Self>> {
        tensor.map(|tensor| Self::new(name, tensor, dtype)).transpose()
    }
}

/// Where an optional weight lies; null if it is not there.
pub(super) fn pointer(weight: &Option<Weight>) -> u64 {
    weight.as_ref().map_or(0, |weight| weight.pointer)
}

/// A norm over the residual stream.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Weight,
    bias: Option<Weight>,
    kind: NormKind,
    eps: f32,
}

impl Norm {
    /// None if it has no weight.
    pub(super) fn new(layer: &NormLayer) -> Result<Option<Self>> {
        let norm = layer.arguments();
        let Some(weight) = norm.weight else { return Ok(None) };
        Ok(Some(Self {
            weight: Weight::new("norm: weight", weight, DType::F32)?,
            bias: Weight::optional("norm: bias", norm.bias, DType::F32)?,
            kind: norm.kind,
            eps: norm.eps as f32,
        }))
    }

    pub(super) fn argument(&self) -> kernels::Norm {
        kernels::Norm {
            weight: self.weight.pointer,
            bias: pointer(&self.bias),
            layer: (self.kind == NormKind::Layer) as i32,
            outside: (self.kind == NormKind::RmsOutside) as i32,
            eps: self.eps,
            padding: 0,
        }
    }
}

/// What models of all families have.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) hidden: usize,
    pub(super) vocabulary: usize,
    /// Whether the residual stream is f32.
    pub(super) wide: bool,
    pub(super) embedding_scale: f32,
    pub(super) dtype: DType,
    pub(super) embedding: Weight,
    pub(super) norm: Norm,
    pub(super) head: Weight,
}

impl Common {
    /// Those of a model that the kernels take as far as this is concerned, and its device: on CUDA, with an ordinary
    /// embedding and a final norm.
    pub(super) fn new(model: &LanguageModel) -> Result<Option<(Self, CudaDevice)>> {
        let (dtype, config) = (model.dtype, &model.config);
        let whole = config.hidden_size.is_multiple_of(PIECE / dtype.size_in_bytes());
        if !model.device.is_cuda() || dtype == DType::F64 || model.embedding_norm.is_some() || !whole {
            return Ok(None);
        }
        let Some(final_norm) = &model.final_norm else { return Ok(None) };
        let Some(norm) = Norm::new(final_norm)? else { return Ok(None) };
        let common = Self {
            hidden: config.hidden_size,
            vocabulary: config.vocab_size,
            wide: config.residual_in_fp32 || dtype == DType::F32,
            embedding_scale: config.embedding_scale as f32,
            dtype,
            embedding: Weight::new("embeddings", &model.embedding, dtype)?,
            norm,
            head: Weight::new("lm_head", &model.head, dtype)?,
        };
        Ok(Some((common, model.device.as_cuda_device()?.clone())))
    }

    /// Bytes of an element.
    pub(super) fn element(&self) -> usize {
        self.dtype.size_in_bytes()
    }
}
