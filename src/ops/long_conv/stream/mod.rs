//! The same filter token by token: exact, at O(log^2 L) operations a token and channel, amortised.
//!
//! An output needs all inputs before it, but inputs may hand over what they contribute to later outputs in bulk. After
//! `i` tokens, with `U` the largest power of two that divides `i`, the last `U` inputs are convolved with the taps `1..2 U`
//! and added to the next `U` outputs. So every pair of an input and a later output meets exactly once, in tiles of
//! sizes that a transform is good for (small ones go tap by tap), and when a token comes its sum lacks nothing but its own
//! term. A tile of `U` takes one transform of `U` points forward, one back.
//!
//! Tiles are counted from an origin. What came before the origin has been added to the outputs of a whole horizon
//! beyond it, as long as the past itself, in one convolution; at its end a new one begins, so that such convolutions
//! double in size and cost O(L log L) in all. A prompt is thus one ordinary convolution, and the first token after it
//! opens a horizon. Chunks in the middle go in aligned blocks of powers of two.
//!
//! Sources: relaxed multiplication, van der Hoeven 2002; Flash Inference (Oncescu et al. 2024); FutureFill (Agarwal et
//! al. 2024).

mod lane;
mod state;

pub use state::LongConvState;

use super::cpu::filter::HeldTaps;
use super::{FilterCache, LongConv, Segments, accumulation_dtype, long_conv};
use crate::backend::cpu::simd::{Isa, Real};
use crate::backend::cpu::view::{Held, tensor};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use lane::StreamFilter;

/// A causal filter, ready to be applied to sequences in pieces; see [`LongConvState`].
///
/// It is a snapshot: a parameter that changes later needs a new one.
#[derive(Debug)]
pub struct StreamConv {
    filter: Tensor,
    d: Option<Tensor>,
    channels: usize,
    cache: FilterCache,
    prepared: Option<Prepared>,
}

#[derive(Debug)]
enum Prepared {
    F32(StreamFilter<f32>),
    F64(StreamFilter<f64>),
}

impl StreamConv {
    /// For `filter` `[G, K]` and skip weight `d` `[D]`, as in [`LongConv`], over `channels`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn new(filter: &Tensor, d: Option<&Tensor>, channels: usize) -> Result<Self> {
        let dtype = accumulation_dtype(filter.dtype());
        let filter = filter.to_dtype(dtype)?;
        let d = d.map(|d| d.to_dtype(dtype)).transpose()?;
        let empty = Tensor::zeros((1, 0, channels), dtype, filter.device())?;
        let args = LongConv { d: d.as_ref(), ..LongConv::new(&empty, &filter) };
        let sizes = args.check()?;
        let tracked = filter.track_op() || d.as_ref().is_some_and(|d| d.track_op());
        let prepared = match (filter.device().is_cpu() && !tracked, dtype) {
            (false, _) => None,
            (true, DType::F64) => {
                Some(Prepared::F64(StreamFilter::new(Isa::best(), &HeldTaps::new(&args)?, sizes)?))
            }
            (true, _) => Some(Prepared::F32(StreamFilter::new(Isa::best(), &HeldTaps::new(&args)?, sizes)?)),
        };
        Ok(Self { filter, d, channels, cache: FilterCache::new(), prepared })
    }

    /// The convolution of `x` `[B, L, D]`, any number of tokens that go on from `state`, which moves behind them. Gates
    /// and segments as in [`LongConv`].
    ///
    /// On the CPU, where no gradient is asked for, this costs what the module says; otherwise the past is
    /// convolved again, differentiably.
    ///
    /// # Errors
    /// Shapes or dtypes that do not fit, or a state of another batch; `state` is then left as it was.
    pub fn forward(
        &self,
        x: &Tensor,
        gates: [Option<&Tensor>; 2],
        segments: Option<&Segments>,
        state: &mut LongConvState,
    ) -> Result<Tensor> {
        let args = LongConv {
            d: self.d.as_ref(),
            pre_gate: gates[0],
            post_gate: gates[1],
            segments,
            cache: Some(&self.cache),
            ..LongConv::new(x, &self.filter)
        };
        let sizes = args.check()?;
        state.check(sizes.batch, self.channels)?;
        if sizes.channels != self.channels {
            return Err(Error::shape("long_conv: x", format!("[B, L, D], D = {}", self.channels), x.dims()));
        }
        if sizes.elements() == 0 {
            return Ok(x.clone());
        }
        let wide = self.filter.dtype();
        let gated = |x: Tensor, gate: Option<&Tensor>| match gate {
            Some(gate) => x * gate.to_dtype(wide)?,
            None => Ok(x),
        };
        let v = gated(x.to_dtype(wide)?, args.pre_gate)?;
        let tracked = v.track_op() || gates[1].is_some_and(|gate| gate.track_op()) || state.is_tracked();
        let y = match &self.prepared {
            Some(prepared) if !tracked => {
                let fresh = segments.is_none() && state.is_fresh();
                // a prompt: an ordinary convolution
                let known = if fresh && sizes.length > 1 { Some(long_conv(&args)?) } else { None };
                let y = match prepared {
                    Prepared::F32(filter) => feed(filter, &v, segments, state, known.is_some())?,
                    Prepared::F64(filter) => feed(filter, &v, segments, state, known.is_some())?,
                };
                if let Some(known) = known {
                    return Ok(known);
                }
                y
            }
            _ => return state.differentiably(&args, &v),
        };
        Ok(gated(y, args.post_gate)?.to_dtype(x.dtype())?)
    }
}

/// Moves the state behind `v` `[B, L, D]`; the outputs, unless they are known.
fn feed<T: Real>(
    filter: &StreamFilter<T>,
    v: &Tensor,
    segments: Option<&Segments>,
    state: &mut LongConvState,
    known: bool,
) -> Result<Tensor> {
    let v = v.contiguous()?;
    let (batch, length, channels) = v.dims3()?;
    let flat = v.flatten_all()?;
    let held = Held::new(&flat);
    let values = held.rows::<T>()?.row([]);
    let mut y = vec![T::ZERO; values.len()];
    let rows = state.rows_mut::<T>(filter)?;
    let segments = Segments::or_whole(segments, batch, length);
    filter.feed(rows, values, channels, &segments, (!known).then_some(&mut y));
    Ok(tensor(y, (batch, length, channels)))
}

/// [`StreamConv::forward`] for a filter that is used once: [`LongConv`] with a state, its `past` and `reverse` absent.
///
/// # Errors
/// As there.
pub fn long_conv_with_state(args: &LongConv, state: &mut LongConvState) -> Result<Tensor> {
    if args.past.is_some() || args.reverse.is_some() {
        return Err(Error::value(
            "long_conv: state",
            "neither past nor reverse filter beside it",
            "one of them",
        ));
    }
    let channels = args.check()?.channels;
    let gates = [args.pre_gate, args.post_gate];
    StreamConv::new(args.filter, args.d, channels)?.forward(args.x, gates, args.segments, state)
}
