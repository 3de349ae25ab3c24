//! The chunkwise form in tensor operations, for devices without a kernel: any device, differentiable by candle.

use super::{Retention, Sizes, plan};
use crate::Result;
use crate::ops::segments::{PAD, START, Segments};
use candle_core::{D, DType, Device, Tensor};

/// Logarithms of decays from here down are zeros in the dtype of the state: resets.
fn least_logarithm(dtype: DType) -> f64 {
    if dtype == DType::F64 { -745.0 } else { -103.0 }
}

/// Retention of checked arguments, all of one dtype.
pub(super) fn retention(args: &Retention, sizes: Sizes) -> Result<(Tensor, Tensor)> {
    let Sizes { batch, length, heads, keys, values, .. } = sizes;
    let (dtype, device) = (args.q.dtype(), args.q.device());
    let size = plan::chunk(&sizes);
    let marks = marks(args.segments, batch, length, dtype, device)?;
    let mut state = match args.initial_state {
        Some(state) => state.clone(),
        None => Tensor::zeros((batch, heads, keys, values), dtype, device)?,
    };
    let mut outputs = vec![];
    for start in (0..length).step_by(size) {
        let tokens = size.min(length - start);
        let log_decay = match sizes.per_token {
            true => args.log_decay.narrow(1, start, tokens)?.transpose(1, 2)?.contiguous()?,
            false => {
                args.log_decay.reshape((1, heads, 1))?.broadcast_as((batch, heads, tokens))?.contiguous()?
            }
        };
        let marks = match &marks {
            Some([starts, present]) => {
                Some([starts.narrow(1, start, tokens)?, present.narrow(1, start, tokens)?])
            }
            None => None,
        };
        let [q, k, v] = [args.q, args.k, args.v].map(|x| per_head(&x.narrow(1, start, tokens)?, heads));
        let chunk = Chunk::new(q?, k?, v?, log_decay, marks)?;
        let (o, next) = chunk.retain(&state, args.scale)?;
        state = next;
        outputs.push(o.transpose(1, 2)?);
    }
    let o = match outputs.is_empty() {
        true => Tensor::zeros((batch, 0, heads, values), dtype, device)?,
        false => Tensor::cat(&outputs, 1)?,
    };
    Ok((o, state))
}

/// `[B, T, Hx, width]` as `[B, H, T, width]`.
fn per_head(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, length, groups, width) = x.dims4()?;
    let x = x.transpose(1, 2)?.contiguous()?;
    if groups == heads {
        return Ok(x);
    }
    let x = x.unsqueeze(2)?.broadcast_as((batch, groups, heads / groups, length, width))?;
    Ok(x.contiguous()?.reshape((batch, heads, length, width))?)
}

/// `[B, T]` each: 1 where a sequence starts, and 1 where there is a token; `None` where every token goes on.
fn marks(
    segments: Option<&Segments>,
    batch: usize,
    length: usize,
    dtype: DType,
    device: &Device,
) -> Result<Option<[Tensor; 2]>> {
    let Some(segments) = segments else { return Ok(None) };
    let marks: Vec<u8> = segments.marks(&Device::Cpu)?.flatten_all()?.to_vec1()?;
    let one_where = |condition: &dyn Fn(u8) -> bool| -> Result<Tensor> {
        let values: Vec<u8> = marks.iter().map(|&mark| condition(mark).into()).collect();
        Ok(Tensor::from_vec(values, (batch, length), device)?.to_dtype(dtype)?)
    };
    Ok(Some([one_where(&|mark| mark == START)?, one_where(&|mark| mark != PAD)?]))
}

/// The tokens of one chunk.
struct Chunk {
    /// `[B, H, C, K]`
    q: Tensor,
    /// `[B, H, C, K]`, zero for padding.
    k: Tensor,
    /// `[B, H, C, V]`, zero for padding.
    v: Tensor,
    /// Sums of the logarithms, resets left out, `[B, H, C]`.
    sums: Tensor,
    /// Resets up to each token, `[B, H, C]`.
    resets: Tensor,
    /// 1 where there is a token, `[B, 1, C, 1]`.
    present: Option<Tensor>,
}

impl Chunk {
    fn new(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, marks: Option<[Tensor; 2]>) -> Result<Self> {
        let shape = log_decay.shape();
        let mut reset = log_decay.detach().lt(least_logarithm(log_decay.dtype()))?;
        let zeros = log_decay.zeros_like()?;
        let mut log_decay = reset.where_cond(&zeros, &log_decay)?;
        let (mut k, mut v, mut present) = (k, v, None);
        if let Some([starts, here]) = marks {
            let (starts, here) = (starts.unsqueeze(1)?.broadcast_as(shape)?, here.unsqueeze(1)?);
            // padding changes nothing
            let padding = here.eq(0.0)?.broadcast_as(shape)?.contiguous()?;
            let started = (starts.contiguous()? + reset.to_dtype(log_decay.dtype())?)?;
            reset = padding.where_cond(&zeros, &started)?.gt(0.0)?;
            log_decay = padding.where_cond(&zeros, &log_decay)?;
            let here = here.unsqueeze(D::Minus1)?;
            (k, v) = (only(&k, &here)?, only(&v, &here)?);
            present = Some(here);
        }
        let resets = reset.to_dtype(log_decay.dtype())?.cumsum(D::Minus1)?;
        Ok(Self { q, k, v, sums: log_decay.cumsum(D::Minus1)?, resets, present })
    }

    /// Outputs `[B, H, C, V]` and the state after.
    fn retain(&self, state: &Tensor, scale: f64) -> Result<(Tensor, Tensor)> {
        let (dtype, tokens) = (self.q.dtype(), self.q.dim(2)?);
        let last = |x: &Tensor| x.narrow(2, tokens - 1, 1);
        // from column j to row i: 0 for later tokens and across resets
        let (rows, columns) = (self.sums.unsqueeze(3)?, self.sums.unsqueeze(2)?);
        let same = self.resets.unsqueeze(3)?.broadcast_eq(&self.resets.unsqueeze(2)?)?.to_dtype(dtype)?;
        let lower = Tensor::tril2(tokens, dtype, self.q.device())?;
        // masked before the exponential, which might overflow, and after it
        let spans = rows.broadcast_sub(&columns)?.broadcast_mul(&lower)?;
        let decays = spans.exp()?.mul(&same)?.broadcast_mul(&lower)?;
        let unreset = self.resets.eq(0.0)?.to_dtype(dtype)?;
        let from_start = (self.sums.exp()? * unreset)?;
        let to_end = (last(&self.sums)?.broadcast_sub(&self.sums)?.exp()?
            * last(&self.resets)?.broadcast_eq(&self.resets)?.to_dtype(dtype)?)?;

        let q = (&self.q * scale)?;
        let scores = (q.matmul(&self.k.t()?)? * decays)?;
        let across = q.broadcast_mul(&from_start.unsqueeze(3)?)?.matmul(state)?;
        let mut o = (scores.matmul(&self.v)? + across)?;
        if let Some(present) = &self.present {
            o = only(&o, present)?;
        }
        let input = self.k.broadcast_mul(&to_end.unsqueeze(3)?)?.t()?.matmul(&self.v)?;
        let state = (state.broadcast_mul(&last(&from_start)?.unsqueeze(3)?)? + input)?;
        Ok((o, state))
    }
}

/// `x` where `present`, else zero, whatever `x` is there.
fn only(x: &Tensor, present: &Tensor) -> Result<Tensor> {
    let present = present.ne(0.0)?.broadcast_as(x.shape())?.contiguous()?;
    Ok(present.where_cond(x, &x.zeros_like()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Form;
    use candle_core::Var;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    /// Outputs, state and all gradients equal those of the kernels.
    #[test]
    fn equals_the_kernels() {
        let mut rng = StdRng::seed_from_u64(1);
        for (case, heads) in [[1, 1, 1], [2, 2, 2], [4, 2, 1], [1, 2, 4]].into_iter().enumerate() {
            let (batch, length, all, keys, values) =
                (2, [1, 64, 65, 150][case], heads.into_iter().max().unwrap(), 5, 3);
            let mut random = |dims: &[usize], low: f64| {
                let numbers: Vec<f64> =
                    (0..dims.iter().product()).map(|_| rng.random_range(low..-low / 2.0)).collect();
                Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap()
            };
            let per_token = case % 2 == 0;
            let decay = if per_token { random(&[batch, length, all], -2.0) } else { random(&[all], -2.0) };
            let mut inputs = [
                random(&[batch, length, heads[0], keys], -1.0),
                random(&[batch, length, heads[1], keys], -1.0),
                random(&[batch, length, heads[2], values], -1.0),
                decay.minimum(0.0).unwrap(),
                random(&[batch, all, keys, values], -1.0),
            ];
            if per_token {
                // a few resets
                let resets = (inputs[3].gt(-1.9).unwrap(), inputs[3].zeros_like().unwrap());
                inputs[3] =
                    resets.0.where_cond(&inputs[3], &(resets.1 + f64::NEG_INFINITY).unwrap()).unwrap();
            }
            let weights =
                [random(&[batch, length, all, values], -1.0), random(&[batch, all, keys, values], -1.0)];
            let padded = Segments::packed(&[vec![length / 2, length / 3], vec![length]], length).unwrap();
            for segments in [None, Some(&padded)] {
                let run = |kernels: bool| {
                    let x: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
                    let args = Retention {
                        q: &x[0],
                        k: &x[1],
                        v: &x[2],
                        log_decay: &x[3],
                        scale: 0.7,
                        initial_state: Some(&x[4]),
                        segments,
                        form: Form::Auto,
                    };
                    let sizes = args.check().unwrap();
                    let results =
                        if kernels { super::super::retention(&args) } else { retention(&args, sizes) };
                    let (o, state) = results.unwrap();
                    let sums = [&o, &state]
                        .into_iter()
                        .zip(&weights)
                        .map(|(x, w)| (x * w).unwrap().sum_all().unwrap());
                    let sum = sums.reduce(|a, b| (a + b).unwrap()).unwrap();
                    let store = sum.backward().unwrap();
                    let mut all = vec![o.detach(), state.detach()];
                    all.extend(
                        x.iter().map(|x| store.get(x).cloned().unwrap_or_else(|| x.zeros_like().unwrap())),
                    );
                    all
                };
                for (i, (got, want)) in run(false).iter().zip(run(true)).enumerate() {
                    assert_eq!(got.dims(), want.dims());
                    let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                    for (got, want) in numbers(got).into_iter().zip(numbers(&want)) {
                        let close = (got - want).abs() <= 1e-11 * (1.0 + want.abs());
                        assert!(close, "case {case}, result {i}: {got}, kernels {want}");
                    }
                }
            }
        }
    }
}
