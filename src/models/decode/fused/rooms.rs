//! Memory of a decoder that stays where it is, so that a step can be recorded once.

use super::MOST_ROWS;
use crate::Result;
use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use std::sync::Arc;

/// Copies of all words, so that not all blocks ask for the same lines of L2: `COPIES` of `decode.cuh`.
const WORD_COPIES: usize = 4;
/// Marks that words bear before all of them are taken back.
const MOST_MARKS: usize = 1 << 31;

/// Memory that stays where it is.
pub(super) struct Room {
    pub(super) slice: CudaSlice<f32>,
    pub(super) pointer: u64,
}

/// The words that pass between blocks, for [`MOST_ROWS`] rows, and the marks that they bear.
pub(super) struct Words {
    pub(super) slice: CudaSlice<u64>,
    /// The kernel's mark, and how many of its blocks are done.
    epoch: CudaSlice<u32>,
    pub(super) epoch_pointer: u64,
    /// Where the stream, the best logits and the family's own begin in the first copy; words of a copy.
    pub(super) stream: u64,
    pub(super) best: u64,
    pub(super) own: Vec<u64>,
    pub(super) apart: usize,
    /// Marks since they were zeros.
    marks: usize,
}

/// The tokens behind which rows end, a bit each of the vocabulary.
pub(super) struct Stops {
    ids: Vec<u32>,
    slice: CudaSlice<u32>,
    pointer: u64,
}

/// What drafts leave, for [`MOST_ROWS`] rows, of each layer.
pub(super) struct Drafts {
    _rooms: Vec<Vec<Room>>,
    _table: CudaSlice<u64>,
    pub(super) pointer: u64,
}

impl Room {
    pub(super) fn zeros(device: &CudaDevice, stream: &CudaStream, numbers: usize) -> Result<Self> {
        let mut slice = device.alloc_zeros::<f32>(numbers.max(1))?;
        let pointer = pointer_of(&mut slice, stream);
        Ok(Self { slice, pointer })
    }
}

pub(super) fn pointer_of<T>(slice: &mut CudaSlice<T>, stream: &CudaStream) -> u64 {
    use candle_core::cuda_backend::cudarc::driver::DevicePtrMut;
    slice.device_ptr_mut(stream).0
}

impl Words {
    /// Words of a row: of the stream, the best logits, and the family's own.
    pub(super) fn new(widths: &[usize], device: &CudaDevice, stream: &CudaStream) -> Result<Self> {
        // pairs of words are whole pieces of 16 bytes
        let counts: Vec<usize> = widths.iter().map(|width| (MOST_ROWS * width).next_multiple_of(2)).collect();
        let apart = counts.iter().sum();
        let mut slice = device.alloc_zeros::<u64>(WORD_COPIES * apart)?;
        let mut place = pointer_of(&mut slice, stream);
        let mut places = counts.into_iter().map(|count| {
            let own = place;
            place += (count * size_of::<u64>()) as u64;
            own
        });
        let (first, best) = (places.next().unwrap_or(0), places.next().unwrap_or(0));
        let own = places.collect();
        let mut epoch = device.alloc_zeros::<u32>(2)?;
        let epoch_pointer = pointer_of(&mut epoch, stream);
        Ok(Self { slice, epoch, epoch_pointer, stream: first, best, own, apart, marks: 0 })
    }

    /// Room for so many marks more: none comes twice as long as a word may bear it.
    pub(super) fn advance(&mut self, marks: usize, stream: &Arc<CudaStream>) -> Result<()> {
        if self.marks + marks > MOST_MARKS {
            let fail = |error| crate::backend::cuda::failed("decoder: clearing its words", error);
            stream.memset_zeros(&mut self.slice).map_err(fail)?;
            stream.memset_zeros(&mut self.epoch).map_err(fail)?;
            self.marks = 0;
        }
        self.marks += marks;
        Ok(())
    }
}

impl Stops {
    pub(super) fn new(vocabulary: usize, device: &CudaDevice, stream: &CudaStream) -> Result<Self> {
        let mut slice = device.alloc_zeros::<u32>(vocabulary.div_ceil(u32::BITS as usize))?;
        let pointer = pointer_of(&mut slice, stream);
        Ok(Self { ids: vec![], slice, pointer })
    }

    /// Where their bits lie; null if there are none. Those that were last set are there already.
    pub(super) fn set(&mut self, ids: &[u32], device: &CudaDevice) -> Result<u64> {
        if !ids.is_empty() && self.ids != ids {
            let mut bits = vec![0u32; self.slice.len()];
            for id in ids {
                if let Some(word) = bits.get_mut((id / u32::BITS) as usize) {
                    *word |= 1 << (id % u32::BITS);
                }
            }
            device.memcpy_htod(&bits, &mut self.slice)?;
            self.ids = ids.to_vec();
        }
        Ok(if ids.is_empty() { 0 } else { self.pointer })
    }
}

impl Drafts {
    /// Rooms of so many bytes a row, for each layer.
    pub(super) fn new(
        bytes: &[usize],
        layers: usize,
        device: &CudaDevice,
        stream: &CudaStream,
    ) -> Result<Self> {
        let room =
            |bytes: &usize| Room::zeros(device, stream, (MOST_ROWS * bytes).div_ceil(size_of::<f32>()));
        let layer = |_| bytes.iter().map(room).collect::<Result<Vec<Room>>>();
        let rooms: Vec<Vec<Room>> = (0..layers).map(layer).collect::<Result<_>>()?;
        let table: Vec<u64> = rooms.iter().flatten().map(|room| room.pointer).collect();
        let mut table = device.clone_htod(&table)?;
        let pointer = pointer_of(&mut table, stream);
        Ok(Self { _rooms: rooms, _table: table, pointer })
    }
}
