//! The forward pass on the CPU: SIMD over channels, the window of the last inputs in registers.
//!
//! A token of one channel takes `K` multiply-adds, and 25 operations more with SiLU; it is read once and written once.
//! The floor is the memory's: 2 elements moved per output (8 bytes in f32), which a plain copy moves too.
//! A tile of [`TILE`] tokens walks along the channels, so that memory is read in as many streams.

use super::plan::{self, Sequence, Task, Tile};
use super::{CausalConv1d, Sizes};
use crate::Result;
use crate::backend::cpu::math::silu;
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Outlet, Rows, load, storage, store, with_unit_stride};
use candle_core::{Shape, Storage, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// Tokens of a tile.
const TILE: usize = 8;

/// Filters with as many taps are compiled for that number; others take a general path.
macro_rules! with_taps {
    ($simd:ident, $taps:expr, $blank:ident => $body:expr) => {{
        let zero = $simd.splat(T::ZERO);
        with_taps!(@match $taps, zero, $blank, $body, 2 3 4 5 6 7 8)
    }};
    (@match $taps:expr, $zero:ident, $blank:ident, $body:expr, $($n:literal)+) => {
        match $taps {
            $($n => { let $blank = [$zero; $n]; $body })+
            taps => { let $blank = vec![$zero; taps]; $body }
        }
    };
}
pub(super) use with_taps;

/// Output and final state, for `x` on the CPU.
pub(super) fn forward(args: &CausalConv1d, sizes: Sizes) -> Result<[(Storage, Shape); 2]> {
    use candle_core::DType;
    match args.x.dtype() {
        DType::F32 => typed::<f32>(args, sizes),
        DType::F64 => typed::<f64>(args, sizes),
        DType::BF16 => typed::<bf16>(args, sizes),
        DType::F16 => typed::<f16>(args, sizes),
        other => Err(crate::Error::dtype("causal_conv1d: x", "f32, f64, bf16 or f16", other)),
    }
}

/// Weight, bias and initial state in the arithmetic's type, channels innermost.
pub(super) struct Parameters<T> {
    /// `[K, D]`
    pub(super) weight: Vec<T>,
    /// `[D]`
    pub(super) bias: Option<Vec<T>>,
    /// `[B, K - 1, D]`
    pub(super) state: Option<Vec<T>>,
}

impl<T: Real> Parameters<T> {
    pub(super) fn new(args: &CausalConv1d, sizes: Sizes) -> Result<Self> {
        let Sizes { channels, taps, .. } = sizes;
        let bias = |bias| transposed(bias, channels, 1);
        let state = |state| transposed(state, channels, taps - 1);
        Ok(Self {
            weight: transposed(args.weight, channels, taps)?,
            bias: args.bias.map(bias).transpose()?,
            state: args.initial_state.map(state).transpose()?,
        })
    }
}

/// The matrices `[rows, columns]` that a tensor is made of, each as `[columns, rows]`.
pub(super) fn transposed<T: Real>(tensor: &Tensor, rows: usize, columns: usize) -> Result<Vec<T>> {
    let flat = tensor.to_dtype(T::DTYPE)?.flatten_all()?;
    let flat = with_unit_stride(&flat)?;
    let held = Held::new(&flat);
    let values = held.rows::<T>()?.row([]);
    let mut result = vec![T::ZERO; values.len()];
    let size = (rows * columns).max(1);
    for (from, to) in values.chunks(size).zip(result.chunks_mut(size)) {
        transpose(from, to, rows, columns);
    }
    Ok(result)
}

/// `to[c, r] = from[r, c]`
pub(super) fn transpose<T: Copy>(from: &[T], to: &mut [T], rows: usize, columns: usize) {
    for (column, to) in to.chunks_mut(rows.max(1)).enumerate().take(columns) {
        for (to, from) in to.iter_mut().zip(from.chunks(columns)) {
            *to = from[column];
        }
    }
}

/// One input of a window.
#[derive(Clone, Copy)]
pub(super) enum Input<'a, E: Element> {
    /// Before a sequence that starts afresh.
    Zero,
    /// Of the initial state.
    State(&'a [E::Real]),
    /// Of `x`.
    Token(&'a [E]),
}

impl<E: Element> Input<'_, E> {
    /// Channels `c..c + n`, `n <= LANES`.
    #[inline(always)]
    pub(super) fn load<S: Simd<E::Real>>(self, s: S, c: usize, n: usize) -> S::V {
        match self {
            Input::Zero => s.splat(E::Real::ZERO),
            Input::State(row) => load(s, row, c, n),
            Input::Token(row) => load(s, row, c, n),
        }
    }
}

/// What a call computes.
pub(super) struct Problem<'a, E: Element> {
    pub(super) x: Rows<'a, E>,
    pub(super) parameters: &'a Parameters<E::Real>,
    pub(super) sizes: Sizes,
    pub(super) silu: bool,
}

impl<'a, E: Element> Problem<'a, E> {
    /// The input at `position` of a sequence that is `past` positions back from its start.
    fn before(&self, sequence: &Sequence, past: usize) -> Input<'a, E> {
        let Sizes { channels, taps, .. } = self.sizes;
        match &self.parameters.state {
            Some(state) if sequence.carried => {
                let at = (sequence.row * (taps - 1) + taps - 1 - past) * channels;
                Input::State(&state[at..at + channels])
            }
            _ => Input::Zero,
        }
    }

    /// The inputs at `positions` of a sequence, preceded by the `K - 1` before them.
    pub(super) fn inputs(&self, sequence: &Sequence, positions: Range<usize>) -> Vec<Input<'a, E>> {
        let past = self.sizes.taps - 1;
        let mut inputs = Vec::with_capacity(past + positions.len());
        inputs
            .extend((1..=past.saturating_sub(positions.start)).rev().map(|past| self.before(sequence, past)));
        let tokens = sequence.tokens(positions.start.saturating_sub(past)..positions.end);
        inputs.extend(tokens.map(|t| Input::Token(self.x.row([sequence.row, t]))));
        inputs
    }
}

struct Forward<'a, E: Element> {
    problem: &'a Problem<'a, E>,
    task: &'a Task<'a>,
    y: &'a Outlet<'a, E>,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Forward<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        with_taps!(s, self.problem.sizes.taps, blank => self.tiles(s, blank))
    }
}

impl<T: Real, E: Element<Real = T>> Forward<'_, E> {
    #[inline(always)]
    fn tiles<S: Simd<T>>(&self, s: S, blank: impl AsMut<[S::V]> + Clone) {
        let Range { start, end } = self.task.channels;
        let tail = end - (end - start) % S::LANES;
        for tile in &self.task.tiles {
            let inputs = self.problem.inputs(tile.sequence, tile.positions.clone());
            for c in (start..tail).step_by(S::LANES) {
                self.channels(s, tile, &inputs, c, S::LANES, blank.clone());
            }
            if tail < end {
                self.channels(s, tile, &inputs, tail, end - tail, blank.clone());
            }
        }
    }

    /// One register of channels, from `c`, through a tile.
    #[inline(always)]
    fn channels<S: Simd<T>>(
        &self,
        s: S,
        tile: &Tile,
        inputs: &[Input<E>],
        c: usize,
        n: usize,
        blank: impl AsMut<[S::V]> + Clone,
    ) {
        let Problem { sizes: Sizes { channels, length, .. }, parameters, silu: gate, .. } = *self.problem;
        let (mut weight, mut window) = (blank.clone(), blank);
        let (weight, window) = (weight.as_mut(), window.as_mut());
        for (tap, row) in weight.iter_mut().zip(parameters.weight.chunks(channels)) {
            *tap = load(s, row, c, n);
        }
        let bias = match &parameters.bias {
            Some(bias) => load(s, bias, c, n),
            None => s.splat(T::ZERO),
        };
        let last = window.len() - 1;
        for (slot, input) in window[1..].iter_mut().zip(inputs) {
            *slot = input.load(s, c, n);
        }
        let tokens = tile.sequence.tokens(tile.positions.clone());
        for (input, token) in inputs[last..].iter().zip(tokens) {
            window.copy_within(1.., 0);
            window[last] = input.load(s, c, n);
            let mut sum = bias;
            for (&tap, &input) in weight.iter().zip(window.iter()) {
                sum = s.fma(tap, input, sum);
            }
            if gate {
                sum = silu(s, sum);
            }
            let to = self.y.at((tile.sequence.row * length + token) * channels + c, n);
            // SAFETY: `at` checked the places; no other task has this token and these channels.
            unsafe { store(s, to, n, sum) };
        }
    }
}

fn typed<E: Element>(args: &CausalConv1d, sizes: Sizes) -> Result<[(Storage, Shape); 2]> {
    let Sizes { batch, length, channels, taps } = sizes;
    let x = with_unit_stride(args.x)?;
    let x = Held::new(&x);
    let parameters = Parameters::<E::Real>::new(args, sizes)?;
    let problem = Problem { x: x.rows::<E>()?, parameters: &parameters, sizes, silu: args.silu };
    let sequences = Sequence::all(args.segments, batch, length);
    let tasks = plan::tasks(&sequences, TILE, channels);

    let elements = batch * length * channels;
    let mut y: Vec<E> = Vec::new();
    let outlet = Outlet::fresh_or_zeroed(&mut y, elements, args.segments.is_some());
    parallel::map(&tasks, elements, |task| dispatch(Forward { problem: &problem, task, y: &outlet }));
    // SAFETY: padding was zeroed, and every other token lies in a sequence, whose tasks wrote all of its channels.
    unsafe { y.set_len(elements) };

    let mut state = vec![E::Real::ZERO; batch * channels * (taps - 1)];
    for sequence in sequences.iter().filter(|sequence| sequence.last) {
        let inputs = problem.inputs(sequence, sequence.length..sequence.length);
        let state = &mut state[sequence.row * channels * (taps - 1)..][..channels * (taps - 1)];
        for (k, input) in inputs.iter().enumerate() {
            let row = state[k..].iter_mut().step_by(taps - 1);
            match input {
                Input::Zero => {}
                Input::State(from) => row.zip(*from).for_each(|(to, from)| *to = *from),
                Input::Token(from) => row.zip(*from).for_each(|(to, from)| *to = from.widen()),
            }
        }
    }
    Ok([
        (Storage::Cpu(storage(y)), (batch, length, channels).into()),
        (Storage::Cpu(storage(state)), (batch, channels, taps - 1).into()),
    ])
}
