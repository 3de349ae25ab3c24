//! Which kernel of `kernels/norm.cu` takes a call: by its width and alignment alone.

use crate::backend::cuda::Element;

/// Threads of a block, lanes of a warp, and bytes of an access, as the kernels have them.
pub(super) const THREADS: usize = 256;
pub(super) const LANES: usize = 32;
pub(super) const ACCESS: usize = 16;
/// Threads that share a row, and accesses of each: where rows are read in whole accesses, and where in single numbers.
const TEAMS: [(usize, usize); 12] = [
    (8, 1),
    (16, 1),
    (32, 1),
    (32, 2),
    (32, 3),
    (64, 2),
    (64, 3),
    (128, 2),
    (128, 3),
    (256, 2),
    (256, 3),
    (256, 4),
];
const SINGLE_TEAMS: [(usize, usize); 3] = [(32, 4), (256, 2), (256, 8)];
/// The most groups that kernels count.
pub(super) const MOST: usize = 65_535;

/// Which kernel takes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Channels of an access, and accesses of a thread.
    pub(super) width: usize,
    items: usize,
    /// Threads that share a row.
    team: usize,
}

impl Plan {
    /// For groups of `group` of `channels` channels of `bytes` each, read in whole accesses if `aligned`; `None` if they are
    /// too wide.
    pub(super) fn new(channels: usize, group: usize, bytes: usize, aligned: bool) -> Option<Self> {
        let whole = ACCESS / bytes;
        let (width, teams) =
            if aligned && group.is_multiple_of(whole) { (whole, &TEAMS[..]) } else { (1, &SINGLE_TEAMS[..]) };
        let (team, items) = teams.iter().copied().find(|(team, items)| team * items * width >= group)?;
        (channels / group <= MOST).then_some(Self { width, items, team })
    }

    /// Rows that a block takes at a time.
    pub(super) fn rows(&self) -> usize {
        let pairs = self.width > 1 && self.items == 1;
        THREADS / self.team * if pairs { 2 } else { 1 }
    }

    pub(super) fn kernel<E: Element, R: Element>(&self, pass: &str) -> String {
        format!("norm_{pass}_{}_{}_{}_{}_{}", E::NAME, R::NAME, self.width, self.items, self.team)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_goes_to_as_few_threads_as_hold_it() {
        let plan = |group, bytes, aligned| {
            Plan::new(group, group, bytes, aligned).map(|plan| (plan.width, plan.items, plan.team))
        };
        assert_eq!(plan(64, 2, true), Some((8, 1, 8)));
        assert_eq!(plan(768, 2, true), Some((8, 3, 32)));
        assert_eq!(plan(768, 4, true), Some((4, 3, 64)));
        assert_eq!(plan(2560, 2, true), Some((8, 3, 128)));
        assert_eq!(plan(8192, 2, true), Some((8, 4, 256)));
        assert_eq!(plan(4096, 4, true), Some((4, 4, 256)));
        assert_eq!(plan(4104, 4, true), None);
        assert_eq!(plan(100, 2, true), Some((1, 4, 32)));
        assert_eq!(plan(768, 2, false), Some((1, 8, 256)));
        assert_eq!(plan(2049, 2, false), None);
    }
}
