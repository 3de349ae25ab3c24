//! One block of the stack.

use super::Form;
use super::config::{BlockConfig, FeedForwardConfig, Residual};
use super::mixer::{Mixer, MixerState};
use crate::Result;
use crate::layers::{Mlp, NormLayer};
use crate::ops::Segments;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// Norm and mixer, then, where the family has one, norm and MLP.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    norm: NormLayer,
    mixer: Mixer,
    mlp: Option<(NormLayer, Mlp)>,
    residual: Residual,
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

    /// The stream with what is pending added.
    pub(crate) fn value(self) -> Result<Tensor> {
        match self.update {
            Some(update) => Ok((&self.sum + update.to_dtype(self.sum.dtype())?)?),
            None => Ok(self.sum),
        }
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
        let mlp = |mlp: &FeedForwardConfig| -> Result<_> {
            let norm = NormLayer::new(&mlp.norm, width, vb.pp("norm2"))?;
            Ok((norm, Mlp::new(&mlp.layer, vb.pp("mlp"))?))
        };
        Ok(Self {
            norm: NormLayer::new(&config.norm, width, vb.pp("norm"))?,
            mixer: Mixer::new(&config.mixer, vb.pp("mixer"))?,
            mlp: config.mlp.as_ref().map(mlp).transpose()?,
            residual: config.residual,
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
        let stream = self.sub_layer(stream, &self.norm, dtype, |x| self.mixer.forward(x, segments, state))?;
        match &self.mlp {
            Some((norm, mlp)) => self.sub_layer(stream, norm, dtype, |x| mlp.forward(x)),
            None => Ok(stream),
        }
    }

    /// `scale x + f(norm(x))`, or with the norm behind the sum `norm(scale x + f(x))`.
    fn sub_layer(
        &self,
        stream: Stream,
        norm: &NormLayer,
        dtype: DType,
        f: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Stream> {
        let scaled = |sum: Tensor| match self.residual.scale {
            1.0 => Ok(sum),
            scale => sum.affine(scale, 0.0),
        };
        if !self.residual.post_norm {
            let (sum, normed) = stream.norm(norm, dtype)?;
            return Ok(Stream { update: Some(f(&normed)?), sum: scaled(sum)? });
        }
        let x = stream.value()?;
        let update = f(&x.to_dtype(dtype)?)?;
        let wide = x.dtype();
        let (_, normed) = norm.add_forward(&scaled(x)?, &update)?;
        Ok(Stream { sum: normed.to_dtype(wide)?, update: None })
    }

    /// Norm and mixer of a block that is `x + mamba(norm(x))` and nothing else.
    #[cfg(feature = "cuda")]
    pub(crate) fn plain_mamba(&self) -> Option<(&NormLayer, &crate::layers::Mamba)> {
        match &self.mixer {
            Mixer::Mamba(mixer) if self.mlp.is_none() && self.residual == Residual::default() => {
                Some((&self.norm, mixer))
            }
            _ => None,
        }
    }

    /// Norms, mixer and feed-forward layer of a block that is `y + mlp(norm(y))`, `y = x + retention(norm(x))`, and nothing
    /// else.
    #[cfg(feature = "cuda")]
    pub(crate) fn plain_retention(
        &self,
    ) -> Option<([&NormLayer; 2], &crate::layers::MultiScaleRetention, &Mlp)> {
        match (&self.mixer, &self.mlp) {
            (Mixer::Retention(mixer), Some((norm, mlp))) if self.residual == Residual::default() => {
                Some(([&self.norm, norm], mixer, mlp))
            }
            _ => None,
        }
    }

    /// Whether the stream comes out whole, with no update pending.
    pub(crate) fn ends_in_norm(&self) -> bool {
        self.residual.post_norm
    }

    pub(crate) fn init_state(&self, batch: usize) -> Result<MixerState> {
        self.mixer.init_state(batch)
    }

    pub(crate) fn set_form(&mut self, form: Form) -> Result<bool> {
        self.mixer.set_form(form)
    }
}
