//! What a Mamba layer carries from one call to the next.

use super::MambaConfig;
use crate::layers::LayerState;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The state of a [`Mamba`](super::Mamba) layer, batch first, f32 (f64 for f64 models).
#[derive(Clone, Debug)]
pub struct MambaState {
    /// The last inputs of the convolution, oldest first: `[B, d_inner, d_conv - 1]`.
    pub conv: Tensor,
    /// The state of the recurrence: `[B, d_inner, d_state]`.
    pub scan: Tensor,
}

impl MambaState {
    /// The state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn zeros(config: &MambaConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let conv = Tensor::zeros((batch, config.d_inner, config.d_conv - 1), dtype, device)?;
        let scan = Tensor::zeros((batch, config.d_inner, config.d_state), dtype, device)?;
        Ok(Self { conv, scan })
    }

    /// Checks that this belongs to `batch` sequences of a layer of `config`.
    pub(crate) fn check(&self, config: &MambaConfig, batch: usize) -> Result<()> {
        let expected = [
            (
                "state: conv",
                "[B, d_inner, d_conv - 1]",
                &self.conv,
                [batch, config.d_inner, config.d_conv - 1],
            ),
            ("state: scan", "[B, d_inner, d_state]", &self.scan, [batch, config.d_inner, config.d_state]),
        ];
        for (name, symbols, tensor, dims) in expected {
            if tensor.dims() != dims {
                return Err(Error::shape(
                    format!("mamba {name}"),
                    format!("{symbols} = {dims:?}"),
                    tensor.dims(),
                ));
            }
        }
        Ok(())
    }
}

impl LayerState for MambaState {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("conv", &self.conv), ("scan", &self.scan)]
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("conv", &mut self.conv), ("scan", &mut self.scan)]
    }
}
