//! The backward pass: two walks, neither of which keeps a state.
//!
//! With `G` the gradient of the state behind a chunk, `c` its sums of logarithms and `M[i, j] = scale e^(c[i] - c[j])`,
//!
//! ```text
//! dq[i] = scale e^(c[i]) do[i] S^T   + sum_(j <= i) M[i, j] (do[i] v[j]) k[j]             forward in time, with S
//! dk[j] = e^(c[end] - c[j]) v[j] G^T + sum_(i >= j) M[i, j] (do[i] v[j]) q[i]             backward, with G
//! dv[j] = e^(c[end] - c[j]) k[j] G   + sum_(i >= j) M[i, j] (q[i] k[j]) do[i]
//! G    <- e^(c[end]) G + scale sum_i e^(c[i]) q[i]^T do[i]
//! ```
//!
//! The logarithm of the decay at token `t` weighs every pair of tokens that lies across it, so that its gradient is
//! `sum_(i >= t) (q[i] dq[i] - k[i] dk[i])` to the end of the sequence, plus `S dS` of the final state. These sums run in
//! f64. Gradients of heads that share a query, key or value are added in the order of the heads.

use super::super::plan::ROWS;
use super::forward::{Narrow, Scratch, Task, join};
use super::product::{product, rows};
use super::{Chunk, Decays, Mask, Operands, gather, scale_rows};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Real, dispatch};
use crate::backend::cpu::view::{Outlet, Rows};
use candle_core::WithDType;

/// The gradients in the order of the arguments.
pub(in super::super) struct Gradients<E: Element> {
    /// Of `q`, `k` and `v`, `[B, T, groups, width]` each.
    pub(in super::super) sequences: [Vec<E>; 3],
    /// `[H]` or `[B, T, H]`
    pub(in super::super) log_decay: Vec<E::Real>,
    /// `[B, H, K, V]`
    pub(in super::super) initial: Vec<E::Real>,
}

/// What one task leaves beside the sequences' gradients.
struct Left<T> {
    initial: Vec<T>,
    /// The gradients of the decays' logarithms at its tokens: the tokens' own, and what belongs to all before.
    decays: Vec<f64>,
}

impl<E: Element> Operands<'_, E> {
    /// `d_o` `[B, T, H, V]` and `d_state` `[B, H, K, V]`, zero if `None`.
    pub(in super::super) fn backward(
        &self,
        chunk: usize,
        d_o: Option<Rows<E>>,
        d_state: Option<&[E::Real]>,
    ) -> Gradients<E> {
        let sizes = &self.sizes;
        let widths = [sizes.key, sizes.key, sizes.value];
        let mut wide: [Vec<E::Real>; 3] = Default::default();
        let per_head = sizes.batch * sizes.length * sizes.heads;
        let [q, k, v] = &mut wide;
        // per head and in the arithmetic's type; padding has no gradient
        let outlets = [
            Outlet::fresh_or_zeroed(q, per_head * widths[0], self.padded),
            Outlet::fresh_or_zeroed(k, per_head * widths[1], self.padded),
            Outlet::fresh_or_zeroed(v, per_head * widths[2], self.padded),
        ];
        let tasks = self.tasks(chunk);
        let befores = self.states_before(&tasks, chunk);
        let behinds = self.gradients_behind(&tasks, chunk, d_o, d_state);
        let work: Vec<_> = tasks.iter().zip(befores).zip(behinds).collect();
        let left = parallel::map(&work, 4 * self.work(), |((task, before), behind)| {
            let mut walk = Walk::new(self, task, chunk, d_o, &outlets);
            let last = walk.forward(before.clone());
            walk.backward(behind.clone(), &last, task.tokens.end == sizes.length)
        });
        for (i, wide) in wide.iter_mut().enumerate() {
            // SAFETY: the tasks wrote every token of a sequence, and zeros were there before if there are others.
            unsafe { wide.set_len(per_head * widths[i]) };
        }
        let (log_decay, initial) = self.gather_left(&tasks, left);
        let [q, k, v] = wide;
        let sequences = [q, k, v].into_iter().enumerate();
        let sequences = sequences.map(|(i, wide)| self.grouped(i, widths[i], wide)).collect::<Vec<_>>();
        let [q, k, v] = <[Vec<E>; 3]>::try_from(sequences).unwrap_or_default();
        Gradients { sequences: [q, k, v], log_decay, initial }
    }

    /// The gradient of the state behind each task, as the states before them are found.
    fn gradients_behind(
        &self,
        tasks: &[Task],
        chunk: usize,
        d_o: Option<Rows<E>>,
        d_state: Option<&[E::Real]>,
    ) -> Vec<Vec<E::Real>> {
        let size = self.state_size();
        let alone = parallel::map(tasks, self.work(), |task| {
            let d_o = d_o.filter(|_| task.tokens.start > 0);
            let mut gradient = vec![E::Real::ZERO; size];
            let mut decay = Some(0.0);
            let (mut q, mut dy) = (vec![], vec![]);
            for chunk in self.chunks(task.row, task.head, &task.tokens, chunk).iter().rev() {
                decay = decay.filter(|_| !chunk.fresh).map(|decay| decay + chunk.total());
                if task.tokens.start == 0 {
                    continue;
                }
                match d_o {
                    Some(d_o) => {
                        self.gather(0, task.row, task.head, &chunk.tokens, &mut q);
                        gather(&mut dy, chunk.tokens.clone().map(|t| d_o.row([task.row, t, task.head])));
                        self.carry_back(chunk, &mut gradient, &mut q, &dy);
                    }
                    None => self.forget_back(chunk, &mut gradient),
                }
            }
            (gradient, decay)
        });
        let mut behinds = vec![vec![]; tasks.len()];
        let mut behind = vec![];
        for (i, (task, (gradient, decay))) in tasks.iter().zip(alone).enumerate().rev() {
            if task.tokens.end == self.sizes.length {
                let start = (task.row * self.sizes.heads + task.head) * size;
                behind = d_state.map_or(vec![E::Real::ZERO; size], |d| d[start..start + size].to_vec());
            }
            behinds[i] = behind.clone();
            let factor = decay.map(|decay: f64| E::Real::from_f64(decay.exp()));
            join(&mut behind, &gradient, factor);
        }
        behinds
    }

    /// Takes the gradient of the state in front of a chunk; scales its queries.
    fn carry_back(&self, chunk: &Chunk, gradient: &mut [E::Real], q: &mut [E::Real], dy: &[E::Real]) {
        let (n, key, value) = (chunk.sums.len(), self.sizes.key, self.sizes.value);
        if chunk.fresh {
            return gradient.fill(E::Real::ZERO);
        }
        scale_rows(q, key, &chunk.reach(self.scale));
        let keep = Some(E::Real::from_f64(chunk.total().exp()));
        product(rows(q, n, key).transposed(), rows(dy, n, value), gradient, keep);
    }

    /// The same without outputs' gradients.
    fn forget_back(&self, chunk: &Chunk, gradient: &mut [E::Real]) {
        let keep = if chunk.fresh { E::Real::ZERO } else { E::Real::from_f64(chunk.total().exp()) };
        gradient.iter_mut().for_each(|g| *g = *g * keep);
    }

    /// `[B, T, H, width]` summed over the heads that share a group, and rounded.
    fn grouped(&self, which: usize, width: usize, wide: Vec<E::Real>) -> Vec<E> {
        let groups = self.sizes.groups[which];
        let shared = self.sizes.heads / groups;
        let mut narrow: Vec<E> = Vec::new();
        let outlet = Outlet::fresh(&mut narrow, wide.len() / shared);
        let pieces = parallel::pieces(wide.len() / (shared * width), (1usize << 14).div_ceil(width));
        parallel::map(&pieces, wide.len(), |piece| {
            let mut sum = vec![E::Real::ZERO; width];
            for i in piece.clone() {
                let mut heads = wide[i * shared * width..(i + 1) * shared * width].chunks(width);
                sum.copy_from_slice(heads.next().unwrap_or(&[]));
                for head in heads {
                    sum.iter_mut().zip(head).for_each(|(sum, &x)| *sum += x);
                }
                dispatch(Narrow(&sum, outlet.at(i * width, width)));
            }
        });
        // SAFETY: the pieces wrote all rows.
        unsafe { narrow.set_len(wide.len() / shared) };
        narrow
    }

    /// The gradients of decays and initial states, from what the tasks left.
    fn gather_left(&self, tasks: &[Task], left: Vec<Left<E::Real>>) -> (Vec<E::Real>, Vec<E::Real>) {
        let sizes = &self.sizes;
        let per_token = matches!(self.decays, Decays::Token(_));
        let mut decays =
            vec![0.0; if per_token { sizes.batch * sizes.length * sizes.heads } else { sizes.heads }];
        let mut initial = vec![E::Real::ZERO; self.states_size()];
        // the sum from later tasks of the same row and head
        let mut later = 0.0;
        for (task, left) in tasks.iter().zip(left).rev() {
            if task.tokens.end == sizes.length {
                later = 0.0;
            }
            let mut sum = later;
            for (t, own) in task.tokens.clone().zip(&left.decays).rev() {
                sum += own;
                let log = self.log_decay(task.row, t, task.head);
                let (begins, padding) = self.standing(task.row, t);
                let gradient = if begins || padding || log == f64::NEG_INFINITY { 0.0 } else { sum };
                let place = if per_token {
                    (task.row * sizes.length + t) * sizes.heads + task.head
                } else {
                    task.head
                };
                decays[place] += gradient;
                if begins || (log == f64::NEG_INFINITY && !padding) {
                    sum = 0.0;
                }
            }
            later = sum;
            if task.tokens.start == 0 {
                let start = (task.row * sizes.heads + task.head) * self.state_size();
                initial[start..start + self.state_size()].copy_from_slice(&left.initial);
            }
        }
        (decays.into_iter().map(E::Real::from_f64).collect(), initial)
    }

    /// Whether a sequence begins afresh at a token, and whether the token is padding.
    fn standing(&self, row: usize, t: usize) -> (bool, bool) {
        let runs = self.segments.row(row);
        let next = runs.partition_point(|run| run.tokens.end <= t);
        match runs.get(next) {
            Some(run) if run.tokens.contains(&t) => (run.fresh && run.tokens.start == t, false),
            _ => (false, true),
        }
    }
}

/// The two walks of one task.
struct Walk<'a, E: Element> {
    operands: &'a Operands<'a, E>,
    task: &'a Task,
    chunks: Vec<Chunk>,
    mask: Mask<E::Real>,
    d_o: Option<Rows<'a, E>>,
    outlets: &'a [Outlet<'a, E::Real>; 3],
    scratch: Scratch<E::Real>,
    /// Gradients of the outputs and of the sequences of a chunk, products of `do` and `v`.
    dy: Vec<E::Real>,
    dq: Vec<E::Real>,
    dk: Vec<E::Real>,
    dv: Vec<E::Real>,
    second: Vec<E::Real>,
}

impl<'a, E: Element> Walk<'a, E> {
    fn new(
        operands: &'a Operands<'a, E>,
        task: &'a Task,
        chunk: usize,
        d_o: Option<Rows<'a, E>>,
        outlets: &'a [Outlet<'a, E::Real>; 3],
    ) -> Self {
        let chunks = operands.chunks(task.row, task.head, &task.tokens, chunk);
        let mask = Mask::new(operands, task.head, chunk);
        let scratch = Scratch::default();
        let [dy, dq, dk, dv, second] = Default::default();
        Self { operands, task, chunks, mask, d_o, outlets, scratch, dy, dq, dk, dv, second }
    }

    /// Reads the outputs' gradients of a chunk.
    fn load_dy(&mut self, chunk: &Chunk) {
        let Self { d_o, task, dy, .. } = self;
        match d_o {
            Some(d_o) => gather(dy, chunk.tokens.clone().map(|t| d_o.row([task.row, t, task.head]))),
            None => {
                dy.clear();
                dy.resize(chunk.sums.len() * self.operands.sizes.value, E::Real::ZERO);
            }
        }
    }

    /// Where the gradient of one token's queries (0), keys (1) or values (2) goes.
    fn place(&self, which: usize, t: usize, width: usize) -> *mut E::Real {
        let sizes = &self.operands.sizes;
        self.outlets[which]
            .at(((self.task.row * sizes.length + t) * sizes.heads + self.task.head) * width, width)
    }

    /// The queries' gradients through the state; returns the state behind the task.
    fn forward(&mut self, mut state: Vec<E::Real>) -> Vec<E::Real> {
        let (key, value) = (self.operands.sizes.key, self.operands.sizes.value);
        let chunks = std::mem::take(&mut self.chunks);
        for chunk in &chunks {
            let n = chunk.sums.len();
            self.load_dy(chunk);
            self.dq.clear();
            self.dq.resize(n * key, E::Real::ZERO);
            if !chunk.fresh {
                product(rows(&self.dy, n, value), rows(&state, key, value).transposed(), &mut self.dq, None);
                scale_rows(&mut self.dq, key, &chunk.reach(self.operands.scale));
            }
            for (t, row) in chunk.tokens.clone().zip(self.dq.chunks(key)) {
                dispatch(Narrow(row, self.place(0, t, key)));
            }
            self.operands.load(self.task, chunk, &mut self.scratch);
            self.operands.carry(chunk, &mut state, &mut self.scratch);
        }
        self.chunks = chunks;
        state
    }

    /// All else, from the gradient of the state behind the task.
    fn backward(&mut self, mut gradient: Vec<E::Real>, state: &[E::Real], ends: bool) -> Left<E::Real> {
        let (operands, task) = (self.operands, self.task);
        let (key, value) = (operands.sizes.key, operands.sizes.value);
        let mut decays = vec![0.0; task.tokens.len()];
        if let (true, Some(last)) = (ends, self.chunks.last()) {
            decays[last.tokens.end - 1 - task.tokens.start] += dot(state, &gradient);
        }
        let chunks = std::mem::take(&mut self.chunks);
        for chunk in chunks.iter().rev() {
            let n = chunk.sums.len();
            self.load_dy(chunk);
            operands.gather(0, task.row, task.head, &chunk.tokens, &mut self.scratch.q);
            operands.load(task, chunk, &mut self.scratch);
            self.dk.resize(n * key, E::Real::ZERO);
            self.dv.resize(n * value, E::Real::ZERO);
            let (k, v) = (rows(&self.scratch.k, n, key), rows(&self.scratch.v, n, value));
            let g = rows(&gradient, key, value);
            let left = chunk.left();
            product(k, g, &mut self.dv, None);
            scale_rows(&mut self.dv, value, &left);
            product(v, g.transposed(), &mut self.dk, None);
            scale_rows(&mut self.dk, key, &left);
            self.dq.clear();
            for t in chunk.tokens.clone() {
                // SAFETY: `key` numbers that the forward walk of this task wrote, which no other task touches.
                let written = unsafe { std::slice::from_raw_parts(self.place(0, t, key), key) };
                self.dq.extend_from_slice(written);
            }
            self.inside(chunk);
            for (i, t) in chunk.tokens.clone().enumerate() {
                decays[t - task.tokens.start] += dot(row(&self.scratch.q, i, key), row(&self.dq, i, key))
                    - dot(row(&self.scratch.k, i, key), row(&self.dk, i, key));
                dispatch(Narrow(row(&self.dq, i, key), self.place(0, t, key)));
                dispatch(Narrow(row(&self.dk, i, key), self.place(1, t, key)));
                dispatch(Narrow(row(&self.dv, i, value), self.place(2, t, value)));
            }
            operands.carry_back(chunk, &mut gradient, &mut self.scratch.q, &self.dy);
        }
        Left { initial: gradient, decays }
    }

    /// The pairs of tokens inside a chunk, in blocks of rows.
    fn inside(&mut self, chunk: &Chunk) {
        let (n, key, value) = (chunk.sums.len(), self.operands.sizes.key, self.operands.sizes.value);
        let Self { scratch: Scratch { q, k, v, block, .. }, dy, dq, dk, dv, second, mask, .. } = self;
        let (q, k, v, dy) = (rows(q, n, key), rows(k, n, key), rows(v, n, value), rows(dy, n, value));
        let one = Some(E::Real::ONE);
        for start in (0..n).step_by(ROWS) {
            let end = n.min(start + ROWS);
            let (count, size) = (end - start, (end - start) * end);
            block.resize(size, E::Real::ZERO);
            second.resize(size, E::Real::ZERO);
            let (q, dy) = (q.part([start, 0], [count, key]), dy.part([start, 0], [count, value]));
            let (k, v) = (k.part([0, 0], [end, key]), v.part([0, 0], [end, value]));
            product(q, k.transposed(), block, None);
            mask.apply(chunk, start..end, &mut block[..size]);
            product(rows(block, count, end).transposed(), dy, &mut dv[..end * value], one);
            product(dy, v.transposed(), second, None);
            mask.apply(chunk, start..end, &mut second[..size]);
            let second = rows(second, count, end);
            product(second, k, &mut dq[start * key..end * key], one);
            product(second.transposed(), q, &mut dk[..end * key], one);
        }
    }
}

/// Row `i` of `[.., width]`.
fn row<T>(x: &[T], i: usize, width: usize) -> &[T] {
    &x[i * width..(i + 1) * width]
}

/// `sum x y`, in f64.
fn dot<T: Real>(x: &[T], y: &[T]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x.to_f64() * y.to_f64()).sum()
}
