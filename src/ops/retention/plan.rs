//! How a call is computed on the CPU: a pure function of its sizes.

use super::Sizes;
use crate::ops::Form;

/// Tokens that go token by token where nothing is asked: each is one pass over the state, which a chunk reads twice.
const FEW_TOKENS: usize = 8;
/// Rows of a chunk's products that are computed together.
pub(super) const ROWS: usize = 64;

/// How one call is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// Token by token.
    Step,
    /// In chunks of so many tokens.
    Chunks(usize),
}

pub(super) fn path(sizes: &Sizes, form: Form) -> Path {
    match form {
        Form::Recurrent => Path::Step,
        Form::Chunkwise { chunk } => Path::Chunks(chunk.min(sizes.length.max(1))),
        Form::Parallel => Path::Chunks(sizes.length.max(1)),
        Form::Auto if sizes.length <= FEW_TOKENS => Path::Step,
        Form::Auto => Path::Chunks(chunk(sizes)),
    }
}

/// The chunk that the backward pass takes, which costs the same in any form.
pub(super) fn backward_chunk(sizes: &Sizes, form: Form) -> usize {
    match path(sizes, form) {
        Path::Chunks(chunk) => chunk,
        Path::Step => chunk(sizes),
    }
}

/// Longer chunks for larger states: a chunk moves the state through the caches a few times, whatever its length.
fn chunk(sizes: &Sizes) -> usize {
    if sizes.key * sizes.value <= 128 * 128 { 64 } else { 128 }
}

/// How many parts time is cut into, to be work for several threads where heads and rows are few.
pub(super) fn spans(sizes: &Sizes, chunk: usize) -> usize {
    let tasks = (sizes.batch * sizes.heads).max(1);
    let most = sizes.length / (4 * chunk).max(1);
    if tasks >= 4 { 1 } else { 8usize.div_ceil(tasks).min(most.max(1)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(length: usize, heads: usize) -> Sizes {
        Sizes { batch: 1, length, heads, groups: [heads; 3], key: 64, value: 128 }
    }

    #[test]
    fn a_form_that_is_asked_for_is_taken() {
        assert_eq!(path(&sizes(300, 8), Form::Recurrent), Path::Step);
        assert_eq!(path(&sizes(300, 8), Form::Parallel), Path::Chunks(300));
        assert_eq!(path(&sizes(300, 8), Form::Chunkwise { chunk: 7 }), Path::Chunks(7));
        assert_eq!(path(&sizes(3, 8), Form::Chunkwise { chunk: 7 }), Path::Chunks(3));
    }

    #[test]
    fn few_tokens_are_steps_and_many_are_chunks() {
        assert_eq!(path(&sizes(1, 8), Form::Auto), Path::Step);
        assert_eq!(path(&sizes(0, 8), Form::Auto), Path::Step);
        assert!(matches!(path(&sizes(2000, 8), Form::Auto), Path::Chunks(2..=512)));
    }

    #[test]
    fn time_is_cut_only_where_heads_are_few_and_tokens_many() {
        assert_eq!(spans(&sizes(4096, 8), 64), 1);
        assert_eq!(spans(&sizes(4096, 1), 64), 8);
        assert_eq!(spans(&sizes(100, 1), 64), 1);
        assert_eq!(spans(&sizes(0, 1), 64), 1);
    }
}
