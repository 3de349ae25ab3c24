//! How a call is laid out on a GPU: by its shape, its dtype and the device's size alone.

use super::super::Sizes;

/// Tokens of a segment are a multiple of this, and at least so many where there are several.
const TOKENS: usize = 64;
const LEAST_TOKENS: usize = 512;
/// Keys of a head that the kernels have room for.
const KEYS: [usize; 4] = [64, 128, 256, 512];
/// Values of a block, the wide slice being for elements of 16 bits and up to so many keys.
const NARROW: usize = 64;
const WIDE: usize = 128;
const WIDE_KEYS: usize = 256;
/// Keys of a warp.
const WARP_KEYS: usize = 128;
/// What the states of segments cost, next to the outputs.
const STATES_COST: f64 = 0.5;
/// Bytes of a state's number.
const STATE_BYTES: usize = 4;
/// Bounds of a grid, and of the integers that kernels count with.
const MOST_BLOCKS: usize = 65_535;
const MOST_TOKENS: usize = (1 << 31) - 2 * TOKENS;

/// Up to so many tokens go through the kernel of single steps, where no gradient is asked for.
const STEP_TOKENS: usize = 8;

/// Whether a call of so many tokens is one of steps.
pub(super) fn steps(length: usize, tracked: bool) -> bool {
    length <= STEP_TOKENS && !tracked
}

/// The kernel of a call: its room for keys, its slice of values, and whether it is one of Hopper's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) hopper: bool,
}

/// What a plan depends on beside a call's shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// Bytes of an element.
    pub(super) bytes: usize,
    /// Multiprocessors of the device.
    pub(super) multiprocessors: usize,
    /// Whether it runs the kernels made for Hopper.
    pub(super) hopper: bool,
}

/// How a call is laid out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// Tokens of a segment.
    pub(super) segment: usize,
    pub(super) target: Target,
}

impl Kernel {
    /// `None` where none has room.
    pub(super) fn new(keys: usize, values: usize, target: &Target) -> Option<Self> {
        let keys = KEYS.into_iter().find(|room| *room >= keys)?;
        let short = target.bytes == 2;
        let wide = short && values > NARROW && keys <= WIDE_KEYS;
        Some(Self { keys, values: if wide { WIDE } else { NARROW }, hopper: short && target.hopper })
    }

    pub(super) fn threads(&self) -> u32 {
        let threads = match self.hopper {
            // groups of 64 values, and two that share keys where one has no room for them
            true if self.values == WIDE || self.keys <= WARP_KEYS => self.values * 2,
            true => self.values * 4,
            false => self.keys.div_ceil(WARP_KEYS) * self.values / 16 * 32,
        };
        threads as u32
    }

    /// Blocks that a multiprocessor holds.
    fn together(&self) -> usize {
        if self.keys <= WARP_KEYS && !self.hopper { 2 } else { 1 }
    }
}

/// Tokens of a segment; `None` where no kernel takes the call, forward or backward.
/// With a decay that learns segments are short, but so long that their states hold no more numbers than keys and values.
pub(super) fn segment(sizes: &Sizes, target: &Target, learns_decay: bool) -> Option<usize> {
    let Sizes { batch, length, heads, keys, values, .. } = *sizes;
    let kernel = Kernel::new(keys, values, target)?;
    Kernel::new(values, keys, target)?;
    let rows = batch * heads;
    if rows * length == 0 || rows > MOST_BLOCKS || length > MOST_TOKENS {
        return None;
    }
    let tokens = match learns_decay {
        true => (2 * keys * values / (keys + values)).next_multiple_of(TOKENS).max(2 * TOKENS),
        false => {
            let blocks = rows * values.div_ceil(kernel.values);
            let room = target.multiprocessors * kernel.together();
            // a state is written and read twice, next to a segment's share of the sequences
            let traffic = (4 * STATE_BYTES * keys * values) as f64
                / (2 * length * (keys + values) * target.bytes) as f64;
            let cost = |segments: &usize| {
                let waves = (blocks * segments).div_ceil(room) as f64 / *segments as f64;
                waves * if *segments > 1 { 1.0 + STATES_COST } else { 1.0 } + traffic * *segments as f64
            };
            let most = (length / LEAST_TOKENS).clamp(1, MOST_BLOCKS);
            let segments = (1..=most).min_by(|a, b| cost(a).total_cmp(&cost(b)))?;
            length.div_ceil(segments).next_multiple_of(TOKENS)
        }
    };
    (length.div_ceil(tokens) <= MOST_BLOCKS).then_some(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Target = Target { bytes: 2, multiprocessors: 132, hopper: true };

    fn tokens(batch: usize, length: usize, heads: usize, keys: usize, values: usize) -> Option<usize> {
        let sizes = Sizes { batch, length, heads, keys, values, groups: [heads; 3], per_token: false };
        segment(&sizes, &H100, false)
    }

    #[test]
    fn a_kernel_has_room_for_the_keys() {
        let kernel = |keys, values, bytes| {
            Kernel::new(keys, values, &Target { bytes, ..H100 }).map(|k| [k.keys, k.values])
        };
        assert_eq!(kernel(16, 16, 2), Some([64, 64]));
        assert_eq!(kernel(65, 65, 2), Some([128, 128]));
        assert_eq!(kernel(256, 512, 2), Some([256, 128]));
        assert_eq!(kernel(512, 256, 2), Some([512, 64]));
        assert_eq!(kernel(128, 128, 4), Some([128, 64]));
        assert_eq!(kernel(513, 16, 2), None);
        let threads = |keys, values, hopper| Kernel { keys, values, hopper }.threads();
        assert_eq!([threads(256, 128, false), threads(64, 64, false)], [512, 128]);
        let hopper = [[64, 64], [128, 128], [256, 64], [256, 128], [512, 64]];
        assert_eq!(hopper.map(|[keys, values]| threads(keys, values, true)), [128, 256, 256, 256, 256]);
    }

    #[test]
    fn time_is_cut_where_heads_do_not_fill_the_device() {
        assert_eq!(tokens(8, 2048, 32, 256, 256), Some(2048));
        assert_eq!(tokens(8, 2048, 8, 256, 512), Some(2048));
        assert_eq!(tokens(4, 2048, 16, 128, 128), Some(2048));
        assert_eq!(tokens(1, 8192, 96, 128, 128), Some(8192));
        assert_eq!(tokens(2, 16_384, 16, 128, 128), Some(4096));
        assert_eq!(tokens(1, 65_536, 8, 256, 512), Some(16_384));
        assert_eq!(tokens(1, 100, 1, 64, 64), Some(128));
    }

    #[test]
    fn a_step_is_short_and_outside_a_graph() {
        assert!(steps(1, false) && steps(8, false));
        assert!(!steps(9, false) && !steps(1, true));
    }

    #[test]
    fn what_no_kernel_takes() {
        assert_eq!(tokens(0, 10, 1, 64, 64), None);
        assert_eq!(tokens(1, 0, 1, 64, 64), None);
        assert_eq!(tokens(1, 10, 1, 64, 513), None);
        assert_eq!(tokens(65_536, 10, 1, 64, 64), None);
    }

    #[test]
    fn decays_that_learn_have_short_segments() {
        let sizes = |keys, values| Sizes {
            batch: 1,
            length: 8192,
            heads: 8,
            keys,
            values,
            groups: [8; 3],
            per_token: true,
        };
        assert_eq!(segment(&sizes(128, 128), &H100, true), Some(128));
        assert_eq!(segment(&sizes(256, 512), &H100, true), Some(384));
    }
}
