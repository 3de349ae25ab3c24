//! Activations: their formulas in every dtype and layout, extremes, gradients, threads.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use subquadratic::Result;
use subquadratic::ops::{Activation, activate, gate, sigmoid, silu, silu_gate, softplus};

type Apply = fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// Each with its arguments and its formula in plain f64.
struct Case {
    name: &'static str,
    arguments: usize,
    apply: Apply,
    formula: fn(f64, f64) -> f64,
    /// Errors are relative to the larger of 1 and the value, not to the value in its tails.
    absolute: bool,
}

fn gelu(x: f64) -> f64 {
    0.5 * x * candle_core::cpu::erf::erfc_f64(-x / 2f64.sqrt())
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh())
}

const CASES: [Case; 10] = [
    Case {
        name: "sigmoid",
        arguments: 1,
        apply: |x| Ok(vec![sigmoid(&x[0])?]),
        formula: |x, _| 1.0 / (1.0 + (-x).exp()),
        absolute: false,
    },
    Case {
        name: "softplus",
        arguments: 1,
        apply: |x| Ok(vec![softplus(&x[0])?]),
        formula: |x, _| x.max(0.0) + (-x.abs()).exp().ln_1p(),
        absolute: false,
    },
    Case {
        name: "silu",
        arguments: 1,
        apply: |x| Ok(vec![silu(&x[0])?]),
        formula: |x, _| x / (1.0 + (-x).exp()),
        absolute: false,
    },
    Case {
        name: "gate",
        arguments: 2,
        apply: |x| Ok(vec![silu_gate(&x[0], &x[1])?]),
        formula: |x, z| x * z / (1.0 + (-z).exp()),
        absolute: false,
    },
    Case {
        name: "gelu",
        arguments: 1,
        apply: |x| Ok(vec![activate(&x[0], Activation::Gelu)?]),
        formula: |x, _| gelu(x),
        absolute: true,
    },
    Case {
        name: "gelu_tanh",
        arguments: 1,
        apply: |x| Ok(vec![activate(&x[0], Activation::GeluTanh)?]),
        formula: |x, _| gelu_tanh(x),
        absolute: true,
    },
    Case {
        name: "relu",
        arguments: 1,
        apply: |x| Ok(vec![activate(&x[0], Activation::Relu)?]),
        formula: |x, _| x.max(0.0),
        absolute: false,
    },
    Case {
        name: "gate",
        arguments: 2,
        apply: |x| Ok(vec![gate(&x[0], &x[1], Activation::Gelu)?]),
        formula: |x, z| x * gelu(z),
        absolute: true,
    },
    Case {
        name: "gate",
        arguments: 2,
        apply: |x| Ok(vec![gate(&x[0], &x[1], Activation::Relu)?]),
        formula: |x, z| x * z.max(0.0),
        absolute: false,
    },
    Case {
        name: "gate",
        arguments: 2,
        apply: |x| Ok(vec![gate(&x[0], &x[1], Activation::Identity)?]),
        formula: |x, z| x * z,
        absolute: false,
    },
];

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

fn cast(tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    tensors.iter().map(|t| t.to_dtype(dtype).unwrap()).collect()
}

impl Case {
    fn tensors(&self, random: &mut Random, dims: &[usize]) -> Vec<Tensor> {
        (0..self.arguments).map(|_| (random.normal(dims) * 3.0).unwrap()).collect()
    }

    fn exact(&self, inputs: &[Tensor]) -> Vec<f64> {
        let (x, z) = (values(&inputs[0]), values(&inputs[self.arguments - 1]));
        x.into_iter().zip(z).map(|(x, z)| (self.formula)(x, z)).collect()
    }

    /// Every element is within a few roundings of the formula.
    fn check(&self, what: &str, inputs: &[Tensor], dtype: DType) {
        let y = &(self.apply)(inputs).unwrap()[0];
        assert_eq!((y.dims(), y.dtype()), (inputs[0].dims(), dtype), "{} {what}", self.name);
        let half = matches!(dtype, DType::BF16 | DType::F16);
        let tolerance = if half { 1.01 } else { 20.0 } * rounding(dtype);
        // f16 is coarser below its normal numbers
        let floor = if dtype == DType::F16 { 6e-8 } else { 1e-40 };
        let floor = if self.absolute { tolerance * 10.0 } else { floor };
        for ((got, want), x) in values(y).into_iter().zip(self.exact(inputs)).zip(values(&inputs[0])) {
            let error = (got - want).abs();
            let name = self.name;
            assert!(
                error <= tolerance * want.abs() + floor,
                "{name} {what} {dtype:?} of {x}: {got}, not {want}"
            );
        }
    }
}

#[test]
fn equals_the_formula_in_every_dtype_and_layout() {
    let random = &mut Random::new(1);
    for case in &CASES {
        for dtype in DTYPES {
            for dims in [vec![], vec![1], vec![7], vec![3, 1, 33], vec![2, 5, 64], vec![40_001]] {
                let inputs = cast(&case.tensors(random, &dims), dtype);
                case.check(&format!("{dims:?}"), &inputs, dtype);
            }
            let wide = cast(&case.tensors(random, &[4, 6, 50]), dtype);
            let sliced: Vec<Tensor> = wide.iter().map(|x| x.narrow(2, 11, 35).unwrap()).collect();
            case.check("of a slice", &sliced, dtype);
            let turned: Vec<Tensor> = wide.iter().map(|x| x.transpose(0, 2).unwrap()).collect();
            case.check("transposed", &turned, dtype);
            let empty: Vec<Tensor> = wide.iter().map(|x| x.narrow(1, 0, 0).unwrap()).collect();
            case.check("of nothing", &empty, dtype);
        }
    }
}

#[test]
fn extremes_neither_overflow_nor_lose_their_tails() {
    let extreme =
        [-1e30f32, -104.0, -80.0, -1e-30, 0.0, 1e-30, 80.0, 104.0, 1e30, f32::INFINITY, f32::NEG_INFINITY];
    let x = Tensor::new(&extreme, &Device::Cpu).unwrap();
    assert_eq!(softplus(&x).unwrap().to_vec1::<f32>().unwrap()[6..], [80.0, 104.0, 1e30, f32::INFINITY, 0.0]);
    let tail = softplus(&x).unwrap().to_vec1::<f32>().unwrap()[2];
    assert!((tail / (-80f32).exp() - 1.0).abs() < 1e-5, "{tail}");
    assert_eq!(sigmoid(&x).unwrap().to_vec1::<f32>().unwrap()[8..], [1.0, 1.0, 0.0]);
    assert_eq!(silu(&x).unwrap().to_vec1::<f32>().unwrap()[8], 1e30);
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        let y = activate(&x, activation).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y[6..10], [80.0, 104.0, 1e30, f32::INFINITY]);
        assert!(y[0].abs() < 1e-40 && y[10].abs() < 1e-40, "{y:?}");
        assert_eq!(Activation::from_name(activation.name()), Some(activation));
    }
    let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
    for case in &CASES {
        let y = (case.apply)(&[nan.clone(), nan.clone()]).unwrap();
        assert!(y[0].to_vec1::<f32>().unwrap()[0].is_nan(), "{}", case.name);
    }
}

#[test]
fn gradients_are_finite_differences() {
    let random = &mut Random::new(2);
    for case in &CASES {
        for dims in [vec![6], vec![3, 17]] {
            let inputs = case.tensors(random, &dims);
            check_gradients(case.name, &["x", "z"][..case.arguments], &inputs, case.apply);
        }
    }
}

#[test]
fn gradients_in_low_precision_are_rounded_once() {
    let random = &mut Random::new(3);
    for case in &CASES {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let low = cast(&case.tensors(random, &[5, 21]), dtype);
            let (_, got) = gradients(&low, case.apply);
            let (_, want) = gradients(&cast(&low, DType::F64), case.apply);
            for (got, want) in got.iter().zip(&want) {
                assert_eq!(got.dtype(), dtype);
                // in a half the gradient that comes in and the one that leaves are rounded, in f32 every operation
                let roundings = if dtype == DType::F32 { 16.0 } else { 3.0 };
                assert_close(case.name, got, want, roundings * rounding(dtype));
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let random = &mut Random::new(4);
    for case in &CASES {
        let inputs = cast(&case.tensors(random, &[100_003]), DType::F32);
        let run = |threads| with_threads(threads, || bits(&(case.apply)(&inputs).unwrap()[0]));
        assert_eq!(run(1), run(3), "{}", case.name);
    }
}

#[test]
fn wrong_arguments_are_named() {
    let x = Random::new(5).normal((2, 3));
    let integers = x.to_dtype(DType::U32).unwrap();
    for case in &CASES {
        let error = (case.apply)(&[integers.clone(), integers.clone()]).unwrap_err().to_string();
        assert!(error.contains(case.name) && error.contains('x'), "{error}");
    }
    let error = silu_gate(&x, &x.narrow(1, 0, 2).unwrap()).unwrap_err().to_string();
    assert!(error.contains("gate: z"), "{error}");
    let error = silu_gate(&x, &x.to_dtype(DType::F32).unwrap()).unwrap_err().to_string();
    assert!(error.contains("gate: z"), "{error}");
}
