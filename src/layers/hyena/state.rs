//! What a Hyena layer carries from one call to the next.

use super::HyenaConfig;
use crate::layers::LayerState;
use crate::ops::LongConvState;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The state of a [`Hyena`](super::Hyena) layer, batch first, f32 (f64 for f64 models).
///
/// It grows with the sequence: a long filter meets all inputs again.
#[derive(Clone, Debug)]
pub struct HyenaState {
    /// The last inputs of the short convolution, oldest first: `[B, D (N + 1), taps - 1]`.
    pub conv: Tensor,
    /// The long convolutions of each order.
    pub long: Vec<LongConvState>,
    /// How many tokens each row has had, `[B]`.
    pub positions: Vec<usize>,
}

impl HyenaState {
    /// The state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn zeros(config: &HyenaConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let conv = Tensor::zeros((batch, config.width(), config.short_filter - 1), dtype, device)?;
        let long = |_| LongConvState::new(batch, config.d_model, dtype, device);
        let long = (0..config.order - 1).map(long).collect::<Result<_>>()?;
        Ok(Self { conv, long, positions: vec![0; batch] })
    }

    /// The inverse of [`LayerState::saved`], for rows that have had `positions` tokens.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn from_tensors(conv: Tensor, past: &Tensor, positions: &[usize]) -> Result<Self> {
        let Ok((_, orders, most, _)) = past.dims4() else {
            return Err(Error::shape("hyena state: past", "[B, N - 1, P, D]", past.dims()));
        };
        // the longest filter forgets its first input only when no further token may come
        let lengths: Vec<usize> = positions.iter().map(|&position| position.min(most)).collect();
        let long = |order| LongConvState::from_past(&past.narrow(1, order, 1)?.squeeze(1)?, &lengths);
        Ok(Self { conv, long: (0..orders).map(long).collect::<Result<_>>()?, positions: positions.to_vec() })
    }

    /// Checks that this belongs to `batch` sequences of a layer of `config`.
    pub(crate) fn check(&self, config: &HyenaConfig, batch: usize, dtype: DType) -> Result<()> {
        let dims = [batch, config.width(), config.short_filter - 1];
        if self.conv.dims() != dims {
            let expected = format!("[B, D (N + 1), taps - 1] = {dims:?}");
            return Err(Error::shape("hyena state: conv", expected, self.conv.dims()));
        }
        let sizes = (batch, config.d_model, dtype);
        let fits = |state: &LongConvState| (state.batch(), state.channels(), state.dtype()) == sizes;
        if self.long.len() != config.order - 1 || !self.long.iter().all(fits) || self.positions.len() != batch
        {
            let expected =
                format!("{} of {batch} rows, {} channels, {dtype:?}", config.order - 1, config.d_model);
            return Err(Error::value("hyena state: long convolutions", expected, "others"));
        }
        Ok(())
    }
}

impl LayerState for HyenaState {
    /// `conv`; the past inputs of the long convolutions are no tensor until they are [saved](LayerState::saved).
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("conv", &self.conv)]
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("conv", &mut self.conv)]
    }

    /// `conv`, and `past`, the inputs of the long convolutions, `[B, N - 1, P, D]`, oldest first and filled up with zeros.
    fn saved(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let past = self.long.iter().map(|state| Ok(state.past()?.0)).collect::<Result<Vec<_>>>()?;
        Ok(vec![("conv", self.conv.clone()), ("past", Tensor::stack(&past, 1)?)])
    }

    fn is_tracked(&self) -> bool {
        self.conv.track_op() || self.long.iter().any(LongConvState::is_tracked)
    }

    fn positions_mut(&mut self) -> Option<&mut Vec<usize>> {
        Some(&mut self.positions)
    }

    fn reset(&mut self) -> Result<()> {
        self.conv = self.conv.zeros_like()?.detach();
        self.long.iter_mut().for_each(LongConvState::reset);
        self.positions.fill(0);
        Ok(())
    }

    fn detach(&self) -> Self {
        let long = self.long.iter().map(LongConvState::detach).collect();
        Self { conv: self.conv.detach(), long, positions: self.positions.clone() }
    }

    fn select(&self, rows: &[usize]) -> Result<Self> {
        let long = self.long.iter().map(|state| state.select(rows)).collect::<Result<_>>()?;
        let index: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let index = Tensor::from_vec(index, rows.len(), self.conv.device())?;
        let positions = rows.iter().map(|&row| self.positions[row]).collect();
        Ok(Self { conv: self.conv.contiguous()?.index_select(&index, 0)?, long, positions })
    }

    fn batch(&self) -> usize {
        self.positions.len()
    }

    fn bytes(&self) -> usize {
        let conv = self.conv.elem_count() * self.conv.dtype().size_in_bytes();
        conv + self.long.iter().map(LongConvState::bytes).sum::<usize>()
    }
}
