//! Calls of the retention to test with.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{Form, Retention, Segments};

/// Sizes and options of one call.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub batch: usize,
    pub length: usize,
    /// Heads of queries, keys and values.
    pub heads: [usize; 3],
    pub key: usize,
    pub value: usize,
    /// Decays per token, else constant ones.
    pub per_token: bool,
    pub state: bool,
}

/// The arguments, in the order of a case's tensors.
pub const NAMES: [&str; 5] = ["q", "k", "v", "log_decay", "initial_state"];

impl Case {
    /// As many heads of each, and a state.
    pub fn plain(batch: usize, length: usize, heads: usize, key: usize, value: usize) -> Self {
        Self { batch, length, heads: [heads; 3], key, value, per_token: false, state: true }
    }

    /// Random sizes and options.
    pub fn random(random: &mut Random, longest: usize) -> Self {
        let heads = [[3, 3, 3], [4, 2, 2], [4, 1, 1], [2, 4, 4], [4, 2, 4], [1, 1, 1]][random.int(0, 5)];
        Self {
            batch: random.int(1, 3),
            length: random.int(0, longest),
            heads,
            key: random.int(1, 9),
            value: random.int(1, 21),
            per_token: random.int(0, 1) == 1,
            state: random.int(0, 1) == 1,
        }
    }

    pub fn groups(&self) -> usize {
        self.heads.into_iter().max().unwrap()
    }

    /// q, k, v, log_decay and initial state, in f64.
    pub fn tensors(&self, random: &mut Random) -> Vec<Tensor> {
        let (b, t, h) = (self.batch, self.length, self.groups());
        let log_decay = if self.per_token {
            random.uniform((b, t, h), -1.5, 0.0)
        } else {
            random.uniform(h, -0.3, -1e-3)
        };
        vec![
            random.normal((b, t, self.heads[0], self.key)),
            random.normal((b, t, self.heads[1], self.key)),
            random.normal((b, t, self.heads[2], self.value)),
            log_decay,
            random.normal((b, h, self.key, self.value)),
        ]
    }

    pub fn args<'a>(&self, t: &'a [Tensor], segments: Option<&'a Segments>, form: Form) -> Retention<'a> {
        Retention {
            q: &t[0],
            k: &t[1],
            v: &t[2],
            log_decay: &t[3],
            scale: 0.7,
            initial_state: self.state.then(|| &t[4]),
            segments,
            form,
        }
    }

    /// Some cut of the rows, of every kind.
    pub fn segments(&self, random: &mut Random) -> Option<Segments> {
        let (batch, length) = (self.batch, self.length);
        let lengths = |random: &mut Random| (0..batch).map(|_| random.int(0, length)).collect::<Vec<_>>();
        match random.int(0, 4) {
            0 => None,
            1 => Segments::left_padded(&lengths(random), length).ok(),
            2 => Segments::right_padded(&lengths(random), length).ok(),
            3 => {
                let rows: Vec<_> = lengths(random).into_iter().map(|n| random.split(n, 3, 0)).collect();
                Segments::packed(&rows, length).ok()
            }
            _ => {
                let marks: Vec<u8> =
                    (0..batch * length).map(|_| [0, 0, 0, 0, 1, 2][random.int(0, 5)]).collect();
                Segments::from_marks(&Tensor::from_vec(marks, (batch, length), &Device::Cpu).unwrap()).ok()
            }
        }
    }
}

pub const FORMS: [Form; 7] = [
    Form::Auto,
    Form::Parallel,
    Form::Recurrent,
    Form::Chunkwise { chunk: 1 },
    Form::Chunkwise { chunk: 3 },
    Form::Chunkwise { chunk: 16 },
    Form::Chunkwise { chunk: 100 },
];

pub fn cast(tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    tensors.iter().map(|t| t.to_dtype(dtype).unwrap()).collect()
}

/// Sets some of the decays per token to forget everything.
pub fn with_resets(random: &mut Random, tensors: &mut [Tensor]) {
    let log = &tensors[3];
    let logs = values(log).into_iter().map(|x| if random.int(0, 6) == 0 { f64::NEG_INFINITY } else { x });
    tensors[3] = Tensor::from_vec(logs.collect::<Vec<_>>(), log.shape(), &Device::Cpu).unwrap();
}
