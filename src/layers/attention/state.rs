//! The keys and values that an attention layer keeps.

use super::AttentionConfig;
use crate::layers::LayerState;
use crate::ops::Segments;
use crate::ops::attention::causal;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// The state of an [`Attention`](super::Attention) layer, batch first, f32 (f64 for f64 models).
///
/// It grows with the sequence, up to the window where there is one.
#[derive(Clone, Debug)]
pub struct AttentionState {
    /// Keys, turned to their positions: `[B, P, G, K]`. The first of a row count, as many as are [`AttentionState::seen`].
    pub k: Tensor,
    /// Values, `[B, P, G, K]`.
    pub v: Tensor,
    /// How many tokens each row has had.
    pub positions: Vec<usize>,
    /// Keys that a row keeps at most.
    window: Option<usize>,
}

/// Keys and values that the queries of a call may see, and what remains for the next.
pub(super) struct Sight {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    /// What each query sees.
    pub(super) keys: Vec<Range<usize>>,
    next: [Tensor; 2],
}

impl AttentionState {
    /// The state before the first token.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn zeros(config: &AttentionConfig, batch: usize, dtype: DType, device: &Device) -> Result<Self> {
        let none = Tensor::zeros((batch, 0, config.kv_heads, config.head_dim), dtype, device)?;
        Ok(Self::new(none.clone(), none, vec![0; batch], config.window))
    }

    pub(crate) fn new(k: Tensor, v: Tensor, positions: Vec<usize>, window: Option<usize>) -> Self {
        // the token itself is one of the window
        Self { k, v, positions, window: window.map(|window| window - 1) }
    }

    /// How many keys a row has.
    pub fn seen(&self, row: usize) -> usize {
        self.positions[row].min(self.window.unwrap_or(usize::MAX))
    }

    /// Checks that this belongs to `batch` sequences of a layer of `config`.
    pub(super) fn check(&mut self, config: &AttentionConfig, batch: usize) -> Result<()> {
        for (name, tensor) in [("k", &self.k), ("v", &self.v)] {
            let expected = [batch, self.k.dim(1)?, config.kv_heads, config.head_dim];
            if tensor.dims() != expected {
                let name = format!("attention state: {name}");
                return Err(Error::shape(name, format!("[B, P, G, K] = {expected:?}"), tensor.dims()));
            }
        }
        self.window = config.window.map(|window| window - 1);
        let most = (0..batch).map(|row| self.seen(row)).max().unwrap_or(0);
        if self.positions.len() != batch || most > self.k.dim(1)? {
            let expected = format!("{batch} rows of at most {} keys", self.k.dim(1)?);
            let got = format!("{:?}", self.positions);
            return Err(Error::value("attention state: positions", expected, got));
        }
        Ok(())
    }

    /// What the queries of `k` and `v`, `[B, L, G, K]` in the state's dtype, see.
    pub(super) fn sight(&self, k: &Tensor, v: &Tensor, segments: Option<&Segments>) -> Result<Sight> {
        let (batch, length) = (k.dim(0)?, k.dim(1)?);
        let seen: Vec<usize> = (0..batch).map(|row| self.seen(row)).collect();
        let window = self.window.map(|window| window + 1);
        let alike = seen.iter().all(|&count| count == seen[0]);
        if segments.is_none() && alike {
            let past = seen.first().copied().unwrap_or(0);
            let join = |past_of: &Tensor, new: &Tensor| -> Result<Tensor> {
                if past == 0 {
                    return Ok(new.clone());
                }
                Ok(Tensor::cat(&[&past_of.narrow(1, 0, past)?, new], 1)?)
            };
            let (k, v) = (join(&self.k, k)?, join(&self.v, v)?);
            let total = past + length;
            let kept = total.min(self.window.unwrap_or(usize::MAX));
            let last = |x: &Tensor| -> Result<Tensor> {
                // a slice of a window would keep the whole alive
                let part = x.narrow(1, total - kept, kept)?;
                Ok(if kept < total { part.force_contiguous()? } else { part.contiguous()? })
            };
            let next = [last(&k)?, last(&v)?];
            return Ok(Sight { k, v, keys: causal(batch, length, total, window), next });
        }
        let segments = Segments::or_whole(segments, batch, length);
        let plan = Ragged::new(&segments, &seen, self.k.dim(1)?, window);
        let gather = |past: &Tensor, new: &Tensor| -> Result<[Tensor; 2]> {
            let all = Tensor::cat(&[past, new], 1)?;
            Ok([plan.gather(&all, &plan.rows)?, plan.gather(&all, &plan.kept)?])
        };
        let ([k, next_k], [v, next_v]) = (gather(&self.k, k)?, gather(&self.v, v)?);
        Ok(Sight { k, v, keys: plan.keys, next: [next_k, next_v] })
    }

    /// Takes what remains for the next call.
    pub(super) fn advance(&mut self, sight: Sight, segments: Option<&Segments>, length: usize) {
        [self.k, self.v] = sight.next;
        crate::layers::state::advance(&mut self.positions, segments, length);
    }
}

/// Rows of different lengths, by places in `[past, new]`.
struct Ragged {
    /// Per row the places of its keys, one sequence after another.
    rows: Vec<Vec<usize>>,
    /// Per row the places of those that its last sequence leaves.
    kept: Vec<Vec<usize>>,
    /// What each query sees of `rows`.
    keys: Vec<Range<usize>>,
}

impl Ragged {
    fn new(segments: &Segments, seen: &[usize], past: usize, window: Option<usize>) -> Self {
        let length = segments.length();
        let (mut rows, mut kept) = (vec![], vec![]);
        let mut keys = vec![0..0; seen.len() * length];
        for (row, &seen) in seen.iter().enumerate() {
            let mut places: Vec<usize> = (0..seen).collect();
            let mut start = 0;
            for run in segments.row(row) {
                if run.fresh {
                    start = places.len();
                }
                for t in run.tokens.clone() {
                    places.push(past + t);
                    let first = places.len().saturating_sub(window.unwrap_or(usize::MAX));
                    keys[row * length + t] = first.max(start)..places.len();
                }
            }
            let first = places.len().saturating_sub(window.map_or(usize::MAX, |window| window - 1));
            kept.push(places[first.max(start)..].to_vec());
            rows.push(places);
        }
        Self { rows, kept, keys }
    }

    /// The keys of `x` `[B, M, G, K]` at `places`, rows filled up at the end.
    fn gather(&self, x: &Tensor, places: &[Vec<usize>]) -> Result<Tensor> {
        let (batch, total, groups, width) = x.dims4()?;
        let longest = places.iter().map(Vec::len).max().unwrap_or(0);
        if longest == 0 {
            return Ok(Tensor::zeros((batch, 0, groups, width), x.dtype(), x.device())?);
        }
        let row = |(row, places): (usize, &Vec<usize>)| {
            let filled = places.iter().copied().chain(std::iter::repeat(0)).take(longest);
            filled.map(|place| (row * total + place) as u32).collect::<Vec<_>>()
        };
        let index: Vec<u32> = places.iter().enumerate().flat_map(row).collect();
        let index = Tensor::from_vec(index, batch * longest, x.device())?;
        let flat = x.reshape((batch * total, groups * width))?;
        Ok(flat.index_select(&index, 0)?.reshape((batch, longest, groups, width))?)
    }
}

impl LayerState for AttentionState {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("k", &self.k), ("v", &self.v)]
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        vec![("k", &mut self.k), ("v", &mut self.v)]
    }

    fn positions_mut(&mut self) -> Option<&mut Vec<usize>> {
        Some(&mut self.positions)
    }

    fn reset(&mut self) -> Result<()> {
        let none = |x: &Tensor| x.narrow(1, 0, 0)?.zeros_like().map(|x| x.detach());
        (self.k, self.v) = (none(&self.k)?, none(&self.v)?);
        self.positions.fill(0);
        Ok(())
    }
}
