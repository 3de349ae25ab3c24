//! Results and gradients have the same bits on any number of threads.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{Random, bits, gradients, values, with_threads};
use subquadratic::Result;
use subquadratic::layers::{Mamba, MambaConfig};
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::ops::{
    CausalConv1d, Norm, NormKind, Segments, SelectiveScan, add_norm, causal_conv1d, gated_norm, linear, norm,
    selective_scan, silu_gate, softplus,
};

const THREADS: [usize; 4] = [1, 2, 3, 5];

/// What `run` returns has the same bits in pools of one to five threads.
#[track_caller]
fn same_on_any_threads(what: &str, run: impl Fn() -> Vec<Tensor> + Sync) {
    let all = THREADS.map(|threads| with_threads(threads, || run().iter().map(bits).collect::<Vec<_>>()));
    assert!(all[0].iter().flatten().any(|&bits| bits != 0), "{what}: all zero");
    for (threads, results) in THREADS.iter().zip(&all) {
        let places = all[0].iter().zip(results).map(|(one, many)| one == many);
        let same: Vec<bool> = places.collect();
        assert!(
            same.iter().all(|&same| same),
            "{what}: {threads} threads differ, results the same: {same:?}"
        );
    }
}

/// The outputs of `f` and its gradients, in every dtype.
#[track_caller]
fn check(what: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Sync) {
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::F64] {
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        same_on_any_threads(&format!("{what} in {dtype:?}"), || {
            let (mut results, gradients) = gradients(&inputs, &f);
            results.extend(gradients);
            results
        });
    }
}

#[test]
fn selective_scan_is_deterministic() {
    // few and many channels and rows: split over time, over channels, over rows
    for [b, l, d, n] in [[1, 300, 48, 16], [3, 41, 100, 5], [2, 1, 256, 16]] {
        let mut random = Random::new(1);
        let inputs = [
            random.normal((b, l, d)),
            random.uniform((b, l, d), 0.0, 0.5),
            random.uniform((d, n), -1.0, -0.1),
            random.normal((b, l, n)),
            random.normal((b, l, n)),
            random.normal(d),
            random.normal((b, l, d)),
            random.uniform(d, -2.0, 0.0),
            random.normal((b, d, n)),
        ];
        let segments = Segments::left_padded(&vec![l.div_ceil(2); b], l).unwrap();
        for segments in [None, Some(&segments)] {
            check(&format!("scan {b} {l} {d} {n}"), &inputs, |x| {
                let state = x[8].to_dtype(subquadratic::ops::accumulation_dtype(x[0].dtype()))?;
                let (y, last) = selective_scan(&SelectiveScan {
                    u: &x[0],
                    delta: &x[1],
                    a: &x[2],
                    b: &x[3],
                    c: &x[4],
                    d: Some(&x[5]),
                    z: Some(&x[6]),
                    delta_bias: Some(&x[7]),
                    softplus: true,
                    initial_state: Some(&state),
                    segments,
                })?;
                Ok(vec![y, last])
            });
        }
    }
}

#[test]
fn causal_conv1d_is_deterministic() {
    for [b, l, d, k] in [[1, 1000, 48, 4], [3, 41, 100, 3], [2, 1, 256, 8]] {
        let mut random = Random::new(2);
        let inputs = [random.normal((b, l, d)), random.normal((d, k)), random.normal(d)];
        check(&format!("convolution {b} {l} {d} {k}"), &inputs, |x| {
            let (y, last) = causal_conv1d(&CausalConv1d {
                x: &x[0],
                weight: &x[1],
                bias: Some(&x[2]),
                silu: true,
                initial_state: None,
                segments: None,
            })?;
            Ok(vec![y, last])
        });
    }
}

#[test]
fn norms_and_activations_are_deterministic() {
    for [rows, d] in [[1000, 96], [7, 768], [1, 33]] {
        let mut random = Random::new(3);
        let inputs = [random.normal((rows, d)), random.normal((rows, d)), random.normal(d), random.normal(d)];
        check(&format!("norms of {rows} rows of {d}"), &inputs, |x| {
            let rms =
                Norm { kind: NormKind::Rms, weight: Some(&x[2]), bias: None, eps: 1e-5, group_size: None };
            let layer = Norm { kind: NormKind::Layer, bias: Some(&x[3]), ..rms };
            let (sum, normal) = add_norm(&x[0], &x[1], &rms)?;
            Ok(vec![norm(&x[0], &layer)?, sum, normal, gated_norm(&x[0], &x[1], &rms, false)?])
        });
        check(&format!("activations of {rows} rows of {d}"), &inputs[..2], |x| {
            Ok(vec![softplus(&x[0])?, silu_gate(&x[0], &x[1])?])
        });
    }
}

#[test]
fn matrix_products_are_deterministic() {
    // rows, inputs, outputs: a prompt, a few rows, a step, narrow inner sizes, ragged ones
    let shapes = [
        [512, 768, 384],
        [4, 768, 3072],
        [1, 768, 3072],
        [37, 48, 1536],
        [300, 1536, 80],
        [64, 1000, 7],
        [3, 5, 2],
    ];
    for [m, k, n] in shapes {
        let mut random = Random::new(4);
        let inputs = [random.normal((m, k)), random.normal((n, k)), random.normal(n)];
        check(&format!("product {m} {k} {n}"), &inputs, |x| Ok(vec![linear(&x[0], &x[1], Some(&x[2]))?]));
    }
}

/// candle asks the gemm crate for as many threads as the machine has, whatever the pool: here for one to five.
#[test]
fn the_gemm_crate_is_deterministic() {
    let mut random = Random::new(8);
    for _ in 0..40 {
        let mut size = |many: usize| {
            let most = if random.int(0, 2) == 0 { 8 } else { many };
            random.int(1, most)
        };
        let (m, k, n) = (size(600), size(1600), size(600));
        let (a, b) = (values(&random.normal(m * k)), values(&random.normal(k * n)));
        for transposed in [false, true] {
            let f32s = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
            let f16s = |x: &[f64]| x.iter().map(|&x| half::f16::from_f64(x)).collect::<Vec<_>>();
            one_product(1.0, &a, &b, [m, k, n], transposed);
            one_product(1.0, &f32s(&a), &f32s(&b), [m, k, n], transposed);
            one_product(half::f16::ONE, &f16s(&a), &f16s(&b), [m, k, n], transposed);
        }
    }
}

/// `a [m, k]` times `b [k, n]` (its memory transposed if asked) through the gemm crate.
#[track_caller]
fn one_product<T>(one: T, a: &[T], b: &[T], [m, k, n]: [usize; 3], transposed: bool)
where
    T: Copy + PartialEq + Default + 'static,
{
    let [rows, columns] = if transposed { [1, k] } else { [n, 1] };
    let product = |threads: usize| {
        let mut y = vec![T::default(); m * n];
        let parallel = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
        // SAFETY: the strides reach exactly the `m k`, `k n` and `m n` elements of the three.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                y.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                1,
                k as isize,
                b.as_ptr(),
                columns as isize,
                rows as isize,
                T::default(),
                one,
                false,
                false,
                false,
                parallel,
            );
        }
        y
    };
    let alone = product(1);
    for threads in &THREADS[1..] {
        let name = std::any::type_name::<T>();
        assert!(alone == product(*threads), "{name} product {m} {k} {n}, {threads} threads, {transposed}");
    }
}

#[test]
fn the_layer_is_deterministic() {
    for (b, l, d) in [(1, 130, 64), (3, 17, 32)] {
        let mut random = Random::new(5);
        let mut inputs = vec![random.normal((b, l, d))];
        let config = MambaConfig::new(d);
        let (names, parameters): (Vec<String>, Vec<Tensor>) =
            Mamba::init(&config, &mut random.0, 1.0).unwrap().into_iter().unzip();
        inputs.extend(parameters);
        check(&format!("layer {b} {l} {d}"), &inputs, |x| {
            let wide = |name: &str| ["A_log", "D"].contains(&name);
            let tensors = names.iter().zip(&x[1..]).map(|(name, tensor)| {
                let dtype =
                    if wide(name) && tensor.dtype() != DType::F64 { DType::F32 } else { tensor.dtype() };
                Ok((name.clone(), tensor.to_dtype(dtype)?))
            });
            let tensors = tensors.collect::<Result<std::collections::HashMap<_, _>>>()?;
            let vb = candle_nn::VarBuilder::from_tensors(tensors, x[0].dtype(), &Device::Cpu);
            let layer = Mamba::new(&config, vb)?;
            let mut state = layer.init_state(b)?;
            let y = layer.forward_with_state(&x[0], &mut state)?;
            Ok(vec![y, state.conv, state.scan])
        });
    }
}

#[test]
fn the_model_is_deterministic() {
    let mut random = Random::new(6);
    let ids: Vec<u32> = (0..3 * 70).map(|_| random.int(0, 255) as u32).collect();
    let ids = Tensor::from_vec(ids, (3, 70), &Device::Cpu).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let model = LanguageModel::init(&ModelConfig::mamba(64, 3, 256), 0, dtype, &Device::Cpu).unwrap();
        same_on_any_threads(&format!("model in {dtype:?}"), || {
            let mut state = model.init_state(3).unwrap();
            let prompt = model.prefill(&ids, None, &mut state).unwrap();
            let step =
                model.forward_with_state(&ids.narrow(1, 0, 1).unwrap().contiguous().unwrap(), &mut state);
            let logits = model.forward(&ids).unwrap();
            let store =
                logits.to_dtype(DType::F32).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let mut results = vec![prompt.detach(), step.unwrap().detach(), logits.detach()];
            results.extend(model.variables().values().map(|variable| store.get(variable).unwrap().clone()));
            results
        });
    }
}

#[test]
#[should_panic(expected = "3 threads differ")]
fn a_difference_is_seen() {
    let threads = || (1.0 / rayon::current_num_threads().div_ceil(2) as f64) as f32;
    same_on_any_threads("threads", || vec![Tensor::full(threads(), 1, &Device::Cpu).unwrap()]);
}
