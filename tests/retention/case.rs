//! Calls of retention to test with, and their results in plain f64.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{Form, Retention, Segments, retention};

/// Sizes and options of one call.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub length: usize,
    /// Of queries, keys and values.
    pub heads: [usize; 3],
    pub keys: usize,
    pub values: usize,
    pub per_token: bool,
    /// Whether a few decays are zero.
    pub resets: bool,
    pub state: bool,
    pub form: Form,
}

/// The arguments, in the order of a case's tensors.
pub const NAMES: [&str; 5] = ["q", "k", "v", "log_decay", "initial_state"];

/// Every form, chunks of several sizes.
pub const FORMS: [Form; 6] = [
    Form::Auto,
    Form::Parallel,
    Form::Chunkwise { chunk: 1 },
    Form::Chunkwise { chunk: 7 },
    Form::Chunkwise { chunk: 100 },
    Form::Recurrent,
];

impl Case {
    pub fn new(batch: usize, length: usize, heads: usize, keys: usize, values: usize) -> Self {
        let (heads, form) = ([heads; 3], Form::Auto);
        Self { batch, length, heads, keys, values, per_token: false, resets: false, state: true, form }
    }

    /// H
    pub fn all_heads(&self) -> usize {
        *self.heads.iter().max().unwrap()
    }

    /// q, k, v, log_decay and the initial state in f64.
    pub fn tensors(&self, seed: u64) -> Vec<Tensor> {
        let random = &mut Random::new(seed);
        let (b, t, h) = (self.batch, self.length, self.all_heads());
        let [hq, hk, hv] = self.heads;
        let mut log_decay = match self.per_token {
            true => random.uniform((b, t, h), -0.3, 0.0),
            false => random.uniform(h, -0.3, -0.01),
        };
        if self.resets {
            let mut decays = values(&log_decay);
            for decay in &mut decays {
                if random.int(0, 9) == 0 {
                    *decay = f64::NEG_INFINITY;
                }
            }
            log_decay = Tensor::from_vec(decays, log_decay.shape(), &Device::Cpu).unwrap();
        }
        vec![
            random.normal((b, t, hq, self.keys)),
            random.normal((b, t, hk, self.keys)),
            random.normal((b, t, hv, self.values)),
            log_decay,
            random.normal((b, h, self.keys, self.values)),
        ]
    }

    pub fn args<'a>(&self, t: &'a [Tensor], segments: Option<&'a Segments>) -> Retention<'a> {
        Retention {
            q: &t[0],
            k: &t[1],
            v: &t[2],
            log_decay: &t[3],
            scale: 0.7,
            initial_state: t.get(4).filter(|_| self.state),
            segments,
            form: self.form,
        }
    }

    pub fn run(&self, t: &[Tensor], segments: Option<&Segments>) -> subquadratic::Result<Vec<Tensor>> {
        let (o, state) = retention(&self.args(t, segments))?;
        Ok(vec![o, state])
    }

    /// Outputs, final state, then the gradient of every used input.
    pub fn all(&self, t: &[Tensor], segments: Option<&Segments>) -> Vec<Tensor> {
        let used = if self.state { 5 } else { 4 };
        let (mut outputs, gradients) = gradients(&t[..used], |x| self.run(x, segments));
        outputs.extend(gradients);
        outputs
    }

    /// `t` for the tokens `start..start + length` alone.
    pub fn narrow(&self, t: &[Tensor], start: usize, length: usize) -> Vec<Tensor> {
        let cut = |(i, t): (usize, &Tensor)| match i < 3 || i == 3 && self.per_token {
            true => t.narrow(1, start, length).unwrap(),
            false => t.clone(),
        };
        t.iter().enumerate().map(cut).collect()
    }

    /// The same tokens in pieces, each in a form of its own, the state handed over.
    pub fn in_pieces(&self, t: &[Tensor], pieces: &[(usize, Form)]) -> subquadratic::Result<Vec<Tensor>> {
        let (mut start, mut outputs, mut case, mut state) = (0, vec![], *self, None);
        for &(length, form) in pieces {
            let mut part = case.narrow(t, start, length);
            if let Some(state) = state {
                part.truncate(4);
                part.push(state);
                case.state = true;
            }
            (case.length, case.form) = (length, form);
            let (o, last) = retention(&case.args(&part, None))?;
            (state, start) = (Some(last), start + length);
            outputs.push(o);
        }
        Ok(vec![Tensor::cat(&outputs, 1)?, state.unwrap()])
    }
}

/// The recurrence in plain f64: outputs and final state.
pub fn oracle(case: &Case, t: &[Tensor], segments: Option<&Segments>) -> Vec<Tensor> {
    let x: Vec<Vec<f64>> = t.iter().map(values).collect();
    let (length, heads, keys, width) = (case.length, case.all_heads(), case.keys, case.values);
    let mut outputs = vec![0.0; case.batch * length * heads * width];
    let mut states = if case.state { x[4].clone() } else { vec![0.0; case.batch * heads * keys * width] };
    for row in 0..case.batch {
        let whole = subquadratic::ops::segments::Run { tokens: 0..length, fresh: false };
        let runs = segments.map_or(vec![whole], |segments| segments.row(row).to_vec());
        for head in 0..heads {
            let state = &mut states[(row * heads + head) * keys * width..][..keys * width];
            let group = |side: usize, t: usize, width: usize| {
                let count = case.heads[side];
                ((row * length + t) * count + head / (heads / count)) * width
            };
            for run in &runs {
                if run.fresh {
                    state.fill(0.0);
                }
                for t in run.tokens.clone() {
                    let decay =
                        x[3][if case.per_token { (row * length + t) * heads + head } else { head }].exp();
                    for k in 0..keys {
                        for v in 0..width {
                            let input = x[1][group(1, t, keys) + k] * x[2][group(2, t, width) + v];
                            state[k * width + v] = decay * state[k * width + v] + input;
                            outputs[((row * length + t) * heads + head) * width + v] +=
                                0.7 * x[0][group(0, t, keys) + k] * state[k * width + v];
                        }
                    }
                }
            }
        }
    }
    let tensor = |v: Vec<f64>, dims: &[usize]| Tensor::from_vec(v, dims, &Device::Cpu).unwrap();
    vec![
        tensor(outputs, &[case.batch, length, heads, width]),
        tensor(states, &[case.batch, heads, keys, width]),
    ]
}

/// Sequences in `dtype`, decays and states in f32 (f64 for f64).
pub fn cast(t: &[Tensor], dtype: DType) -> Vec<Tensor> {
    let wide = subquadratic::ops::accumulation_dtype(dtype);
    let one = |(i, t): (usize, &Tensor)| t.to_dtype(if i < 3 { dtype } else { wide }).unwrap();
    t.iter().enumerate().map(one).collect()
}

pub fn widen(t: &[Tensor]) -> Vec<Tensor> {
    t.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect()
}

/// A random cut of the rows into sequences, resets and padding.
pub fn random_segments(random: &mut Random, batch: usize, length: usize) -> Segments {
    let marks: Vec<u8> = (0..batch * length)
        .map(|_| match random.int(0, 19) {
            0 => 1,
            1..4 => 2,
            _ => 0,
        })
        .collect();
    Segments::from_marks(&Tensor::from_vec(marks, (batch, length), &Device::Cpu).unwrap()).unwrap()
}
