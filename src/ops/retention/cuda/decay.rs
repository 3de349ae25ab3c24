//! The gradient of the decays; `kernels/retention_carry.cu` has the formula.

use super::call::{Decays, LANES, Launcher, Locks, THREADS, Walk, steps};
use crate::Result;
use crate::backend::cuda::{Argument, Buffer, Element, Guards, Held, Packed, device_of};
use candle_core::Tensor;

/// What the gradient of the decays comes from: `v`, its gradient, the outputs and theirs; states before and gradients behind
/// the segments, and those before the first token.
pub(super) struct DecayGradient<'a> {
    pub(super) sequences: [&'a Tensor; 4],
    pub(super) states: Option<&'a Tensor>,
    pub(super) gradients: Option<&'a Tensor>,
    pub(super) initial: Option<&'a Tensor>,
    pub(super) dinitial: &'a Tensor,
    pub(super) decays: Decays<'a>,
}

impl DecayGradient<'_> {
    /// `[B, T, H]`
    pub(super) fn compute<E: Element>(&self, what: &str) -> Result<Tensor> {
        let [v, dv, o, d] = self.sequences;
        let (batch, length, heads, _) = o.dims4()?;
        let numbers = self.dinitial.elem_count() / (batch * heads);
        let device = &device_of(o)?;
        let walk = Walk {
            q: v,
            k: dv,
            v: o,
            decays: self.decays,
            inner: 1.0,
            outer: 1.0,
            transposed: false,
            backwards: false,
            initial: self.initial,
        };
        let segments = walk.segments()?;
        let mut tokens = Buffer::<f32>::new(device, batch * length * heads)?;
        let mut beginnings = Buffer::<f32>::new(device, batch * heads * segments)?;
        let (locks, stream) = (Locks::new(&walk, self.states), device.cuda_stream());
        let others = [Some(d), self.gradients, Some(self.dinitial)].map(|x| x.map(Held::new));
        {
            let guards = &mut Guards::default();
            let mut arguments = locks.arguments::<E>(&walk, device, &stream, guards)?;
            let mut pointers = [0; 3];
            for (to, held) in pointers.iter_mut().zip(&others) {
                *to = match held {
                    Some(held) => held.pointer("retention: gradient", device, &stream, guards)?,
                    None => 0,
                };
            }
            let [d_data, gradients, dinitial] = pointers;
            arguments.o = steps(d_data, d, heads);
            let (tokens, beginnings) = (tokens.pointer(&stream, guards), beginnings.pointer(&stream, guards));
            let launcher = Launcher { what, device };
            let products: [&dyn Argument; 7] = [
                &beginnings,
                &arguments.carried,
                &gradients,
                &arguments.initial,
                &dinitial,
                &(numbers as i64),
                &(segments as i32),
            ];
            let kernel = format!("retention_tokens_{}", E::NAME);
            let packed = Packed(arguments);
            // SAFETY: as in `Walk::states`.
            unsafe {
                launcher.plain("retention_beginnings", [segments, batch * heads], &products)?;
                let blocks = (length * heads).div_ceil(THREADS / LANES);
                launcher.plain(&kernel, [blocks, batch], &[&packed, &tokens])?;
                let blocks = (segments * heads).div_ceil(THREADS);
                launcher.plain("retention_decay", [blocks, batch], &[&packed, &tokens, &beginnings])?;
            }
        }
        Ok(tokens.tensor(device, (batch, length, heads)))
    }
}
