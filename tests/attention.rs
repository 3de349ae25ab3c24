//! Attention: its formula over every kind of range, dtypes, layouts, gradients, threads.

mod common;

use candle_core::{DType, Device, Tensor};
use common::*;
use std::ops::Range;
use subquadratic::ops::attention::{attention_reference, causal};
use subquadratic::ops::{Attention, attention};

/// q, k, v and the ranges.
struct Case {
    tensors: Vec<Tensor>,
    keys: Vec<Range<usize>>,
    scale: f64,
}

impl Case {
    fn new(random: &mut Random, dims: [usize; 7]) -> Self {
        let [b, l, m, h, g, k, v] = dims;
        let tensors =
            vec![random.normal((b, l, h, k)), random.normal((b, m, g, k)), random.normal((b, m, g, v))];
        let keys = match random.int(0, 3) {
            0 if m >= l => causal(b, l, m, None),
            1 if m >= l => causal(b, l, m, Some(random.int(1, 9))),
            _ => (0..b * l).map(|_| random.int(0, m)..random.int(0, m)).collect(),
        };
        Self { tensors, keys, scale: (k as f64).powf(-0.5) }
    }

    fn random(random: &mut Random, lengths: &[usize]) -> Self {
        let mut pick = |of: &[usize]| of[random.int(0, of.len() - 1)];
        let g = pick(&[1, 2, 3]);
        let dims = [
            pick(&[1, 2]),
            pick(lengths),
            pick(lengths),
            g * pick(&[1, 2, 5]),
            g,
            pick(&[4, 17]),
            pick(&[3, 32]),
        ];
        Self::new(random, dims)
    }

    fn args<'a>(&'a self, t: &'a [Tensor]) -> Attention<'a> {
        Attention { q: &t[0], k: &t[1], v: &t[2], scale: self.scale, keys: &self.keys }
    }

    fn all(&self, t: &[Tensor], run: fn(&Attention) -> subquadratic::Result<Tensor>) -> Vec<Tensor> {
        let (mut outputs, gradients) = gradients(t, |t| Ok(vec![run(&self.args(t))?]));
        outputs.extend(gradients);
        outputs
    }
}

#[test]
fn equals_the_reference_with_its_gradients() {
    let random = &mut Random::new(1);
    for seed in 0..60 {
        let case = Case::random(random, &[0, 1, 5, 40, 150, 300]);
        let want = case.all(&case.tensors, attention_reference);
        for (i, (got, want)) in case.all(&case.tensors, attention).iter().zip(&want).enumerate() {
            assert_close(&format!("{seed} {:?} result {i}", case.tensors), got, want, 1e-11);
        }
    }
}

#[test]
fn gradients_are_finite_differences() {
    let random = &mut Random::new(2);
    for dims in [[1, 3, 5, 2, 1, 3, 2], [2, 4, 4, 4, 2, 2, 3]] {
        let mut case = Case::new(random, dims);
        case.keys = causal(dims[0], dims[1], dims[2], Some(3));
        check_gradients("attention", &["q", "k", "v"], &case.tensors, |t| {
            Ok(vec![attention(&case.args(t))?])
        });
    }
}

#[test]
fn every_dtype_is_near_f64() {
    let random = &mut Random::new(3);
    for _ in 0..20 {
        let case = Case::random(random, &[5, 150, 300]);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let low: Vec<Tensor> = case.tensors.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
            let exact: Vec<Tensor> = low.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
            let want = case.all(&exact, attention);
            for (i, (got, want)) in case.all(&low, attention).iter().zip(&want).enumerate() {
                assert_eq!(got.dtype(), dtype);
                // where every query sees one key, products have no gradient
                let nothing = values(want).iter().all(|x| x.abs() < 1e-9);
                let want = if nothing { &want.zeros_like().unwrap() } else { want };
                let tolerance = 64.0 * rounding(DType::F32) + 8.0 * rounding(dtype);
                assert_close(&format!("{dtype:?} result {i}"), got, want, tolerance);
            }
        }
    }
}

#[test]
fn large_products_and_slices_come_out_right() {
    let random = &mut Random::new(4);
    let mut case = Case::new(random, [2, 70, 70, 4, 2, 8, 8]);
    case.keys = causal(2, 70, 70, None);
    case.tensors[0] = (&case.tensors[0] * 1e3).unwrap();
    // as slices of one projection [B, L, (H + 2 G) K]
    let flat: Vec<Tensor> = case.tensors.iter().map(|t| t.flatten_from(2).unwrap()).collect();
    let joint = Tensor::cat(&flat, 2).unwrap();
    let part = |start, heads| joint.narrow(2, start, heads * 8).unwrap().reshape((2, 70, heads, 8)).unwrap();
    let slices = [part(0, 4), part(32, 2), part(48, 2)];
    let got = attention(&case.args(&slices)).unwrap();
    assert_close("slices", &got, &attention_reference(&case.args(&case.tensors)).unwrap(), 1e-11);
}

#[test]
fn threads_change_no_bit() {
    let random = &mut Random::new(5);
    let mut case = Case::new(random, [2, 200, 200, 6, 3, 16, 16]);
    case.keys = causal(2, 200, 200, None);
    let t: Vec<Tensor> = case.tensors.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
    let run = || case.all(&t, attention).iter().map(bits).collect::<Vec<_>>();
    let one = with_threads(1, run);
    assert!((2..5).all(|threads| with_threads(threads, run) == one));
}

#[test]
fn bad_input_is_named() {
    let case = Case::new(&mut Random::new(6), [1, 2, 2, 4, 2, 3, 3]);
    let fails = |i: usize, tensor: Tensor| {
        let mut t = case.tensors.clone();
        t[i] = tensor;
        attention(&case.args(&t)).unwrap_err().to_string()
    };
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F64, &Device::Cpu).unwrap();
    assert!(fails(0, zeros(&[2, 2])).contains("[B, L, H, K]"));
    assert!(fails(1, zeros(&[1, 2, 3, 3])).contains("a divisor of 4"));
    assert!(fails(2, zeros(&[1, 3, 2, 3])).contains("attention: v"));
    assert!(fails(1, case.tensors[1].to_dtype(DType::F32).unwrap()).contains("F64, as q has"));
    let args = case.args(&case.tensors);
    let error = |args: Attention| attention(&args).unwrap_err().to_string();
    assert!(error(Attention { keys: &case.keys[1..], ..args }).contains("2 ranges"));
    assert!(error(Attention { keys: &[0..1, 0..9], ..args }).contains("within 2"));
}
