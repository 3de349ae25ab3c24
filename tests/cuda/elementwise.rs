//! Rotary embedding, activations and gates, and the norm of a head with its gate.

use crate::agree::{agree, tolerance};
use crate::common::*;
use crate::gpu;
use candle_core::{DType, Tensor};
use subquadratic::ops::norm::{Norm, NormKind, gated_norm};
use subquadratic::ops::{Activation, Rotary, RotaryPair, RotaryStyle, activate, gate, rotary, rotary_pair};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// A tensor of `dims`, or the like slice of one with wider rows, which begins off the beginning.
fn draw(random: &mut Random, dims: &[usize], dtype: DType, slice: bool) -> Tensor {
    let (last, width) = (dims.len() - 1, dims[dims.len() - 1]);
    let mut wide = dims.to_vec();
    wide[last] = 2 * width + 1;
    let x = random.normal(wide).to_dtype(dtype).unwrap().narrow(last, width, width).unwrap();
    if slice { x } else { x.contiguous().unwrap() }
}

#[test]
fn rotary_of_one_and_of_a_pair() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(1);
    for seed in 0..90 {
        let dtype = DTYPES[seed % 3];
        let style = [RotaryStyle::Half, RotaryStyle::Interleaved][random.int(0, 1)];
        let (b, l) = (random.int(1, 3), [1, 2, 7, 33][random.int(0, 3)]);
        let k = [2, 6, 7, 16, 64, 256, 512][random.int(0, 6)];
        let pairs = [0, k / 4, k / 2][random.int(0, 2)];
        let [hq, hk] = [random.int(1, 4), random.int(1, 4)];
        let frequencies: Vec<f64> =
            (0..pairs).map(|i| 10_000f64.powf(-(i as f64) / (k as f64 / 2.0))).collect();
        let positions: Vec<usize> = match random.int(0, 2) {
            0 => (1_000_000..1_000_000 + l).collect(),
            1 => (0..l).map(|_| random.int(0, 1_000_000)).collect(),
            _ => (0..b * l).map(|_| random.int(0, 1_000_000)).collect(),
        };
        let slice = random.int(0, 1) == 1;
        let inputs = [draw(random, &[b, l, hq, k], dtype, slice), draw(random, &[b, l, hk, k], dtype, slice)];
        let (positions, frequencies) = (positions.as_slice(), frequencies.as_slice());
        let what = format!("{dtype:?} {style:?} [{b}, {l}, {hq} {hk}, {k}] pairs {pairs} slice {slice}");
        agree(&what, &device, &inputs[..1], tolerance(dtype), |x| {
            Ok(vec![rotary(&Rotary { x: &x[0], positions, frequencies, style })?])
        });
        let logs: Vec<f64> = (0..hq).map(|h| [-0.03, 0.0, -1e-4, f64::NEG_INFINITY][h]).collect();
        let log_decay = (random.int(0, 2) > 0).then_some(logs.as_slice());
        agree(&format!("{what}, pair, {log_decay:?}"), &device, &inputs, tolerance(dtype), |x| {
            let (q, k) =
                rotary_pair(&RotaryPair { q: &x[0], k: &x[1], positions, frequencies, style, log_decay })?;
            Ok(vec![q, k])
        });
    }
}

#[test]
fn activations_and_gates() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(2);
    let all =
        [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Identity];
    for seed in 0..90 {
        let (dtype, activation) = (DTYPES[seed % 3], all[seed / 3 % 5]);
        let width = [1, 5, 8, 64, 200, 1000][random.int(0, 5)];
        let dims = [vec![width], vec![3, width], vec![2, 5, width]][random.int(0, 2)].clone();
        let slices = [random.int(0, 1) == 1, random.int(0, 1) == 1];
        let inputs = slices.map(|slice| (draw(random, &dims, dtype, slice) * 3.0).unwrap());
        // the product lost the slices' strides
        let inputs: Vec<Tensor> = inputs
            .iter()
            .zip(slices)
            .map(|(x, slice)| match slice {
                true => {
                    let last = dims.len() - 1;
                    Tensor::cat(&[x, x], last).unwrap().narrow(last, width, width).unwrap()
                }
                false => x.clone(),
            })
            .collect();
        let what = format!("{activation:?} {dtype:?} {dims:?} slices {slices:?}");
        agree(&what, &device, &inputs[..1], tolerance(dtype), |x| Ok(vec![activate(&x[0], activation)?]));
        agree(&format!("gate, {what}"), &device, &inputs, tolerance(dtype), |x| {
            Ok(vec![gate(&x[0], &x[1], activation)?])
        });
    }
}

#[test]
fn the_norm_of_a_head_and_its_gate() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(3);
    for seed in 0..90 {
        let dtype = DTYPES[seed % 3];
        let width = [4, 8, 40, 64, 128, 200, 256, 512][random.int(0, 7)];
        let kind = [NormKind::Rms, NormKind::RmsOutside, NormKind::Layer][random.int(0, 2)];
        let parameters = random.int(0, 2);
        let dims = [random.int(1, 2), [1, 3, 70][random.int(0, 2)], random.int(1, 5), width];
        let mut inputs = vec![draw(random, &dims, dtype, false), draw(random, &dims, dtype, false)];
        let parameter = |random: &mut Random| random.normal(width).to_dtype(dtype).unwrap();
        inputs.extend((0..parameters).map(|_| parameter(random)));
        let what = format!("{kind:?} {dtype:?} {dims:?} parameters {parameters}");
        agree(&what, &device, &inputs, tolerance(dtype), |x| {
            let norm = Norm { kind, weight: x.get(2), bias: x.get(3), eps: 1e-3, group_size: None };
            Ok(vec![gated_norm(&x[0], &x[1], &norm, true)?])
        });
    }
}
