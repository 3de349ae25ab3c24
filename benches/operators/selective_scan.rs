//! The selective scan with everything Mamba asks of it: groups of B and C per token, D, z, delta bias, softplus.

use crate::support::{Bench, Shape, group, measure_both, measure_step, name};
use candle_core::{DType, Tensor};
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::{SelectiveScan, selective_scan};

/// Sequences, and single steps through the state.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut scan = group(criterion, "selective_scan");
    for shape in bench.shapes("selective_scan") {
        let [b, d, l] = shape.sizes(["B", "D", "L"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, &shape, l, dtype)?;
            let id = format!("{}/{}", shape.name, name(dtype));
            let throughput = Throughput::Elements((b * l * d) as u64);
            measure_both(&mut scan, &id, throughput, &inputs, |inputs| Ok(run(inputs, None)?.0));
        }
    }
    scan.finish();

    let mut step = group(criterion, "selective_state_update");
    for shape in bench.shapes("selective_state_update") {
        let [b, d, n] = shape.sizes(["B", "D", "N"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, &shape, 1, dtype)?;
            let state = bench.uniform(&[b, d, n], -1.0..1.0, DType::F32)?;
            let id = format!("{}/{}", shape.name, name(dtype));
            let throughput = Throughput::Elements((b * d * n) as u64);
            measure_step(&mut step, &id, throughput, &bench.device, || run(&inputs, Some(&state)));
        }
    }
    step.finish();
    Ok(())
}

/// u, delta, A, B, C, D, z, delta bias.
fn inputs(bench: &mut Bench, shape: &Shape, l: usize, dtype: DType) -> Result<[Tensor; 8]> {
    let [b, d, n] = shape.sizes(["B", "D", "N"]);
    let wide = DType::F32;
    Ok([
        bench.uniform(&[b, l, d], -1.0..1.0, dtype)?,
        bench.uniform(&[b, l, d], 0.0..0.5, dtype)?,
        bench.uniform(&[d, n], -1.0..-0.1, wide)?,
        bench.uniform(&[b, l, n], -1.0..1.0, dtype)?,
        bench.uniform(&[b, l, n], -1.0..1.0, dtype)?,
        bench.uniform(&[d], 0.5..1.5, wide)?,
        bench.uniform(&[b, l, d], -1.0..1.0, dtype)?,
        bench.uniform(&[d], -4.0..-1.0, wide)?,
    ])
}

fn run(inputs: &[Tensor], initial_state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    selective_scan(&SelectiveScan {
        u: &inputs[0],
        delta: &inputs[1],
        a: &inputs[2],
        b: &inputs[3],
        c: &inputs[4],
        d: Some(&inputs[5]),
        z: Some(&inputs[6]),
        delta_bias: Some(&inputs[7]),
        softplus: true,
        initial_state,
        segments: None,
    })
}
