//! The sizes and options of an attention layer and its parameters.

use crate::layers::parameter::{check_sizes, filled, normal};
use crate::layers::{Linear, Parameter};
use crate::ops::RotaryStyle;
use crate::{Error, Result};
use candle_core::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};

/// How queries, keys and values are projected: which parameters there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkvLayout {
    /// `q_proj`, `k_proj`, `v_proj`, and `o_proj` at the end, as transformers has them.
    Separate,
    /// `Wqkv`, all queries, then all keys, then all values, and `out_proj`, as flash-attn has them.
    Joint,
    /// `Wqkv`, query, key and value of one head after another, and `out_proj`, as Evo 2's files have them.
    JointByHead,
}

/// Rotary position embedding of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotaryConfig {
    /// Base of the frequencies.
    pub base: f64,
    /// Positions are divided by this.
    pub scaling: f64,
    /// Which channels form a pair.
    pub style: RotaryStyle,
}

impl RotaryConfig {
    /// Half form, no scaling.
    pub fn new(base: f64) -> Self {
        Self { base, scaling: 1.0, style: RotaryStyle::Half }
    }
}

/// The sizes and options of an [`Attention`](super::Attention) layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Width of input and output, `D`.
    pub d_model: usize,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`, a divisor of `H`.
    pub kv_heads: usize,
    /// Channels of a head, `K`.
    pub head_dim: usize,
    /// Which projections there are.
    pub layout: QkvLayout,
    /// Biases on the projections of queries, keys and values.
    pub qkv_bias: bool,
    /// A bias on the last projection.
    pub out_bias: bool,
    /// Positions, if the layer tells them apart.
    pub rotary: Option<RotaryConfig>,
    /// Tokens that a query sees at most, its own included; all before it if `None`.
    pub window: Option<usize>,
    /// Tokens that a sequence may have at most.
    pub max_length: Option<usize>,
}

impl AttentionConfig {
    /// Rotary positions (base 10,000), as many key heads as query heads, separate projections without biases.
    pub fn new(d_model: usize, heads: usize) -> Self {
        Self {
            d_model,
            heads,
            kv_heads: heads,
            head_dim: d_model / heads.max(1),
            layout: QkvLayout::Separate,
            qkv_bias: false,
            out_bias: false,
            rotary: Some(RotaryConfig::new(10_000.0)),
            window: None,
            max_length: None,
        }
    }

    /// The name of the last projection.
    pub(super) fn output(&self) -> &'static str {
        if self.layout == QkvLayout::Separate { "o_proj" } else { "out_proj" }
    }

    /// Its parameters, the weights of projections `[out, in]`.
    pub fn parameters(&self) -> Vec<Parameter> {
        let queries = self.heads.saturating_mul(self.head_dim);
        let keys = self.kv_heads.saturating_mul(self.head_dim);
        let (d, bias) = (self.d_model, self.qkv_bias);
        let mut all = match self.layout {
            QkvLayout::Separate => {
                let mut all = Linear::parameters("q_proj", queries, d, bias);
                all.extend(Linear::parameters("k_proj", keys, d, bias));
                all.extend(Linear::parameters("v_proj", keys, d, bias));
                all
            }
            QkvLayout::Joint | QkvLayout::JointByHead => {
                let rows = queries.saturating_add(keys.saturating_mul(2));
                Linear::parameters("Wqkv", rows, d, bias)
            }
        };
        all.extend(Linear::parameters(self.output(), d, queries, self.out_bias));
        all
    }

    /// Checks sizes and options.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("d_model", self.d_model),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("window", self.window.unwrap_or(1)),
            ("max_length", self.max_length.unwrap_or(1)),
        ];
        for (name, size) in sizes {
            if size == 0 || size > u32::MAX as usize {
                return Err(Error::value(format!("attention: {name}"), "1 to 2^32 - 1", size));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of heads = {}", self.heads);
            return Err(Error::value("attention: kv_heads", expected, self.kv_heads));
        }
        if self.layout == QkvLayout::JointByHead && self.kv_heads != self.heads {
            let expected = format!("heads = {}, where each head has its own keys", self.heads);
            return Err(Error::value("attention: kv_heads", expected, self.kv_heads));
        }
        if let Some(rotary) = &self.rotary {
            if !self.head_dim.is_multiple_of(2) {
                return Err(Error::value("attention: head_dim", "an even number", self.head_dim));
            }
            for (name, x) in [("base", rotary.base), ("scaling", rotary.scaling)] {
                if !(x > 0.0 && x.is_finite()) {
                    return Err(Error::value(format!("attention: rotary.{name}"), "a positive number", x));
                }
            }
        }
        check_sizes(&self.parameters())
    }

    pub(super) fn frequencies(&self) -> Vec<f64> {
        let Some(rotary) = &self.rotary else { return vec![] };
        let width = self.head_dim as f64;
        let of = |i: usize| rotary.base.powf(-2.0 * i as f64 / width) / rotary.scaling;
        (0..self.head_dim / 2).map(of).collect()
    }

    /// Normal weights of standard deviation 0.02 by parameter name, f32 on the CPU; biases zero; the last projection is
    /// scaled by `residual_scale` (the square root of one over the number of residual sums in the model).
    ///
    /// # Errors
    /// Sizes that cannot be allocated.
    pub fn init(&self, rng: &mut impl Rng, residual_scale: f64) -> Result<Vec<(String, Tensor)>> {
        let mut draw = |parameter: Parameter| {
            let last = parameter.name.starts_with(self.output());
            let tensor = match parameter.name.ends_with("bias") {
                true => filled(&parameter.shape, |_| 0.0)?,
                false => normal(rng, &parameter.shape, 0.02 * if last { residual_scale } else { 1.0 })?,
            };
            Ok((parameter.name, tensor))
        };
        self.parameters().into_iter().map(&mut draw).collect()
    }
}
