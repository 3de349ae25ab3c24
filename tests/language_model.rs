//! The streaming law for the whole model: how tokens are cut into calls, packed and padded does not matter.

use candle_core::{DType, Device, Tensor};
use subquadratic::Result;
use subquadratic::models::{LanguageModel, ModelConfig, load};
use subquadratic::ops::Segments;

fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (a.to_dtype(DType::F64).unwrap(), b.to_dtype(DType::F64).unwrap());
    let sum = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let error = sum((&a - &b).unwrap()) / sum(b).max(1e-30);
    assert!(error < tolerance, "{error:e}");
}

#[test]
fn steps_padding_saving_and_recomputation_agree_with_one_call() -> Result<()> {
    let mut config = ModelConfig::mamba(24, 2, 50);
    config.tie_embeddings = false;
    let model = LanguageModel::init(&config, 1, DType::F64, &Device::Cpu)?;
    let ids = Tensor::new(&[[1u32, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], &Device::Cpu)?;
    let whole = model.forward(&ids)?;
    let mut state = model.init_state(2)?;
    let mut parts = vec![];
    for t in 0..7 {
        parts.push(model.forward_with_state(&ids.narrow(1, t, 1)?, &mut state)?);
    }
    close(&Tensor::cat(&parts, 1)?, &whole, 1e-12);
    let mut state = model.init_state(2)?;
    let segments = Segments::right_padded(&[7, 4], 7)?;
    let last = model.prefill(&ids, Some(&segments), &mut state)?;
    close(&last.get(1)?, &whole.get(1)?.get(3)?, 1e-12);
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path())?;
    let back = load(dir.path(), DType::F64, &Device::Cpu)?;
    close(&back.forward(&ids)?, &whole, 1e-12);
    let mut again = model.clone();
    again.set_recompute(true);
    let loss = whole.sqr()?.sum_all()?.backward()?;
    let loss2 = again.forward(&ids)?.sqr()?.sum_all()?.backward()?;
    for (name, var) in model.variables() {
        let (a, b) = (loss.get(var).expect(name), loss2.get(var).expect(name));
        close(a, b, 1e-10);
    }
    Ok(())
}
