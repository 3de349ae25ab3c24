//! What the states of all mixers have in common.

use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::Tensor;

/// What a mixer carries from one call to the next: tensors, batch first, and for mixers that tell positions apart how
/// many tokens each row has had.
pub trait LayerState: Clone {
    /// The tensors by name, batch first.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)>;

    /// The same, to be changed.
    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)>;

    /// What a file holds of it: the tensors by name, batch first.
    ///
    /// # Errors
    /// A failed allocation.
    fn saved(&self) -> Result<Vec<(&'static str, Tensor)>> {
        Ok(self.tensors().into_iter().map(|(name, tensor)| (name, tensor.clone())).collect())
    }

    /// Whether a gradient may pass through it.
    fn is_tracked(&self) -> bool {
        self.tensors().iter().any(|(_, tensor)| tensor.track_op())
    }

    /// How many tokens each row has had, `[B]`, if the mixer depends on it.
    fn positions_mut(&mut self) -> Option<&mut Vec<usize>> {
        None
    }

    /// Back to the state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    fn reset(&mut self) -> Result<()> {
        let zeros = self.tensors().into_iter().map(|(_, x)| Ok(x.zeros_like()?.detach()));
        let zeros = zeros.collect::<Result<Vec<_>>>()?;
        self.replace(&zeros);
        if let Some(positions) = self.positions_mut() {
            positions.fill(0);
        }
        Ok(())
    }

    /// The same values without their history, for truncated back-propagation.
    fn detach(&self) -> Self {
        let mut state = self.clone();
        for (_, tensor) in state.tensors_mut() {
            *tensor = tensor.detach();
        }
        state
    }

    /// The states of `rows`, in that order; a row may come more than once.
    ///
    /// # Errors
    /// A row that is not there.
    fn select(&self, rows: &[usize]) -> Result<Self> {
        let batch = self.batch();
        if let Some(row) = rows.iter().find(|&&row| row >= batch) {
            return Err(Error::value("state: row", format!("below the batch of {batch}"), row));
        }
        let indices: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let mut state = self.clone();
        for (_, tensor) in state.tensors_mut() {
            let index = Tensor::from_slice(&indices, indices.len(), tensor.device())?;
            *tensor = tensor.contiguous()?.index_select(&index, 0)?;
        }
        if let Some(positions) = state.positions_mut() {
            *positions = rows.iter().map(|&row| positions[row]).collect();
        }
        Ok(state)
    }

    /// `B`
    fn batch(&self) -> usize {
        self.tensors().first().and_then(|(_, x)| x.dims().first().copied()).unwrap_or(0)
    }

    /// The memory it takes, in bytes.
    fn bytes(&self) -> usize {
        self.tensors().iter().map(|(_, x)| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }

    /// Puts `tensors`, in the order of [`LayerState::tensors`], in the place of its own.
    fn replace(&mut self, tensors: &[Tensor]) {
        for ((_, old), new) in self.tensors_mut().into_iter().zip(tensors) {
            *old = new.clone();
        }
    }
}

/// Moves the positions of the rows behind `length` tokens, cut by `segments`.
pub(crate) fn advance(positions: &mut [usize], segments: Option<&Segments>, length: usize) {
    for (row, position) in positions.iter_mut().enumerate() {
        match segments {
            None => *position += length,
            Some(segments) => {
                for run in segments.row(row) {
                    *position = if run.fresh { 0 } else { *position } + run.tokens.len();
                }
            }
        }
    }
}
