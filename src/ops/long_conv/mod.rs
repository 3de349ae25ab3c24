//! Long convolution: filters as long as the sequence, in O(L log L).
//!
//! For each sequence and channel `c`, whose filter is that of group `c / (D / G)`,
//!
//! ```text
//! v[t] = pre_gate[t] x[t]
//! z[t] = sum_{j >= 0} filter[j] v[t - j]  +  sum_{j >= 0} reverse[j] v[t + j]  +  d v[t]
//! y[t] = post_gate[t] z[t]
//! ```
//!
//! Without `reverse` it is causal. Taps beyond the sequence meet zeros, so a filter may be longer or shorter than it.
//! Any length will do: transforms have 5-smooth sizes.
//!
//! # How it is computed on the CPU
//! `plan` chooses by the sizes alone: short filters tap by tap, long ones through the FFT, and a filter much shorter
//! than the sequence in overlapping windows that stay in the cache. The transform is over real numbers modulo
//! `X^(2N) + 1`, of which one complex transform of `N` points modulo `X^N - i` tells all ("right-angle" convolution): a
//! causal filter of the sequence's length takes `N = L` points, without a padded copy. Registers hold one point of as
//! many channels as there are lanes, so that `[B, L, D]` is read as it lies and every butterfly is full. A transform, the
//! product and the transform back walk depth first, a cache's worth at a time. Scratch is a window and a filter's transform
//! a thread (backward three or four of them), never the transforms of all channels, unless a cache keeps those. Where there
//! are fewer sequences and blocks of channels than threads, several threads share a transform.
//!
//! [`LongConvState`] evaluates the same filter token by token; see there.
//!
//! Source: Hyena (Poli et al. 2023), section 3; `fftconv_ref` of safari, without its powers of two.

mod cpu;
mod grad;
mod plan;
mod reference;
mod stream;

pub use cpu::cache::FilterCache;
pub use reference::long_conv_reference;
pub use stream::{LongConvState, StreamConv, long_conv_with_state};

use super::{Segments, accumulation_dtype};
use crate::backend::cpu::simd::Isa;
use crate::{Error, Result};
use candle_core::Tensor;

/// The arguments of [`long_conv`].
#[derive(Clone, Copy, Debug)]
pub struct LongConv<'a> {
    /// Input, `[B, L, D]`.
    pub x: &'a Tensor,
    /// Filters over the past, `[G, K]` with `G` a divisor of `D` and `K >= 1`; tap 0 meets the current token. Read at
    /// any strides: the transpose of a `[K, G]` tensor is the fastest.
    pub filter: &'a Tensor,
    /// Filters over the future, `[G, K']`; tap 0 meets the current token too. `None` is causal.
    pub reverse: Option<&'a Tensor>,
    /// Both filters are given as `[K, G]`, taps first, and so are their gradients: the fastest to train.
    pub taps_first: bool,
    /// Skip weight, `[D]`.
    pub d: Option<&'a Tensor>,
    /// `[B, L, D]`, multiplied into `x` first.
    pub pre_gate: Option<&'a Tensor>,
    /// `[B, L, D]`, multiplied into the result.
    pub post_gate: Option<&'a Tensor>,
    /// What came before: values of `v`, `[B, P, D]`, oldest first, of causal sequences that go on. Nothing if `None`.
    pub past: Option<&'a Tensor>,
    /// Packed sequences and padding; `None` is one sequence a row. Not together with `past`.
    pub segments: Option<&'a Segments>,
    /// Where the filters' transforms are kept from call to call, as long as neither filter nor `d` change.
    pub cache: Option<&'a FilterCache>,
}

impl<'a> LongConv<'a> {
    /// The causal convolution of `x` with `filter`, and nothing else.
    pub fn new(x: &'a Tensor, filter: &'a Tensor) -> Self {
        Self {
            x,
            filter,
            reverse: None,
            taps_first: false,
            d: None,
            pre_gate: None,
            post_gate: None,
            past: None,
            segments: None,
            cache: None,
        }
    }
}

/// The long convolution; see the [module](self) for the formula.
///
/// Returns `[B, L, D]` in the dtype of `x`; zeros at padding. Sums run in f32 (f64 for f64).
///
/// Differentiable in every tensor argument. The backward pass transforms anew what it needs: nothing of the input's size
/// is kept but the arguments.
///
/// # Errors
/// Shapes or dtypes that do not fit, naming the argument.
pub fn long_conv(args: &LongConv) -> Result<Tensor> {
    let sizes = args.check()?;
    if let Some(past) = args.past.filter(|past| past.elem_count() > 0) {
        return after(args, past, sizes);
    }
    if sizes.elements() == 0 {
        return Ok(args.x.clone());
    }
    if !args.x.device().is_cpu() {
        return long_conv_reference(args);
    }
    // sequences in one dtype, everything else in the arithmetic's
    let (dtype, accumulation) = (args.x.dtype(), accumulation_dtype(args.x.dtype()));
    let alike = [args.pre_gate, args.post_gate].into_iter().flatten().all(|x| x.dtype() == dtype);
    let sequence = if alike { dtype } else { accumulation };
    let optional = |x: Option<&Tensor>, dtype| x.map(|x| x.to_dtype(dtype)).transpose();
    let (pre_gate, post_gate) = (optional(args.pre_gate, sequence)?, optional(args.post_gate, sequence)?);
    let (reverse, d) = (optional(args.reverse, accumulation)?, optional(args.d, accumulation)?);
    let unified = LongConv {
        x: &args.x.to_dtype(sequence)?,
        filter: &args.filter.to_dtype(accumulation)?,
        reverse: reverse.as_ref(),
        d: d.as_ref(),
        pre_gate: pre_gate.as_ref(),
        post_gate: post_gate.as_ref(),
        ..*args
    };
    Ok(grad::on_cpu(&unified, sizes, Isa::best())?.to_dtype(dtype)?)
}

/// With inputs before the first: the convolution of all of them, without the outputs that are known already.
fn after(args: &LongConv, past: &Tensor, sizes: Sizes) -> Result<Tensor> {
    let wide = accumulation_dtype(args.x.dtype());
    let mut v = args.x.to_dtype(wide)?;
    if let Some(gate) = args.pre_gate {
        v = (v * gate.to_dtype(wide)?)?;
    }
    let all = Tensor::cat(&[&past.to_dtype(wide)?, &v], 1)?;
    let whole = LongConv { x: &all, pre_gate: None, post_gate: None, past: None, ..*args };
    let mut y = long_conv(&whole)?.narrow(1, past.dim(1)?, sizes.length)?;
    if let Some(gate) = args.post_gate {
        y = (y * gate.to_dtype(wide)?)?;
    }
    Ok(y.to_dtype(args.x.dtype())?)
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) channels: usize,
    pub(crate) groups: usize,
    /// `K`
    pub(crate) taps: usize,
    /// `K'`, 0 if causal.
    pub(crate) reverse: usize,
}

impl Sizes {
    fn elements(&self) -> usize {
        self.batch * self.length * self.channels
    }
}

impl LongConv<'_> {
    fn check(&self) -> Result<Sizes> {
        let wrong = |name: &str, expected: String, got: &Tensor| {
            Error::shape(format!("long_conv: {name}"), expected, got.dims())
        };
        let Ok((batch, length, channels)) = self.x.dims3() else {
            return Err(wrong("x", "[B, L, D]".into(), self.x));
        };
        if !self.x.dtype().is_float() {
            return Err(Error::dtype("long_conv: x", "f32, f64, bf16 or f16", self.x.dtype()));
        }
        if channels == 0 {
            return Err(wrong("x", "[B, L, D] with D >= 1".into(), self.x));
        }
        let turned = |dims: &[usize]| match *dims {
            [taps, groups] if self.taps_first => [groups, taps],
            [groups, taps] => [groups, taps],
            _ => [0, 0],
        };
        let (groups, taps) = match turned(self.filter.dims()) {
            [groups, taps] if groups > 0 && channels % groups == 0 && taps > 0 => (groups, taps),
            _ => {
                let symbols = if self.taps_first { "[K, G]" } else { "[G, K]" };
                let expected = format!("{symbols} with K >= 1, G a divisor of {channels}");
                return Err(wrong("filter", expected, self.filter));
            }
        };
        let reverse = match self.reverse.map(|filter| (filter, turned(filter.dims()))) {
            None => 0,
            Some((_, [g, taps])) if g == groups && taps > 0 => taps,
            Some((filter, _)) => {
                return Err(wrong(
                    "reverse",
                    format!("[G, K'] (as the filter), K' >= 1, G = {groups}"),
                    filter,
                ));
            }
        };
        if let Some(d) = self.d.filter(|d| d.dims() != [channels]) {
            return Err(wrong("d", format!("[D] = [{channels}]"), d));
        }
        for (name, gate) in [("pre_gate", self.pre_gate), ("post_gate", self.post_gate)] {
            if let Some(gate) = gate.filter(|gate| gate.dims() != self.x.dims()) {
                return Err(wrong(name, format!("[B, L, D] = {:?}", self.x.dims()), gate));
            }
        }
        if let Some(segments) = self.segments {
            segments.check("long_conv", batch, length)?;
        }
        if let Some(past) = self.past {
            if !matches!(*past.dims(), [b, _, d] if (b, d) == (batch, channels)) {
                return Err(wrong("past", format!("[B, P, D] = [{batch}, P, {channels}]"), past));
            }
            if self.segments.is_some() || self.reverse.is_some() {
                let expected = "no segments and no reverse filter beside inputs of the past";
                return Err(Error::value("long_conv: past", expected, "both"));
            }
        }
        Ok(Sizes { batch, length, channels, groups, taps, reverse })
    }
}
