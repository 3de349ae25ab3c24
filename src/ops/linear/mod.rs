//! Matrix products with weights.
