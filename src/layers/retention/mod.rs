//! Multi-scale retention: the RetNet mixer.
//!
//! ```text
//! q, k, v  = q_proj(x), k_proj(x), v_proj(x)            (where asked: short convolution with SiLU, feature map)
//! q, k     = rotary(q), rotary(k)                       positions of the whole sequence
//! S_t      = gamma S_(t-1) + k_t^T v_t                  one gamma a head
//! o_t      = K^-1/2 q_t S_t / s_t                       s_t: see RetentionScaling
//! out      = o_proj(norm(o) act(g_proj(x)))             the norm over each head's values
//! ```
//!
//! The forms of the retention (see [`Form`]) are one function, and a state goes from any of them to any other.
//!
//! Sources: Retentive Network (Sun et al. 2023), section 2; `MultiScaleRetention` of the packages torchscale and fla.

mod config;
mod init;
mod parity;
mod state;

pub use config::{
    HeadDecay, HeadNorm, RetentionConfig, RetentionRotary, RetentionScaling, RotaryAngles, ShortConv,
};
pub use state::RetentionState;

use super::Linear;
use super::norm::NormConfig;
use super::parameter::Reader;
use super::state::advance;
use crate::ops::norm::{Norm, NormKind, gated_norm, norm};
use crate::ops::{
    Activation, CausalConv1d, Form, Retention, RotaryPair, RotaryStyle, Segments, accumulation_dtype,
    activate, causal_conv1d, gate, retention, rotary::positions, rotary_pair,
};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// The RetNet mixer; see the [module](self) for the formula.
///
/// Decays, angles and positions are f64, the recurrence f32 (f64 for f64), whatever the weights' dtype.
#[derive(Clone, Debug)]
pub struct MultiScaleRetention {
    config: RetentionConfig,
    /// Queries, keys, values.
    projections: [Linear; 3],
    convolutions: Option<[Convolution; 3]>,
    gate: Option<Linear>,
    norm: [Option<Tensor>; 2],
    out: Linear,
    /// `ln gamma`, `[H]`, f32 or wider.
    log_decay: Tensor,
    frequencies: Vec<f64>,
}

#[derive(Clone, Debug)]
struct Convolution {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// What [`MultiScaleRetention::forward`] computes with, for a kernel that does the same.
#[cfg(feature = "cuda")]
pub(crate) struct Parameters<'a> {
    pub(crate) q: &'a Linear,
    pub(crate) k: &'a Linear,
    pub(crate) v: &'a Linear,
    pub(crate) gate: Option<&'a Linear>,
    /// The weight of the heads' norm.
    pub(crate) norm: Option<&'a Tensor>,
    pub(crate) out: &'a Linear,
}

impl MultiScaleRetention {
    #[cfg(feature = "cuda")]
    pub(crate) fn parameters(&self) -> Parameters<'_> {
        let ([q, k, v], gate, norm) = (&self.projections, self.gate.as_ref(), self.norm[0].as_ref());
        Parameters { q, k, v, gate, norm, out: &self.out }
    }

    /// Reads the parameters that [`RetentionConfig::parameters`] lists.
    ///
    /// # Errors
    /// An inconsistent config, a missing tensor or another shape.
    pub fn new(config: &RetentionConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let read = Reader::new(config.parameters(), vb);
        let convolution = |name: &str| -> Result<Convolution> {
            let weight = read.get(&format!("{name}_conv1d.weight"))?;
            Ok(Convolution { weight, bias: read.maybe(&format!("{name}_conv1d.bias"))? })
        };
        let [q, k, v] = ["q", "k", "v"].map(|name| Linear::read(&read, &format!("{name}_proj")));
        let projections = [q?, k?, v?];
        let convolutions = match config.short_conv {
            Some(_) => Some([convolution("q")?, convolution("k")?, convolution("v")?]),
            None => None,
        };
        let weight = &projections[0].weight;
        let log_decay = Tensor::new(config.decay.logarithms(config.heads), weight.device())?;
        Ok(Self {
            log_decay: log_decay.to_dtype(accumulation_dtype(weight.dtype()))?,
            frequencies: config.rotary.map_or(vec![], |rotary| rotary.frequencies(config.head_key)),
            gate: config.gate.map(|_| Linear::read(&read, "g_proj")).transpose()?,
            norm: [read.maybe("g_norm.weight")?, read.maybe("g_norm.bias")?],
            out: Linear::read(&read, "o_proj")?,
            config: config.clone(),
            projections,
            convolutions,
        })
    }

    /// What it was built with.
    pub fn config(&self) -> &RetentionConfig {
        &self.config
    }

    /// Chooses another form of the same function.
    ///
    /// # Errors
    /// Chunks of no tokens.
    pub fn set_form(&mut self, form: Form) -> Result<()> {
        form.validate()?;
        self.config.form = form;
        Ok(())
    }

    fn dtype(&self) -> DType {
        self.projections[0].weight.dtype()
    }

    /// The state before the first token of `batch` sequences: zeros.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn init_state(&self, batch: usize) -> Result<RetentionState> {
        let dtype = accumulation_dtype(self.dtype());
        RetentionState::zeros(&self.config, batch, dtype, self.out.weight.device())
    }

    /// `[B, L, D]` to `[B, L, D]`, each row one sequence from its beginning.
    ///
    /// Differentiable in `x` and the parameters. In the chunkwise form time and memory are linear in `B L`.
    ///
    /// # Errors
    /// Another shape or dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_segments(x, None, None)
    }

    /// The same for sequences that go on from `state`, which moves behind the last token. Any number of tokens, one
    /// included. Differentiable through the state too; see [`LayerState::detach`](super::LayerState::detach).
    ///
    /// # Errors
    /// Another shape or dtype, or a state of another batch or layer; `state` is left as it was.
    pub fn forward_with_state(&self, x: &Tensor, state: &mut RetentionState) -> Result<Tensor> {
        self.forward_segments(x, None, Some(state))
    }

    /// The general form: rows cut by `segments` into packed sequences and padding, with or without a state to carry on.
    ///
    /// At padding the output means nothing and depends on no input.
    ///
    /// # Errors
    /// As [`MultiScaleRetention::forward_with_state`], or segments of another batch or length.
    pub fn forward_segments(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut RetentionState>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (batch, length) = match *x.dims() {
            [batch, length, width] if width == c.d_model => (batch, length),
            _ => {
                let expected = format!("[B, L, D] = [B, L, {}]", c.d_model);
                return Err(Error::shape("retention: x", expected, x.dims()));
            }
        };
        if let Some(segments) = segments {
            segments.check("retention", batch, length)?;
        }
        if let Some(state) = state.as_deref() {
            state.check(c, batch)?;
        }
        if batch == 0 || length == 0 {
            return Ok(x.clone());
        }
        let (sequences, conv) = self.sequences(x, segments, state.as_deref())?;
        let before = state.as_deref().map_or(vec![0; batch], |state| state.positions.clone());
        let positions = positions(&before, segments, length);
        let [q, k, v] = sequences;
        let (q, k) = self.turned(&q, &k, &positions)?;
        let (o, retained) = match c.scaling {
            RetentionScaling::None | RetentionScaling::DecaySum => {
                self.retention(&q, &k, &v, segments, state.as_deref())?
            }
            RetentionScaling::RowSum | RetentionScaling::ChunkRowSum { .. } => {
                self.parity(&q, &k, &v, segments, &before)?
            }
        };
        let out = self.out.forward(&self.normed(&o, x)?)?;
        if let Some(state) = state {
            let mut positions = before;
            advance(&mut positions, segments, length);
            *state = RetentionState { retention: retained, conv, positions };
        }
        Ok(out)
    }

    /// Queries, keys and values by heads, before they are turned, and the states of their convolutions.
    fn sequences(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&RetentionState>,
    ) -> Result<([Tensor; 3], Option<[Tensor; 3]>)> {
        let c = &self.config;
        let (batch, length, _) = x.dims3()?;
        let heads = [(c.heads, c.head_key), (c.kv_heads, c.head_key), (c.kv_heads, c.head_value)];
        let (mut sequences, mut states) = (vec![], vec![]);
        for (i, (projection, (heads, width))) in self.projections.iter().zip(heads).enumerate() {
            let mut y = projection.forward(x)?;
            if let Some(convolutions) = &self.convolutions {
                let Convolution { weight, bias } = &convolutions[i];
                let (convolved, after) = causal_conv1d(&CausalConv1d {
                    x: &y,
                    weight: &weight.squeeze(1)?,
                    bias: bias.as_ref(),
                    silu: true,
                    initial_state: state.and_then(|state| state.conv.as_ref()).map(|conv| &conv[i]),
                    segments,
                })?;
                y = convolved;
                states.push(after);
            }
            if let (Some(map), true) = (c.feature_map, i < 2) {
                y = activate(&y, map)?;
            }
            sequences.push(y.reshape((batch, length, heads, width))?);
        }
        let wrong = |all: Vec<Tensor>| Error::value("retention", "queries, keys and values", all.len());
        let sequences = <[Tensor; 3]>::try_from(sequences).map_err(wrong)?;
        Ok((sequences, <[Tensor; 3]>::try_from(states).ok()))
    }

    /// Queries and keys as the retention takes them: turned, and queries divided by `s_t`.
    fn turned(&self, q: &Tensor, k: &Tensor, positions: &[usize]) -> Result<(Tensor, Tensor)> {
        let decays = match self.config.scaling {
            RetentionScaling::DecaySum => Some(self.config.decay.logarithms(self.config.heads)),
            _ => None,
        };
        if self.config.rotary.is_none() && decays.is_none() {
            return Ok((q.clone(), k.clone()));
        }
        rotary_pair(&RotaryPair {
            q,
            k,
            positions,
            frequencies: &self.frequencies,
            style: self.config.rotary.map_or(RotaryStyle::Half, |rotary| rotary.style),
            log_decay: decays.as_deref(),
        })
    }

    fn retention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: Option<&Segments>,
        state: Option<&RetentionState>,
    ) -> Result<(Tensor, Tensor)> {
        retention(&Retention {
            q,
            k,
            v,
            log_decay: &self.log_decay,
            scale: (self.config.head_key as f64).powf(-0.5),
            initial_state: state.map(|state| &state.retention),
            segments,
            form: self.config.form,
        })
    }

    /// The norm of each head and the gate: `[B, L, H V]`.
    fn normed(&self, o: &Tensor, x: &Tensor) -> Result<Tensor> {
        let [weight, bias] = &self.norm;
        let (kind, eps) = match self.config.norm.kind {
            NormConfig::Rms { eps } => (NormKind::Rms, eps),
            NormConfig::RmsOutside { eps } => (NormKind::RmsOutside, eps),
            NormConfig::Layer { eps } => (NormKind::Layer, eps),
        };
        let arguments = Norm { kind, weight: weight.as_ref(), bias: bias.as_ref(), eps, group_size: None };
        let gates = self.gate.as_ref().map(|gate| gate.forward(x)?.reshape(o.shape()).map_err(Error::from));
        let y = match (gates.transpose()?, self.config.gate) {
            (Some(gates), Some(Activation::Silu)) => gated_norm(o, &gates, &arguments, true)?,
            (Some(gates), Some(activation)) => gate(&norm(o, &arguments)?, &gates, activation)?,
            _ => norm(o, &arguments)?,
        };
        Ok(y.flatten_from(2)?)
    }
}
