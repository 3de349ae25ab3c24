//! The mixers that a block may have: a line for each in every place that must tell them apart.

use super::Form;
use crate::layers::{
    Attention, AttentionConfig, AttentionState, Hyena, HyenaConfig, HyenaState, LayerState, Mamba,
    MambaConfig, MambaState, ModalHyena, ModalHyenaConfig, ModalHyenaState, MultiScaleRetention, Parameter,
    RetentionConfig, RetentionState,
};
use crate::ops::{Segments, accumulation_dtype};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use rand::Rng;
use serde::{Deserialize, Serialize};

/// What mixes along the sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MixerConfig {
    /// [`layers::Mamba`](crate::layers::Mamba)
    Mamba(MambaConfig),
    /// [`layers::Attention`](crate::layers::Attention)
    Attention(AttentionConfig),
    /// [`layers::ModalHyena`](crate::layers::ModalHyena)
    ModalHyena(ModalHyenaConfig),
    /// [`layers::MultiScaleRetention`](crate::layers::MultiScaleRetention)
    Retention(RetentionConfig),
    /// [`layers::Hyena`](crate::layers::Hyena)
    Hyena(HyenaConfig),
}

impl MixerConfig {
    /// Its parameters by this crate's names.
    pub fn parameters(&self) -> Vec<Parameter> {
        match self {
            Self::Mamba(config) => config.parameters(),
            Self::Attention(config) => config.parameters(),
            Self::ModalHyena(config) => config.parameters(),
            Self::Retention(config) => config.parameters(),
            Self::Hyena(config) => config.parameters(),
        }
    }

    pub(crate) fn width(&self) -> usize {
        match self {
            Self::Mamba(config) => config.d_model,
            Self::Attention(config) => config.d_model,
            Self::ModalHyena(config) => config.d_model,
            Self::Retention(config) => config.d_model,
            Self::Hyena(config) => config.d_model,
        }
    }

    /// The most tokens of a sequence and the name of this limit, if there is one.
    pub(crate) fn longest(&self) -> Option<(usize, &'static str)> {
        match self {
            Self::Hyena(config) => Some((config.l_max, "l_max")),
            Self::Attention(config) => config.max_length.map(|length| (length, "max_length")),
            Self::Mamba(_) | Self::ModalHyena(_) | Self::Retention(_) => None,
        }
    }

    /// Whether it has a state.
    pub(crate) fn streams(&self) -> bool {
        match self {
            Self::Hyena(config) => config.check_streams().is_ok(),
            Self::Mamba(_) | Self::Attention(_) | Self::ModalHyena(_) | Self::Retention(_) => true,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match self {
            Self::Mamba(config) => config.validate(),
            Self::Attention(config) => config.validate(),
            Self::ModalHyena(config) => config.validate(),
            Self::Retention(config) => config.validate(),
            Self::Hyena(config) => config.validate(),
        }
    }

    /// What a state must agree on with its mixer.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Mamba(c) => {
                format!("mamba d_inner {} d_state {} d_conv {}", c.d_inner, c.d_state, c.d_conv)
            }
            Self::Attention(c) => {
                let (window, rotary) = (c.window.unwrap_or(0), c.rotary);
                format!("attention {} x {} window {window} {rotary:?}", c.kv_heads, c.head_dim)
            }
            Self::ModalHyena(c) => format!("modal_hyena {} taps {} {:?}", c.d_model, c.short_taps, c.filter),
            Self::Retention(c) => {
                format!("retention heads {} key {} value {}", c.heads, c.head_key, c.head_value)
            }
            Self::Hyena(c) => {
                format!(
                    "hyena d_model {} order {} l_max {} taps {}",
                    c.d_model, c.order, c.l_max, c.short_filter
                )
            }
        }
    }

    /// The published initialisation by parameter name, f32 on the CPU.
    pub(crate) fn init(&self, rng: &mut impl Rng, residual_scale: f64) -> Result<Vec<(String, Tensor)>> {
        match self {
            Self::Mamba(config) => Mamba::init(config, rng, residual_scale),
            Self::Attention(config) => config.init(rng, residual_scale),
            Self::ModalHyena(config) => ModalHyena::init(config, rng, residual_scale),
            Self::Retention(config) => MultiScaleRetention::init(config, rng, residual_scale),
            Self::Hyena(config) => Hyena::init(config, rng, residual_scale),
        }
    }
}

/// A mixer with its parameters.
#[derive(Clone, Debug)]
pub(crate) enum Mixer {
    Mamba(Mamba),
    Attention(Attention),
    ModalHyena(ModalHyena),
    Retention(MultiScaleRetention),
    Hyena(Hyena),
}

impl Mixer {
    pub(crate) fn new(config: &MixerConfig, vb: VarBuilder) -> Result<Self> {
        Ok(match config {
            MixerConfig::Mamba(config) => Self::Mamba(Mamba::new(config, vb)?),
            MixerConfig::Attention(config) => Self::Attention(Attention::new(config, vb)?),
            MixerConfig::ModalHyena(config) => Self::ModalHyena(ModalHyena::new(config, vb)?),
            MixerConfig::Retention(config) => Self::Retention(MultiScaleRetention::new(config, vb)?),
            MixerConfig::Hyena(config) => Self::Hyena(Hyena::new(config, vb)?),
        })
    }

    /// `[B, L, D]` to `[B, L, D]`; `state` moves behind the last token.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        segments: Option<&Segments>,
        state: Option<&mut MixerState>,
    ) -> Result<Tensor> {
        match (self, state) {
            (Self::Mamba(mixer), None) => mixer.forward_segments(x, segments, None),
            (Self::Mamba(mixer), Some(MixerState::Mamba(state))) => {
                mixer.forward_segments(x, segments, Some(state))
            }
            (Self::Attention(mixer), None) => mixer.forward_segments(x, segments, None),
            (Self::Attention(mixer), Some(MixerState::Attention(state))) => {
                mixer.forward_segments(x, segments, Some(state))
            }
            (Self::ModalHyena(mixer), None) => mixer.forward_segments(x, segments, None),
            (Self::ModalHyena(mixer), Some(MixerState::ModalHyena(state))) => {
                mixer.forward_segments(x, segments, Some(state))
            }
            (Self::Retention(mixer), None) => mixer.forward_segments(x, segments, None),
            (Self::Retention(mixer), Some(MixerState::Retention(state))) => {
                mixer.forward_segments(x, segments, Some(state))
            }
            (Self::Hyena(mixer), None) => mixer.forward_segments(x, segments, None),
            (Self::Hyena(mixer), Some(MixerState::Hyena(state))) => {
                mixer.forward_segments(x, segments, Some(state))
            }
            (mixer, Some(state)) => {
                let expected = format!("one of {}", mixer.name());
                Err(Error::value("state", expected, format!("one of {}", state.mixer())))
            }
        }
    }

    /// The state before the first token of `batch` sequences.
    pub(crate) fn init_state(&self, batch: usize) -> Result<MixerState> {
        Ok(match self {
            Self::Mamba(mixer) => MixerState::Mamba(mixer.init_state(batch)?),
            Self::Attention(mixer) => MixerState::Attention(mixer.init_state(batch)?),
            Self::ModalHyena(mixer) => MixerState::ModalHyena(mixer.init_state(batch)?),
            Self::Retention(mixer) => MixerState::Retention(mixer.init_state(batch)?),
            Self::Hyena(mixer) => MixerState::Hyena(mixer.init_state(batch)?),
        })
    }

    /// Chooses among equal forms of the same function, where the mixer has several; returns whether it has.
    pub(crate) fn set_form(&mut self, form: Form) -> Result<bool> {
        match self {
            Self::Mamba(_) | Self::Attention(_) | Self::ModalHyena(_) | Self::Hyena(_) => Ok(false),
            Self::Retention(mixer) => mixer.set_form(form).map(|()| true),
        }
    }

    /// The mixer's name in files.
    fn name(&self) -> &'static str {
        match self {
            Self::Mamba(_) => "mamba",
            Self::Attention(_) => "attention",
            Self::ModalHyena(_) => "modal_hyena",
            Self::Retention(_) => "retention",
            Self::Hyena(_) => "hyena",
        }
    }
}

/// The state of one block's mixer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MixerState {
    /// See [`MambaState`].
    Mamba(MambaState),
    /// See [`AttentionState`].
    Attention(AttentionState),
    /// See [`ModalHyenaState`].
    ModalHyena(ModalHyenaState),
    /// See [`RetentionState`].
    Retention(RetentionState),
    /// See [`HyenaState`].
    Hyena(HyenaState),
}

impl MixerState {
    /// The mixer's name in files.
    pub(crate) fn mixer(&self) -> &'static str {
        match self {
            Self::Mamba(_) => "mamba",
            Self::Attention(_) => "attention",
            Self::ModalHyena(_) => "modal_hyena",
            Self::Retention(_) => "retention",
            Self::Hyena(_) => "hyena",
        }
    }

    /// The dtype of its tensors in a model of `dtype`: keys and values are as wide as the weights, what is summed up over
    /// the tokens is f32 or wider.
    pub(crate) fn dtype(&self, dtype: DType) -> DType {
        if let Self::Attention(_) = self { dtype } else { accumulation_dtype(dtype) }
    }

    /// Makes room for `tokens` more, where the state grows with them.
    pub(crate) fn reserve(&mut self, tokens: usize) -> Result<()> {
        if let Self::Attention(state) = self { state.reserve(tokens) } else { Ok(()) }
    }

    /// Whether its tensors are all of it.
    pub(crate) fn is_tensors(&self) -> bool {
        !matches!(self, Self::Hyena(_))
    }

    /// The state of the mixer that goes by that name, from its tensors and the tokens each row has had; none if there
    /// is no such mixer.
    pub(crate) fn from_tensors(
        mixer: &str,
        get: impl Fn(&str) -> Result<Tensor>,
        positions: &[usize],
    ) -> Result<Option<Self>> {
        Ok(match mixer {
            "mamba" => Some(Self::Mamba(MambaState { conv: get("conv")?, scan: get("scan")? })),
            // the window comes from the layer, where the state is used
            "attention" => {
                Some(Self::Attention(AttentionState::new(get("k")?, get("v")?, positions.to_vec(), None)))
            }
            "modal_hyena" => {
                Some(Self::ModalHyena(ModalHyenaState { short: get("short")?, filter: get("filter")? }))
            }
            "retention" => Some(Self::Retention(RetentionState::from_tensors(get, positions)?)),
            "hyena" => Some(Self::Hyena(HyenaState::from_tensors(get("conv")?, &get("past")?, positions)?)),
            _ => None,
        })
    }
}

/// The same call on whichever state it is.
macro_rules! each {
    ($self:expr, $state:ident => $call:expr) => {
        match $self {
            Self::Mamba($state) => $call,
            Self::Attention($state) => $call,
            Self::ModalHyena($state) => $call,
            Self::Retention($state) => $call,
            Self::Hyena($state) => $call,
        }
    };
    ($self:expr, $state:ident => $call:expr, wrapped) => {
        Ok(match $self {
            Self::Mamba($state) => Self::Mamba($call?),
            Self::Attention($state) => Self::Attention($call?),
            Self::ModalHyena($state) => Self::ModalHyena($call?),
            Self::Retention($state) => Self::Retention($call?),
            Self::Hyena($state) => Self::Hyena($call?),
        })
    };
}

impl LayerState for MixerState {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        each!(self, state => state.tensors())
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        each!(self, state => state.tensors_mut())
    }

    fn saved(&self) -> Result<Vec<(&'static str, Tensor)>> {
        each!(self, state => state.saved())
    }

    fn is_tracked(&self) -> bool {
        each!(self, state => state.is_tracked())
    }

    fn positions_mut(&mut self) -> Option<&mut Vec<usize>> {
        each!(self, state => state.positions_mut())
    }

    fn reset(&mut self) -> Result<()> {
        each!(self, state => state.reset())
    }

    fn detach(&self) -> Self {
        match self {
            Self::Mamba(state) => Self::Mamba(state.detach()),
            Self::Attention(state) => Self::Attention(state.detach()),
            Self::ModalHyena(state) => Self::ModalHyena(state.detach()),
            Self::Retention(state) => Self::Retention(state.detach()),
            Self::Hyena(state) => Self::Hyena(state.detach()),
        }
    }

    fn select(&self, rows: &[usize]) -> Result<Self> {
        each!(self, state => state.select(rows), wrapped)
    }

    fn batch(&self) -> usize {
        each!(self, state => state.batch())
    }

    fn bytes(&self) -> usize {
        each!(self, state => state.bytes())
    }
}
