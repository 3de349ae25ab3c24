//! CUDA against the CPU: every operator, flag and dtype, the streaming law, gradients, determinism, whole models.
//!
//! One executable, to be carried to a machine with a GPU. Without a GPU, or built without the feature `cuda`, every test
//! prints that it was skipped.
//!
//! The tests of `sanitizer` are a small grid of all kernels for the tools of compute-sanitizer:
//! `compute-sanitizer --tool memcheck <executable> sanitizer:: --test-threads=1`, and so with racecheck and initcheck (with
//! more threads racecheck loses sight of launches). Racecheck reports the ring of weights in `sanitizer::decoding`: there it
//! counts a wait on a barrier in shared memory for nothing. Of a ring of two warps alone, copied to in any way, it reports the
//! same with the waits and without. Initcheck reports `a_step_of_training` and `a_retnet`, where candle's kernels are among
//! those reported; most likely what cuBLAS wrote, which was not shown. Synccheck has no room for the ring's barriers, and does not end there.

#[cfg(feature = "cuda")]
mod agree;
#[cfg(feature = "cuda")]
#[path = "../selective_scan/case.rs"]
mod case;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "cuda")]
mod convolution;
#[cfg(feature = "cuda")]
mod decoder;
#[cfg(feature = "cuda")]
#[path = "../decoder/laws.rs"]
mod decoder_laws;
#[cfg(feature = "cuda")]
mod elementwise;
#[cfg(feature = "cuda")]
mod model;
#[cfg(feature = "cuda")]
mod norm;
#[cfg(feature = "cuda")]
mod pool;
#[cfg(feature = "cuda")]
#[path = "../retention/pool_laws.rs"]
mod pool_laws;
#[cfg(feature = "cuda")]
mod retention;
#[cfg(feature = "cuda")]
#[path = "../retention/case.rs"]
mod retention_case;
#[cfg(feature = "cuda")]
mod sanitizer;
#[cfg(feature = "cuda")]
mod scan;
#[cfg(feature = "cuda")]
mod train;

use candle_core::Device;

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

#[test]
fn there_is_a_gpu() {
    if gpu().is_some() {
        println!("running on CUDA device 0");
    }
}

#[test]
fn the_most_memory_in_use_is_known() {
    let devices = gpu().into_iter().chain(cfg!(target_os = "linux").then_some(Device::Cpu));
    for device in devices {
        let bytes = 64 << 20;
        let x = candle_core::Tensor::ones(bytes, candle_core::DType::U8, &device).unwrap();
        drop(x);
        let most = subquadratic::peak_bytes(&device).unwrap();
        assert!(most >= bytes as u64, "{device:?}: {most}");
    }
}
