//! The chunkwise form: the products inside each chunk, and the state between them.

use super::super::plan::{ROWS, spans};
use super::product::{product, rows};
use super::{Chunk, Mask, Operands, scale_rows};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Outlet, lanes, load, store};
use candle_core::WithDType;
use std::ops::Range;

/// What a thread reuses from chunk to chunk: the sequences, the products of a block of rows, the output.
pub(super) struct Scratch<T> {
    pub(super) q: Vec<T>,
    pub(super) k: Vec<T>,
    pub(super) v: Vec<T>,
    pub(super) block: Vec<T>,
    pub(super) o: Vec<T>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self { q: vec![], k: vec![], v: vec![], block: vec![], o: vec![] }
    }
}

/// Part of the work: some tokens of one row and head.
pub(super) struct Task {
    pub(super) row: usize,
    pub(super) head: usize,
    pub(super) tokens: Range<usize>,
}

impl<E: Element> Operands<'_, E> {
    /// The output `[B, T, H, V]` and the final state `[B, H, K, V]`, in chunks of at most `chunk` tokens.
    pub(in super::super) fn forward(&self, chunk: usize) -> (Vec<E>, Vec<E::Real>) {
        let (mut o, mut state) = (Vec::<E>::new(), Vec::<E::Real>::new());
        let outputs = self.sizes.batch * self.sizes.length * self.sizes.heads * self.sizes.value;
        let outlet = Outlet::fresh_or_zeroed(&mut o, outputs, self.padded);
        let states = Outlet::fresh(&mut state, self.states_size());
        let tasks = self.tasks(chunk);
        let befores = self.states_before(&tasks, chunk);
        let work: Vec<_> = tasks.iter().zip(befores).collect();
        parallel::map(&work, self.work(), |(task, before)| {
            let mut state = before.clone();
            let mut scratch = Scratch::default();
            let mask = Mask::new(self, task.head, chunk);
            for chunk in self.chunks(task.row, task.head, &task.tokens, chunk) {
                self.gather(0, task.row, task.head, &chunk.tokens, &mut scratch.q);
                self.load(task, &chunk, &mut scratch);
                self.outputs(&chunk, &mask, &state, &mut scratch);
                for (t, row) in chunk.tokens.clone().zip(scratch.o.chunks(self.sizes.value)) {
                    let place = (task.row * self.sizes.length + t) * self.sizes.heads + task.head;
                    dispatch(Narrow(row, outlet.at(place * self.sizes.value, self.sizes.value)));
                }
                self.carry(&chunk, &mut state, &mut scratch);
            }
            if task.tokens.end == self.sizes.length {
                let place = (task.row * self.sizes.heads + task.head) * state.len();
                // SAFETY: the place of this row and head, whose last task is this one.
                unsafe {
                    states.at(place, state.len()).copy_from_nonoverlapping(state.as_ptr(), state.len())
                };
            }
        });
        // SAFETY: the tasks wrote every token, or zeros were there before, and every row's and head's final state.
        unsafe {
            o.set_len(outputs);
            state.set_len(self.states_size());
        }
        (o, state)
    }

    /// All rows and heads, and where those are few, spans of time.
    pub(super) fn tasks(&self, chunk: usize) -> Vec<Task> {
        let spans = spans(&self.sizes, chunk);
        let size = self.sizes.length.div_ceil(spans).next_multiple_of(chunk).max(1);
        let cuts = parallel::pieces(self.sizes.length.max(1), size);
        let mut tasks = vec![];
        for row in 0..self.sizes.batch {
            for head in 0..self.sizes.heads {
                let span = |tokens: &Range<usize>| Task {
                    row,
                    head,
                    tokens: tokens.start..tokens.end.min(self.sizes.length),
                };
                tasks.extend(cuts.iter().map(span));
            }
        }
        tasks
    }

    /// Numbers computed, about.
    pub(super) fn work(&self) -> usize {
        self.sizes.length * self.states_size()
    }

    /// The state before each task: the initial one, or where time is cut, what the spans before leave, each computed
    /// from nothing and then joined in order.
    pub(super) fn states_before(&self, tasks: &[Task], chunk: usize) -> Vec<Vec<E::Real>> {
        let alone = parallel::map(tasks, self.work(), |task| {
            if task.tokens.end == self.sizes.length {
                return None;
            }
            let mut state = vec![E::Real::ZERO; self.state_size()];
            let mut scratch = Scratch::default();
            let mut decay = Some(0.0);
            for chunk in self.chunks(task.row, task.head, &task.tokens, chunk) {
                self.load(task, &chunk, &mut scratch);
                self.carry(&chunk, &mut state, &mut scratch);
                decay = decay.filter(|_| !chunk.fresh).map(|decay| decay + chunk.total());
            }
            Some((state, decay))
        });
        let mut befores = Vec::with_capacity(tasks.len());
        let mut before = vec![];
        for (task, alone) in tasks.iter().zip(alone) {
            if task.tokens.start == 0 {
                before = self.initial(task.row, task.head);
            }
            befores.push(before.clone());
            if let Some((state, decay)) = alone {
                // the decay is none where something in the span forgot all before it
                let factor = decay.map_or(E::Real::ZERO, |decay: f64| E::Real::from_f64(decay.exp()));
                join(&mut before, &state, decay.is_some().then_some(factor));
            }
        }
        befores
    }

    /// Copies keys and values of a chunk.
    pub(super) fn load(&self, task: &Task, chunk: &Chunk, scratch: &mut Scratch<E::Real>) {
        self.gather(1, task.row, task.head, &chunk.tokens, &mut scratch.k);
        self.gather(2, task.row, task.head, &chunk.tokens, &mut scratch.v);
    }

    /// The outputs of a chunk whose sequences are in `scratch`, from the state before it.
    fn outputs(
        &self,
        chunk: &Chunk,
        mask: &Mask<E::Real>,
        state: &[E::Real],
        scratch: &mut Scratch<E::Real>,
    ) {
        let (n, key, value) = (chunk.sums.len(), self.sizes.key, self.sizes.value);
        let Scratch { q, k, v, block, o } = scratch;
        o.resize(n * value, E::Real::ZERO);
        let (q, k, v) = (rows(q, n, key), rows(k, n, key), rows(v, n, value));
        if !chunk.fresh {
            product(q, rows(state, key, value), o, None);
            scale_rows(o, value, &chunk.reach(self.scale));
        }
        for start in (0..n).step_by(ROWS) {
            let end = n.min(start + ROWS);
            block.resize((end - start) * end, E::Real::ZERO);
            product(
                q.part([start, 0], [end - start, key]),
                k.part([0, 0], [end, key]).transposed(),
                block,
                None,
            );
            mask.apply(chunk, start..end, block);
            let keep = (!chunk.fresh).then_some(E::Real::ONE);
            let o = &mut o[start * value..end * value];
            product(rows(block, end - start, end), v.part([0, 0], [end, value]), o, keep);
        }
    }

    /// Takes the state behind a chunk; scales its keys in `scratch`.
    pub(super) fn carry(&self, chunk: &Chunk, state: &mut [E::Real], scratch: &mut Scratch<E::Real>) {
        let (n, key, value) = (chunk.sums.len(), self.sizes.key, self.sizes.value);
        scale_rows(&mut scratch.k, key, &chunk.left());
        let keep = (!chunk.fresh).then(|| E::Real::from_f64(chunk.total().exp()));
        product(rows(&scratch.k, n, key).transposed(), rows(&scratch.v, n, value), state, keep);
    }
}

/// `before = factor before + state`, or with no factor `state`.
pub(super) fn join<T: Real>(before: &mut [T], state: &[T], factor: Option<T>) {
    match factor {
        Some(factor) => {
            before.iter_mut().zip(state).for_each(|(before, &state)| *before = factor * *before + state)
        }
        None => before.copy_from_slice(state),
    }
}

/// Rounds to as many places.
pub(super) struct Narrow<'a, E: Element>(pub(super) &'a [E::Real], pub(super) *mut E);

impl<T: Real, E: Element<Real = T>> Kernel<T> for Narrow<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for (c, n) in lanes(s, 0..self.0.len()) {
            // SAFETY: the maker vouches for the places.
            unsafe { store(s, self.1.add(c), n, load(s, self.0, c, n)) };
        }
    }
}
