//! Benchmarks of the operators, layers and models.
//!
//! Ids are `<operator>/<shape>/<dtype>/<fwd|fwd_bwd|step|graph>`, shapes are those of `shapes.json`: the ones named `cpu-...`
//! on the CPU, all of them on a GPU (feature `cuda`).
//!
//! ```text
//! cargo bench                                  everything
//! cargo bench -- --quick                       the same in a few minutes
//! cargo bench -- selective_scan/cpu-130m/f32   what the filter matches
//! cargo bench -- --test                        each once, unmeasured
//! ```
//!
//! `peers.py` measures other implementations beside this one.

mod layers;
mod models;
mod operators;
mod support;

use criterion::Criterion;
use support::Bench;

fn main() -> subquadratic::Result<()> {
    subquadratic::reuse_memory();
    let mut criterion = Criterion::default().configure_from_args();
    let mut bench = Bench::new()?;
    operators::selective_scan::all(&mut criterion, &mut bench)?;
    operators::retention::all(&mut criterion, &mut bench)?;
    operators::causal_conv1d::all(&mut criterion, &mut bench)?;
    operators::modal_conv::all(&mut criterion, &mut bench)?;
    operators::attention::all(&mut criterion, &mut bench)?;
    operators::norm::all(&mut criterion, &mut bench)?;
    operators::linear::all(&mut criterion, &mut bench)?;
    operators::long_conv::all(&mut criterion, &mut bench)?;
    layers::all(&mut criterion, &mut bench)?;
    models::all(&mut criterion, &mut bench)?;
    criterion.final_summary();
    Ok(())
}
