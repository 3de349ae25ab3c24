//! A single head of a single row: its time cut into stretches that several threads take.
//!
//! What a stretch does to the state before it is known without that state: it multiplies it by all its decays and adds
//! what its own tokens leave, `S[p+1] = total[p] S[p] + end[p]`. So every stretch is walked from an empty state first, for
//! its end alone; the states before the stretches follow one from another; then each is walked from its own. Gradients of
//! states go the same way back. The price is the first walk: about a third of the work again forward, less backward.
//!
//! The cuts depend on the shape of a call alone, so that results do not depend on the number of threads.

use super::backward::Given;
use super::decay::Weights;
use super::forward::end_of;
use super::{Operands, Stretch};
use crate::backend::cpu::padded::Padded;
use crate::backend::cpu::parallel;
use crate::backend::cpu::product::Product;
use crate::backend::cpu::simd::{Kernel, Real, Simd};

impl<T: Real> Operands<'_, T> {
    /// The states before stretches, but for those that begin a head.
    pub(super) fn before(&self, stretches: &[Stretch]) -> Vec<Option<Vec<T>>> {
        let ends = self.walk_alone(stretches, |stretch| !stretch.last, |s| end_of(self, s));
        let mut before: Vec<Option<Vec<T>>> = vec![];
        for (i, stretch) in stretches.iter().enumerate() {
            before.push(match i.checked_sub(1).filter(|_| !stretch.first) {
                None => None,
                Some(i) => {
                    let start = match &before[i] {
                        Some(state) => Some(state.as_slice()),
                        None => self.initial(stretch.task),
                    };
                    self.through(&stretches[i], start, ends[i].clone())
                }
            });
        }
        before
    }

    /// The gradients of the states after stretches, but for those that end a head.
    pub(super) fn after(&self, stretches: &[Stretch], given: &Given<T>) -> Vec<Option<Vec<T>>> {
        let starts = self.walk_alone(stretches, |stretch| !stretch.first, |s| back_through(self, s, given));
        let mut after: Vec<Option<Vec<T>>> = vec![];
        for (i, stretch) in stretches.iter().enumerate().rev() {
            let next = stretches.get(i + 1).filter(|_| !stretch.last);
            let gradient = next.and_then(|next| {
                let end = match after.last() {
                    Some(Some(gradient)) => Some(gradient.as_slice()),
                    _ => self.given_state(given, stretch.task),
                };
                self.through(next, end, starts[i + 1].clone())
            });
            after.push(gradient);
        }
        after.reverse();
        after
    }

    /// What is found for the stretches that are wanted.
    fn walk_alone(
        &self,
        stretches: &[Stretch],
        wanted: impl Fn(&Stretch) -> bool + Sync,
        walk: impl Fn(&Stretch) -> Vec<T> + Sync + Send,
    ) -> Vec<Option<Vec<T>>> {
        let alone = |stretch: &Stretch| stretch.first && stretch.last;
        if stretches.iter().all(alone) {
            return stretches.iter().map(|_| None).collect();
        }
        parallel::map(stretches, self.work(), |stretch| {
            (wanted(stretch) && !alone(stretch)).then(|| walk(stretch))
        })
    }

    /// `total state + added`, for the decays of a stretch.
    fn through(&self, stretch: &Stretch, state: Option<&[T]>, added: Option<Vec<T>>) -> Option<Vec<T>> {
        let mut sum = added?;
        // nothing gets through a fresh piece
        if let Some(state) = state
            && !stretch.pieces.iter().any(|piece| piece.fresh)
        {
            let total = T::dispatch_on(self.isa, Total { operands: self, stretch });
            for (sum, state) in sum.iter_mut().zip(state) {
                *sum += total * *state;
            }
        }
        Some(sum)
    }
}

/// The product of all decays of a stretch.
struct Total<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    stretch: &'a Stretch,
}

impl<T: Real> Kernel<T> for Total<'_, T> {
    type Output = T;

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> T {
        let Self { operands, stretch } = self;
        let longest = stretch.longest();
        let mut weights = Weights::new(s, &operands.decays, stretch.task[1], longest);
        let mut total = 1.0;
        for piece in &stretch.pieces {
            weights.set(s, &operands.decays, stretch.task, piece);
            total *= weights.whole.to_f64();
        }
        T::from_f64(total)
    }
}

/// The gradient of the state before a stretch, where that of the state after it is zero.
fn back_through<T: Real>(operands: &Operands<T>, stretch: &Stretch, given: &Given<T>) -> Vec<T> {
    T::dispatch_on(operands.isa, Through { operands, stretch, given })
}

struct Through<'a, T: Real> {
    operands: &'a Operands<'a, T>,
    stretch: &'a Stretch,
    given: &'a Given<'a, T>,
}

impl<T: Real> Kernel<T> for Through<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> Vec<T> {
        let Stretch { task, ref pieces, .. } = *self.stretch;
        let p = self.operands;
        let longest = self.stretch.longest();
        let mut weights = Weights::new(s, &p.decays, task[1], longest);
        let mut gradient = Padded::zeros(p.sizes.keys, p.sizes.values);
        let mut outputs = Padded::zeros(longest, p.sizes.values);
        let mut early_q = Padded::zeros(longest, p.sizes.keys);
        for piece in pieces.iter().rev() {
            if piece.fresh {
                gradient.clear();
                continue;
            }
            weights.set(s, &p.decays, task, piece);
            let [q, ..] = p.matrices(task, &piece.tokens);
            early_q.fill(s, q, |i| weights.from_start[i]);
            p.outputs(s, self.given, task, &piece.tokens, &mut outputs);
            let (length, to) = (piece.tokens.len(), gradient.target());
            let q = early_q.matrix(length).transposed();
            let product = Product::new(q, outputs.right(0..length, p.sizes.values));
            // SAFETY: the gradient is [K, V].
            unsafe { product.plus(Some((to, weights.whole))).write(p.isa, to) };
        }
        let mut start = vec![];
        gradient.append_to(&mut start);
        start
    }
}
