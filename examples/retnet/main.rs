//! Learns a text with a small byte-level RetNet and samples from it, or continues a prompt with a checkpoint; the forms
//! of its retention are one function at different costs:
//!
//! ```text
//! cargo run --release --example retnet
//! cargo run --release --example retnet -- --form parallel --steps 100
//! cargo run --release --example retnet -- --model runs/retnet --prompt "Once upon a time" --form recurrent
//! ```

#[path = "../common"]
mod common {
    pub mod cli;
    pub mod curve;
    pub mod dna;
    pub mod form;
    pub mod program;
    pub mod run;
    pub mod sample;
    pub mod text;
    pub mod tokenizer;
}

use common::program::{self, Family};
use common::run::Settings;
use std::process::ExitCode;
use subquadratic::models::ModelConfig;

fn main() -> ExitCode {
    let family = Family {
        name: "retnet",
        config: ModelConfig::retnet,
        carry: true,
        defaults: Settings {
            hidden: 192,
            layers: 4,
            batch: 16,
            length: 128,
            lr: 6e-3,
            text: None,
            fasta: None,
        },
    };
    common::cli::run(|arguments| program::run(&family, &arguments))
}
