//! The causal convolution: its formula, the streaming law, gradients.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use subquadratic::ops::causal_conv1d::causal_conv1d_reference;
use subquadratic::ops::{CausalConv1d, Segments, accumulation_dtype, causal_conv1d};

/// Sizes and options of one call.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    length: usize,
    channels: usize,
    width: usize,
    bias: bool,
    silu: bool,
    state: bool,
    /// `x` is a slice of a wider tensor.
    slice: bool,
}

impl Case {
    /// x, weight, bias, initial state, f64; the last two are made in any case.
    fn tensors(&self, seed: u64) -> Vec<Tensor> {
        let random = &mut Random::new(seed);
        let x = if self.slice {
            let wide = random.normal((self.batch, self.length, 2 * self.channels + 3));
            wide.narrow(2, 3, self.channels).unwrap()
        } else {
            random.normal((self.batch, self.length, self.channels))
        };
        let weight = random.normal((self.channels, self.width));
        let bias = random.normal(self.channels);
        let state = random.normal((self.batch, self.channels, self.width - 1));
        vec![x, weight, bias, state]
    }

    fn run(
        &self,
        t: &[Tensor],
        segments: Option<&Segments>,
        reference: bool,
    ) -> subquadratic::Result<Vec<Tensor>> {
        let args = CausalConv1d {
            x: &t[0],
            weight: &t[1],
            bias: self.bias.then_some(&t[2]),
            silu: self.silu,
            initial_state: self.state.then_some(&t[3]),
            segments,
        };
        let (y, state) = if reference { causal_conv1d_reference(&args)? } else { causal_conv1d(&args)? };
        Ok(vec![y, state])
    }

    /// Inputs of which a gradient is expected.
    fn differentiable(&self) -> Vec<usize> {
        let used = [true, true, self.bias, self.state && self.width > 1];
        (0..4).filter(|&i| used[i]).collect()
    }
}

fn cast(tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    tensors.iter().map(|t| t.to_dtype(dtype).unwrap()).collect()
}

/// `x` with the layout of a slice (a cast makes it contiguous).
fn as_slice(x: &Tensor) -> Tensor {
    let wide = Tensor::cat(&[x, x, x], 2).unwrap();
    wide.narrow(2, x.dim(2).unwrap(), x.dim(2).unwrap()).unwrap()
}

const LENGTHS: [usize; 18] =
    [1, 2, 8, 16, 32, 64, 128, 129, 130, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096];

/// The formula by shifted products over the whole sequence, in f64: a reference fast enough for the grid.
fn shifted(case: &Case, t: &[Tensor]) -> Vec<Tensor> {
    let past = case.width - 1;
    let x = t[0].transpose(1, 2).unwrap();
    let before = if case.state { t[3].clone() } else { t[3].zeros_like().unwrap() };
    let x = Tensor::cat(&[&before, &x.contiguous().unwrap()], 2).unwrap();
    let mut y = Tensor::zeros((case.batch, case.channels, case.length), x.dtype(), &Device::Cpu).unwrap();
    for k in 0..case.width {
        let tap = t[1].narrow(1, k, 1).unwrap();
        y = (y + x.narrow(2, k, case.length).unwrap().broadcast_mul(&tap).unwrap()).unwrap();
    }
    if case.bias {
        y = y.broadcast_add(&t[2].unsqueeze(1).unwrap()).unwrap();
    }
    if case.silu {
        y = y.silu().unwrap();
    }
    vec![y.transpose(1, 2).unwrap(), x.narrow(2, case.length, past).unwrap()]
}

#[test]
fn equals_the_formula_over_the_grid() {
    let mut seed = 0;
    for (place, &length) in LENGTHS.iter().enumerate() {
        for width in [1, 2, 3, 4, 5, 6, 7, 8, 9] {
            for (flags, dtype) in [DType::F32, DType::F16, DType::BF16, DType::F64].into_iter().enumerate() {
                seed += 1;
                let flags = flags + place + width;
                if length > 600 && flags % 3 > 0 {
                    continue;
                }
                let channels = if seed % 50 == 0 { 4128 } else { [64, 33, 7][seed % 3] };
                let channels = if channels == 4128 && length > 600 { 64 } else { channels };
                let case = Case {
                    batch: 2,
                    length,
                    channels,
                    width,
                    bias: flags & 1 == 0,
                    silu: flags & 2 == 0,
                    state: (flags / 3) & 1 == 0,
                    slice: (flags / 2) & 1 == 0,
                };
                compare(&case, dtype, seed as u64);
            }
        }
    }
}

/// Outputs, state and gradients in `dtype` against f64 on the same (rounded) numbers.
fn compare(case: &Case, dtype: DType, seed: u64) {
    let what = format!("{case:?} {dtype:?}");
    // state, as layers keep it, in f32 whatever the weights' dtype
    let mut low = cast(&case.tensors(seed), dtype);
    if dtype != DType::F64 {
        low[3] = low[3].to_dtype(DType::F32).unwrap();
    }
    let exact = cast(&low, DType::F64);
    let slice = |t: &[Tensor]| {
        let mut t = t.to_vec();
        if case.slice {
            t[0] = as_slice(&t[0]);
        }
        t
    };
    let (got, got_gradients) = gradients(&low, |t| case.run(&slice(t), None, false));
    let (want, want_gradients) = gradients(&exact, |t| Ok(shifted(case, t)));
    let tolerance = 4.0 * rounding(dtype);
    assert_eq!(got[0].dtype(), dtype);
    assert_close(&format!("{what}: y"), &got[0], &want[0], tolerance);
    assert_close(&format!("{what}: state"), &got[1], &want[1], rounding(dtype));
    // sums over all tokens gather the arithmetic's rounding
    let sums = ((case.batch * case.length) as f64).sqrt() * rounding(accumulation_dtype(dtype));
    for i in case.differentiable() {
        let what = format!("{what}: gradient {i}");
        assert_close(&what, &got_gradients[i], &want_gradients[i], 2.0 * tolerance + sums);
    }
}
