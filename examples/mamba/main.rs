//! Learns a text with a small byte-level Mamba and samples from it, or continues a prompt with a checkpoint:
//!
//! ```text
//! cargo run --release --example mamba
//! cargo run --release --example mamba -- --text book.txt --hidden 384 --layers 8 --minutes 30 --out runs/book
//! cargo run --release --example mamba -- --model runs/book --prompt "Once upon a time"
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
        name: "mamba",
        config: ModelConfig::mamba,
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
