//! The CPU back end: [`simd`] registers chosen at run time, [`math`] functions on them, strided [`view`]s of tensors.

pub(crate) mod math;
pub(crate) mod simd;
pub(crate) mod view;
