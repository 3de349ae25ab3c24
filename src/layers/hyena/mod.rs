//! Hyena: long implicit convolutions and gates in the place of attention.
//!
//! ```text
//! x_0, .., x_(N-1), v = short_filter(in_proj(u))          a causal depthwise convolution
//! v = k_o * (x_i v) + bias_o (x_i v)                      for o = 0 .. N - 2 and i = N - 1 - o
//! out = out_proj(x_0 v)
//! ```
//!
//! The filters `k` are as long as the sequence; see [`HyenaFilter`].
//!
//! Sources: Hyena (Poli et al. 2023), sections 3.2 and 3.3; `HyenaOperator` of safari and hyena-dna.

mod config;
mod filter;
mod init;
mod state;

pub use config::{FilterOrder, HyenaConfig, HyenaFilter, ImplicitFilter, SineFrequency};
pub use state::HyenaState;

use super::Linear;
use super::parameter::Reader;
use super::state::advance;
use crate::ops::{
    CausalConv1d, FilterCache, LongConv, LongConvState, Segments, StreamConv, accumulation_dtype,
    causal_conv1d, long_conv,
};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use candle_nn::VarBuilder;
use filter::{Filters, of_order};
use std::sync::{Arc, OnceLock};

/// The Hyena mixer; see the [module](self) for the formula.
///
/// Filters and long convolutions are f32 (f64 for f64) whatever the weights' dtype. Where the parameters are not
/// trained, the filters are computed once and their transforms kept.
#[derive(Clone, Debug)]
pub struct Hyena {
    config: HyenaConfig,
    in_proj: Linear,
    out_proj: Linear,
    short_weight: Tensor,
    short_bias: Tensor,
    filters: Filters,
    /// `[D (N - 1)]`
    bias: Tensor,
    trained: bool,
    fixed: Arc<OnceLock<Vec<Order>>>,
}

/// The filters of one order.
#[derive(Debug)]
struct Order {
    past: Tensor,
    future: Option<Tensor>,
    bias: Tensor,
    cache: FilterCache,
    stream: OnceLock<StreamConv>,
}

impl Order {
    fn stream(&self, channels: usize) -> Result<&StreamConv> {
        if let Some(stream) = self.stream.get() {
            return Ok(stream);
        }
        let stream = StreamConv::new(&self.past.t()?, Some(&self.bias), channels)?;
        Ok(self.stream.get_or_init(|| stream))
    }
}

impl Hyena {
    /// Reads the parameters that [`HyenaConfig::parameters`] lists.
    ///
    /// # Errors
    /// An inconsistent config, a missing tensor or another shape.
    pub fn new(config: &HyenaConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let parameters = config.parameters();
        let names: Vec<String> = parameters.iter().map(|parameter| parameter.name.clone()).collect();
        let read = Reader::new(parameters, vb);
        let of_filters = names.iter().filter(|name| name.starts_with("filter_fn."));
        let mut trained = false;
        for name in of_filters {
            trained |= read.get(name)?.track_op();
        }
        Ok(Self {
            in_proj: Linear::read(&read, "in_proj")?,
            out_proj: Linear::read(&read, "out_proj")?,
            short_weight: read.get("short_filter.weight")?,
            short_bias: read.get("short_filter.bias")?,
            filters: Filters::read(config, &read)?,
            bias: read.get("filter_fn.bias")?,
            trained,
            fixed: Arc::new(OnceLock::new()),
            config: config.clone(),
        })
    }

    /// What it was built with.
    pub fn config(&self) -> &HyenaConfig {
        &self.config
    }

    fn dtype(&self) -> DType {
        self.in_proj.weight.dtype()
    }

    /// The state before the first token of `batch` sequences.
    ///
    /// # Errors
    /// A bidirectional layer, or a failed allocation.
    pub fn init_state(&self, batch: usize) -> Result<HyenaState> {
        if self.config.bidirectional {
            return Err(Error::value("hyena: state", "a causal layer", "a bidirectional one"));
        }
        let dtype = accumulation_dtype(self.dtype());
        HyenaState::zeros(&self.config, batch, dtype, self.in_proj.weight.device())
    }

    /// `[B, L, D]` to `[B, L, D]`, each row one sequence from its beginning; `L` at most `l_max`.
    ///
    /// Differentiable in `x` and the parameters. Time is O(L log L).
    ///
    /// # Errors
    /// Another shape or dtype, or more tokens than `l_max`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_segments(x, None, None)
    }

    /// The same for sequences that go on from `state`, which moves behind the last token. Any number of tokens, one
    /// included, at O(log^2 L) a token; differentiable through the state too, where something is tracked.
    ///
    /// # Errors
    /// Another shape or dtype, a state of another batch or layer, or more tokens than `l_max` in all; `state` is left as
    /// it was.
    pub fn forward_with_state(&self, x: &Tensor, state: &mut HyenaState) -> Result<Tensor> {
        self.forward_segments(x, None, Some(state))
    }

    /// The general form: rows cut by `segments` into packed sequences and padding, with or without a state to carry on.
    ///
    /// At padding the output means nothing and depends on no input.
    ///
    /// # Errors
    /// As [`Hyena::forward_with_state`], or segments of another batch or length.
    pub fn forward_segments(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        mut state: Option<&mut HyenaState>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (batch, length) = match *x.dims() {
            [batch, length, width] if width == c.d_model => (batch, length),
            _ => {
                return Err(Error::shape("hyena: x", format!("[B, L, D] = [B, L, {}]", c.d_model), x.dims()));
            }
        };
        if let Some(segments) = segments {
            segments.check("hyena", batch, length)?;
        }
        match state.as_deref() {
            Some(_) if c.bidirectional => {
                return Err(Error::value("hyena: state", "a causal layer", "a bidirectional one"));
            }
            Some(state) => {
                state.check(c, batch, accumulation_dtype(self.dtype()))?;
            }
            None => {}
        }
        let mut ends = state.as_deref().map_or(vec![0; batch], |state| state.positions.clone());
        advance(&mut ends, segments, length);
        if let Some(end) = longest(&ends, segments).filter(|&end| end > c.l_max) {
            return Err(Error::value("hyena: sequence length", format!("at most l_max = {}", c.l_max), end));
        }
        if length == 0 || batch == 0 {
            return Ok(x.clone());
        }
        let (p, conv) = causal_conv1d(&CausalConv1d {
            x: &self.in_proj.forward(x)?,
            weight: &self.short_weight.squeeze(1)?,
            bias: Some(&self.short_bias),
            silu: false,
            initial_state: state.as_deref().map(|state| &state.conv),
            segments,
        })?;
        // a trained layer at the start of a sequence computes no taps beyond the call
        let from_start = self.trained && segments.is_none() && ends.iter().all(|&end| end == length);
        let part = |i: usize| p.narrow(D::Minus1, i * c.d_model, c.d_model);
        let built;
        let orders = match self.trained {
            true => {
                built = self.build(if state.is_none() || from_start { length } else { c.l_max })?;
                &built
            }
            false => self.fixed()?,
        };
        let first = part(0)?;
        let mut v = part(c.order)?;
        for (o, order) in orders.iter().enumerate() {
            let gate = part(c.order - 1 - o)?;
            let post_gate = (o + 2 == c.order).then_some(&first);
            v = match state.as_deref_mut() {
                Some(state) if !from_start => {
                    let gates = [Some(&gate), post_gate];
                    order.stream(c.d_model)?.forward(&v, gates, segments, &mut state.long[o])?
                }
                _ => {
                    let args = LongConv {
                        reverse: order.future.as_ref(),
                        taps_first: true,
                        d: Some(&order.bias),
                        pre_gate: Some(&gate),
                        post_gate,
                        segments,
                        cache: (!self.trained).then_some(&order.cache),
                        ..LongConv::new(&v, &order.past)
                    };
                    let y = long_conv(&args)?;
                    if let Some(state) = state.as_deref_mut() {
                        let past = (&v * &gate)?.to_dtype(accumulation_dtype(self.dtype()))?;
                        state.long[o] = LongConvState::from_past(&past, &vec![length; batch])?;
                    }
                    y
                }
            };
        }
        let out = self.out_proj.forward(&v)?;
        if let Some(state) = state {
            (state.conv, state.positions) = (conv, ends);
        }
        Ok(out)
    }

    /// The filters of every order, of `length` taps.
    fn build(&self, length: usize) -> Result<Vec<Order>> {
        let filters = self.filters.orders(&self.config, length, self.trained)?;
        let bias = self.bias.unsqueeze(0)?;
        let order = |(o, (past, future))| {
            let bias = of_order(&self.config, &bias, o)?.squeeze(0)?;
            Ok(Order { past, future, bias, cache: FilterCache::new(), stream: OnceLock::new() })
        };
        filters.into_iter().enumerate().map(order).collect()
    }

    /// The long filters over the past of every order, `[D, l_max]` each, f32 or wider, without the skip weights.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn filters(&self) -> Result<Vec<Tensor>> {
        let built;
        let orders = match self.trained {
            true => {
                built = self.build(self.config.l_max)?;
                &built
            }
            false => self.fixed()?,
        };
        orders.iter().map(|order| Ok(order.past.t()?.contiguous()?)).collect()
    }

    fn fixed(&self) -> Result<&[Order]> {
        if let Some(orders) = self.fixed.get() {
            return Ok(orders);
        }
        let orders = self.build(self.config.l_max)?;
        Ok(self.fixed.get_or_init(|| orders))
    }
}

/// The longest sequence of a call, those that ended in the middle of a row included.
fn longest(ends: &[usize], segments: Option<&Segments>) -> Option<usize> {
    let within = segments.map(|segments| {
        let runs = (0..segments.batch()).flat_map(|row| segments.row(row));
        runs.map(|run| run.tokens.len()).max().unwrap_or(0)
    });
    ends.iter().copied().chain(within).max()
}
