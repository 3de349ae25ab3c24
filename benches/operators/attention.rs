//! Causal attention with grouped queries.

use crate::support::{Bench, group, measure, measure_both, name};
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::attention::causal;
use subquadratic::ops::{Attention, attention};

/// Sequences, and the step of one token behind them.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut all = group(criterion, "attention");
    for shape in bench.shapes("attention") {
        let [b, l, h, g, k] = shape.sizes(["B", "L", "H", "G", "K"]);
        let keys = causal(b, l, l, None);
        let scale = (k as f64).powf(-0.5);
        for &dtype in bench.dtypes() {
            let q = bench.uniform(&[b, l, h, k], -1.0..1.0, dtype)?;
            let inputs = [
                q.clone(),
                bench.uniform(&[b, l, g, k], -1.0..1.0, dtype)?,
                bench.uniform(&[b, l, g, k], -1.0..1.0, dtype)?,
            ];
            let id = format!("{}/{}", shape.name, name(dtype));
            let throughput = Throughput::Elements((b * l) as u64);
            measure_both(&mut all, &id, throughput, &inputs, |x| {
                attention(&Attention { q: &x[0], k: &x[1], v: &x[2], scale, keys: &keys })
            });
            let (last, seen) = (q.narrow(1, l - 1, 1)?.contiguous()?, causal(b, 1, l, None));
            measure(&mut all, format!("{id}/step"), Throughput::Elements(b as u64), &bench.device, || {
                attention(&Attention { q: &last, k: &inputs[1], v: &inputs[2], scale, keys: &seen })
            });
        }
    }
    all.finish();
    Ok(())
}
