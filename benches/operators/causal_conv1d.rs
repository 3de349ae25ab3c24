//! The causal convolution with bias and SiLU.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::{DType, Tensor};
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::{CausalConv1d, causal_conv1d};

/// Sequences, and single steps through the state.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut conv = group(criterion, "causal_conv1d");
    for shape in bench.shapes("causal_conv1d") {
        let [b, d, l, k] = shape.sizes(["B", "D", "L", "K"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, [b, l, d, k], dtype)?;
            let id = format!("{}/{}", shape.name, name(dtype));
            let throughput = Throughput::Elements((b * l * d) as u64);
            measure_both(&mut conv, &id, throughput, &inputs, |inputs| Ok(run(inputs, None)?.0));
        }
    }
    conv.finish();

    let mut step = group(criterion, "causal_conv1d_update");
    for shape in bench.shapes("causal_conv1d_update") {
        let [b, d, k] = shape.sizes(["B", "D", "K"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, [b, 1, d, k], dtype)?;
            let state = bench.uniform(&[b, d, k - 1], -1.0..1.0, DType::F32)?;
            let id = format!("{}/{}/step", shape.name, name(dtype));
            let throughput = Throughput::Elements((b * d) as u64);
            measure(&mut step, id, throughput, &bench.device, || run(&inputs, Some(&state)));
        }
    }
    step.finish();
    Ok(())
}

/// x, weight, bias.
fn inputs(bench: &mut Bench, [b, l, d, k]: [usize; 4], dtype: DType) -> Result<[Tensor; 3]> {
    Ok([
        bench.uniform(&[b, l, d], -1.0..1.0, dtype)?,
        bench.uniform(&[d, k], -0.5..0.5, dtype)?,
        bench.uniform(&[d], -0.5..0.5, dtype)?,
    ])
}

fn run(inputs: &[Tensor], initial_state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    causal_conv1d(&CausalConv1d {
        x: &inputs[0],
        weight: &inputs[1],
        bias: Some(&inputs[2]),
        silu: true,
        initial_state,
        segments: None,
    })
}
