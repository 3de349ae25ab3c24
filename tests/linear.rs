//! `ops::linear` against its formula in f64: every dtype, rows on both sides of every path, strides, gradients, threads.

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use common::{Random, assert_close, bits, check_gradients, gradients, rounding, values, with_threads};
use subquadratic::ops::{linear, linear::linear_reference};

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// `x weight^T + bias` in f64, by the formula.
fn truth(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let inputs = weight.dim(1).unwrap();
    let rows = x.elem_count() / inputs.max(1);
    let (x_values, weight_values) = (values(x), values(weight));
    let bias = bias.map(values);
    let mut y = vec![];
    for r in 0..rows {
        for o in 0..weight.dim(0).unwrap() {
            let products = (0..inputs).map(|i| x_values[r * inputs + i] * weight_values[o * inputs + i]);
            y.push(products.sum::<f64>() + bias.as_ref().map_or(0.0, |bias| bias[o]));
        }
    }
    let mut dims = x.dims().to_vec();
    *dims.last_mut().unwrap() = weight.dim(0).unwrap();
    Tensor::from_vec(y, dims, &Device::Cpu).unwrap()
}

fn as_dtype(tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    tensors.iter().map(|tensor| tensor.to_dtype(dtype).unwrap()).collect()
}

/// The result is rounded once; the sums before it are in f32, or f64.
fn tolerance(dtype: DType) -> f64 {
    let sum = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    1.01 * rounding(dtype) + 32.0 * rounding(sum)
}

#[test]
fn equals_the_formula_in_every_dtype_and_size() {
    let mut random = Random::new(1);
    let sizes = [(1, 1), (3, 5), (16, 16), (17, 33), (48, 100), (130, 7), (771, 19), (80, 801), (1025, 390)];
    for (inputs, outputs) in sizes {
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 100] {
            let all =
                [random.normal((rows, inputs)), random.normal((outputs, inputs)), random.normal(outputs)];
            for dtype in DTYPES {
                let all = as_dtype(&all, dtype);
                for bias in [None, Some(&all[2])] {
                    let y = linear(&all[0], &all[1], bias).unwrap();
                    assert_eq!(y.dtype(), dtype);
                    let what =
                        format!("{dtype:?} [{rows}, {inputs}] x [{outputs}, {inputs}], {}", bias.is_some());
                    assert_close(&what, &y, &truth(&all[0], &all[1], bias), tolerance(dtype));
                }
            }
        }
    }
}

/// Long sums of equal terms, where accumulating in half precision would stop growing.
#[test]
fn low_precision_accumulates_in_f32() {
    for rows in [1, 40] {
        for dtype in [DType::BF16, DType::F16] {
            let x = Tensor::full(0.25f32, (rows, 6000), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let weight = Tensor::ones((3, 6000), dtype, &Device::Cpu).unwrap();
            let y = linear(&x, &weight, None).unwrap();
            assert_close(
                "a long sum",
                &y,
                &Tensor::full(1500.0, (rows, 3), &Device::Cpu).unwrap(),
                rounding(dtype),
            );
        }
    }
}

#[test]
fn the_result_has_the_dims_of_x() {
    let mut random = Random::new(2);
    let weight = random.normal((4, 6));
    for dims in [vec![6], vec![0, 6], vec![2, 6], vec![3, 0, 6], vec![2, 3, 6], vec![2, 1, 3, 6]] {
        let x = random.normal(dims.clone());
        let y = linear(&x, &weight, None).unwrap();
        assert_eq!(y.dims()[..dims.len() - 1], dims[..dims.len() - 1]);
        assert_close(&format!("{dims:?}"), &y, &truth(&x, &weight, None), 1e-14);
    }
    let none = linear(&random.normal((3, 0)), &random.normal((4, 0)), Some(&random.normal(4))).unwrap();
    assert_eq!(none.dims(), [3, 4]);
    assert_eq!(linear(&random.normal((3, 6)), &random.normal((0, 6)), None).unwrap().dims(), [3, 0]);
}

#[test]
fn strided_arguments_are_read_where_they_lie() {
    let mut random = Random::new(3);
    for (batch, length) in [(1, 1), (2, 3), (2, 50), (1, 60)] {
        let wide = random.normal((batch, length + 1, 40));
        let weight = random.normal((30, 60));
        let views = [
            wide.narrow(D::Minus1, 5, 30).unwrap(),
            wide.narrow(D::Minus1, 5, 30).unwrap().narrow(1, 1, length).unwrap(),
            wide.narrow(1, 0, 1).unwrap().narrow(2, 0, 30).unwrap(),
            random.normal((30, length, batch)).transpose(0, 2).unwrap(),
            wide.narrow(1, 0, 1)
                .unwrap()
                .narrow(2, 0, 30)
                .unwrap()
                .broadcast_as((batch, length, 30))
                .unwrap(),
        ];
        let weights = [weight.narrow(1, 7, 30).unwrap(), weight.narrow(1, 7, 30).unwrap().t().unwrap()];
        for (i, x) in views.iter().enumerate() {
            for (j, weight) in weights.iter().enumerate() {
                for dtype in DTYPES {
                    let [x, weight] = [x, weight].map(|x| x.to_dtype(dtype).unwrap());
                    let want = truth(&x, &weight, None);
                    let what = format!("{dtype:?}, view {i}, weight {j}, batch {batch}, length {length}");
                    assert_close(&what, &linear(&x, &weight, None).unwrap(), &want, tolerance(dtype));
                }
                let plain = (x.contiguous().unwrap(), weight.contiguous().unwrap());
                let f = |x: &[Tensor]| Ok(vec![linear(&x[0], &x[1], None)?]);
                let viewed = |x: &[Tensor]| {
                    let narrow = x[0].narrow(D::Minus1, 2, 30)?;
                    Ok(vec![linear(&narrow, &x[1], None)?])
                };
                let padded = plain.0.pad_with_zeros(D::Minus1, 2, 1).unwrap();
                let (_, want) = gradients(&[plain.0, plain.1.clone()], f);
                let (_, got) = gradients(&[padded, plain.1], viewed);
                assert_close(
                    "gradient of a slice",
                    &got[0].narrow(D::Minus1, 2, 30).unwrap(),
                    &want[0],
                    1e-14,
                );
                assert_close("gradient of the weight", &got[1], &want[1], 1e-14);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let mut random = Random::new(4);
    for (dims, outputs) in [(vec![1, 5], 4), (vec![3, 7, 3], 5), (vec![2, 4], 1)] {
        let inputs = dims[dims.len() - 1];
        let all = [random.normal(dims), random.normal((outputs, inputs)), random.normal(outputs)];
        check_gradients("linear", &["x", "weight", "bias"], &all, |x| {
            Ok(vec![linear(&x[0], &x[1], Some(&x[2]))?])
        });
        check_gradients("linear", &["x", "weight"], &all[..2], |x| Ok(vec![linear(&x[0], &x[1], None)?]));
    }
}

#[test]
fn gradients_are_those_of_the_reference_in_every_dtype() {
    let mut random = Random::new(5);
    for rows in [1, 9, 100, 600] {
        let all = [random.normal((rows, 50)), random.normal((33, 50)), random.normal(33)];
        for dtype in DTYPES {
            let all = as_dtype(&all, dtype);
            let (_, got) = gradients(&all, |x| Ok(vec![linear(&x[0], &x[1], Some(&x[2]))?]));
            let wide = as_dtype(&all, DType::F64);
            let (_, want) = gradients(&wide, |x| Ok(vec![linear_reference(&x[0], &x[1], Some(&x[2]))?]));
            for ((got, want), name) in got.iter().zip(&want).zip(["x", "weight", "bias"]) {
                assert_eq!(got.dtype(), dtype);
                // the gradient that arrives is rounded too
                assert_close(&format!("{dtype:?}, {rows} rows: {name}"), got, want, 3.0 * tolerance(dtype));
            }
        }
    }
}

#[test]
fn only_tracked_arguments_get_gradients() {
    let mut random = Random::new(6);
    let weight = Var::from_tensor(&random.normal((4, 6))).unwrap();
    let x = random.normal((3, 6));
    let store = linear(&x, &weight, None).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(store.get(&weight).is_some() && store.get(&x).is_none());
}

/// Bits: for any number of threads, and for a row whatever rows come with it.
#[test]
fn bits_depend_on_neither_threads_nor_neighbours() {
    let mut random = Random::new(7);
    for dtype in DTYPES {
        let x = random.normal((700, 96)).to_dtype(dtype).unwrap();
        let weight = random.normal((1500, 96)).to_dtype(dtype).unwrap();
        for rows in [1, 8, 16, 700] {
            let run = || {
                let x = Var::from_tensor(&x.narrow(0, 0, rows).unwrap()).unwrap();
                let weight = Var::from_tensor(&weight).unwrap();
                let y = linear(&x, &weight, None).unwrap();
                let store = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                [y.detach(), store.get(&x).unwrap().clone(), store.get(&weight).unwrap().clone()]
                    .map(|x| bits(&x))
            };
            let one = with_threads(1, run);
            for threads in [2, 3, 7] {
                assert!(with_threads(threads, run) == one, "{dtype:?}, {rows} rows, {threads} threads");
            }
        }
        let together = linear(&x.narrow(0, 0, 13).unwrap(), &weight, None).unwrap();
        for row in 0..13 {
            let alone = linear(&x.narrow(0, row, 1).unwrap(), &weight, None).unwrap();
            assert_eq!(bits(&alone), bits(&together.narrow(0, row, 1).unwrap()), "{dtype:?}, row {row}");
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu).unwrap();
    let (x, weight, f32) = (zeros(&[2, 6], DType::F32), zeros(&[4, 6], DType::F32), DType::F32);
    let cases = [
        (zeros(&[], f32), weight.clone(), None, "linear: x"),
        (zeros(&[2, 6], DType::U32), weight.clone(), None, "linear: x"),
        (x.clone(), zeros(&[4, 5], f32), None, "linear: weight"),
        (x.clone(), zeros(&[4, 6, 1], f32), None, "linear: weight"),
        (x.clone(), zeros(&[4, 6], DType::BF16), None, "linear: weight"),
        (x.clone(), weight.clone(), Some(zeros(&[6], f32)), "linear: bias"),
        (x, weight, Some(zeros(&[4], DType::F64)), "linear: bias"),
    ];
    for (x, weight, bias, name) in cases {
        let error = linear(&x, &weight, bias.as_ref()).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
