//! One block of the stack.

use super::config::{BlockConfig, MixerConfig};
use super::state::MixerState;
use crate::Result;
use crate::layers::{GatedMlp, Mamba, NormLayer};
use crate::ops::Segments;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// Norm and mixer, then, where the family has one, norm and MLP.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    norm: NormLayer,
    mixer: Mixer,
    mlp: Option<(NormLayer, GatedMlp)>,
}

#[derive(Clone, Debug)]
enum Mixer {
    Mamba(Mamba),
}

/// The residual stream between two sums: what a block changes is added by whoever takes the next norm, in one pass.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    /// `[B, L, D]`
    pub(crate) sum: Tensor,
    /// `[B, L, D]`, not yet added.
    pub(crate) update: Option<Tensor>,
}

impl Stream {
    /// One token of one row, `[1, 1, D]`.
    pub(crate) fn token(&self, row: usize, token: usize) -> Result<Self> {
        let at = |x: &Tensor| x.narrow(0, row, 1)?.narrow(1, token, 1);
        Ok(Self { sum: at(&self.sum)?, update: self.update.as_ref().map(at).transpose()? })
    }

    /// Rows one below the other.
    pub(crate) fn cat(rows: &[Self]) -> Result<Self> {
        let sums: Vec<&Tensor> = rows.iter().map(|row| &row.sum).collect();
        let updates: Option<Vec<&Tensor>> = rows.iter().map(|row| row.update.as_ref()).collect();
        let update = updates.map(|updates| Tensor::cat(&updates, 0)).transpose()?;
        Ok(Self { sum: Tensor::cat(&sums, 0)?, update })
    }

    /// Adds what is pending and takes the norm of the sum, in the dtype `dtype` of the weights.
    pub(crate) fn norm(self, norm: &NormLayer, dtype: DType) -> Result<(Tensor, Tensor)> {
        match self.update {
            Some(update) => norm.add_forward(&self.sum, &update),
            None => {
                let normed = norm.forward(&self.sum.to_dtype(dtype)?)?;
                Ok((self.sum, normed))
            }
        }
    }
}

impl Block {
    pub(crate) fn new(config: &BlockConfig, width: usize, vb: VarBuilder) -> Result<Self> {
        let mixer = match &config.mixer {
            MixerConfig::Mamba(config) => Mixer::Mamba(Mamba::new(config, vb.pp("mixer"))?),
        };
        let mlp = |mlp: &super::MlpConfig| -> Result<_> {
            let norm = NormLayer::new(&mlp.norm, width, vb.pp("norm2"))?;
            Ok((norm, GatedMlp::new(&mlp.layer(width), vb.pp("mlp"))?))
        };
        Ok(Self {
            norm: NormLayer::new(&config.norm, width, vb.pp("norm"))?,
            mixer,
            mlp: config.mlp.as_ref().map(mlp).transpose()?,
        })
    }

    /// Takes the stream through the block; `state` moves behind the last token.
    pub(crate) fn forward(
        &self,
        stream: Stream,
        dtype: DType,
        segments: Option<&Segments>,
        state: Option<&mut MixerState>,
    ) -> Result<Stream> {
        let (sum, normed) = stream.norm(&self.norm, dtype)?;
        let update = match (&self.mixer, state) {
            (Mixer::Mamba(mamba), None) => mamba.forward_segments(&normed, segments, None)?,
            (Mixer::Mamba(mamba), Some(MixerState::Mamba(state))) => {
                mamba.forward_segments(&normed, segments, Some(state))?
            }
        };
        let stream = Stream { sum, update: Some(update) };
        let Some((norm, mlp)) = &self.mlp else { return Ok(stream) };
        let (sum, normed) = stream.norm(norm, dtype)?;
        Ok(Stream { sum, update: Some(mlp.forward(&normed)?) })
    }

    pub(crate) fn init_state(&self, batch: usize) -> Result<MixerState> {
        match &self.mixer {
            Mixer::Mamba(mamba) => Ok(MixerState::Mamba(mamba.init_state(batch)?)),
        }
    }
}
