//! The sizes and options of a gated Hyena layer and its parameters.

use crate::layers::parameter::check_sizes;
use crate::layers::{Linear, Parameter};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The order of the joint projection's `3 D` channels: which of them are `x2`, `x1` and `v`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ChannelOrder {
    /// `D` of each.
    Thirds,
    /// Per head of `D / heads` channels, as many of each (`column_split_hyena`).
    Columns {
        /// Heads.
        heads: usize,
    },
    /// One of each after another (`interleave`).
    Interleaved,
}

/// The inner filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum HyenaFilter {
    /// A sum of exponentials with complex poles: `filter.poles` and `filter.residues` `[D, S, 1, 2]`.
    Complex {
        /// `S`
        states: usize,
    },
    /// With real positive poles, as Evo 2's HCL: `filter.log_poles` `[G, S, 1]` and `filter.residues` `[G, S]`.
    Real {
        /// `S`
        states: usize,
        /// Filters, each of `D / G` neighbouring channels.
        groups: usize,
    },
    /// Taps, the first of them for the current token, and `D`, as Evo 2's HCM: `filter.h` `[G, 1, taps]`.
    Medium {
        /// Taps.
        taps: usize,
        /// Filters, each of `D / G` neighbouring channels.
        groups: usize,
    },
    /// Taps, the last of them for the current token, and no `D`, as Evo 2's HCS: `filter.h` `[G, 1, taps]`.
    Short {
        /// Taps.
        taps: usize,
        /// Filters, each of `D / G` neighbouring channels.
        groups: usize,
    },
}

/// The sizes and options of a [`ModalHyena`](super::ModalHyena) layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModalHyenaConfig {
    /// Width of input and output, `D`.
    pub d_model: usize,
    /// Taps of the short filter on the projection.
    pub short_taps: usize,
    /// The inner filter.
    pub filter: HyenaFilter,
    /// Where `x2`, `x1` and `v` lie.
    pub order: ChannelOrder,
    /// A bias on the joint projection.
    pub projection_bias: bool,
    /// A bias on the short filter.
    pub short_bias: bool,
    /// A bias on the last projection.
    pub out_bias: bool,
}

impl ModalHyenaConfig {
    /// StripedHyena's layer with 8 complex states: 3 short taps, all biases.
    pub fn new(d_model: usize) -> Self {
        Self {
            d_model,
            short_taps: 3,
            filter: HyenaFilter::Complex { states: 8 },
            order: ChannelOrder::Thirds,
            projection_bias: true,
            short_bias: true,
            out_bias: true,
        }
    }

    /// Its parameters, under the names of StripedHyena and Evo 2.
    pub fn parameters(&self) -> Vec<Parameter> {
        let d = self.d_model;
        let triple = d.saturating_mul(3);
        let mut all = Linear::parameters("projections", triple, d, self.projection_bias);
        all.push(Parameter::new("filter.short_filter_weight", &[triple, 1, self.short_taps]));
        if self.short_bias {
            all.push(Parameter::new("filter.short_filter_bias", &[triple]));
        }
        match self.filter {
            HyenaFilter::Complex { states } => {
                all.push(Parameter::wide("filter.poles", &[d, states, 1, 2]));
                all.push(Parameter::wide("filter.residues", &[d, states, 1, 2]));
            }
            HyenaFilter::Real { states, groups } => {
                all.push(Parameter::wide("filter.log_poles", &[groups, states, 1]));
                all.push(Parameter::wide("filter.residues", &[groups, states]));
            }
            HyenaFilter::Medium { taps, groups } | HyenaFilter::Short { taps, groups } => {
                all.push(Parameter::wide("filter.h", &[groups, 1, taps]));
            }
        }
        if self.has_skip() {
            all.push(Parameter::wide("filter.D", &[d]));
        }
        all.extend(Linear::parameters("out_filter_dense", d, d, self.out_bias));
        all
    }

    pub(super) fn has_skip(&self) -> bool {
        !matches!(self.filter, HyenaFilter::Short { .. })
    }

    /// Filters, and the states or taps of each.
    pub(super) fn filters(&self) -> (usize, usize) {
        match self.filter {
            HyenaFilter::Complex { states } => (self.d_model, states),
            HyenaFilter::Real { states, groups } => (groups, states),
            HyenaFilter::Medium { taps, groups } | HyenaFilter::Short { taps, groups } => (groups, taps),
        }
    }

    /// The shape of the inner filter's state for `batch` rows.
    pub(super) fn filter_state(&self, batch: usize) -> Vec<usize> {
        match self.filter {
            HyenaFilter::Complex { states } => vec![batch, self.d_model, states, 2],
            HyenaFilter::Real { states, .. } => vec![batch, self.d_model, states],
            HyenaFilter::Medium { taps, .. } | HyenaFilter::Short { taps, .. } => {
                vec![batch, self.d_model, taps - 1]
            }
        }
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn validate(&self) -> Result<()> {
        let (filters, size) = self.filters();
        let heads = if let ChannelOrder::Columns { heads } = self.order { heads } else { 1 };
        let sizes = [
            ("d_model", self.d_model),
            ("short_taps", self.short_taps),
            ("filter: groups", filters),
            ("filter: states or taps", size),
            ("order: heads", heads),
        ];
        for (name, size) in sizes {
            if size == 0 || size > u32::MAX as usize {
                return Err(Error::value(format!("modal_hyena: {name}"), "1 to 2^32 - 1", size));
            }
        }
        for (name, divisor) in [("filter: groups", filters), ("order: heads", heads)] {
            if !self.d_model.is_multiple_of(divisor) {
                let expected = format!("a divisor of d_model = {}", self.d_model);
                return Err(Error::value(format!("modal_hyena: {name}"), expected, divisor));
            }
        }
        check_sizes(&self.parameters())
    }
}
