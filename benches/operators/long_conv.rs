//! The long convolution with everything Hyena asks of it: a filter per channel as long as the sequence, D, both gates.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::DType;
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::{LongConv, LongConvState, StreamConv, long_conv};

/// Sequences.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut convolution = group(criterion, "long_conv");
    for shape in bench.shapes("long_conv") {
        let [b, d, l] = shape.sizes(["B", "D", "L"]);
        for &dtype in bench.dtypes() {
            let x = bench.uniform(&[b, l, d], -1.0..1.0, dtype)?;
            let filter = bench.uniform(&[l, d], -0.1..0.1, DType::F32)?;
            let inputs = [x.clone(), filter, bench.uniform(&[d], 0.5..1.5, DType::F32)?, x.clone(), x];
            let id = format!("{}/{}", shape.name, name(dtype));
            measure_both(
                &mut convolution,
                &id,
                Throughput::Elements((b * l * d) as u64),
                &inputs,
                |inputs| {
                    long_conv(&LongConv {
                        taps_first: true,
                        d: Some(&inputs[2]),
                        pre_gate: Some(&inputs[3]),
                        post_gate: Some(&inputs[4]),
                        ..LongConv::new(&inputs[0], &inputs[1])
                    })
                },
            );
        }
    }
    convolution.finish();
    steps(criterion, bench)
}

/// `L` tokens, one by one through a state, of sequences that begin empty.
fn steps(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut step = group(criterion, "long_conv_step");
    for shape in bench.shapes("long_conv_step") {
        let [b, d, l] = shape.sizes(["B", "D", "L"]);
        let dtype = DType::F32;
        let x = bench.uniform(&[b, 1, d], -1.0..1.0, dtype)?;
        let filter = bench.uniform(&[l, d], -0.1..0.1, dtype)?.t()?;
        let stream = StreamConv::new(&filter, None, d)?;
        let id = format!("{}/{}/step", shape.name, name(dtype));
        let device = bench.device.clone();
        measure(&mut step, id, Throughput::Elements(l as u64), &device, || {
            let mut state = LongConvState::new(b, d, dtype, &device)?;
            for _ in 1..l {
                stream.forward(&x, [None, None], None, &mut state)?;
            }
            stream.forward(&x, [None, None], None, &mut state)
        });
    }
    step.finish();
    Ok(())
}
