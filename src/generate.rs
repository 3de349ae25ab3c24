//! Sampling and streaming generation.
