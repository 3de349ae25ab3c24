//! One language model, built from one configuration.
