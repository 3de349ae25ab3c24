//! The long filters.
//!
//! On the grid `t = 0 .. 1` of `l_max` positions, whatever the sequence's length, with features `z`,
//!
//! ```text
//! h = sin(f W_0 z + b_0), h = sin(f (W_i h + b_i)) for the inner layers, k = W h
//! k[t, c] *= exp(-t |deltas[c]|) + shift
//! ```

use super::config::{FilterOrder, HyenaConfig, HyenaFilter, ImplicitFilter};
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
            last: get(&format!("implicit_filter.{}.weight", 2 * (filter.inner_layers + 1)))?,
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
        if let Some(deltas) = &n.deltas {
            let decay = n.t.narrow(0, start, length)?.broadcast_mul(&deltas.abs()?)?.neg()?.exp()?;
            h = (h * (decay + n.config.shift)?)?;
        }
        if n.config.normalized {
            h = h.broadcast_div(&h.abs()?.sum_keepdim(D::Minus1)?)?;
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

    /// The filters of each order, `[length, D]`, over the past and, if bidirectional, the future.
    pub(super) fn orders(
        &self,
        config: &HyenaConfig,
        length: usize,
        trained: bool,
    ) -> Result<Vec<(Tensor, Option<Tensor>)>> {
        let taps =
            if trained || self.device().is_metal() { self.taps(0, length)? } else { self.exact(length)? };
        let part = |direction: usize, order: usize| -> Result<Tensor> {
            let filters = config.filters();
            of_order(
                config,
                &if config.bidirectional {
                    taps.narrow(1, direction * filters, filters)?
                } else {
                    taps.clone()
                },
                order,
            )
        };
        let order = |order| Ok((part(0, order)?, config.bidirectional.then(|| part(1, order)).transpose()?));
        (0..config.order - 1).map(order).collect()
    }
}

/// The columns of `[rows, D (N - 1)]` that belong to one order, `[rows, D]`.
pub(super) fn of_order(config: &HyenaConfig, columns: &Tensor, order: usize) -> Result<Tensor> {
    let (rows, d) = (columns.dim(0)?, config.d_model);
    if config.order == 2 {
        return Ok(columns.clone());
    }
    Ok(match config.filter_order {
        FilterOrder::OrderFirst => columns.narrow(1, order * d, d)?,
        FilterOrder::ChannelFirst => {
            columns.reshape((rows, d, config.order - 1))?.narrow(2, order, 1)?.squeeze(2)?.contiguous()?
        }
    })
}
