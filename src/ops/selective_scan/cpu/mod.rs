//! The CPU path: lanes are channels, so that a register holds one state of as many channels.
//!
//! [`Operands`] are the arguments laid out for the kernels: sequences are read where they lie, the small arguments are
//! copied once into blocks of `[N, LANES]`. [`forward`] scans, [`backward`] goes back through recomputed chunks,
//! [`step`] is the forward pass of few tokens, with lanes over the states, [`spans`] the first pass where time is cut.

pub(super) mod backward;
pub(super) mod forward;
mod spans;
mod step;

pub(super) use step::step;

use self::forward::Scanned;
use super::plan::{Block, Plan};
use super::{Segments, SelectiveScan, Sizes};
use crate::Result;
use crate::backend::cpu::math::softplus;
use crate::backend::cpu::simd::{Element, Isa, Kernel, Real, Simd};
use crate::backend::cpu::view::{Held, Rows, with_unit_stride};
use candle_core::Tensor;

/// Tokens between a request for inputs and their use.
const AHEAD: usize = 8;

/// How many `T` a register of `isa` holds.
fn lanes_of<T: Real>(isa: Isa) -> usize {
    struct Lanes;
    impl<T: Real> Kernel<T> for Lanes {
        type Output = usize;
        #[inline(always)]
        fn run<S: Simd<T>>(self, _: S) -> usize {
            S::LANES
        }
    }
    T::dispatch_on(isa, Lanes)
}

/// The tensors of a call with unit stride and, for the small ones, in the arithmetic's dtype: to be [`Held`] by
/// [`Operands`].
pub(super) struct Prepared {
    u: Tensor,
    delta: Tensor,
    z: Option<Tensor>,
    b: Tensor,
    c: Tensor,
}

impl Prepared {
    pub(super) fn new(args: &SelectiveScan) -> Result<Self> {
        Ok(Self {
            u: with_unit_stride(args.u)?,
            delta: with_unit_stride(args.delta)?,
            z: args.z.map(with_unit_stride).transpose()?,
            b: Self::groups_in_rows(args.b)?,
            c: Self::groups_in_rows(args.c)?,
        })
    }

    /// `[B, L, G, N]` as `[B, L, G N]`; the other forms as they are.
    fn groups_in_rows(x: &Tensor) -> Result<Tensor> {
        let x = if x.rank() == 4 { x.flatten_from(2)? } else { x.clone() };
        Ok(with_unit_stride(&x)?)
    }

    pub(super) fn hold(&self) -> Locks<'_> {
        Locks {
            u: Held::new(&self.u),
            delta: Held::new(&self.delta),
            z: self.z.as_ref().map(Held::new),
            b: Held::new(&self.b),
            c: Held::new(&self.c),
        }
    }
}

/// The locked storages of [`Prepared`].
pub(super) struct Locks<'a> {
    u: Held<'a>,
    delta: Held<'a>,
    z: Option<Held<'a>>,
    b: Held<'a>,
    c: Held<'a>,
}

/// `B` or `C`.
enum Coefficient<'a, T> {
    /// `[B, L, G N]`
    Token(Rows<'a, T>),
    /// In blocks of `[N, LANES]`.
    Constant(Vec<T>),
}

/// The arguments laid out for the kernels.
pub(super) struct Operands<'a, E: Element> {
    sizes: Sizes,
    plan: Plan,
    isa: Isa,
    lanes: usize,
    segments: Segments,
    /// Whether there may be tokens of no sequence.
    padded: bool,
    u: Rows<'a, E>,
    delta: Rows<'a, E>,
    z: Option<Rows<'a, E>>,
    /// In blocks of `[N, LANES]`, times log2 e.
    a: Vec<E::Real>,
    b: Coefficient<'a, E::Real>,
    c: Coefficient<'a, E::Real>,
    /// In blocks of `[LANES]`.
    d: Option<Vec<E::Real>>,
    bias: Option<Vec<E::Real>>,
    softplus: bool,
    /// Per row, in blocks of `[N, LANES]`.
    initial: Option<Vec<E::Real>>,
}

/// The values of a tensor in order.
fn flat<T: Real>(tensor: &Tensor) -> Result<Vec<T>> {
    Ok(tensor.flatten_all()?.to_vec1::<T>()?)
}

impl<'a, E: Element> Operands<'a, E> {
    /// `args` must have been checked and unified: `u`, `delta`, `z` of dtype `E`, the others of `E::Real`.
    pub(super) fn new(isa: Isa, args: &SelectiveScan, sizes: Sizes, locks: &'a Locks<'a>) -> Result<Self> {
        let lanes = lanes_of::<E::Real>(isa);
        let plan = Plan::new(&sizes, lanes);
        let n = sizes.states;
        let coefficient = |held: &'a Held<'a>, tensor: &Tensor, groups: Option<usize>| match groups {
            Some(_) => Ok::<_, crate::Error>(Coefficient::Token(held.rows()?)),
            None => Ok(Coefficient::Constant(to_blocks(&plan, lanes, n, &flat(tensor)?))),
        };
        let vector = |tensor: Option<&Tensor>| -> Result<Option<Vec<E::Real>>> {
            tensor.map(|tensor| flat(tensor).map(|values| to_blocks(&plan, lanes, 1, &values))).transpose()
        };
        let mut a = to_blocks(&plan, lanes, n, &flat::<E::Real>(args.a)?);
        a.iter_mut().for_each(|a| *a *= E::Real::LOG2_E);
        Ok(Self {
            u: locks.u.rows()?,
            delta: locks.delta.rows()?,
            z: locks.z.as_ref().map(|z| z.rows()).transpose()?,
            a,
            b: coefficient(&locks.b, args.b, sizes.groups[0])?,
            c: coefficient(&locks.c, args.c, sizes.groups[1])?,
            d: vector(args.d)?,
            bias: vector(args.delta_bias)?,
            softplus: args.softplus,
            initial: args
                .initial_state
                .map(|state| Ok::<_, crate::Error>(to_blocks(&plan, lanes, n, &flat(state)?)))
                .transpose()?,
            segments: Segments::or_whole(args.segments, sizes.batch, sizes.length),
            padded: args.segments.is_some(),
            isa,
            lanes,
            sizes,
            plan,
        })
    }

    /// Numbers in one block of states.
    fn block_size(&self) -> usize {
        self.sizes.states * self.lanes
    }

    /// Numbers in all blocks of states of a row.
    fn row_size(&self) -> usize {
        self.plan.blocks.len() * self.block_size()
    }

    /// The state at the start of row `row`, blocks `blocks`.
    fn initial(&self, row: usize, blocks: &std::ops::Range<usize>) -> Vec<E::Real> {
        let size = self.block_size();
        match &self.initial {
            Some(state) => {
                let start = row * self.row_size();
                state[start + blocks.start * size..start + blocks.end * size].to_vec()
            }
            None => vec![E::Real::ZERO; blocks.len() * size],
        }
    }
}

/// `[.., D, width]` into blocks of `[width, LANES]`, zero in lanes beyond the channels.
fn to_blocks<T: Real>(plan: &Plan, lanes: usize, width: usize, values: &[T]) -> Vec<T> {
    let channels = plan.blocks.last().map_or(0, |block| block.channels.end);
    let rows = values.len().checked_div(channels * width).unwrap_or(0);
    let mut blocks = vec![T::ZERO; rows * plan.blocks.len() * width * lanes];
    let size = width * lanes;
    for (values, blocks) in
        values.chunks(channels * width).zip(blocks.chunks_mut((plan.blocks.len() * size).max(1)))
    {
        for (block, to) in plan.blocks.iter().zip(blocks.chunks_mut(size)) {
            for (lane, channel) in block.channels.clone().enumerate() {
                for n in 0..width {
                    to[n * lanes + lane] = values[channel * width + n];
                }
            }
        }
    }
    blocks
}

/// The inverse of [`to_blocks`].
fn from_blocks<T: Real>(plan: &Plan, lanes: usize, width: usize, blocks: &[T]) -> Vec<T> {
    let channels = plan.blocks.last().map_or(0, |block| block.channels.end);
    let size = width * lanes;
    let mut values = Vec::with_capacity(blocks.len());
    for row in blocks.chunks((plan.blocks.len() * size).max(1)) {
        for (block, from) in plan.blocks.iter().zip(row.chunks(size)) {
            for lane in 0..block.channels.len() {
                values.extend((0..width).map(|n| from[n * lanes + lane]));
            }
        }
    }
    debug_assert_eq!(values.len() % (channels * width).max(1), 0);
    values
}

/// One block of channels as a kernel sees it.
struct Lane<'a, T: Real, S: Simd<T>> {
    block: &'a Block,
    width: usize,
    /// `[N, LANES]`
    a: *const T,
    /// `[N, LANES]` where constant.
    b: Option<*const T>,
    c: Option<*const T>,
    d: Option<S::V>,
    bias: Option<S::V>,
}

/// What a kernel knows of one token.
struct Input<V> {
    u: V,
    /// `delta + bias`
    raw: V,
    /// After softplus.
    delta: V,
}

impl<E: Element> Operands<'_, E> {
    /// What block `index` needs, `S` being the instruction set of `self.lanes`.
    #[inline(always)]
    fn lane<S: Simd<E::Real>>(&self, s: S, index: usize) -> Lane<'_, E::Real, S> {
        assert_eq!(self.lanes, S::LANES);
        let size = self.block_size();
        let constant = |coefficient: &Coefficient<E::Real>| match coefficient {
            Coefficient::Token(_) => None,
            Coefficient::Constant(values) => Some(values[index * size..][..size].as_ptr()),
        };
        let vector = |values: &Option<Vec<E::Real>>| {
            values.as_ref().map(|values| {
                let values = &values[index * S::LANES..][..S::LANES];
                // SAFETY: the slice holds LANES values.
                unsafe { s.load(values.as_ptr()) }
            })
        };
        let block = &self.plan.blocks[index];
        Lane {
            block,
            width: block.channels.len(),
            a: self.a[index * size..][..size].as_ptr(),
            b: constant(&self.b),
            c: constant(&self.c),
            d: vector(&self.d),
            bias: vector(&self.bias),
        }
    }

    /// The values of a sequence at one token.
    #[inline(always)]
    fn load<S: Simd<E::Real>>(&self, s: S, rows: &Rows<E>, at: [usize; 2], lane: &Lane<E::Real, S>) -> S::V {
        let from = rows.row(at)[lane.block.channels.clone()].as_ptr();
        // SAFETY: the slice holds `width` values, LANES where that many are loaded.
        unsafe { if lane.width == S::LANES { E::load(s, from) } else { E::load_first(s, from, lane.width) } }
    }

    /// Asks for the inputs of the token [`AHEAD`] of `t` (behind it, going back): rows lie too far apart for the
    /// hardware to see the stream.
    #[inline(always)]
    fn prefetch<S: Simd<E::Real>>(&self, s: S, row: usize, t: Option<usize>, lane: &Lane<E::Real, S>) {
        let Some(t) = t.filter(|&t| t < self.sizes.length) else { return };
        for rows in [Some(&self.u), Some(&self.delta), self.z.as_ref()].into_iter().flatten() {
            s.prefetch(rows.row([row, t])[lane.block.channels.clone()].as_ptr());
        }
    }

    /// Writes the values of a sequence at one token.
    ///
    /// # Safety
    /// `to` points at `lane.width` values of a sequence that no other thread touches.
    #[inline(always)]
    unsafe fn store<S: Simd<E::Real>>(&self, s: S, to: *mut E, v: S::V, lane: &Lane<E::Real, S>) {
        // SAFETY: the caller's promise.
        unsafe {
            if lane.width == S::LANES { E::store(s, to, v) } else { E::store_first(s, to, lane.width, v) }
        }
    }

    #[inline(always)]
    fn input<S: Simd<E::Real>>(&self, s: S, at: [usize; 2], lane: &Lane<E::Real, S>) -> Input<S::V> {
        let u = self.load(s, &self.u, at, lane);
        let raw = self.load(s, &self.delta, at, lane);
        let raw = lane.bias.map_or(raw, |bias| s.add(raw, bias));
        Input { u, raw, delta: if self.softplus { softplus(s, raw) } else { raw } }
    }

    /// `B` (side 0) or `C` (side 1) of one token: `N` numbers, or null where constant.
    #[inline(always)]
    fn token(&self, side: usize, at: [usize; 2], block: &Block) -> *const E::Real {
        match if side == 0 { &self.b } else { &self.c } {
            Coefficient::Token(rows) => {
                let n = self.sizes.states;
                rows.row(at)[block.groups[side] * n..][..n].as_ptr()
            }
            Coefficient::Constant(_) => std::ptr::null(),
        }
    }
}

/// State `n` of `B` or `C`: from the block where constant, else the token's number in all lanes.
///
/// # Safety
/// `constant` points at `[N, LANES]`, or `token` at `N` numbers, and `n < N`.
#[inline(always)]
unsafe fn coefficient<T: Real, S: Simd<T>>(
    s: S,
    constant: Option<*const T>,
    token: *const T,
    n: usize,
) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        match constant {
            Some(block) => s.load(block.add(n * S::LANES)),
            None => s.splat(*token.add(n)),
        }
    }
}
