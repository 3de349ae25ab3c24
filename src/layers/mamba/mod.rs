//! Mamba: the selective state space mixer.
//!
//! ```text
//! [u, z]       = in_proj(x)
//! u            = SiLU(conv1d(u))                         causal, depthwise
//! [dt, B, C]   = x_proj(u)                               (FalconMamba, Jamba: each through an RMS norm)
//! delta        = softplus(dt_proj(dt))                   bias included
//! h_t          = exp(delta_t A) h_(t-1) + delta_t B_t u_t        A = -exp(A_log)
//! y_t          = (C_t h_t + D u_t) SiLU(z_t)
//! out          = out_proj(y)
//! ```
//!
//! Sources: Mamba (Gu & Dao 2023), section 3.4; FalconMamba (Zuo et al. 2024), section 3, for the inner norms.

mod config;
mod init;
mod state;

pub use config::{MambaConfig, TimeStepInit, TimeStepScheme};
pub use state::MambaState;

use super::Linear;
use super::parameter::Reader;
use crate::ops::linear;
use crate::ops::selective_scan;
use crate::ops::{CausalConv1d, Segments, SelectiveScan, accumulation_dtype, causal_conv1d, rms_norm};
use crate::{Error, Result};
use candle_core::{D, Tensor};
use candle_nn::VarBuilder;

/// The Mamba mixer; see the [module](self) for the formula.
///
/// The convolution and the recurrence run in f32 (f64 for f64) whatever the weights' dtype.
#[derive(Clone, Debug)]
pub struct Mamba {
    config: MambaConfig,
    in_proj: Linear,
    conv_weight: Tensor,
    conv_bias: Option<Tensor>,
    x_proj: Tensor,
    /// Weights of the norms of dt, B and C, where they have any.
    inner_norms: [Option<Tensor>; 3],
    dt_weight: Tensor,
    dt_bias: Tensor,
    decay: Decay,
    d: Tensor,
    out_proj: Linear,
}

/// `A`, from its logarithm where that may still change.
#[derive(Clone, Debug)]
enum Decay {
    Trained { a_log: Tensor },
    Fixed { a: Tensor },
}

impl Decay {
    fn new(a_log: Tensor) -> Result<Self> {
        if a_log.track_op() {
            return Ok(Self::Trained { a_log });
        }
        Ok(Self::Fixed { a: negative_exp(&a_log)? })
    }

    fn a(&self) -> Result<Tensor> {
        match self {
            Self::Trained { a_log } => negative_exp(a_log),
            Self::Fixed { a } => Ok(a.clone()),
        }
    }
}

fn negative_exp(a_log: &Tensor) -> Result<Tensor> {
    Ok(a_log.exp()?.neg()?)
}

/// The parameters of a layer, for whoever computes it in another way.
#[cfg(feature = "cuda")]
pub(crate) struct Parameters<'a> {
    pub(crate) in_proj: &'a Linear,
    pub(crate) conv_weight: &'a Tensor,
    pub(crate) conv_bias: Option<&'a Tensor>,
    pub(crate) x_proj: &'a Tensor,
    pub(crate) inner_norms: &'a [Option<Tensor>; 3],
    pub(crate) dt_weight: &'a Tensor,
    pub(crate) dt_bias: &'a Tensor,
    pub(crate) a: Tensor,
    pub(crate) d: &'a Tensor,
    pub(crate) out_proj: &'a Linear,
}

impl Mamba {
    #[cfg(feature = "cuda")]
    pub(crate) fn parameters(&self) -> Result<Parameters<'_>> {
        Ok(Parameters {
            in_proj: &self.in_proj,
            conv_weight: &self.conv_weight,
            conv_bias: self.conv_bias.as_ref(),
            x_proj: &self.x_proj,
            inner_norms: &self.inner_norms,
            dt_weight: &self.dt_weight,
            dt_bias: &self.dt_bias,
            a: self.decay.a()?,
            d: &self.d,
            out_proj: &self.out_proj,
        })
    }

    /// Reads the parameters that [`MambaConfig::parameters`] lists.
    ///
    /// A `VarBuilder` over an empty `VarMap` gives trainable but plain values; insert those of [`Mamba::init`] into the
    /// map first for the published initialisation.
    ///
    /// # Errors
    /// An inconsistent config, a missing tensor or another shape.
    pub fn new(config: &MambaConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let read = Reader::new(config.parameters(), vb);
        Ok(Self {
            config: config.clone(),
            in_proj: Linear::read(&read, "in_proj")?,
            conv_weight: read.get("conv1d.weight")?,
            conv_bias: read.maybe("conv1d.bias")?,
            x_proj: read.get("x_proj.weight")?,
            inner_norms: [
                read.maybe("dt_layernorm.weight")?,
                read.maybe("b_layernorm.weight")?,
                read.maybe("c_layernorm.weight")?,
            ],
            dt_weight: read.get("dt_proj.weight")?,
            dt_bias: read.get("dt_proj.bias")?,
            decay: Decay::new(read.get("A_log")?)?,
            d: read.get("D")?,
            out_proj: Linear::read(&read, "out_proj")?,
        })
    }

    /// The sizes it was built with.
    pub fn config(&self) -> &MambaConfig {
        &self.config
    }

    /// The state before the first token of `batch` sequences: zeros.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn init_state(&self, batch: usize) -> Result<MambaState> {
        let dtype = accumulation_dtype(self.in_proj.weight.dtype());
        MambaState::zeros(&self.config, batch, dtype, self.in_proj.weight.device())
    }

    /// `[B, L, D]` to `[B, L, D]`, each row one sequence from its beginning.
    ///
    /// Differentiable in `x` and the parameters. Time and memory are linear in `B L`.
    ///
    /// # Errors
    /// Another shape or dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None, None)
    }

    /// The same for sequences that go on from `state`, which moves behind the last token. Any number of tokens, one
    /// included. Differentiable through the state too; see [`LayerState::detach`](crate::layers::LayerState::detach).
    ///
    /// # Errors
    /// Another shape or dtype, or a state of another batch or layer; `state` is left as it was.
    pub fn forward_with_state(&self, x: &Tensor, state: &mut MambaState) -> Result<Tensor> {
        self.run(x, None, Some(state))
    }

    /// The general form: rows cut by `segments` into packed sequences and padding, with or without a state to carry on.
    ///
    /// At padding the output means nothing (zero, or the bias of `out_proj`) and depends on no input.
    ///
    /// # Errors
    /// As [`Mamba::forward_with_state`], or segments of another batch or length.
    pub fn forward_segments(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut MambaState>,
    ) -> Result<Tensor> {
        self.run(x, segments, state)
    }

    fn run(&self, x: &Tensor, segments: Option<&Segments>, state: Option<&mut MambaState>) -> Result<Tensor> {
        let c = &self.config;
        let (batch, length) = match *x.dims() {
            [batch, length, width] if width == c.d_model => (batch, length),
            _ => {
                return Err(Error::shape("mamba: x", format!("[B, L, D] = [B, L, {}]", c.d_model), x.dims()));
            }
        };
        if let Some(state) = state.as_deref() {
            state.check(c, batch)?;
        }
        if length == 0 || batch == 0 {
            return Ok(x.clone());
        }
        let [u, z] = self.in_proj.forward_parts(x, [c.d_inner; 2])?;
        let (u, conv) = causal_conv1d(&CausalConv1d {
            x: &u,
            weight: &self.conv_weight.squeeze(1)?,
            bias: self.conv_bias.as_ref(),
            silu: true,
            initial_state: state.as_deref().map(|state| &state.conv),
            segments,
        })?;
        let selected = linear(&u, &self.x_proj, None)?;
        let part = |start, width, weight: &Option<Tensor>| -> Result<Tensor> {
            let part = selected.narrow(D::Minus1, start, width)?;
            match c.inner_norm_eps {
                Some(eps) => rms_norm(&part, weight.as_ref(), eps),
                None => Ok(part),
            }
        };
        let [of_dt, of_b, of_c] = &self.inner_norms;
        let dt = part(0, c.dt_rank, of_dt)?;
        let (y, scan) = selective_scan(&SelectiveScan {
            u: &u,
            delta: &linear(&dt, &self.dt_weight, None)?,
            a: &self.decay.a()?,
            b: &part(c.dt_rank, c.d_state, of_b)?,
            c: &part(c.dt_rank + c.d_state, c.d_state, of_c)?,
            d: Some(&self.d),
            z: Some(&z),
            delta_bias: Some(&self.dt_bias),
            softplus: true,
            initial_state: state.as_deref().map(|state| &state.scan),
            segments,
        })?;
        let out = self.out_proj.forward(&y)?;
        if let Some(state) = state {
            *state = MambaState { conv, scan };
        }
        Ok(out)
    }
}
