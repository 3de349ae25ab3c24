//! Tapes, activation recomputation and the backward pass of deep graphs.

use candle_core::{DType, Device, Result, Tensor, Var};
use subquadratic::autograd::{backward, checkpoint, value_and_grad, vjp};
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::ops::{linear, silu};
use subquadratic::train::cross_entropy;

fn var(seed: u64, shape: (usize, usize)) -> Var {
    let n = shape.0 * shape.1;
    let data: Vec<f64> = (0..n as u64).map(|k| ((seed * 31 + k * 17) % 23) as f64 / 11.0 - 1.0).collect();
    Var::from_vec(data, shape, &Device::Cpu).unwrap()
}

/// Two inputs, two parameters, two outputs of different shapes.
fn block(x: &[Tensor], w: &Tensor, b: &Tensor) -> Result<Vec<Tensor>> {
    let h = x[0].matmul(w)?.tanh()?;
    let y = h.broadcast_add(b)?.mul(&x[1])?;
    let z = y.sqr()?.sum(1)?;
    Ok(vec![y, z])
}

fn vec(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn checkpointed_gradients_are_the_plain_ones() {
    let (x0, x1) = (var(1, (3, 4)), var(2, (3, 5)));
    let (w, b) = (var(3, (4, 5)), var(4, (1, 5)));
    type Use = fn(&[Tensor]) -> Result<Tensor>;
    let uses: [Use; 3] =
        [|y| y[0].exp()?.sum_all()? + y[1].sqr()?.sum_all()?, |y| y[0].sum_all(), |y| y[1].exp()?.sum_all()];
    for used in uses {
        // inner nodes and leaves as inputs
        let inner = x0.affine(2.0, 0.5).unwrap();
        let plain = block(&[inner.clone(), x1.as_tensor().clone()], &w, &b).unwrap();
        let plain_gradients = used(&plain).unwrap().backward().unwrap();

        let (w2, b2) = (w.as_tensor().clone(), b.as_tensor().clone());
        let saved = checkpoint(&[&inner, &x1], &[&w, &b], move |x| block(x, &w2, &b2)).unwrap();
        for (a, b) in plain.iter().zip(&saved) {
            assert_eq!(vec(a), vec(b));
        }
        let gradients = used(&saved).unwrap().backward().unwrap();
        for v in [&x0, &x1, &w, &b] {
            assert_eq!(vec(plain_gradients.get(v).unwrap()), vec(gradients.get(v).unwrap()));
        }
    }
}

#[test]
fn checkpoints_nest_and_repeat() {
    let (x, w) = (var(1, (4, 4)), var(2, (4, 4)));
    let step = |x: &Tensor, w: &Tensor| x.matmul(w)?.tanh()? + x;
    let plain = step(&step(&x, &w).unwrap(), &w).unwrap().sqr().unwrap().sum_all().unwrap();
    let want = plain.backward().unwrap();

    let w2 = w.as_tensor().clone();
    let y = checkpoint(&[&x], &[&w], move |x| {
        let w3 = w2.clone();
        let inner = checkpoint(&[&x[0]], &[&w2], move |x| Ok(vec![step(&x[0], &w3)?]))?;
        Ok(vec![step(&inner[0], &w2)?])
    })
    .unwrap();
    let loss = y[0].sqr().unwrap().sum_all().unwrap();
    for _ in 0..2 {
        let got = loss.backward().unwrap();
        for v in [&x, &w] {
            for (a, b) in vec(got.get(v).unwrap()).iter().zip(vec(want.get(v).unwrap())) {
                assert!((a - b).abs() < 1e-12 * b.abs().max(1.0));
            }
        }
    }
}

#[test]
fn untracked_inputs_and_constant_outputs_are_fine() {
    let (x, w) = (var(1, (3, 4)), var(2, (4, 5)));
    let plain = x.detach();
    let w2 = w.as_tensor().clone();
    let f = move |x: &[Tensor]| Ok(vec![x[0].matmul(&w2)?, x[0].ones_like()?]);
    let y = checkpoint(&[&plain], &[&w], f).unwrap();
    let loss = (y[0].sum_all().unwrap() + y[1].sum_all().unwrap()).unwrap();
    let gradients = loss.backward().unwrap();
    assert_eq!(gradients.get(&w).unwrap().dims(), [4, 5]);
    assert!(gradients.get(&plain).is_none());
}

#[test]
fn a_derived_parameter_is_refused() {
    let x = var(1, (3, 3));
    let derived = x.sqr().unwrap();
    let d = derived.clone();
    let error = checkpoint(&[&x], &[&derived], move |x| Ok(vec![(&x[0] * &d)?])).unwrap_err();
    assert!(error.to_string().contains("not a variable"), "{error}");
}

/// Runs `f` on a thread of 2 MiB, which candle's own recursion would overflow.
fn on_a_small_stack(f: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(2 << 20).spawn(f).unwrap().join().unwrap();
}

#[test]
fn deep_graphs_go_backward_and_are_dropped_on_a_small_stack() {
    on_a_small_stack(|| {
        let x = Var::new(1.0f64, &Device::Cpu).unwrap();
        let w = Var::new(1.0f64, &Device::Cpu).unwrap();
        let depth = 60_000;
        let mut y = x.as_tensor().clone();
        for _ in 0..depth {
            y = y.affine(1.0, 1e-3).unwrap();
        }
        // the gradient of w would keep the chain alive if it came back attached
        let gradients = backward((y * w.as_tensor()).unwrap()).unwrap();
        let value = |v: &Var| gradients.get(v).unwrap().to_scalar::<f64>().unwrap();
        assert_eq!(value(&x), 1.0);
        assert!((value(&w) - (1.0 + depth as f64 * 1e-3)).abs() < 1e-6);
        assert!(!gradients.get(&w).unwrap().track_op());
    });
}

#[test]
fn the_error_of_a_backward_pass_comes_back() {
    let x = Var::zeros((1, 1, 4), DType::F32, &Device::Cpu).unwrap();
    let kernel = Tensor::ones((1, 1, 2), DType::F32, &Device::Cpu).unwrap();
    let y = x.conv_transpose1d(&kernel, 0, 0, 1, 1, 1).unwrap();
    assert!(backward(y.sum_all().unwrap()).is_err());
}

/// A model whose blocks mix recorded operators, slices, casts and sums.
fn model(config: &ModelConfig) -> (LanguageModel, Tensor) {
    let model = LanguageModel::init(config, 1, DType::F64, &Device::Cpu).unwrap();
    let ids: Vec<u32> = (0..2 * 13).map(|i| (i * i % 11) as u32).collect();
    (model, Tensor::from_vec(ids, (2, 13), &Device::Cpu).unwrap())
}

#[test]
fn a_tape_gives_the_gradients_of_the_graph() {
    let striped = ModelConfig::striped("hyena attention mamba hyena", 16, 11).unwrap();
    for config in [ModelConfig::mamba(16, 2, 11), ModelConfig::retnet(16, 2, 11), striped] {
        let (mut model, ids) = model(&config);
        for recompute in [false, true] {
            model.set_recompute(recompute);
            let loss = || Ok(cross_entropy(&model.forward(&ids)?, &ids)?.total);
            let graph = loss().unwrap();
            let (value, got) = value_and_grad(loss).unwrap();
            assert_eq!(vec(&value), vec(&graph));
            let want = backward(graph).unwrap();
            for (name, variable) in model.variables() {
                let (got, want) = (got.get(variable).unwrap(), want.get(variable).unwrap());
                assert!(!got.track_op(), "{name}: the gradient holds a graph");
                for (got, want) in vec(got).into_iter().zip(vec(want)) {
                    assert!((got - want).abs() <= 1e-9 * want.abs() + 1e-12, "{name}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn tensors_of_a_tape_are_used_in_any_way() {
    let (x, w) = (var(1, (3, 4)), var(2, (4, 4)));
    type Use = fn(&Tensor, &Tensor) -> Result<Tensor>;
    let uses: [Use; 6] = [
        // used twice, once through candle; a result that nobody uses
        |x, w| {
            let y = linear(x, w, None).unwrap();
            let _unused = silu(&y).unwrap();
            silu(&y).unwrap().add(&y.narrow(1, 1, 2)?.pad_with_zeros(1, 1, 1)?)?.sqr()
        },
        // two slices of one tensor into one operator, which are its two factors
        |x, w| {
            let y = linear(x, w, None).unwrap();
            Ok(linear(&y.narrow(1, 0, 2)?, &y.narrow(1, 2, 2)?, None).unwrap())
        },
        // a leaf as it is, a variable through candle alone, no variable at all
        |x, w| Ok(linear(x, w, None).unwrap()),
        |x, _| x.exp(),
        |x, _| x.detach().exp(),
        // one tensor as both arguments
        |_, w| Ok(linear(w, w, None).unwrap()),
    ];
    for (i, used) in uses.into_iter().enumerate() {
        let result = used(&x, &w).unwrap();
        let gradient = Tensor::randn(0f64, 1.0, result.shape(), &Device::Cpu).unwrap();
        let weighted = result.mul(&gradient).unwrap().backward().unwrap();
        let (_, got_weighted) = vjp(|| Ok(used(&x, &w)?), &gradient).unwrap();
        let want = result.backward().unwrap();
        let (_, got) = value_and_grad(|| Ok(used(&x, &w)?)).unwrap();
        for (v, got, want) in
            [&x, &w].into_iter().flat_map(|v| [(v, &got, &want), (v, &got_weighted, &weighted)])
        {
            let values = |x: Option<&Tensor>| x.map(vec);
            let (got, want) = (values(got.get(v)), values(want.get(v)));
            assert_eq!(got.is_some(), want.is_some(), "use {i}");
            for (got, want) in got.into_iter().flatten().zip(want.into_iter().flatten()) {
                assert!((got - want).abs() < 1e-12, "use {i}: {got} {want}");
            }
        }
    }
}

#[test]
fn a_tape_ends_with_its_function() {
    let (x, w) = (var(1, (3, 4)), var(2, (4, 4)));
    let error = value_and_grad(|| {
        linear(&x, &w, None)?;
        linear(&w, &x.t()?, None)
    });
    assert!(error.unwrap_err().to_string().contains("linear: weight"));
    let error = vjp(|| linear(&x, &w, None), &w).unwrap_err();
    assert!(error.to_string().contains("vjp: gradient: expected shape [3, 4], got [4, 4]"), "{error}");
    let caught = std::panic::catch_unwind(|| value_and_grad(|| panic!("in the function")));
    assert!(caught.is_err());
    // an inner tape leaves the outer one as it was
    let (_, got) = value_and_grad(|| {
        let y = linear(&x, &w, None)?;
        value_and_grad(|| linear(&y.detach(), &w, None))?;
        silu(&y)
    })
    .unwrap();
    let want = silu(&linear(&x, &w, None).unwrap()).unwrap();
    assert!(!want.is_variable(), "behind a tape, operators are in candle's graph");
    let want = want.backward().unwrap();
    assert_eq!(vec(got.get(&x).unwrap()), vec(want.get(&x).unwrap()));
    assert_eq!(vec(got.get(&w).unwrap()), vec(want.get(&w).unwrap()));
}
