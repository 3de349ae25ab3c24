//! The program of a step: its phases and their weights, in the device's memory.

use super::kernels::{Kind, Matrix, Norm, Phase, Shape};
use super::layout::{Layout, shapes};
use super::weights::{self, Layer, Sizes, Weights, pointer};
use super::{MOST_ROWS, Pool, pointer_of};
use crate::Result;
use crate::backend::cuda::shared_memory;
use crate::ops::norm::NormKind;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

/// Phases of a layer.
pub(super) const EACH: usize = 4;

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

/// Structs of `kernels`.
pub(super) fn to_device<T: Copy>(table: &[T], device: &CudaDevice) -> Result<CudaSlice<u64>> {
    debug_assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() >= 8);
    // SAFETY: the structs of `kernels` are `Copy`, `repr(C)`, and all of their bytes are fields: whole pieces of 8 bytes.
    let pieces = unsafe {
        std::slice::from_raw_parts(table.as_ptr().cast::<u64>(), size_of_val(table) / size_of::<u64>())
    };
    Ok(device.clone_htod(pieces)?)
}

fn norm(norm: &weights::Norm) -> Norm {
    Norm {
        weight: norm.weight.pointer,
        bias: pointer(&norm.bias),
        layer: (norm.kind == NormKind::Layer) as i32,
        outside: (norm.kind == NormKind::RmsOutside) as i32,
        eps: norm.eps,
        padding: 0,
    }
}

impl Program {
    /// The program over a pool's states, words being where `places` say; none if the device has no room for one row.
    pub(super) fn new(
        weights: &Weights,
        pool: &[Pool],
        places: &[u64; 5],
        blocks: usize,
        device: &CudaDevice,
    ) -> Result<Option<Self>> {
        let (sizes, element) = (&weights.sizes, weights.dtype.size_in_bytes());
        let (mut phases, mut matrices) = (vec![], vec![]);
        for (index, (layer, pool)) in weights.layers.iter().zip(pool).enumerate() {
            for (shape, (phase, data)) in
                Self::layer(index, layer, pool, sizes, places).into_iter().enumerate()
            {
                phases.push(phase);
                matrices.push(Matrix { data, shape: shape as i32, padding: 0 });
            }
        }
        phases.push(Phase { kind: Kind::Head as i32, norm: norm(&weights.norm), ..Phase::default() });
        matrices.push(Matrix { data: weights.head.pointer, shape: EACH as i32, padding: 0 });
        let memory = shared_memory(device)?;
        let layout = |rows| Some((rows, Layout::new(sizes, element, phases.len(), rows, blocks, memory)?));
        let layouts: Vec<(usize, Layout)> = [1, 2, 4, MOST_ROWS].into_iter().map_while(layout).collect();
        if layouts.is_empty() {
            return Ok(None);
        }
        let shapes: [Shape; 5] = shapes(sizes, element, blocks);
        let counts = (phases.len(), shapes.len());
        let mut tables =
            [to_device(&phases, device)?, to_device(&matrices, device)?, to_device(&shapes, device)?];
        let stream = device.cuda_stream();
        let pointers = tables.each_mut().map(|table| pointer_of(table, &stream));
        Ok(Some(Self { _tables: tables, pointers, blocks, phases: counts.0, shapes: counts.1, layouts }))
    }

    /// A layer's phases and where their weights lie, in the order of [`shapes`].
    fn layer(
        index: usize,
        layer: &Layer,
        pool: &Pool,
        sizes: &Sizes,
        places: &[u64; 5],
    ) -> [(Phase, u64); EACH] {
        let [_, u, y, selected, _] = *places;
        let phase = |kind: Kind, from: u64, width: usize| Phase {
            kind: kind as i32,
            layer: index as i32,
            from,
            width: width as i32,
            ..Phase::default()
        };
        let mix = Phase {
            norm: norm(&layer.norm),
            bias: pointer(&layer.in_bias),
            taps: layer.taps.pointer,
            shift: pointer(&layer.shift),
            window: pool.window.pointer,
            ..phase(Kind::Mix, 0, sizes.hidden)
        };
        let state = Phase {
            a: layer.a.pointer,
            d: layer.d.pointer,
            dt_bias: layer.dt_bias.pointer,
            inner: [0, 1, 2].map(|kind: usize| pointer(&layer.inner_norms[kind])),
            state: pool.state.pointer,
            ..phase(Kind::State, selected, sizes.selected())
        };
        let add = Phase { bias: pointer(&layer.out_bias), ..phase(Kind::Add, y, sizes.channels) };
        [
            (mix, layer.in_proj.pointer),
            (phase(Kind::Select, u, sizes.channels), layer.x_proj.pointer),
            (state, layer.dt_proj.pointer),
            (add, layer.out_proj.pointer),
        ]
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
