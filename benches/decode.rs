//! What single measurements cannot tell of the long convolution: how decoding scales with the length, how it compares with
//! convolving the whole sequence again for every token, and the most memory a call takes.
//!
//! ```text
//! cargo bench --bench decode
//! ```
//!
//! The last lines need Linux.

use candle_core::{Device, Tensor, Var};
use std::time::Instant;
use subquadratic::Result;
use subquadratic::ops::{FilterCache, LongConv, LongConvState, StreamConv, long_conv};

fn main() -> Result<()> {
    // `cargo bench` passes what is meant for criterion: names are not of these, and `--test` is each once, small
    if std::env::args().skip(1).any(|argument| !argument.starts_with('-')) {
        return Ok(());
    }
    let test = std::env::args().any(|flag| flag == "--test");
    let lengths: &[usize] =
        if test { &[64, 256] } else { &[1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20] };
    println!("decode token by token, B1 D16, f32:");
    for &length in lengths {
        let seconds = decode(16, length)?;
        let each = seconds * 1e6 / length as f64;
        println!("  L {length:>8}: {each:7.3} us a token, {:6.3} by log2 L", each / (length as f64).log2());
    }
    let (channels, length) = if test { (16, 256) } else { (256, 1 << 14) };
    let (seconds, again) = (decode(channels, length)?, again(channels, length)?);
    println!(
        "{length} tokens, B1 D{channels}, f32: {seconds:.3} s; convolving again for every token: {again:.1} s, {:.0} times",
        again / seconds
    );
    let length = if test { 1 << 12 } else { 1 << 17 };
    for (what, [peak, floor]) in
        [("forward", memory(length, false)?), ("forward and backward", memory(length, true)?)]
    {
        let times = peak as f64 / floor as f64;
        println!(
            "{what}, B1 D256 L{length}, gated, f32: at most {} MB, {times:.2} times inputs and results",
            peak >> 20
        );
    }
    Ok(())
}

fn uniform(dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::rand(-1f32, 1.0, dims, &Device::Cpu)?)
}

/// Seconds for `length` tokens, one by one, of one sequence.
fn decode(channels: usize, length: usize) -> Result<f64> {
    let (x, filter) = (uniform(&[1, 1, channels])?, uniform(&[length, channels])?.t()?);
    let stream = StreamConv::new(&filter, None, channels)?;
    let run = || -> Result<f64> {
        let mut state = LongConvState::new(1, channels, x.dtype(), &Device::Cpu)?;
        let start = Instant::now();
        for _ in 0..length {
            std::hint::black_box(stream.forward(&x, [None, None], None, &mut state)?);
        }
        Ok(start.elapsed().as_secs_f64())
    };
    // the first makes the tiles' transforms, which serve every sequence
    run()?;
    run()
}

/// Samples of the lengths that convolving again goes through.
const SAMPLES: usize = 16;

/// Seconds for convolving again the `1, 2, .., length` tokens there are, by lengths in between; the filter's transforms
/// are kept, which no such loop could do for every length.
fn again(channels: usize, length: usize) -> Result<f64> {
    let (x, filter) = (uniform(&[1, length, channels])?, uniform(&[length, channels])?.t()?);
    let mut sum = 0.0;
    for i in 0..SAMPLES {
        let tokens = (2 * i + 1) * length / (2 * SAMPLES);
        let (part, cache) = (x.narrow(1, 0, tokens)?, FilterCache::new());
        let run = || -> Result<f64> {
            let start = Instant::now();
            std::hint::black_box(long_conv(&LongConv {
                cache: Some(&cache),
                ..LongConv::new(&part, &filter)
            })?);
            Ok(start.elapsed().as_secs_f64())
        };
        let mut times = (0..7).map(|_| run()).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        sum += times[3];
    }
    Ok(sum * (length / SAMPLES) as f64)
}

/// The most memory held above what there was before the inputs, and the bytes of inputs and results (the output; the
/// gradients too of a backward pass).
fn memory(length: usize, backward: bool) -> Result<[u64; 2]> {
    let before = status("VmRSS:");
    let sequence = [1, length, 256];
    let inputs = [uniform(&sequence)?, uniform(&sequence[1..])?, uniform(&sequence)?, uniform(&sequence)?];
    // forgets the peak of making the inputs
    let forget = || drop(std::fs::write("/proc/self/clear_refs", "5"));
    let run = |t: &[&Tensor]| {
        long_conv(&LongConv {
            taps_first: true,
            pre_gate: Some(t[2]),
            post_gate: Some(t[3]),
            ..LongConv::new(t[0], t[1])
        })
    };
    let mut results = 1;
    if backward {
        let variables: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
        drop(inputs);
        forget();
        let variables: Vec<&Tensor> = variables.iter().map(Var::as_tensor).collect();
        let gradients = run(&variables)?.backward()?;
        results += variables.iter().filter(|variable| gradients.get(variable).is_some()).count();
    } else {
        forget();
        std::hint::black_box(run(&inputs.iter().collect::<Vec<_>>())?);
    }
    let bytes = (length * 256 * size_of::<f32>()) as u64;
    Ok([status("VmHWM:").saturating_sub(before), (4 + results as u64) * bytes])
}

/// A line of the process's status, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
