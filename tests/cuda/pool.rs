//! Pools of states for retention: in place, against the operator on the CPU.

use crate::gpu;
use crate::pool_laws::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{RetentionPool, RetentionPoolConfig};

const SESSION: Session = Session {
    heads: [2, 2, 2],
    keys: 64,
    values: 72,
    per_token: false,
    dtype: DType::F32,
    state: DType::F32,
    window: 1,
};

#[test]
fn rows_come_and_go_and_drafts_are_taken_back() {
    let Some(device) = gpu() else { return };
    let mut seed = 0;
    // 520 is more than kernels have room for
    for (keys, values) in [(64, 72), (7, 5), (100, 130), (256, 64), (512, 33), (520, 8)] {
        for (dtype, state, tolerance) in [
            (DType::F32, DType::F32, 1e-5),
            (DType::BF16, DType::F32, 1e-2),
            (DType::F16, DType::F32, 2e-3),
            (DType::BF16, DType::BF16, 2e-2),
            (DType::F32, DType::BF16, 2e-2),
            (DType::F64, DType::F64, 1e-10),
        ] {
            seed += 1;
            let heads = [[2, 2, 2], [4, 2, 1], [1, 2, 4]][seed as usize % 3];
            let window = [1, 4, 8, 13][seed as usize / 2 % 4];
            let per_token = seed % 5 < 2;
            let session = Session { heads, keys, values, per_token, dtype, state, window };
            follows_the_operator(&device, session, seed, tolerance);
        }
    }
}

#[test]
fn how_long_a_state_waits_changes_no_bit() {
    let Some(device) = gpu() else { return };
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 1e-2)] {
        for per_token in [false, true] {
            let session = Session { heads: [4, 2, 1], per_token, dtype, ..SESSION };
            windows_change_no_bit(&device, session, 5, tolerance);
        }
    }
}

#[test]
fn nonsense_is_refused_by_name() {
    let Some(device) = gpu() else { return };
    refuses_nonsense(&device);
}

/// The same rounding as on the CPU: the drift of states in bf16 is the same.
#[test]
fn states_of_few_bits_drift_as_on_the_cpu() {
    let Some(device) = gpu() else { return };
    for window in [1, 8] {
        let (got, want) = (drift(&device, window, 1024), drift(&Device::Cpu, window, 1024));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() < 0.1 * want, "window {window}: {got:.2e} {want:.2e}");
        }
    }
}

/// More rows and heads than one launch has blocks for.
#[test]
fn more_rows_than_a_grid_has() {
    let Some(device) = gpu() else { return };
    let (rows, heads) = (300, 256);
    let config = RetentionPoolConfig { window: 2, ..RetentionPoolConfig::new(rows, heads, 4, 4) };
    let mut pool = RetentionPool::new(config, &device).unwrap();
    let ones = |width| Tensor::ones((rows, 1, heads, width), DType::F32, &device).unwrap();
    let t = [ones(4), ones(4), ones(4), Tensor::zeros(heads, DType::F32, &device).unwrap()];
    let slots: Vec<Option<usize>> = (0..rows).rev().map(|slot| (slot != 7).then_some(slot)).collect();
    for token in 1..=3 {
        let o = pool.step(&args(&t), &slots).unwrap();
        let o = o.flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
        for (row, slot) in o.iter().zip(&slots) {
            let want = if slot.is_some() { 0.3 * 4.0 * token as f32 } else { 0.0 };
            assert!(row.iter().all(|x| (x - want).abs() < 1e-5), "{:?} {want}", row[0]);
        }
    }
}
