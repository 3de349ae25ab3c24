//! Benchmarks of the operators, layers and models.

fn main() {}
