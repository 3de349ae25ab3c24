//! Embeddings: rows of a table, and the sums of their gradients.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{Random, assert_close, bits, rounding, weighted_sum, with_threads};
use subquadratic::ops::embedding;

#[test]
fn rows_and_their_gradient_are_the_definition() {
    let mut random = Random::new(3);
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for (rows, width, tokens) in [(1, 1, 1), (5, 3, 40), (300, 17, 64), (7, 2, 0)] {
            let weight = Var::from_tensor(&random.normal((rows, width)).to_dtype(dtype).unwrap()).unwrap();
            let ids: Vec<u32> = (0..tokens).map(|_| random.int(0, rows - 1) as u32).collect();
            let ids = Tensor::from_vec(ids, (1, tokens), &Device::Cpu).unwrap();
            let y = embedding(&weight, &ids).unwrap();
            assert_eq!((y.dims(), y.dtype()), ([1, tokens, width].as_slice(), dtype));
            let want = weight.index_select(&ids.flatten_all().unwrap(), 0).unwrap();
            assert_eq!(bits(&y), bits(&want));
            if tokens == 0 {
                continue;
            }
            // the same sums in f64
            let wide = Var::from_tensor(&weight.to_dtype(DType::F64).unwrap()).unwrap();
            let want = wide.index_select(&ids.flatten_all().unwrap(), 0).unwrap();
            let want = want.reshape(y.shape()).unwrap();
            let got = weighted_sum(&[y]).unwrap().backward().unwrap();
            let want = weighted_sum(&[want]).unwrap().backward().unwrap();
            let (got, want) = (got.get(&weight).unwrap(), want.get(&wide).unwrap());
            assert_eq!(got.dtype(), dtype);
            assert_close(&format!("{dtype:?} {rows}"), got, want, 2.0 * rounding(dtype));
        }
    }
}

#[test]
fn a_frequent_token_is_summed_wide() {
    // in bf16, adding 1 to 256 changes nothing
    let weight = Var::zeros((2, 1), DType::BF16, &Device::Cpu).unwrap();
    let ids = Tensor::zeros(1000, DType::U32, &Device::Cpu).unwrap();
    let gradients = embedding(&weight, &ids).unwrap().sum_all().unwrap().backward().unwrap();
    let gradient = gradients.get(&weight).unwrap().to_dtype(DType::F32).unwrap();
    assert_eq!(gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1000.0, 0.0]);
}

#[test]
fn threads_change_no_bit() {
    let run = |threads| {
        with_threads(threads, || {
            let mut random = Random::new(4);
            let weight = Var::from_tensor(&random.normal((50, 33)).to_dtype(DType::F32).unwrap()).unwrap();
            let ids: Vec<u32> = (0..500).map(|_| random.int(0, 49) as u32).collect();
            let ids = Tensor::from_vec(ids, 500, &Device::Cpu).unwrap();
            let loss = weighted_sum(&[embedding(&weight, &ids).unwrap()]).unwrap();
            bits(loss.backward().unwrap().get(&weight).unwrap())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn what_does_not_fit_is_named() {
    let weight = Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
    let ids = Tensor::new(&[0u32, 4], &Device::Cpu).unwrap();
    let error = embedding(&weight, &ids).unwrap_err().to_string();
    assert!(error.contains("embedding: id") && error.contains("below V = 4"), "{error}");
    let error = embedding(&weight, &ids.to_dtype(DType::F32).unwrap()).unwrap_err().to_string();
    assert!(error.contains("embedding: ids"), "{error}");
    let error = embedding(&weight.flatten_all().unwrap(), &ids).unwrap_err().to_string();
    assert!(error.contains("embedding: weight"), "{error}");
}
