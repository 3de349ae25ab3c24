//! The keys and values that an attention layer keeps.

use super::AttentionConfig;
use super::room::Place;
use crate::layers::LayerState;
use crate::ops::Segments;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// The state of an [`Attention`](super::Attention) layer, batch first, in the dtype of the model.
///
/// It grows with the sequence, up to the window where there is one. Tokens are written into room behind those before
/// them, which clones share: a step copies no key but its own.
#[derive(Clone, Debug)]
pub struct AttentionState {
    k: Tensor,
    v: Tensor,
    /// How many tokens each row has had.
    pub positions: Vec<usize>,
    /// Keys that a row keeps at most.
    window: Option<usize>,
    /// Where `k` and `v` lie, if there is room behind them.
    place: Option<Place>,
}

/// Keys and values that the queries of a call may see, and what remains for the next.
pub(super) struct Sight {
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    /// What each query sees.
    pub(super) keys: Vec<Range<usize>>,
    next: [Tensor; 2],
    place: Option<Place>,
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
        Self { k, v, positions, window: window.map(|window| window - 1), place: None }
    }

    /// Keys, turned to their positions: `[B, P, G, K]`. The last of a row count, as many as are
    /// [seen](AttentionState::seen).
    pub fn k(&self) -> &Tensor {
        &self.k
    }

    /// Values, `[B, P, G, K]`.
    pub fn v(&self) -> &Tensor {
        &self.v
    }

    /// How many keys a row has.
    pub fn seen(&self, row: usize) -> usize {
        self.positions[row].min(self.window.unwrap_or(usize::MAX))
    }

    /// Makes room for `tokens` more of each row, and no more: a sequence whose length is known is never copied.
    ///
    /// # Errors
    /// A failed allocation.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        if self.window.is_none() && !self.is_tracked() {
            self.keep(Place::new(&self.k, &self.v, tokens, false)?)?;
        }
        Ok(())
    }

    fn keep(&mut self, place: Place) -> Result<()> {
        [self.k, self.v] = place.tensors()?;
        self.place = Some(place);
        Ok(())
    }

    /// Checks that this belongs to `batch` sequences of a layer of `config` in `dtype`.
    pub(super) fn check(&mut self, config: &AttentionConfig, batch: usize, dtype: DType) -> Result<()> {
        for (name, tensor) in [("k", &self.k), ("v", &self.v)] {
            let name = format!("attention state: {name}");
            let expected = [batch, self.k.dim(1)?, config.kv_heads, config.head_dim];
            if tensor.dims() != expected {
                return Err(Error::shape(name, format!("[B, P, G, K] = {expected:?}"), tensor.dims()));
            }
            if tensor.dtype() != dtype {
                return Err(Error::dtype(name, format!("{dtype:?}, as x has"), tensor.dtype()));
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
        let (batch, length, past) = (k.dim(0)?, k.dim(1)?, self.k.dim(1)?);
        let seen: Vec<usize> = (0..batch).map(|row| self.seen(row)).collect();
        let window = self.window.map(|window| window + 1);
        if let Some(segments) = segments {
            let plan = Ragged::new(segments, &seen, past, window);
            let gather = |past: &Tensor, new: &Tensor| -> Result<[Tensor; 2]> {
                let all = Tensor::cat(&[past, new], 1)?;
                Ok([plan.gather(&all, &plan.rows)?, plan.gather(&all, &plan.kept)?])
            };
            let ([k, next_k], [v, next_v]) = (gather(&self.k, k)?, gather(&self.v, v)?);
            return Ok(Sight { k, v, keys: plan.keys, next: [next_k, next_v], place: None });
        }
        let of = |row: usize, t: usize| {
            let end = past + t + 1;
            end - (seen[row] + t + 1).min(window.unwrap_or(usize::MAX))..end
        };
        let keys = (0..batch).flat_map(|row| (0..length).map(move |t| (row, t)));
        let keys = keys.map(|(row, t)| of(row, t)).collect();
        let kept = (past + length).min(self.window.unwrap_or(usize::MAX));
        let tracked = self.is_tracked() || k.track_op() || v.track_op();
        if tracked || (past == 0 && self.place.is_none()) {
            let join = |past: &Tensor, new: &Tensor| -> Result<[Tensor; 2]> {
                let all = if past.dim(1)? == 0 { new.contiguous()? } else { Tensor::cat(&[past, new], 1)? };
                let last = all.narrow(1, all.dim(1)? - kept, kept)?;
                // a slice of a window would keep the whole alive
                let last = if kept < past.dim(1)? + length { last.force_contiguous()? } else { last };
                Ok([all, last])
            };
            let ([k, next_k], [v, next_v]) = (join(&self.k, k)?, join(&self.v, v)?);
            return Ok(Sight { k, v, keys, next: [next_k, next_v], place: None });
        }
        let place = match &self.place {
            Some(place) => place.push(k, v)?,
            None => None,
        };
        let place = match place {
            Some(place) => place,
            None => {
                let place = Place::new(&self.k, &self.v, length, true)?;
                place
                    .push(k, v)?
                    .ok_or_else(|| Error::value("attention state", "room for the tokens", "none"))?
            }
        };
        let [k, v] = place.tensors()?;
        let place = place.last(kept);
        Ok(Sight { k, v, keys, next: place.tensors()?, place: Some(place) })
    }

    /// Takes what remains for the next call.
    pub(super) fn advance(&mut self, sight: Sight, segments: Option<&Segments>, length: usize) {
        [self.k, self.v] = sight.next;
        self.place = sight.place;
        crate::layers::state::advance(&mut self.positions, segments, length);
    }
}

/// Rows of different lengths, by places in `[past, new]`.
struct Ragged {
    /// Per row the places of its keys, one sequence after another.
    rows: Vec<Vec<usize>>,
    /// Per row the places of those that its last sequence leaves.
    kept: Vec<Vec<usize>>,
    /// What each query sees of `rows`, once they end together.
    keys: Vec<Range<usize>>,
}

impl Ragged {
    fn new(segments: &Segments, seen: &[usize], past: usize, window: Option<usize>) -> Self {
        let length = segments.length();
        let (mut rows, mut kept) = (vec![], vec![]);
        let mut keys = vec![0..0; seen.len() * length];
        for (row, &seen) in seen.iter().enumerate() {
            let mut places: Vec<usize> = (past - seen..past).collect();
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
        let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
        for (row, places) in rows.iter().enumerate() {
            let shift = longest - places.len();
            for keys in keys[row * length..(row + 1) * length].iter_mut().filter(|keys| keys.start < keys.end)
            {
                *keys = keys.start + shift..keys.end + shift;
            }
        }
        Self { rows, kept, keys }
    }

    /// The keys of `x` `[B, M, G, K]` at `places`, all rows ending together.
    fn gather(&self, x: &Tensor, places: &[Vec<usize>]) -> Result<Tensor> {
        let (batch, total, groups, width) = x.dims4()?;
        let longest = places.iter().map(Vec::len).max().unwrap_or(0);
        if longest == 0 {
            return Ok(Tensor::zeros((batch, 0, groups, width), x.dtype(), x.device())?);
        }
        let row = |(row, places): (usize, &Vec<usize>)| {
            let filler = std::iter::repeat_n(0, longest - places.len());
            let filled = filler.chain(places.iter().copied());
            filled.map(|place| (row * total + place) as u32).collect::<Vec<_>>()
        };
        let index: Vec<u32> = places.iter().enumerate().flat_map(row).collect();
        let index = Tensor::from_vec(index, batch * longest, x.device())?;
        let flat = x.reshape((batch * total, groups * width))?.contiguous()?;
        Ok(flat.index_select(&index, 0)?.reshape((batch, longest, groups, width))?)
    }
}

impl LayerState for AttentionState {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("k", &self.k), ("v", &self.v)]
    }

    fn tensors_mut(&mut self) -> Vec<(&'static str, &mut Tensor)> {
        // what may be put in their place lies elsewhere
        self.place = None;
        vec![("k", &mut self.k), ("v", &mut self.v)]
    }

    fn positions_mut(&mut self) -> Option<&mut Vec<usize>> {
        Some(&mut self.positions)
    }

    fn reset(&mut self) -> Result<()> {
        let none = |x: &Tensor| x.narrow(1, 0, 0)?.zeros_like().map(|x| x.detach());
        (self.k, self.v) = (none(&self.k)?, none(&self.v)?);
        self.place = None;
        self.positions.fill(0);
        Ok(())
    }

    /// Room for tokens to come included.
    fn bytes(&self) -> usize {
        match &self.place {
            Some(place) => place.bytes(),
            None => 2 * self.k.elem_count() * self.k.dtype().size_in_bytes(),
        }
    }
}
