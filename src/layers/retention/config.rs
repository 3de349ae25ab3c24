//! The sizes and options of a retention layer, and its parameters.

use crate::layers::parameter::check_sizes;
use crate::layers::{Linear, NormConfig, Parameter};
use crate::ops::{Activation, Form, RotaryStyle};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The decay of each head, gamma.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadDecay {
    /// `1 - 2^(-5 - h)`, as in the paper's experiments.
    Geometric,
    /// `1 - e^x` with `x` even from `ln 1/32` to `ln 1/512`, as in the paper's language models.
    LogLinear,
    /// Logarithms of gamma, one per head, each at most 0.
    Given(Vec<f64>),
}

impl HeadDecay {
    /// `ln gamma` of each of `heads` heads.
    pub fn logarithms(&self, heads: usize) -> Vec<f64> {
        match self {
            Self::Geometric => (0..heads).map(|h| (-(2f64.powi(-5 - h as i32))).ln_1p()).collect(),
            Self::LogLinear => {
                let (first, last) = ((1f64 / 32.0).ln(), (1f64 / 512.0).ln());
                let step = (last - first) / heads.saturating_sub(1).max(1) as f64;
                (0..heads).map(|h| (-(first + step * h as f64).exp()).ln_1p()).collect()
            }
            Self::Given(logarithms) => logarithms.clone(),
        }
    }
}

/// The angle per position of each pair of channels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RotaryAngles {
    /// `base^(-2 i / K)`, as fla and most of the field have it.
    Open,
    /// `base^(-i / (K / 2 - 1))`, the last one `1 / base`, as torchscale has it.
    Closed,
}

/// Rotary position embedding of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionRotary {
    /// Which channels turn together.
    pub style: RotaryStyle,
    /// The angles.
    pub angles: RotaryAngles,
    /// 10,000 in every published model.
    pub base: f64,
}

impl RetentionRotary {
    /// The angle per position of each of `key / 2` pairs.
    pub fn frequencies(&self, key: usize) -> Vec<f64> {
        let pairs = key / 2;
        let exponent = |i: usize| match self.angles {
            RotaryAngles::Open => 2.0 * i as f64 / key as f64,
            RotaryAngles::Closed => i as f64 / pairs.saturating_sub(1).max(1) as f64,
        };
        (0..pairs).map(|i| self.base.powf(-exponent(i))).collect()
    }
}

/// What the retention's outputs are divided by, before the norm of each head.
///
/// With an epsilon of zero in that norm all of these are one function, for a positive factor per token and head cancels.
/// They differ by what the epsilon weighs, which for inputs of unit size is below 1e-4 of the output at an epsilon of
/// 1e-6, and grows to some 5e-2 where the keys are a hundred times smaller (measured; the larger figure is that of
/// torchscale's parallel form against its chunkwise form).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetentionScaling {
    /// Nothing, as fla has it.
    None,
    /// `s_t`, the root of the sum of all decays up to the token, `s_t^2 = sum_(j <= t) gamma^j`: torchscale's recurrent
    /// form, and the canonical one here: it needs no more than the token's position, so that all forms agree.
    DecaySum,
    /// `s_t r_t` with `r_t = max(1, |sum_u A_tu|)`, `A` the decayed products of torchscale's parallel form. Whole
    /// sequences only: `r_t` needs every product, so that it cannot go on from a state.
    RowSum,
    /// The denominators of torchscale's chunkwise form, which depend on where chunks of this many tokens begin. Whole
    /// sequences only.
    ChunkRowSum {
        /// Tokens of a chunk.
        chunk: usize,
    },
}

/// The norm over the values of each head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadNorm {
    /// RMS norm, or layer norm (group norm over the heads).
    pub kind: NormConfig,
    /// Whether it has a weight (and for the layer norm a bias), `[V]`, shared by the heads.
    pub affine: bool,
}

/// A short convolution with SiLU on queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShortConv {
    /// Taps.
    pub width: usize,
    /// Biases.
    pub bias: bool,
}

/// The sizes and options of a [`MultiScaleRetention`](super::MultiScaleRetention) layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionConfig {
    /// Width of input and output, `D`.
    pub d_model: usize,
    /// Heads of queries and outputs, `H`.
    pub heads: usize,
    /// Heads of keys and values, a divisor of `H`.
    pub kv_heads: usize,
    /// Channels of each head's queries and keys, `K`.
    pub head_key: usize,
    /// Channels of each head's values, `V`.
    pub head_value: usize,
    /// The decays.
    pub decay: HeadDecay,
    /// Rotary position embedding; none is allowed.
    pub rotary: Option<RetentionRotary>,
    /// What outputs are divided by.
    pub scaling: RetentionScaling,
    /// The norm of each head.
    pub norm: HeadNorm,
    /// The activation of the output gate, if there is a gate.
    pub gate: Option<Activation>,
    /// An activation on queries and keys.
    pub feature_map: Option<Activation>,
    /// A short convolution on queries, keys and values.
    pub short_conv: Option<ShortConv>,
    /// Biases on all projections.
    pub bias: bool,
    /// How the retention is computed.
    pub form: Form,
}

impl RetentionConfig {
    /// The layer of the paper: keys as wide as the model, values twice, interleaved rotary embedding, swish gate.
    pub fn new(d_model: usize, heads: usize) -> Self {
        let head_key = d_model.checked_div(heads).unwrap_or(0);
        Self {
            d_model,
            heads,
            kv_heads: heads,
            head_key,
            head_value: head_key.saturating_mul(2),
            decay: HeadDecay::Geometric,
            rotary: Some(RetentionRotary {
                style: RotaryStyle::Interleaved,
                angles: RotaryAngles::Closed,
                base: 10_000.0,
            }),
            scaling: RetentionScaling::DecaySum,
            norm: HeadNorm { kind: NormConfig::Rms { eps: 1e-6 }, affine: false },
            gate: Some(Activation::Silu),
            feature_map: None,
            short_conv: None,
            bias: false,
            form: Form::Auto,
        }
    }

    /// Checks that the sizes and options make a layer.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("d_model", self.d_model),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_key", self.head_key),
            ("head_value", self.head_value),
            ("short_conv.width", self.short_conv.map_or(1, |conv| conv.width)),
        ];
        for (name, size) in sizes {
            if size == 0 || size > u32::MAX as usize {
                return Err(Error::value(format!("retention: {name}"), "1 to 2^32 - 1", size));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of heads = {}", self.heads);
            return Err(Error::value("retention: kv_heads", expected, self.kv_heads));
        }
        if let Some(rotary) = &self.rotary {
            if !self.head_key.is_multiple_of(2) {
                return Err(Error::value(
                    "retention: head_key",
                    "an even number, to be rotated",
                    self.head_key,
                ));
            }
            if !(rotary.base > 0.0 && rotary.base.is_finite()) {
                return Err(Error::value("retention: rotary.base", "a positive number", rotary.base));
            }
        }
        if let HeadDecay::Given(logarithms) = &self.decay {
            if logarithms.len() != self.heads {
                let expected = format!("{} logarithms, one a head", self.heads);
                return Err(Error::value("retention: decay", expected, logarithms.len()));
            }
            if let Some(&wrong) = logarithms.iter().find(|&&log| log.is_nan() || log > 0.0) {
                return Err(Error::value("retention: decay", "logarithms of at most 0", wrong));
            }
        }
        if let RetentionScaling::ChunkRowSum { chunk: 0 } = self.scaling {
            return Err(Error::value("retention: scaling.chunk", "at least 1 token", 0));
        }
        self.form.validate()?;
        self.norm.kind.validate("retention: norm")?;
        check_sizes(&self.parameters())
    }

    /// Channels of all queries, of all keys, and of all values before and after they are shared by the heads.
    pub(super) fn widths(&self) -> Widths {
        let [heads, kv] = [self.heads, self.kv_heads];
        Widths {
            q: heads.saturating_mul(self.head_key),
            k: kv.saturating_mul(self.head_key),
            v: kv.saturating_mul(self.head_value),
            out: heads.saturating_mul(self.head_value),
        }
    }

    /// The parameters, under the names of fla.
    pub fn parameters(&self) -> Vec<Parameter> {
        let widths = self.widths();
        let mut all = vec![];
        for (name, width) in widths.projections() {
            all.extend(Linear::parameters(&format!("{name}_proj"), width, self.d_model, self.bias));
        }
        if let Some(conv) = self.short_conv {
            for (name, width) in widths.projections() {
                all.push(Parameter::new(&format!("{name}_conv1d.weight"), &[width, 1, conv.width]));
                if conv.bias {
                    all.push(Parameter::new(&format!("{name}_conv1d.bias"), &[width]));
                }
            }
        }
        if self.gate.is_some() {
            all.extend(Linear::parameters("g_proj", widths.out, self.d_model, self.bias));
        }
        if self.norm.affine {
            all.extend(self.norm.kind.parameters(self.head_value).into_iter().map(|p| p.under("g_norm")));
        }
        all.extend(Linear::parameters("o_proj", self.d_model, widths.out, self.bias));
        all
    }
}

/// Channels of all heads together.
#[derive(Clone, Copy)]
pub(super) struct Widths {
    pub(super) q: usize,
    pub(super) k: usize,
    pub(super) v: usize,
    /// Of the outputs, which have as many heads as the queries.
    pub(super) out: usize,
}

impl Widths {
    pub(super) fn projections(self) -> [(&'static str, usize); 3] {
        [("q", self.q), ("k", self.k), ("v", self.v)]
    }
}
