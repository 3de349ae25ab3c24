//! What the backward pass holds while it goes through a piece: copies of the arguments as products want them.

use super::Operands;
use super::decay::Weights;
use crate::backend::cpu::padded::Padded;
use crate::backend::cpu::product::Product;
use crate::backend::cpu::simd::{Real, Simd};
use crate::ops::retention::plan::Piece;

/// The gradient of the state, `[K, V]` and turned.
pub(super) struct Gradient<T> {
    pub(super) rows: Padded<T>,
    pub(super) turned: Padded<T>,
}

impl<T: Real> Gradient<T> {
    /// Zero where none is given.
    #[inline(always)]
    pub(super) fn new<S: Simd<T>>(s: S, operands: &Operands<T>, given: Option<&[T]>) -> Self {
        let (keys, values) = (operands.sizes.keys, operands.sizes.values);
        let mut gradient = Self { rows: Padded::zeros(keys, values), turned: Padded::zeros(values, keys) };
        if let Some(given) = given {
            gradient.rows.fill(s, operands.square(given), |_| T::ONE);
            gradient.turn(s);
        }
        gradient
    }

    #[inline(always)]
    pub(super) fn turn<S: Simd<T>>(&mut self, s: S) {
        self.turned.fill_transposed(s, self.rows.whole());
    }
}

/// What a piece needs for a while.
pub(super) struct Scratch<T> {
    /// Keys and values of the piece; the keys weighted by what is left of them at its end.
    pub(super) k: Padded<T>,
    pub(super) v: Padded<T>,
    pub(super) late_k: Padded<T>,
    /// Keys and values by tokens.
    pub(super) turned_k: Padded<T>,
    pub(super) turned_v: Padded<T>,
    /// Queries; weighted by what is left before them of the state before; and `scale do`.
    pub(super) q: Padded<T>,
    pub(super) early_q: Padded<T>,
    pub(super) outputs: Padded<T>,
    /// `A` and `P`.
    pub(super) scores: Padded<T>,
    pub(super) slopes: Padded<T>,
    pub(super) decays: Vec<T>,
    /// What goes through a state of the gradients of q or k, where the decays want to know it.
    pub(super) along: Padded<T>,
    /// The gradients of the decays.
    pub(super) decay: Vec<T>,
    /// Paths from the state before to each token, and from each token to the state after.
    pub(super) before: Vec<T>,
    pub(super) after: Vec<T>,
    /// The piece that comes next, and of which row and head.
    pub(super) next: Option<([usize; 2], Piece)>,
}

impl<T: Real> Scratch<T> {
    pub(super) fn new(longest: usize, keys: usize, values: usize) -> Self {
        let zeros = |n| vec![T::ZERO; n];
        let [by_key, by_value] = [keys, values].map(|width| move || Padded::zeros(longest, width));
        let square = || Padded::zeros(longest, longest);
        Self {
            k: by_key(),
            v: by_value(),
            late_k: by_key(),
            turned_k: Padded::zeros(keys, longest),
            turned_v: Padded::zeros(values, longest),
            q: by_key(),
            early_q: by_key(),
            outputs: by_value(),
            scores: square(),
            slopes: square(),
            decays: zeros(longest),
            along: by_key(),
            decay: zeros(longest),
            before: zeros(longest),
            after: zeros(longest),
            next: None,
        }
    }

    /// Copies queries, keys and values of a piece.
    #[inline(always)]
    pub(super) fn take_up<S: Simd<T>>(
        &mut self,
        s: S,
        operands: &Operands<T>,
        task: [usize; 2],
        piece: &Piece,
    ) {
        let [q, k, v] = operands.matrices(task, &piece.tokens);
        self.q.fill(s, q, |_| T::ONE);
        self.k.fill(s, k, |_| T::ONE);
        self.v.fill(s, v, |_| T::ONE);
        self.turned_k.fill_transposed(s, k);
        self.turned_v.fill_transposed(s, v);
    }

    /// Copies what the state after a piece takes of it.
    #[inline(always)]
    pub(super) fn take_ends<S: Simd<T>>(
        &mut self,
        s: S,
        operands: &Operands<T>,
        task: [usize; 2],
        piece: &Piece,
        weights: &Weights<T>,
    ) {
        let [_, k, v] = operands.matrices(task, &piece.tokens);
        self.late_k.fill(s, k, |i| weights.to_end[i]);
        self.v.fill(s, v, |_| T::ONE);
    }

    /// From the turned state before the piece to that after it.
    #[inline(always)]
    pub(super) fn advance(
        &self,
        operands: &Operands<T>,
        piece: &Piece,
        whole: T,
        before: &mut Padded<T>,
        after: &mut Padded<T>,
    ) {
        let length = piece.tokens.len();
        let v = self.v.matrix(length).transposed();
        let product = Product::new(v, self.late_k.right(0..length, operands.sizes.keys));
        let plus = (!piece.fresh).then_some((before.target(), whole));
        // SAFETY: both states are [V, K].
        unsafe { product.plus(plus).write(operands.isa, after.target()) };
    }
}
