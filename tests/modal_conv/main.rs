//! The modal convolution: its formula as a convolution, the streaming law, gradients, accuracy at a million tokens.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use subquadratic::ops::modal_conv::{modal_conv_reference, modal_filter};
use subquadratic::ops::{LongConv, ModalConv, Poles, Segments, long_conv, modal_conv};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Complex,
    Real,
    Log,
}

const KINDS: [Kind; 3] = [Kind::Complex, Kind::Real, Kind::Log];
const NAMES: [&str; 5] = ["u", "poles", "residues", "d", "initial_state"];

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    length: usize,
    channels: usize,
    states: usize,
    kind: Kind,
    skip: bool,
    state: bool,
}

impl Case {
    /// u, poles, residues, d, initial state, f64.
    fn tensors(&self, seed: u64) -> Vec<Tensor> {
        let random = &mut Random::new(seed);
        let (d, s) = (self.channels, self.states);
        let shape = |first: &[usize]| -> Vec<usize> {
            let mut dims = first.to_vec();
            dims.extend([d, s]);
            dims.extend((self.kind == Kind::Complex).then_some(2));
            dims
        };
        let u = random.normal((self.batch, self.length, d));
        let poles = match self.kind {
            Kind::Complex => {
                let (radius, angle) = (random.uniform((d, s), 0.5, 0.999), random.uniform((d, s), -3.0, 3.0));
                let re = (&radius * angle.cos().unwrap()).unwrap();
                Tensor::stack(&[re, (&radius * angle.sin().unwrap()).unwrap()], 2).unwrap()
            }
            Kind::Real => random.uniform((d, s), -0.99, 0.99),
            Kind::Log => random.uniform((d, s), -0.7, -0.01),
        };
        let residues = random.normal(shape(&[]));
        let skip = random.normal(d);
        vec![u, poles, residues, skip, random.normal(shape(&[self.batch]))]
    }

    fn args<'a>(&self, t: &'a [Tensor], segments: Option<&'a Segments>) -> ModalConv<'a> {
        ModalConv {
            u: &t[0],
            poles: match self.kind {
                Kind::Complex => Poles::Complex(&t[1]),
                Kind::Real => Poles::Real(&t[1]),
                Kind::Log => Poles::Log(&t[1]),
            },
            residues: &t[2],
            d: self.skip.then_some(&t[3]),
            initial_state: self.state.then_some(&t[4]),
            segments,
        }
    }

    fn run(&self, t: &[Tensor], segments: Option<&Segments>) -> subquadratic::Result<Vec<Tensor>> {
        let (y, state) = modal_conv(&self.args(t, segments))?;
        Ok(vec![y, state])
    }

    fn reference(&self, t: &[Tensor], segments: Option<&Segments>) -> subquadratic::Result<Vec<Tensor>> {
        let (y, state) = modal_conv_reference(&self.args(t, segments))?;
        Ok(vec![y, state])
    }

    fn used(&self) -> Vec<usize> {
        let used = [true, true, true, self.skip, self.state];
        (0..5).filter(|&i| used[i]).collect()
    }

    fn place(&self, t: &[Tensor], used: &[Tensor]) -> Vec<Tensor> {
        let mut t = t.to_vec();
        for (&i, x) in self.used().iter().zip(used) {
            t[i] = x.clone();
        }
        t
    }

    /// Outputs, then the gradient of every used input.
    fn all(&self, t: &[Tensor], run: impl Fn(&[Tensor]) -> subquadratic::Result<Vec<Tensor>>) -> Vec<Tensor> {
        let inputs: Vec<Tensor> = self.used().iter().map(|&i| t[i].clone()).collect();
        let (mut outputs, gradients) = gradients(&inputs, |x| run(&self.place(t, x)));
        outputs.extend(gradients);
        outputs
    }
}

fn cast(t: &[Tensor], dtype: DType) -> Vec<Tensor> {
    let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let one = |(i, t): (usize, &Tensor)| t.to_dtype(if i == 0 { dtype } else { wide }).unwrap();
    t.iter().enumerate().map(one).collect()
}

fn random_case(random: &mut Random, lengths: &[usize]) -> Case {
    Case {
        batch: random.int(1, 3),
        length: lengths[random.int(0, lengths.len() - 1)],
        channels: [1, 3, 16, 17, 33, 150][random.int(0, 5)],
        states: [1, 2, 3, 8, 16][random.int(0, 4)],
        kind: KINDS[random.int(0, 2)],
        skip: random.int(0, 1) == 1,
        state: random.int(0, 1) == 1,
    }
}

#[test]
fn equals_the_reference_with_its_gradients() {
    let random = &mut Random::new(1);
    for seed in 0..60 {
        let case = random_case(random, &[0, 1, 2, 7, 8, 15, 16, 17, 33, 150]);
        let t = case.tensors(seed);
        let want = case.all(&t, |t| case.reference(t, None));
        let got = case.all(&t, |t| case.run(t, None));
        for (k, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_close(&format!("{case:?} result {k}"), got, want, 1e-11);
        }
        for (got, want) in case.run(&t, None).unwrap().iter().zip(&want) {
            assert_close(&format!("{case:?} untracked"), got, want, 1e-11);
        }
    }
}

#[test]
fn equals_the_convolution_with_its_filter() {
    for kind in KINDS {
        let (batch, length, channels) = (2, 77, 5);
        let case = Case { batch, length, channels, states: 4, kind, skip: true, state: false };
        let t = case.tensors(3);
        let k = modal_filter(case.args(&t, None).poles, &t[2], length).unwrap().to_vec2::<f64>().unwrap();
        let (u, skip) = (t[0].to_vec3::<f64>().unwrap(), values(&t[3]));
        let mut y = vec![];
        for u in &u {
            for i in 0..length {
                for d in 0..channels {
                    y.push((0..=i).map(|j| k[d][i - j] * u[j][d]).sum::<f64>() + skip[d] * u[i][d]);
                }
            }
        }
        let y = Tensor::from_vec(y, (batch, length, channels), &Device::Cpu).unwrap();
        assert_close(&format!("{kind:?}"), &case.run(&t, None).unwrap()[0], &y, 1e-12);
    }
}

/// The same by transforms of the whole sequence.
#[test]
fn equals_its_fft_form() {
    for kind in KINDS {
        let case = Case { batch: 2, length: 3000, channels: 19, states: 5, kind, skip: true, state: false };
        for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 1e-5)] {
            let t = cast(&case.tensors(4), dtype);
            let filter = modal_filter(case.args(&t, None).poles, &t[2], case.length).unwrap();
            let fft = LongConv { d: Some(&t[3]), ..LongConv::new(&t[0], &filter) };
            let want = long_conv(&fft).unwrap();
            assert_close(&format!("{kind:?} {dtype:?}"), &case.run(&t, None).unwrap()[0], &want, tolerance);
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    for kind in KINDS {
        for length in [2, 19, 35] {
            let case = Case { batch: 2, length, channels: 2, states: 2, kind, skip: true, state: true };
            let t = case.tensors(length as u64);
            check_gradients(&format!("{case:?}"), &NAMES, &t, |t| case.run(t, None));
        }
    }
}

#[test]
fn every_dtype_is_near_f64() {
    let random = &mut Random::new(5);
    for seed in 0..40 {
        let case = random_case(random, &[3, 64, 300]);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let low = cast(&case.tensors(seed), dtype);
            let exact: Vec<Tensor> = low.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
            let got = case.all(&low, |t| case.run(t, None));
            let want = case.all(&exact, |t| case.run(t, None));
            assert_eq!(got[0].dtype(), dtype);
            assert_eq!(got[1].dtype(), DType::F32);
            for (k, (got, want)) in got.iter().zip(&want).enumerate() {
                // gradients come from outputs' gradients that are rounded too
                let steps = if k < 2 { 3.0 } else { 12.0 };
                let tolerance = 10.0 * rounding(DType::F32) + steps * rounding(dtype);
                assert_close(&format!("{case:?} {dtype:?} result {k}"), got, want, tolerance);
            }
        }
    }
}

#[test]
fn any_split_equals_the_whole() {
    let random = &mut Random::new(6);
    for seed in 0..40 {
        let case = random_case(random, &[2, 20, 60, 140]);
        let t = case.tensors(seed);
        let parts = random.int(2, 6.min(case.length));
        let least = usize::from(seed % 2 == 0);
        let split = match seed % 5 {
            0 => vec![1; case.length],
            _ => random.split(case.length, parts, least),
        };
        let pieces = |t: &[Tensor]| {
            let (mut start, mut ys, mut state, mut part) = (0, vec![], t[4].clone(), case);
            for &length in &split {
                let mut t = t.to_vec();
                t[0] = t[0].narrow(1, start, length)?;
                t[4] = state;
                let outputs = part.run(&t, None)?;
                part.state = true;
                (state, start) = (outputs[1].clone(), start + length);
                ys.push(outputs[0].clone());
            }
            Ok(vec![Tensor::cat(&ys, 1)?, state])
        };
        let want = case.all(&t, |t| case.run(t, None));
        for (k, (got, want)) in case.all(&t, pieces).iter().zip(&want).enumerate() {
            assert_close(&format!("{case:?} {split:?} result {k}"), got, want, 1e-11);
        }
    }
}

#[test]
fn packed_and_padded_rows_equal_the_reference() {
    let random = &mut Random::new(7);
    for seed in 0..30 {
        let case = Case { batch: 2, ..random_case(random, &[7, 40, 90]) };
        let marks: Vec<u8> = (0..2 * case.length).map(|_| [0, 0, 0, 0, 0, 1, 2][random.int(0, 6)]).collect();
        let marks = Tensor::from_vec(marks, (2, case.length), &Device::Cpu).unwrap();
        let segments = Segments::from_marks(&marks).unwrap();
        let t = case.tensors(seed);
        let want = case.all(&t, |t| case.reference(t, Some(&segments)));
        let got = case.all(&t, |t| case.run(t, Some(&segments)));
        for (k, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_close(&format!("{case:?} result {k}"), got, want, 1e-11);
        }
        let untracked = case.run(&t, Some(&segments)).unwrap();
        assert_close("untracked", &untracked[0], &want[0], 1e-11);
    }
}

#[test]
fn a_million_tokens_keep_their_accuracy() {
    let length = 1_000_000;
    // on the unit circle nothing is ever forgotten; inputs and residues of many kinds
    let angles: Vec<f64> = (0..8).map(|i| 0.37 * i as f64 + 1e-4).collect();
    let poles: Vec<f32> = angles.iter().flat_map(|a| [a.cos() as f32, a.sin() as f32]).collect();
    let poles = Tensor::from_vec(poles, (2, 4, 2), &Device::Cpu).unwrap();
    let logs =
        Tensor::new(&[[-1e-6f32, -1e-5, -1e-3, -1e-9], [-0.1, -3e-6, -1e-4, -0.5]], &Device::Cpu).unwrap();
    let u = Random::new(8).normal((1, length, 2)).to_dtype(DType::F32).unwrap();
    for kind in [Kind::Complex, Kind::Log] {
        let case = Case { batch: 1, length, channels: 2, states: 4, kind, skip: false, state: false };
        let poles = if kind == Kind::Complex { &poles } else { &logs };
        let residues = Random::new(9).normal(poles.shape()).to_dtype(DType::F32).unwrap();
        let low = vec![u.clone(), poles.clone(), residues];
        let exact: Vec<Tensor> = low.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
        let exact_args = ModalConv { d: None, initial_state: None, ..args(kind, &exact) };
        let (want, want_state) = modal_conv(&exact_args).unwrap();
        let (got, state) = modal_conv(&args(kind, &low)).unwrap();
        assert_close(&format!("{kind:?}: y"), &got, &want, 1e-6);
        assert_close(&format!("{kind:?}: state"), &state, &want_state, 1e-6);
        // the end alone, where the oldest input lies furthest back
        let end = |x: &Tensor| x.narrow(1, length - 100, 100).unwrap();
        assert_close(&format!("{kind:?}: end"), &end(&got), &end(&want), 1e-6);
        assert_eq!(case.length, length);
    }
}

fn args(kind: Kind, t: &[Tensor]) -> ModalConv<'_> {
    let poles = if kind == Kind::Complex { Poles::Complex(&t[1]) } else { Poles::Log(&t[1]) };
    ModalConv { u: &t[0], poles, residues: &t[2], d: None, initial_state: None, segments: None }
}

#[test]
fn threads_change_no_bit() {
    let case =
        Case { batch: 2, length: 300, channels: 70, states: 3, kind: Kind::Complex, skip: true, state: true };
    let t = cast(&case.tensors(1), DType::F32);
    let run = || case.all(&t, |t| case.run(t, None)).iter().map(bits).collect::<Vec<_>>();
    let one = with_threads(1, run);
    assert!((2..5).all(|threads| with_threads(threads, run) == one));
}

#[test]
fn bad_input_is_named() {
    let case =
        Case { batch: 1, length: 3, channels: 2, states: 2, kind: Kind::Real, skip: true, state: true };
    let t = case.tensors(1);
    let fails = |i: usize, tensor: Tensor| {
        let mut t = t.clone();
        t[i] = tensor;
        case.run(&t, None).unwrap_err().to_string()
    };
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F64, &Device::Cpu).unwrap();
    for (i, name) in NAMES.iter().enumerate() {
        assert!(fails(i, zeros(&[7])).contains(if i == 0 { "u" } else { name }), "{name}");
    }
    assert!(fails(1, t[1].to_dtype(DType::BF16).unwrap()).contains("f32 or f64"));
    let segments = Segments::left_padded(&[2], 4).unwrap();
    assert!(case.run(&t, Some(&segments)).unwrap_err().to_string().contains("segments"));
    let largest = Poles::Complex(&Tensor::new(&[[[0.6f64, 0.8001]]], &Device::Cpu).unwrap()).largest();
    assert!(largest.unwrap() > 1.0);
}
