//! Retention in every form, over lengths, and single steps through the state or through those of a pool.

use crate::support::{Bench, group, measure, measure_both, measure_step, name};
use candle_core::{DType, Tensor};
use criterion::{Criterion, Throughput};
use std::cell::LazyCell;
use subquadratic::Result;
use subquadratic::ops::{Form, Retention, RetentionPool, RetentionPoolConfig, retention};

/// The parallel form takes minutes beyond so many tokens.
const LONGEST_PARALLEL: usize = 4096;

/// Sequences in each form, and steps.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut sequences = group(criterion, "retention");
    let forms = [("", Form::Auto), ("-parallel", Form::Parallel), ("-recurrent", Form::Recurrent)];
    for shape in bench.shapes("retention") {
        let [b, t, h, k, v] = shape.sizes(["B", "T", "H", "K", "V"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, [b, t, h, k, v], dtype)?;
            for (suffix, form) in forms {
                // elsewhere than on the CPU all forms are one
                if form == Form::Parallel && t > LONGEST_PARALLEL
                    || form != Form::Auto && !bench.device.is_cpu()
                {
                    continue;
                }
                let id = format!("{}{suffix}/{}", shape.name, name(dtype));
                let throughput = Throughput::Elements((b * t) as u64);
                if form == Form::Auto {
                    // RetNet's decays do not learn
                    let decays = &inputs[3];
                    measure_both(&mut sequences, &id, throughput, &inputs[..3], |x| {
                        Ok(run(&[x, std::slice::from_ref(decays)].concat(), None, form)?.0)
                    });
                } else {
                    measure(&mut sequences, format!("{id}/fwd"), throughput, &bench.device, || {
                        run(&inputs, None, form)
                    });
                }
            }
        }
    }
    sequences.finish();

    let mut step = group(criterion, "retention_step");
    for shape in bench.shapes("retention_step") {
        let [b, h, k, v] = shape.sizes(["B", "H", "K", "V"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, [b, 1, h, k, v], dtype)?;
            let state = bench.uniform(&[b, h, k, v], -1.0..1.0, DType::F32)?;
            let id = format!("{}/{}", shape.name, name(dtype));
            // the state is read and written
            let throughput = Throughput::Bytes((2 * b * h * k * v * size_of::<f32>()) as u64);
            measure_step(&mut step, &id, throughput, &bench.device, || {
                run(&inputs, Some(&state), Form::Auto)
            });
        }
    }
    step.finish();

    // the same through a pool, its states written at every step or at every eighth
    let mut pooled = group(criterion, "retention_pool");
    for shape in bench.shapes("retention_step") {
        let [b, h, k, v] = shape.sizes(["B", "H", "K", "V"]);
        for &dtype in bench.dtypes() {
            let inputs = inputs(bench, [b, 1, h, k, v], dtype)?;
            let slots: Vec<Option<usize>> = (0..b).rev().map(Some).collect();
            for (suffix, window) in [("", 1), ("-window-8", 8)] {
                let config = RetentionPoolConfig { window, ..RetentionPoolConfig::new(b, h, k, v) };
                let mut pool = LazyCell::new(|| RetentionPool::new(config, &bench.device).expect("a pool"));
                let id = format!("{}{suffix}/{}/step", shape.name, name(dtype));
                let throughput = Throughput::Bytes((2 * b * h * k * v * size_of::<f32>()) as u64);
                measure(&mut pooled, id, throughput, &bench.device, || {
                    pool.step(&args(&inputs, None, Form::Auto), &slots)
                });
            }
        }
    }
    pooled.finish();
    Ok(())
}

/// q, k, v and RetNet's constant decays.
fn inputs(bench: &mut Bench, [b, t, h, k, v]: [usize; 5], dtype: DType) -> Result<[Tensor; 4]> {
    let decays: Vec<f32> = (0..h).map(|h| (-(2f32.powi(-5 - h as i32))).ln_1p()).collect();
    Ok([
        bench.uniform(&[b, t, h, k], -1.0..1.0, dtype)?,
        bench.uniform(&[b, t, h, k], -1.0..1.0, dtype)?,
        bench.uniform(&[b, t, h, v], -1.0..1.0, dtype)?,
        Tensor::new(decays, &bench.device)?,
    ])
}

fn run(inputs: &[Tensor], initial_state: Option<&Tensor>, form: Form) -> Result<(Tensor, Tensor)> {
    retention(&args(inputs, initial_state, form))
}

fn args<'a>(inputs: &'a [Tensor], initial_state: Option<&'a Tensor>, form: Form) -> Retention<'a> {
    Retention {
        q: &inputs[0],
        k: &inputs[1],
        v: &inputs[2],
        log_decay: &inputs[3],
        scale: (inputs[0].dims()[3] as f64).powf(-0.5),
        initial_state,
        segments: None,
        form,
    }
}
