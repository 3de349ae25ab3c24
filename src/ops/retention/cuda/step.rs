//! The kernel of steps, `retention_step.cu`: from states to new ones, and through those of a pool.

use super::call::{Arguments, Launcher, Walk};
use super::plan;
use crate::backend::cuda::{Element, Launch, Module, Packed};
use crate::{Error, Result};

/// Values of a block.
const VALUES: usize = 32;
/// Keys of a thread, and how many threads share them.
const KEYS: usize = 8;
const ACROSS: usize = 8;

/// What a call through a pool does: `enum Mode` of `retention_step.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Its tokens stay.
    Step = 0,
    /// They do not.
    Draft = 1,
    /// The states take all that their rows have yet to give them.
    Fold = 2,
}

/// `struct Pool` of `retention_step.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slots {
    pub(super) slots: u64,
    pub(super) buffered: u64,
    pub(super) taken: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) decays: u64,
    pub(super) room: i32,
    pub(super) mode: i32,
}

/// `struct Step` of `retention_step.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Step {
    arguments: Arguments,
    slots: Slots,
}

impl Launcher<'_> {
    /// A step from the states of `arguments` to new ones.
    ///
    /// # Safety
    /// The pointers of `arguments` lead to what its sizes say.
    pub(super) unsafe fn step<E: Element>(&self, walk: &Walk, arguments: Arguments) -> Result<()> {
        // SAFETY: the caller's promise; without slots every row has its own state.
        unsafe { self.step_of_pool::<E, f32>(walk, arguments, Slots::default()) }
    }

    /// A step of sequences of `E` through a pool's states of `S`.
    ///
    /// # Safety
    /// As [`Launcher::step`], for `slots` too; and every slot is one of the pool, at most once.
    pub(super) unsafe fn step_of_pool<E: Element, S: Element>(
        &self,
        walk: &Walk,
        arguments: Arguments,
        slots: Slots,
    ) -> Result<()> {
        let [batch, _, heads, keys, values] = walk.dims()?;
        let room = plan::room(keys).ok_or_else(|| Error::value("retention: keys", "at most 512", keys))?;
        let grid = [values.div_ceil(VALUES), batch * heads, 1];
        let kernel = &format!("retention_step_{}_{}_{room}", E::NAME, S::NAME);
        let (what, device, module) = (self.what, self.device, Module::RetentionStep);
        let threads = (room / KEYS * ACROSS) as u32;
        let launch = Launch { what, device, module, kernel, grid, threads, dynamic: false };
        // SAFETY: the kernel takes one `Step`; the caller vouches for what it points at.
        unsafe { launch.run(&[&Packed(Step { arguments, slots })]) }
    }
}
