//! What the operators stand on, per kind of device: [`cpu`] (SIMD, vectorised functions, strided views).

pub(crate) mod cpu;
