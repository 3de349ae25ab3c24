//! The backward pass: groups of chunks from the end, each from the state kept before it.
//!
//! A chunk is linear in its inputs, its state and its tables. The gradients of inputs and state are the transposed
//! chunk ([`super::Way::Backward`]); those of the tables are summed over all chunks, and the chain rule from tables to
//! poles and residues is applied once, in f64.

use super::super::Sizes;
use super::super::plan::{CHUNK, Chunk, GROUP};
use super::forward::{Piece, Scan};
use super::tables::Parameters;
use super::{Way, chunk, from_blocks, gather};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Outlet, Rows, store};

/// The gradients of every argument, in its own layout.
pub(in super::super) struct Gradients<E: Element> {
    pub(in super::super) u: Vec<E>,
    pub(in super::super) poles: Vec<f64>,
    pub(in super::super) residues: Vec<f64>,
    pub(in super::super) d: Vec<f64>,
    pub(in super::super) initial: Vec<f64>,
}

/// Gradients of the tables of a tile: as [`super::tables::Block`] has them, block after block.
struct Sums<T> {
    kernel: Vec<T>,
    out: Vec<T>,
    into: Vec<T>,
    /// Of the powers that move states on, by the count of the chunk: `[T + 1, C, LANES]` a block.
    powers: Vec<f64>,
    /// Of the state before the first token.
    state: Vec<f64>,
}

impl<E: Element> Scan<'_, E> {
    /// From the gradients of the output (`[B, L, D]`) and of the final state (`[B, D, C]`).
    pub(in super::super) fn backward(
        &self,
        parameters: &Parameters,
        kept: &[Vec<f64>],
        dy: Option<Rows<E>>,
        dstate: Option<&[f64]>,
    ) -> Gradients<E> {
        let Sizes { batch, length, channels, .. } = self.sizes;
        let (components, lanes) = (self.sizes.components(), self.tables.lanes());
        let elements = batch * length * channels;
        let dstate = self.blocks(dstate);
        let pieces: Vec<(Piece, &Vec<f64>)> = self.pieces().into_iter().zip(kept).collect();
        let mut u = Vec::new();
        let outlet = Outlet::fresh_or_zeroed(&mut u, elements, self.padded);
        let sums = parallel::map(&pieces, elements * components, |(piece, kept)| {
            let state = self.part(piece, &dstate).to_vec();
            dispatch(Back { scan: self, piece, state, kept, dy: dy.as_ref(), du: &outlet })
        });
        // SAFETY: padding was zeroed, and the pieces wrote every other token.
        unsafe { u.set_len(elements) };
        let initial: Vec<f64> = sums.iter().flat_map(|sums| sums.state.iter().copied()).collect();
        // [D, width] of the sums over rows, which lie in blocks of [width, LANES]
        let tiles = (pieces.len() / batch.max(1)).max(1);
        let over_rows = |width: usize, of: &dyn Fn(&Sums<E::Real>) -> Vec<f64>| {
            let mut total = vec![0.0; channels.div_ceil(lanes) * lanes * width];
            let mut start = 0;
            for (i, sums) in sums.iter().enumerate() {
                start = if i % tiles == 0 { 0 } else { start };
                let values = of(sums);
                total[start..].iter_mut().zip(&values).for_each(|(total, x)| *total += x);
                start += values.len();
            }
            from_blocks::<f64>(&total, channels, width, lanes)
        };
        let widen = |x: &[E::Real]| x.iter().map(|x| candle_core::WithDType::to_f64(*x)).collect();
        let tables = TableGradients {
            kernel: over_rows(CHUNK, &|sums| widen(&sums.kernel)),
            out: over_rows(CHUNK * components, &|sums| widen(&sums.out)),
            into: over_rows(CHUNK * components, &|sums| widen(&sums.into)),
            powers: over_rows((CHUNK + 1) * components, &|sums| sums.powers.clone()),
        };
        let [poles, residues, d] = tables.chain(parameters, &self.sizes);
        let initial = from_blocks(&initial, channels, components, lanes);
        Gradients { u, poles, residues, d, initial }
    }
}

/// Goes back through a piece from the gradient of the state at its end.
struct Back<'a, E: Element> {
    scan: &'a Scan<'a, E>,
    piece: &'a Piece,
    state: Vec<f64>,
    kept: &'a [f64],
    dy: Option<&'a Rows<'a, E>>,
    du: &'a Outlet<'a, E>,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Back<'_, E> {
    type Output = Sums<T>;

    #[inline(always)]
    fn run<S: Simd<T>>(mut self, s: S) -> Sums<T> {
        let scan = self.scan;
        let size = scan.block_size();
        let blocks = self.piece.tile.len();
        let mut sums = Sums {
            kernel: vec![T::ZERO; blocks * CHUNK * S::LANES],
            out: vec![T::ZERO; blocks * CHUNK * size],
            into: vec![T::ZERO; blocks * CHUNK * size],
            powers: vec![0.0; blocks * (CHUNK + 1) * size],
            state: vec![],
        };
        // the states before the chunks of a group
        let mut states = vec![0.0; (GROUP + 1) * size];
        let mut scratch = vec![T::ZERO; size];
        let groups: Vec<&[Chunk]> = scan.chunks[self.piece.row].chunks(GROUP).collect();
        for (number, group) in groups.iter().enumerate().rev() {
            for i in 0..blocks {
                let start = (number * blocks + i) * size;
                states[..size].copy_from_slice(&self.kept[start..start + size]);
                self.replay(s, group, i, &mut states, &mut scratch);
                self.reverse(s, group, i, &states, &mut scratch, &mut sums);
            }
        }
        sums.state = self.state;
        sums
    }
}

impl<T: Real, E: Element<Real = T>> Back<'_, E> {
    /// Computes the states of a group once more, for block `i` of the tile.
    #[inline(always)]
    fn replay<S: Simd<T>>(&self, s: S, group: &[Chunk], i: usize, states: &mut [f64], scratch: &mut [T]) {
        let (scan, row, size) = (self.scan, self.piece.row, scratch.len());
        let index = self.piece.tile.start + i;
        let (block, channels) = (scan.tables.block(index), scan.channels(index));
        for (k, tokens) in group.iter().enumerate() {
            let (before, after) = states[k * size..(k + 2) * size].split_at_mut(size);
            if tokens.fresh {
                before.fill(0.0);
            }
            after.copy_from_slice(before);
            let x = gather(s, &scan.u, row, tokens, Way::Forward, channels.clone());
            chunk(s, &block, Way::Forward, &x, tokens.count, after, scratch);
        }
    }

    /// Goes back through a group, for block `i` of the tile.
    #[inline(always)]
    fn reverse<S: Simd<T>>(
        &mut self,
        s: S,
        group: &[Chunk],
        i: usize,
        states: &[f64],
        scratch: &mut [T],
        sums: &mut Sums<T>,
    ) {
        let (scan, row, size) = (self.scan, self.piece.row, scratch.len());
        let Sizes { length, channels: width, complex, .. } = scan.sizes;
        let index = self.piece.tile.start + i;
        let (block, channels) = (scan.tables.block(index), scan.channels(index));
        let dstate = &mut self.state[i * size..(i + 1) * size];
        let table = |x: usize| i * CHUNK * x..(i + 1) * CHUNK * x;
        let kernel = &mut sums.kernel[table(S::LANES)];
        let (out, into) = (&mut sums.out[table(size)], &mut sums.into[table(size)]);
        let powers = &mut sums.powers[i * (CHUNK + 1) * size..(i + 1) * (CHUNK + 1) * size];
        let zero = [s.splat(T::ZERO); CHUNK];
        for (k, tokens) in group.iter().enumerate().rev() {
            let count = tokens.count;
            let before = &states[k * size..(k + 1) * size];
            let x = gather(s, &scan.u, row, tokens, Way::Forward, channels.clone());
            let dy = match self.dy {
                Some(dy) => gather(s, dy, row, tokens, Way::Backward, channels.clone()),
                None => zero,
            };
            lags(s, &x, &dy, count, kernel);
            outer(s, &dy, count, before, scratch, out);
            let mut reversed = zero;
            for (to, from) in reversed[..count].iter_mut().zip(x[..count].iter().rev()) {
                *to = *from;
            }
            // by exponent, which is how far the input lies from the last
            outer_into(s, &reversed, count, dstate, scratch, into);
            power_gradient(before, dstate, complex, S::LANES, &mut powers[count * size..(count + 1) * size]);
            let du = chunk(s, &block, Way::Backward, &dy, count, dstate, scratch);
            for (j, du) in du.into_iter().enumerate().take(count) {
                let at = (row * length + tokens.start + count - 1 - j) * width + channels.start;
                // SAFETY: `at` checked the place; no other piece has this token and these channels.
                unsafe { store(s, self.du.at(at, channels.len()), channels.len(), du) };
            }
            if tokens.fresh {
                dstate.fill(0.0);
            }
        }
    }
}

/// `sums[e] += sum_i dy[i] x[i - e]`; `dy` last token first.
#[inline(always)]
fn lags<T: Real, S: Simd<T>>(s: S, x: &[S::V; CHUNK], dy: &[S::V; CHUNK], count: usize, sums: &mut [T]) {
    for (e, sum) in sums.chunks_exact_mut(S::LANES).enumerate().take(count) {
        // SAFETY: the chunk holds LANES numbers.
        let mut total = unsafe { s.load(sum.as_ptr()) };
        for i in e..count {
            total = s.fma(dy[count - 1 - i], x[i - e], total);
        }
        // SAFETY: as above.
        unsafe { s.store(sum.as_mut_ptr(), total) };
    }
}

/// `sums[c, i] += dy[i] state[c]`; `dy` last token first.
#[inline(always)]
fn outer<T: Real, S: Simd<T>>(
    s: S,
    dy: &[S::V; CHUNK],
    count: usize,
    state: &[f64],
    scratch: &mut [T],
    sums: &mut [T],
) {
    let mut forward = *dy;
    forward[..count].reverse();
    outer_into(s, &forward, count, state, scratch, sums);
}

/// `sums[c, i] += x[i] state[c]`
#[inline(always)]
fn outer_into<T: Real, S: Simd<T>>(
    s: S,
    x: &[S::V; CHUNK],
    count: usize,
    state: &[f64],
    scratch: &mut [T],
    sums: &mut [T],
) {
    for (to, &from) in scratch.iter_mut().zip(state) {
        *to = T::from_f64(from);
    }
    let rows = sums.chunks_exact_mut(CHUNK * S::LANES).zip(scratch.chunks_exact(S::LANES));
    for (sums, h) in rows {
        // SAFETY: the chunk holds LANES numbers.
        let h = unsafe { s.load(h.as_ptr()) };
        for (sum, &x) in sums.chunks_exact_mut(S::LANES).zip(&x[..count]) {
            // SAFETY: the chunk holds LANES numbers.
            unsafe { s.store(sum.as_mut_ptr(), s.fma(x, h, s.load(sum.as_ptr()))) };
        }
    }
}

/// The gradient of the power that moved `before` on, given that of the state behind it.
#[inline(always)]
fn power_gradient(before: &[f64], dstate: &[f64], complex: bool, lanes: usize, sums: &mut [f64]) {
    if !complex {
        let terms = sums.iter_mut().zip(before.iter().zip(dstate));
        terms.for_each(|(sum, (h, l))| *sum += h * l);
        return;
    }
    let pairs = before.chunks_exact(2 * lanes).zip(dstate.chunks_exact(2 * lanes));
    for (sum, (h, l)) in sums.chunks_exact_mut(2 * lanes).zip(pairs) {
        for lane in 0..lanes {
            let (hr, hi, lr, li) = (h[lane], h[lane + lanes], l[lane], l[lane + lanes]);
            sum[lane] += lr * hr + li * hi;
            sum[lane + lanes] += li * hr - lr * hi;
        }
    }
}

/// Gradients of the tables, channel by channel: `[D, T]`, `[D, C, T]` twice, `[D, T + 1, C]`.
struct TableGradients {
    kernel: Vec<f64>,
    out: Vec<f64>,
    into: Vec<f64>,
    powers: Vec<f64>,
}

impl TableGradients {
    /// The gradients of poles, residues and `D`. Those of complex numbers are of the real and the imaginary part, for
    /// which `z = f(w)` gives `g_w = g_z conj(f'(w))`.
    fn chain(&self, parameters: &Parameters, sizes: &Sizes) -> [Vec<f64>; 3] {
        let components = sizes.components();
        let mut poles = vec![0.0; sizes.channels * components];
        let mut residues = poles.clone();
        let width = if sizes.complex { 2 } else { 1 };
        for place in (0..poles.len()).step_by(width) {
            let (channel, c) = (place / components, place % components);
            let pair =
                |x: &[f64], at: usize, step: usize| C(x[at], if sizes.complex { x[at + step] } else { 0.0 });
            let (p, r) = (pair(&parameters.poles, place, 1), pair(&parameters.residues, place, 1));
            let (mut dp, mut dr) = (C(0.0, 0.0), C(0.0, 0.0));
            // p^(n - 1) and p^n
            let (mut last, mut power) = (C(0.0, 0.0), C(1.0, 0.0));
            for n in 0..=CHUNK {
                let slope = C(n as f64 * last.0, n as f64 * last.1);
                let mut of_residue = C(0.0, 0.0);
                if n < CHUNK {
                    of_residue.0 += self.kernel[channel * CHUNK + n];
                    let into = pair(&self.into, (channel * components + c) * CHUNK + n, CHUNK);
                    dp = dp.plus(into.times_conj(slope));
                }
                if n > 0 {
                    let out = pair(&self.out, (channel * components + c) * CHUNK + n - 1, CHUNK);
                    of_residue = of_residue.plus(C(out.0, -out.1));
                }
                dr = dr.plus(of_residue.times_conj(power));
                dp = dp.plus(of_residue.times_conj(slope.times(r)));
                let moved = pair(&self.powers, (channel * (CHUNK + 1) + n) * components + c, 1);
                dp = dp.plus(moved.times_conj(slope));
                (last, power) = (power, power.times(p));
            }
            for (to, from) in [(&mut poles, dp), (&mut residues, dr)] {
                to[place] = from.0;
                if sizes.complex {
                    to[place + 1] = from.1;
                }
            }
        }
        let d = self.kernel.iter().step_by(CHUNK).copied().collect();
        [poles, residues, d]
    }
}

/// A complex number.
#[derive(Clone, Copy)]
struct C(f64, f64);

impl C {
    fn plus(self, other: C) -> C {
        C(self.0 + other.0, self.1 + other.1)
    }
    fn times(self, other: C) -> C {
        C(self.0 * other.0 - self.1 * other.1, self.0 * other.1 + self.1 * other.0)
    }
    fn times_conj(self, other: C) -> C {
        self.times(C(other.0, -other.1))
    }
}
