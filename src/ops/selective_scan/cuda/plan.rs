//! How a scan is laid out on a GPU: by its shape and the device's size alone.

use super::super::Sizes;

/// Threads of a block, and tokens between the states that forward keeps, as `scan.cuh` has them.
pub(super) const THREADS: usize = 128;
pub(super) const KEPT: usize = 16;
/// Tokens of the longest tile: chunks are whole tiles.
const TILE: usize = 2 * KEPT;
/// A chunk has at least as many tiles.
const CHUNK_TILES: usize = 4;
/// Bounds of a grid, and of the integers that kernels count tokens with.
pub(super) const MOST_BLOCKS: usize = 65_535;
const MOST_TOKENS: usize = (1 << 31) - 2 * TILE;

/// Lanes that one state may be spread over.
pub(super) const SPLITS: [usize; 6] = [1, 2, 4, 8, 16, 32];

/// How the numbers of a state lie in lanes: `Form` of `scan.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Form {
    /// Channels of a lane.
    pub(super) per: usize,
    /// Numbers of each of their states in a lane.
    pub(super) states: usize,
    /// Lanes of a state.
    pub(super) split: usize,
}

impl Form {
    /// The form with as few lanes to a state of `states` numbers as hold it.
    fn holding(per: usize, own: usize, states: usize) -> Option<Self> {
        let split = SPLITS.into_iter().find(|split| split * own >= states)?;
        Some(Self { per, states: own, split })
    }

    /// Channels of a block.
    fn channels(&self) -> usize {
        THREADS / self.split * self.per
    }
}

/// A form of a kernel, and how long a token of a block takes, in nanoseconds of an H100: `work` times the blocks of a
/// multiprocessor, and `wait`, shared by them, that they leave it idle; `resident` of them run at a time. `summary` is what
/// the first walk through a chunk costs beside the second. All measured, see the kernels.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    form: Form,
    work: f64,
    wait: f64,
    resident: usize,
    summary: f64,
    /// Whether there is a kernel of it whose blocks take shares of all chains.
    shares: bool,
}

impl Candidate {
    /// A token of so many blocks of a multiprocessor.
    fn token(&self, blocks: usize) -> f64 {
        let (turns, rest) = (blocks / self.resident, blocks % self.resident);
        let together = |blocks: usize| match blocks {
            0 => 0.0,
            _ => self.work * blocks as f64 + self.wait / blocks as f64,
        };
        turns as f64 * together(self.resident) + together(rest)
    }
}

/// How many tokens the first walk through a chunk goes until decays make the rest negligible (a guess: it depends on the
/// numbers), and what the launches cost.
const SUMMARY_TOKENS: usize = 4096;
const SUMMARY_LAUNCHES: f64 = 5_000.0;
/// What it costs that blocks hand on what they leave of a chain.
const SHARES_LAUNCHES: f64 = 4_000.0;
/// The first walk beside the second.
const FORWARD_SUMMARY: f64 = 0.9;
const BACKWARD_SUMMARY: f64 = 0.27;
/// The work for each number of a state that a block's lanes hold.
const FORWARD_WORK: f64 = 112.0 / 2048.0;
const BACKWARD_WORK: f64 = 157.0 / 1024.0;
/// Blocks of the first walk on a multiprocessor that pieces are cut for: four times those that run at a time.
const WALKS: usize = 20;
/// Blocks of few numbers in a lane that run on a multiprocessor at a time, and of others.
const FEW_RESIDENT: usize = 4;
const RESIDENT: usize = 3;

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// The scan of sequences that are read in whole vectors, of elements of so many bytes.
    Aligned(usize),
    /// The scan of any sequences.
    Forward,
    Backward,
}

impl Pass {
    fn candidates(self, states: usize) -> Vec<Candidate> {
        let holding = |per, own, each: f64, wait, summary| {
            let form = Form::holding(per, own, states)?;
            let work = each * (THREADS * per * own) as f64;
            Some(Candidate { form, work, wait, resident: RESIDENT, summary, shares: false })
        };
        let wide = holding(2, 8, FORWARD_WORK, 64.0, FORWARD_SUMMARY);
        let all = match self {
            Self::Backward => {
                let back = |per, own| holding(per, own, BACKWARD_WORK, 96.0, BACKWARD_SUMMARY);
                [back(2, 4).or_else(|| back(1, 8)), None, None]
            }
            // the kernels with few numbers in a lane are made for the states of Mamba
            Self::Aligned(bytes) if (9..=16).contains(&states) => {
                let few = |per, work, wait| {
                    let form = Form { per, states: 4, split: 4 };
                    Some(Candidate {
                        form,
                        work,
                        wait,
                        // of f32 there is no room for more
                        resident: if bytes == 4 && per == 1 { RESIDENT } else { FEW_RESIDENT },
                        summary: FORWARD_SUMMARY,
                        shares: per == 1,
                    })
                };
                [few(1, 27.5, 15.0), few(2, 51.5, 50.0), wide]
            }
            Self::Aligned(_) | Self::Forward => [wide, None, None],
        };
        all.into_iter().flatten().collect()
    }
}

/// How blocks share out all chains of tokens, of a block's channels in one row each, where there are some more chains than
/// blocks run at a time: see `forward_shares` in `selective_scan_fwd.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shares {
    pub(super) blocks: usize,
    /// Of each block, not less than of a chain.
    pub(super) tokens: usize,
}

/// The layout of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) form: Form,
    /// Channels that share their groups of `B` and of `C`, and how many such parts there are.
    pub(super) part: usize,
    pub(super) parts: usize,
    /// Blocks in a part.
    pub(super) blocks: usize,
    /// Tokens of a chunk, and the number of chunks.
    pub(super) chunk: usize,
    pub(super) chunks: usize,
    /// Pieces of a chunk, which the first walk goes through side by side.
    pub(super) pieces: usize,
    /// Where blocks are not one for each chunk; there is one chunk then.
    pub(super) shares: Option<Shares>,
}

impl Plan {
    /// For a device of so many multiprocessors; `None` where no kernel takes the call.
    pub(super) fn new(sizes: &Sizes, pass: Pass, multiprocessors: usize) -> Option<Self> {
        let Sizes { batch, length, channels, states, groups } = *sizes;
        if batch * length * channels == 0 || batch > MOST_BLOCKS || length > MOST_TOKENS {
            return None;
        }
        let width = |side: usize| channels / groups[side].unwrap_or(channels);
        let part = gcd(width(0), width(1));
        let parts = channels / part;
        let tiles = length.div_ceil(TILE);
        let most = (tiles / CHUNK_TILES).clamp(1, MOST_BLOCKS);
        let mut best: Option<(f64, Self)> = None;
        for candidate in pass.candidates(states) {
            let form = candidate.form;
            let blocks = part.div_ceil(form.channels());
            let all = blocks * parts * batch;
            let mut offer = |cost: f64, cut: Plan| {
                if best.is_none_or(|(least, _)| cost < least) {
                    best = Some((cost, cut));
                }
            };
            let whole =
                Self { form, part, parts, blocks, chunk: tiles * TILE, chunks: 1, pieces: 1, shares: None };
            for resident in 1..candidate.resident {
                let blocks = resident * multiprocessors;
                let tokens = (all * tiles).div_ceil(blocks) * TILE;
                if candidate.shares && all > blocks && tokens <= MOST_TOKENS {
                    let cost = candidate.token(resident) * tokens as f64 + SHARES_LAUNCHES;
                    offer(cost, Self { shares: Some(Shares { blocks, tokens }), ..whole });
                }
            }
            // more chunks than fill the device several times over gain nothing
            for chunks in 1..=most.min(16 * multiprocessors / all + 1) {
                let tiles = tiles.div_ceil(chunks);
                let walks = all * (length.div_ceil(tiles * TILE) - 1);
                let pieces = match walks {
                    0 => 1,
                    // the walk is likely to end before the chunk does
                    _ if tiles * TILE > SUMMARY_TOKENS => 1,
                    // a power of two, as many tiles are likely to be
                    _ => 1 << (WALKS * multiprocessors / walks).clamp(1, tiles.div_ceil(CHUNK_TILES)).ilog2(),
                };
                let chunk = tiles.next_multiple_of(pieces) * TILE;
                let chunks = length.div_ceil(chunk);
                let time = |blocks: usize| candidate.token(blocks.div_ceil(multiprocessors));
                let mut cost = time(all * chunks) * chunk.min(length) as f64;
                if chunks > 1 {
                    let piece = chunk / pieces;
                    cost += candidate.summary
                        * time(all * (chunks - 1) * pieces)
                        * piece.min(SUMMARY_TOKENS) as f64
                        + SUMMARY_LAUNCHES;
                }
                offer(cost, Self { chunk, chunks, pieces, ..whole });
            }
        }
        best.map(|(_, plan)| plan)
    }

    /// Blocks of all parts.
    pub(super) fn columns(&self) -> usize {
        self.parts * self.blocks
    }

    /// The pieces of all chunks but the one that hands nothing on, and one more: `slots` of `scan.cuh`.
    pub(super) fn slots(&self) -> usize {
        (self.chunks - 1) * self.pieces + 1
    }

    /// What follows the element type in the name of a kernel.
    pub(super) fn kernel(&self) -> String {
        let Form { per, states, split } = self.form;
        format!("{per}x{states}x{split}")
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: usize = 132;
    const ALIGNED: Pass = Pass::Aligned(2);

    fn sizes(batch: usize, length: usize, channels: usize, states: usize) -> Sizes {
        Sizes { batch, length, channels, states, groups: [Some(1), Some(1)] }
    }

    #[test]
    fn a_state_is_spread_over_as_few_lanes_as_hold_it() {
        for (states, forward, backward) in [
            (1, "2x8x1", "2x4x1"),
            (8, "2x8x1", "2x4x2"),
            (9, "2x8x2", "2x4x4"),
            (16, "2x8x2", "2x4x4"),
            (17, "2x8x4", "2x4x8"),
            (128, "2x8x16", "2x4x32"),
            (129, "2x8x32", "1x8x32"),
            (256, "2x8x32", "1x8x32"),
        ] {
            let kernel = |pass| {
                Plan::new(&sizes(1, 10, 64, states), pass, H100).map(|plan| plan.kernel()).unwrap_or_default()
            };
            assert_eq!(kernel(Pass::Forward), forward, "{states}");
            assert_eq!(kernel(Pass::Backward), backward, "{states}");
        }
        for pass in [ALIGNED, Pass::Forward, Pass::Backward] {
            assert_eq!(Plan::new(&sizes(1, 10, 64, 257), pass, H100), None);
        }
    }

    #[test]
    fn few_channels_take_many_lanes_and_many_channels_few() {
        let kernel = |batch, length, channels| {
            Plan::new(&sizes(batch, length, channels, 16), ALIGNED, H100).map(|plan| plan.kernel())
        };
        assert_eq!(kernel(8, 2048, 1536).as_deref(), Some("1x4x4"));
        assert_eq!(kernel(8, 2048, 4096).as_deref(), Some("2x4x4"));
        assert_eq!(kernel(64, 200, 1536).as_deref(), Some("2x4x4"));
        assert_eq!(kernel(2, 8192, 5120).as_deref(), Some("1x4x4"));
    }

    #[test]
    fn blocks_beyond_those_that_run_at_a_time_wait_for_them() {
        for pass in [ALIGNED, Pass::Forward, Pass::Backward] {
            for candidate in pass.candidates(16) {
                let (all, one) = (candidate.token(candidate.resident), candidate.token(1));
                assert_eq!(candidate.token(2 * candidate.resident + 1), 2.0 * all + one);
                assert!(all < candidate.resident as f64 * one);
            }
        }
    }

    #[test]
    fn nothing_to_do_is_no_work_for_a_kernel() {
        for (batch, length, channels) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (65_536, 1, 1)] {
            assert_eq!(Plan::new(&sizes(batch, length, channels, 16), Pass::Forward, H100), None);
        }
    }

    #[test]
    fn time_is_cut_where_channels_do_not_fill_the_device() {
        let chunks = |batch, length, channels| {
            Plan::new(&sizes(batch, length, channels, 16), ALIGNED, H100).map_or(0, |plan| plan.chunks)
        };
        assert_eq!(chunks(64, 200, 1536), 1);
        assert_eq!(chunks(8, 2048, 1536), 1);
        assert!(chunks(1, 262_144, 1536) > 8);
        assert_eq!(chunks(1, 100, 16), 1);
        // as many as run at a time
        for (bytes, blocks) in [(2, 528), (4, 384)] {
            let plan = Plan::new(&sizes(1, 262_144, 1536, 16), Pass::Aligned(bytes), H100);
            assert_eq!(plan.map(|plan| plan.chunks * plan.columns()), Some(blocks));
        }
    }

    #[test]
    fn blocks_that_would_not_share_out_evenly_take_shares() {
        let shares = |batch, length, channels, pass| {
            Plan::new(&sizes(batch, length, channels, 16), pass, H100).and_then(|plan| plan.shares)
        };
        // 320 chains of 256 tiles
        let tokens = (320usize * 256).div_ceil(264) * TILE;
        assert_eq!(shares(2, 8192, 5120, ALIGNED), Some(Shares { blocks: 264, tokens }));
        assert_eq!(shares(2, 8192, 5120, Pass::Aligned(4)), Some(Shares { blocks: 264, tokens }));
        assert_eq!(shares(2, 8192, 5120, Pass::Forward), None);
        assert_eq!(shares(2, 8192, 5120, Pass::Backward), None);
        for (batch, length, channels) in
            [(8, 2048, 1536), (8, 2048, 4096), (64, 200, 1536), (1, 65_536, 5120)]
        {
            assert_eq!(shares(batch, length, channels, ALIGNED), None);
        }
    }

    #[test]
    fn pieces_share_out_a_first_walk_of_few_blocks() {
        let cut = |batch, length, channels| {
            let plan = Plan::new(&sizes(batch, length, channels, 16), Pass::Backward, H100);
            plan.map(|plan| (plan.chunks, plan.pieces, plan.slots()))
        };
        assert_eq!(cut(8, 2048, 1536), Some((2, 8, 9)));
        assert_eq!(cut(64, 200, 1536), Some((1, 1, 1)));
        // in long chunks it ends before it comes to their other pieces
        assert_eq!(cut(1, 262_144, 1536), Some((16, 1, 16)));
    }

    #[test]
    fn chunks_cover_the_tokens_and_parts_the_channels() {
        for (length, groups) in [(1, [Some(1), Some(1)]), (531, [Some(2), Some(3)]), (9000, [None, Some(4)])]
        {
            let sizes = Sizes { batch: 2, length, channels: 48, states: 16, groups };
            for pass in [ALIGNED, Pass::Forward, Pass::Backward] {
                let Some(plan) = Plan::new(&sizes, pass, H100) else { panic!("no plan for {sizes:?}") };
                assert!(plan.chunk % TILE == 0 && plan.chunks * plan.chunk >= length);
                assert!((plan.chunks - 1) * plan.chunk < length);
                assert_eq!(plan.chunk % (plan.pieces * TILE), 0);
                assert_eq!(plan.part * plan.parts, 48);
                for group in groups {
                    assert_eq!(48 / group.unwrap_or(48) % plan.part, 0);
                }
            }
        }
    }
}
