//! The layer's formula in plain numbers.

use crate::common::values;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use subquadratic::layers::HyenaConfig;
use subquadratic::layers::hyena::{Direction, FilterOrder, HyenaFilter, SineFrequency};
use subquadratic::ops::Activation;

/// The taps of a position, in plain numbers.
fn taps(config: &HyenaConfig, p: &HashMap<String, Vec<f64>>, t: usize) -> Vec<f64> {
    let columns = config.d_model / config.heads * (config.order - 1);
    let columns = if config.direction == Direction::TwoSided { 2 * columns } else { columns };
    let HyenaFilter::Implicit(filter) = config.filter else {
        return p["filter_fn.filter"][t * columns..][..columns].to_vec();
    };
    let name = |place: usize, rest: &str| format!("filter_fn.implicit_filter.{place}.{rest}");
    let mut h = p["filter_fn.pos_emb.z"][t * filter.emb_dim..][..filter.emb_dim].to_vec();
    let layers = if filter.linear { 0 } else { filter.inner_layers + 1 };
    for layer in 0..layers {
        let sine = if filter.frequency == SineFrequency::Shared { 1 } else { 2 * layer + 1 };
        let z = linear(&h, &p[&name(2 * layer, "weight")], p.get(&name(2 * layer, "bias")));
        h = z.iter().zip(&p[&name(sine, "freq")]).map(|(z, f)| (z * f).sin()).collect();
    }
    let mut h = linear(&h, &p[&name(2 * layers, "weight")], None);
    let normalize = |h: &mut Vec<f64>| {
        let sum: f64 = h.iter().map(|h| h.abs()).sum();
        h.iter_mut().for_each(|h| *h /= sum);
    };
    if filter.normalized && filter.normalized_first {
        normalize(&mut h);
    }
    if filter.modulate {
        let (deltas, t) = (&p["filter_fn.modulation.deltas"], p["filter_fn.pos_emb.t"][t]);
        h.iter_mut().zip(deltas).for_each(|(h, delta)| *h *= (-t * delta.abs()).exp() + filter.shift);
    }
    if filter.normalized && !filter.normalized_first {
        normalize(&mut h);
    }
    h
}

fn linear(x: &[f64], w: &[f64], b: Option<&Vec<f64>>) -> Vec<f64> {
    let row =
        |(o, w): (usize, &[f64])| w.iter().zip(x).map(|(a, b)| a * b).sum::<f64>() + b.map_or(0.0, |b| b[o]);
    w.chunks(x.len()).enumerate().map(row).collect()
}

/// The formula in plain numbers, one row.
pub fn oracle(config: &HyenaConfig, parameters: &[Tensor], x: &[f64], length: usize) -> Vec<f64> {
    let p: HashMap<String, Vec<f64>> =
        config.parameters().into_iter().zip(parameters).map(|(p, t)| (p.name, values(t))).collect();
    let (d, n, heads) = (config.d_model, config.order, config.heads);
    let width = d / heads;
    let taps: Vec<Vec<f64>> = (0..config.l_max).map(|t| taps(config, &p, t)).collect();
    let column = |o: usize, c: usize| match config.filter_order {
        FilterOrder::OrderFirst => o * width + c % width,
        FilterOrder::ChannelFirst => c % width * (n - 1) + o,
    };
    let q: Vec<Vec<f64>> =
        x.chunks(d).map(|x| linear(x, &p["in_proj.weight"], p.get("in_proj.bias"))).collect();
    let (k, short, bias) = (config.short_filter, &p["short_filter.weight"], &p["short_filter.bias"]);
    let s = |t: usize, c: usize| {
        bias[c]
            + (0..k).filter(|j| t + j + 1 >= k).map(|j| short[c * k + j] * q[t + j + 1 - k][c]).sum::<f64>()
    };
    let part = |i: usize, t: usize, c: usize| s(t, (c / width * (n + 1) + i) * width + c % width);
    let gate = |i: usize, t: usize, c: usize| match config.outer_mixing {
        true => (0..width).map(|j| part(i, t, c / width * width + j)).sum(),
        false => part(i, t, c),
    };
    let mut v: Vec<Vec<f64>> = (0..length).map(|t| (0..d).map(|c| part(n, t, c)).collect()).collect();
    for o in 0..n - 1 {
        let gated: Vec<Vec<f64>> =
            (0..length).map(|t| (0..d).map(|c| v[t][c] * gate(n - 1 - o, t, c)).collect()).collect();
        for t in 0..length {
            for c in 0..d {
                v[t][c] = p["filter_fn.bias"][column(o, c)] * gated[t][c]
                    + convolved(config, &taps, &gated, [t, c, length], column(o, c));
            }
        }
        if let Some(w) = p.get("ord_proj_w") {
            let mixed = |v: &Vec<f64>, c: usize| -> f64 {
                let weight = |h: usize| w[(o * heads + h) * heads + c / width];
                (0..heads).map(|h| weight(h) * v[h * width + c % width]).sum()
            };
            v = v.iter().map(|v| (0..d).map(|c| mixed(v, c)).collect()).collect();
        }
    }
    let out = |t: usize| {
        let y: Vec<f64> = (0..d).map(|c| activated(config.activation, v[t][c] * part(0, t, c))).collect();
        linear(&y, &p["out_proj.weight"], p.get("out_proj.bias"))
    };
    (0..length).flat_map(out).collect()
}

/// What upstream's transforms of twice the length of a part come to, and two filters in two directions.
fn convolved(
    config: &HyenaConfig,
    taps: &[Vec<f64>],
    v: &[Vec<f64>],
    [t, c, length]: [usize; 3],
    at: usize,
) -> f64 {
    let filters = config.d_model / config.heads * (config.order - 1);
    let each = length / config.num_blocks;
    let (start, t) = (t / each * each, t % each);
    let delay = if config.direction == Direction::Centred { each / 2 } else { 0 };
    let past: f64 = (0..length.min(2 * each))
        .map(|j| (j, (t + 4 * each - j - delay) % (2 * each)))
        .filter(|&(_, s)| s < each)
        .map(|(j, s)| taps[j][at] * v[start + s][c])
        .sum();
    let future = |s: usize| taps[s - t][filters + at] * v[s][c];
    past + if config.direction == Direction::TwoSided { (t..length).map(future).sum() } else { 0.0 }
}

fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Relu => x.max(0.0),
        Activation::Gelu => {
            values(&Tensor::new(x, &Device::Cpu).unwrap().gelu_erf().unwrap().reshape(1).unwrap())[0]
        }
        _ => x,
    }
}
