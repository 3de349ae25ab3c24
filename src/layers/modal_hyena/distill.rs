//! A gated modal layer in the place of a Hyena layer: the same but for its long filters, which become sums of
//! exponentials.

use super::{ChannelOrder, HyenaFilter, ModalHyena, ModalHyenaConfig};
use crate::layers::hyena::{Hyena, HyenaConfig};
use crate::ops::modal_conv::{fit_modal, modal_filter};
use crate::ops::{Activation, Poles, accumulation_dtype};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

/// What [`ModalHyena::distill`] makes of a Hyena layer.
#[derive(Clone, Debug)]
pub struct Distilled {
    /// The layer's config.
    pub config: ModalHyenaConfig,
    /// Its parameters by name, in the dtypes of the Hyena layer.
    pub parameters: Vec<(String, Tensor)>,
    /// Per channel the norm of what the filter differs by over its own norm, of the parameters as they are here.
    pub errors: Vec<f64>,
    /// Per channel what no filter of so many states can have as its error.
    pub bounds: Vec<f64>,
}

impl ModalHyena {
    /// Fits `states` complex exponentials to every filter of the Hyena layer that `vb` holds, over all its `l_max`
    /// taps; projections, short filter, gates and skip weights are taken over as they are.
    ///
    /// Only layers of order 2 have the form of a gated modal layer, one gate before one filter and one behind; they
    /// decode in constant time afterwards. See [`fit_modal`] for the cost.
    ///
    /// Source: Laughing Hyena (Massaroli et al. 2023), section 3.
    ///
    /// # Errors
    /// Another order, a layer that is not causal, one of heads or with an activation, no states, or parameters that are missing or of another shape.
    pub fn distill(config: &HyenaConfig, vb: VarBuilder, states: usize) -> Result<Distilled> {
        if config.order != 2 {
            let expected = "2: layers of more gates than two have no gated modal form";
            return Err(Error::value("distill: order", expected, config.order));
        }
        config.check_streams()?;
        if config.heads > 1
            || config.outer_mixing
            || config.post_order_ffn
            || config.activation != Activation::Identity
        {
            let expected = "one head, plain gates and no activation: what a gated modal layer has";
            return Err(Error::value("distill: hyena", expected, format!("{config:?}")));
        }
        let filters = Hyena::new(config, vb.clone())?.filters()?;
        let filter = filters.first().ok_or_else(|| Error::value("distill: filters", "1", 0))?;
        let filter = filter.detach().to_dtype(DType::F64)?;
        let fit = fit_modal(&filter, states)?;
        let to = ModalHyenaConfig {
            d_model: config.d_model,
            short_taps: config.short_filter,
            filter: HyenaFilter::Complex { states },
            order: ChannelOrder::Thirds,
            projection_bias: config.in_bias,
            short_bias: true,
            out_bias: config.out_bias,
        };
        let dtype = accumulation_dtype(vb.dtype());
        let poles = within_circle(&fit.poles, dtype)?.to_dtype(dtype)?;
        let residues = fit.residues.to_dtype(dtype)?;
        let errors = errors(&filter, &poles, &residues)?;
        let old = config.parameters();
        let parameter = |name: &str| -> Result<Tensor> {
            let from = match name {
                "filter.poles" => return Ok(poles.unsqueeze(2)?.to_device(vb.device())?),
                "filter.residues" => return Ok(residues.unsqueeze(2)?.to_device(vb.device())?),
                "filter.D" => "filter_fn.bias".to_string(),
                name => name
                    .replace("projections.", "in_proj.")
                    .replace("out_filter_dense.", "out_proj.")
                    .replace("filter.short_filter_", "short_filter."),
            };
            let found = old.iter().find(|parameter| parameter.name == from);
            let found = found.ok_or_else(|| Error::value(&from, "a parameter of the layer", "none"))?;
            Ok(found.read(&vb)?.detach())
        };
        let names = to.parameters().into_iter().map(|parameter| parameter.name);
        let parameters = names.map(|name| Ok((name.clone(), parameter(&name)?))).collect::<Result<_>>()?;
        Ok(Distilled { config: to, parameters, errors, bounds: fit.bounds })
    }
}

/// Poles `[D, S, 2]` that stay within the unit circle when their parts are rounded to `dtype`.
fn within_circle(poles: &Tensor, dtype: DType) -> Result<Tensor> {
    // each part moves by at most half a unit in the last place of 1
    let most = 1.0 - if dtype == DType::F64 { 2f64.powi(-50) } else { 2f64.powi(-22) };
    let radius = poles.sqr()?.sum_keepdim(2)?.sqrt()?;
    Ok(poles.broadcast_mul(&(radius.maximum(most)?.recip()? * most)?)?)
}

/// How far the filters of these poles and residues are from `filter`, `[D, L]` in f64, channel by channel.
fn errors(filter: &Tensor, poles: &Tensor, residues: &Tensor) -> Result<Vec<f64>> {
    let (poles, residues) = (poles.to_dtype(DType::F64)?, residues.to_dtype(DType::F64)?);
    let near = modal_filter(Poles::Complex(&poles), &residues, filter.dim(1)?)?;
    let norms = |x: &Tensor| Ok::<_, Error>(x.sqr()?.sum(1)?.sqrt()?.to_vec1::<f64>()?);
    let filter = filter.to_device(near.device())?;
    let (left, own) = (norms(&(&near - &filter)?)?, norms(&filter)?);
    Ok(left.into_iter().zip(own).map(|(left, own)| if own == 0.0 { left } else { left / own }).collect())
}
