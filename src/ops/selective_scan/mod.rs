//! The selective scan: Mamba's recurrence.
//!
//! For each sequence, channel `d` and state `n`, with step `delta` (after `+ delta_bias` and softplus, where asked),
//!
//! ```text
//! h[t, d, n] = exp(delta[t, d] A[d, n]) h[t-1, d, n] + delta[t, d] B[t, n] u[t, d]
//! y[t, d]    = sum_n C[t, n] h[t, d, n] + D[d] u[t, d]                              (then times SiLU(z[t, d]))
//! ```
//!
//! `B` and `C` belong to groups of `D / G` neighbouring channels, and may be constant in time.
//!
//! Source: Mamba (Gu & Dao 2023), equations 2a and 2b with section 3.6; `selective_scan_ref` of the package mamba-ssm.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
// What needs no CUDA of it, for its tests where there is none.
#[cfg(all(test, not(feature = "cuda")))]
mod cuda {
    mod plan;
    mod step;
}
mod grad;
mod plan;
mod reference;

pub use reference::selective_scan_reference;

use super::{Segments, accumulation_dtype};
use crate::backend::cpu::simd::Isa;
use crate::{Error, Result};
use candle_core::Tensor;

/// The arguments of [`selective_scan`].
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan<'a> {
    /// Input, `[B, L, D]`.
    pub u: &'a Tensor,
    /// Steps, `[B, L, D]`, before bias and softplus.
    pub delta: &'a Tensor,
    /// `[D, N]`, real; negative for a decaying state.
    pub a: &'a Tensor,
    /// `[B, L, G, N]` per token in groups, `[B, L, N]` per token, or `[D, N]` constant.
    pub b: &'a Tensor,
    /// As `b`.
    pub c: &'a Tensor,
    /// Skip weight, `[D]`.
    pub d: Option<&'a Tensor>,
    /// Gate, `[B, L, D]`: the output is multiplied by `SiLU(z)`.
    pub z: Option<&'a Tensor>,
    /// `[D]`, added to `delta`.
    pub delta_bias: Option<&'a Tensor>,
    /// Apply softplus to `delta + delta_bias`.
    pub softplus: bool,
    /// The state before the first token, `[B, D, N]`; zeros if `None`.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences and padding; `None` is one sequence a row.
    pub segments: Option<&'a Segments>,
}

/// The selective scan; see the [module](self) for the formula.
///
/// Returns the output `[B, L, D]` in the dtype of `u`, and the final state `[B, D, N]` (f32; f64 for f64 input).
///
/// Differentiable in every tensor argument, the initial state included, and through both results.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn selective_scan(args: &SelectiveScan) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    #[cfg(feature = "cuda")]
    if args.u.device().is_cuda() {
        let scanned = cuda::on_cuda(args, sizes)?;
        return scanned.map_or_else(|| selective_scan_reference(args), Ok);
    }
    if !args.u.device().is_cpu() {
        return selective_scan_reference(args);
    }
    // sequences in one dtype, everything else in the arithmetic's
    let accumulation = accumulation_dtype(args.u.dtype());
    let dtype = args.u.dtype();
    let alike = [Some(args.delta), args.z].into_iter().flatten().all(|x| x.dtype() == dtype);
    let sequence = if alike { dtype } else { accumulation };
    let optional = |x: Option<&Tensor>, dtype| x.map(|x| x.to_dtype(dtype)).transpose();
    let (d, z) = (optional(args.d, accumulation)?, optional(args.z, sequence)?);
    let delta_bias = optional(args.delta_bias, accumulation)?;
    let initial_state = optional(args.initial_state, accumulation)?;
    let unified = SelectiveScan {
        u: &args.u.to_dtype(sequence)?,
        delta: &args.delta.to_dtype(sequence)?,
        a: &args.a.to_dtype(accumulation)?,
        b: &args.b.to_dtype(accumulation)?,
        c: &args.c.to_dtype(accumulation)?,
        d: d.as_ref(),
        z: z.as_ref(),
        delta_bias: delta_bias.as_ref(),
        initial_state: initial_state.as_ref(),
        ..*args
    };
    let (y, state) = grad::on_cpu(&unified, sizes, Isa::best())?;
    Ok((y.to_dtype(args.u.dtype())?, state))
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) channels: usize,
    pub(crate) states: usize,
    /// Groups of `B`, and of `C`; `None` where constant.
    pub(crate) groups: [Option<usize>; 2],
}

impl SelectiveScan<'_> {
    fn check(&self) -> Result<Sizes> {
        let wrong = |name: &str, expected: String, got: &Tensor| {
            Error::shape(format!("selective_scan: {name}"), expected, got.dims())
        };
        let Ok((batch, length, channels)) = self.u.dims3() else {
            return Err(wrong("u", "[B, L, D]".into(), self.u));
        };
        let same = |name: &str, tensor: &Tensor, symbols: &str, dims: &[usize]| {
            if tensor.dims() == dims {
                Ok(())
            } else {
                Err(wrong(name, format!("{symbols} = {dims:?}"), tensor))
            }
        };
        let states = match self.a.dims() {
            &[rows, states] if rows == channels && states > 0 => states,
            _ => return Err(wrong("a", format!("[D, N] = [{channels}, N >= 1]"), self.a)),
        };
        same("delta", self.delta, "[B, L, D]", &[batch, length, channels])?;
        let groups = |name: &str, tensor: &Tensor| match *tensor.dims() {
            [rows, n] if (rows, n) == (channels, states) => Ok(None),
            [b, l, n] if (b, l, n) == (batch, length, states) => Ok(Some(1)),
            [b, l, g, n] if (b, l, n) == (batch, length, states) && g > 0 && channels % g == 0 => Ok(Some(g)),
            _ => {
                let expected = format!(
                    "[B, L, G, N] = [{batch}, {length}, a divisor of {channels}, {states}], \
                     [B, L, N] or [D, N] = [{channels}, {states}]"
                );
                Err(wrong(name, expected, tensor))
            }
        };
        let groups = [groups("b", self.b)?, groups("c", self.c)?];
        for (name, tensor) in [("d", self.d), ("delta_bias", self.delta_bias)] {
            tensor.map_or(Ok(()), |tensor| same(name, tensor, "[D]", &[channels]))?;
        }
        if let Some(z) = self.z {
            same("z", z, "[B, L, D]", &[batch, length, channels])?;
        }
        if let Some(state) = self.initial_state {
            same("initial_state", state, "[B, D, N]", &[batch, channels, states])?;
        }
        if let Some(segments) = self.segments {
            segments.check("selective_scan", batch, length)?;
        }
        Ok(Sizes { batch, length, channels, states, groups })
    }
}
