//! The recurrent form: one pass over the state a token.
//!
//! A task takes some value channels of a row and head, so that even one head is work for several threads. The floor of a
//! single token is one read and one write of the state, `8 K V` bytes a row and head.

use super::Operands;
use super::forward::Narrow;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Outlet, lanes, load, put, store};
use candle_core::WithDType;
use std::ops::Range;

/// Value channels of a task: their part of each row of the state fills whole cache lines.
const CHANNELS: usize = 256;
/// Registers of outputs that are summed together.
const TOGETHER: usize = 8;

impl<E: Element> Operands<'_, E> {
    /// The output `[B, T, H, V]` and the final state `[B, H, K, V]`, token by token.
    pub(in super::super) fn step(&self) -> (Vec<E>, Vec<E::Real>) {
        let (mut o, mut state) = (Vec::new(), Vec::new());
        let (length, heads, value) = (self.sizes.length, self.sizes.heads, self.sizes.value);
        let outputs = self.sizes.batch * length * heads * value;
        let outlet = Outlet::fresh_or_zeroed(&mut o, outputs, self.padded);
        let states = Outlet::fresh(&mut state, self.states_size());
        let mut tasks = vec![];
        for row in 0..self.sizes.batch {
            for head in 0..heads {
                tasks.extend(
                    parallel::pieces(value, CHANNELS).into_iter().map(|channels| (row, head, channels)),
                );
            }
        }
        parallel::map(&tasks, 2 * self.states_size().max(self.work()), |(row, head, channels)| {
            let size = self.state_size();
            let start = (row * heads + head) * size;
            let before = self.initial.as_ref().map(|states| &states[start..start + size]);
            let chunks = self.chunks(*row, *head, &(0..length), 1);
            let mut from = before.map_or(Source::Zero, Source::Given);
            let after = states.at(start, size);
            let place = Place { key: self.sizes.key, value, channels, after };
            if chunks.is_empty() {
                place.copy(from);
            }
            let (mut q, mut k, mut v) = (vec![], vec![], vec![]);
            let mut line = vec![E::Real::ZERO; channels.len()];
            for chunk in chunks {
                self.gather(0, *row, *head, &chunk.tokens, &mut q);
                self.gather(1, *row, *head, &chunk.tokens, &mut k);
                self.gather(2, *row, *head, &chunk.tokens, &mut v);
                q.iter_mut().for_each(|q| *q = *q * E::Real::from_f64(self.scale));
                if chunk.fresh {
                    from = Source::Zero;
                }
                let decay = E::Real::from_f64(chunk.total().exp());
                dispatch(Token {
                    place: &place,
                    from,
                    q: &q,
                    k: &k,
                    v: &v[channels.clone()],
                    decay,
                    o: &mut line,
                });
                from = Source::Written;
                let at = ((row * length + chunk.tokens.start) * heads + head) * value + channels.start;
                dispatch(Narrow(&line, outlet.at(at, channels.len())));
            }
        });
        // SAFETY: the tasks wrote every token, or zeros were there before, and all channels of every state.
        unsafe {
            o.set_len(outputs);
            state.set_len(self.states_size());
        }
        (o, state)
    }
}

/// Where the state before a token is.
#[derive(Clone, Copy)]
enum Source<'a, T> {
    Zero,
    Given(&'a [T]),
    /// Where it was written.
    Written,
}

/// Some channels of the state of a row and head, which no other task touches: `[K, V]` at `after`.
struct Place<'a, T> {
    key: usize,
    value: usize,
    channels: &'a Range<usize>,
    after: *mut T,
}

impl<T: Real> Place<'_, T> {
    /// The state as it is, where there is no token.
    fn copy(&self, from: Source<T>) {
        for k in 0..self.key {
            let start = k * self.value + self.channels.start;
            for i in start..start + self.channels.len() {
                let value = if let Source::Given(state) = from { state[i] } else { T::ZERO };
                // SAFETY: a place of the state.
                unsafe { self.after.add(i).write(value) };
            }
        }
    }
}

/// One token: the state decayed, its update added, the output read.
struct Token<'a, T> {
    place: &'a Place<'a, T>,
    from: Source<'a, T>,
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    decay: T,
    o: &'a mut [T],
}

impl<T: Real> Kernel<T> for Token<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, s: S) {
        let width = self.v.len();
        let whole = width / (TOGETHER * S::LANES) * TOGETHER * S::LANES;
        for c in (0..whole).step_by(TOGETHER * S::LANES) {
            self.columns::<S, TOGETHER>(s, c, S::LANES);
        }
        for (c, n) in lanes(s, whole..width) {
            self.columns::<S, 1>(s, c, n);
        }
    }
}

impl<T: Real> Token<'_, T> {
    /// `R` registers of channels from `c`, `n` lanes of each.
    #[inline(always)]
    fn columns<S: Simd<T>, const R: usize>(&mut self, s: S, c: usize, n: usize) {
        let Place { key, value, channels, after } = *self.place;
        let at: [usize; R] = std::array::from_fn(|r| c + r * S::LANES);
        let v = at.map(|c| load(s, self.v, c, n));
        let decay = s.splat(self.decay);
        let mut o = [s.splat(T::ZERO); R];
        for k in 0..key {
            let (kk, qk) = (s.splat(self.k[k]), s.splat(self.q[k]));
            let row = k * value + channels.start;
            for r in 0..R {
                let old = match self.from {
                    Source::Zero => s.splat(T::ZERO),
                    Source::Given(state) => load(s, state, row + at[r], n),
                    // SAFETY: n values of this task's channels, written for the token before.
                    Source::Written => unsafe {
                        let from = after.add(row + at[r]);
                        if n == S::LANES { s.load(from) } else { s.load_first(from, n) }
                    },
                };
                let new = s.fma(decay, old, s.mul(kk, v[r]));
                // SAFETY: n places of this task's channels of the state.
                unsafe { store::<T, S>(s, after.add(row + at[r]), n, new) };
                o[r] = s.fma(qk, new, o[r]);
            }
        }
        for r in 0..R {
            put(s, self.o, at[r], n, o[r]);
        }
    }
}
