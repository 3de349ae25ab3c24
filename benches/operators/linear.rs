//! The products of a model's projections: many tokens at once, and one.

use crate::support::{Bench, group, measure, measure_both, name};
use candle_core::DType;
use criterion::{Criterion, Throughput};
use subquadratic::Result;
use subquadratic::ops::linear;

/// Shapes of one row are steps and count the bytes of the weight, the others count multiply-adds twice.
pub fn all(criterion: &mut Criterion, bench: &mut Bench) -> Result<()> {
    let mut products = group(criterion, "linear");
    for shape in bench.shapes("linear") {
        let [m, k, n] = shape.sizes(["M", "K", "N"]);
        for &dtype in bench.dtypes() {
            let x = bench.uniform(&[m, k], -1.0..1.0, dtype)?;
            let weight = bench.uniform(&[n, k], -0.1..0.1, dtype)?;
            let id = format!("{}/{}", shape.name, name(dtype));
            if m == 1 {
                let throughput = Throughput::Bytes((n * k * dtype.size_in_bytes()) as u64);
                measure(&mut products, format!("{id}/step"), throughput, &bench.device, || {
                    linear(&x, &weight, None)
                });
            } else if dtype == DType::F32 || !bench.device.is_cpu() {
                let throughput = Throughput::Elements((2 * m * n * k) as u64);
                measure_both(&mut products, &id, throughput, &[x, weight], |x| linear(&x[0], &x[1], None));
            }
        }
    }
    products.finish();
    Ok(())
}
