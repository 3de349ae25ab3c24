//! What a gated Hyena layer carries from one call to the next.

use super::ModalHyenaConfig;
use crate::layers::LayerState;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The state of a [`ModalHyena`](super::ModalHyena) layer, batch first, f32 (f64 for f64 models).
#[derive(Clone, Debug)]
pub struct ModalHyenaState {
    /// The last inputs of the short filter, oldest first: `[B, 3 D, short_taps - 1]`.
    pub short: Tensor,
    /// Of the inner filter: `[B, D, S, 2]` with complex poles, `[B, D, S]` with real ones, `[B, D, taps - 1]` with taps.
    pub filter: Tensor,
}

impl ModalHyenaState {
    /// The state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn zeros(config: &ModalHyenaConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let short = Tensor::zeros((batch, 3 * config.d_model, config.short_taps - 1), dtype, device)?;
        Ok(Self { short, filter: Tensor::zeros(config.filter_state(batch), dtype, device)? })
    }

    /// Checks that this belongs to `batch` sequences of a layer of `config`.
    pub(super) fn check(&self, config: &ModalHyenaConfig, batch: usize) -> Result<()> {
        let short = vec![batch, 3 * config.d_model, config.short_taps - 1];
        for (name, tensor, dims) in
            [("short", &self.short, short), ("filter", &self.filter, config.filter_state(batch))]
        {
            if tensor.dims() != dims {
                let name = format!("modal_hyena state: {name}");
                return Err(Error::shape(name, format!("{dims:?}"), tensor.dims()));
            }
        }
        Ok(())
    }
}

impl LayerState for ModalHyenaState {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("short", &self.short), ("filter", &self.filter)]
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("short", &mut self.short), ("filter", &mut self.filter)]
    }
}
