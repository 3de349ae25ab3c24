//! Causal attention with grouped keys, rotary positions and a sliding window.
//!
//! ```text
//! q, k, v = projections of x, as heads; q and k turned to their positions
//! y_t     = softmax(q_t k^T / sqrt K) v           over the tokens of the sequence up to t, at most `window` of them
//! out     = out_proj(y)
//! ```
//!
//! Sources: Vaswani et al. 2017; RoFormer (Su et al. 2021); grouped queries, Ainslie et al. 2023; Mistral 7B (Jiang et
//! al. 2023), section 2, for the window.

mod config;
mod room;
mod state;

pub use config::{AttentionConfig, QkvLayout, RotaryConfig};
pub use state::AttentionState;

use super::Linear;
use super::parameter::Reader;
use crate::ops::rotary::positions;
use crate::ops::{self, Rotary, Segments, rotary};
use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use rand::Rng;

/// The attention mixer; see the [module](self) for the formula.
#[derive(Clone, Debug)]
pub struct Attention {
    config: AttentionConfig,
    projections: Vec<Linear>,
    output: Linear,
    frequencies: Vec<f64>,
}

impl Attention {
    /// Reads the parameters that [`AttentionConfig::parameters`] lists.
    ///
    /// # Errors
    /// An inconsistent config, a missing tensor or another shape.
    pub fn new(config: &AttentionConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let read = Reader::new(config.parameters(), vb);
        let names: &[&str] = match config.layout {
            QkvLayout::Separate => &["q_proj", "k_proj", "v_proj"],
            QkvLayout::Joint | QkvLayout::JointByHead => &["Wqkv"],
        };
        Ok(Self {
            config: config.clone(),
            projections: names.iter().map(|name| Linear::read(&read, name)).collect::<Result<_>>()?,
            output: Linear::read(&read, config.output())?,
            frequencies: config.frequencies(),
        })
    }

    /// A fresh layer's parameters: see [`AttentionConfig::init`].
    ///
    /// # Errors
    /// Sizes that cannot be allocated.
    pub fn init(config: &AttentionConfig, rng: &mut impl Rng, scale: f64) -> Result<Vec<(String, Tensor)>> {
        config.init(rng, scale)
    }

    /// The sizes it was built with.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The state before the first token of `batch` sequences: no keys.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn init_state(&self, batch: usize) -> Result<AttentionState> {
        let weight = &self.output.weight;
        AttentionState::zeros(&self.config, batch, weight.dtype(), weight.device())
    }

    /// `[B, L, D]` to `[B, L, D]`, each row one sequence from its beginning.
    ///
    /// Differentiable in `x` and the parameters. Time is quadratic in `L` (linear where there is a window), memory
    /// linear.
    ///
    /// # Errors
    /// Another shape or dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_segments(x, None, None)
    }

    /// The same for sequences that go on from `state`, which moves behind the last token.
    ///
    /// # Errors
    /// Another shape or dtype, a state of another batch or layer, or more tokens than `max_length`; `state` is left as
    /// it was.
    pub fn forward_with_state(&self, x: &Tensor, state: &mut AttentionState) -> Result<Tensor> {
        self.forward_segments(x, None, Some(state))
    }

    /// The general form: rows cut by `segments` into packed sequences and padding, with or without a state to carry on.
    ///
    /// At padding the output means nothing (zero, or the bias of the last projection) and depends on no input.
    ///
    /// # Errors
    /// As [`Attention::forward_with_state`], or segments of another batch or length.
    pub fn forward_segments(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut AttentionState>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (batch, length) = match *x.dims() {
            [batch, length, width] if width == c.d_model => (batch, length),
            _ => {
                let expected = format!("[B, L, D] = [B, L, {}]", c.d_model);
                return Err(Error::shape("attention: x", expected, x.dims()));
            }
        };
        if let Some(segments) = segments {
            segments.check("attention", batch, length)?;
        }
        let mut held = match state.as_deref() {
            Some(state) => state.clone(),
            None => AttentionState::zeros(c, batch, x.dtype(), x.device())?,
        };
        held.check(c, batch, x.dtype())?;
        self.check_length(&held.positions, segments, length)?;
        if length == 0 || batch == 0 {
            return Ok(x.clone());
        }
        let [q, k, v] = self.project(x, batch, length)?;
        let places = positions(&held.positions, segments, length);
        let (q, k) = (self.turn(q, &places)?, self.turn(k, &places)?);
        let sight = held.sight(&k, &v, segments)?;
        let y = ops::attention(&ops::Attention {
            q: &q,
            k: &sight.k,
            v: &sight.v,
            scale: (c.head_dim as f64).powf(-0.5),
            keys: &sight.keys,
        })?;
        let out = self.output.forward(&y.flatten_from(2)?)?;
        if let Some(state) = state {
            held.advance(sight, segments, length);
            *state = held;
        }
        Ok(out)
    }

    /// Queries `[B, L, H, K]`, keys and values `[B, L, G, K]`.
    fn project(&self, x: &Tensor, batch: usize, length: usize) -> Result<[Tensor; 3]> {
        let c = &self.config;
        let heads = |x: Tensor, heads: usize| x.reshape((batch, length, heads, c.head_dim));
        match (c.layout, self.projections.as_slice()) {
            (QkvLayout::Separate, [q, k, v]) => {
                let (k, v) = (k.forward(x)?, v.forward(x)?);
                Ok([heads(q.forward(x)?, c.heads)?, heads(k, c.kv_heads)?, heads(v, c.kv_heads)?])
            }
            (QkvLayout::JointByHead, [joint]) => {
                let all = joint.forward(x)?.reshape((batch, length, c.heads, 3, c.head_dim))?;
                let part = |i| all.narrow(3, i, 1)?.squeeze(3);
                Ok([part(0)?, part(1)?, part(2)?])
            }
            (_, [joint, ..]) => {
                let all = heads(joint.forward(x)?, c.heads + 2 * c.kv_heads)?;
                let keys = all.narrow(2, c.heads, c.kv_heads)?;
                let values = all.narrow(2, c.heads + c.kv_heads, c.kv_heads)?;
                Ok([all.narrow(2, 0, c.heads)?, keys, values])
            }
            _ => Err(Error::value("attention: projections", "1 or 3", self.projections.len())),
        }
    }

    fn turn(&self, x: Tensor, positions: &[usize]) -> Result<Tensor> {
        let Some(config) = &self.config.rotary else { return Ok(x) };
        rotary(&Rotary { x: &x, positions, frequencies: &self.frequencies, style: config.style })
    }

    fn check_length(&self, positions: &[usize], segments: Option<&Segments>, length: usize) -> Result<()> {
        let Some(most) = self.config.max_length else { return Ok(()) };
        for (row, &position) in positions.iter().enumerate() {
            let mut count = position;
            let mut longest = 0;
            match segments {
                None => longest = count + length,
                Some(segments) => {
                    for run in segments.row(row) {
                        count = if run.fresh { 0 } else { count } + run.tokens.len();
                        longest = longest.max(count);
                    }
                }
            }
            if longest > most {
                let expected = format!("at most max_length = {most} tokens");
                return Err(Error::value(format!("attention: row {row}"), expected, longest));
            }
        }
        Ok(())
    }
}
