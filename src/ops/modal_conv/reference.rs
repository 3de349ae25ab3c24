//! The recurrence, token by token.

use super::{ModalConv, Poles, Segments, accumulation_dtype};
use crate::Result;
use candle_core::{D, Tensor};

/// [`modal_conv`](super::modal_conv) as the formula reads, in tensor operations: any device, differentiable by candle,
/// slow.
pub fn modal_conv_reference(args: &ModalConv) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    let (b, l, d) = (sizes.batch, sizes.length, sizes.channels);
    let dtype = accumulation_dtype(args.u.dtype());
    let [p, r] = parts(args, dtype)?;
    let u = args.u.to_dtype(dtype)?;
    let none = Tensor::zeros((d, sizes.states), dtype, u.device())?;
    let segments = Segments::or_whole(args.segments, b, l);
    let (mut ys, mut states) = (vec![], vec![]);
    for row in 0..b {
        // real and imaginary part, each [D, S]
        let mut h = match args.initial_state {
            Some(state) => split(&state.get(row)?.to_dtype(dtype)?, sizes.complex)?,
            None => [none.clone(), none.clone()],
        };
        let mut y = vec![Tensor::zeros((1, d), dtype, u.device())?; l];
        for run in segments.row(row) {
            if run.fresh {
                h = [none.clone(), none.clone()];
            }
            for t in run.tokens.clone() {
                let u_t = u.get(row)?.get(t)?;
                let re = ((&p[0] * &h[0])? - (&p[1] * &h[1])?)?.broadcast_add(&u_t.unsqueeze(1)?)?;
                let im = ((&p[0] * &h[1])? + (&p[1] * &h[0])?)?;
                h = [re, im];
                let mut y_t = ((&r[0] * &h[0])? - (&r[1] * &h[1])?)?.sum(D::Minus1)?;
                if let Some(skip) = args.d {
                    y_t = (y_t + (u_t * skip.to_dtype(dtype)?)?)?;
                }
                y[t] = y_t.unsqueeze(0)?;
            }
        }
        ys.push(if l == 0 { Tensor::zeros((0, d), dtype, u.device())? } else { Tensor::cat(&y, 0)? });
        let [re, im] = h;
        states.push(if sizes.complex { Tensor::stack(&[re, im], D::Minus1)? } else { re });
    }
    Ok((Tensor::stack(&ys, 0)?.to_dtype(args.u.dtype())?, Tensor::stack(&states, 0)?))
}

/// The filter `k[t] = Re sum_s R_s p_s^t`, `[D, length]` in the dtype of the poles: what
/// [`modal_conv`](super::modal_conv) convolves with. Powers in f64; not differentiable.
///
/// # Errors
/// Shapes that do not fit.
pub fn modal_filter(poles: Poles, residues: &Tensor, length: usize) -> Result<Tensor> {
    let dtype = poles.tensor().dtype();
    let channels = poles.tensor().dim(0)?;
    let device = residues.device();
    let impulse = |length, value: f64| Tensor::full(value, (1, length, channels), device);
    let (one, rest) = (impulse(length.min(1), 1.0)?, impulse(length.saturating_sub(1), 0.0)?);
    let u = Tensor::cat(&[&one, &rest], 1)?;
    let args = ModalConv { u: &u, poles, residues, d: None, initial_state: None, segments: None };
    let (k, _) = super::modal_conv(&args)?;
    Ok(k.squeeze(0)?.t()?.contiguous()?.to_dtype(dtype)?)
}

fn split(x: &Tensor, complex: bool) -> Result<[Tensor; 2]> {
    match complex {
        true => Ok([
            x.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)?,
            x.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1)?,
        ]),
        false => Ok([x.clone(), x.zeros_like()?]),
    }
}

/// Poles and residues, each as real and imaginary part `[D, S]`.
fn parts(args: &ModalConv, dtype: candle_core::DType) -> Result<[[Tensor; 2]; 2]> {
    let complex = matches!(args.poles, Poles::Complex(_));
    let mut poles = args.poles.tensor().to_dtype(dtype)?;
    if let Poles::Log(_) = args.poles {
        poles = poles.exp()?;
    }
    Ok([split(&poles, complex)?, split(&args.residues.to_dtype(dtype)?, complex)?])
}
