//! What a model carries from one call to the next.

use super::weights::{self, SafeTensorsFile};
use crate::layers::MambaState;
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// The state of one block's mixer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MixerState {
    /// See [`MambaState`].
    Mamba(MambaState),
}

impl MixerState {
    /// The tensors by name, batch first.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Mamba(state) => state.tensors().to_vec(),
        }
    }

    /// The same values without their history.
    pub(crate) fn detach(&self) -> Self {
        let mut state = self.clone();
        for (_, tensor) in state.tensors_mut() {
            *tensor = tensor.detach();
        }
        state
    }

    /// Puts `tensors`, in the order of [`MixerState::tensors`], in the place of its own.
    pub(crate) fn replace(&mut self, tensors: &[Tensor]) {
        for ((_, old), new) in self.tensors_mut().into_iter().zip(tensors) {
            *old = new.clone();
        }
    }

    pub(crate) fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        match self {
            Self::Mamba(MambaState { conv, scan }) => vec![("conv", conv), ("scan", scan)],
        }
    }
}

/// What `B` sequences have left behind in a model: everything that is needed to go on.
///
/// Its size does not grow with the sequence. Rows are independent: see [`ModelState::select`].
#[derive(Clone, Debug)]
pub struct ModelState {
    /// One per block.
    pub blocks: Vec<MixerState>,
    /// How many tokens each row's sequence has had.
    pub positions: Vec<usize>,
    /// What kind of model it belongs to.
    pub(crate) model: String,
}

/// Metadata keys of a saved state.
const KIND: &str = "subquadratic.state";
const VERSION: &str = "1";

impl ModelState {
    /// Back to the state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn reset(&mut self) -> Result<()> {
        self.change(|x| Ok(x.zeros_like()?.detach()))?;
        self.positions.fill(0);
        Ok(())
    }

    /// Cuts the history off: later gradients end here (truncated back-propagation).
    pub fn detach(&mut self) {
        self.blocks = self.blocks.iter().map(MixerState::detach).collect();
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
        let indices: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let mut selected = self.clone();
        selected.change(|x| {
            let index = Tensor::from_slice(&indices, indices.len(), x.device())?;
            Ok(x.index_select(&index, 0)?)
        })?;
        selected.positions = rows.iter().map(|&row| self.positions[row]).collect();
        Ok(selected)
    }

    /// `B`
    pub fn batch(&self) -> usize {
        self.positions.len()
    }

    /// The memory the state takes, in bytes.
    pub fn bytes(&self) -> usize {
        let size = |(_, x): (_, &Tensor)| x.elem_count() * x.dtype().size_in_bytes();
        self.blocks.iter().flat_map(MixerState::tensors).map(size).sum()
    }

    /// Writes the state to a safetensors file: to a temporary file beside it first, which then takes its name.
    ///
    /// # Errors
    /// A path that cannot be written; what was there is left as it was.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let positions: Vec<i64> = self.positions.iter().map(|&p| p as i64).collect();
        let mut tensors = BTreeMap::new();
        tensors.insert("positions".to_string(), Tensor::from_vec(positions, self.batch(), &Device::Cpu)?);
        for (i, block) in self.blocks.iter().enumerate() {
            for (name, tensor) in block.tensors() {
                tensors.insert(format!("blocks.{i}.{name}"), tensor.clone());
            }
        }
        let metadata = [("format", KIND), ("version", VERSION), ("model", &self.model)];
        weights::write(path.as_ref(), &tensors, &metadata)
    }

    /// Reads a state that [`ModelState::save`] wrote.
    ///
    /// Whether it fits a model is checked where it is used.
    ///
    /// # Errors
    /// A file that cannot be read or is no saved state.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let file = SafeTensorsFile::open(path)?;
        let wrong = |reason: &str| Error::File { path: path.into(), reason: reason.into() };
        if file.metadata("format") != Some(KIND) {
            return Err(wrong("expected a saved state, got another safetensors file"));
        }
        if file.metadata("version") != Some(VERSION) {
            return Err(wrong("a saved state of another version of this crate"));
        }
        let model = file.metadata("model").ok_or_else(|| wrong("the name of the model is missing"))?;
        let positions = file.tensor("positions", None, &Device::Cpu)?;
        let positions: Vec<i64> = positions.to_vec1().map_err(|_| wrong("expected positions [B] of i64"))?;
        let positions = positions.iter().map(|&p| usize::try_from(p)).collect::<Result<Vec<_>, _>>();
        let positions = positions.map_err(|_| wrong("a negative position"))?;
        let mut blocks = vec![];
        while file.contains(&format!("blocks.{}.scan", blocks.len())) {
            let get = |name: &str| -> Result<Tensor> {
                let tensor = file.tensor(&format!("blocks.{}.{name}", blocks.len()), None, device)?;
                match (tensor.dims().first() == Some(&positions.len()), tensor.dtype()) {
                    (true, DType::F32 | DType::F64) => Ok(tensor),
                    _ => Err(wrong(&format!(
                        "blocks.{}.{name}: expected [{}, ..] of f32 or f64",
                        blocks.len(),
                        positions.len()
                    ))),
                }
            };
            blocks.push(MixerState::Mamba(MambaState { conv: get("conv")?, scan: get("scan")? }));
        }
        Ok(Self { blocks, positions, model: model.to_string() })
    }

    /// Moves the positions behind `length` tokens.
    pub(crate) fn advance(&mut self, segments: Option<&Segments>, length: usize) {
        for (row, position) in self.positions.iter_mut().enumerate() {
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

    fn change(&mut self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
        let mut blocks = self.blocks.clone();
        for (_, tensor) in blocks.iter_mut().flat_map(MixerState::tensors_mut) {
            *tensor = f(tensor)?;
        }
        self.blocks = blocks;
        Ok(())
    }
}
