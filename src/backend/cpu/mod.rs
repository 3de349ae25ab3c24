//! The CPU back end: [`simd`] registers chosen at run time, [`math`] functions on them, strided [`view`]s of tensors,
//! [`product`]s of small matrices that are [`padded`], work in [`parallel`], large results in [`memory`].

pub(crate) mod math;
pub(crate) mod matrix;
pub(crate) mod memory;
pub(crate) mod padded;
pub(crate) mod parallel;
pub(crate) mod product;
pub(crate) mod simd;
pub(crate) mod view;
