//! Learns a text with a small byte-level hybrid of gated modal convolutions and attention and samples from it, or
//! continues a prompt with a checkpoint (StripedHyena, Evo, Evo 2, Jamba, or one of this program's):
//!
//! ```text
//! cargo run --release --example striped_hyena
//! cargo run --release --example striped_hyena -- --pattern "mamba hyena attention" --minutes 30 --out runs/hybrid
//! cargo run --release --example striped_hyena -- --model runs/hybrid --prompt "Once upon a time"
//! ```

#[path = "../common"]
mod common {
    pub mod cli;
    pub mod curve;
    pub mod dna;
    pub mod form;
    pub mod memory;
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

/// Hyena and attention by turns.
fn config(hidden: usize, layers: usize, vocabulary: usize) -> ModelConfig {
    let words: Vec<&str> = ["hyena", "attention"].into_iter().cycle().take(layers.max(1)).collect();
    ModelConfig::striped(&words.join(" "), hidden, vocabulary).expect("a pattern of known words")
}

fn main() -> ExitCode {
    let family = Family {
        name: "striped_hyena",
        config,
        carry: false,
        defaults: Settings {
            hidden: 192,
            layers: 4,
            batch: 16,
            length: 128,
            lr: 3e-3,
            text: None,
            fasta: None,
        },
    };
    common::cli::run(|arguments| program::run(&family, &arguments))
}
