//! Norms: the formula in every form and dtype, gradients, layouts, threads.

mod common;

use candle_core::{DType, Tensor};
use common::*;
use subquadratic::Result;
use subquadratic::ops::norm::{Norm, NormInput, NormKind, add_norm, gated_norm, norm, norm_reference};

/// What is normalised, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    Plain,
    Add,
    GateBefore,
    GateAfter,
}

#[derive(Clone, Debug)]
struct Case {
    kind: NormKind,
    form: Form,
    dims: Vec<usize>,
    group: Option<usize>,
    weight: bool,
    bias: bool,
}

const NAMES: [&str; 5] = ["x", "residual", "z", "weight", "bias"];
const EPS: f64 = 1e-3;

impl Case {
    /// x, residual, z, weight, bias, in f64.
    fn tensors(&self, seed: u64) -> Vec<Tensor> {
        let random = &mut Random::new(seed);
        let channels = *self.dims.last().unwrap();
        let mut all: Vec<Tensor> = (0..3).map(|_| random.normal(self.dims.clone())).collect();
        // a mean that a layer norm has to take out
        all[0] = (&all[0] + 0.7).unwrap();
        all.extend((0..2).map(|_| random.normal(channels)));
        all
    }

    /// The tensors that count.
    fn used(&self) -> Vec<usize> {
        let gated = matches!(self.form, Form::GateBefore | Form::GateAfter);
        let used = [true, self.form == Form::Add, gated, self.weight, self.bias];
        (0..5).filter(|&i| used[i]).collect()
    }

    fn run(&self, t: &[Tensor], reference: bool) -> Result<Vec<Tensor>> {
        let (weight, bias) = (self.weight.then_some(&t[3]), self.bias.then_some(&t[4]));
        let n = Norm { kind: self.kind, weight, bias, eps: EPS, group_size: self.group };
        if reference {
            let (residual, z) = match self.form {
                Form::Plain => (None, None),
                Form::Add => (Some(&t[1]), None),
                Form::GateBefore | Form::GateAfter => (None, Some(&t[2])),
            };
            // in this crate's words the norm comes before the gate where the gate comes after the norm
            let norm_before_gate = self.form == Form::GateAfter;
            let (y, sum) = norm_reference(&NormInput { x: &t[0], residual, z, norm_before_gate }, &n)?;
            return Ok([Some(y), sum].into_iter().flatten().collect());
        }
        Ok(match self.form {
            Form::Plain => vec![norm(&t[0], &n)?],
            Form::Add => {
                let (sum, y) = add_norm(&t[1], &t[0], &n)?;
                vec![y, sum]
            }
            Form::GateBefore => vec![gated_norm(&t[0], &t[2], &n, false)?],
            Form::GateAfter => vec![gated_norm(&t[0], &t[2], &n, true)?],
        })
    }

    /// All forms, kinds and sets of parameters over random sizes, groups of at least `least` channels.
    fn all(seed: u64, least: usize) -> impl Iterator<Item = Self> {
        let mut random = Random::new(seed);
        let kinds = [NormKind::Rms, NormKind::Layer, NormKind::RmsOutside];
        let forms = [Form::Plain, Form::Add, Form::GateBefore, Form::GateAfter];
        let all = kinds.into_iter().flat_map(move |kind| forms.map(|form| (kind, form)));
        all.flat_map(|(kind, form)| [0, 1, 2, 3].map(|flags| (kind, form, flags))).map(
            move |(kind, form, flags)| {
                let (group, groups) = (random.int(least, 40), random.int(1, 4));
                let mut dims: Vec<usize> = (0..random.int(0, 2)).map(|_| random.int(1, 5)).collect();
                dims.push(group * groups);
                let group = (groups > 1).then_some(group);
                Self { kind, form, dims, group, weight: flags & 1 == 0, bias: flags & 2 == 0 }
            },
        )
    }
}

fn cast(tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    tensors.iter().map(|t| t.to_dtype(dtype).unwrap()).collect()
}

/// The same values in the layout of a slice, of an expanded row, and of a transposed tensor.
fn layouts(x: &Tensor) -> Vec<Tensor> {
    let last = x.rank() - 1;
    let slice =
        Tensor::cat(&[x, x, x], last).unwrap().narrow(last, x.dim(last).unwrap(), x.dim(last).unwrap());
    let columns = x.unsqueeze(0).unwrap().transpose(0, last + 1).unwrap().contiguous().unwrap();
    vec![slice.unwrap(), columns.transpose(0, last + 1).unwrap().squeeze(0).unwrap()]
}

#[test]
fn equals_the_formula_in_every_dtype() {
    for seed in 0..8 {
        // the gradients of smaller groups are differences of nearly equal numbers
        let (least, differentiates) = if seed % 2 == 0 { (1, false) } else { (6, true) };
        for (i, case) in Case::all(seed, least).enumerate() {
            for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                let low = cast(&case.tensors(100 * seed + i as u64), dtype);
                let what = format!("{case:?} in {dtype:?}");
                let (got, got_gradients) = gradients(&low, |t| case.run(t, false));
                let (want, want_gradients) = gradients(&cast(&low, DType::F64), |t| case.run(t, true));
                // rounded once to a half; in f32 and f64 every operation rounds
                let half = matches!(dtype, DType::BF16 | DType::F16);
                let tolerance = if half { 2.0 } else { 16.0 } * rounding(dtype);
                for (got, want) in got.iter().zip(&want) {
                    assert_eq!(got.dtype(), dtype, "{what}");
                    assert_close(&what, got, want, tolerance);
                }
                for i in case.used().into_iter().filter(|_| differentiates) {
                    let what = format!("{what}: gradient of {}", NAMES[i]);
                    assert_close(&what, &got_gradients[i], &want_gradients[i], 2.0 * tolerance);
                }
            }
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    for case in Case::all(7, 3) {
        let (t, used) = (case.tensors(3), case.used());
        let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
        let names: Vec<&str> = used.iter().map(|&i| NAMES[i]).collect();
        check_gradients(&format!("{case:?}"), &names, &inputs, |inputs| {
            let mut t = t.clone();
            used.iter().zip(inputs).for_each(|(&i, input)| t[i] = input.clone());
            case.run(&t, false)
        });
    }
}

#[test]
fn a_wide_residual_keeps_the_sum() {
    for (dtype, kind) in [(DType::BF16, NormKind::Rms), (DType::F16, NormKind::Layer)] {
        let case = Case { kind, form: Form::Add, dims: vec![5, 37], group: None, weight: true, bias: true };
        let mut t = cast(&case.tensors(1), dtype);
        t[1] = case.tensors(2)[1].to_dtype(DType::F32).unwrap();
        let (got, gradient) = gradients(&t, |t| case.run(t, false));
        let (want, want_gradient) = gradients(&cast(&t, DType::F64), |t| case.run(t, true));
        assert_eq!([got[0].dtype(), got[1].dtype()], [dtype, DType::F32]);
        assert_close("norm", &got[0], &want[0], 6.0 * rounding(dtype));
        assert_close("sum", &got[1], &want[1], 2.0 * rounding(DType::F32));
        assert_eq!(gradient[1].dtype(), DType::F32);
        // the gradient of the norm comes in the dtype of x, that of the sum in f32
        assert_close("gradient of the residual", &gradient[1], &want_gradient[1], 6.0 * rounding(dtype));
    }
}

#[test]
fn strided_rows_are_read_where_they_lie() {
    for case in Case::all(11, 1).filter(|case| case.dims.len() > 1) {
        let t = cast(&case.tensors(5), DType::F32);
        let want = case.run(&t, false).unwrap();
        for layout in 0..2 {
            let mut strided = t.clone();
            (0..3).for_each(|i| strided[i] = layouts(&t[i])[layout].clone());
            for (got, want) in case.run(&strided, false).unwrap().iter().zip(&want) {
                assert_eq!(bits(got), bits(want), "{case:?}");
            }
        }
    }
}

#[test]
fn large_and_tiny_values_are_normalised() {
    for kind in [NormKind::Rms, NormKind::RmsOutside, NormKind::Layer] {
        let n = Norm { kind, weight: None, bias: None, eps: 0.0, group_size: None };
        for scale in [1e-15, 1.0, 1e15] {
            let x = Random::new(2).normal((3, 100)).affine(scale, 0.0).unwrap();
            let y = norm(&x.to_dtype(DType::F32).unwrap(), &n).unwrap();
            assert_close(
                "squares",
                &y.sqr().unwrap().mean(1).unwrap(),
                &y.ones_like().unwrap().mean(1).unwrap(),
                1e-5,
            );
        }
        // with an epsilon, a row of zeros stays one
        let n = Norm { eps: EPS, ..n };
        let zero = Random::new(2).normal((3, 9)).zeros_like().unwrap();
        assert_eq!(values(&norm(&zero, &n).unwrap()), [0.0; 27]);
        let empty = zero.narrow(0, 0, 0).unwrap();
        assert_eq!(norm(&empty, &n).unwrap().dims(), [0, 9]);
    }
}

#[test]
fn neither_threads_nor_other_rows_change_a_bit() {
    for form in [Form::Plain, Form::Add, Form::GateBefore, Form::GateAfter] {
        let dims = vec![301, 96];
        let case = Case { kind: NormKind::Layer, form, dims, group: Some(48), weight: true, bias: true };
        let t = cast(&case.tensors(9), DType::F32);
        let run = |threads| {
            let (outputs, gradients) = with_threads(threads, || gradients(&t, |t| case.run(t, false)));
            outputs.iter().chain(&gradients).map(bits).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(4));
        let mut row = t.clone();
        (0..3).for_each(|i| row[i] = t[i].narrow(0, 200, 1).unwrap());
        let alone = case.run(&row, false).unwrap();
        let among = case.run(&t, false).unwrap();
        assert_eq!(bits(&alone[0]), bits(&among[0].narrow(0, 200, 1).unwrap()));
    }
}

#[test]
fn wrong_arguments_are_named() {
    let case = Case {
        kind: NormKind::Rms,
        form: Form::Add,
        dims: vec![4, 6],
        group: None,
        weight: true,
        bias: true,
    };
    let t = case.tensors(1);
    let refused = |form: Form, group: Option<usize>, place: usize, wrong: Tensor, named: &str| {
        let mut t = t.clone();
        t[place] = wrong;
        let error = Case { form, group, ..case.clone() }.run(&t, false).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    };
    refused(Form::Add, None, 1, t[1].narrow(0, 0, 3).unwrap(), "residual");
    refused(Form::Add, None, 1, t[1].to_dtype(DType::BF16).unwrap(), "residual");
    refused(Form::GateAfter, None, 2, t[2].narrow(1, 0, 3).unwrap(), "z");
    refused(Form::GateAfter, None, 2, t[2].to_dtype(DType::F32).unwrap(), "z");
    refused(Form::Plain, None, 3, t[3].narrow(0, 0, 5).unwrap(), "weight");
    refused(Form::Plain, None, 4, t[4].to_dtype(DType::U32).unwrap(), "bias");
    refused(Form::Plain, Some(4), 0, t[0].clone(), "group_size");
    refused(Form::Plain, Some(0), 0, t[0].clone(), "group_size");
    refused(Form::Plain, None, 0, t[0].to_dtype(DType::U8).unwrap(), "x");
    refused(Form::Plain, None, 0, t[0].narrow(1, 0, 0).unwrap(), "x");
}
