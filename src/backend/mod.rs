//! What the operators stand on, per kind of device: [`cpu`] (SIMD, vectorised functions, strided views) and `cuda`
//! (embedded kernels, launches, views).

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
