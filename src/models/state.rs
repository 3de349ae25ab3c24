//! What a model carries from one call to the next.

use super::mixer::MixerState;
use super::weights::{self, SafeTensorsFile};
use crate::layers::LayerState;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// What `B` sequences have left behind in a model: everything that is needed to go on.
///
/// It grows with the sequence only where a block has attention or a long Hyena filter; [`ModelState::bytes`] tells how large
/// it is. Rows are independent: see [`ModelState::select`].
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
        let mut blocks = self.blocks.clone();
        blocks.iter_mut().try_for_each(LayerState::reset)?;
        self.blocks = blocks;
        self.positions.fill(0);
        Ok(())
    }

    /// Cuts the history off: later gradients end here (truncated back-propagation).
    pub fn detach(&mut self) {
        self.blocks = self.blocks.iter().map(LayerState::detach).collect();
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
        Ok(Self {
            blocks: self.blocks.iter().map(|block| block.select(rows)).collect::<Result<_>>()?,
            positions: rows.iter().map(|&row| self.positions[row]).collect(),
            model: self.model.clone(),
        })
    }

    /// The rows of several states, one below the other; none if they cannot lie in one tensor, as those of mixers that keep
    /// every token and have had different numbers of them.
    pub(crate) fn cat(states: &[&Self]) -> Result<Option<Self>> {
        let Some(first) = states.first() else { return Ok(None) };
        let positions: Vec<usize> = states.iter().flat_map(|state| &state.positions).copied().collect();
        let mut blocks = Vec::with_capacity(first.blocks.len());
        for (i, block) in first.blocks.iter().enumerate() {
            let mut tensors = BTreeMap::new();
            for state in states {
                for (name, tensor) in state.blocks[i].saved()? {
                    tensors.entry(name).or_insert_with(Vec::new).push(tensor);
                }
            }
            let alike = |all: &Vec<Tensor>| all.iter().all(|x| x.dims()[1..] == all[0].dims()[1..]);
            if !tensors.values().all(alike) {
                return Ok(None);
            }
            let get = |name: &str| match tensors.get(name) {
                Some(all) => Ok(Tensor::cat(all, 0)?),
                None => Err(Error::value(format!("state: {name}"), "a tensor", "none")),
            };
            let Some(block) = MixerState::from_tensors(block.mixer(), get, &positions)? else {
                return Ok(None);
            };
            blocks.push(block);
        }
        Ok(Some(Self { blocks, positions, model: first.model.clone() }))
    }

    /// `B`
    pub fn batch(&self) -> usize {
        self.positions.len()
    }

    /// The memory the state takes, in bytes.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(LayerState::bytes).sum()
    }

    /// The same block by block: the mixer's name and the bytes of its state.
    pub fn sizes(&self) -> Vec<(&'static str, usize)> {
        self.blocks.iter().map(|block| (block.mixer(), block.bytes())).collect()
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
            for (name, tensor) in block.saved()? {
                tensors.insert(format!("blocks.{i}.{name}"), tensor);
            }
        }
        let mixers: Vec<&str> = self.blocks.iter().map(MixerState::mixer).collect();
        let mixers = mixers.join(" ");
        let metadata = [
            ("format", KIND),
            ("version", VERSION),
            ("model", self.model.as_str()),
            ("mixers", mixers.as_str()),
        ];
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
        let mixers = file.metadata("mixers").ok_or_else(|| wrong("the names of the mixers are missing"))?;
        let block = |(i, mixer): (usize, &str)| {
            let get = |name: &str| -> Result<Tensor> {
                let name = format!("blocks.{i}.{name}");
                let tensor = file.tensor(&name, None, device)?;
                // keys and values are as wide as the weights
                let dtypes: &[DType] = match mixer {
                    "attention" => &[DType::F32, DType::F64, DType::BF16, DType::F16],
                    _ => &[DType::F32, DType::F64],
                };
                if tensor.dims().first() == Some(&positions.len()) && dtypes.contains(&tensor.dtype()) {
                    return Ok(tensor);
                }
                Err(wrong(&format!("{name}: expected [{}, ..] of {dtypes:?}", positions.len())))
            };
            MixerState::from_tensors(mixer, get, &positions)?.ok_or_else(|| wrong("unknown mixers"))
        };
        let blocks = mixers.split_whitespace().enumerate().map(block).collect::<Result<_>>()?;
        Ok(Self { blocks, positions, model: model.to_string() })
    }
}
