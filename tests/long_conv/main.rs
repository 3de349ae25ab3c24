//! The long convolution against its sum in f64, its gradients, and its laws.

#[path = "../common/mod.rs"]
mod common;

mod case;
mod stream;

use candle_core::{DType, Device, Tensor, Var};
use case::*;
use common::*;
use subquadratic::ops::long_conv::long_conv_reference;
use subquadratic::ops::{FilterCache, LongConv, Segments, long_conv};

/// What f64 sums of so many terms may differ by.
const EXACT: f64 = 1e-12;

#[test]
fn every_length_equals_the_sum() {
    let primes = [97, 127, 251, 509, 997, 1021, 2039, 4093];
    for length in (1..70).chain(primes).chain([128, 256, 1000, 1024, 4096, 4097]) {
        let channels = if length > 300 { 3 } else { 9 };
        let case = Case::full(1, length, channels);
        let t = case.tensors(length as u64);
        assert_close(&format!("length {length}"), &case.run(&t, None).unwrap()[0], &oracle(&case, &t), EXACT);
    }
}

/// Transforms that several threads share, of sizes with and without odd factors.
#[test]
fn long_transforms_of_few_channels_equal_the_sum() {
    for (length, reverse) in [(8_192, 0), (9_000, 0), (8_600, 8_500)] {
        let case = Case { reverse, ..Case::full(1, length, 2) };
        let t = case.tensors(length as u64);
        let y = with_threads(4, || case.run(&t, None).unwrap());
        assert_close(&format!("{case:?}"), &y[0], &oracle(&case, &t), EXACT);
    }
}

#[test]
fn random_shapes_and_options_equal_the_sum_and_the_reference() {
    let mut random = Random::new(1);
    for seed in 0..80 {
        let case = Case::random(&mut random);
        let t = case.tensors(seed);
        let what = format!("{case:?}");
        assert_close(&what, &case.run(&t, None).unwrap()[0], &oracle(&case, &t), EXACT);
        let reference = long_conv_reference(&case.args(&t, None));
        if case.length > 0 {
            assert_close(&what, &reference.unwrap(), &oracle(&case, &t), EXACT);
        }
    }
}

#[test]
fn filters_shorter_than_the_sequence_go_in_windows() {
    for (length, taps, reverse) in [(20_000, 200, 0), (20_011, 130, 77), (9_000, 1, 700)] {
        let case = Case { taps, reverse, ..Case::full(1, length, 2) };
        let t = case.tensors(3);
        assert_close(&format!("{case:?}"), &case.run(&t, None).unwrap()[0], &oracle(&case, &t), EXACT);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let small = [
        Case::full(2, 7, 3),
        Case { reverse: 5, ..Case::full(1, 6, 4) },
        Case { groups: 2, taps: 3, ..Case::full(2, 5, 4) },
        Case { groups: 1, taps: 9, reverse: 9, ..Case::bare(1, 4, 2) },
        Case { taps: 60, ..Case::full(1, 61, 1) },
    ];
    for case in small {
        let t = case.tensors(5);
        let used = case.used();
        let names: Vec<&str> = used.iter().map(|&i| NAMES[i]).collect();
        let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
        check_gradients(&format!("{case:?}"), &names, &inputs, |x| case.run(&case.place(&t, x), None));
    }
}

#[test]
fn gradients_of_every_method_equal_the_references() {
    let mut random = Random::new(2);
    let windows = Case { taps: 140, reverse: 90, ..Case::full(1, 9_000, 2) };
    for seed in 0..30 {
        let case = if seed == 0 { windows } else { Case::random(&mut random) };
        if case.length == 0 {
            continue;
        }
        let t = case.tensors(seed);
        let inputs: Vec<Tensor> = case.used().iter().map(|&i| t[i].clone()).collect();
        let reference = |x: &[Tensor]| Ok(vec![long_conv_reference(&case.args(&case.place(&t, x), None))?]);
        let (y, expected) = gradients(&inputs, reference);
        let got = case.all(&t, None);
        for (i, (got, expected)) in got.iter().zip(y.iter().chain(&expected)).enumerate() {
            assert_close(&format!("{case:?} {i}"), got, expected, 1e-11);
        }
    }
}

#[test]
fn every_dtype_is_exact_up_to_its_rounding() {
    for case in [Case::full(2, 300, 20), Case::full(1, 24, 5), Case { taps: 150, ..Case::full(1, 9_000, 2) }]
    {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let rounded = cast(&case.tensors(4), dtype);
            let exact: Vec<Tensor> = rounded.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
            let (got, want) = (case.all(&rounded, None), case.all(&exact, None));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let tolerance = 8.0 * rounding(dtype).max(8.0 * rounding(DType::F32));
                assert_close(
                    &format!("{dtype:?} {case:?} {i}"),
                    &got.to_dtype(DType::F64).unwrap(),
                    want,
                    tolerance,
                );
            }
        }
    }
}

/// The convolution and its gradients by torch.fft, see tests/fixtures/make_hyena.py.
#[test]
fn results_equal_those_of_torch() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/long_conv.safetensors");
    let torch = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    for (kind, reverse) in [("causal", 0), ("two_sided", 37)] {
        let case = Case { reverse, ..Case::full(2, 37, 3) };
        let t: Vec<Tensor> = NAMES.iter().map(|&name| torch[name].clone()).collect();
        let inputs: Vec<Tensor> = case.used().iter().map(|&i| t[i].clone()).collect();
        let variables: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
        let leaves: Vec<Tensor> = variables.iter().map(|x| x.as_tensor().clone()).collect();
        let y = case.run(&case.place(&t, &leaves), None).unwrap().remove(0);
        assert_close(kind, &y.detach(), &torch[&format!("{kind}.y")], EXACT);
        let gradients = (y * &torch["weight"]).unwrap().sum_all().unwrap().backward().unwrap();
        for (&i, leaf) in case.used().iter().zip(&leaves) {
            let want = &torch[&format!("{kind}.{}", NAMES[i])];
            assert_close(&format!("{kind} {}", NAMES[i]), gradients.get(leaf).unwrap(), want, EXACT);
        }
    }
}

#[test]
fn the_future_has_no_influence_on_the_past() {
    let case = Case::full(1, 500, 3);
    let t = case.tensors(6);
    let before = &case.run(&t, None).unwrap()[0];
    for at in [0, 1, 250, 499] {
        let mut changed = t.clone();
        let mask: Vec<f64> = (0..1500).map(|i| if i / 3 >= at { 100.0 } else { 0.0 }).collect();
        changed[0] = (&t[0] + Tensor::from_vec(mask, (1, 500, 3), &Device::Cpu).unwrap()).unwrap();
        let after = &case.run(&changed, None).unwrap()[0];
        let part = |y: &Tensor| y.narrow(1, 0, at).unwrap();
        if at > 0 {
            assert_close("the past", &part(after), &part(before), 1e-10);
        }
        assert!(relative_errors(after, before).0 > 0.1);
    }
}

#[test]
fn inputs_of_the_past_continue_a_sequence() {
    let case = Case::full(2, 90, 5);
    let t = case.tensors(7);
    let run = |x: &[Tensor], split: usize| {
        let t = case.place(&t, x);
        let v = (&t[0] * &t[4])?;
        let part = |x: &Tensor| x.narrow(1, split, 90 - split);
        let (x, pre, post, past) = (part(&t[0])?, part(&t[4])?, part(&t[5])?, v.narrow(1, 0, split)?);
        let args = case.args(&t, None);
        let later =
            LongConv { x: &x, pre_gate: Some(&pre), post_gate: Some(&post), past: Some(&past), ..args };
        let [x, pre, post] = [0, 4, 5].map(|i| t[i].narrow(1, 0, split));
        let (x, pre, post) = (x?, pre?, post?);
        let earlier = LongConv { x: &x, pre_gate: Some(&pre), post_gate: Some(&post), ..args };
        let (a, b) = (long_conv(&earlier)?, long_conv(&later)?);
        let expected = long_conv_reference(&later)?;
        assert_close("the reference", &b.detach(), &expected.detach(), EXACT);
        Ok(vec![Tensor::cat(&[a, b], 1)?])
    };
    let inputs: Vec<Tensor> = case.used().iter().map(|&i| t[i].clone()).collect();
    let whole = case.all(&t, None);
    for split in [1, 30, 89] {
        let (y, found) = gradients(&inputs, |x| run(x, split));
        for (got, want) in y.iter().chain(&found).zip(&whole) {
            assert_close(&format!("split at {split}"), got, want, 1e-11);
        }
    }
}

#[test]
fn packed_and_padded_rows_equal_each_sequence_alone() {
    for reverse in [0, 40] {
        let case = Case { reverse, taps: 70, ..Case::full(2, 120, 5) };
        let t = case.tensors(8);
        let lengths = [vec![1, 60, 0, 30], vec![119]];
        let segments = Segments::packed(&lengths, 120).unwrap();
        let (got, reference) = (case.run(&t, Some(&segments)).unwrap(), case.args(&t, Some(&segments)));
        let reference = long_conv_reference(&reference).unwrap();
        assert_close("reference", &got[0], &reference, EXACT);
        for (row, lengths) in lengths.iter().enumerate() {
            let mut start = 0;
            for &length in lengths.iter().filter(|&&n| n > 0) {
                let alone = case.run(&case.narrow(&t, row, start, length), None).unwrap();
                let part = got[0].narrow(0, row, 1).unwrap().narrow(1, start, length).unwrap();
                assert_close("alone", &part, &alone[0], EXACT);
                start += length;
            }
            let padding = got[0].narrow(0, row, 1).unwrap().narrow(1, start, 120 - start).unwrap();
            assert!(values(&padding).iter().all(|&y| y == 0.0));
        }
        // padding on the left, and its gradients
        let segments = Segments::left_padded(&[100, 17], 120).unwrap();
        let all = case.all(&t, Some(&segments));
        let alone = case.run(&case.narrow(&t, 1, 103, 17), None).unwrap();
        let part = all[0].narrow(0, 1, 1).unwrap().narrow(1, 103, 17).unwrap();
        assert_close("left padded", &part, &alone[0], EXACT);
        for gradient in [&all[1]].into_iter().chain(&all[all.len() - 2..]) {
            let padding = gradient.narrow(1, 0, 20).unwrap();
            assert!(values(&padding).iter().all(|&g| g == 0.0));
        }
    }
}

#[test]
fn a_cached_transform_follows_its_parameter() {
    let case = Case::full(1, 200, 6);
    let t = case.tensors(9);
    let filter = Var::from_tensor(&t[1]).unwrap();
    let cache = FilterCache::new();
    let run = || {
        let mut t = t.clone();
        t[1] = filter.as_tensor().clone();
        let args = LongConv { cache: Some(&cache), ..case.args(&t, None) };
        assert_close("cached", &long_conv(&args).unwrap().detach(), &oracle(&case, &t), EXACT);
    };
    run();
    run();
    assert_eq!(cache.len(), 1);
    filter.set(&(&t[1] * 2.0).unwrap()).unwrap();
    run();
    // one tap alone
    let mut taps = values(&t[1]);
    taps[777] += 1.0;
    filter.set(&Tensor::from_vec(taps, t[1].shape(), &Device::Cpu).unwrap()).unwrap();
    run();
    assert_eq!(cache.len(), 1);
    let short = Case { length: 100, ..case };
    let args = short.narrow(&t, 0, 0, 100);
    let cached = long_conv(&LongConv { cache: Some(&cache), ..short.args(&args, None) }).unwrap();
    assert_close("another length", &cached, &oracle(&short, &args), EXACT);
}

#[test]
fn strided_arguments_are_read_where_they_lie() {
    let case = Case::full(2, 100, 6);
    let t = case.tensors(10);
    let expected = oracle(&case, &t);
    let mut strided = t.clone();
    strided[1] = t[1].t().unwrap().contiguous().unwrap().t().unwrap();
    let wide = Tensor::cat(&[&t[0], &t[4], &t[5]], 2).unwrap();
    for (i, at) in SEQUENCES.into_iter().enumerate() {
        strided[at] = wide.narrow(2, 6 * i, 6).unwrap();
    }
    assert_close("strided", &case.run(&strided, None).unwrap()[0], &expected, EXACT);
    strided[0] = t[0].transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
    strided[4] = t[4].transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    assert_close("transposed", &case.run(&strided, None).unwrap()[0], &expected, EXACT);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // many sequences of few channels, windows, and long transforms of one block of channels, which threads share
    let cases = [
        Case::full(3, 700, 40),
        Case { taps: 150, reverse: 20, ..Case::full(1, 9_000, 20) },
        Case::full(1, 9_500, 5),
        Case { reverse: 10_000, ..Case::full(2, 12_000, 3) },
    ];
    for case in cases {
        let t = cast(&case.tensors(11), DType::F32);
        let run = |threads| with_threads(threads, || case.all(&t, None).iter().map(bits).collect::<Vec<_>>());
        assert!(run(1) == run(3));
    }
}

#[test]
fn bad_arguments_are_named() {
    let case = Case { reverse: 3, ..Case::full(2, 8, 6) };
    let t = case.tensors(12);
    let refused = |place: usize, bad: Tensor| {
        let mut t = t.clone();
        t[place] = bad;
        case.run(&t, None).unwrap_err().to_string()
    };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F64, &Device::Cpu).unwrap();
    let expect = |place: usize, shape: &[usize]| {
        let message = refused(place, zeros(shape));
        assert!(message.contains(&format!("long_conv: {}", NAMES[place])), "{message}");
    };
    expect(0, &[2, 8]);
    expect(0, &[2, 8, 0]);
    expect(1, &[4, 8]);
    expect(1, &[6, 0]);
    expect(1, &[0, 8]);
    expect(2, &[3, 3]);
    expect(2, &[6, 0]);
    expect(3, &[5]);
    expect(4, &[2, 8, 5]);
    expect(5, &[1, 8, 6]);
    let integers = Tensor::zeros((2, 8, 6), DType::U32, &Device::Cpu).unwrap();
    assert!(refused(0, integers).contains("dtype"));
    let past = zeros(&[2, 4, 6]);
    let both = long_conv(&LongConv { past: Some(&past), ..case.args(&t, None) });
    assert!(both.unwrap_err().to_string().contains("past"));
    let wrong = LongConv { past: Some(&zeros(&[1, 4, 6])), reverse: None, ..case.args(&t, None) };
    assert!(long_conv(&wrong).unwrap_err().to_string().contains("past"));
    let segments = Segments::left_padded(&[3], 8).unwrap();
    assert!(case.run(&t, Some(&segments)).is_err());
}

#[test]
fn nothing_comes_of_nothing() {
    for (batch, length) in [(0, 5), (2, 0), (0, 0)] {
        let case = Case { taps: 4, ..Case::full(batch, length, 3) };
        assert_eq!(case.run(&case.tensors(13), None).unwrap()[0].dims(), [batch, length, 3]);
    }
}

#[test]
fn filters_may_come_taps_first() {
    let both = Case { reverse: 7, taps: 50, ..Case::full(2, 100, 6) };
    let t = both.tensors(10);
    let whole = both.all(&t, None);
    let mut turned: Vec<Tensor> = both.used().iter().map(|&i| t[i].clone()).collect();
    (turned[1], turned[2]) =
        (turned[1].t().unwrap().contiguous().unwrap(), turned[2].t().unwrap().contiguous().unwrap());
    let run = |x: &[Tensor], reference: bool| {
        let t = both.place(&t, x);
        let args = LongConv { taps_first: true, ..both.args(&t, None) };
        Ok(vec![if reference { long_conv_reference(&args)? } else { long_conv(&args)? }])
    };
    for reference in [false, true] {
        let (y, mut found) = gradients(&turned, |x| run(x, reference));
        (found[1], found[2]) = (found[1].t().unwrap(), found[2].t().unwrap());
        for (got, want) in y.iter().chain(&found).zip(&whole) {
            assert_close("taps first", got, want, 1e-11);
        }
    }
}
