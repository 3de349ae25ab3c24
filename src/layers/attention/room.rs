//! Room for the keys and values to come, so that a token writes its own and copies no other's.

use crate::Result;
use candle_core::Tensor;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tokens that a new room has place for beyond those it is made for: a part of them, but at least so many.
const SPARE_PART: usize = 4;
const SPARE_LEAST: usize = 128;

/// Keys and values `[B, C, G, K]` of which the first are in use.
///
/// States that come from one another share it. What one of them sees is never written again; places behind it go to whoever
/// asks first, and the others take a copy elsewhere.
#[derive(Debug)]
struct Room {
    k: Tensor,
    v: Tensor,
    used: AtomicUsize,
}

/// Where the keys and values of a state lie in a room.
#[derive(Clone, Debug)]
pub(super) struct Place {
    room: Arc<Room>,
    start: usize,
    length: usize,
}

impl Place {
    /// A room of its own for `k` and `v` `[B, P, G, K]`, with place for `more` tokens, and some to spare where `spare`.
    pub(super) fn new(k: &Tensor, v: &Tensor, more: usize, spare: bool) -> Result<Self> {
        let (batch, length, groups, width) = k.dims4()?;
        let total = length + more;
        let capacity = if spare { total + (total / SPARE_PART).max(SPARE_LEAST) } else { total };
        let dims = (batch, capacity, groups, width);
        let room = Room {
            k: Tensor::zeros(dims, k.dtype(), k.device())?,
            v: Tensor::zeros(dims, k.dtype(), k.device())?,
            used: AtomicUsize::new(0),
        };
        let none = Self { room: Arc::new(room), start: 0, length: 0 };
        Ok(none.push(k, v)?.unwrap_or(none))
    }

    /// The place with `k` and `v` `[B, L, G, K]` written behind it; none if the room is full or another state has gone on
    /// from here.
    pub(super) fn push(&self, k: &Tensor, v: &Tensor) -> Result<Option<Self>> {
        let (end, added) = (self.start + self.length, k.dim(1)?);
        let room = &self.room;
        if end + added > room.k.dim(1)? {
            return Ok(None);
        }
        let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
        if room.used.compare_exchange(end, end + added, order, failed).is_err() {
            return Ok(None);
        }
        if added > 0 {
            room.k.slice_set(&k.contiguous()?, 1, end)?;
            room.v.slice_set(&v.contiguous()?, 1, end)?;
        }
        Ok(Some(Self { room: room.clone(), start: self.start, length: self.length + added }))
    }

    /// The last `count` tokens of it.
    pub(super) fn last(&self, count: usize) -> Self {
        let count = count.min(self.length);
        Self { room: self.room.clone(), start: self.start + self.length - count, length: count }
    }

    /// Keys and values, `[B, length, G, K]`.
    pub(super) fn tensors(&self) -> Result<[Tensor; 2]> {
        let part = |x: &Tensor| x.narrow(1, self.start, self.length);
        Ok([part(&self.room.k)?, part(&self.room.v)?])
    }

    /// The memory of the whole room, in bytes.
    pub(super) fn bytes(&self) -> usize {
        2 * self.room.k.elem_count() * self.room.k.dtype().size_in_bytes()
    }
}
