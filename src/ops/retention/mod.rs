//! Retention: linear attention whose state decays.
//!
//! For each sequence and head, with keys and queries of `K` channels and values of `V`,
//!
//! ```text
//! S[t] = gamma[t] S[t-1] + k[t]^T v[t]            [K, V]
//! o[t] = scale q[t] S[t]                          [V]
//! ```
//!
//! The decay `gamma` is constant per head (RetNet) or given per token and head (gated retention, Mamba-2's SSD), always
//! by its logarithm: any number up to 0, minus infinity forgetting all that came before the token. Queries, keys and
//! values may come in fewer heads, each serving as many neighbouring heads of the output; nothing is repeated for it.
//!
//! # Forms
//! Within a chunk of tokens `i, j` with `c` the decays' logarithms summed from its start and `S` the state before it,
//!
//! ```text
//! o[i] = scale (sum_(j <= i) e^(c[i] - c[j]) (q[i] k[j]) v[j] + e^(c[i]) q[i] S)
//! S'   = e^(c[end]) S + sum_j e^(c[end] - c[j]) k[j]^T v[j]
//! ```
//!
//! One chunk of the whole sequence is the parallel form, chunks of one token the recurrent one; see [`Form`]. Only
//! differences of `c` that are at most 0 are exponentiated, so that no decay is too strong. Costs per token and head, in
//! multiplications: `K + V` times half the chunk, and `2 K V`.
//!
//! Source: Retentive Network (Sun et al. 2023), section 2; Mamba-2 (Dao & Gu 2024), section 6, for decays per token.

mod composed;
mod cpu;
mod grad;
mod plan;
mod reference;

pub use composed::retention_composed;
pub use reference::retention_reference;

use super::{Form, Segments, accumulation_dtype};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// The arguments of [`retention`].
#[derive(Clone, Copy, Debug)]
pub struct Retention<'a> {
    /// Queries, `[B, T, Hq, K]`.
    pub q: &'a Tensor,
    /// Keys, `[B, T, Hk, K]`.
    pub k: &'a Tensor,
    /// Values, `[B, T, Hv, V]`. The output has `H` heads, the most of the three; each of the three divides it.
    pub v: &'a Tensor,
    /// Logarithms of the decays: `[H]` constant, or `[B, T, H]` per token.
    pub log_decay: &'a Tensor,
    /// Scales the output.
    pub scale: f64,
    /// The state before the first token, `[B, H, K, V]`; zeros if `None`.
    pub initial_state: Option<&'a Tensor>,
    /// Packed sequences and padding; `None` is one sequence a row.
    pub segments: Option<&'a Segments>,
    /// How it is computed.
    pub form: Form,
}

/// Retention; see the [module](self) for the formula.
///
/// Returns the output `[B, T, H, V]` in the dtype of `q`, and the final state `[B, H, K, V]` (f32; f64 for f64 input).
///
/// Differentiable in every tensor argument, the constant decays and the initial state included, and through both
/// results. Memory between the passes is that of the arguments: the backward pass goes through the states again.
///
/// # Errors
/// Shapes or dtypes that do not fit, a decay whose logarithm is above 0 or no number, or a chunk of no tokens, by name.
pub fn retention(args: &Retention) -> Result<(Tensor, Tensor)> {
    let sizes = args.check()?;
    if !args.q.device().is_cpu() {
        return retention_composed(args);
    }
    // sequences in one dtype, everything else in the arithmetic's
    let dtype = args.q.dtype();
    let wide = accumulation_dtype(dtype);
    let alike = args.k.dtype() == dtype && args.v.dtype() == dtype;
    let sequence = if alike { dtype } else { wide };
    let initial_state = args.initial_state.map(|state| state.to_dtype(wide)).transpose()?;
    let unified = Retention {
        q: &args.q.to_dtype(sequence)?,
        k: &args.k.to_dtype(sequence)?,
        v: &args.v.to_dtype(sequence)?,
        log_decay: &args.log_decay.to_dtype(wide)?,
        initial_state: initial_state.as_ref(),
        ..*args
    };
    let (o, state) = grad::on_cpu(&unified, sizes)?;
    Ok((o.to_dtype(dtype)?, state))
}

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) length: usize,
    /// Heads of the output.
    pub(crate) heads: usize,
    /// Heads of queries, keys and values.
    pub(crate) groups: [usize; 3],
    pub(crate) key: usize,
    pub(crate) value: usize,
}

impl Sizes {
    /// The head of queries (0), keys (1) or values (2) that serves `head`.
    pub(crate) fn group(&self, which: usize, head: usize) -> usize {
        head / (self.heads / self.groups[which])
    }
}

impl Retention<'_> {
    fn check(&self) -> Result<Sizes> {
        let wrong = |name: &str, expected: String, got: &Tensor| {
            Err(Error::shape(format!("retention: {name}"), expected, got.dims()))
        };
        let Ok((batch, length, hq, key)) = self.q.dims4() else {
            return wrong("q", "[B, T, H, K]".into(), self.q);
        };
        let hk = match *self.k.dims() {
            [b, t, hk, k] if (b, t, k) == (batch, length, key) => hk,
            _ => return wrong("k", format!("[B, T, H, K] = [{batch}, {length}, H, {key}]"), self.k),
        };
        let (hv, value) = match *self.v.dims() {
            [b, t, hv, value] if (b, t) == (batch, length) => (hv, value),
            _ => return wrong("v", format!("[B, T, H, V] = [{batch}, {length}, H, V]"), self.v),
        };
        let heads = hq.max(hk).max(hv);
        for (name, tensor, groups) in [("q", self.q, hq), ("k", self.k, hk), ("v", self.v, hv)] {
            if groups == 0 || heads % groups != 0 {
                let expected = format!("[B, T, H, ..] with a number of heads H that divides {heads}");
                return wrong(name, expected, tensor);
            }
            if !tensor.dtype().is_float() {
                return Err(Error::dtype(format!("retention: {name}"), "a float", tensor.dtype()));
            }
        }
        if key == 0 || value == 0 {
            return wrong(if key == 0 { "q" } else { "v" }, "at least one channel a head".into(), self.q);
        }
        let dims = self.log_decay.dims();
        if dims != [heads] && dims != [batch, length, heads] {
            let expected = format!("[H] = [{heads}] or [B, T, H] = [{batch}, {length}, {heads}]");
            return wrong("log_decay", expected, self.log_decay);
        }
        if let Some(state) = self.initial_state {
            let dims = [batch, heads, key, value];
            if state.dims() != dims {
                return wrong("initial_state", format!("[B, H, K, V] = {dims:?}"), state);
            }
        }
        if let Some(segments) = self.segments {
            segments.check("retention", batch, length)?;
        }
        self.form.validate()?;
        check_decays(self.log_decay)?;
        Ok(Sizes { batch, length, heads, groups: [hq, hk, hv], key, value })
    }
}

/// Refuses logarithms above 0 and NaN.
fn check_decays(log_decay: &Tensor) -> Result<()> {
    let name = "retention: log_decay";
    if !log_decay.dtype().is_float() {
        return Err(Error::dtype(name, "a float", log_decay.dtype()));
    }
    if log_decay.elem_count() == 0 {
        return Ok(());
    }
    let values = log_decay.detach().flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    match values.iter().find(|x| x.is_nan() || **x > 0.0) {
        Some(wrong) => Err(Error::value(name, "logarithms of at most 0", wrong)),
        None => Ok(()),
    }
}
