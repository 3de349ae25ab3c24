//! Measures a checkpoint, and prints one JSON line, or one for every length of the prompt:
//!
//! ```text
//! cargo run --release --example speed -- --model DIR --prompt 2048 --tokens 64
//! {"prefill_tok_s":1500.2,"decode_tok_s":50.1,"peak_bytes":570425344,"load_s":0.41,..}
//! cargo run --release --example speed -- --model DIR --prompt 1024,8192,65536
//! ```
//!
//! Token ids are random, decoding is greedy; both are warmed up and repeated, and the figures are medians.

#[path = "common"]
mod common {
    pub mod cli;
    pub mod form;
}

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use common::cli::{self, Outcome, Place};
use common::form::{parse_form, set_form};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use subquadratic::models::{Decoder, Form, LanguageModel};

/// Measures how fast a checkpoint reads and writes tokens, and prints one line of JSON
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Arguments {
    /// The checkpoint's directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    place: Place,
    /// Tokens of the prompt, read in one call; several lengths, the shortest first, show how speed and memory go with it
    #[arg(long, value_name = "N,..", default_value = "512", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..))]
    prompt: Vec<u32>,
    /// Tokens generated after it, one by one
    #[arg(long, value_name = "M", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Among equal forms of the mixer, the one to compute [auto, parallel, chunkwise, recurrent]
    #[arg(long, default_value = "auto", value_parser = parse_form)]
    form: Form,
    /// Sequences at a time
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
}

/// The prompt is read at least so often, and again until so much time is spent.
const PREFILLS: usize = 3;
const PREFILL_TIME: Duration = Duration::from_secs(3);
/// Steps before the measured ones.
const WARM_UP: u32 = 4;

fn main() -> ExitCode {
    cli::run(program)
}

fn program(arguments: Arguments) -> Outcome<()> {
    let Arguments { model: directory, place, prompt, tokens, form, batch } = arguments;
    let device = place.device()?;
    let start = Instant::now();
    let mut model = place.load(&directory, &device)?;
    set_form(&mut model, form)?;
    device.synchronize()?;
    let load_s = start.elapsed().as_secs_f64();

    let rows = batch as usize;
    let mut random = StdRng::seed_from_u64(0);
    let vocabulary = u32::try_from(model.config().vocab_size)?;
    for length in prompt {
        let length = length as usize;
        let ids: Vec<u32> = (0..rows * length).map(|_| random.random_range(0..vocabulary)).collect();
        let ids = Tensor::from_vec(ids, (rows, length), &Device::Cpu)?;
        let prefill = prefill_seconds(&model, &ids)?;
        let (decode, state_bytes) = decode_seconds(&model, &ids, tokens)?;
        let per_second = |count: usize, seconds: f64| (count as f64 / seconds * 10.0).round() / 10.0;
        let [prefill_s, fastest, slowest] = spread(prefill);
        let [step_s, fastest_step, slowest_step] = spread(decode);
        let read = rows * length;
        let line = json!({
            "prefill_tok_s": per_second(read, prefill_s),
            "decode_tok_s": per_second(rows, step_s),
            "peak_bytes": subquadratic::peak_bytes(&device),
            "state_bytes": state_bytes,
            "load_s": load_s,
            "prefill_range": [per_second(read, slowest), per_second(read, fastest)],
            "decode_range": [per_second(rows, slowest_step), per_second(rows, fastest_step)],
            "family": model.config().family.name(),
            "parameters": model.parameters().values().map(Tensor::elem_count).sum::<usize>(),
            "dtype": place.dtype.as_str(),
            "device": place.name(),
            "threads": std::thread::available_parallelism()?.get(),
            "batch": rows,
            "prompt": length,
            "tokens": tokens,
        });
        println!("{line}");
    }
    Ok(())
}

/// The prompt up to the logits of its last token, from a fresh state: seconds of every run but the first.
fn prefill_seconds(model: &LanguageModel, ids: &Tensor) -> Outcome<Vec<f64>> {
    let begin = Instant::now();
    let mut seconds = vec![];
    while seconds.len() <= PREFILLS || begin.elapsed() < PREFILL_TIME {
        let start = Instant::now();
        let mut state = model.init_state(ids.dim(0)?)?;
        greedy(&model.prefill(ids, None, &mut state)?)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(seconds.split_off(1))
}

/// Greedy steps after the prompt: seconds of each but the first few, and the size of the state behind the prompt.
fn decode_seconds(model: &LanguageModel, ids: &Tensor, tokens: u32) -> Outcome<(Vec<f64>, usize)> {
    let rows = ids.dim(0)?;
    let mut state = model.init_state(rows)?;
    let mut token = greedy(&model.prefill(ids, None, &mut state)?)?;
    let bytes = state.bytes();
    let mut seconds = vec![];
    let mut decoder = Decoder::new(model, rows)?;
    if decoder.is_fused(rows) {
        (0..rows).try_for_each(|row| decoder.set_state(row, &state, row))?;
        let slots: Vec<Option<usize>> = (0..rows).map(Some).collect();
        let mut ids: Vec<u32> = token.flatten_all()?.to_vec1()?;
        // as many at a time as a generation draws; the first few calls record a graph
        const AT_ONCE: u32 = 8;
        for _ in 0..WARM_UP + tokens.div_ceil(AT_ONCE) {
            let start = Instant::now();
            let chosen = decoder.greedy(&slots, &ids, AT_ONCE as usize, &[])?;
            ids = chosen.iter().filter_map(|row| row.last().copied()).collect();
            seconds.push(start.elapsed().as_secs_f64() / f64::from(AT_ONCE));
        }
        return Ok((seconds.split_off(WARM_UP as usize), bytes));
    }
    for _ in 0..WARM_UP + tokens {
        let start = Instant::now();
        token = greedy(&model.prefill(&token, None, &mut state)?)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok((seconds.split_off(WARM_UP as usize), bytes))
}

/// The most probable tokens, `[B, 1]`, on the CPU: whoever wants to show them has to wait for them.
fn greedy(logits: &Tensor) -> Outcome<Tensor> {
    let wide = if logits.dtype() == DType::F64 { logits.clone() } else { logits.to_dtype(DType::F32)? };
    Ok(wide.argmax(1)?.to_device(&Device::Cpu)?.unsqueeze(1)?)
}

/// Median, least and most.
fn spread(mut seconds: Vec<f64>) -> [f64; 3] {
    seconds.sort_by(f64::total_cmp);
    let at = |i: usize| seconds[i.min(seconds.len() - 1)];
    let middle = seconds.len() / 2;
    let median = if seconds.len() % 2 == 1 { at(middle) } else { (at(middle - 1) + at(middle)) / 2.0 };
    [median, at(0), at(seconds.len() - 1)]
}
