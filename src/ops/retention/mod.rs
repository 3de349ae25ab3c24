//! Retention: linear attention with decay, in three equal forms.
//!
//! For each sequence and head, with queries and keys of `K` numbers, values of `V` and a state `S` of `[K, V]`,
//!
//! ```text
//! S[t] = exp(log_decay[t]) S[t-1] + k[t]^T v[t]
//! o[t] = scale q[t] S[t]
//! ```
//!
//! A decay constant per head makes it RetNet's retention, one per token gated retention and Mamba-2's SSD. Unrolled,
//! with `c[t]` the sum of the logarithms up to `t`,
//!
//! ```text
//! o[i] = scale (exp(c[i]) q[i] S[-1] + sum_{j <= i} exp(c[i] - c[j]) (q[i] . k[j]) v[j])
//! ```
//!
//! The *recurrent* form computes the first pair of formulas token by token, the *parallel* form the second one over the
//! whole sequence, and the *chunkwise* form the second one within chunks of `C` tokens and the first one between them.
//! They agree up to rounding, and each takes up the state that another one left.
//!
//! | form | operations | memory beyond the arguments and results |
//! |---|---|---|
//! | parallel | `O(T^2 (K + V))` | `O(T)` a thread |
//! | chunkwise | `O(T (C (K + V) + K V))` | `O(C (C + K))` a thread |
//! | recurrent | `O(T K V)` | none |
//!
//! With gradients the states before some of the chunks are kept, no more numbers than the arguments have. All forms
//! share one backward pass, which is chunkwise.
//!
//! Source: RetNet (Sun et al. 2023), equations 5 to 7, without their normalisations, which are the layer's; Gated Linear
//! Attention (Yang et al. 2023), section 4, for the gradient of the decay.

mod composed;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
// What needs no CUDA of it, for its tests where there is none.
#[cfg(all(test, not(feature = "cuda")))]
#[expect(dead_code, reason = "its callers need CUDA")]
mod cuda {
    mod plan;
}
mod grad;
mod plan;
mod pool;
mod reference;

pub use pool::{RetentionPool, RetentionPoolConfig};
pub use reference::retention_reference;

use super::{Form, Segments, accumulation_dtype};
use crate::backend::cpu::simd::Isa;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// The arguments of [`retention`].
///
/// The number of heads `H` is the largest of `Hq`, `Hk` and `Hv`, each of which must divide it: head `h` reads head
/// `h / (H / Hx)` of an argument that has `Hx`.
#[derive(Clone, Copy, Debug)]
pub struct Retention<'a> {
    /// Queries, `[B, T, Hq, K]`.
    pub q: &'a Tensor,
    /// Keys, `[B, T, Hk, K]`.
    pub k: &'a Tensor,
    /// Values, `[B, T, Hv, V]`.
    pub v: &'a Tensor,
    /// Logarithms of the decays, at most 0: `[H]` constant, or `[B, T, H]` per token. Negative infinity forgets everything
    /// before the token, and so does a decay that is zero in the dtype of the state.
    pub log_decay: &'a Tensor,
    /// Multiplies the outputs.
    pub scale: f64,
    /// The state before the first token, `[B, H, K, V]`; zeros if `None`.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences and padding; `None` is one sequence a row.
    pub segments: Option<&'a Segments>,
    /// How to compute it.
    pub form: Form,
}

/// Retention; see the [module](self) for the formula.
///
/// Returns the output `[B, T, H, V]` in the dtype of `q`, and the final state `[B, H, K, V]` (f32; f64 where `q` is f64).
/// On CUDA chunkwise whatever the form: up to 512 keys and values in kernels that multiply in the dtype of `q`, `k` and `v`
/// and add in f32. Elsewhere in the dtype of the state; on devices other than the CPU in tensor operations, chunkwise.
///
/// Differentiable in every tensor argument, a constant decay and the initial state included, and through both results.
///
/// # Errors
/// Shapes that do not fit, a decay above 1 or NaN, a chunk of 0 tokens: naming the argument. The kernels of CUDA do not
/// stop the stream to look at decays: there one above 1 makes NaN of all it touches.
pub fn retention(args: &Retention) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    #[cfg(feature = "cuda")]
    if args.q.device().is_cuda()
        && let Some(results) = cuda::on_cuda(args, sizes)?
    {
        return Ok(results);
    }
    args.check_decays()?;
    let accumulation = accumulation_dtype(args.q.dtype());
    let initial_state = args.initial_state.map(|state| state.to_dtype(accumulation)).transpose()?;
    let unified = Retention {
        q: &args.q.to_dtype(accumulation)?,
        k: &args.k.to_dtype(accumulation)?,
        v: &args.v.to_dtype(accumulation)?,
        log_decay: &args.log_decay.to_dtype(accumulation)?,
        initial_state: initial_state.as_ref(),
        ..*args
    };
    let (o, state) = match args.q.device().is_cpu() {
        true => grad::on_cpu(&unified, sizes, Isa::best())?,
        false => composed::retention(&unified, sizes)?,
    };
    Ok((o.to_dtype(args.q.dtype())?, state))
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    pub(crate) heads: usize,
    /// Numbers in a key.
    pub(crate) keys: usize,
    /// Numbers in a value.
    pub(crate) values: usize,
    /// The heads of q, k and v.
    pub(crate) groups: [usize; 3],
    /// Whether every token has its own decays.
    pub(crate) per_token: bool,
}

impl Retention<'_> {
    fn check(&self) -> Result<Sizes> {
        let wrong = |name: &str, expected: String, got: &Tensor| {
            Error::shape(format!("retention: {name}"), expected, got.dims())
        };
        let &[batch, length, q_heads, keys] = self.q.dims() else {
            return Err(wrong("q", "[B, T, Hq, K]".into(), self.q));
        };
        let k_heads = match *self.k.dims() {
            [b, t, h, k] if [b, t, k] == [batch, length, keys] => h,
            _ => return Err(wrong("k", format!("[B, T, Hk, K] = [{batch}, {length}, Hk, {keys}]"), self.k)),
        };
        let (v_heads, values) = match *self.v.dims() {
            [b, t, h, v] if [b, t] == [batch, length] => (h, v),
            _ => return Err(wrong("v", format!("[B, T, Hv, V] = [{batch}, {length}, Hv, V]"), self.v)),
        };
        let groups = [q_heads, k_heads, v_heads];
        let heads = q_heads.max(k_heads).max(v_heads);
        for ((name, tensor), count) in [("q", self.q), ("k", self.k), ("v", self.v)].into_iter().zip(groups) {
            if count == 0 || heads % count != 0 || tensor.dims()[3] == 0 {
                let expected =
                    format!("at least one head and number a head, a number of heads that divides {heads}");
                return Err(wrong(name, expected, tensor));
            }
        }
        let per_token = match *self.log_decay.dims() {
            [h] if h == heads => false,
            [b, t, h] if [b, t, h] == [batch, length, heads] => true,
            _ => {
                let expected = format!("[H] = [{heads}] or [B, T, H] = [{batch}, {length}, {heads}]");
                return Err(wrong("log_decay", expected, self.log_decay));
            }
        };
        if let Some(state) = self.initial_state
            && state.dims() != [batch, heads, keys, values]
        {
            let expected = format!("[B, H, K, V] = [{batch}, {heads}, {keys}, {values}]");
            return Err(wrong("initial_state", expected, state));
        }
        if let Some(segments) = self.segments {
            segments.check("retention", batch, length)?;
        }
        if self.form == (Form::Chunkwise { chunk: 0 }) {
            return Err(Error::value("retention: chunk", "at least 1 token", 0));
        }
        for (name, tensor) in [("q", self.q), ("k", self.k), ("v", self.v), ("log_decay", self.log_decay)] {
            if !matches!(tensor.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
                let name = format!("retention: {name}");
                return Err(Error::dtype(name, "f32, f64, bf16 or f16", tensor.dtype()));
            }
        }
        Ok(Sizes { batch, length, heads, keys, values, groups, per_token })
    }

    /// Whether all decays are at most 1. On a GPU this waits for it.
    fn check_decays(&self) -> Result<()> {
        let decays = self.log_decay.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        match decays.into_iter().find(|decay| decay.is_nan() || *decay > 0.0) {
            Some(decay) => Err(Error::value("retention: log_decay", "logarithms of at most 0", decay)),
            None => Ok(()),
        }
    }
}
