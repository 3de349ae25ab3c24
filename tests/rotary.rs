//! Rotary position embedding: its formula at every position, styles, dtypes, layouts, gradients, threads.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use subquadratic::ops::rotary::{inverse_frequencies, rotary_reference};
use subquadratic::ops::{Positions, Rotary, RotaryStyle, Segments, rotary};

const STYLES: [RotaryStyle; 2] = [RotaryStyle::Half, RotaryStyle::Interleaved];

/// The formula in plain f64.
fn formula(x: &Tensor, positions: &[i64], frequencies: &[f64], style: RotaryStyle) -> Tensor {
    let (.., heads, width) = x.dims4().unwrap();
    let mut v = values(x);
    for (head, v) in v.chunks_mut(width).enumerate() {
        for (i, f) in frequencies.iter().enumerate() {
            let (a, b) = match style {
                RotaryStyle::Half => (i, i + frequencies.len()),
                RotaryStyle::Interleaved => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (positions[head / heads] as f64 * f).sin_cos();
            (v[a], v[b]) = (v[a] * cos - v[b] * sin, v[b] * cos + v[a] * sin);
        }
    }
    Tensor::from_vec(v, x.shape(), &Device::Cpu).unwrap()
}

fn counted<'a>(offsets: &'a [usize], segments: Option<&'a Segments>) -> Positions<'a> {
    Positions::Counted { offsets, segments }
}

#[test]
fn equals_the_formula() {
    let random = &mut Random::new(1);
    for seed in 0..60usize {
        let (b, h) = (random.int(1, 3), random.int(1, 5));
        let l = [0, 1, 7, 200, 300][random.int(0, 4)];
        let k = [2, 6, 16, 33, 64, 80][random.int(0, 5)];
        let turned = if seed % 3 == 0 { k / 2 } else { random.int(1, k / 2) };
        let frequencies = inverse_frequencies(2 * turned, 10_000.0, if seed % 2 == 0 { 1.0 } else { 16.0 });
        let style = STYLES[seed % 2];
        let dtype = [DType::F64, DType::F32, DType::BF16, DType::F16][seed % 4];
        let wide = random.normal((b, l, h, 2 * k)).to_dtype(dtype).unwrap();
        // a slice, whose rows lie apart
        let x = wide.narrow(3, k / 2, k).unwrap();
        let offsets: Vec<usize> = (0..b).map(|_| random.int(0, 1_000_000)).collect();
        let positions: Vec<i64> = offsets.iter().flat_map(|&o| (0..l).map(move |t| (o + t) as i64)).collect();
        let want = formula(&x, &positions, &frequencies, style);
        let ids = Tensor::from_vec(positions, (b, l), &Device::Cpu).unwrap();
        let ids = if seed % 5 == 0 { ids } else { ids.to_dtype(DType::U32).unwrap() };
        for positions in [counted(&offsets, None), Positions::Ids(&ids)] {
            let args = Rotary { x: &x, positions, inverse_frequencies: &frequencies, style, inverse: false };
            let tolerance = if dtype == DType::F64 { 1e-9 } else { 3.0 * rounding(dtype) };
            for y in [rotary(&args).unwrap(), rotary_reference(&args).unwrap()] {
                assert_eq!(y.dtype(), dtype);
                assert_close(&format!("{style:?} {dtype:?} {b} {l} {h} {k}"), &y, &want, tolerance);
                let back = rotary(&Rotary { x: &y, inverse: true, ..args }).unwrap();
                assert_close("turned back", &back, &x, 2.0 * tolerance);
            }
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    let random = &mut Random::new(2);
    for style in STYLES {
        let x = random.normal((2, 3, 2, 7));
        let frequencies = inverse_frequencies(6, 100.0, 1.0);
        let positions = counted(&[5, 0], None);
        check_gradients(&format!("{style:?}"), &["x"], &[x], |x| {
            let args =
                Rotary { x: &x[0], positions, inverse_frequencies: &frequencies, style, inverse: false };
            Ok(vec![rotary(&args)?])
        });
    }
}

#[test]
fn positions_follow_the_segments() {
    let marks = Tensor::new(&[[0u8, 0, 1, 0, 2, 0], [2, 2, 0, 0, 1, 0]], &Device::Cpu).unwrap();
    let segments = Segments::from_marks(&marks).unwrap();
    let ids = Tensor::new(&[[4i64, 5, 0, 1, 0, 2], [0, 0, 7, 8, 0, 1]], &Device::Cpu).unwrap();
    let x = Random::new(3).normal((2, 6, 1, 4));
    let run = |positions| {
        let style = RotaryStyle::Half;
        let args = Rotary { x: &x, positions, inverse_frequencies: &[1.0, 0.1], style, inverse: false };
        rotary(&args).unwrap()
    };
    assert_eq!(bits(&run(counted(&[4, 7], Some(&segments)))), bits(&run(Positions::Ids(&ids))));
}

#[test]
fn threads_change_no_bit() {
    let x = Random::new(4).normal((2, 700, 3, 32)).to_dtype(DType::F32).unwrap();
    let frequencies = inverse_frequencies(32, 10_000.0, 1.0);
    let run = || {
        let (positions, style) = (counted(&[], None), RotaryStyle::Half);
        bits(
            &rotary(&Rotary { x: &x, positions, inverse_frequencies: &frequencies, style, inverse: false })
                .unwrap(),
        )
    };
    let one = with_threads(1, run);
    assert!((2..5).all(|threads| with_threads(threads, run) == one));
}

#[test]
fn bad_input_is_named() {
    let x = Tensor::zeros((2, 3, 1, 4), DType::F32, &Device::Cpu).unwrap();
    let args = Rotary {
        x: &x,
        positions: counted(&[], None),
        inverse_frequencies: &[1.0, 0.5],
        style: RotaryStyle::Half,
        inverse: false,
    };
    let fails = |args: Rotary| rotary(&args).unwrap_err().to_string();
    assert!(fails(Rotary { inverse_frequencies: &[1.0; 3], ..args }).contains("at most K / 2 = 2"));
    assert!(fails(Rotary { inverse_frequencies: &[f64::NAN], ..args }).contains("inverse_frequencies"));
    assert!(fails(Rotary { positions: counted(&[1], None), ..args }).contains("offsets"));
    let ids = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(fails(Rotary { positions: Positions::Ids(&ids), ..args }).contains("positions"));
    let flat = x.flatten_all().unwrap();
    assert!(fails(Rotary { x: &flat, ..args }).contains("[B, L, H, K]"));
}
