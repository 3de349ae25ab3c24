//! The sizes of a Hyena layer and its parameters.

use crate::layers::parameter::check_sizes;
use crate::layers::{Linear, Parameter};
use crate::ops::Activation;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The frequencies of the sines in an implicit filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SineFrequency {
    /// One for each unit, the same in all layers, as published models have it.
    Shared,
    /// One for each unit of each layer.
    Separate,
}

/// A filter that a small network computes from the position.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImplicitFilter {
    /// Features of a position: time, and as many cosines and sines; odd, at least 3.
    pub emb_dim: usize,
    /// Units of a layer.
    pub width: usize,
    /// Layers between the first and the last.
    pub inner_layers: usize,
    /// No layers and sines at all: filters are linear in the features.
    #[serde(default)]
    pub linear: bool,
    /// The sines' frequencies.
    pub frequency: SineFrequency,
    /// What they begin with.
    pub w: f64,
    /// Let filters decay exponentially, each at its own rate.
    pub modulate: bool,
    /// Added to the decay. 0.05 in the standalone HyenaDNA and its port to transformers, 0 in safari.
    pub shift: f64,
    /// Divide the filters of each position by the sum of their absolute values.
    pub normalized: bool,
    /// Do so before they decay, as safari does; HyenaDNA's training code does it after.
    #[serde(default)]
    pub normalized_first: bool,
}

impl Default for ImplicitFilter {
    fn default() -> Self {
        Self {
            emb_dim: 5,
            width: 64,
            inner_layers: 2,
            linear: false,
            frequency: SineFrequency::Shared,
            w: 10.0,
            modulate: true,
            shift: 0.05,
            normalized: false,
            normalized_first: false,
        }
    }
}

/// Where the long filters come from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum HyenaFilter {
    /// A network.
    Implicit(ImplicitFilter),
    /// A parameter, `filter_fn.filter` `[l_max, filters]`.
    Explicit,
}

/// How the filters of all orders and channels are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FilterOrder {
    /// All channels of an order together, `(o d)`: HyenaDNA standalone and in transformers.
    OrderFirst,
    /// All orders of a channel together, `(d o)`: safari and the training code of HyenaDNA.
    ChannelFirst,
}

/// Where an output's inputs are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    /// Before it.
    #[default]
    Causal,
    /// On both sides: a second set of filters goes over the future. The layer has no state.
    TwoSided,
    /// Around it, as `bidirectional` means it in HyenaDNA's training code: one set of filters, delayed by half the
    /// sequence's length `L` and taken modulo `2 L`, so that inputs nearer than that meet no tap. The layer has no
    /// state.
    Centred,
}

/// The sizes and options of a [`Hyena`](super::Hyena) layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HyenaConfig {
    /// Width of input and output, `D`.
    pub d_model: usize,
    /// The number of projections that are multiplied, `N`, at least 2.
    pub order: usize,
    /// The most tokens of a sequence, and the grid that filters are built on.
    pub l_max: usize,
    /// Taps of the short convolution.
    pub short_filter: usize,
    /// A bias on `in_proj`.
    pub in_bias: bool,
    /// A bias on `out_proj`.
    pub out_bias: bool,
    /// The long filters.
    pub filter: HyenaFilter,
    /// How they are numbered.
    pub filter_order: FilterOrder,
    /// Whether it is causal.
    #[serde(default)]
    pub direction: Direction,
    /// Heads, `H`, a divisor of `D`: the projections come head by head, and all heads share their `D / H` filters an
    /// order.
    #[serde(default = "one")]
    pub heads: usize,
    /// Gates are summed over the channels of a head.
    #[serde(default)]
    pub outer_mixing: bool,
    /// Heads are mixed behind every long convolution, by `ord_proj_w` `[N, H, H]` (whose last matrix is not used).
    #[serde(default)]
    pub post_order_ffn: bool,
    /// Parts of equal length that a sequence is cut into, each with a long convolution of its own over its own length
    /// `n`; its length must be a multiple of this. Upstream takes them modulo `2 n` with filters of `2 n` taps, and so
    /// does this layer: late tokens of a part reach early ones. With more than one part the layer has no state.
    #[serde(default = "one")]
    pub num_blocks: usize,
    /// Before `out_proj`.
    #[serde(default = "identity")]
    pub activation: Activation,
}

fn one() -> usize {
    1
}

fn identity() -> Activation {
    Activation::Identity
}

impl HyenaConfig {
    /// The published layer of order 2.
    pub fn new(d_model: usize, l_max: usize) -> Self {
        Self {
            d_model,
            order: 2,
            l_max,
            short_filter: 3,
            in_bias: true,
            out_bias: true,
            filter: HyenaFilter::Implicit(ImplicitFilter::default()),
            filter_order: FilterOrder::OrderFirst,
            direction: Direction::Causal,
            heads: 1,
            outer_mixing: false,
            post_order_ffn: false,
            num_blocks: 1,
            activation: Activation::Identity,
        }
    }

    /// Channels of a head.
    pub(crate) fn head(&self) -> usize {
        self.d_model / self.heads.max(1)
    }

    /// Long filters in one direction, `D / H (N - 1)`.
    pub(crate) fn filters(&self) -> usize {
        self.head().saturating_mul(self.order.saturating_sub(1))
    }

    /// Columns of the filters' matrix.
    pub(crate) fn columns(&self) -> usize {
        if self.direction == Direction::TwoSided { self.filters().saturating_mul(2) } else { self.filters() }
    }

    /// Refuses layers whose outputs depend on how long the sequence will be.
    pub(crate) fn check_streams(&self) -> Result<()> {
        let expected = "a causal layer of one block";
        match (self.direction, self.num_blocks) {
            (Direction::Causal, 1) => Ok(()),
            (Direction::Causal, blocks) => {
                Err(Error::value("hyena: state", expected, format!("num_blocks = {blocks}")))
            }
            _ => Err(Error::value("hyena: state", expected, "a bidirectional one")),
        }
    }

    /// Whether the filters that a sequence meets depend on its length.
    pub(crate) fn is_periodic(&self) -> bool {
        self.direction == Direction::Centred || self.num_blocks > 1
    }

    /// Channels of the short convolution, `D (N + 1)`.
    pub(crate) fn width(&self) -> usize {
        self.d_model.saturating_mul(self.order.saturating_add(1))
    }

    /// Checks that the sizes make a layer.
    ///
    /// # Errors
    /// A zero, an order below 2, an even number of features, or sizes beyond any memory, by name.
    pub fn validate(&self) -> Result<()> {
        let mut sizes = vec![
            ("d_model", self.d_model, 1),
            ("order", self.order, 2),
            ("l_max", self.l_max, 1),
            ("short_filter", self.short_filter, 1),
            ("heads", self.heads, 1),
            ("num_blocks", self.num_blocks, 1),
        ];
        if let HyenaFilter::Implicit(filter) = &self.filter {
            sizes.extend([("filter width", filter.width, 1), ("emb_dim", filter.emb_dim, 3)]);
            if filter.emb_dim.is_multiple_of(2) {
                return Err(Error::value("hyena: emb_dim", "an odd number of at least 3", filter.emb_dim));
            }
            if filter.inner_layers > 1 << 10 {
                return Err(Error::value("hyena: inner_layers", "at most 1024", filter.inner_layers));
            }
            if !(filter.w.is_finite() && filter.shift.is_finite()) {
                return Err(Error::value("hyena: w and shift", "finite numbers", format!("{filter:?}")));
            }
        }
        for (name, size, least) in sizes {
            if size < least || size > u32::MAX as usize {
                return Err(Error::value(format!("hyena: {name}"), format!("{least} to 2^32 - 1"), size));
            }
        }
        if !self.d_model.is_multiple_of(self.heads) {
            let expected = format!("a divisor of d_model = {}", self.d_model);
            return Err(Error::value("hyena: heads", expected, self.heads));
        }
        if self.num_blocks > 1 && self.direction == Direction::TwoSided {
            return Err(Error::value("hyena: num_blocks", "1 with filters over the future", self.num_blocks));
        }
        check_sizes(&self.parameters())
    }

    /// The parameters, under their upstream names.
    pub fn parameters(&self) -> Vec<Parameter> {
        let (d, width) = (self.d_model, self.width());
        let mut all = Linear::parameters("in_proj", width, d, self.in_bias);
        all.extend(Linear::parameters("out_proj", d, d, self.out_bias));
        all.push(Parameter::new("short_filter.weight", &[width, 1, self.short_filter]));
        all.push(Parameter::new("short_filter.bias", &[width]));
        if self.post_order_ffn {
            all.push(Parameter::new("ord_proj_w", &[self.order, self.heads, self.heads]));
        }
        all.push(Parameter::wide("filter_fn.bias", &[self.filters()]));
        match &self.filter {
            HyenaFilter::Explicit => {
                all.push(Parameter::wide("filter_fn.filter", &[self.l_max, self.columns()]));
            }
            HyenaFilter::Implicit(filter) => all.extend(filter.parameters(self.l_max, self.columns())),
        }
        all
    }
}

impl ImplicitFilter {
    /// The layers with a sine behind them: their place in upstream's list.
    pub(crate) fn layers(&self) -> impl Iterator<Item = usize> {
        let count = if self.linear { 0 } else { self.inner_layers + 1 };
        (0..count).map(|layer| 2 * layer)
    }

    /// The last layer's place, and its inputs.
    pub(crate) fn last(&self) -> (usize, usize) {
        if self.linear { (0, self.emb_dim) } else { (2 * (self.inner_layers + 1), self.width) }
    }

    /// The place of the sine whose frequency layer `layer` goes by.
    pub(crate) fn sine(&self, layer: usize) -> usize {
        if self.frequency == SineFrequency::Shared { 1 } else { layer + 1 }
    }

    fn parameters(&self, l_max: usize, columns: usize) -> Vec<Parameter> {
        let name = |rest: String| format!("filter_fn.{rest}");
        let mut all = vec![
            Parameter::wide(&name("pos_emb.z".into()), &[1, l_max, self.emb_dim]),
            Parameter::wide(&name("pos_emb.t".into()), &[1, l_max, 1]),
        ];
        for layer in self.layers() {
            let inputs = if layer == 0 { self.emb_dim } else { self.width };
            all.push(Parameter::wide(
                &name(format!("implicit_filter.{layer}.weight")),
                &[self.width, inputs],
            ));
            all.push(Parameter::wide(&name(format!("implicit_filter.{layer}.bias")), &[self.width]));
            if self.sine(layer) == layer + 1 {
                all.push(Parameter::wide(
                    &name(format!("implicit_filter.{}.freq", layer + 1)),
                    &[1, self.width],
                ));
            }
        }
        let (last, inputs) = self.last();
        all.push(Parameter::wide(&name(format!("implicit_filter.{last}.weight")), &[columns, inputs]));
        if self.modulate {
            all.push(Parameter::wide(&name("modulation.deltas".into()), &[1, 1, columns]));
        }
        all
    }
}
