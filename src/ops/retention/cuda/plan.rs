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
/// What the states of segments cost, and what narrow slices do on Hopper, next to the outputs of wide ones.
const STATES_COST: f64 = 0.5;
const NARROW_COST: f64 = 0.8;
/// Bytes of a state's number.
const STATE_BYTES: usize = 4;
/// Bounds of a grid, and of the integers that kernels count with.
pub(super) const MOST_BLOCKS: usize = 65_535;
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
    /// Whether slices of values are narrow where wide ones would do.
    pub(super) narrow: bool,
    pub(super) target: Target,
}

/// The room that kernels have for so many keys.
pub(super) fn room(keys: usize) -> Option<usize> {
    KEYS.into_iter().find(|room| *room >= keys)
}

/// A layout for the kernel of steps, which knows no segments.
pub(super) fn one_segment(length: usize) -> Plan {
    let target = Target { bytes: STATE_BYTES, multiprocessors: 1, hopper: false };
    Plan { segment: length.max(1).next_multiple_of(TOKENS), narrow: false, target }
}

impl Kernel {
    /// `None` where none has room.
    pub(super) fn new(keys: usize, values: usize, plan: &Plan) -> Option<Self> {
        let keys = room(keys)?;
        let short = plan.target.bytes == 2;
        // a slice's state is what a group has room for
        let narrow = plan.narrow && keys <= WARP_KEYS;
        let wide = short && values > NARROW && keys <= WIDE_KEYS && !narrow;
        Some(Self { keys, values: if wide { WIDE } else { NARROW }, hopper: short && plan.target.hopper })
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

/// The layout of a call; `None` where no kernel takes it, forward or backward.
/// With a decay that learns segments are short, but so long that their states hold no more numbers than keys and values.
pub(super) fn plan(sizes: &Sizes, target: Target, learns_decay: bool) -> Option<Plan> {
    let Sizes { batch, length, heads, keys, values, .. } = *sizes;
    let whole = Plan { segment: length.next_multiple_of(TOKENS), narrow: false, target };
    let kernel = Kernel::new(keys, values, &whole)?;
    Kernel::new(values, keys, &whole)?;
    let rows = batch * heads;
    if rows * length == 0 || rows > MOST_BLOCKS || length > MOST_TOKENS {
        return None;
    }
    let plan = match learns_decay {
        true => {
            let tokens = (2 * keys * values / (keys + values)).next_multiple_of(TOKENS);
            Plan { segment: tokens.max(2 * TOKENS), ..whole }
        }
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
            let narrow =
                Plan { narrow: kernel.hopper && kernel.values == WIDE && kernel.keys <= WARP_KEYS, ..whole };
            let at_once = rows * values.div_ceil(NARROW) <= room;
            match narrow.narrow && at_once && NARROW_COST + traffic < cost(&segments) {
                true => narrow,
                false => Plan { segment: length.div_ceil(segments).next_multiple_of(TOKENS), ..whole },
            }
        }
    };
    (length.div_ceil(plan.segment) <= MOST_BLOCKS).then_some(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Target = Target { bytes: 2, multiprocessors: 132, hopper: true };

    fn laid_out(batch: usize, length: usize, heads: usize, keys: usize, values: usize) -> Option<Plan> {
        let sizes = Sizes { batch, length, heads, keys, values, groups: [heads; 3], per_token: false };
        plan(&sizes, H100, false)
    }

    fn tokens(batch: usize, length: usize, heads: usize, keys: usize, values: usize) -> Option<usize> {
        laid_out(batch, length, heads, keys, values).map(|plan| plan.segment)
    }

    #[test]
    fn a_kernel_has_room_for_the_keys() {
        let kernel = |keys, values, bytes| {
            let plan = Plan { segment: 64, narrow: false, target: Target { bytes, ..H100 } };
            Kernel::new(keys, values, &plan).map(|k| [k.keys, k.values])
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
    fn slices_are_narrow_where_they_fill_the_device_in_one_go() {
        let narrow = |batch, length, heads, keys, values| {
            laid_out(batch, length, heads, keys, values).map(|plan| plan.narrow)
        };
        assert_eq!(narrow(4, 2048, 16, 128, 128), Some(true));
        assert_eq!(narrow(2, 16_384, 16, 128, 128), Some(false));
        assert_eq!(narrow(1, 8192, 96, 128, 128), Some(false));
        assert_eq!(narrow(8, 2048, 8, 256, 512), Some(false));
        let plan = Plan { segment: 64, narrow: true, target: H100 };
        assert_eq!(Kernel::new(128, 128, &plan).map(|k| k.values), Some(64));
        assert_eq!(Kernel::new(256, 128, &plan).map(|k| k.values), Some(128));
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
        let tokens = |keys, values| plan(&sizes(keys, values), H100, true).map(|plan| plan.segment);
        assert_eq!(tokens(128, 128), Some(128));
        assert_eq!(tokens(256, 512), Some(384));
    }
}
