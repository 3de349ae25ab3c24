//! Hyena models turned into ones that decode in constant time.

use super::config::block_name;
use super::{Family, LanguageModel, MixerConfig};
use crate::layers::ModalHyena;
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use std::collections::HashMap;

/// How well the filters of one block were fitted.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterErrors {
    /// The block.
    pub block: usize,
    /// Per channel the norm of what the filter differs by over its own norm.
    pub channels: Vec<f64>,
    /// Per channel what no filter of so many states can have as its error.
    pub bounds: Vec<f64>,
}

impl LanguageModel {
    /// The same model with a gated modal layer of `states` complex states in the place of every Hyena layer (see
    /// [`ModalHyena::distill`]), for inference, and how well each filter was fitted.
    ///
    /// A token costs the new layers the same however many came before, their state does not grow, and a sequence has no
    /// longest length. Other blocks stay as they are. [`LanguageModel::save`] writes the model in this crate's own
    /// layout.
    ///
    /// # Errors
    /// A model without Hyena layers, one whose Hyena layers are not of order 2 (naming the block), or no states.
    pub fn distill(&self, states: usize) -> Result<(LanguageModel, Vec<FilterErrors>)> {
        let mut config = self.config.clone();
        let upstream = |name: &str| self.config.family.upstream_name(name);
        let own = config.parameters().into_iter().filter_map(|parameter| {
            let tensor = self.parameters().get(&upstream(&parameter.name))?.detach();
            Some((parameter.name, tensor))
        });
        let mut tensors: HashMap<String, Tensor> = own.collect();
        let vb = VarBuilder::from_tensors(tensors.clone(), self.dtype, &self.device);
        let mut report = vec![];
        for (i, block) in config.blocks.iter_mut().enumerate() {
            let MixerConfig::Hyena(hyena) = &block.mixer else { continue };
            let prefix = format!("{}.mixer", block_name(i));
            let distilled =
                ModalHyena::distill(hyena, vb.pp(&prefix), states).map_err(|error| match error {
                    Error::Value { name, expected, got } => {
                        Error::value(format!("block {i}: {name}"), expected, got)
                    }
                    other => other,
                })?;
            for parameter in hyena.parameters() {
                tensors.remove(&format!("{prefix}.{}", parameter.name));
            }
            let named = distilled.parameters.into_iter();
            tensors.extend(named.map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
            report.push(FilterErrors { block: i, channels: distilled.errors, bounds: distilled.bounds });
            block.mixer = MixerConfig::ModalHyena(distilled.config);
        }
        if report.is_empty() {
            return Err(Error::value("distill: model", "one with Hyena layers", self.config.family.name()));
        }
        config.family = Family::Hybrid;
        Ok((Self::from_tensors(&config, tensors, self.dtype, &self.device)?, report))
    }
}
