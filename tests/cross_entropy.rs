//! The loss and its gradient against their definitions.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{Random, assert_close, values};
use subquadratic::train::{IGNORE, cross_entropy};

/// `-log softmax(logits)[target]`, summed, number by number.
fn loss_by_definition(logits: &Tensor, targets: &[u32]) -> f64 {
    let vocabulary = *logits.dims().last().unwrap();
    let logits = values(logits);
    let rows = logits.chunks(vocabulary).zip(targets).filter(|(_, target)| **target != IGNORE);
    rows.map(|(row, &target)| {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
        sum.ln() + largest - row[target as usize]
    })
    .sum()
}

#[test]
fn cross_entropy_is_its_definition_and_so_is_its_gradient() {
    let mut random = Random::new(5);
    for (dtype, tolerance) in
        [(DType::F64, 1e-13), (DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 1e-2)]
    {
        for vocabulary in [1, 2, 17, 256, 1500] {
            let logits = (random.normal((2, 3, vocabulary)) * 3.0).unwrap().to_dtype(dtype).unwrap();
            let mut ids: Vec<u32> = (0..6).map(|_| random.int(0, vocabulary - 1) as u32).collect();
            ids[1] = IGNORE;
            let targets = Tensor::from_slice(&ids, (2, 3), &Device::Cpu).unwrap();
            let logits = Var::from_tensor(&logits).unwrap();
            let loss = cross_entropy(&logits, &targets).unwrap();
            assert_eq!(loss.targets, 5);
            let want = loss_by_definition(&logits, &ids);
            let got = values(&loss.total)[0];
            assert!((got - want).abs() <= 1e-6 * want.abs() + 1e-6, "{dtype:?} {vocabulary}: {got} {want}");
            assert_eq!(loss.total.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });

            let gradients = loss.mean().unwrap().backward().unwrap();
            let gradient = gradients.get(&logits).unwrap();
            assert_eq!(gradient.dtype(), dtype);
            let wide = logits.to_dtype(DType::F64).unwrap();
            let softmax = candle_nn::ops::softmax(&wide, 2).unwrap();
            let mut want = values(&softmax);
            for (t, &id) in ids.iter().enumerate() {
                let row = &mut want[t * vocabulary..][..vocabulary];
                match id {
                    IGNORE => row.fill(0.0),
                    id => row[id as usize] -= 1.0,
                }
                row.iter_mut().for_each(|x| *x /= 5.0);
            }
            let want = Tensor::from_vec(want, (2, 3, vocabulary), &Device::Cpu).unwrap();
            assert_close(&format!("{dtype:?} {vocabulary}"), gradient, &want, tolerance);
        }
    }
}

#[test]
fn cross_entropy_of_a_padded_vocabulary_and_of_extremes() {
    let mut random = Random::new(6);
    let padded = Var::from_tensor(&random.normal((4, 10))).unwrap();
    let ids = [0u32, 6, 3, 2];
    let targets = Tensor::new(&ids, &Device::Cpu).unwrap();
    let view = padded.narrow(1, 0, 7).unwrap();
    let loss = cross_entropy(&view, &targets).unwrap();
    assert!((values(&loss.total)[0] - loss_by_definition(&view, &ids)).abs() < 1e-12);
    let gradient = loss.total.backward().unwrap().get(&padded).unwrap().narrow(1, 7, 3).unwrap();
    assert!(values(&gradient).iter().all(|&g| g == 0.0));

    // far from zero, and a certain answer
    let logits = Tensor::new(&[[1e4f32, -1e4, 0.0], [-3e38, 3e38, 0.0]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
    assert_eq!(values(&cross_entropy(&logits, &targets).unwrap().total), [0.0]);
    let nan = Tensor::new(&[[0f32, f32::NAN, 1.0], [0.0; 3]], &Device::Cpu).unwrap();
    assert!(values(&cross_entropy(&nan, &targets).unwrap().total)[0].is_nan());
}

#[test]
fn bad_targets_are_named() {
    let logits = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
    let message = |targets: Tensor| cross_entropy(&logits, &targets).unwrap_err().to_string();
    let ids = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap();
    assert!(message(ids(&[0, 3])).contains("below V = 3"));
    assert!(message(ids(&[0])).contains("targets"));
    assert!(message(Tensor::new(&[0i64, 1], &Device::Cpu).unwrap()).contains("u32"));
    let none = cross_entropy(&logits, &ids(&[IGNORE, IGNORE])).unwrap();
    assert_eq!((none.targets, values(&none.total)[0]), (0, 0.0));
    assert!(none.mean().is_err());
}
