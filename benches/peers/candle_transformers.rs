//! The Mamba of candle-transformers: `candle_transformers TASK MODEL_DIR SECONDS` prints a line of JSON for peers.py.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::mamba::{Config, Model, State};
use std::time::Instant;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, task, directory, seconds] = arguments.as_slice() else { panic!("TASK MODEL_DIR SECONDS") };
    let seconds: f64 = seconds.parse().expect("seconds");
    let (kind, detail) = task.split_once('-').expect("a task");
    // it reads prompts token by token: as many tokens as the time allows say all there is to say
    let length = if kind == "prefill" { detail.parse().expect("a length") } else { usize::MAX };

    let config = Config { d_model: 768, n_layer: 24, vocab_size: 50280, pad_vocab_size_multiple: 8 };
    let dtype = if detail == "bf16" { DType::BF16 } else { DType::F32 };
    let file = format!("{directory}/model.safetensors");
    let tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
    let vb = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
    let vb = vb.rename_f(|name: &str| name.replace("backbone.embedding.", "backbone.embeddings."));
    let model = Model::new(&config, vb.pp("backbone"))?;
    let mut state = State::new(1, &config, dtype, &Device::Cpu)?;

    let (start, mut times, mut token) = (Instant::now(), vec![], 0);
    for i in 0..length {
        let id = if kind == "prefill" { ((i * 7919 + 13) % 50257) as u32 } else { token };
        let begin = Instant::now();
        let logits = model.forward(&Tensor::new(&[id], &Device::Cpu)?, &mut state)?;
        token = logits.argmax(1)?.to_vec1::<u32>()?[0];
        times.push(begin.elapsed().as_secs_f64());
        if times.len() > 2 && start.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = peak.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let bytes = kilobytes.unwrap_or(0) * 1024;
    let times = &times[1..];
    println!(r#"{{"seconds": {times:?}, "tokens": 1, "peak_bytes": {bytes}}}"#);
    Ok(())
}
