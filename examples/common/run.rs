//! A training run and its folder: what it was started with, where it stands, where it lies.

use super::cli::Outcome;
use super::curve::Curve;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use subquadratic::train::{Position, Schedule, latest_checkpoint};

/// What and how to train. What is not given comes from the program's defaults, or with `--resume` from the run.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Training")]
pub struct Training {
    /// Minutes to train for, all runs of it together [default: 2.5, or no limit with --steps]
    #[arg(long)]
    minutes: Option<f64>,
    /// Steps to train for, all runs of it together
    #[arg(long)]
    steps: Option<u64>,
    /// Rows of a batch
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens a row of a batch; states are carried from batch to batch
    #[arg(long)]
    length: Option<usize>,
    /// Width of the model
    #[arg(long)]
    hidden: Option<usize>,
    /// Blocks of the model
    #[arg(long)]
    layers: Option<usize>,
    /// The largest learning rate
    #[arg(long)]
    lr: Option<f64>,
    /// Forget activations and compute them again on the way back: less memory, more time
    #[arg(long)]
    pub recompute: bool,
    /// The text to learn [default: the King James Bible, bundled]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// DNA to learn letter by letter, a FASTA file, plain or compressed by gzip
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    fasta: Option<PathBuf>,
    /// Folder of the run, which must be new or empty [default: the first free of runs/NAME, runs/NAME-2, ..]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with the run in --out [default: the last of runs/NAME, runs/NAME-2, ..]
    #[arg(long)]
    pub resume: bool,
}

/// What a run was started with, and keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Width of the model.
    pub hidden: usize,
    /// Blocks of the model.
    pub layers: usize,
    /// Rows of a batch.
    pub batch: usize,
    /// Tokens of a row.
    pub length: usize,
    /// The largest learning rate.
    pub lr: f64,
    /// The text; none is the bundled one.
    pub text: Option<PathBuf>,
    /// DNA in the place of a text.
    #[serde(default)]
    pub fasta: Option<PathBuf>,
}

/// Where a run stands: the part of a checkpoint that is the program's own.
#[derive(Serialize, Deserialize)]
pub struct Progress {
    /// What it was started with.
    pub settings: Settings,
    /// Bytes of the text.
    pub text_bytes: usize,
    /// The next batch.
    pub position: Position,
    /// Wall time so far.
    pub seconds: f64,
    /// The losses so far.
    pub curve: Curve,
}

impl Training {
    /// The settings of a new run.
    pub fn settings(&self, defaults: &Settings) -> Settings {
        Settings {
            hidden: self.hidden.unwrap_or(defaults.hidden),
            layers: self.layers.unwrap_or(defaults.layers),
            batch: self.batch.unwrap_or(defaults.batch),
            length: self.length.unwrap_or(defaults.length),
            lr: self.lr.unwrap_or(defaults.lr),
            text: self.text.clone().or_else(|| defaults.text.clone()),
            fasta: self.fasta.clone().or_else(|| defaults.fasta.clone()),
        }
    }

    /// The settings of a run to go on with: only the learning rate may change.
    pub fn resumed(&self, run: &Settings) -> Outcome<Settings> {
        let changed =
            |name: &str, was: String| Err(format!("--{name}: the run has {was}, which cannot change").into());
        let sizes = [
            ("hidden", self.hidden, run.hidden),
            ("layers", self.layers, run.layers),
            ("batch", self.batch, run.batch),
            ("length", self.length, run.length),
        ];
        for (name, given, was) in sizes {
            if given.is_some_and(|given| given != was) {
                return changed(name, was.to_string());
            }
        }
        if self.fasta.is_some() && self.fasta != run.fasta {
            return changed(
                "fasta",
                run.fasta.as_ref().map_or("a text".into(), |was| was.display().to_string()),
            );
        }
        match (&self.text, &run.text) {
            (Some(given), was) if was.as_ref() != Some(given) => changed(
                "text",
                was.as_ref().map_or("the bundled text".into(), |was| was.display().to_string()),
            ),
            _ => Ok(Settings { lr: self.lr.unwrap_or(run.lr), ..run.clone() }),
        }
    }

    /// The folder to write a new run into, made, or the one to go on with.
    pub fn folder(&self, name: &str) -> Outcome<PathBuf> {
        let default = |i: usize| match i {
            1 => PathBuf::from(format!("runs/{name}")),
            i => PathBuf::from(format!("runs/{name}-{i}")),
        };
        if self.resume {
            let last = || (1..).map(default).take_while(|path| path.exists()).last();
            return self
                .out
                .clone()
                .or_else(last)
                .ok_or_else(|| format!("--resume: no run in runs/{name}").into());
        }
        let folder = match &self.out {
            Some(folder) => folder.clone(),
            None => (1..).map(default).find(|path| is_free(path)).unwrap_or_else(|| default(1)),
        };
        let shown = folder.display();
        std::fs::create_dir_all(&folder).map_err(|error| format!("{shown}: {error}"))?;
        if !is_free(&folder) {
            let hint = match latest_checkpoint(&folder) {
                Ok(Some(_)) => "go on with it by --resume, or choose another --out",
                _ => "choose another --out",
            };
            return Err(format!("{shown}: expected a new or empty folder; {hint}").into());
        }
        Ok(folder)
    }

    /// When to end.
    pub fn limit(&self) -> Outcome<Limit> {
        let minutes = self.minutes.or(if self.steps.is_some() { None } else { Some(2.5) });
        if minutes.is_some_and(|minutes| !(minutes > 0.0 && minutes.is_finite())) {
            return Err("--minutes: expected a number above 0".into());
        }
        Ok(Limit {
            steps: self.steps.unwrap_or(u64::MAX),
            seconds: minutes.map_or(f64::INFINITY, |m| 60.0 * m),
        })
    }
}

/// A folder that is not there, or empty.
fn is_free(path: &Path) -> bool {
    match std::fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// When a run ends: at a number of steps, or after a time, whichever comes first.
#[derive(Clone, Copy)]
pub struct Limit {
    steps: u64,
    seconds: f64,
}

impl Limit {
    /// How much of the run is done, 0 to 1.
    pub fn done(&self, steps: u64, seconds: f64) -> f64 {
        (steps as f64 / self.steps as f64).max(seconds / self.seconds).min(1.0)
    }

    /// Warm-up, then a cosine to the end: of the steps there will be, by the time the ones so far took.
    pub fn schedule(&self, peak: f64, steps: u64, seconds: f64) -> Schedule {
        let by_time = if steps == 0 { 1e3 } else { self.seconds * steps as f64 / seconds };
        let all = self.steps.min(by_time as u64).max(steps + 1);
        Schedule { min_ratio: 0.05, ..Schedule::cosine(peak, (all / 20).clamp(1, 100), all) }
    }
}
