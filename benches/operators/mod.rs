//! The operators of `subquadratic::ops`.

pub mod attention;
pub mod causal_conv1d;
pub mod linear;
pub mod long_conv;
pub mod modal_conv;
pub mod norm;
pub mod retention;
pub mod selective_scan;
