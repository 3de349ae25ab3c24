//! The recurrent form: token by token, the state read and written once for each.
//!
//! Lanes are the numbers of a value; columns of the state are independent, so that blocks of them are walked alone. Four
//! operations for every number of the state, which is read and written: memory is the floor.

use super::Operands;
use super::forward::Retained;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Kernel, Real, Simd};
use crate::backend::cpu::view::{Outlet, lanes, load, store};
use std::ops::Range;

/// Registers of columns that are walked together.
const REGISTERS: usize = 8;
/// Columns in a piece of work.
const COLUMNS: usize = 256;

impl<T: Real> Operands<'_, T> {
    /// Token by token.
    pub(in super::super) fn step(&self) -> Retained<T> {
        let sizes = &self.sizes;
        let outputs = sizes.batch * sizes.length * sizes.heads * sizes.values;
        let states = sizes.batch * sizes.heads * self.state_size();
        let (mut o, mut state) = (Vec::new(), Vec::new());
        {
            let o = Outlet::fresh_or_zeroed(&mut o, outputs, self.padded);
            let state = Outlet::fresh(&mut state, states);
            let columns = parallel::pieces(sizes.values, COLUMNS);
            let tasks: Vec<_> = self
                .tasks()
                .into_iter()
                .flat_map(|task| columns.iter().map(move |c| (task, c.clone())))
                .collect();
            parallel::map(&tasks, self.work(), |(task, columns)| {
                let step =
                    Step { operands: self, task: *task, columns: columns.clone(), o: &o, state: &state };
                T::dispatch_on(self.isa, step)
            });
        }
        // SAFETY: padding was zeroed; every task wrote all of its own columns.
        unsafe {
            o.set_len(outputs);
            state.set_len(states);
        }
        Retained { o, state, kept: vec![] }
    }
}

/// Walks the tokens of one head of one row, for some columns of the state.
struct Step<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    task: [usize; 2],
    columns: Range<usize>,
    o: &'a Outlet<'a, T>,
    state: &'a Outlet<'a, T>,
}

impl<T: Real> Kernel<T> for Step<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let (p, [row, head]) = (self.operands, self.task);
        let (keys, values) = (p.sizes.keys, p.sizes.values);
        let size = p.state_size();
        let state = self.state.at((row * p.sizes.heads + head) * size, size);
        // where the state is now: nowhere while it is zero, then where it came from, then in the result
        let mut from = p.initial(self.task).map(|initial| initial.as_ptr());
        for run in p.segments.row(row) {
            if run.fresh {
                from = None;
            }
            for t in run.tokens.clone() {
                let [q, k, v] = p.matrices(self.task, &(t..t + 1)).map(|x| x.row(0));
                if p.decays.resets([row, t, head]) {
                    from = None;
                }
                let loss = p.decays.loss([row, t, head]);
                let o = self.o.at(((row * p.sizes.length + t) * p.sizes.heads + head) * values, values);
                let block = REGISTERS * S::LANES;
                for start in self.columns.clone().step_by(block) {
                    let token = Token { q, k, v, loss, scale: p.scale, stride: values };
                    // SAFETY: the states hold K rows of V, o V numbers; these columns are this task's own.
                    unsafe {
                        let (from, state, o) =
                            (from.map(|from| from.add(start)), state.add(start), o.add(start));
                        let width = block.min(self.columns.end - start);
                        match width == block {
                            true => token.full(s, start, from, state, o),
                            false => token.rest(s, start, width, from, state, o),
                        }
                    }
                }
                from = Some(state.cast_const());
            }
        }
        if from != Some(state.cast_const()) {
            for key in 0..keys {
                // SAFETY: as above; the result has not been written yet.
                unsafe {
                    let at = key * values + self.columns.start;
                    match from {
                        Some(from) => {
                            state.add(at).copy_from_nonoverlapping(from.add(at), self.columns.len())
                        }
                        None => state.add(at).write_bytes(0, self.columns.len()),
                    }
                }
            }
        }
    }
}

/// One token of one head.
struct Token<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    /// The decay less 1: rounded by itself, the error of a decay near 1 does not grow with the number of tokens.
    loss: T,
    scale: T,
    /// Between two rows of the state.
    stride: usize,
}

impl<T: Real> Token<'_, T> {
    /// All of [`REGISTERS`] from column `start`.
    ///
    /// # Safety
    /// `from` (a zero state if `None`) and `to` point at the first of the columns in K rows, `o` at as many columns.
    #[inline(always)]
    unsafe fn full<S: Simd<T>>(&self, s: S, start: usize, from: Option<*const T>, to: *mut T, o: *mut T) {
        let zero = s.splat(T::ZERO);
        let values: [S::V; REGISTERS] =
            std::array::from_fn(|r| load(s, self.v, start + r * S::LANES, S::LANES));
        let mut sums = [zero; REGISTERS];
        let loss = s.splat(self.loss);
        for (i, (q, k)) in self.q.iter().zip(self.k).enumerate() {
            let (q, k) = (s.splat(*q), s.splat(*k));
            for r in 0..REGISTERS {
                let at = i * self.stride + r * S::LANES;
                // SAFETY: the caller's promise.
                unsafe {
                    let state = match from {
                        Some(from) => {
                            let state = s.load(from.add(at));
                            s.fma(k, values[r], s.fma(loss, state, state))
                        }
                        None => s.mul(k, values[r]),
                    };
                    s.store(to.add(at), state);
                    sums[r] = s.fma(q, state, sums[r]);
                }
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { s.store(o.add(r * S::LANES), s.mul(s.splat(self.scale), sum)) };
        }
    }

    /// The same for `width` columns.
    ///
    /// # Safety
    /// As for [`Token::full`].
    #[inline(always)]
    unsafe fn rest<S: Simd<T>>(
        &self,
        s: S,
        start: usize,
        width: usize,
        from: Option<*const T>,
        to: *mut T,
        o: *mut T,
    ) {
        for (c, n) in lanes(s, 0..width) {
            let value = load(s, self.v, start + c, n);
            let mut sum = s.splat(T::ZERO);
            for (i, (q, k)) in self.q.iter().zip(self.k).enumerate() {
                let at = i * self.stride + c;
                let k = s.splat(*k);
                // SAFETY: the caller's promise.
                unsafe {
                    let state = match from {
                        Some(from) => {
                            let from = from.add(at);
                            let state = if n == S::LANES { s.load(from) } else { s.load_first(from, n) };
                            s.fma(k, value, s.fma(s.splat(self.loss), state, state))
                        }
                        None => s.mul(k, value),
                    };
                    store(s, to.add(at), n, state);
                    sum = s.fma(s.splat(*q), state, sum);
                }
            }
            // SAFETY: the caller's promise.
            unsafe { store(s, o.add(c), n, s.mul(s.splat(self.scale), sum)) };
        }
    }
}
