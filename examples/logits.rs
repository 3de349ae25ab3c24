//! Writes the logits of a checkpoint for rows of token ids:
//!
//! ```text
//! cargo run --release --example logits -- --model DIR --ids ids.json --out out.safetensors
//! ```
//!
//! `ids.json` is a list of rows of equal length, as in `[[1, 2, 3], [4, 5, 6]]`; the result is the tensor `logits`,
//! f32 `[rows, length, vocabulary]`. Of a model with labels it holds `scores` too, f32 `[rows, labels]`.

#[path = "common"]
mod common {
    pub mod cli;
}

use candle_core::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use common::cli::{self, CHUNK, Outcome, Place};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use subquadratic::models::{Form, LanguageModel, write_safetensors};

/// Writes the logits of a checkpoint for rows of token ids
#[derive(Parser)]
struct Arguments {
    /// The checkpoint's directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// A JSON list of rows of token ids, all of one length
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    place: Place,
    /// How the tokens go through the model: all pairs at once, in chunks, or one by one
    #[arg(long, value_enum, default_value = "parallel")]
    mode: Mode,
    /// Tokens of a chunk, with --mode chunkwise
    #[arg(long, value_name = "C")]
    chunk: Option<usize>,
    /// Only the first P tokens go as --mode says, every later one is a step of its own
    #[arg(long, value_name = "P")]
    prefill: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Mode {
    Parallel,
    Chunkwise,
    Recurrent,
}

fn main() -> ExitCode {
    cli::run(program)
}

fn program(arguments: Arguments) -> Outcome<()> {
    let chunk = match (arguments.mode, arguments.chunk) {
        (_, Some(0)) => return Err("--chunk: expected at least 1, got 0".into()),
        (Mode::Chunkwise, chunk) => Some(chunk.unwrap_or(CHUNK)),
        (_, Some(_)) => return Err("--chunk goes with --mode chunkwise".into()),
        (Mode::Parallel, None) => None,
        (Mode::Recurrent, None) => Some(1),
    };
    let ids = read_ids(&arguments.ids)?;
    let mut model = arguments.place.load(&arguments.model, &arguments.place.device()?)?;
    // where the mixers have forms, those are what is chosen; else the calls are cut
    let forms = model.set_form(match (arguments.mode, chunk) {
        (Mode::Parallel, _) => Form::Parallel,
        (Mode::Chunkwise, chunk) => Form::Chunkwise { chunk: chunk.unwrap_or(CHUNK) },
        (Mode::Recurrent, _) => Form::Recurrent,
    })?;
    let chunk = if forms { None } else { chunk };
    let length = ids.dim(1)?;
    let prefill = arguments.prefill.unwrap_or(length).min(length);

    // the lengths of the calls: the prefilled part in chunks, then single tokens
    let piece = |start| chunk.unwrap_or(prefill).min(prefill - start);
    let mut calls: Vec<usize> = (0..prefill).step_by(chunk.unwrap_or(prefill).max(1)).map(piece).collect();
    calls.extend(vec![1; length - prefill]);
    let mut results = BTreeMap::new();
    if model.config().lm_head {
        results.insert("logits".to_string(), logits(&model, &ids, &calls)?);
    }
    if model.config().labels > 0 {
        results.insert("scores".to_string(), plain(&model.classify(&ids)?)?);
    }
    write_safetensors(&arguments.out, &results, &[])?;
    Ok(())
}

/// The logits of calls of so many tokens each.
fn logits(model: &LanguageModel, ids: &Tensor, calls: &[usize]) -> Outcome<Tensor> {
    // one call needs no state, which some mixers do not have
    if calls.len() == 1 {
        return plain(&model.forward(ids)?);
    }
    let mut state = model.init_state(ids.dim(0)?)?;
    let (mut start, mut parts) = (0, vec![]);
    for &tokens in calls {
        parts.push(plain(&model.forward_with_state(&ids.narrow(1, start, tokens)?, &mut state)?)?);
        start += tokens;
    }
    Ok(Tensor::cat(&parts, 1)?)
}

fn plain(values: &Tensor) -> Outcome<Tensor> {
    Ok(values.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}

/// Reads rows of token ids, `[rows, length]`.
fn read_ids(path: &Path) -> Outcome<Tensor> {
    let at = |reason: String| format!("{}: {reason}", path.display());
    let text = std::fs::read(path).map_err(|e| at(e.to_string()))?;
    let rows: serde_json::Value = serde_json::from_slice(&text).map_err(|e| at(format!("not JSON: {e}")))?;
    let rows = rows.as_array().ok_or_else(|| at("expected a list of rows of token ids".into()))?;
    let mut all = vec![];
    let mut length = None;
    for (i, row) in rows.iter().enumerate() {
        let row = row.as_array().ok_or_else(|| at(format!("row {i}: expected a list of token ids")))?;
        let first = *length.get_or_insert(row.len());
        if row.len() != first {
            let reason = format!("row {i}: expected {first} token ids as in row 0, got {}", row.len());
            return Err(at(reason).into());
        }
        for (j, id) in row.iter().enumerate() {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let wrong = || at(format!("row {i}, position {j}: expected a token id, got {}", row[j]));
            all.push(id.ok_or_else(wrong)?);
        }
    }
    match length {
        None | Some(0) => Err(at("expected at least one row of at least one token id".into()).into()),
        Some(length) => Ok(Tensor::from_vec(all, (rows.len(), length), &Device::Cpu)?),
    }
}
