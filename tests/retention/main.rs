//! Retention: its forms against the recurrence in f64, gradients, cuts of every kind, dtypes, threads, bad input.

#[path = "../common/mod.rs"]
mod common;

mod case;

use candle_core::{DType, Device, Tensor};
use case::*;
use common::*;
use subquadratic::ops::retention::{retention_composed, retention_reference};
use subquadratic::ops::{Form, Retention, Segments, retention};

#[test]
fn every_form_is_the_recurrence() {
    let random = &mut Random::new(1);
    for round in 0..60 {
        let case = Case::random(random, 40);
        let mut tensors = case.tensors(random);
        if case.per_token && round % 2 == 0 {
            with_resets(random, &mut tensors);
        }
        let segments = case.segments(random);
        let (o, state) = retention_reference(&case.args(&tensors, segments.as_ref(), Form::Auto)).unwrap();
        for form in FORMS {
            let args = case.args(&tensors, segments.as_ref(), form);
            for (what, (got, end)) in
                [("kernel", retention(&args).unwrap()), ("composed", retention_composed(&args).unwrap())]
            {
                let what = format!("{what} {case:?} {segments:?} {form:?}");
                assert_close(&what, &got, &o, 1e-12);
                assert_close(&format!("{what}: state"), &end, &state, 1e-12);
            }
        }
    }
}

#[test]
fn blocks_of_rows_and_spans_of_time_change_nothing() {
    let random = &mut Random::new(2);
    for (length, heads, per_token) in
        [(63, 2, true), (64, 1, false), (65, 3, true), (200, 4, false), (1030, 1, true)]
    {
        let case = Case { per_token, ..Case::plain(1, length, heads, 5, 7) };
        let mut tensors = case.tensors(random);
        if length == 1030 {
            tensors[3] = (&tensors[3] * 0.05).unwrap();
        }
        let run = |form| retention(&case.args(&tensors, None, form)).unwrap();
        let (o, state) = run(Form::Recurrent);
        for form in
            [Form::Auto, Form::Parallel, Form::Chunkwise { chunk: 64 }, Form::Chunkwise { chunk: 130 }]
        {
            let (got, end) = run(form);
            assert_close(&format!("{length} {form:?}"), &got, &o, 1e-12);
            assert_close(&format!("{length} {form:?}: state"), &end, &state, 1e-12);
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    let random = &mut Random::new(3);
    let cases = [
        (Case::plain(2, 7, 2, 3, 4), Form::Chunkwise { chunk: 3 }, false),
        (Case { per_token: true, ..Case::plain(2, 9, 2, 3, 2) }, Form::Chunkwise { chunk: 4 }, false),
        (Case { per_token: true, heads: [4, 2, 1], ..Case::plain(1, 6, 4, 2, 3) }, Form::Parallel, false),
        (Case { heads: [1, 2, 2], ..Case::plain(1, 5, 2, 2, 3) }, Form::Recurrent, false),
        (Case { per_token: true, ..Case::plain(2, 11, 2, 2, 3) }, Form::Auto, true),
        (Case::plain(2, 11, 1, 2, 3), Form::Chunkwise { chunk: 2 }, true),
        (Case::plain(1, 1, 1, 1, 1), Form::Auto, false),
    ];
    for (case, form, cut) in cases {
        let tensors = case.tensors(random);
        // padding, a reset, a sequence that goes on
        let marks: Vec<u8> = [2, 0, 0, 1, 0, 0, 0, 1, 0, 0, 2].repeat(case.batch);
        let marks = cut.then(|| Tensor::from_vec(marks, (case.batch, 11), &Device::Cpu).unwrap());
        let segments = marks.map(|marks| Segments::from_marks(&marks).unwrap());
        check_gradients(&format!("{case:?} {form:?}"), &NAMES, &tensors, |x| {
            let (o, state) = retention(&case.args(x, segments.as_ref(), form))?;
            Ok(vec![o, state])
        });
    }
}

#[test]
fn gradients_are_those_of_the_recurrence() {
    let random = &mut Random::new(4);
    for round in 0..25 {
        let case = Case { state: true, ..Case::random(random, 30) };
        let mut tensors = case.tensors(random);
        if case.per_token && round % 2 == 0 {
            with_resets(random, &mut tensors);
        }
        let segments = case.segments(random);
        let form = FORMS[random.int(0, FORMS.len() - 1)];
        let args = |x: &[Tensor]| -> Vec<Tensor> { x.to_vec() };
        let run = |f: &dyn Fn(&Retention) -> subquadratic::Result<(Tensor, Tensor)>| {
            gradients(&tensors, |x| {
                let x = args(x);
                let (o, state) = f(&case.args(&x, segments.as_ref(), form))?;
                Ok(vec![o, state])
            })
            .1
        };
        let (got, want) = (run(&retention), run(&retention_reference));
        let composed = run(&retention_composed);
        for (((got, want), composed), name) in got.iter().zip(&want).zip(&composed).zip(NAMES) {
            let what = format!("{case:?} {segments:?} {form:?}: {name}");
            // where all is forgotten the recurrence multiplies minus infinity by zero
            let clean = |x: &Tensor| {
                let x: Vec<f64> = values(x).into_iter().map(|x| if x.is_nan() { 0.0 } else { x }).collect();
                Tensor::from_vec(x, want.shape(), &Device::Cpu).unwrap()
            };
            assert_close(&what, got, &clean(want), 1e-11);
            assert_close(&format!("{what}, composed"), composed, &clean(want), 1e-11);
        }
    }
}

#[test]
fn a_state_goes_from_any_form_to_any_other() {
    let random = &mut Random::new(5);
    for _ in 0..20 {
        let case = Case { state: true, ..Case::random(random, 30) };
        let tensors = case.tensors(random);
        let (o, end) = retention(&case.args(&tensors, None, Form::Auto)).unwrap();
        let parts = random.split(case.length, 4, 0);
        let (mut start, mut state, mut outputs) = (0, tensors[4].clone(), vec![]);
        for (i, length) in parts.into_iter().enumerate() {
            let at = |x: &Tensor| if x.rank() == 1 { Ok(x.clone()) } else { x.narrow(1, start, length) };
            let mut part = tensors[..4].iter().map(at).collect::<Result<Vec<_>, _>>().unwrap();
            part.push(state);
            let form = [Form::Parallel, Form::Chunkwise { chunk: 3 }, Form::Recurrent, Form::Auto][i];
            let (o, after) = retention(&case.args(&part, None, form)).unwrap();
            outputs.push(o);
            state = after;
            start += length;
        }
        assert_close("outputs", &Tensor::cat(&outputs, 1).unwrap(), &o, 1e-12);
        assert_close("state", &state, &end, 1e-12);
    }
}

/// The grids of the peers' own tests, shortened in batch and heads: relative RMS errors.
#[test]
fn the_peers_grids_hold_in_every_dtype() {
    let random = &mut Random::new(6);
    let grid =
        [(63, 64, 64), (500, 60, 120), (1000, 100, 100), (1000, 128, 256), (1024, 256, 256), (2048, 64, 128)];
    for (length, key, value) in grid {
        let case = Case { state: true, ..Case::plain(1, length, 1, key, value) };
        let tensors = case.tensors(random);
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::BF16, 5e-3), (DType::F16, 1e-3)] {
            let low = cast(&tensors, dtype);
            let (o, state) = retention(&case.args(&cast(&low, DType::F64), None, Form::Recurrent)).unwrap();
            for form in [Form::Auto, Form::Recurrent, Form::Chunkwise { chunk: 16 }] {
                let (got, end) = retention(&case.args(&low, None, form)).unwrap();
                assert_eq!((got.dtype(), end.dtype()), (dtype, DType::F32));
                let (rms, state_rms) = (relative_errors(&got, &o).0, relative_errors(&end, &state).0);
                assert!(
                    rms < tolerance && state_rms < 1e-6,
                    "{case:?} {dtype:?} {form:?}: {rms:.1e} {state_rms:.1e}"
                );
            }
        }
    }
}

/// Over 65,536 tokens the state of the slowest published head, 1 - 2^-12, stays within 1e-6 of f64 (relative, RMS).
#[test]
fn long_sequences_do_not_drift() {
    let random = &mut Random::new(7);
    let case = Case { state: false, ..Case::plain(1, 65_536, 1, 4, 8) };
    let mut tensors = case.tensors(random);
    tensors[3] = Tensor::new(&[(1.0 - 2f64.powi(-12)).ln()], &Device::Cpu).unwrap();
    let low = cast(&tensors, DType::F32);
    let exact = cast(&low[..3], DType::F64).into_iter().chain([tensors[3].clone(), tensors[4].clone()]);
    let (o, state) = retention(&case.args(&exact.collect::<Vec<_>>(), None, Form::Auto)).unwrap();
    for form in [Form::Auto, Form::Recurrent] {
        let mut args = case.args(&low, None, form);
        args.log_decay = &tensors[3];
        let (got, end) = retention(&args).unwrap();
        let errors = [relative_errors(&got, &o).0, relative_errors(&end, &state).0];
        println!(
            "{form:?}: relative RMS error after 65,536 tokens: outputs {:.1e}, state {:.1e}",
            errors[0], errors[1]
        );
        // the decay itself is rounded to f32, which moves e^(log T) by T ulp(log)
        assert!(errors.iter().all(|&e| e < 3e-6), "{form:?}: {errors:?}");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let random = &mut Random::new(8);
    for case in [Case::plain(1, 1500, 1, 16, 24), Case { per_token: true, ..Case::plain(2, 150, 4, 16, 24) }]
    {
        let tensors = cast(&case.tensors(random), DType::F32);
        let run = |threads| {
            with_threads(threads, || {
                let (outputs, gradients) = gradients(&tensors, |x| {
                    let (o, state) = retention(&case.args(x, None, Form::Auto))?;
                    Ok(vec![o, state])
                });
                outputs.iter().chain(&gradients).flat_map(bits).collect::<Vec<_>>()
            })
        };
        assert_eq!(run(1), run(3), "{case:?}");
    }
}

#[test]
fn no_number_in_one_row_reaches_another() {
    let random = &mut Random::new(9);
    let case = Case::plain(2, 40, 2, 4, 6);
    let tensors = case.tensors(random);
    let (clean, _) = retention(&case.args(&tensors, None, Form::Auto)).unwrap();
    let broken = Tensor::cat(
        &[tensors[0].narrow(0, 0, 1).unwrap(), (tensors[0].narrow(0, 1, 1).unwrap() * f64::NAN).unwrap()],
        0,
    );
    let mut tensors = tensors;
    tensors[0] = broken.unwrap();
    for form in FORMS {
        let (o, _) = retention(&case.args(&tensors, None, form)).unwrap();
        assert_close("the clean row", &o.get(0).unwrap(), &clean.get(0).unwrap(), 1e-12);
        assert!(values(&o.get(1).unwrap()).iter().all(|x| x.is_nan()));
    }
}

#[test]
fn slices_of_a_projection_are_read_where_they_lie() {
    let random = &mut Random::new(10);
    let case = Case::plain(2, 30, 2, 4, 6);
    let tensors = case.tensors(random);
    let wide = random.normal((2, 30, 2, 20));
    let mut sliced = tensors.clone();
    for (i, (start, width)) in [(0, 4), (5, 4), (11, 6)].into_iter().enumerate() {
        sliced[i] = wide.narrow(3, start, width).unwrap();
    }
    let copied: Vec<Tensor> = sliced.iter().map(|x| x.force_contiguous().unwrap()).collect();
    for form in FORMS {
        let got = retention(&case.args(&sliced, None, form)).unwrap();
        let want = retention(&case.args(&copied, None, form)).unwrap();
        assert_eq!(bits(&got.0), bits(&want.0));
    }
}

#[test]
fn wrong_arguments_are_named() {
    let random = &mut Random::new(11);
    let case = Case::plain(2, 5, 4, 3, 2);
    let good = case.tensors(random);
    let fails = |change: &dyn Fn(&mut Vec<Tensor>), form: Form, words: &[&str]| {
        let mut tensors = good.clone();
        change(&mut tensors);
        let error = retention(&case.args(&tensors, None, form)).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F64, &Device::Cpu).unwrap();
    fails(&|x| x[0] = zeros(&[2, 5, 12]), Form::Auto, &["retention: q", "[B, T, H, K]"]);
    fails(&|x| x[1] = zeros(&[2, 5, 3, 3]), Form::Auto, &["retention: k", "divides 4"]);
    fails(&|x| x[1] = zeros(&[2, 5, 4, 2]), Form::Auto, &["retention: k", "[2, 5, 4, 2]"]);
    fails(&|x| x[2] = zeros(&[2, 6, 4, 2]), Form::Auto, &["retention: v"]);
    fails(&|x| x[3] = zeros(&[3]), Form::Auto, &["log_decay", "[H] = [4]"]);
    fails(
        &|x| x[3] = Tensor::new(&[0.0, -1.0, 0.5, 0.0], &Device::Cpu).unwrap(),
        Form::Auto,
        &["log_decay", "0.5"],
    );
    fails(&|x| x[3] = Tensor::new(&[f64::NAN; 4], &Device::Cpu).unwrap(), Form::Auto, &["log_decay", "NaN"]);
    fails(&|x| x[4] = zeros(&[2, 4, 2, 3]), Form::Auto, &["initial_state", "[2, 4, 3, 2]"]);
    fails(&|_| (), Form::Chunkwise { chunk: 0 }, &["chunk", "at least 1"]);
    let segments = Segments::packed(&[vec![5]], 5).unwrap();
    let error = retention(&case.args(&good, Some(&segments), Form::Auto)).unwrap_err().to_string();
    assert!(error.contains("segments"), "{error}");
}
