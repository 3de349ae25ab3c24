//! The selective scan.

use crate::agree::{agree, to, tolerance};
use crate::case::*;
use crate::common::*;
use crate::gpu;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::Segments;

fn random_case(random: &mut Random, lengths: &[usize]) -> Case {
    let channels = [1, 3, 8, 16, 33, 64, 100, 136, 300][random.int(0, 8)];
    let divisors: Vec<usize> = (1..=channels).filter(|g| channels % g == 0).collect();
    let form = |random: &mut Random| match random.int(0, 4) {
        0 => Form::Constant,
        1 | 2 => Form::Token(0),
        _ => Form::Token(divisors[random.int(0, divisors.len() - 1)]),
    };
    let (b, c) = (form(random), form(random));
    let mut flag = || random.int(0, 1) == 1;
    let [skip, gate, bias, softplus, state] = [flag(), flag(), flag(), flag(), flag()];
    let batch = random.int(1, 3);
    let length = lengths[random.int(0, lengths.len() - 1)];
    let states = [1, 3, 8, 16, 16, 16, 17, 64, 128, 200, 256][random.int(0, 10)];
    Case { batch, length, channels, states, b, c, skip, gate, bias, softplus, state }
}

/// Random marks: some beginnings, some padding.
fn random_segments(random: &mut Random, batch: usize, length: usize) -> Segments {
    let marks: Vec<u8> =
        (0..batch * length).map(|_| [0, 0, 0, 0, 0, 0, 0, 0, 1, 2][random.int(0, 9)]).collect();
    Segments::from_marks(&Tensor::from_vec(marks, (batch, length), &Device::Cpu).unwrap()).unwrap()
}

/// Results and gradients of a case on both devices.
fn compare(device: &Device, case: &Case, t: &[Tensor], segments: Option<&Segments>, tolerance: f64) {
    let used = case.differentiable();
    let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
    let names: Vec<&str> = used.iter().map(|&i| NAMES[i]).collect();
    let what = format!("{case:?} {:?} segments {} {names:?}", t[0].dtype(), segments.is_some());
    let other = to(t, device);
    agree(&what, device, &inputs, tolerance, |x| {
        let t = if x[0].device().is_cpu() { t } else { &other };
        case.run(&case.place(t, x), segments)
    });
}

#[test]
fn any_shape_flag_and_dtype() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(1);
    for seed in 0..120 {
        let case = random_case(random, &[1, 2, 5, 15, 16, 17, 40, 100, 131]);
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let t = cast(&case.tensors(seed as u64), dtype);
        let segments = random_segments(random, case.batch, case.length);
        let segments = (random.int(0, 2) == 0).then_some(&segments);
        compare(&device, &case, &t, segments, tolerance(dtype));
    }
}

/// States that do not fill the lanes they are spread over.
#[test]
fn steps_with_idle_lanes() {
    let Some(device) = gpu() else { return };
    for (i, states) in [4, 12, 20, 24, 36, 40, 72].into_iter().enumerate() {
        for length in 1..=3 {
            let case = Case::full(2, length, 40, states);
            let dtype = [DType::F32, DType::BF16, DType::F16][(i + length) % 3];
            let t = cast(&case.tensors(states as u64), dtype);
            let want = case.run(&t, None).unwrap();
            let got = case.run(&to(&t, &device), None).unwrap();
            for (k, (got, want)) in got.iter().zip(&want).enumerate() {
                let what = format!("{case:?} {dtype:?} result {k}");
                assert_close(&what, &got.to_device(&Device::Cpu).unwrap(), want, tolerance(dtype));
            }
        }
    }
}

#[test]
fn time_cut_into_chunks() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(2);
    for seed in 0..24 {
        let case = random_case(random, &[256, 300, 777, 2048]);
        let case = Case { states: case.states.min(64), channels: case.channels.min(64), ..case };
        let case = Case { b: Form::Token(0), c: Form::Token(0), ..case };
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let mut t = case.tensors(seed as u64);
        if seed % 2 == 0 {
            // decays so slow that a chunk remembers all of the one before
            t[2] = (&t[2] * 0.02).unwrap();
        }
        let t = cast(&t, dtype);
        let segments = random_segments(random, case.batch, case.length);
        let segments = (seed % 4 == 3).then_some(&segments);
        compare(&device, &case, &t, segments, 3.0 * tolerance(dtype));
        let truth = oracle(&case, &widen(&t));
        if segments.is_none() {
            for (got, want) in case.run(&to(&t, &device), None).unwrap().iter().zip(&truth) {
                assert_close(
                    &format!("{case:?}"),
                    &got.to_device(&Device::Cpu).unwrap(),
                    want,
                    3.0 * tolerance(dtype),
                );
            }
        }
    }
}

/// Channels that fill no vectors, with states so wide that a lane has one channel.
#[test]
fn time_cut_where_sequences_are_not_aligned() {
    let Some(device) = gpu() else { return };
    for (i, (channels, states)) in [(7, 200), (9, 130), (7, 16), (3, 64)].into_iter().enumerate() {
        let dtype = [DType::BF16, DType::F32][i % 2];
        let case = Case::full(1, 600, channels, states);
        let t = cast(&case.tensors(i as u64), dtype);
        compare(&device, &case, &t, None, 3.0 * tolerance(dtype));
    }
}

/// Whole tiles with softplus and a gate, which take a way of their own, and ends that are not.
#[test]
fn whole_tiles() {
    let Some(device) = gpu() else { return };
    for (i, (batch, length, channels)) in
        [(2, 64, 64), (1, 96, 256), (3, 75, 128), (2, 160, 96)].into_iter().enumerate()
    {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let case = Case::full(batch, length, channels, 16);
            let t = cast(&case.tensors(i as u64), dtype);
            compare(&device, &case, &t, None, tolerance(dtype));
        }
    }
}

/// Channels that some more blocks take than run at a time on 132 multiprocessors: these hand on what they leave of a chain.
#[test]
fn blocks_that_take_shares() {
    let Some(device) = gpu() else { return };
    for (i, dtype) in [DType::F32, DType::BF16, DType::F16].into_iter().enumerate() {
        let case = Case { state: i != 1, ..Case::full(2, 777 + 16 * i, 5120, 16) };
        let t = cast(&case.tensors(i as u64), dtype);
        let segments = random_segments(&mut Random::new(i as u64), 2, case.length);
        let segments = (i == 2).then_some(&segments);
        compare(&device, &case, &t, segments, 3.0 * tolerance(dtype));
        let there = to(&t, &device);
        let run = || to(&case.run(&there, segments).unwrap(), &Device::Cpu);
        let first = run();
        for _ in 0..5 {
            let same = run().iter().zip(&first).all(|(again, first)| bits(again) == bits(first));
            assert!(same, "{dtype:?}: not the same in every run");
        }
    }
}

#[test]
fn any_cut_gives_the_same() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(3);
    for (seed, length) in [2, 7, 33, 130, 700].into_iter().enumerate() {
        let case = Case { state: seed % 2 == 0, ..Case::full(2, length, 40, 16) };
        let t = cast(&case.tensors(seed as u64), DType::F32);
        let pieces = if length == 7 { vec![1; 7] } else { random.split(length, 2, 0) };
        let used = case.differentiable();
        let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
        let (outputs, cut) = gradients(&inputs, |x| {
            Ok(to(&case.in_pieces(&to(&case.place(&t, x), &device), &pieces)?, &Device::Cpu))
        });
        let got: Vec<Tensor> = outputs.into_iter().chain(cut).collect();
        for (k, (got, want)) in got.iter().zip(case.all(&t, None)).enumerate() {
            assert_close(&format!("{case:?} {pieces:?} result {k}"), got, &want, 1e-4);
        }
    }
}

#[test]
fn slices_are_read_in_place_and_doubles_fall_back() {
    let Some(device) = gpu() else { return };
    for (dtype, width) in [(DType::F32, 12), (DType::BF16, 64), (DType::F16, 7), (DType::F64, 4)] {
        let case = Case::full(2, 37, width, 16);
        let t = cast(&case.tensors(7), dtype);
        let wide = Tensor::cat(&[&t[0], &t[6]], 2).unwrap().to_device(&device).unwrap();
        let mut sliced = to(&t, &device);
        (sliced[0], sliced[6]) = (wide.narrow(2, 0, width).unwrap(), wide.narrow(2, width, width).unwrap());
        let want = case.run(&t, None).unwrap();
        for (got, want) in case.run(&sliced, None).unwrap().iter().zip(&want) {
            assert_close("slices", &got.to_device(&Device::Cpu).unwrap(), want, tolerance(dtype));
        }
    }
}

#[test]
fn a_hundred_runs_give_the_same_bits() {
    let Some(device) = gpu() else { return };
    let case = Case::full(2, 700, 136, 16);
    let t = to(&cast(&case.tensors(2), DType::BF16), &device);
    let run = || -> Vec<u64> {
        let inputs: Vec<Tensor> = case.differentiable().iter().map(|&i| t[i].clone()).collect();
        let leaves: Vec<candle_core::Var> =
            inputs.iter().map(|x| candle_core::Var::from_tensor(x).unwrap()).collect();
        let x: Vec<Tensor> = leaves.iter().map(|x| x.as_tensor().clone()).collect();
        let outputs = case.run(&case.place(&t, &x), None).unwrap();
        let sum = |y: &Tensor| y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap();
        let store = (sum(&outputs[0]) + sum(&outputs[1])).unwrap().backward().unwrap();
        let gradients = x.iter().map(|x| store.get(x).unwrap().to_device(&Device::Cpu).unwrap());
        outputs
            .iter()
            .map(|y| y.to_device(&Device::Cpu).unwrap())
            .chain(gradients)
            .flat_map(|x| bits(&x))
            .collect()
    };
    let want = run();
    for _ in 1..100 {
        assert!(run() == want);
    }
}

#[test]
fn tensors_of_two_devices_are_refused() {
    let Some(device) = gpu() else { return };
    let case = Case::full(1, 5, 8, 4);
    let t = cast(&case.tensors(1), DType::F32);
    let mut mixed = to(&t, &device);
    mixed[1] = t[1].clone();
    let error = case.run(&mixed, None).unwrap_err().to_string();
    assert!(error.contains("selective_scan: delta: device"), "{error}");
    // and the device goes on
    case.run(&to(&t, &device), None).unwrap();
}
