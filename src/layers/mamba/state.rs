//! What a Mamba layer carries from one call to the next.

use super::MambaConfig;
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

    /// Back to the state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn reset(&mut self) -> Result<()> {
        *self = self.map(|x| Ok(x.zeros_like()?.detach()))?;
        Ok(())
    }

    /// The same values without their history, for truncated back-propagation.
    pub fn detach(&self) -> Self {
        Self { conv: self.conv.detach(), scan: self.scan.detach() }
    }

    /// The states of `rows`, in that order; a row may come more than once.
    ///
    /// # Errors
    /// A row that is not there.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        let batch = self.batch();
        if let Some(row) = rows.iter().find(|&&row| row >= batch) {
            return Err(Error::value("state: row", format!("below the batch of {batch}"), row));
        }
        let index: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let index = Tensor::from_vec(index, rows.len(), self.scan.device())?;
        self.map(|x| Ok(x.index_select(&index, 0)?))
    }

    /// `B`
    pub fn batch(&self) -> usize {
        self.scan.dims().first().copied().unwrap_or(0)
    }

    /// The tensors by name.
    pub fn tensors(&self) -> [(&'static str, &Tensor); 2] {
        [("conv", &self.conv), ("scan", &self.scan)]
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

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { conv: f(&self.conv)?, scan: f(&self.scan)? })
    }
}
