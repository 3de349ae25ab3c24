//! The layers: parameters and operators.
