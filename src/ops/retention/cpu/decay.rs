//! What chunks need of the decays: exponentials of differences of sums of their logarithms.
//!
//! Nothing is divided by a product of decays, which may be zero long before any quotient that is needed is. The sums are
//! f64 and finite, however small the decays: a decay that is zero in the dtype of the state begins a piece of its own.

use crate::Result;
use crate::backend::cpu::math::exp;
use crate::backend::cpu::simd::{Real, Simd};
use crate::backend::cpu::view::{lanes, load, put};
use crate::ops::retention::Sizes;
use crate::ops::retention::plan::Piece;
use candle_core::{DType, Tensor};

/// The decays of a call.
pub(super) struct Decays<T> {
    /// `[H]`, or `[B, T, H]` if `per_token`.
    log: Vec<f64>,
    per_token: bool,
    length: usize,
    heads: usize,
    zero: std::marker::PhantomData<T>,
}

impl<T: Real> Decays<T> {
    pub(super) fn new(log_decay: &Tensor, sizes: &Sizes) -> Result<Self> {
        let log = log_decay.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        let zero = std::marker::PhantomData;
        Ok(Self { log, per_token: sizes.per_token, length: sizes.length, heads: sizes.heads, zero })
    }

    /// The logarithm for a row, token and head.
    #[inline(always)]
    pub(super) fn log(&self, [row, t, head]: [usize; 3]) -> f64 {
        self.log[if self.per_token { (row * self.length + t) * self.heads + head } else { head }]
    }

    /// The decay less 1.
    pub(super) fn loss(&self, at: [usize; 3]) -> T {
        T::from_f64(self.log(at).exp_m1())
    }

    /// Whether nothing before the token is left after it.
    #[inline(always)]
    pub(super) fn resets(&self, at: [usize; 3]) -> bool {
        let log = self.log(at);
        // most need no exponential
        log < -80.0 && T::from_f64(log.exp()) == T::ZERO
    }
}

/// The decays of one piece, and the tables they come from.
#[derive(Default)]
pub(super) struct Weights<T> {
    /// From before the piece to after each of its tokens, `exp(c[i])`.
    pub(super) from_start: Vec<T>,
    /// From each token to the end, `exp(c[L-1] - c[j])`.
    pub(super) to_end: Vec<T>,
    /// Through the whole piece.
    pub(super) whole: T,
    /// The sums `c`, counted from the first token of the piece.
    sums: Vec<f64>,
    /// Of a constant decay: its powers from that of `powers.len() - 1` down to that of 0.
    powers: Vec<T>,
    constant: bool,
}

impl<T: Real> Weights<T> {
    /// For pieces of a head of at most `length` tokens.
    #[inline(always)]
    pub(super) fn new<S: Simd<T>>(s: S, decays: &Decays<T>, head: usize, length: usize) -> Self {
        let mut weights = Self {
            from_start: vec![],
            to_end: vec![],
            whole: T::ONE,
            sums: vec![],
            powers: vec![],
            constant: !decays.per_token,
        };
        if weights.constant {
            let log = decays.log[head];
            // the power of 0 is 1, that of negative infinity too
            let power = |n: usize| if n == 0 { 0.0 } else { log * n as f64 };
            weights.powers = (0..=length).rev().map(|n| T::from_f64(power(n))).collect();
            exp_in_place(s, &mut weights.powers);
        }
        weights
    }

    /// Turns to another piece.
    #[inline(always)]
    pub(super) fn set<S: Simd<T>>(
        &mut self,
        s: S,
        decays: &Decays<T>,
        [row, head]: [usize; 2],
        piece: &Piece,
    ) {
        let n = piece.tokens.len();
        self.from_start.clear();
        self.to_end.clear();
        if self.constant {
            let last = self.powers.len() - 1;
            self.from_start.extend(self.powers[last - n..last].iter().rev());
            self.to_end.extend(&self.powers[last + 1 - n..]);
            self.whole = self.powers[last - n];
            return;
        }
        let mut sum = 0.0;
        self.sums.clear();
        for t in piece.tokens.clone() {
            sum += if t == piece.tokens.start { 0.0 } else { decays.log([row, t, head]) };
            self.sums.push(sum);
        }
        // a fresh piece has nothing before it
        let first = if piece.fresh { 0.0 } else { decays.log([row, piece.tokens.start, head]) };
        self.from_start.extend(self.sums.iter().map(|c| T::from_f64(first + c)));
        self.to_end.extend(self.sums.iter().map(|c| T::from_f64(sum - c)));
        exp_in_place(s, &mut self.from_start);
        exp_in_place(s, &mut self.to_end);
        self.whole = self.from_start[n - 1];
    }

    /// The decays `exp(c[i] - c[j])` of token `i` for `j = 0..=i`; `scratch` has place for them.
    #[inline(always)]
    pub(super) fn row<'a, S: Simd<T>>(&'a self, s: S, i: usize, scratch: &'a mut [T]) -> &'a [T] {
        if self.constant {
            return &self.powers[self.powers.len() - 1 - i..];
        }
        let (sum, scratch) = (self.sums[i], &mut scratch[..=i]);
        for (to, c) in scratch.iter_mut().zip(&self.sums) {
            *to = T::from_f64(sum - c);
        }
        exp_in_place(s, scratch);
        scratch
    }
}

#[inline(always)]
fn exp_in_place<T: Real, S: Simd<T>>(s: S, values: &mut [T]) {
    for (i, n) in lanes(s, 0..values.len()) {
        let value = exp(s, load(s, values, i, n));
        put(s, values, i, n, value);
    }
}
