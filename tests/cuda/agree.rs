//! What the tests of CUDA share.

use crate::common::*;
use candle_core::{DType, Device, Tensor};

/// The tensors on another device.
pub fn to(tensors: &[Tensor], device: &Device) -> Vec<Tensor> {
    tensors.iter().map(|x| x.to_device(device).unwrap()).collect()
}

/// How far results of one computation in `dtype` on two devices may lie apart.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-10,
        DType::F32 => 3e-5,
        other => 3.0 * rounding(other),
    }
}

/// Results and gradients of `f` on the CPU and on `device`; all of them must agree.
#[track_caller]
pub fn agree(
    what: &str,
    device: &Device,
    inputs: &[Tensor],
    tolerance: f64,
    f: impl Fn(&[Tensor]) -> subquadratic::Result<Vec<Tensor>>,
) {
    let (want, want_gradients) = gradients(inputs, &f);
    let (got, got_gradients) = gradients(inputs, |x| {
        let outputs = f(&to(x, device))?;
        assert!(outputs.iter().all(|y| y.device().same_device(device)));
        Ok(to(&outputs, &Device::Cpu))
    });
    // without a graph, too
    let plain = to(&f(&to(inputs, device)).unwrap(), &Device::Cpu);
    for (i, ((got, want), plain)) in got.iter().zip(&want).zip(&plain).enumerate() {
        assert_eq!(got.dtype(), want.dtype());
        assert_close(&format!("{what}: result {i}"), got, want, tolerance);
        assert_close(&format!("{what}: result {i} without a graph"), plain, want, tolerance);
    }
    for (i, (got, want)) in got_gradients.iter().zip(&want_gradients).enumerate() {
        assert_eq!(got.dtype(), want.dtype());
        assert_close(&format!("{what}: gradient {i}"), got, want, tolerance);
    }
}
