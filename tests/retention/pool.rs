//! Pools of states on the CPU.

use crate::pool_laws::*;
use candle_core::{DType, Device};

const SESSION: Session = Session {
    heads: [2, 2, 2],
    keys: 16,
    values: 24,
    per_token: false,
    dtype: DType::F32,
    state: DType::F32,
    window: 1,
};

#[test]
fn rows_come_and_go_and_drafts_are_taken_back() {
    let mut seed = 0;
    for heads in [[2, 2, 2], [4, 2, 1], [1, 2, 4]] {
        for (dtype, state, tolerance) in [
            (DType::F64, DType::F64, 1e-12),
            (DType::F32, DType::F32, 1e-5),
            (DType::BF16, DType::F32, 1e-2),
            (DType::BF16, DType::BF16, 2e-2),
        ] {
            for window in [1, 4] {
                seed += 1;
                let per_token = seed % 2 == 0 || window == 4 && seed % 3 == 0;
                let session = Session { heads, dtype, state, window, per_token, ..SESSION };
                follows_the_operator(&Device::Cpu, session, seed, tolerance);
            }
        }
    }
}

#[test]
fn how_long_a_state_waits_changes_no_bit() {
    for per_token in [false, true] {
        let session = Session { heads: [4, 2, 1], per_token, keys: 7, values: 5, ..SESSION };
        windows_change_no_bit(&Device::Cpu, session, 5, 1e-5);
    }
}

#[test]
fn nonsense_is_refused_by_name() {
    refuses_nonsense(&Device::Cpu);
}

/// The figures that the documentation of `RetentionPoolConfig::dtype` gives.
#[test]
fn states_of_few_bits_drift_as_documented() {
    for (window, most) in [(1, [8e-3, 1e-1]), (8, [3e-3, 2.5e-2])] {
        let drift = drift(&Device::Cpu, window, 4096);
        println!("window {window}: {drift:?}");
        assert!(drift[0] < most[0] && drift[7] < most[1], "window {window}: {drift:?}");
        // rounding there is
        assert!(drift.iter().all(|x| *x > 1e-4), "window {window}: {drift:?}");
    }
}
