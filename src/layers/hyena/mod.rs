//! Hyena: long implicit convolutions and gates in the place of attention.
//!
//! ```text
//! x_0, .., x_(N-1), v = short_filter(in_proj(u))          a causal depthwise convolution
//! v = k_o * (x_i v) + bias_o (x_i v)                      for o = 0 .. N - 2 and i = N - 1 - o
//! out = out_proj(x_0 v)
//! ```
//!
//! The filters `k` are as long as the sequence; see [`HyenaFilter`]. With several heads, projections come head by head,
//! `[H, N + 1, D / H]`, and all heads share their filters; gates may be summed over a head's channels, and heads mixed
//! behind every convolution. (Upstream's own split of the projections holds for one head alone; this is what its shapes
//! say, and what its ports do.)
//!
//! Sources: Hyena (Poli et al. 2023), sections 3.2 and 3.3; `HyenaOperator` of safari and hyena-dna.

mod config;
mod filter;
mod heads;
mod init;
mod state;

pub use config::{Direction, FilterOrder, HyenaConfig, HyenaFilter, ImplicitFilter, SineFrequency};
pub use state::HyenaState;

use super::Linear;
use super::parameter::Reader;
use super::state::advance;
use crate::ops::{
    Activation, CausalConv1d, FilterCache, LongConv, LongConvState, Segments, StreamConv, accumulation_dtype,
    activate, causal_conv1d, long_conv,
};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
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
    /// `[D / H (N - 1)]`
    bias: Tensor,
    /// `[N, H, H]`
    mix: Option<Tensor>,
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
            mix: if config.post_order_ffn { Some(read.get("ord_proj_w")?) } else { None },
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
    /// A layer that is not causal, or a failed allocation.
    pub fn init_state(&self, batch: usize) -> Result<HyenaState> {
        self.config.check_streams()?;
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
    /// As [`Hyena::forward_with_state`], segments of another batch or length, or a sequence that `num_blocks` does not
    /// divide.
    pub fn forward_segments(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut HyenaState>,
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
        if let Some(state) = state.as_deref() {
            c.check_streams()?;
            state.check(c, batch, accumulation_dtype(self.dtype()))?;
        }
        let mut ends = state.as_deref().map_or(vec![0; batch], |state| state.positions.clone());
        advance(&mut ends, segments, length);
        if let Some(end) = longest(&ends, segments).filter(|&end| end > c.l_max) {
            return Err(Error::value("hyena: sequence length", format!("at most l_max = {}", c.l_max), end));
        }
        if length == 0 || batch == 0 {
            return Ok(x.clone());
        }
        match (segments, state) {
            (Some(segments), None) if c.is_periodic() => self.one_by_one(x, segments),
            (None, None) if c.is_periodic() => self.periodic(x),
            (segments, state) => self.run(x, segments, state, ends),
        }
    }

    /// A causal or two-sided layer on checked input.
    fn run(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        mut state: Option<&mut HyenaState>,
        ends: Vec<usize>,
    ) -> Result<Tensor> {
        let (c, (batch, length, _)) = (&self.config, x.dims3()?);
        let (p, conv) = self.projections(x, segments, state.as_deref())?;
        // a trained layer at the start of a sequence computes no taps beyond the call
        let from_start = self.trained && segments.is_none() && ends.iter().all(|&end| end == length);
        let built;
        let orders = match self.trained {
            true => {
                built = self.build(if state.is_none() || from_start { length } else { c.l_max })?;
                &built
            }
            false => self.fixed()?,
        };
        let convolve = |o: usize, v: &Tensor, gate: &Tensor, post_gate: Option<&Tensor>| {
            let order = &orders[o];
            if let Some(state) = state.as_deref_mut().filter(|_| !from_start) {
                let gates = [Some(gate), post_gate];
                return order.stream(c.d_model)?.forward(v, gates, segments, &mut state.long[o]);
            }
            let args = LongConv {
                reverse: order.future.as_ref(),
                taps_first: true,
                d: Some(&order.bias),
                pre_gate: Some(gate),
                post_gate,
                segments,
                cache: (!self.trained).then_some(&order.cache),
                ..LongConv::new(v, &order.past)
            };
            let y = long_conv(&args)?;
            if let Some(state) = state.as_deref_mut() {
                let past = (v * gate)?.to_dtype(accumulation_dtype(self.dtype()))?;
                state.long[o] = LongConvState::from_past(&past, &vec![length; batch])?;
            }
            Ok(y)
        };
        let out = self.orders(&p, convolve)?;
        if let Some(state) = state {
            (state.conv, state.positions) = (conv, ends);
        }
        Ok(out)
    }

    /// Rows of one sequence each, through filters that depend on its length.
    fn periodic(&self, x: &Tensor) -> Result<Tensor> {
        let (c, (batch, length, d)) = (&self.config, x.dims3()?);
        let (blocks, each) = (c.num_blocks, length / c.num_blocks);
        if each * blocks != length {
            let expected = format!("a multiple of num_blocks = {blocks}");
            return Err(Error::value("hyena: sequence length", expected, length));
        }
        let delay = if c.direction == Direction::Centred { each / 2 } else { 0 };
        let p = self.projections(x, None, None)?.0;
        let built;
        let orders = match self.trained {
            true => {
                built = self.build(length)?;
                &built
            }
            false => self.fixed()?,
        };
        let parts = |x: &Tensor| x.reshape((batch * blocks, each, d));
        let convolve = |o: usize, v: &Tensor, gate: &Tensor, post_gate: Option<&Tensor>| {
            let order = &orders[o];
            let taps = order.past.narrow(0, 0, length.min(2 * each))?;
            let (past, future) = filter::periodic(&taps, each, delay)?;
            let (v, gate, post_gate) = (parts(v)?, parts(gate)?, post_gate.map(parts).transpose()?);
            let args = LongConv {
                reverse: Some(&future),
                taps_first: true,
                d: Some(&order.bias),
                pre_gate: Some(&gate),
                post_gate: post_gate.as_ref(),
                cache: (!self.trained).then_some(&order.cache),
                ..LongConv::new(&v, &past)
            };
            Ok(long_conv(&args)?.reshape((batch, length, d))?)
        };
        self.orders(&p, convolve)
    }

    /// Every sequence of every row by itself; zeros at padding.
    fn one_by_one(&self, x: &Tensor, segments: &Segments) -> Result<Tensor> {
        let zero = Tensor::zeros((1, self.config.d_model), x.dtype(), x.device())?;
        let row = |b: usize| {
            let own = x.get(b)?.contiguous()?;
            let mut ys = vec![zero.clone(); segments.length()];
            for tokens in segments.sequences(b) {
                let index: Vec<u32> = tokens.iter().map(|&token| token as u32).collect();
                let index = Tensor::from_vec(index, tokens.len(), x.device())?;
                let y = self.forward(&own.index_select(&index, 0)?.unsqueeze(0)?)?.squeeze(0)?;
                for (i, token) in tokens.into_iter().enumerate() {
                    ys[token] = y.narrow(0, i, 1)?;
                }
            }
            Ok(Tensor::cat(&ys, 0)?)
        };
        let rows = (0..segments.batch()).map(row).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&rows, 0)?)
    }

    /// All that are multiplied, `[B, L, D (N + 1)]`, and the last inputs of the short convolution.
    fn projections(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&HyenaState>,
    ) -> Result<(Tensor, Tensor)> {
        causal_conv1d(&CausalConv1d {
            x: &self.in_proj.forward(x)?,
            weight: &self.short_weight.squeeze(1)?,
            bias: Some(&self.short_bias),
            silu: false,
            initial_state: state.map(|state| &state.conv),
            segments,
        })
    }

    /// The gates, and between them `convolve`, given an order, its input, its gate and perhaps the gate behind it.
    fn orders(
        &self,
        p: &Tensor,
        mut convolve: impl FnMut(usize, &Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let first = heads::part(c, p, 0)?;
        let mut v = heads::part(c, p, c.order)?;
        for o in 0..c.order - 1 {
            let gate = heads::gate(c, heads::part(c, p, c.order - 1 - o)?)?;
            let last = o + 2 == c.order;
            let post_gate = (last && self.mix.is_none()).then_some(&first);
            v = convolve(o, &v, &gate, post_gate)?;
            if let Some(mix) = &self.mix {
                v = heads::mix(&v, &mix.get(o)?)?;
                v = if last { (v * &first)? } else { v };
            }
        }
        if c.activation != Activation::Identity {
            v = activate(&v, c.activation)?;
        }
        self.out_proj.forward(&v)
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
