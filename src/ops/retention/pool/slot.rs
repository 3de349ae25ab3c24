//! A slot of the pool on devices without a kernel for it: a state that is replaced, and the tokens it has yet to take.

use super::{RetentionPoolConfig, Rows};
use crate::Result;
use crate::ops::retention::{Retention, retention};
use crate::ops::{Form, accumulation_dtype};
use candle_core::{DType, Tensor};

/// A state `[1, H, K, V]` and the tokens it has yet to take.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    state: Tensor,
    tokens: Option<Tokens>,
}

/// Tokens of a row, or of all rows of a call.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    /// `[B, T, Hk, K]`, `[B, T, Hv, V]`.
    pub(super) k: Tensor,
    pub(super) v: Tensor,
    /// `[B, T, H]`, or `[H]`.
    pub(super) log_decay: Tensor,
}

impl Tokens {
    pub(super) fn args<'a>(&'a self, q: &'a Tensor, scale: f64) -> Retention<'a> {
        Retention {
            q,
            k: &self.k,
            v: &self.v,
            log_decay: &self.log_decay,
            scale,
            initial_state: None,
            segments: None,
            form: Form::Recurrent,
        }
    }

    /// Some tokens of a row of a call.
    fn of(args: &Retention, row: usize, count: usize) -> Result<Self> {
        let part = |x: &Tensor| x.detach().narrow(0, row, 1)?.narrow(1, 0, count);
        let log_decay = match args.log_decay.rank() {
            3 => part(args.log_decay)?,
            _ => args.log_decay.detach(),
        };
        Ok(Self { k: part(args.k)?, v: part(args.v)?, log_decay })
    }

    fn length(&self) -> Result<usize> {
        Ok(self.k.dim(1)?)
    }

    /// The decays of every token.
    fn decays(&self) -> Result<Tensor> {
        match self.log_decay.rank() {
            3 => Ok(self.log_decay.clone()),
            _ => {
                let dims = (1, self.length()?, self.log_decay.dim(0)?);
                Ok(self.log_decay.broadcast_as(dims)?.contiguous()?)
            }
        }
    }

    /// These, and others behind them.
    fn then(&self, next: &Self) -> Result<Self> {
        let cat = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, &b.to_dtype(a.dtype())?], 1);
        Ok(Self {
            k: cat(&self.k, &next.k)?,
            v: cat(&self.v, &next.v)?,
            log_decay: cat(&self.decays()?, &next.decays()?)?,
        })
    }

    /// Whether others may join without loss.
    fn takes(&self, next: &Self) -> bool {
        let like = |a: &Tensor, b: &Tensor| a.dtype() == b.dtype() && a.dims()[2..] == b.dims()[2..];
        like(&self.k, &next.k) && like(&self.v, &next.v)
    }
}

impl Slot {
    pub(super) fn new(state: Tensor) -> Self {
        Self { state, tokens: None }
    }

    /// Outputs of a row; the tokens that stay join those that wait, or the state takes them all.
    pub(super) fn run(
        &mut self,
        args: &Retention,
        row: usize,
        rows: &Rows,
        config: &RetentionPoolConfig,
    ) -> Result<Tensor> {
        let length = args.q.dim(1)?;
        let stay = rows.taken(row, length);
        let used = if rows.outputs { length } else { stay };
        let q = args.q.detach().narrow(0, row, 1)?.narrow(1, 0, used)?;
        if used == 0 {
            return Ok(q);
        }
        let own = Tokens::of(args, row, used)?;
        if self.tokens.as_ref().is_some_and(|tokens| !tokens.takes(&own)) {
            self.fold(config.dtype)?;
        }
        let waiting = match &self.tokens {
            Some(tokens) => tokens.length()?,
            None => 0,
        };
        let all = match &self.tokens {
            Some(tokens) => tokens.then(&own)?,
            None => own,
        };
        let folds = waiting + stay >= config.window;
        let mut outputs = q.clone();
        if rows.outputs || folds {
            // of the tokens that wait nothing is asked
            let (_, _, heads, keys) = q.dims4()?;
            let before = Tensor::zeros((1, waiting, heads, keys), q.dtype(), q.device())?;
            let q = if waiting > 0 { Tensor::cat(&[&before, &q], 1)? } else { q };
            let wide = self.state.to_dtype(accumulation_dtype(config.dtype))?;
            let (o, state) =
                retention(&Retention { initial_state: Some(&wide), ..all.args(&q, args.scale) })?;
            outputs = o.narrow(1, waiting, used)?;
            if folds {
                *self = Self { state: state.to_dtype(config.dtype)?, tokens: None };
                return Ok(outputs);
            }
        }
        if stay > 0 {
            let kept = Tokens { k: all.k.clone(), v: all.v.clone(), log_decay: all.decays()? };
            self.tokens = Some(kept);
        }
        Ok(outputs)
    }

    /// The state, behind the tokens that waited.
    pub(super) fn fold(&mut self, dtype: DType) -> Result<Tensor> {
        if let Some(tokens) = self.tokens.take() {
            let (_, heads, keys, _) = self.state.dims4()?;
            let dims = (1, tokens.length()?, heads, keys);
            let q = Tensor::zeros(dims, tokens.k.dtype(), tokens.k.device())?;
            let wide = self.state.to_dtype(accumulation_dtype(dtype))?;
            let (_, state) = retention(&Retention { initial_state: Some(&wide), ..tokens.args(&q, 1.0) })?;
            self.state = state.to_dtype(dtype)?;
        }
        Ok(self.state.clone())
    }
}
