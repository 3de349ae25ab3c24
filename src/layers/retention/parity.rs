//! The denominators of torchscale's parallel and chunkwise forms, for numbers as close to theirs as their own.
//!
//! Both hold all pairs of tokens, for every head at once, as torchscale does; neither can go on from a state, for the
//! denominators of later tokens need what a state no longer tells apart.

use super::{MultiScaleRetention, RetentionScaling};
use crate::ops::rotary::decay_sum;
use crate::ops::{Segments, accumulation_dtype};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};

impl MultiScaleRetention {
    /// Outputs `[B, L, H, V]` and the state behind them, as torchscale computes and divides them.
    pub(super) fn parity(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: Option<&Segments>,
        before: &[usize],
    ) -> Result<(Tensor, Tensor)> {
        if segments.is_some() || before.iter().any(|&position| position > 0) {
            let got = if segments.is_some() { "packed or padded rows" } else { "a sequence that goes on" };
            let expected =
                "whole sequences from their beginning (RetentionScaling::DecaySum has no such limit)";
            return Err(Error::value("retention: row sums", expected, got));
        }
        let (_, state) = self.retention(q, k, v, None, None)?;
        let dtype = accumulation_dtype(q.dtype());
        let scaled = (k.to_dtype(dtype)? * (self.config.head_key as f64).powf(-0.5))?;
        let [q, k, v] = [&q.to_dtype(dtype)?, &scaled, &v.to_dtype(dtype)?].map(|x| self.by_heads(x));
        let (q, k, v) = (q?, k?, v?);
        let o = match self.config.scaling {
            RetentionScaling::ChunkRowSum { chunk } => self.chunks(&q, &k, &v, chunk)?,
            _ => {
                let length = q.dim(2)?;
                let products = (q.matmul(&k.t()?.contiguous()?)? * self.mask(length, &q)?)?;
                let sums = products.detach().sum_keepdim(D::Minus1)?.abs()?.maximum(1.0)?;
                products.broadcast_div(&sums)?.matmul(&v)?
            }
        };
        Ok((o.transpose(1, 2)?.contiguous()?.to_dtype(self.dtype())?, state))
    }

    /// `[B, L, groups, width]` as `[B, H, L, width]`.
    fn by_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, length, groups, width) = x.dims4()?;
        let heads = self.config.heads;
        let x =
            x.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((batch, groups, heads / groups, length, width))?;
        Ok(x.contiguous()?.reshape((batch, heads, length, width))?)
    }

    /// `gamma^(i - j) / s_i` below the diagonal, of the shape of the products of `like` with itself.
    fn mask(&self, length: usize, like: &Tensor) -> Result<Tensor> {
        let logs = self.config.decay.logarithms(self.config.heads);
        let mut values = Vec::with_capacity(logs.len() * length * length);
        for &log in &logs {
            for i in 0..length {
                let scale = decay_sum(log, i + 1).sqrt().recip();
                values.extend((0..length).map(|j| if j > i { 0.0 } else { scale * power(log, i - j) }));
            }
        }
        let mask = Tensor::from_vec(values, (1, logs.len(), length, length), like.device())?;
        let (batch, ..) = like.dims4()?;
        Ok(mask.to_dtype(like.dtype())?.broadcast_as((batch, logs.len(), length, length))?.contiguous()?)
    }

    /// torchscale's chunkwise form: sequences padded to whole chunks, a running state of its own scale.
    fn chunks(&self, q: &Tensor, k: &Tensor, v: &Tensor, chunk: usize) -> Result<Tensor> {
        let (batch, heads, length, _) = q.dims4()?;
        let (device, dtype) = (q.device(), q.dtype());
        let padded = length.next_multiple_of(chunk);
        let [q, k, v] = [q, k, v].map(|x| x.pad_with_zeros(2, 0, padded - length));
        let (q, k, v) = (q?, k?, v?);
        let logs = self.config.decay.logarithms(heads);
        let per_token = |f: &dyn Fn(f64, usize) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = logs.iter().flat_map(|&log| (0..chunk).map(move |i| f(log, i))).collect();
            Ok(Tensor::from_vec(values, (1, heads, chunk, 1), device)?.to_dtype(dtype)?)
        };
        let whole = |log: f64| decay_sum(log, chunk);
        let value_decay = per_token(&|log, j| power(log, chunk - 1 - j) / whole(log))?;
        let query_decay = per_token(&|log, i| power(log, i + 1) * whole(log) / decay_sum(log, i + 1).sqrt())?;
        let cross = Tensor::from_vec(
            logs.iter().map(|&log| power(log, chunk)).collect::<Vec<f64>>(),
            (1, heads, 1, 1),
            device,
        )?;
        let cross = cross.to_dtype(dtype)?;
        let mut state = Tensor::zeros((batch, heads, k.dim(3)?, v.dim(3)?), dtype, device)?;
        let mut scale = Tensor::ones((batch, heads, 1, 1), DType::F32, device)?.to_dtype(dtype)?;
        let mut outputs = vec![];
        for start in (0..padded).step_by(chunk) {
            let at = |x: &Tensor| x.narrow(2, start, chunk)?.contiguous();
            let (q, k, v) = (at(&q)?, at(&k)?, at(&v)?);
            let products = (q.matmul(&k.t()?.contiguous()?)? * self.mask(chunk, &q)?)?;
            let sums = products.detach().abs()?.sum_keepdim(D::Minus1)?.maximum(1.0)?;
            let divisor = sums.broadcast_maximum(&scale)?;
            let inner = products.matmul(&v)?;
            let outer = q.broadcast_mul(&query_decay)?.matmul(&state)?;
            outputs.push((inner + outer)?.broadcast_div(&divisor)?);
            let update = k.t()?.contiguous()?.matmul(&v.broadcast_mul(&value_decay)?)?;
            state = (state.broadcast_mul(&cross)? + update)?;
            let sums = state.detach().abs()?.sum_keepdim(2)?.max_keepdim(3)?;
            scale = sums.maximum(1.0)?;
        }
        Ok(Tensor::cat(&outputs, 2)?.narrow(2, 0, length)?)
    }
}

/// `e^(n log)`, 1 for `n = 0` whatever `log`.
fn power(log: f64, n: usize) -> f64 {
    if n == 0 { 1.0 } else { (n as f64 * log).exp() }
}
