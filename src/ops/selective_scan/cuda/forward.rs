//! The forward pass.

use super::call::{Launcher, Locks, contiguous};
use super::plan::KEPT;
use super::step::{Step, step};
use super::{Plans, Prepared, name};
use crate::Result;
use crate::backend::cuda::{Buffer, Element, Guards, Module, Packed, device_of};
use crate::ops::selective_scan::Sizes;

/// What a forward pass leaves.
pub(super) struct Scanned<E: Element> {
    /// `[B, L, D]`
    pub(super) y: Buffer<E>,
    /// `[B, D, N]`
    pub(super) state: Buffer<f32>,
    /// The states before every 16 tokens, `[B, L / 16, D, N]`, where asked for.
    pub(super) kept: Option<Buffer<f32>>,
    /// `y` before the gate, `[B, L, D]`, where states are kept and there is a gate.
    pub(super) ungated: Option<Buffer<E>>,
}

/// Scans; keeps states for the way back where asked.
pub(super) fn forward<E: Element>(
    prepared: &Prepared,
    sizes: &Sizes,
    plans: &Plans,
    keep: bool,
) -> Result<Scanned<E>> {
    let plan = if prepared.aligned(plans.aligned.part) { &plans.aligned } else { &plans.forward };
    let Sizes { batch, length, channels, states, .. } = *sizes;
    let device = &device_of(&prepared.u)?;
    let stream = device.cuda_stream();
    let numbers = batch * channels * states;
    let wide = |length| Buffer::<f32>::new(device, length);
    let mut y = Buffer::<E>::new(device, batch * length * channels)?;
    let mut state = wide(numbers)?;
    let mut kept = match keep {
        true => Some(wide(numbers * length.div_ceil(KEPT))?),
        false => None,
    };
    let mut ungated = match keep && prepared.z.is_some() {
        true => Some(Buffer::<E>::new(device, batch * length * channels)?),
        false => None,
    };
    let slots = plan.slots();
    let mut between = match plan.chunks > 1 {
        true => Some((wide(numbers * slots)?, wide(batch * slots * channels)?)),
        false => None,
    };
    let mut handed = match plan.shares {
        Some(_) => Some((wide(numbers)?, Buffer::<f32>::zeros(device, batch * plan.columns())?)),
        None => None,
    };
    let locks = Locks::new(&prepared.args(), prepared.marks.as_ref(), None);
    {
        let guards = &mut Guards::default();
        let mut scan = locks.scan::<E>(sizes, plan, prepared.softplus, device, &stream, guards)?;
        scan.y = contiguous(y.pointer(&stream, guards), sizes);
        scan.state = state.pointer(&stream, guards);
        scan.kept = kept.as_mut().map_or(0, |kept| kept.pointer(&stream, guards));
        scan.ungated = ungated.as_mut().map_or(0, |ungated| ungated.pointer(&stream, guards));
        let launch = Launcher { what: &name(sizes), device, sizes, plan };
        // SAFETY: `Locks` gives pointers and steps of tensors whose shapes were checked, and the buffers have the sizes
        // that the kernels fill.
        unsafe {
            if let (Some(Step { split, rows, blocks: [columns, turns] }), false) = (step(sizes), keep) {
                let kernel = |once: &str| format!("selective_scan_step_{once}{}_{split}_{rows}", E::NAME);
                let grid = [columns, turns, 1];
                match scan.one_token::<E>().filter(|_| turns * rows >= batch) {
                    Some(token) => launch.step(&kernel("once_"), grid, &Packed(token))?,
                    None => launch.step(&kernel(""), grid, &Packed(scan))?,
                }
            } else {
                if let Some((carried, span)) = &mut between {
                    scan.carried = carried.pointer(&stream, guards);
                    scan.span = span.pointer(&stream, guards);
                    launch.scan::<E>(Module::ScanCarry, "selective_scan_summary", scan, slots - 1)?;
                    launch.carry(&scan, scan.initial, false)?;
                }
                if let Some((carried, handed)) = &mut handed {
                    scan.carried = carried.pointer(&stream, guards);
                    scan.handed = handed.pointer(&stream, guards);
                }
                launch.forward::<E>(scan)?;
            }
        }
    }
    Ok(Scanned { y, state, kept, ungated })
}
