//! What a retention layer carries from one call to the next.

use super::RetentionConfig;
use crate::layers::LayerState;
use crate::ops::rotary::decay_sum;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The state of a [`MultiScaleRetention`](super::MultiScaleRetention) layer, batch first, f32 (f64 for f64 models).
#[derive(Clone, Debug)]
pub struct RetentionState {
    /// The state of the recurrence, `sum_u gamma^(t-u) k_u^T v_u`: `[B, H, K, V]`.
    pub retention: Tensor,
    /// The last inputs of the short convolutions of queries, keys and values, oldest first: `[B, channels, taps - 1]`.
    pub conv: Option<[Tensor; 3]>,
    /// How many tokens each row has had, `[B]`.
    pub positions: Vec<usize>,
}

/// The names of the convolutions' states.
const CONV: [&str; 3] = ["q_conv", "k_conv", "v_conv"];

/// How far an imported `scale` may be from that of its position, relatively.
const SCALE_TOLERANCE: f64 = 1e-3;

impl RetentionState {
    /// The state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn zeros(config: &RetentionConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let dims = (batch, config.heads, config.head_key, config.head_value);
        let conv = config.short_conv.map(|conv| {
            let zeros = config
                .widths()
                .projections()
                .map(|(_, w)| Tensor::zeros((batch, w, conv.width - 1), dtype, device));
            let [q, k, v] = zeros;
            Ok::<_, Error>([q?, k?, v?])
        });
        Ok(Self {
            retention: Tensor::zeros(dims, dtype, device)?,
            conv: conv.transpose()?,
            positions: vec![0; batch],
        })
    }

    /// From a state that was written to a file.
    pub(crate) fn from_tensors(get: impl Fn(&str) -> Result<Tensor>, positions: &[usize]) -> Result<Self> {
        let retention = get("retention")?;
        let conv = match get(CONV[0]) {
            Ok(q) => Some([q, get(CONV[1])?, get(CONV[2])?]),
            Err(_) => None,
        };
        Ok(Self { retention, conv, positions: positions.to_vec() })
    }

    /// From torchscale's incremental state: `prev_key_value` `[B, H, V, K]` and `scale` `[H]`, of rows that have had
    /// `position` tokens each (at least one).
    ///
    /// torchscale keeps `K^-1/2 S^T / sqrt c`, `c = sum_(j < position) gamma^j` being the scale.
    ///
    /// # Errors
    /// Shapes that are not those of a layer of `config`, short convolutions, or a scale that is not the one of
    /// `position`.
    pub fn from_torchscale(
        config: &RetentionConfig,
        prev_key_value: &Tensor,
        scale: &Tensor,
        position: usize,
    ) -> Result<Self> {
        let (heads, key, value) = (config.heads, config.head_key, config.head_value);
        let batch = match *prev_key_value.dims() {
            [batch, h, v, k] if [h, v, k] == [heads, value, key] => batch,
            _ => {
                let expected = format!("[B, H, V, K] = [B, {heads}, {value}, {key}]");
                return Err(Error::shape("prev_key_value", expected, prev_key_value.dims()));
            }
        };
        if config.short_conv.is_some() {
            return Err(Error::value("torchscale's state", "a layer without short convolutions", "one with"));
        }
        let given = scale.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let sums = config.decay_sums(position);
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= SCALE_TOLERANCE * b.abs();
        if position == 0 || given.len() != heads || !given.iter().zip(&sums).all(near) {
            let expected = format!("the decay sums {sums:?} of position {position}");
            return Err(Error::value("scale", expected, format!("{given:?}")));
        }
        let factors: Vec<f64> = given.iter().map(|c| c.sqrt() * (key as f64).sqrt()).collect();
        let dtype = crate::ops::accumulation_dtype(prev_key_value.dtype());
        let factors =
            Tensor::new(factors, prev_key_value.device())?.to_dtype(dtype)?.reshape((1, heads, 1, 1))?;
        let wide = prev_key_value.to_dtype(dtype)?.transpose(2, 3)?.contiguous()?;
        Ok(Self { retention: wide.broadcast_mul(&factors)?, conv: None, positions: vec![position; batch] })
    }

    /// The inverse of [`RetentionState::from_torchscale`]: `(prev_key_value, scale)`.
    ///
    /// # Errors
    /// Rows at different positions or before the first token, which torchscale's state cannot tell of.
    pub fn to_torchscale(&self, config: &RetentionConfig) -> Result<(Tensor, Tensor)> {
        self.check(config, self.positions.len())?;
        let position = self.positions.first().copied().unwrap_or(0);
        if position == 0 || self.positions.iter().any(|&p| p != position) || self.conv.is_some() {
            let got = format!("positions {:?}", self.positions);
            return Err(Error::value(
                "state",
                "rows at one position of at least 1, no short convolutions",
                got,
            ));
        }
        let sums = config.decay_sums(position);
        let factors: Vec<f64> =
            sums.iter().map(|c| 1.0 / (c.sqrt() * (config.head_key as f64).sqrt())).collect();
        let (device, dtype) = (self.retention.device(), self.retention.dtype());
        let factors = Tensor::new(factors, device)?.to_dtype(dtype)?.reshape((1, config.heads, 1, 1))?;
        let turned = self.retention.broadcast_mul(&factors)?.transpose(2, 3)?.contiguous()?;
        Ok((turned, Tensor::new(sums, device)?.to_dtype(dtype)?))
    }

    /// Checks that this belongs to `batch` sequences of a layer of `config`.
    pub(crate) fn check(&self, config: &RetentionConfig, batch: usize) -> Result<()> {
        let dims = [batch, config.heads, config.head_key, config.head_value];
        if self.retention.dims() != dims {
            let expected = format!("[B, H, K, V] = {dims:?}");
            return Err(Error::shape("retention state: retention", expected, self.retention.dims()));
        }
        if self.positions.len() != batch {
            let expected = format!("one for each of {batch} rows");
            return Err(Error::value("retention state: positions", expected, self.positions.len()));
        }
        match (&self.conv, config.short_conv) {
            (None, None) => Ok(()),
            (Some(states), Some(conv)) => {
                for ((state, name), (_, width)) in states.iter().zip(CONV).zip(config.widths().projections())
                {
                    let dims = [batch, width, conv.width - 1];
                    if state.dims() != dims {
                        let expected = format!("[B, channels, taps - 1] = {dims:?}");
                        return Err(Error::shape(format!("retention state: {name}"), expected, state.dims()));
                    }
                }
                Ok(())
            }
            (given, _) => {
                let of = |has: bool| if has { "short convolutions" } else { "none" };
                Err(Error::value("retention state: conv", of(given.is_none()), of(given.is_some())))
            }
        }
    }
}

impl RetentionConfig {
    /// `sum_(j < tokens) gamma^j` of each head.
    pub(crate) fn decay_sums(&self, tokens: usize) -> Vec<f64> {
        self.decay.logarithms(self.heads).into_iter().map(|log| decay_sum(log, tokens)).collect()
    }
}

impl LayerState for RetentionState {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = vec![("retention", &self.retention)];
        all.extend(self.conv.iter().flat_map(|conv| CONV.into_iter().zip(conv)));
        all
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        let mut all = vec![("retention", &mut self.retention)];
        all.extend(self.conv.iter_mut().flat_map(|conv| CONV.into_iter().zip(conv)));
        all
    }

    fn positions_mut(&mut self) -> Option<&mut Vec<usize>> {
        Some(&mut self.positions)
    }
}
