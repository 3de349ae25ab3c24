//! What is kept from call to call: transforms' twiddles for everyone, filters' transforms for who asks.

use super::Plan;
use super::fft::Fft;
use super::filter::{Spectrum, Taps};
use crate::backend::cpu::simd::Real;
use crate::ops::long_conv::Sizes;
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Twiddles of so many sizes are kept; they are 2 numbers a point.
const PLANS: usize = 64;
/// Transforms of so many lengths are kept of one filter.
const LENGTHS: usize = 4;

type Shared = Arc<dyn Any + Send + Sync>;

/// The transform of `points`.
pub(in super::super) fn plan<T: Real>(points: usize) -> Plan<T> {
    static PLANNED: OnceLock<Mutex<HashMap<(TypeId, usize), Shared>>> = OnceLock::new();
    let planned = PLANNED.get_or_init(Mutex::default);
    let key = (TypeId::of::<T>(), points);
    let found = planned.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
    if let Some(found) = found.and_then(|found| found.downcast::<Fft<T>>().ok()) {
        return found;
    }
    let made = Arc::new(Fft::new(points));
    let mut planned = planned.lock().unwrap_or_else(PoisonError::into_inner);
    if planned.len() >= PLANS {
        planned.clear();
    }
    planned.insert(key, made.clone());
    made
}

/// Keeps the transforms of a layer's filters between calls of [`long_conv`](crate::ops::long_conv()).
///
/// An entry is found again by the filter's contents: a fingerprint of all taps and skip weights, read at every call (a
/// tenth of the time a call takes), so that a parameter changed in place can never meet its old transform. The
/// transforms of a few lengths are kept, those of the last filter only.
#[derive(Default)]
pub struct FilterCache(Mutex<Vec<(Key, Shared)>>);

impl std::fmt::Debug for FilterCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FilterCache").field("entries", &self.len()).finish()
    }
}

/// What an entry was made of and for.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Key {
    fingerprint: [u64; FOLDS],
    dtype: TypeId,
    channels: usize,
    groups: usize,
    taps: usize,
    reverse: usize,
    points: usize,
    lanes: usize,
}

impl Key {
    pub(in super::super) fn new<T: Real>(
        taps: &Taps<'_, T>,
        sizes: &Sizes,
        longest: usize,
        points: usize,
        lanes: usize,
    ) -> Self {
        let mut fingerprint = Fingerprint::default();
        taps.past.rows().for_each(|row| fingerprint.add(row));
        taps.future.iter().for_each(|future| future.rows().for_each(|row| fingerprint.add(row)));
        taps.d.iter().for_each(|d| fingerprint.add(d));
        Self {
            fingerprint: fingerprint.0,
            dtype: TypeId::of::<T>(),
            channels: sizes.channels,
            groups: sizes.groups,
            taps: sizes.taps.min(longest),
            reverse: sizes.reverse.min(longest),
            points,
            lanes,
        }
    }
}

impl FilterCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many transforms it holds.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(in super::super) fn get_or_make<T: Real>(
        &self,
        key: Key,
        make: impl FnOnce() -> Spectrum<T>,
    ) -> Arc<Spectrum<T>> {
        let entries = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = entries().iter().find(|(other, _)| *other == key).map(|(_, entry)| entry.clone());
        if let Some(found) = found.and_then(|found| found.downcast::<Spectrum<T>>().ok()) {
            return found;
        }
        // what an older filter left goes first, so that there are never two
        entries().retain(|(other, _)| other.fingerprint == key.fingerprint);
        let made = Arc::new(make());
        let mut entries = entries();
        if entries.len() >= LENGTHS {
            entries.remove(0);
        }
        entries.push((key, made.clone()));
        made
    }
}

/// Words that are folded side by side, to go as fast as memory does.
const FOLDS: usize = 8;

/// A fingerprint of numbers: multiplied and turned word by word. No two filters met in practice share 512 bits.
#[derive(Default)]
struct Fingerprint([u64; FOLDS]);

impl Fingerprint {
    fn add<T: Real>(&mut self, values: &[T]) {
        const PRIME: u64 = 0x9e37_79b9_7f4a_7c15;
        // SAFETY: numbers without padding, read as the words and bytes they consist of.
        let (head, words, tail) = unsafe { values.align_to::<u64>() };
        let mut fold = |i: usize, word: u64| {
            self.0[i] = (self.0[i] ^ word).wrapping_mul(PRIME).rotate_left(29);
        };
        let rest = |values: &[T]| {
            values.iter().map(|x| x.to_f64().to_bits()).fold(1, |a, b| u64::wrapping_mul(a ^ b, PRIME))
        };
        fold(0, rest(head));
        fold(1, rest(tail));
        fold(2, values.len() as u64);
        let chunks = words.chunks_exact(FOLDS);
        for (i, &word) in chunks.remainder().iter().enumerate() {
            fold(i, word);
        }
        let mut folds = self.0;
        for chunk in chunks {
            for (fold, &word) in folds.iter_mut().zip(chunk) {
                *fold = (*fold ^ word).wrapping_mul(PRIME).rotate_left(29);
            }
        }
        self.0 = folds;
    }
}
