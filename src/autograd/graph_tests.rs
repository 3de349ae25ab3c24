//! What operators in the graph promise: every gradient arrives, for any number of inputs, outputs, passes and threads.

use super::super::record::{record, record_all, storage_of};
use super::*;
use candle_core::{Device, Var};

/// `y[j] = sum_i (i + 1 + 10 j) x[i]^2` with its true gradient.
fn squares(inputs: &[&Tensor], outputs: usize) -> Result<Vec<Tensor>> {
    let weight = |i: usize, j: usize| (i + 1 + 10 * j) as f64;
    let detached: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
    let forward = |x: &[Tensor], j: usize| {
        let mut sum = x[0].zeros_like()?;
        for (i, x) in x.iter().enumerate() {
            sum = (sum + (x.sqr()? * weight(i, j))?)?;
        }
        Ok::<_, candle_core::Error>(sum)
    };
    let results = (0..outputs).map(|j| storage_of(&forward(&detached, j)?)).collect::<Result<Vec<_>>>()?;
    record_all("squares", inputs, results, move |gradients| {
        assert_eq!(gradients.len(), outputs);
        let gradient = |(i, x): (usize, &Tensor)| {
            let mut sum = x.zeros_like()?;
            for (j, g) in gradients.iter().enumerate() {
                if let Some(g) = g {
                    sum = (sum + (g * x)? * (2.0 * weight(i, j)))?;
                }
            }
            Ok(Some(sum))
        };
        detached.iter().enumerate().map(gradient).collect()
    })
}

fn var(seed: usize) -> Var {
    let x: Vec<f64> = (0..5).map(|k| ((seed * 7 + k * 3) % 11) as f64 / 4.0 - 1.0).collect();
    Var::from_vec(x, 5, &Device::Cpu).unwrap()
}

/// What [`squares`] must give for one input and a loss `sum_j loss[j] sum(y[j])`.
fn expected(x: &Tensor, i: usize, loss: &[f64]) -> Vec<f64> {
    let scale: f64 = loss.iter().enumerate().map(|(j, w)| w * (i + 1 + 10 * j) as f64).sum();
    x.to_vec1::<f64>().unwrap().iter().map(|x| 2.0 * x * scale).collect()
}

fn loss(outputs: &[Tensor], weights: &[f64]) -> Tensor {
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu).unwrap();
    for (y, &w) in outputs.iter().zip(weights).filter(|(_, w)| **w != 0.0) {
        sum = (sum + (y.sum_all().unwrap() * w).unwrap()).unwrap();
    }
    sum
}

#[test]
fn every_number_of_inputs_and_outputs() {
    for n in 1..=12 {
        for m in 1..=4 {
            for untracked in [0, n / 2] {
                for unused in [None, Some(0), Some(m - 1)] {
                    let vars: Vec<Var> = (0..n).map(var).collect();
                    let plain: Vec<Tensor> = vars.iter().map(|v| v.detach()).collect();
                    // leaves, untracked tensors and inner nodes mixed
                    let inner = vars[n - 1].affine(1.0, 0.0).unwrap();
                    let inputs: Vec<&Tensor> = (0..n)
                        .map(|i| match i {
                            _ if i < untracked => &plain[i],
                            _ if i == n - 1 => &inner,
                            _ => vars[i].as_tensor(),
                        })
                        .collect();
                    let mut weights = [0.5, -1.0, 2.0, 3.0][..m].to_vec();
                    if m > 1
                        && let Some(unused) = unused
                    {
                        weights[unused] = 0.0;
                    }
                    let outputs = squares(&inputs, m).unwrap();
                    let gradients = loss(&outputs, &weights).backward().unwrap();
                    for (i, v) in vars.iter().enumerate() {
                        let got = gradients.get(v);
                        if i < untracked {
                            assert!(got.is_none());
                        } else {
                            let got = got.unwrap().to_vec1::<f64>().unwrap();
                            assert_eq!(got, expected(v, i, &weights), "{i} of {n} -> {m}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_tracked_records_nothing() {
    let x = var(1).detach();
    let y = squares(&[&x, &x], 2).unwrap();
    assert!(y.iter().all(|y| !y.track_op()));
}

#[test]
fn one_tensor_in_two_places_gets_both_gradients() {
    let x = var(3);
    let y = squares(&[&x, &x, &var(2), &x], 1).unwrap();
    let gradients = loss(&y, &[1.0]).backward().unwrap();
    let want: Vec<f64> = x.to_vec1::<f64>().unwrap().iter().map(|x| 2.0 * x * (1.0 + 2.0 + 4.0)).collect();
    assert_eq!(gradients.get(&x).unwrap().to_vec1::<f64>().unwrap(), want);
}

#[test]
fn one_graph_goes_backward_many_times_and_from_many_threads() {
    let vars: Vec<Var> = (0..5).map(var).collect();
    let inputs: Vec<&Tensor> = vars.iter().map(|v| v.as_tensor()).collect();
    let outputs = squares(&inputs, 2).unwrap();
    let check = |weights: [f64; 2]| {
        for _ in 0..50 {
            let gradients = loss(&outputs, &weights).backward().unwrap();
            for (i, v) in vars.iter().enumerate() {
                assert_eq!(gradients.get(v).unwrap().to_vec1::<f64>().unwrap(), expected(v, i, &weights));
            }
        }
    };
    check([1.0, 1.0]);
    thread::scope(|scope| {
        for k in 0..4 {
            let check = &check;
            scope.spawn(move || check([k as f64 + 1.0, k as f64 - 2.5]));
        }
    });
}

#[test]
fn a_finished_pass_leaves_nothing_behind() {
    let x = var(1);
    let gradient = x.ones_like().unwrap();
    let given = vec![Some(gradient.clone()), Some(gradient.clone()), None];
    let recording = Recording {
        name: "leak",
        tracked: vec![true, false, true],
        outputs: 2,
        backward: Box::new(move |_| Ok(given.clone())),
        passes: Mutex::default(),
    };
    recording.take_output_gradient(1, gradient);
    recording.run().unwrap();
    for index in [0, 2] {
        assert_eq!(recording.passes().len(), 1);
        recording.input_gradient(index, &x).unwrap();
    }
    assert!(recording.passes().is_empty());
}

#[test]
fn a_wrong_gradient_is_an_error() {
    let x = var(1);
    let fails = |gradients: fn(&Tensor) -> Gradients| {
        let one = storage_of(&x.detach()).unwrap();
        let y = record("wrong", &[&x], [one], move |[g]| Ok(gradients(g.unwrap()))).unwrap();
        y[0].sum_all().unwrap().backward().unwrap_err().to_string()
    };
    assert!(fails(|g| vec![Some(g.narrow(0, 0, 2).unwrap())]).contains("wrong: gradient 0"));
    assert!(fails(|g| vec![Some(g.to_dtype(DType::F32).unwrap())]).contains("F32"));
    assert!(fails(|_| vec![]).contains("0 gradients for 1 inputs"));
    assert!(fails(|_| vec![None, None]).contains("2 gradients for 1 inputs"));
}

#[test]
fn no_gradient_is_zero() {
    let x = var(1);
    let inner = x.affine(3.0, 0.0).unwrap();
    let one = storage_of(&x.detach()).unwrap();
    let y = record("none", &[&inner], [one], |_| Ok(vec![None])).unwrap();
    let gradients = y[0].sum_all().unwrap().backward().unwrap();
    assert_eq!(gradients.get(&x).unwrap().to_vec1::<f64>().unwrap(), [0.0; 5]);
}
