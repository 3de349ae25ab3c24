//! The backward pass: one walk forward in time, the gradients of the last `K` inputs in registers.
//!
//! With `s` the result before SiLU (computed again) and `g = dy` (times `SiLU'(s)`),
//!
//! ```text
//! dx[t]     = sum_k weight[k] g[t + K - 1 - k]        dweight[k] = sum_t g[t] x[t - (K - 1) + k]
//! ```
//!
//! where inputs before the first token are the initial state's, and the last `K - 1` inputs also receive the gradient
//! of the final state. A tile walks `K - 1` tokens beyond its end, to complete the gradients of its own inputs.
//! 3 elements move per token and channel (12 bytes in f32). Weight gradients are summed within a task, then over tasks
//! in their order: the same bits for any number of threads.

use super::cpu::{self, Input, Parameters, Problem, transpose, transposed, with_taps};
use super::plan::{self, Sequence, Task, Tile};
use super::{CausalConv1d, Segments, Sizes};
use crate::Result;
use crate::autograd::{Gradients, record};
use crate::backend::cpu::math::{sigmoid, silu_grad};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Outlet, Rows, load, store, tensor, with_unit_stride};
use candle_core::{DType, Tensor};
use half::{bf16, f16};

/// Tokens of a tile: more than in the forward pass, for each walks `K - 1` further.
const TILE: usize = 32;

/// The operator in candle's graph, for `x` on the CPU: output and final state.
pub(super) fn recorded(args: &CausalConv1d, sizes: Sizes) -> Result<(Tensor, Tensor)> {
    let outputs = cpu::forward(args, sizes)?;
    let mut inputs = vec![args.x, args.weight];
    inputs.extend(args.bias);
    inputs.extend(args.initial_state);
    let saved = Saved {
        x: args.x.detach(),
        weight: args.weight.detach(),
        bias: args.bias.map(Tensor::detach),
        initial_state: args.initial_state.map(Tensor::detach),
        segments: args.segments.cloned(),
        silu: args.silu,
        sizes,
    };
    let [y, state] =
        record("causal_conv1d", &inputs, outputs, move |gradients| Ok(saved.backward(gradients)?))?;
    Ok((y, state))
}

/// What the backward pass needs.
struct Saved {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    segments: Option<Segments>,
    silu: bool,
    sizes: Sizes,
}

impl Saved {
    fn backward(&self, gradients: [Option<&Tensor>; 2]) -> Result<Gradients> {
        match self.x.dtype() {
            DType::F64 => self.typed::<f64>(gradients),
            DType::BF16 => self.typed::<bf16>(gradients),
            DType::F16 => self.typed::<f16>(gradients),
            _ => self.typed::<f32>(gradients),
        }
    }

    fn typed<E: Element>(&self, [dy, dfinal]: [Option<&Tensor>; 2]) -> Result<Gradients> {
        let Sizes { batch, length, channels, taps } = self.sizes;
        let args = CausalConv1d {
            x: &self.x,
            weight: &self.weight,
            bias: self.bias.as_ref(),
            silu: self.silu,
            initial_state: self.initial_state.as_ref(),
            segments: self.segments.as_ref(),
        };
        let x = with_unit_stride(&self.x)?;
        let dy = match dy {
            Some(dy) => with_unit_stride(dy)?,
            None => x.zeros_like()?,
        };
        let final_state = match dfinal {
            Some(gradient) => Some(transposed::<E::Real>(gradient, channels, taps - 1)?),
            None => None,
        };
        let (x, dy) = (Held::new(&x), Held::new(&dy));
        let parameters = Parameters::<E::Real>::new(&args, self.sizes)?;
        let problem =
            Problem { x: x.rows::<E>()?, parameters: &parameters, sizes: self.sizes, silu: self.silu };
        let sequences = Sequence::all(args.segments, batch, length);
        let tasks = plan::tasks(&sequences, TILE, channels);

        let elements = batch * length * channels;
        let mut dx: Vec<E> = Vec::new();
        let mut initial_state = vec![E::Real::ZERO; batch * (taps - 1) * channels];
        let shared = Shared {
            dy: dy.rows::<E>()?,
            final_state: final_state.as_deref(),
            dx: Outlet::fresh_or_zeroed(&mut dx, elements, self.segments.is_some()),
            initial_state: Outlet::new(&mut initial_state),
        };
        let work = |task: &Task| dispatch(Backward { problem: &problem, shared: &shared, task });
        let partial = parallel::map(&tasks, elements, work);
        // SAFETY: padding was zeroed, and every other token lies in a sequence, whose tasks wrote all of its channels.
        unsafe { dx.set_len(elements) };
        let mut sums = vec![E::Real::ZERO; (taps + 1) * channels];
        for (task, partial) in tasks.iter().zip(partial) {
            for (sums, partial) in sums.chunks_mut(channels).zip(partial.chunks(task.channels.len())) {
                let sums = &mut sums[task.channels.clone()];
                sums.iter_mut().zip(partial).for_each(|(sum, &part)| *sum += part);
            }
        }

        let like = |values: Vec<E::Real>, like: &Tensor| tensor(values, like.shape()).to_dtype(like.dtype());
        let bias = sums.split_off(taps * channels);
        let mut weight = vec![E::Real::ZERO; taps * channels];
        transpose(&sums, &mut weight, taps, channels);
        let mut result = vec![Some(tensor(dx, (batch, length, channels))), Some(like(weight, &self.weight)?)];
        if let Some(tensor) = &self.bias {
            result.push(Some(like(bias, tensor)?));
        }
        if let Some(tensor) = &self.initial_state {
            let mut turned = vec![E::Real::ZERO; initial_state.len()];
            let size = ((taps - 1) * channels).max(1);
            for (from, to) in initial_state.chunks(size).zip(turned.chunks_mut(size)) {
                transpose(from, to, taps - 1, channels);
            }
            result.push(Some(like(turned, tensor)?));
        }
        Ok(result)
    }
}

/// What all tasks read and write beside the problem itself.
struct Shared<'a, E: Element> {
    dy: Rows<'a, E>,
    /// Gradient of the final state, `[B, K - 1, D]`.
    final_state: Option<&'a [E::Real]>,
    dx: Outlet<'a, E>,
    /// Gradient of the initial state, `[B, K - 1, D]`.
    initial_state: Outlet<'a, E::Real>,
}

struct Backward<'a, E: Element> {
    problem: &'a Problem<'a, E>,
    shared: &'a Shared<'a, E>,
    task: &'a Task<'a>,
}

/// The tile at hand: its inputs as [`Problem::inputs`] gives them, and the rows of its output gradients, both up to
/// `K - 1` tokens beyond the tile.
struct Walk<'a, 't, E: Element> {
    tile: &'t Tile<'t>,
    inputs: Vec<Input<'a, E>>,
    tokens: Vec<usize>,
    gradients: Vec<&'a [E]>,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Backward<'_, E> {
    /// The task's part of the gradients of weight, `[K, channels]`, and bias, `[channels]`.
    type Output = Vec<T>;
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> Vec<T> {
        let mut sums = vec![T::ZERO; (self.problem.sizes.taps + 1) * self.task.channels.len()];
        with_taps!(s, self.problem.sizes.taps, blank => self.tiles(s, blank, &mut sums));
        sums
    }
}

impl<T: Real, E: Element<Real = T>> Backward<'_, E> {
    #[inline(always)]
    fn tiles<S: Simd<T>>(&self, s: S, blank: impl AsMut<[S::V]> + Clone, sums: &mut [T]) {
        let (start, end) = (self.task.channels.start, self.task.channels.end);
        let tail = end - (end - start) % S::LANES;
        for tile in &self.task.tiles {
            let sequence = tile.sequence;
            let beyond = (tile.positions.end + self.problem.sizes.taps - 1).min(sequence.length);
            let positions = tile.positions.start..beyond;
            let tokens: Vec<usize> = sequence.tokens(positions.clone()).collect();
            let gradients = tokens.iter().map(|&t| self.shared.dy.row([sequence.row, t])).collect();
            let inputs = self.problem.inputs(sequence, positions);
            let walk = Walk { tile, inputs, tokens, gradients };
            for c in (start..tail).step_by(S::LANES) {
                self.channels(s, &walk, c, S::LANES, blank.clone(), sums);
            }
            if tail < end {
                self.channels(s, &walk, tail, end - tail, blank.clone(), sums);
            }
        }
    }

    /// One register of channels, from `c`, through a tile.
    #[inline(always)]
    fn channels<S: Simd<T>>(
        &self,
        s: S,
        walk: &Walk<E>,
        c: usize,
        n: usize,
        blank: impl AsMut<[S::V]> + Clone,
        sums: &mut [T],
    ) {
        let Problem { sizes: Sizes { channels, length, taps, .. }, parameters, silu, .. } = *self.problem;
        let (sequence, positions) = (walk.tile.sequence, walk.tile.positions.clone());
        let past = taps - 1;
        let zero = s.splat(T::ZERO);
        let (mut weight, mut window) = (blank.clone(), blank.clone());
        let (mut dweight, mut dinput) = (blank.clone(), blank);
        let (weight, window) = (weight.as_mut(), window.as_mut());
        let (dweight, dinput) = (dweight.as_mut(), dinput.as_mut());
        let mut dbias = zero;
        for (tap, row) in weight.iter_mut().zip(parameters.weight.chunks(channels)) {
            *tap = load(s, row, c, n);
        }
        let bias = match &parameters.bias {
            Some(bias) => load(s, bias, c, n),
            None => zero,
        };
        for (slot, input) in window[1..].iter_mut().zip(&walk.inputs) {
            *slot = input.load(s, c, n);
        }

        for position in positions.start..positions.end + past {
            let step = position - positions.start;
            if let Some(&gradient) = walk.gradients.get(step) {
                window.copy_within(1.., 0);
                window[past] = walk.inputs[past + step].load(s, c, n);
                let mut gradient = load(s, gradient, c, n);
                if silu {
                    let mut sum = bias;
                    for (&tap, &input) in weight.iter().zip(window.iter()) {
                        sum = s.fma(tap, input, sum);
                    }
                    gradient = s.mul(gradient, silu_grad(s, sum, sigmoid(s, sum)));
                }
                if position < positions.end {
                    for (sum, &input) in dweight.iter_mut().zip(window.iter()) {
                        *sum = s.fma(gradient, input, *sum);
                    }
                    dbias = s.add(dbias, gradient);
                }
                for (sum, &tap) in dinput.iter_mut().zip(weight.iter()) {
                    *sum = s.fma(gradient, tap, *sum);
                }
            }
            // the gradient of the input K - 1 positions back is complete
            let mut complete = dinput[0];
            dinput.copy_within(1.., 0);
            dinput[past] = zero;
            let at_end = if sequence.last { position.checked_sub(sequence.length) } else { None };
            if let (Some(slot), Some(state)) = (at_end, self.shared.final_state) {
                let row = &state[(sequence.row * past + slot) * channels..][..channels];
                complete = s.add(complete, load(s, row, c, n));
            }
            if step >= past {
                let token = sequence.row * length + walk.tokens[step - past];
                let to = self.shared.dx.at(token * channels + c, n);
                // SAFETY: `at` checked the places; no other task has this token and these channels.
                unsafe { store(s, to, n, complete) };
            } else if positions.start == 0 && sequence.carried {
                let slot = sequence.row * past + position;
                let to = self.shared.initial_state.at(slot * channels + c, n);
                // SAFETY: `at` checked the places; the start of this sequence is no other tile's.
                unsafe { store(s, to, n, complete) };
            }
        }

        let (width, c) = (self.task.channels.len(), c - self.task.channels.start);
        for (sums, &part) in sums.chunks_mut(width).zip(dweight.iter().chain([&dbias])) {
            let sums = &mut sums[c..c + n];
            let total = s.add(load(s, sums, 0, n), part);
            // SAFETY: `sums` holds n values.
            unsafe { store(s, sums.as_mut_ptr(), n, total) };
        }
    }
}
