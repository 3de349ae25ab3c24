//! Calls of the scan to test with, and their results in plain f64.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{Segments, SelectiveScan, selective_scan};

/// How `B` and `C` come: constant, or per token in groups (0: without the group dimension).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    Constant,
    Token(usize),
}

/// Sizes and options of one call.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub length: usize,
    pub channels: usize,
    pub states: usize,
    pub b: Form,
    pub c: Form,
    pub skip: bool,
    pub gate: bool,
    pub bias: bool,
    pub softplus: bool,
    pub state: bool,
}

/// The arguments, in the order of a case's tensors.
pub const NAMES: [&str; 9] = ["u", "delta", "a", "b", "c", "d", "z", "delta_bias", "initial_state"];
/// The places of `u`, `delta` and `z`.
pub const SEQUENCES: [usize; 3] = [0, 1, 6];

impl Case {
    pub fn full(batch: usize, length: usize, channels: usize, states: usize) -> Self {
        let (b, c) = (Form::Token(0), Form::Token(0));
        Self {
            batch,
            length,
            channels,
            states,
            b,
            c,
            skip: true,
            gate: true,
            bias: true,
            softplus: true,
            state: true,
        }
    }

    /// u, delta, a, b, c, d, z, delta_bias, initial state in f64, distributed as in the peer's tests.
    pub fn tensors(&self, seed: u64) -> Vec<Tensor> {
        let random = &mut Random::new(seed);
        let (b, l, d, n) = (self.batch, self.length, self.channels, self.states);
        let form = |random: &mut Random, form| match form {
            Form::Constant => random.normal((d, n)),
            Form::Token(0) => random.normal((b, l, n)),
            Form::Token(g) => random.normal((b, l, g, n)),
        };
        vec![
            random.normal((b, l, d)),
            random.uniform((b, l, d), 0.0, 0.5),
            random.uniform((d, n), -0.5, 0.0),
            form(random, self.b),
            form(random, self.c),
            random.normal(d),
            random.normal((b, l, d)),
            random.uniform(d, 0.0, 0.5),
            random.normal((b, d, n)),
        ]
    }

    pub fn args<'a>(&self, t: &'a [Tensor], segments: Option<&'a Segments>) -> SelectiveScan<'a> {
        SelectiveScan {
            u: &t[0],
            delta: &t[1],
            a: &t[2],
            b: &t[3],
            c: &t[4],
            d: self.skip.then_some(&t[5]),
            z: self.gate.then_some(&t[6]),
            delta_bias: self.bias.then_some(&t[7]),
            softplus: self.softplus,
            initial_state: self.state.then_some(&t[8]),
            segments,
        }
    }

    pub fn run(&self, t: &[Tensor], segments: Option<&Segments>) -> subquadratic::Result<Vec<Tensor>> {
        let (y, state) = selective_scan(&self.args(t, segments))?;
        Ok(vec![y, state])
    }

    /// Inputs of which a gradient is expected.
    pub fn differentiable(&self) -> Vec<usize> {
        let used = [true, true, true, true, true, self.skip, self.gate, self.bias, self.state];
        (0..9).filter(|&i| used[i]).collect()
    }

    /// Outputs, then the gradient of every used input.
    pub fn all(&self, t: &[Tensor], segments: Option<&Segments>) -> Vec<Tensor> {
        let used = self.differentiable();
        let inputs: Vec<Tensor> = used.iter().map(|&i| t[i].clone()).collect();
        let (mut outputs, gradients) = gradients(&inputs, |x| self.run(&self.place(t, x), segments));
        outputs.extend(gradients);
        outputs
    }

    /// `t` with the used inputs replaced.
    pub fn place(&self, t: &[Tensor], used: &[Tensor]) -> Vec<Tensor> {
        let mut t = t.to_vec();
        for (&i, x) in self.differentiable().iter().zip(used) {
            t[i] = x.clone();
        }
        t
    }

    /// `t` for the tokens `start..start + length` alone.
    pub fn narrow(&self, t: &[Tensor], start: usize, length: usize) -> Vec<Tensor> {
        let per_token = |i: usize| {
            SEQUENCES.contains(&i) || i == 3 && self.b != Form::Constant || i == 4 && self.c != Form::Constant
        };
        let cut = |(i, t): (usize, &Tensor)| {
            if per_token(i) { t.narrow(1, start, length).unwrap() } else { t.clone() }
        };
        t.iter().enumerate().map(cut).collect()
    }

    /// The same tokens in pieces, the state handed over.
    pub fn in_pieces(&self, t: &[Tensor], pieces: &[usize]) -> subquadratic::Result<Vec<Tensor>> {
        let (mut start, mut ys, mut case) = (0, vec![], *self);
        let mut state = t[8].clone();
        for &length in pieces {
            let mut t = case.narrow(t, start, length);
            t[8] = state;
            case.length = length;
            let (y, last) = selective_scan(&case.args(&t, None))?;
            case.state = true;
            (state, start) = (last, start + length);
            ys.push(y);
        }
        Ok(vec![Tensor::cat(&ys, 1)?, state])
    }
}

/// The recurrence in plain f64: outputs and final state.
pub fn oracle(case: &Case, t: &[Tensor]) -> Vec<Tensor> {
    let v: Vec<Vec<f64>> = t.iter().map(values).collect();
    let (l_max, d_max, n_max) = (case.length, case.channels, case.states);
    let mut h = if case.state { v[8].clone() } else { vec![0.0; case.batch * d_max * n_max] };
    let mut y = vec![0.0; case.batch * l_max * d_max];
    let at = |form: Form, v: &[f64], row: usize, t: usize, d: usize, n: usize| match form {
        Form::Constant => v[d * n_max + n],
        Form::Token(g) => {
            let g = g.max(1);
            v[((row * l_max + t) * g + d / (d_max / g)) * n_max + n]
        }
    };
    for row in 0..case.batch {
        for t in 0..l_max {
            for d in 0..d_max {
                let i = (row * l_max + t) * d_max + d;
                let raw = v[1][i] + if case.bias { v[7][d] } else { 0.0 };
                let delta = if case.softplus { raw.exp().ln_1p() } else { raw };
                let mut sum = if case.skip { v[5][d] * v[0][i] } else { 0.0 };
                for n in 0..n_max {
                    let h = &mut h[(row * d_max + d) * n_max + n];
                    *h = (delta * v[2][d * n_max + n]).exp() * *h
                        + delta * at(case.b, &v[3], row, t, d, n) * v[0][i];
                    sum += *h * at(case.c, &v[4], row, t, d, n);
                }
                y[i] = if case.gate { sum * v[6][i] / (1.0 + (-v[6][i]).exp()) } else { sum };
            }
        }
    }
    let tensor = |v: Vec<f64>, shape| Tensor::from_vec(v, shape, &Device::Cpu).unwrap();
    vec![tensor(y, (case.batch, l_max, d_max)), tensor(h, (case.batch, d_max, n_max))]
}

/// Sequences and coefficients in `dtype`, the others in f32 (f64 for f64).
pub fn cast(t: &[Tensor], dtype: DType) -> Vec<Tensor> {
    let other = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let one = |(i, t): (usize, &Tensor)| {
        t.to_dtype(if SEQUENCES.contains(&i) || i == 3 || i == 4 { dtype } else { other }).unwrap()
    };
    t.iter().enumerate().map(one).collect()
}

pub fn widen(t: &[Tensor]) -> Vec<Tensor> {
    t.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect()
}
