//! The operator in candle's graph, its outputs in parts: with `g = dy`, `dx = g weight`, `dweight = g^T x`, `dbias` the
//! sum of `g` over rows. Every part has memory of its own, and so have their gradients: those of slices would be padded
//! with zeros and added up.

use super::{Sizes, output_shape};
use crate::Result;
use crate::autograd::{Gradients, record_all};
use candle_core::{Storage, Tensor};

/// A device's products for one part.
#[derive(Clone, Copy)]
pub(super) struct Products {
    /// `x weight^T + bias`.
    pub(super) forward: fn(&Tensor, &Tensor, Option<&Tensor>, Sizes) -> Result<Storage>,
    /// The gradients of `x`, weight and bias that are wanted, from `dy`, `x` and the weight.
    pub(super) backward: fn(&Tensor, &Tensor, &Tensor, &[bool]) -> Result<Gradients>,
}

/// `x weight^T + bias`, the outputs in parts of `widths`, which add up to them.
pub(super) fn recorded(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    sizes: Sizes,
    widths: &[usize],
    products: Products,
) -> Result<Vec<Tensor>> {
    let (saved_x, saved_weight, saved_bias) = (x.detach(), weight.detach(), bias.map(Tensor::detach));
    let parts: Vec<(usize, usize)> = widths
        .iter()
        .scan(0, |next, &width| {
            *next += width;
            Some((*next - width, width))
        })
        .collect();
    let mut outputs = vec![];
    for &(start, width) in &parts {
        let weight = saved_weight.narrow(0, start, width)?;
        let bias = saved_bias.as_ref().map(|bias| bias.narrow(0, start, width)).transpose()?;
        let y = (products.forward)(&saved_x, &weight, bias.as_ref(), Sizes { outputs: width, ..sizes })?;
        outputs.push((y, output_shape(x, width)));
    }
    let mut inputs = vec![x, weight];
    inputs.extend(bias);
    let wanted: Vec<bool> = inputs.iter().map(|input| input.track_op()).collect();
    record_all("linear", &inputs, outputs, move |gradients| {
        let mut sums: Vec<Gradients> = vec![vec![]; wanted.len()];
        for (&(start, width), dy) in parts.iter().zip(gradients) {
            let dy = match dy {
                Some(dy) => dy.clone(),
                None => Tensor::zeros(output_shape(&saved_x, width), saved_x.dtype(), saved_x.device())?,
            };
            let weight = saved_weight.narrow(0, start, width)?;
            let own = (products.backward)(&dy, &saved_x, &weight, &wanted)?;
            sums.iter_mut().zip(own).for_each(|(all, own)| all.push(own));
        }
        // that of `x` is a sum over the parts, those of weight and bias are theirs one below the other
        sums.into_iter().enumerate().map(|(input, parts)| joined(parts, input == 0)).collect()
    })
    .map_err(Into::into)
}

fn joined(parts: Gradients, summed: bool) -> candle_core::Result<Option<Tensor>> {
    let Some(mut parts) = parts.into_iter().collect::<Option<Vec<Tensor>>>() else { return Ok(None) };
    if parts.len() < 2 {
        return Ok(parts.pop());
    }
    if !summed {
        return Tensor::cat(&parts, 0).map(Some);
    }
    let mut parts = parts.into_iter();
    let Some(first) = parts.next() else { return Ok(None) };
    parts.try_fold(first, |sum, part| sum + part).map(Some)
}
