//! Learns a text with a small byte-level HyenaDNA, or DNA letter by letter, and samples from it, or continues a prompt
//! with a checkpoint:
//!
//! ```text
//! cargo run --release --example hyena
//! cargo run --release --example hyena -- --fasta genome.fa.gz --minutes 10
//! cargo run --release --example hyena -- --model runs/hyena --prompt "In the beginning"
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

/// The most tokens of a sequence: what is trained on, and room to sample.
const LONGEST: usize = 1024;

fn main() -> ExitCode {
    let family = Family {
        name: "hyena",
        config: |hidden, layers, vocabulary| ModelConfig::hyena(hidden, layers, vocabulary, LONGEST),
        carry: false,
        defaults: Settings {
            hidden: 128,
            layers: 4,
            batch: 4,
            length: 512,
            lr: 3e-3,
            text: None,
            fasta: None,
        },
    };
    common::cli::run(|arguments| program::run(&family, &arguments))
}
