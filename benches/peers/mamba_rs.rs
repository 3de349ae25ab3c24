//! The crate mamba-rs: `mamba_rs TASK MODEL_DIR SECONDS` prints a line of JSON for peers.py.

use mamba_rs::mamba1::cpu::flat::MambaBackboneFlat;
use mamba_rs::mamba1::cpu::parallel::{parallel_mamba_backward, parallel_mamba_forward};
use mamba_rs::mamba1::cpu::weights::{TrainMambaLayerWeights, TrainMambaWeights};
use mamba_rs::mamba1::{MambaConfig, MambaWeights};
use mamba_rs::module::lm::MambaLM;
use mamba_rs::module::sample::SampleParams;
use mamba_rs::ops::dims::{MambaDims, MambaRecurrentState};
use std::path::Path;
use std::time::Instant;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, task, directory, seconds] = arguments.as_slice() else {
        panic!("mamba_rs TASK MODEL_DIR SECONDS")
    };
    let seconds = seconds.parse().expect("seconds");
    match task.split_once('-').expect("a task") {
        ("prefill", length) => prefill(directory, length.parse().expect("a length"), seconds),
        ("decode", _) => decode(directory, seconds),
        ("block", direction) => block(direction == "fwdbwd", seconds),
        _ => panic!("no task {task}"),
    }
}

fn token_ids(count: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * 7919 + 13) % 50257) as u32).collect()
}

fn report(seconds: &[f64], tokens: usize, token: u32) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = peak.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let bytes = kilobytes.unwrap_or(0) * 1024;
    println!(r#"{{"seconds": {seconds:?}, "tokens": {tokens}, "token": {token}, "peak_bytes": {bytes}}}"#);
}

fn greedy(max_tokens: usize) -> SampleParams {
    SampleParams { temperature: 0.0, max_tokens, ..SampleParams::default() }
}

/// From the prompt to the first token.
fn prefill(directory: &str, length: usize, seconds: f64) {
    let mut model = MambaLM::from_hf(Path::new(directory)).expect("a model");
    let ids = token_ids(length);
    let (start, mut times, mut token) = (Instant::now(), vec![], 0);
    while times.len() < 2 || start.elapsed().as_secs_f64() < seconds {
        let (begin, mut first) = (Instant::now(), None);
        model.generate_streaming(&ids, &greedy(1), |id, _| {
            first.get_or_insert(begin.elapsed().as_secs_f64());
            token = id;
        });
        times.extend(first);
    }
    report(&times[1..], length, token);
}

/// From token to token.
fn decode(directory: &str, seconds: f64) {
    let mut model = MambaLM::from_hf(Path::new(directory)).expect("a model");
    model.backbone.pack_for_decode();
    let (mut last, mut times) = (None::<Instant>, vec![]);
    let steps = (seconds * 25.0) as usize + 2;
    model.generate_streaming(&token_ids(16), &greedy(steps), |_, _| {
        times.extend(last.map(|last| last.elapsed().as_secs_f64()));
        last = Some(Instant::now());
    });
    report(&times[1..], 1, 0);
}

/// Norm, mixer and residual of width 768 on 2 rows of 512 tokens.
fn block(backward: bool, seconds: f64) {
    const BATCH: usize = 2;
    const LENGTH: usize = 512;
    let config = MambaConfig { d_model: 768, n_layers: 1, ..MambaConfig::default() };
    let width = config.d_model;
    let dims = MambaDims::from_config(&config, LENGTH, width);
    let initial = MambaWeights::init(&config, width, 42);
    let layer = |w: &mamba_rs::mamba1::MambaLayerWeights| TrainMambaLayerWeights {
        norm_weight: w.norm_weight.clone(),
        norm_bias: w.norm_bias.clone(),
        in_proj_w: w.in_proj_w.clone(),
        in_proj_b: w.in_proj_b.clone(),
        conv1d_weight: w.conv1d_weight.clone(),
        conv1d_bias: w.conv1d_bias.clone(),
        x_proj_w: w.x_proj_w.clone(),
        dt_proj_w: w.dt_proj_w.clone(),
        dt_proj_b: w.dt_proj_b.clone(),
        a_log: w.a_log.clone(),
        d_param: w.d_param.clone(),
        out_proj_w: w.out_proj_w.clone(),
        out_proj_b: w.out_proj_b.clone(),
    };
    // an empty input projection is none
    let weights = TrainMambaWeights {
        input_proj_w: vec![],
        input_proj_b: vec![],
        layers: initial.layers.iter().map(layer).collect(),
        norm_f_weight: initial.norm_f_weight.clone(),
        norm_f_bias: initial.norm_f_bias.clone(),
        mlp: vec![],
    };
    let a: Vec<f32> = weights.layers[0].a_log.iter().map(|a| -a.exp()).collect();
    let x: Vec<f32> = (0..BATCH * LENGTH * width).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut activations: Vec<_> = (0..BATCH).map(|_| MambaBackboneFlat::zeros(dims)).collect();
    let mut gradients = TrainMambaWeights::zeros_from_dims(&dims);
    gradients.input_proj_w.clear();
    gradients.input_proj_b.clear();

    let (start, mut times) = (Instant::now(), vec![]);
    while times.len() < 2 || start.elapsed().as_secs_f64() < seconds {
        let mut conv = vec![0.0; BATCH * dims.d_inner * dims.d_conv];
        let mut ssm = vec![0.0; BATCH * dims.d_inner * dims.d_state];
        let mut output = vec![0.0; BATCH * width];
        let mut upstream = vec![vec![1.0; LENGTH * width]; BATCH];
        let begin = Instant::now();
        let mut state = MambaRecurrentState { conv: &mut conv, ssm: &mut ssm, a_neg: &a };
        parallel_mamba_forward(&mut output, &mut activations, &mut state, &weights, &x, &dims, BATCH);
        if backward {
            gradients.zero();
            parallel_mamba_backward(&mut upstream, &mut gradients, &activations, &weights, &a, &dims);
        }
        times.push(begin.elapsed().as_secs_f64());
    }
    report(&times[1..], BATCH * LENGTH, 0);
}
