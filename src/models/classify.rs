//! Scores for whole sequences.

use super::language_model::LanguageModel;
use crate::ops::linear;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

impl LanguageModel {
    /// Scores `[B, labels]` of `ids` `[B, L]`, one sequence a row: the second head's, where the sequence ends. That is
    /// before the first padding token the config names, or at the row's end where there is none (or none before it).
    ///
    /// Differentiable in the parameters.
    ///
    /// Source: `HyenaDNAForSequenceClassification` of transformers' port.
    ///
    /// # Errors
    /// A model without labels, or as [`LanguageModel::hidden_states`].
    pub fn classify(&self, ids: &Tensor) -> Result<Tensor> {
        let Some(score) = &self.score else {
            return Err(Error::value("classify", "a model with labels", self.config.family.name()));
        };
        let hidden = self.hidden_states(ids, None, None)?;
        let (_, length, width) = hidden.dims3()?;
        let pad = self.config.tokens.pad.map(i64::from);
        let rows = ids.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let last = |(b, row): (usize, &Vec<i64>)| {
            let padding = row.iter().position(|&id| Some(id) == pad).unwrap_or(0);
            (b * length + (padding + length - 1) % length) as u32
        };
        let index: Vec<u32> = rows.iter().enumerate().map(last).collect();
        let index = Tensor::from_vec(index, rows.len(), hidden.device())?;
        let ends = hidden.reshape((rows.len() * length, width))?.contiguous()?.index_select(&index, 0)?;
        linear(&ends, score, None)
    }
}
