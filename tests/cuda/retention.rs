//! Retention.

use crate::agree::{agree, to};
use crate::common::*;
use crate::gpu;
use crate::retention_case::*;
use candle_core::{DType, Device, Tensor, Var};
use subquadratic::ops::{Form, Segments};

/// Products are of numbers of the dtype: scores and states are rounded once.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-10,
        DType::F32 => 3e-5,
        other => 4.0 * rounding(other),
    }
}

/// Results and gradients on both devices.
fn compare(device: &Device, case: &Case, t: &[Tensor], segments: Option<&Segments>) {
    let dtype = t[0].dtype();
    let what = format!("{case:?} {dtype:?} segments {} {NAMES:?}", segments.is_some());
    let used = if case.state { 5 } else { 4 };
    agree(&what, device, &t[..used], tolerance(dtype), |x| case.run(x, segments));
    if dtype != DType::F32 {
        fixed(device, case, t, segments);
    }
}

/// The same with decays that do not learn, which leaves the products to the dtype itself.
fn fixed(device: &Device, case: &Case, t: &[Tensor], segments: Option<&Segments>) {
    let (dtype, used) = (t[0].dtype(), if case.state { 5 } else { 4 });
    let what = format!("{case:?} {dtype:?} segments {}, decays fixed", segments.is_some());
    let (decay, others) = (to(&t[3..4], device).remove(0), [&t[..3], &t[4..used]].concat());
    agree(&what, device, &others, tolerance(dtype), |x| {
        let decay = if x[0].device().is_cpu() { &t[3] } else { &decay };
        case.run(&[&x[..3], std::slice::from_ref(decay), &x[3..]].concat(), segments)
    });
}

#[test]
fn any_shape_flag_and_dtype() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(1);
    for seed in 0..90 {
        let heads = [[1, 1, 1], [2, 2, 2], [4, 2, 1], [1, 2, 4], [3, 3, 3]][random.int(0, 4)];
        let widths = [1, 5, 16, 60, 64, 100, 128, 200, 256];
        let mut flag = || random.int(0, 1) == 1;
        let [per_token, state, packed] = [flag(), flag(), flag()];
        let case = Case {
            per_token,
            resets: per_token && random.int(0, 1) == 1,
            state,
            heads,
            keys: widths[random.int(0, 8)],
            values: widths[random.int(0, 8)],
            ..Case::new(random.int(1, 2), [1, 2, 31, 32, 33, 63, 64, 65, 130][random.int(0, 8)], 1, 1, 1)
        };
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let t = cast(&case.tensors(seed as u64), dtype);
        let segments = random_segments(random, case.batch, case.length);
        compare(&device, &case, &t, packed.then_some(&segments));
    }
}

#[test]
fn the_grid_of_the_peers() {
    let Some(device) = gpu() else { return };
    for (i, [batch, length, heads, keys, values]) in [
        [1, 63, 1, 64, 64],
        [2, 500, 3, 60, 60],
        [2, 1000, 3, 100, 100],
        [2, 1000, 3, 128, 256],
        [1, 1024, 2, 256, 512],
        [1, 300, 1, 512, 512],
    ]
    .into_iter()
    .enumerate()
    {
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let case = Case { per_token: i % 2 == 0, ..Case::new(batch, length, heads, keys, values) };
            compare(&device, &case, &cast(&case.tensors(i as u64), dtype), None);
        }
    }
}

/// Every walk of 16-bit elements at its own size and just off it: grouped heads, decays per token with resets, packed rows,
/// lengths that end within a chunk. Decays are fixed, so that gradients are those of the walks themselves.
#[test]
fn gradients_of_walks_in_16_bits() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(8);
    let widths =
        [(64, 64), (64, 128), (60, 100), (128, 64), (128, 128), (256, 64), (200, 136), (256, 256), (512, 48)];
    for (i, (keys, values)) in widths.into_iter().enumerate() {
        for dtype in [DType::F16, DType::BF16] {
            for resets in [false, true] {
                let heads = [[2, 2, 2], [4, 2, 1], [1, 2, 4], [2, 1, 2]][random.int(0, 3)];
                let length = [64, 65, 129, 200, 321][random.int(0, 4)];
                let per_token = resets || random.int(0, 1) == 1;
                let case =
                    Case { heads, per_token, resets, ..Case::new(random.int(1, 2), length, 1, keys, values) };
                let t = cast(&case.tensors(i as u64), dtype);
                let segments = random_segments(random, case.batch, length);
                fixed(&device, &case, &t, (random.int(0, 1) == 1).then_some(&segments));
            }
        }
    }
}

#[test]
fn time_cut_into_segments() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(2);
    for (seed, length) in [1024, 1100, 2048, 4000, 2111, 1537].into_iter().enumerate() {
        let case = Case { per_token: seed % 2 == 1, ..Case::new(1, length, 2, 64, 48) };
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        let mut t = case.tensors(seed as u64);
        if seed % 2 == 0 {
            // decays so slow that a segment remembers all of the one before
            t[3] = (&t[3] * 0.01).unwrap();
        }
        let segments = random_segments(random, 1, length);
        let (t, segments) = (cast(&t, dtype), (seed == 5).then_some(&segments));
        compare(&device, &case, &t, segments);
        let got = to(&case.run(&to(&t, &device), segments).unwrap(), &Device::Cpu);
        for (got, want) in got.iter().zip(&oracle(&case, &widen(&t), segments)) {
            assert_close(&format!("{case:?}"), got, want, tolerance(dtype));
        }
    }
}

#[test]
fn decays_of_any_strength() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(4);
    for (seed, dtype) in [DType::BF16, DType::F16, DType::F32, DType::BF16].into_iter().enumerate() {
        let case = Case { per_token: seed == 3, ..Case::new(1, 200, 6, 80, 96) };
        let mut t = case.tensors(seed as u64);
        // from none to one that forgets all within a token, those between too steep to be taken apart into factors
        let decays = [0.0, -1e-4, -0.5, -2.0, -30.0, -200.0];
        t[3] = match case.per_token {
            true => (random.uniform(t[3].shape(), 0.0, 1.0)
                * Tensor::new(&decays, &Device::Cpu).unwrap().broadcast_as(t[3].shape()).unwrap())
            .unwrap(),
            false => Tensor::new(&decays, &Device::Cpu).unwrap(),
        };
        compare(&device, &case, &cast(&t, dtype), None);
    }
}

#[test]
fn what_is_no_decay_makes_nan_of_its_head() {
    let Some(device) = gpu() else { return };
    let case = Case { state: false, ..Case::new(1, 70, 3, 16, 16) };
    for (dtype, length) in [(DType::F32, 70), (DType::BF16, 70), (DType::F16, 70), (DType::BF16, 2)] {
        let mut t = case.narrow(&cast(&case.tensors(1), dtype), 0, length);
        t[3] = Tensor::new(&[-0.1f32, 0.5, f32::NAN], &Device::Cpu).unwrap();
        let results = to(&case.run(&to(&t, &device), None).unwrap(), &Device::Cpu);
        for (x, dim) in results.iter().zip([2, 1]) {
            let heads = [0, 1, 2].map(|head| values(&x.narrow(dim, head, 1).unwrap()));
            assert!(heads[0].iter().all(|x| x.is_finite()), "{dtype:?} {length}");
            assert!(heads[1..].iter().all(|head| head.iter().any(|x| x.is_nan())), "{dtype:?} {length}");
        }
    }
}

#[test]
fn padding_may_hold_anything() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(5);
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let case = Case::new(2, 150, 2, 48, 40);
        let t = cast(&case.tensors(3), dtype);
        let segments = random_segments(random, case.batch, case.length);
        let padded =
            segments.marks(&device).unwrap().eq(2u8).unwrap().unsqueeze(2).unwrap().unsqueeze(3).unwrap();
        let mut filled = to(&t, &device);
        for x in filled.iter_mut().take(3) {
            let nan = Tensor::full(f32::NAN, x.shape(), &device).unwrap().to_dtype(dtype).unwrap();
            *x = padded.broadcast_as(x.shape()).unwrap().where_cond(&nan, x).unwrap();
        }
        let want = to(&case.run(&to(&t, &device), Some(&segments)).unwrap(), &Device::Cpu);
        let got = to(&case.run(&filled, Some(&segments)).unwrap(), &Device::Cpu);
        let live = padded.to_device(&Device::Cpu).unwrap().broadcast_as(want[0].shape()).unwrap();
        let [got_live, want_live] =
            [&got[0], &want[0]].map(|x| live.where_cond(&x.zeros_like().unwrap(), x).unwrap());
        assert!(bits(&got_live) == bits(&want_live) && bits(&got[1]) == bits(&want[1]), "{dtype:?}");
    }
}

#[test]
fn any_cut_gives_the_same() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(3);
    for (seed, length) in [2, 7, 33, 130, 700].into_iter().enumerate() {
        let case = Case { per_token: seed % 2 == 0, ..Case::new(2, length, 2, 40, 24) };
        let t = cast(&case.tensors(seed as u64), DType::F32);
        let pieces = if length == 7 { vec![1; 7] } else { random.split(length, 2, 0) };
        let pieces: Vec<_> = pieces.into_iter().zip(FORMS.into_iter().cycle()).collect();
        let (outputs, cut) =
            gradients(&t, |x| Ok(to(&case.in_pieces(&to(x, &device), &pieces)?, &Device::Cpu)));
        let got: Vec<Tensor> = outputs.into_iter().chain(cut).collect();
        for (k, (got, want)) in got.iter().zip(case.all(&t, None)).enumerate() {
            assert_close(&format!("{case:?} {pieces:?} result {k}"), got, &want, 1e-4);
        }
    }
}

#[test]
fn slices_are_read_in_place_and_what_is_too_wide_falls_back() {
    let Some(device) = gpu() else { return };
    for (dtype, width) in
        [(DType::F32, 12), (DType::BF16, 64), (DType::F16, 7), (DType::F64, 4), (DType::BF16, 520)]
    {
        let case = Case::new(2, 37, 2, width, width);
        let t = cast(&case.tensors(7), dtype);
        let wide = to(&[Tensor::cat(&t[..3], 3).unwrap()], &device).remove(0);
        let mut sliced = to(&t, &device);
        for (i, x) in sliced.iter_mut().take(3).enumerate() {
            *x = wide.narrow(3, i * width, width).unwrap();
        }
        let want = case.run(&t, None).unwrap();
        for (got, want) in case.run(&sliced, None).unwrap().iter().zip(&want) {
            assert_close("slices", &got.to_device(&Device::Cpu).unwrap(), want, tolerance(dtype));
        }
    }
}

/// Steps, walks and segments of 16-bit elements: any cut gives what one call gives, gradients too, up to their rounding.
#[test]
fn any_cut_gives_the_same_in_16_bits() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(9);
    for (seed, length) in [5, 40, 131, 700, 1500].into_iter().enumerate() {
        for dtype in [DType::F16, DType::BF16] {
            let case = Case { per_token: seed % 2 == 0, ..Case::new(1, length, 2, 64, 40) };
            let t = cast(&case.tensors(seed as u64), dtype);
            let decay = to(&t[3..4], &device).remove(0);
            let others = [&t[..3], &t[4..]].concat();
            let pieces = if length == 5 { vec![1; 5] } else { random.split(length, 3, 0) };
            let pieces: Vec<_> = pieces.into_iter().map(|n| (n, Form::Auto)).collect();
            let run = |x: &[Tensor], pieces: &[(usize, Form)]| {
                let moved = to(x, &device);
                let all = [&moved[..3], std::slice::from_ref(&decay), &moved[3..]].concat();
                Ok(to(&case.in_pieces(&all, pieces)?, &Device::Cpu))
            };
            let whole = gradients(&others, |x| run(x, &[(length, Form::Auto)]));
            let cut = gradients(&others, |x| run(x, &pieces));
            let (whole, cut) = ([whole.0, whole.1].concat(), [cut.0, cut.1].concat());
            for (k, (got, want)) in cut.iter().zip(&whole).enumerate() {
                assert_close(&format!("{case:?} {pieces:?} result {k}"), got, want, tolerance(dtype));
            }
        }
    }
}

#[test]
fn a_hundred_runs_give_the_same_bits() {
    let Some(device) = gpu() else { return };
    for (dtype, learns, case) in [
        (DType::BF16, true, Case { per_token: true, ..Case::new(2, 700, 2, 136, 72) }),
        (DType::F16, false, Case { heads: [4, 2, 4], ..Case::new(1, 2100, 4, 128, 128) }),
        (DType::BF16, false, Case::new(1, 1100, 2, 256, 512)),
    ] {
        let t = to(&cast(&case.tensors(2), dtype), &device);
        let run = || -> Vec<u64> {
            let tracked = |(i, x): (usize, &Tensor)| if i == 3 && !learns { x.clone() } else { var(x) };
            let x: Vec<Tensor> = t.iter().enumerate().map(tracked).collect();
            let outputs = case.run(&x, None).unwrap();
            let sum = |y: &Tensor| y.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap();
            let store = (sum(&outputs[0]) + sum(&outputs[1])).unwrap().backward().unwrap();
            let gradients = x.iter().filter_map(|x| store.get(x).cloned()).collect::<Vec<_>>();
            assert_eq!(gradients.len(), if learns { 5 } else { 4 });
            to(&[outputs, gradients].concat(), &Device::Cpu).iter().flat_map(bits).collect()
        };
        let want = run();
        for _ in 1..100 {
            assert!(run() == want, "{case:?}");
        }
    }
}

fn var(x: &Tensor) -> Tensor {
    Var::from_tensor(x).unwrap().as_tensor().clone()
}

#[test]
fn tensors_of_two_devices_are_refused() {
    let Some(device) = gpu() else { return };
    let case = Case { form: Form::Auto, ..Case::new(1, 5, 1, 8, 4) };
    let t = cast(&case.tensors(1), DType::F32);
    let mut mixed = to(&t, &device);
    mixed[1] = t[1].clone();
    let error = case.run(&mixed, None).unwrap_err().to_string();
    assert!(error.contains("retention: k: device"), "{error}");
    // and the device goes on
    case.run(&to(&t, &device), None).unwrap();
}
