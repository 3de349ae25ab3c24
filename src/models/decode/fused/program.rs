//! The program of a step: its phases and their weights, in the device's memory.

use super::MOST_ROWS;
use super::blocks::Blocks;
use super::kernels::{Matrix, Shape};
use super::layout::{Layout, Plan};
use super::rooms::{Room, pointer_of};
use super::weights::Common;
use crate::Result;
use crate::backend::cuda::shared_memory;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

/// Phases, weights and shapes of a step, and the layouts that the device has room for.
pub(super) struct Program {
    _tables: [CudaSlice<u64>; 3],
    /// Where phases, weights and shapes lie.
    pub(super) pointers: [u64; 3],
    pub(super) blocks: usize,
    phases: usize,
    shapes: usize,
    /// For 1, 2, 4 and [`MOST_ROWS`] rows, as far as there is room.
    layouts: Vec<(usize, Layout)>,
}

/// A table of arguments of kernels in pieces of 8 bytes.
pub(super) fn pieces<T: Copy>(table: &[T]) -> &[u64] {
    debug_assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() >= 8);
    // SAFETY: the arguments are `Copy`, `repr(C)`, and all of their bytes are fields: whole pieces of 8 bytes.
    unsafe { std::slice::from_raw_parts(table.as_ptr().cast::<u64>(), size_of_val(table) / size_of::<u64>()) }
}

impl Program {
    /// The program over a pool's states, words being where `words` says; none if the device has no room for one row.
    pub(super) fn new(
        common: &Common,
        family: &dyn Blocks,
        pool: &[Vec<Room>],
        words: &[u64],
        blocks: usize,
        device: &CudaDevice,
    ) -> Result<Option<Self>> {
        let mut shapes = family.shapes(common, blocks);
        let each = shapes.len();
        shapes.push(Shape::new(common.element(), [1, common.vocabulary, common.hidden], 0));
        let matrix = |(i, [data, next]): (usize, [u64; 2])| Matrix::new(data, next, i % each);
        let mut matrices: Vec<Matrix> =
            family.matrices(common, pool).into_iter().enumerate().map(matrix).collect();
        matrices.push(Matrix::new(common.head.pointer, 0, each));
        let plan = Plan {
            hidden: common.hidden,
            element: common.element(),
            phases: matrices.len(),
            shapes: &shapes,
            blocks,
            memory: shared_memory(device)?,
        };
        let layout =
            |rows| Some((rows, Layout::new(&plan, rows, |split| family.needs(common, rows, split))?));
        let layouts: Vec<(usize, Layout)> = [1, 2, 4, MOST_ROWS].into_iter().map_while(layout).collect();
        if layouts.is_empty() {
            return Ok(None);
        }
        let mut tables = [
            device.clone_htod(&family.phases(common, pool, words))?,
            device.clone_htod(pieces(&matrices))?,
            device.clone_htod(pieces(&shapes))?,
        ];
        let stream = device.cuda_stream();
        let pointers = tables.each_mut().map(|table| pointer_of(table, &stream));
        Ok(Some(Self {
            _tables: tables,
            pointers,
            blocks,
            phases: matrices.len(),
            shapes: shapes.len(),
            layouts,
        }))
    }

    pub(super) fn phases(&self) -> usize {
        self.phases
    }

    pub(super) fn shapes(&self) -> usize {
        self.shapes
    }

    /// Rows that there is room for.
    pub(super) fn most_rows(&self) -> usize {
        self.layouts.last().map_or(0, |(rows, _)| *rows)
    }

    /// The layout for so many rows.
    pub(super) fn layout(&self, rows: usize) -> Option<&Layout> {
        self.layouts.iter().find(|(most, _)| *most >= rows).map(|(_, layout)| layout)
    }
}
