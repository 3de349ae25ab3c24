//! Rotary position embedding: the formula in every dtype and layout, far positions, gradients, bad input.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use subquadratic::ops::rotary::{positions, rotary_reference};
use subquadratic::ops::{Rotary, RotaryPair, RotaryStyle, Segments, rotary, rotary_pair};

const STYLES: [RotaryStyle; 2] = [RotaryStyle::Half, RotaryStyle::Interleaved];

fn frequencies(pairs: usize) -> Vec<f64> {
    (0..pairs).map(|i| 10_000f64.powf(-(i as f64) / pairs as f64)).collect()
}

/// The formula in plain f64.
fn exact(args: &Rotary) -> Tensor {
    let (b, l, h, k) = args.x.dims4().unwrap();
    let mut y = values(args.x);
    let pairs = args.frequencies.len();
    for (row, line) in y.chunks_mut((h * k).max(1)).enumerate() {
        let position = args.positions[if args.positions.len() == l { row % l } else { row }] as f64;
        for head in line.chunks_mut(k) {
            let x = head.to_vec();
            for (i, w) in args.frequencies.iter().enumerate() {
                let (first, second) = match args.style {
                    RotaryStyle::Half => (i, i + pairs),
                    RotaryStyle::Interleaved => (2 * i, 2 * i + 1),
                };
                let (sin, cos) = (position * w).sin_cos();
                head[first] = x[first] * cos - x[second] * sin;
                head[second] = x[first] * sin + x[second] * cos;
            }
        }
    }
    Tensor::from_vec(y, (b, l, h, k), &Device::Cpu).unwrap()
}

#[test]
fn equals_the_formula_in_every_dtype_and_layout() {
    let random = &mut Random::new(1);
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for style in STYLES {
            for (b, l, h, k, pairs) in
                [(2, 7, 3, 8, 4), (1, 1, 1, 2, 1), (2, 5, 1, 37, 16), (3, 0, 2, 4, 2), (1, 4, 2, 6, 0)]
            {
                let wide = random.normal((b, l, h, k + 3)).to_dtype(dtype).unwrap();
                let x = wide.narrow(3, 2, k).unwrap();
                let frequencies = frequencies(pairs);
                let rows = random.int(0, 1);
                let positions: Vec<usize> =
                    (0..if rows == 0 { l } else { b * l }).map(|_| random.int(0, 1_000_000)).collect();
                let args = Rotary { x: &x, positions: &positions, frequencies: &frequencies, style };
                let want = exact(&args);
                for y in [rotary(&args).unwrap(), rotary_reference(&args).unwrap()] {
                    assert_eq!(y.dtype(), dtype);
                    assert_close(&format!("{dtype:?} {style:?}"), &y, &want, 3.0 * rounding(dtype));
                }
            }
        }
    }
}

/// Both sides are turned, and queries divided by the root of the sum of all decays up to them, added up one by one.
#[test]
fn a_pair_is_both_sides_and_queries_are_scaled() {
    let random = &mut Random::new(4);
    let logs = [-0.3, 0.0, f64::NEG_INFINITY, -1e-6];
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        for style in STYLES {
            let [q, k] = [4, 2].map(|heads| random.normal((2, 3, heads, 6)).to_dtype(dtype).unwrap());
            let (positions, frequencies) = ([0, 1, 5, 900, 2, 7], frequencies(3));
            let log_decay = Some(logs.as_slice());
            let (positions, frequencies) = (positions.as_slice(), frequencies.as_slice());
            let args = RotaryPair { q: &q, k: &k, positions, frequencies, style, log_decay };
            let (got_q, got_k) = rotary_pair(&args).unwrap();
            let side = |x| exact(&Rotary { x, positions, frequencies, style });
            assert_close("keys", &got_k, &side(&k), 3.0 * rounding(dtype));
            let sum = |log: f64, position: usize| -> f64 {
                (0..=position).map(|n| if n == 0 { 1.0 } else { (n as f64 * log).exp() }).sum()
            };
            let factors: Vec<f64> =
                positions.iter().flat_map(|&p| logs.map(|log| sum(log, p).sqrt().recip())).collect();
            let factors = Tensor::from_vec(factors, (2, 3, 4, 1), &Device::Cpu).unwrap();
            let want = side(&q).broadcast_mul(&factors).unwrap();
            assert_close("queries", &got_q, &want, 4.0 * rounding(dtype));
            let plain = rotary_pair(&RotaryPair { log_decay: None, ..args }).unwrap().0;
            assert_close("plain queries", &plain, &side(&q), 3.0 * rounding(dtype));
        }
    }
}

#[test]
fn gradients_of_a_pair_are_finite_differences() {
    let random = &mut Random::new(5);
    let inputs = [random.normal((2, 3, 2, 5)), random.normal((2, 3, 1, 5))];
    let frequencies = frequencies(2);
    for log_decay in [None, Some([-0.5, 0.0].as_slice())] {
        check_gradients("rotary_pair", &["q", "k"], &inputs, |x| {
            let (q, k) = rotary_pair(&RotaryPair {
                q: &x[0],
                k: &x[1],
                positions: &[5, 6, 900],
                frequencies: &frequencies,
                style: RotaryStyle::Interleaved,
                log_decay,
            })?;
            Ok(vec![q, k])
        });
    }
}

#[test]
fn gradients_are_finite_differences() {
    let random = &mut Random::new(2);
    for style in STYLES {
        let x = random.normal((2, 3, 2, 5));
        let frequencies = frequencies(2);
        check_gradients("rotary", &["x"], &[x], |x| {
            Ok(vec![rotary(&Rotary { x: &x[0], positions: &[5, 6, 900], frequencies: &frequencies, style })?])
        });
    }
}

#[test]
fn positions_follow_the_segments() {
    assert_eq!(positions(&[4, 4], None, 3), [4, 5, 6]);
    assert_eq!(positions(&[4, 0], None, 2), [4, 5, 0, 1]);
    let left = Segments::left_padded(&[2, 3], 3).unwrap();
    assert_eq!(positions(&[4, 0], Some(&left), 3), [0, 4, 5, 0, 1, 2]);
    let packed = Segments::packed(&[vec![1, 2]], 4).unwrap();
    assert_eq!(positions(&[9], Some(&packed), 4), [0, 0, 1, 0]);
}

#[test]
fn wrong_arguments_are_named() {
    let x = Random::new(3).normal((2, 3, 2, 4));
    let run = |x: &Tensor, positions: &[usize], frequencies: &[f64]| {
        rotary(&Rotary { x, positions, frequencies, style: RotaryStyle::Half }).unwrap_err().to_string()
    };
    assert!(run(&x.flatten_from(2).unwrap(), &[0, 1, 2], &[1.0]).contains("[B, L, H, K]"));
    assert!(run(&x, &[0, 1], &[1.0]).contains("positions"));
    assert!(run(&x, &[0, 1, 2], &[1.0; 3]).contains("half of K = 4"));
    assert!(run(&x, &[0, 1, 2], &[f64::NAN]).contains("frequencies"));
    assert!(run(&x.to_dtype(DType::U32).unwrap(), &[0, 1, 2], &[1.0]).contains("float"));
    let pair = |q: &Tensor, k: &Tensor, log_decay: &[f64]| {
        let (positions, frequencies) = ([0, 1, 2].as_slice(), [1.0].as_slice());
        let style = RotaryStyle::Half;
        let args = RotaryPair { q, k, positions, frequencies, style, log_decay: Some(log_decay) };
        rotary_pair(&args).unwrap_err().to_string()
    };
    assert!(pair(&x, &x.narrow(1, 0, 2).unwrap(), &[0.0; 2]).contains("k"));
    assert!(pair(&x, &x, &[0.0]).contains("log_decay"));
    assert!(pair(&x, &x, &[0.0, 0.1]).contains("at most 0"));
}
