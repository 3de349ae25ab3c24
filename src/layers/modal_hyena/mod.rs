//! The gated Hyena block of StripedHyena, Evo and Evo 2: its filter is a sum of exponentials, or has few taps.
//!
//! ```text
//! x2, x1, v = conv1d(projections(x))             causal, depthwise; see ChannelOrder
//! y         = x2 (h * (x1 v) + D (x1 v))         h * : causal convolution, channel by channel
//! out       = out_filter_dense(y)
//! ```
//!
//! `h` is one of [`HyenaFilter`]. A sequence leaves a state of fixed size behind, so that a step costs the same however
//! long it is.
//!
//! Sources: Hyena (Poli et al. 2023); Laughing Hyena (Massaroli et al. 2023); StripedHyena 2 (Ku et al. 2025).

mod config;
mod distill;
mod init;
mod state;

pub use config::{ChannelOrder, HyenaFilter, ModalHyenaConfig};
pub use distill::Distilled;
pub use state::ModalHyenaState;

use super::Linear;
use super::parameter::Reader;
use crate::ops::{
    Activation, CausalConv1d, ModalConv, Poles, Segments, accumulation_dtype, causal_conv1d, gate, modal_conv,
};
use crate::{Error, Result};
use candle_core::{D, Tensor};
use candle_nn::VarBuilder;

/// The gated Hyena mixer; see the [module](self) for the formula.
///
/// Filters and their states are f32 (f64 for f64) whatever the weights' dtype.
#[derive(Clone, Debug)]
pub struct ModalHyena {
    config: ModalHyenaConfig,
    projections: Linear,
    short_weight: Tensor,
    short_bias: Option<Tensor>,
    filter: Filter,
    d: Option<Tensor>,
    output: Linear,
}

/// The inner filter's parameters as they are read.
#[derive(Clone, Debug)]
enum Filter {
    Modal { poles: Tensor, residues: Tensor },
    Taps { h: Tensor },
}

impl ModalHyena {
    /// Reads the parameters that [`ModalHyenaConfig::parameters`] lists.
    ///
    /// # Errors
    /// An inconsistent config, a missing tensor or another shape.
    pub fn new(config: &ModalHyenaConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let read = Reader::new(config.parameters(), vb);
        let filter = match config.filter {
            HyenaFilter::Complex { .. } => {
                Filter::Modal { poles: read.get("filter.poles")?, residues: read.get("filter.residues")? }
            }
            HyenaFilter::Real { .. } => {
                Filter::Modal { poles: read.get("filter.log_poles")?, residues: read.get("filter.residues")? }
            }
            HyenaFilter::Medium { .. } | HyenaFilter::Short { .. } => {
                Filter::Taps { h: read.get("filter.h")? }
            }
        };
        Ok(Self {
            config: config.clone(),
            projections: Linear::read(&read, "projections")?,
            short_weight: read.get("filter.short_filter_weight")?,
            short_bias: read.maybe("filter.short_filter_bias")?,
            filter,
            d: read.maybe("filter.D")?,
            output: Linear::read(&read, "out_filter_dense")?,
        })
    }

    /// The sizes it was built with.
    pub fn config(&self) -> &ModalHyenaConfig {
        &self.config
    }

    /// The largest absolute value of a pole, if the filter has poles: above 1 it grows without bound.
    ///
    /// # Errors
    /// A failed conversion.
    pub fn largest_pole(&self) -> Result<Option<f64>> {
        match (&self.filter, self.config.filter) {
            (Filter::Modal { poles, .. }, HyenaFilter::Complex { .. }) => {
                Poles::Complex(poles).largest().map(Some)
            }
            (Filter::Modal { poles, .. }, _) => Poles::Log(poles).largest().map(Some),
            _ => Ok(None),
        }
    }

    /// The state before the first token of `batch` sequences: zeros.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn init_state(&self, batch: usize) -> Result<ModalHyenaState> {
        let weight = &self.output.weight;
        ModalHyenaState::zeros(&self.config, batch, accumulation_dtype(weight.dtype()), weight.device())
    }

    /// `[B, L, D]` to `[B, L, D]`, each row one sequence from its beginning.
    ///
    /// Differentiable in `x` and the parameters. Time and memory are linear in `B L`.
    ///
    /// # Errors
    /// Another shape or dtype.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_segments(x, None, None)
    }

    /// The same for sequences that go on from `state`, which moves behind the last token. Any number of tokens, one
    /// included. Differentiable through the state too.
    ///
    /// # Errors
    /// Another shape or dtype, or a state of another batch or layer; `state` is left as it was.
    pub fn forward_with_state(&self, x: &Tensor, state: &mut ModalHyenaState) -> Result<Tensor> {
        self.forward_segments(x, None, Some(state))
    }

    /// The general form: rows cut by `segments` into packed sequences and padding, with or without a state to carry on.
    ///
    /// At padding the output means nothing (zero, or the bias of the last projection) and depends on no input.
    ///
    /// # Errors
    /// As [`ModalHyena::forward_with_state`], or segments of another batch or length.
    pub fn forward_segments(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut ModalHyenaState>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (batch, length) = match *x.dims() {
            [batch, length, width] if width == c.d_model => (batch, length),
            _ => {
                let expected = format!("[B, L, D] = [B, L, {}]", c.d_model);
                return Err(Error::shape("modal_hyena: x", expected, x.dims()));
            }
        };
        if let Some(state) = state.as_deref() {
            state.check(c, batch)?;
        }
        if length == 0 || batch == 0 {
            return Ok(x.clone());
        }
        let (z, short) = causal_conv1d(&CausalConv1d {
            x: &self.projections.forward(x)?,
            weight: &self.short_weight,
            bias: self.short_bias.as_ref(),
            silu: false,
            initial_state: state.as_deref().map(|state| &state.short),
            segments,
        })?;
        let [x2, x1, v] = self.split(&z)?;
        let u = gate(&v, &x1, Activation::Identity)?;
        let flat = u.reshape((batch, length, c.d_model))?;
        let (y, filter) = self.convolve(&flat, segments, state.as_deref().map(|state| &state.filter))?;
        let y = gate(&y.reshape(x2.shape())?, &x2, Activation::Identity)?;
        let out = self.output.forward(&y.reshape((batch, length, c.d_model))?)?;
        if let Some(state) = state {
            *state = ModalHyenaState { short, filter };
        }
        Ok(out)
    }

    /// `x2`, `x1` and `v`, each of `D` channels in one or two dimensions.
    fn split(&self, z: &Tensor) -> Result<[Tensor; 3]> {
        let (batch, length, width) = z.dims3()?;
        let d = width / 3;
        let parts = |z: &Tensor, dim: usize| -> Result<[Tensor; 3]> {
            let part = |i| z.narrow(dim, i, 1)?.squeeze(dim);
            Ok([part(0)?, part(1)?, part(2)?])
        };
        match self.config.order {
            ChannelOrder::Thirds => parts(&z.reshape((batch, length, 3, d))?, 2),
            ChannelOrder::Columns { heads } => parts(&z.reshape((batch, length, heads, 3, d / heads))?, 3),
            ChannelOrder::Interleaved => parts(&z.reshape((batch, length, d, 3))?, 3),
        }
    }

    /// The inner filter, `D` included, and its state.
    fn convolve(
        &self,
        u: &Tensor,
        segments: Option<&Segments>,
        initial_state: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let c = &self.config;
        // one filter for every channel
        let spread = |x: Tensor| -> Result<Tensor> {
            let (groups, size) = x.dims2()?;
            let spread = x.unsqueeze(1)?.broadcast_as((groups, c.d_model / groups, size))?;
            Ok(spread.contiguous()?.reshape((c.d_model, size))?)
        };
        let d = self.d.as_ref();
        match (&self.filter, c.filter) {
            (Filter::Modal { poles, residues }, HyenaFilter::Complex { .. }) => {
                let (poles, residues) = (poles.squeeze(2)?, residues.squeeze(2)?);
                let poles = Poles::Complex(&poles);
                modal_conv(&ModalConv { u, poles, residues: &residues, d, initial_state, segments })
            }
            (Filter::Modal { poles, residues }, _) => {
                let (poles, residues) = (spread(poles.squeeze(2)?)?, spread(residues.clone())?);
                let poles = Poles::Log(&poles);
                modal_conv(&ModalConv { u, poles, residues: &residues, d, initial_state, segments })
            }
            (Filter::Taps { h }, kind) => {
                let mut weight = spread(h.squeeze(1)?)?;
                if let HyenaFilter::Medium { .. } = kind {
                    weight = weight.flip(&[1])?;
                }
                if let Some(d) = d {
                    let taps = weight.dim(D::Minus1)?;
                    let last = (weight.narrow(1, taps - 1, 1)? + d.unsqueeze(1)?)?;
                    weight = Tensor::cat(&[&weight.narrow(1, 0, taps - 1)?, &last], 1)?;
                }
                let (bias, silu) = (None, false);
                causal_conv1d(&CausalConv1d { x: u, weight: &weight, bias, silu, initial_state, segments })
            }
        }
    }
}
