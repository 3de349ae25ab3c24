//! Calls of the convolution to test with, and their results as plain sums in f64.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{LongConv, Segments, long_conv};

/// Sizes and options of one call.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub length: usize,
    pub channels: usize,
    pub groups: usize,
    pub taps: usize,
    /// 0: causal.
    pub reverse: usize,
    pub d: bool,
    pub pre_gate: bool,
    pub post_gate: bool,
}

/// The arguments, in the order of a case's tensors.
pub const NAMES: [&str; 6] = ["x", "filter", "reverse", "d", "pre_gate", "post_gate"];
/// The places of `x` and the gates.
pub const SEQUENCES: [usize; 3] = [0, 4, 5];

impl Case {
    /// Causal, a filter per channel as long as the sequence, everything else used.
    pub fn full(batch: usize, length: usize, channels: usize) -> Self {
        let (taps, groups) = (length.max(1), channels);
        let (d, pre_gate, post_gate) = (true, true, true);
        Self { batch, length, channels, groups, taps, reverse: 0, d, pre_gate, post_gate }
    }

    /// The convolution alone.
    pub fn bare(batch: usize, length: usize, channels: usize) -> Self {
        Self { d: false, pre_gate: false, post_gate: false, ..Self::full(batch, length, channels) }
    }

    /// Everything at random.
    pub fn random(random: &mut Random) -> Self {
        let groups = random.int(1, 9);
        let longest = if random.int(0, 1) == 0 { 60 } else { 400 };
        let mut flag = || random.int(0, 1) == 1;
        let (bidirectional, d, pre_gate, post_gate) = (flag(), flag(), flag(), flag());
        Self {
            batch: random.int(1, 3),
            length: random.int(0, longest),
            channels: groups * random.int(1, 5),
            groups,
            taps: random.int(1, longest),
            reverse: if bidirectional { random.int(1, longest) } else { 0 },
            d,
            pre_gate,
            post_gate,
        }
    }

    /// The arguments in f64.
    pub fn tensors(&self, seed: u64) -> Vec<Tensor> {
        let random = &mut Random::new(seed);
        let sequence = (self.batch, self.length, self.channels);
        vec![
            random.normal(sequence),
            random.normal((self.groups, self.taps)),
            random.normal((self.groups, self.reverse.max(1))),
            random.normal(self.channels),
            random.normal(sequence),
            random.normal(sequence),
        ]
    }

    pub fn args<'a>(&self, t: &'a [Tensor], segments: Option<&'a Segments>) -> LongConv<'a> {
        LongConv {
            reverse: (self.reverse > 0).then_some(&t[2]),
            d: self.d.then_some(&t[3]),
            pre_gate: self.pre_gate.then_some(&t[4]),
            post_gate: self.post_gate.then_some(&t[5]),
            segments,
            ..LongConv::new(&t[0], &t[1])
        }
    }

    pub fn run(&self, t: &[Tensor], segments: Option<&Segments>) -> subquadratic::Result<Vec<Tensor>> {
        Ok(vec![long_conv(&self.args(t, segments))?])
    }

    /// Inputs of which a gradient is expected.
    pub fn used(&self) -> Vec<usize> {
        let used = [true, true, self.reverse > 0, self.d, self.pre_gate, self.post_gate];
        (0..6).filter(|&i| used[i]).collect()
    }

    /// `t` with the used inputs replaced.
    pub fn place(&self, t: &[Tensor], used: &[Tensor]) -> Vec<Tensor> {
        let mut t = t.to_vec();
        for (&i, x) in self.used().iter().zip(used) {
            t[i] = x.clone();
        }
        t
    }

    /// The output, then the gradient of every used input.
    pub fn all(&self, t: &[Tensor], segments: Option<&Segments>) -> Vec<Tensor> {
        let inputs: Vec<Tensor> = self.used().iter().map(|&i| t[i].clone()).collect();
        let (mut all, gradients) = gradients(&inputs, |x| self.run(&self.place(t, x), segments));
        all.extend(gradients);
        all
    }

    /// `t` for the tokens `start..start + length` of row `row` alone.
    pub fn narrow(&self, t: &[Tensor], row: usize, start: usize, length: usize) -> Vec<Tensor> {
        let cut = |(i, t): (usize, &Tensor)| match SEQUENCES.contains(&i) {
            true => t.narrow(0, row, 1).unwrap().narrow(1, start, length).unwrap(),
            false => t.clone(),
        };
        t.iter().enumerate().map(cut).collect()
    }
}

/// The sums in plain f64.
pub fn oracle(case: &Case, t: &[Tensor]) -> Tensor {
    let v: Vec<Vec<f64>> = t.iter().map(values).collect();
    let Case { batch, length, channels, taps, reverse, .. } = *case;
    let mut y = vec![0.0; batch * length * channels];
    for row in 0..batch {
        for c in 0..channels {
            let group = c / (channels / case.groups);
            let at = |t: usize| (row * length + t) * channels + c;
            let input = |t: usize| v[0][at(t)] * if case.pre_gate { v[4][at(t)] } else { 1.0 };
            for t in 0..length {
                let mut sum = if case.d { v[3][c] * input(t) } else { 0.0 };
                sum += (0..taps.min(t + 1)).map(|j| v[1][group * taps + j] * input(t - j)).sum::<f64>();
                sum += (0..reverse.min(length - t))
                    .map(|j| v[2][group * reverse + j] * input(t + j))
                    .sum::<f64>();
                y[at(t)] = if case.post_gate { sum * v[5][at(t)] } else { sum };
            }
        }
    }
    Tensor::from_vec(y, (batch, length, channels), &Device::Cpu).unwrap()
}

/// Sequences in `dtype`, the others in f32 (f64 for f64).
pub fn cast(t: &[Tensor], dtype: DType) -> Vec<Tensor> {
    let other = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let one =
        |(i, t): (usize, &Tensor)| t.to_dtype(if SEQUENCES.contains(&i) { dtype } else { other }).unwrap();
    t.iter().enumerate().map(one).collect()
}
