//! The long filters.
//!
//! On the grid `t = 0 .. 1` of `l_max` positions, whatever the sequence's length, with features `z`,
//!
//! ```text
//! h = sin(f W_0 z + b_0), h = sin(f (W_i h + b_i)) for the inner layers, k = W h
//! k[t, c] *= exp(-t |deltas[c]|) + shift
//! ```
//!
//! Where a layer's filters depend on the length `n` of what they go over, they are taken modulo `2 n` first: tap `j`,
//! delayed by `s`, meets the input `j + s` places before, or as many after as that lacks to `2 n`.

use super::config::{Direction, FilterOrder, HyenaConfig, HyenaFilter, ImplicitFilter};
use crate::Result;
use crate::layers::parameter::Reader;
use crate::ops::linear;
use candle_core::{D, DType, Device, Tensor};

/// Positions computed at a time where filters are computed once.
const PIECE: usize = 1 << 15;

/// The parameters that filters are made of.
#[derive(Clone, Debug)]
pub(super) enum Filters {
    Explicit(Tensor),
    Implicit(Box<Network>),
}

#[derive(Clone, Debug)]
pub(super) struct Network {
    config: ImplicitFilter,
    /// `[l_max, emb_dim]`
    z: Tensor,
    /// `[l_max, 1]`
    t: Tensor,
    /// Weight, bias and frequency.
    layers: Vec<[Tensor; 3]>,
    last: Tensor,
    deltas: Option<Tensor>,
}

impl Filters {
    pub(super) fn read(config: &HyenaConfig, read: &Reader) -> Result<Self> {
        let get = |name: &str| read.get(&format!("filter_fn.{name}"));
        let filter = match &config.filter {
            HyenaFilter::Explicit => return Ok(Self::Explicit(get("filter")?)),
            HyenaFilter::Implicit(filter) => *filter,
        };
        let layer = |layer: usize| -> Result<[Tensor; 3]> {
            Ok([
                get(&format!("implicit_filter.{layer}.weight"))?,
                get(&format!("implicit_filter.{layer}.bias"))?,
                get(&format!("implicit_filter.{}.freq", filter.sine(layer)))?,
            ])
        };
        Ok(Self::Implicit(Box::new(Network {
            z: get("pos_emb.z")?.squeeze(0)?,
            t: get("pos_emb.t")?.squeeze(0)?,
            layers: filter.layers().map(layer).collect::<Result<_>>()?,
            last: get(&format!("implicit_filter.{}.weight", filter.last().0))?,
            deltas: if filter.modulate { Some(get("modulation.deltas")?.squeeze(0)?) } else { None },
            config: filter,
        })))
    }

    /// Taps of all filters, `[positions, columns]`, f32 or wider.
    fn taps(&self, start: usize, length: usize) -> Result<Tensor> {
        let n = match self {
            Self::Explicit(filter) => return Ok(filter.narrow(0, start, length)?),
            Self::Implicit(network) => network,
        };
        let mut h = n.z.narrow(0, start, length)?;
        for [weight, bias, frequency] in &n.layers {
            h = linear(&h, weight, Some(bias))?.broadcast_mul(frequency)?.sin()?;
        }
        h = linear(&h, &n.last, None)?;
        let normalize = |h: &Tensor| h.broadcast_div(&h.abs()?.sum_keepdim(D::Minus1)?);
        if n.config.normalized && n.config.normalized_first {
            h = normalize(&h)?;
        }
        if let Some(deltas) = &n.deltas {
            let decay = n.t.narrow(0, start, length)?.broadcast_mul(&deltas.abs()?)?.neg()?.exp()?;
            h = (h * (decay + n.config.shift)?)?;
        }
        if n.config.normalized && !n.config.normalized_first {
            h = normalize(&h)?;
        }
        Ok(h)
    }

    fn device(&self) -> &Device {
        match self {
            Self::Explicit(filter) => filter.device(),
            Self::Implicit(network) => network.z.device(),
        }
    }

    /// The same parameters in f64.
    fn widened(&self) -> Result<Self> {
        let wide = |x: &Tensor| x.to_dtype(DType::F64);
        let n = match self {
            Self::Explicit(filter) => return Ok(Self::Explicit(filter.clone())),
            Self::Implicit(network) => network,
        };
        let layer = |[a, b, c]: &[Tensor; 3]| Ok([wide(a)?, wide(b)?, wide(c)?]);
        Ok(Self::Implicit(Box::new(Network {
            config: n.config,
            z: wide(&n.z)?,
            t: wide(&n.t)?,
            layers: n.layers.iter().map(layer).collect::<Result<_>>()?,
            last: wide(&n.last)?,
            deltas: n.deltas.as_ref().map(wide).transpose()?,
        })))
    }

    /// The first `length` taps, computed in f64 and rounded once: sines of fast frequencies multiply the errors of what
    /// goes in. A piece at a time, as they are for good.
    fn exact(&self, length: usize) -> Result<Tensor> {
        let dtype = match self {
            Self::Explicit(filter) => return Ok(filter.narrow(0, 0, length)?),
            Self::Implicit(network) => network.z.dtype(),
        };
        let wide = self.widened()?;
        let piece = |start| Ok(wide.taps(start, PIECE.min(length - start))?.to_dtype(dtype)?);
        let pieces = (0..length).step_by(PIECE).map(piece).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// The filters of each order, `[length, D]`, over the past and, if two-sided, the future.
    pub(super) fn orders(
        &self,
        config: &HyenaConfig,
        length: usize,
        trained: bool,
    ) -> Result<Vec<(Tensor, Option<Tensor>)>> {
        let taps =
            if trained || self.device().is_metal() { self.taps(0, length)? } else { self.exact(length)? };
        let two_sided = config.direction == Direction::TwoSided;
        let part = |direction: usize, order: usize| -> Result<Tensor> {
            let filters = config.filters();
            let columns =
                if two_sided { taps.narrow(1, direction * filters, filters)? } else { taps.clone() };
            of_order(config, &columns, order)
        };
        let order = |order| Ok((part(0, order)?, two_sided.then(|| part(1, order)).transpose()?));
        (0..config.order - 1).map(order).collect()
    }
}

/// The columns of `[rows, D / H (N - 1)]` that belong to one order, those of a head for every head, `[rows, D]`.
pub(super) fn of_order(config: &HyenaConfig, columns: &Tensor, order: usize) -> Result<Tensor> {
    let (rows, width) = (columns.dim(0)?, config.head());
    let own = match config.filter_order {
        _ if config.order == 2 => columns.clone(),
        FilterOrder::OrderFirst => columns.narrow(1, order * width, width)?,
        FilterOrder::ChannelFirst => {
            columns.reshape((rows, width, config.order - 1))?.narrow(2, order, 1)?.squeeze(2)?.contiguous()?
        }
    };
    if config.heads == 1 { Ok(own) } else { Ok(Tensor::cat(&vec![own; config.heads], 1)?) }
}

/// Taps `[K, D]`, delayed by `delay` and taken modulo `2 length`: over the past and over the future of parts of `length`
/// tokens, `[length, D]` each.
pub(super) fn periodic(taps: &Tensor, length: usize, delay: usize) -> Result<(Tensor, Tensor)> {
    let (count, period) = (taps.dim(0)?, 2 * length);
    let zero = Tensor::zeros((1, taps.dim(1)?), taps.dtype(), taps.device())?;
    let padded = Tensor::cat(&[taps, &zero], 0)?.contiguous()?;
    // the tap that meets an input so many places before, or none
    let tap = |lag: usize| {
        let tap = (lag + period - delay) % period;
        (if tap < count { tap } else { count }) as u32
    };
    let past: Vec<u32> = (0..length).map(tap).collect();
    let future = (0..length).map(|ahead| if ahead == 0 { count as u32 } else { tap(period - ahead) });
    let pick = |index: Vec<u32>| padded.index_select(&Tensor::from_vec(index, length, taps.device())?, 0);
    Ok((pick(past)?, pick(future.collect())?))
}
