//! Learns a text with a small byte-level hybrid of gated modal convolutions and attention and samples from it, or
//! continues a prompt with a checkpoint (StripedHyena, Evo, Evo 2, Jamba, or one of this program's):
//!
//! ```text
//! cargo run --release --example striped_hyena
//! cargo run --release --example striped_hyena -- --pattern "mamba hyena attention" --minutes 30 --out runs/hybrid
//! cargo run --release --example striped_hyena -- --model runs/hybrid --prompt "Once upon a time"
//! ```
//!
//! or turns a Hyena model (HyenaDNA, a run of the program `hyena`) into one that decodes in constant time:
//!
//! ```text
//! cargo run --release --example striped_hyena -- --distill runs/hyena --states 16 --out runs/distilled
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

use clap::Parser;
use common::cli::Outcome;
use common::program::{self, Family};
use common::run::Settings;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use subquadratic::models::{FilterErrors, ModelConfig};
use subquadratic::train::latest_checkpoint;

/// Without `--model` or `--distill`, learns a text from scratch.
#[derive(Parser, Debug)]
#[command(allow_negative_numbers = true)]
struct Arguments {
    /// A directory with a Hyena model of order 2, or a run's folder: fit sums of exponentials to its filters and write
    /// the model into --out
    #[arg(long, value_name = "DIR", requires = "out", conflicts_with_all = ["model", "prompt", "pattern", "resume"])]
    distill: Option<PathBuf>,
    /// Exponentials of a filter, with --distill
    #[arg(long, value_name = "S", default_value_t = 8, requires = "distill")]
    states: usize,
    #[command(flatten)]
    common: program::Arguments,
}

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
    common::cli::run(|arguments: Arguments| match &arguments.distill {
        Some(directory) => distill(&family, directory, &arguments),
        None => program::run(&family, &arguments.common),
    })
}

/// Writes the distilled model, how well every filter was fitted, and the tokenizer where there is one.
fn distill(family: &Family, directory: &Path, arguments: &Arguments) -> Outcome<()> {
    let directory = latest_checkpoint(directory)?.unwrap_or(directory.to_path_buf());
    let place = arguments.common.place;
    let model = place.load(&directory, &place.device()?)?;
    let (distilled, report) = model.distill(arguments.states)?;
    let out = arguments.common.training.folder(family.name)?;
    distilled.save(&out)?;
    let tokenizer = directory.join("tokenizer.json");
    if tokenizer.is_file() {
        std::fs::copy(&tokenizer, out.join("tokenizer.json"))?;
    }
    for layer in &report {
        println!("{}", summary(layer));
    }
    let blocks = report.iter().map(
        |layer| serde_json::json!({ "block": layer.block, "errors": layer.channels, "bounds": layer.bounds }),
    );
    let errors = out.join("distillation.json");
    std::fs::write(&errors, serde_json::Value::from_iter(blocks).to_string() + "\n")?;
    println!("model: {}; the error of every channel: {}", out.display(), errors.display());
    Ok(())
}

/// The middle and the worst of a block's filters, and what so many states can reach at best.
fn summary(layer: &FilterErrors) -> String {
    let mut order: Vec<usize> = (0..layer.channels.len()).collect();
    order.sort_by(|&a, &b| layer.channels[a].total_cmp(&layer.channels[b]));
    let (middle, worst) = (order[order.len() / 2], order[order.len() - 1]);
    format!(
        "block {}: relative error of {} filters: median {:.2e} (none below {:.2e}), worst {:.2e} (none below {:.2e})",
        layer.block,
        order.len(),
        layer.channels[middle],
        layer.bounds[middle],
        layer.channels[worst],
        layer.bounds[worst]
    )
}
