//! Norms.

use crate::agree::{agree, tolerance};
use crate::common::*;
use crate::gpu;
use candle_core::{DType, Tensor};
use subquadratic::ops::norm::{Norm, NormKind, add_norm, gated_norm, norm};

#[test]
fn every_form_kind_and_dtype() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(1);
    for seed in 0..160 {
        let (groups, size) = (random.int(1, 3), [1, 5, 8, 64, 200, 513, 768, 1024, 2560][random.int(0, 8)]);
        let channels = groups * size;
        let rows = [1, 2, 5, 33][random.int(0, 3)];
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let kind = [NormKind::Rms, NormKind::Layer][random.int(0, 1)];
        let form = seed / 3 % 5;
        let (weighted, biased) = (random.int(0, 3) > 0, random.int(0, 1) == 1);
        let wide = random.normal((2, rows, 2 * channels)).to_dtype(dtype).unwrap();
        let x = wide.narrow(2, channels * random.int(0, 1), channels).unwrap();
        let second = random.normal((2, rows, channels));
        let second = second.to_dtype(if form == 2 { DType::F32 } else { dtype }).unwrap();
        let mut inputs = vec![x];
        inputs.extend((form > 0).then_some(second));
        inputs.extend(weighted.then(|| random.normal(channels).to_dtype(DType::F32).unwrap()));
        inputs.extend(biased.then(|| random.normal(channels).to_dtype(dtype).unwrap()));
        let what = format!("{kind:?} form {form} {dtype:?} rows {rows} groups {groups} of {size}");
        agree(&what, &device, &inputs, tolerance(dtype), |x| {
            let mut rest = x.iter().skip(1 + (form > 0) as usize);
            let weight: Option<&Tensor> = if weighted { rest.next() } else { None };
            let bias = if biased { rest.next() } else { None };
            let n = Norm { kind, weight, bias, eps: 1e-3, group_size: (groups > 1).then_some(size) };
            Ok(match form {
                0 => vec![norm(&x[0], &n)?],
                1 | 2 => {
                    let (sum, y) = add_norm(&x[1], &x[0], &n)?;
                    vec![y, sum]
                }
                3 => vec![gated_norm(&x[0], &x[1], &n, false)?],
                _ => vec![gated_norm(&x[0], &x[1], &n, true)?],
            })
        });
    }
}
