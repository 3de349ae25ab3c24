//! CUDA against the CPU: every operator, flag and dtype, the streaming law, gradients, determinism, whole models.
//!
//! One executable, to be carried to a machine with a GPU. Without a GPU, or built without the feature `cuda`, every test
//! prints that it was skipped.
#![cfg_attr(not(feature = "cuda"), allow(unused))]

#[cfg(feature = "cuda")]
#[path = "../selective_scan/case.rs"]
mod case;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
mod convolution;
#[cfg(feature = "cuda")]
mod model;
#[cfg(feature = "cuda")]
mod norm;
#[cfg(feature = "cuda")]
mod scan;

use candle_core::{DType, Device, Tensor};
use common::*;

/// The GPU, or a printed line.
pub fn gpu() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let reason = error.to_string();
            println!("skipped: no CUDA device ({})", reason.lines().next().unwrap_or_default());
            None
        }
    }
}

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

#[test]
fn there_is_a_gpu() {
    if gpu().is_some() {
        println!("running on CUDA device 0");
    }
}
