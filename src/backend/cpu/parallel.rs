//! Work on all threads, cut by shape alone: the same pieces, and so the same bits, for any number of threads.

use rayon::prelude::*;
use std::ops::Range;

/// Elements below which a second thread costs more than it saves.
const SERIAL_ELEMENTS: usize = 1 << 14;

/// Runs `f` on every item and returns the results in order; `elements` is the size of the work, in numbers computed.
pub(crate) fn map<T: Sync, R: Send>(
    items: &[T],
    elements: usize,
    f: impl Fn(&T) -> R + Sync + Send,
) -> Vec<R> {
    if items.len() <= 1 || elements < SERIAL_ELEMENTS {
        items.iter().map(f).collect()
    } else {
        items.par_iter().map(f).collect()
    }
}

/// `0..count` in pieces of `size`, the last one shorter.
pub(crate) fn pieces(count: usize, size: usize) -> Vec<Range<usize>> {
    let size = size.max(1);
    (0..count).step_by(size).map(|start| start..count.min(start + size)).collect()
}
