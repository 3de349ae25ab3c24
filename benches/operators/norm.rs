//! RMS norm, layer norm, the residual sum with its norm, and the gated norm.

use crate::support::{Bench, group, measure_both, name};
use candle_core::Tensor;
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::{Norm, NormKind, add_norm, gated_norm, layer_norm, rms_norm};

type Run = fn(&[Tensor]) -> Result<Tensor>;

/// Their inputs are `[B, L, D]` rows (one or two) and the weights `[D]`.
const OPERATORS: [(&str, usize, usize, Run); 4] = [
    ("rms_norm", 1, 1, |x| rms_norm(&x[0], Some(&x[1]), 1e-5)),
    ("layer_norm", 1, 2, |x| layer_norm(&x[0], Some(&x[1]), Some(&x[2]), 1e-5)),
    ("add_norm", 2, 1, |x| Ok(add_norm(&x[0], &x[1], &rms(&x[2]))?.1)),
    ("gated_norm", 2, 1, |x| gated_norm(&x[0], &x[1], &rms(&x[2]), false)),
];

/// All of them over the shapes of "norm".
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    for (operator, rows, weights, run) in OPERATORS {
        let mut group = group(criterion, operator);
        for shape in bench.shapes("norm") {
            let [b, l, d] = shape.sizes(["B", "L", "D"]);
            for &dtype in bench.dtypes() {
                let mut inputs = vec![];
                for _ in 0..rows {
                    inputs.push(bench.uniform(&[b, l, d], -1.0..1.0, dtype)?);
                }
                for _ in 0..weights {
                    inputs.push(bench.uniform(&[d], 0.5..1.5, dtype)?);
                }
                let id = format!("{}/{}", shape.name, name(dtype));
                let throughput = Throughput::Elements((b * l * d) as u64);
                measure_both(&mut group, &id, throughput, &inputs, run);
            }
        }
        group.finish();
    }
    Ok(())
}

fn rms(weight: &Tensor) -> Norm<'_> {
    Norm { kind: NormKind::Rms, weight: Some(weight), bias: None, eps: 1e-5, group_size: None }
}
