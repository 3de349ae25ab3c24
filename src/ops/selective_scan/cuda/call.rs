//! The arguments of the kernels, laid out as `scan.cuh` has them, and their launches.

use super::plan::{Plan, Shares, THREADS};
use crate::backend::cuda::{Argument, Element, Guards, Held, Launch, Module, Packed};
use crate::ops::selective_scan::{SelectiveScan, Sizes};
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, Tensor};

/// `[B, L, D]`, steps in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sequence {
    pub(super) data: u64,
    pub(super) row: i64,
    pub(super) token: i64,
}

/// `B` or `C`, steps in elements; `width` channels share a group.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Coefficient {
    data: u64,
    row: i64,
    token: i64,
    group: i64,
    width: i32,
    wide: i32,
}

/// `struct Scan` of `scan.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Scan {
    pub(super) u: Sequence,
    pub(super) delta: Sequence,
    pub(super) z: Sequence,
    pub(super) y: Sequence,
    pub(super) dy: Sequence,
    pub(super) du: Sequence,
    pub(super) ddelta: Sequence,
    pub(super) dz: Sequence,
    b: Coefficient,
    c: Coefficient,
    pub(super) a: u64,
    d: u64,
    bias: u64,
    pub(super) initial: u64,
    marks: u64,
    pub(super) state: u64,
    pub(super) kept: u64,
    pub(super) carried: u64,
    pub(super) span: u64,
    pub(super) sums: u64,
    pub(super) da: u64,
    pub(super) dd: u64,
    pub(super) dbias: u64,
    pub(super) handed: u64,
    batch: i32,
    length: i32,
    channels: i32,
    states: i32,
    part: i32,
    blocks: i32,
    chunk: i32,
    pieces: i32,
    slots: i32,
    share: i32,
    softplus: i32,
    aligned: i32,
    aligned_coefficients: i32,
    pub(super) ungated: u64,
}

/// Elements that are counted in 32 bits.
const MOST: i64 = i32::MAX as i64;

/// `struct OneToken` of `selective_scan_step.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct OneToken {
    data: [u64; 6],
    a: u64,
    d: u64,
    bias: u64,
    initial: u64,
    state: u64,
    rows: [i32; 6],
    initial_row: i32,
    groups: [i32; 2],
    inverses: [u32; 2],
    batch: i32,
    channels: i32,
    states: i32,
    has: i32,
}

impl Scan {
    /// The arguments of the kernel of one token in whole vectors, where it takes the call: see `selective_scan_step.cu`.
    pub(super) fn one_token<E: Element>(&self) -> Option<OneToken> {
        let alike = |side: &Coefficient| side.wide == (size_of::<E>() == 4) as i32;
        let takes = self.length == 1
            && self.states % 4 == 0
            && self.aligned_coefficients == 1
            && self.marks == 0
            && alike(&self.b)
            && alike(&self.c);
        let Self { u, delta, z, b, c, y, a, d, bias, initial, state, .. } = *self;
        let (batch, channels, states) = (self.batch as i64, self.channels as i64, self.states as i64);
        // what is counted in 32 bits
        let sequences = [u, delta, z, y].iter().all(|side| batch * side.row + channels <= MOST);
        let coefficients = [&b, &c].iter().all(|side| {
            let width = side.width as i64;
            batch * side.row + channels / width * side.group + states <= MOST && channels * width <= MOST
        });
        let counted = sequences && coefficients && batch * channels * states <= MOST;
        let or = |data: u64, other: u64| if data == 0 { other } else { data };
        let gates = if z.data == 0 { u } else { z };
        let has = [z.data, d, bias, initial, self.softplus as u64];
        let inverse = |side: Coefficient| (1u32 << 31).div_ceil(side.width as u32);
        (takes && counted).then_some(OneToken {
            data: [u.data, delta.data, gates.data, b.data, c.data, y.data],
            a,
            d: or(d, a),
            bias: or(bias, a),
            initial: or(initial, a),
            state,
            rows: [u.row, delta.row, gates.row, b.row, c.row, y.row].map(|row| row as i32),
            initial_row: if initial == 0 { 0 } else { (channels * states) as i32 },
            groups: [b.group, c.group].map(|group| group as i32),
            inverses: [inverse(b), inverse(c)],
            batch: self.batch,
            channels: self.channels,
            states: self.states,
            has: has.iter().enumerate().map(|(bit, &there)| ((there != 0) as i32) << bit).sum(),
        })
    }
}

/// The tensors of a call, held: sequences with unit stride, vectors contiguous.
pub(super) struct Locks<'a> {
    tensors: Vec<(&'static str, &'a Tensor, Held<'a>)>,
}

impl<'a> Locks<'a> {
    pub(super) fn new(args: &SelectiveScan<'a>, marks: Option<&'a Tensor>, dy: Option<&'a Tensor>) -> Self {
        let all = [
            ("u", Some(args.u)),
            ("delta", Some(args.delta)),
            ("a", Some(args.a)),
            ("b", Some(args.b)),
            ("c", Some(args.c)),
            ("d", args.d),
            ("z", args.z),
            ("delta_bias", args.delta_bias),
            ("initial_state", args.initial_state),
            ("segments", marks),
            ("dy", dy),
        ];
        let held = |(name, tensor): (_, Option<&'a Tensor>)| Some((name, tensor?, Held::new(tensor?)));
        Self { tensors: all.into_iter().filter_map(held).collect() }
    }

    /// The arguments of a kernel that does the call by `plan`. The results' fields are left empty.
    pub(super) fn scan<'s, E: Element>(
        &'s self,
        sizes: &Sizes,
        plan: &Plan,
        softplus: bool,
        device: &CudaDevice,
        stream: &'s CudaStream,
        guards: &mut Guards<'s>,
    ) -> Result<Scan> {
        let mut pointer = |name: &str| match self.tensors.iter().find(|(own, ..)| *own == name) {
            Some((_, tensor, held)) => {
                let argument = format!("selective_scan: {name}");
                Ok::<_, Error>((held.pointer(&argument, device, stream, guards)?, Some(*tensor)))
            }
            None => Ok((0, None)),
        };
        let mut aligned = (plan.part * size_of::<E>()).is_multiple_of(16);
        let mut sequence = |name: &str| {
            let (data, tensor) = pointer(name)?;
            let Some(tensor) = tensor else { return Ok::<_, Error>(Sequence::default()) };
            let (row, token) = (tensor.stride()[0], tensor.stride()[1]);
            aligned &=
                [data as usize, row * size_of::<E>(), token * size_of::<E>()].iter().all(|n| n % 16 == 0);
            Ok(Sequence { data, row: row as i64, token: token as i64 })
        };
        let (u, delta, z, dy) = (sequence("u")?, sequence("delta")?, sequence("z")?, sequence("dy")?);
        let mut aligned_coefficients = true;
        let mut coefficient = |name: &str, groups: Option<usize>| {
            let (data, tensor) = pointer(name)?;
            let Some(tensor) = tensor else { return Ok::<_, Error>(Coefficient::default()) };
            let bytes = tensor.dtype().size_in_bytes();
            let [row, token, group] = match *tensor.stride() {
                [channel, _] => [0, 0, channel],
                [row, token, _] => [row, token, 0],
                [row, token, group, _] => [row, token, group],
                _ => [0; 3],
            };
            let places = [data as usize, row * bytes, token * bytes, group * bytes, sizes.states * bytes];
            aligned_coefficients &= places.iter().all(|n| n % 16 == 0);
            let width = (sizes.channels / groups.unwrap_or(sizes.channels)) as i32;
            let [row, token, group] = [row, token, group].map(|step| step as i64);
            Ok(Coefficient { data, row, token, group, width, wide: (bytes == 4) as i32 })
        };
        let (b, c) = (coefficient("b", sizes.groups[0])?, coefficient("c", sizes.groups[1])?);
        Ok(Scan {
            u,
            delta,
            z,
            dy,
            b,
            c,
            a: pointer("a")?.0,
            d: pointer("d")?.0,
            bias: pointer("delta_bias")?.0,
            initial: pointer("initial_state")?.0,
            marks: pointer("segments")?.0,
            batch: sizes.batch as i32,
            length: sizes.length as i32,
            channels: sizes.channels as i32,
            states: sizes.states as i32,
            part: plan.part as i32,
            blocks: plan.blocks as i32,
            chunk: plan.chunk as i32,
            pieces: plan.pieces as i32,
            slots: plan.slots() as i32,
            share: plan.shares.map_or(0, |shares| shares.tokens) as i32,
            softplus: softplus as i32,
            aligned: aligned as i32,
            aligned_coefficients: aligned_coefficients as i32,
            ..Scan::default()
        })
    }
}

/// A contiguous sequence.
pub(super) fn contiguous(data: u64, sizes: &Sizes) -> Sequence {
    Sequence { data, row: (sizes.length * sizes.channels) as i64, token: sizes.channels as i64 }
}

/// Launches of one call.
pub(super) struct Launcher<'a> {
    pub(super) what: &'a str,
    pub(super) device: &'a CudaDevice,
    pub(super) sizes: &'a Sizes,
    pub(super) plan: &'a Plan,
}

impl Launcher<'_> {
    /// A kernel `<name>_<type>_<split>` over all blocks and so many chunks or pieces.
    ///
    /// # Safety
    /// The pointers of `scan` lead to what its sizes say.
    pub(super) unsafe fn scan<E: Element>(
        &self,
        module: Module,
        name: &str,
        scan: Scan,
        chunks: usize,
    ) -> Result<()> {
        let kernel = format!("{name}_{}_{}", E::NAME, self.plan.kernel());
        let grid = [self.plan.columns(), self.sizes.batch, chunks];
        // SAFETY: the kernel takes one `Scan`; the caller vouches for what it points at.
        unsafe { self.launch(module, &kernel, grid, true).run(&[&Packed(scan)]) }
    }

    /// The scan itself.
    ///
    /// # Safety
    /// As [`Launcher::scan`].
    pub(super) unsafe fn forward<E: Element>(&self, scan: Scan) -> Result<()> {
        let (name, grid) = match self.plan.shares {
            Some(Shares { blocks, .. }) => ("selective_scan_fwd_shares", [blocks, 1, 1]),
            None => ("selective_scan_fwd", [self.plan.columns(), self.sizes.batch, self.plan.chunks]),
        };
        let kernel = format!("{name}_{}_{}", E::NAME, self.plan.kernel());
        // SAFETY: the kernel takes one `Scan`; the caller vouches for what it points at.
        unsafe { self.launch(Module::ScanForward, &kernel, grid, true).run_early_spread(&[&Packed(scan)]) }
    }

    /// From what the pieces hand on to what they begin with, `initial` before the first (behind the last, going back).
    ///
    /// # Safety
    /// As [`Launcher::scan`].
    pub(super) unsafe fn carry(&self, scan: &Scan, initial: u64, back: bool) -> Result<()> {
        let Sizes { batch, channels, states, .. } = *self.sizes;
        let grid = [(channels * states).div_ceil(THREADS), batch, 1];
        let [batch, channels, states] = [batch, channels, states].map(|n| n as i32);
        let arguments: [&dyn Argument; 9] = [
            &scan.carried,
            &scan.span,
            &scan.a,
            &initial,
            &batch,
            &scan.slots,
            &channels,
            &states,
            &(back as i32),
        ];
        // SAFETY: the kernel's arguments in order; the caller vouches for the pointers.
        unsafe { self.plain(Module::ScanCarry, "selective_scan_carry", grid, &arguments) }
    }

    /// A kernel of `selective_scan_step.cu`.
    ///
    /// # Safety
    /// As [`Launch::run`].
    pub(super) unsafe fn step(&self, kernel: &str, grid: [usize; 3], argument: &dyn Argument) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch(Module::ScanStep, kernel, grid, false).run_early(&[argument]) }
    }

    /// A kernel that asks for no shared memory at launch.
    ///
    /// # Safety
    /// As [`Launch::run`].
    pub(super) unsafe fn plain(
        &self,
        module: Module,
        kernel: &str,
        grid: [usize; 3],
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch(module, kernel, grid, false).run(arguments) }
    }

    fn launch<'a>(&'a self, module: Module, kernel: &'a str, grid: [usize; 3], dynamic: bool) -> Launch<'a> {
        let threads = THREADS as u32;
        Launch { what: self.what, device: self.device, module, kernel, grid, threads, dynamic }
    }
}
