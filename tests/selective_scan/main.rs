//! The selective scan: its recurrence, the streaming law, gradients, the peer's grid.

mod case;
#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Device, Tensor};
use case::*;
use common::*;
use subquadratic::ops::Segments;
use subquadratic::ops::selective_scan::selective_scan_reference;

#[test]
fn equals_the_reference() {
    let random = &mut Random::new(1);
    for seed in 0..40 {
        let channels = [1, 3, 16, 17, 33, 100][random.int(0, 5)];
        let divisors: Vec<usize> = (1..=channels).filter(|g| channels % g == 0).collect();
        let form = |random: &mut Random| match random.int(0, 2) {
            0 => Form::Constant,
            1 => Form::Token(0),
            _ => Form::Token(divisors[random.int(0, divisors.len() - 1)]),
        };
        let mut flag = || random.int(0, 1) == 1;
        let [skip, gate, bias, softplus, state] = [flag(), flag(), flag(), flag(), flag()];
        let (b, c) = (form(random), form(random));
        let (batch, length) = (random.int(1, 3), [1, 2, 4, 5, 23][random.int(0, 4)]);
        let states = [1, 3, 8, 16, 17, 64][random.int(0, 5)];
        let case = Case { batch, length, channels, states, b, c, skip, gate, bias, softplus, state };
        let t = case.tensors(seed);
        let (y, state) = selective_scan_reference(&case.args(&t, None)).unwrap();
        for (got, want) in case.run(&t, None).unwrap().iter().zip([y, state]) {
            assert_close(&format!("{case:?}"), got, &want, 1e-12);
        }
        let truth = oracle(&case, &t);
        for (got, want) in case.all(&t, None).iter().zip(&truth) {
            assert_close(&format!("{case:?} tracked"), got, want, 1e-12);
        }
    }
}

#[test]
fn gradients_are_finite_differences_for_every_set_of_flags() {
    for flags in 0..32usize {
        for (b, c) in [
            (Form::Token(0), Form::Token(2)),
            (Form::Constant, Form::Token(1)),
            (Form::Token(1), Form::Constant),
        ] {
            let bit = |i: usize| flags >> i & 1 == 1;
            let case = Case {
                b,
                c,
                skip: bit(0),
                gate: bit(1),
                bias: bit(2),
                softplus: bit(3),
                state: bit(4),
                ..Case::full(2, 3, 2, 2)
            };
            let t = case.tensors(flags as u64);
            let inputs: Vec<Tensor> = case.differentiable().iter().map(|&i| t[i].clone()).collect();
            let names: Vec<&str> = case.differentiable().iter().map(|&i| NAMES[i]).collect();
            check_gradients(&format!("{case:?}"), &names, &inputs, |x| case.run(&case.place(&t, x), None));
        }
    }
}

#[test]
fn gradients_of_packed_and_padded_rows_are_finite_differences() {
    let case = Case::full(2, 7, 3, 2);
    let t = case.tensors(5);
    let inputs: Vec<Tensor> = case.differentiable().iter().map(|&i| t[i].clone()).collect();
    let marks = Tensor::new(&[[0u8, 0, 1, 0, 2, 1, 0], [2, 0, 0, 2, 2, 0, 0]], &Device::Cpu).unwrap();
    let segments = Segments::from_marks(&marks).unwrap();
    // against candle's own gradients of the reference, which pads and resets token by token
    let (_, got) = gradients(&inputs, |x| case.run(&case.place(&t, x), Some(&segments)));
    let (_, want) = gradients(&inputs, |x| {
        let t = case.place(&t, x);
        let (y, state) = selective_scan_reference(&case.args(&t, Some(&segments)))?;
        Ok(vec![y, state])
    });
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        assert_close(&format!("gradient {i}"), got, want, 1e-10);
    }
}

/// Lengths of the peer's grid, the odd ones of its comments included.
const LENGTHS: [usize; 15] = [1, 8, 16, 32, 64, 128, 129, 256, 372, 512, 784, 1024, 1134, 2048, 4096];

#[test]
fn the_peers_grid_in_every_dtype() {
    // relative RMS error; the peer allows 6e-4, 3e-3 and 3e-2 of every element
    let dtypes = [(DType::F64, 1e-11), (DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 1.5e-2)];
    for (i, &length) in LENGTHS.iter().enumerate() {
        for flags in 0..32usize {
            if length > 128 && flags % 8 != i % 8 && flags != 31 {
                continue;
            }
            let bit = |i: usize| flags >> i & 1 == 1;
            let groups = 1 + (flags + i) % 2;
            let case = Case {
                b: if (flags + i) % 5 == 0 { Form::Constant } else { Form::Token(groups) },
                c: if (flags + i) % 7 == 0 { Form::Constant } else { Form::Token(groups) },
                skip: bit(0),
                gate: bit(1),
                bias: bit(2),
                softplus: bit(3),
                state: bit(4),
                ..Case::full(2, length, 4, 8)
            };
            let (dtype, tolerance) = dtypes[(flags + i) % 4];
            let low = cast(&case.tensors(flags as u64), dtype);
            let exact = widen(&low);
            for (got, want) in case.run(&low, None).unwrap().iter().zip(oracle(&case, &exact)) {
                assert_close(&format!("{case:?} {dtype:?}"), got, &want, tolerance);
            }
            for (k, (got, want)) in case.all(&low, None).iter().zip(case.all(&exact, None)).enumerate() {
                assert_close(&format!("{case:?} {dtype:?} result {k}"), got, &want, tolerance);
            }
        }
    }
}

#[test]
fn any_cut_gives_the_same() {
    let random = &mut Random::new(3);
    for (seed, length) in [2, 7, 130, 300, 700].into_iter().enumerate() {
        for channels in [5, 40] {
            let case = Case { state: seed % 2 == 0, ..Case::full(2, length, channels, 4) };
            let t = case.tensors(seed as u64);
            let pieces = match length {
                7 => vec![1; 7],
                _ => random.split(length, 2.min(length) + seed % 3, 0),
            };
            let used = case.differentiable();
            let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
            let (outputs, cut) = gradients(&inputs, |x| case.in_pieces(&case.place(&t, x), &pieces));
            let got: Vec<Tensor> = outputs.into_iter().chain(cut).collect();
            for (k, (got, want)) in got.iter().zip(case.all(&t, None)).enumerate() {
                assert_close(&format!("{case:?} {pieces:?} result {k}"), got, &want, 1e-11);
            }
        }
    }
}

#[test]
fn packed_rows_are_the_rows() {
    let random = &mut Random::new(4);
    for seed in 0..6 {
        let (length, channels) = ([9, 140, 400][seed % 3], [3, 20][seed % 2]);
        let case = Case { state: false, ..Case::full(1, length, channels, 4) };
        let t = case.tensors(seed as u64);
        let lengths = random.split(length, 3, 1);
        let segments = Segments::packed(std::slice::from_ref(&lengths), length).unwrap();
        let packed = case.all(&t, Some(&segments));
        let used = case.differentiable();
        let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
        let alone = |x: &[Tensor]| {
            let t = case.place(&t, x);
            let (mut start, mut ys, mut last) = (0, vec![], vec![]);
            for &length in &lengths {
                let part = Case { length, ..case };
                last = part.run(&case.narrow(&t, start, length), None)?;
                ys.push(last[0].clone());
                start += length;
            }
            Ok(vec![Tensor::cat(&ys, 1)?, last[1].clone()])
        };
        let (outputs, gradients) = gradients(&inputs, alone);
        let want: Vec<Tensor> = outputs.into_iter().chain(gradients).collect();
        for (k, (got, want)) in packed.iter().zip(&want).enumerate() {
            assert_close(&format!("{case:?} {lengths:?} result {k}"), got, want, 1e-11);
        }
    }
}

#[test]
fn padded_rows_are_the_bare_rows() {
    let (length, lengths) = (150, [150, 1, 0, 37]);
    let case = Case::full(4, length, 18, 4);
    let t = case.tensors(9);
    let left = Segments::left_padded(&lengths, length).unwrap();
    let right = Segments::right_padded(&lengths, length).unwrap();
    for (side, segments) in [(0, left), (1, right)] {
        let got = case.all(&t, Some(&segments));
        for (row, &n) in lengths.iter().enumerate() {
            let start = if side == 0 { length - n } else { 0 };
            let one: Vec<Tensor> = t
                .iter()
                .enumerate()
                .map(|(i, t)| if [2, 5, 7].contains(&i) { t.clone() } else { t.narrow(0, row, 1).unwrap() })
                .collect();
            let bare = Case { batch: 1, length: n, ..case };
            let want = bare.run(&case.narrow(&one, start, n), None).unwrap();
            let y = got[0].narrow(0, row, 1).unwrap();
            if n > 0 {
                assert_close("outputs", &y.narrow(1, start, n).unwrap(), &want[0], 1e-12);
            }
            assert_close("state", &got[1].narrow(0, row, 1).unwrap(), &want[1], 1e-12);
            let padding = if side == 0 { y.narrow(1, 0, start) } else { y.narrow(1, n, length - n) };
            assert!(values(&padding.unwrap()).iter().all(|&x| x == 0.0));
            let du = got[2].narrow(0, row, 1).unwrap();
            let padding = if side == 0 { du.narrow(1, 0, start) } else { du.narrow(1, n, length - n) };
            assert!(values(&padding.unwrap()).iter().all(|&x| x == 0.0));
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for case in [Case::full(1, 1500, 3, 16), Case::full(2, 300, 70, 5)] {
        let t = cast(&case.tensors(2), DType::F32);
        let run = || case.all(&t, None).iter().flat_map(bits).collect::<Vec<_>>();
        let want = with_threads(1, run);
        for threads in [2, 3, 5] {
            assert!(with_threads(threads, run) == want, "{case:?} with {threads} threads");
        }
    }
}

#[test]
fn slices_many_states_and_no_tokens() {
    let case = Case::full(2, 20, 12, 256);
    let t = case.tensors(7);
    let wide = Tensor::cat(&[&t[0], &t[6]], 2).unwrap();
    let mut sliced = t.clone();
    (sliced[0], sliced[6]) = (wide.narrow(2, 0, 12).unwrap(), wide.narrow(2, 12, 12).unwrap());
    for (got, want) in case.run(&sliced, None).unwrap().iter().zip(oracle(&case, &t)) {
        assert_close("slices", got, &want, 1e-12);
    }
    let none = Case { length: 0, ..case };
    let empty = none.narrow(&t, 0, 0);
    let outputs = none.run(&empty, None).unwrap();
    assert_eq!(outputs[0].dims(), [2, 0, 12]);
    assert_close("state", &outputs[1], &t[8], 0.0);
}

#[test]
fn a_wrong_argument_is_named() {
    let case = Case::full(2, 5, 6, 4);
    for (i, name) in NAMES.iter().enumerate() {
        let mut t = case.tensors(1);
        t[i] = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let error = case.run(&t, None).unwrap_err().to_string();
        assert!(error.contains(&format!("selective_scan: {name}:")), "{error}");
        assert!(error.contains("[2, 3]"), "{error}");
    }
    let segments = Segments::right_padded(&[1, 2, 3], 5).unwrap();
    let error = case.run(&case.tensors(1), Some(&segments)).unwrap_err().to_string();
    assert!(error.contains("segments"), "{error}");
}
