//! The modal convolution with complex poles and D, and the same through the transforms of its filter.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::{DType, Tensor};
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::modal_conv::modal_filter;
use subquadratic::ops::{LongConv, ModalConv, Poles, long_conv, modal_conv};

/// Sequences, and single steps through the state.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut conv = group(criterion, "modal_conv");
    for shape in bench.shapes("modal_conv") {
        let [b, d, l, s] = shape.sizes(["B", "D", "L", "S"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, [b, l, d, s], dtype)?;
            let id = format!("{}/{}", shape.name, name(dtype));
            let throughput = Throughput::Elements((b * l * d) as u64);
            measure_both(&mut conv, &id, throughput, &inputs, |inputs| Ok(run(inputs, None)?.0));
            let throughput = Throughput::Elements((b * l * d) as u64);
            measure(
                &mut conv,
                format!("{}-fft/{}/fwd", shape.name, name(dtype)),
                throughput,
                &bench.device,
                || {
                    let filter = modal_filter(Poles::Complex(&inputs[1]), &inputs[2], l)?;
                    long_conv(&LongConv { d: Some(&inputs[3]), ..LongConv::new(&inputs[0], &filter) })
                },
            );
            let token = inputs[0].narrow(1, 0, 1)?.contiguous()?;
            let step = [token, inputs[1].clone(), inputs[2].clone(), inputs[3].clone()];
            let state = bench.uniform(&[b, d, s, 2], -1.0..1.0, DType::F32)?;
            let throughput = Throughput::Elements((b * d) as u64);
            measure(&mut conv, format!("{id}/step"), throughput, &bench.device, || run(&step, Some(&state)));
        }
    }
    conv.finish();
    Ok(())
}

/// u, poles, residues, D.
fn inputs(bench: &mut Bench, [b, l, d, s]: [usize; 4], dtype: DType) -> Result<[Tensor; 4]> {
    Ok([
        bench.uniform(&[b, l, d], -1.0..1.0, dtype)?,
        bench.uniform(&[d, s, 2], -0.7..0.7, DType::F32)?,
        bench.uniform(&[d, s, 2], -1.0..1.0, DType::F32)?,
        bench.uniform(&[d], 0.5..1.5, DType::F32)?,
    ])
}

fn run(inputs: &[Tensor], initial_state: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    modal_conv(&ModalConv {
        u: &inputs[0],
        poles: Poles::Complex(&inputs[1]),
        residues: &inputs[2],
        d: Some(&inputs[3]),
        initial_state,
        segments: None,
    })
}
