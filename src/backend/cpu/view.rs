//! Read access to the data of CPU tensors, rows strided as the tensor has them, without copies.

use super::memory;
use super::simd::{Element, Real, Simd};
use candle_core::{CpuStorage, Result, Shape, Storage, StorageRef, Tensor};
use std::marker::PhantomData;
use std::ops::Range;

/// A tensor held for reading: its storage locked, its last dimension contiguous.
///
/// Dimensions before the last may have any stride, so that a slice of a projection is read where it lies.
pub(crate) struct Held<'a> {
    storage: StorageRef<'a>,
    tensor: &'a Tensor,
}

/// `tensor` itself if its last dimension is contiguous, else a contiguous copy; to be held afterwards.
pub(crate) fn with_unit_stride(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.dims().last(), tensor.stride().last()) {
        (Some(&length), Some(&stride)) if stride != 1 && length > 1 => tensor.contiguous(),
        _ => Ok(tensor.clone()),
    }
}

impl<'a> Held<'a> {
    /// Locks the storage of a CPU tensor that went through [`with_unit_stride`].
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        Self { storage: tensor.storage_and_layout().0, tensor }
    }

    /// The data as rows of the last dimension.
    pub(crate) fn rows<E: Element>(&self) -> Result<Rows<'_, E>> {
        let Storage::Cpu(storage) = &*self.storage else {
            candle_core::bail!("expected a tensor on the CPU, got one on {:?}", self.tensor.device())
        };
        let data = E::cpu_storage_as_slice(storage)?;
        let layout = self.tensor.layout();
        let (dims, strides) = (layout.dims(), layout.stride());
        let last = dims.len().saturating_sub(1);
        let used = 1 + dims.iter().zip(strides).map(|(&n, &s)| n.saturating_sub(1) * s).sum::<usize>();
        let used = if layout.shape().elem_count() == 0 { 0 } else { used };
        // an empty slice may begin behind the end of its data
        let start = layout.start_offset().min(data.len());
        let data = &data[start..start + used];
        Ok(Rows { data, dims: &dims[..last], strides: &strides[..last], width: *dims.last().unwrap_or(&1) })
    }
}

/// The rows (last dimension) of a tensor, addressed by the indices of the dimensions before it.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, E> {
    data: &'a [E],
    dims: &'a [usize],
    strides: &'a [usize],
    width: usize,
}

impl<'a, E: Element> Rows<'a, E> {
    /// The row at `index`, one number for each dimension but the last; panics outside the tensor.
    #[inline(always)]
    pub(crate) fn row<const R: usize>(&self, index: [usize; R]) -> &'a [E] {
        assert_eq!(R, self.dims.len());
        let mut offset = 0;
        for ((&i, &n), &stride) in index.iter().zip(self.dims).zip(self.strides) {
            assert!(i < n);
            offset += i * stride;
        }
        &self.data[offset..offset + self.width]
    }

    /// The data from the row at `index` on, and how far apart the rows along dimension `along` lie; panics outside the
    /// tensor.
    pub(crate) fn from<const R: usize>(&self, index: [usize; R], along: usize) -> (&'a [E], usize) {
        assert_eq!(R, self.dims.len());
        assert!(index.iter().zip(self.dims).all(|(i, n)| i < n));
        let offset: usize = index.iter().zip(self.strides).map(|(i, stride)| i * stride).sum();
        (&self.data[offset..], self.strides[along])
    }

    /// The length of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// The number of rows.
    pub(crate) fn count(&self) -> usize {
        self.dims.iter().product()
    }

    /// The row of number `index` in the order of the dimensions; panics outside the tensor.
    #[inline(always)]
    pub(crate) fn nth(&self, mut index: usize) -> &'a [E] {
        let mut offset = 0;
        for (&n, &stride) in self.dims.iter().zip(self.strides).rev() {
            offset += index % n * stride;
            index /= n;
        }
        assert_eq!(index, 0);
        &self.data[offset..offset + self.width]
    }
}

/// The places of the registers that cover `range`, and how many lanes of each count: all, but for the last.
#[inline(always)]
pub(crate) fn lanes<T: Real, S: Simd<T>>(_: S, range: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let end = range.end;
    range.step_by(S::LANES).map(move |start| (start, S::LANES.min(end - start)))
}

/// `row[start..start + n]`, `n <= LANES`; zero in the other lanes.
#[inline(always)]
pub(crate) fn load<E: Element, S: Simd<E::Real>>(s: S, row: &[E], start: usize, n: usize) -> S::V {
    let from = &row[start..start + n];
    // SAFETY: `from` holds n values, LANES where that many are loaded.
    unsafe { if n == S::LANES { E::load(s, from.as_ptr()) } else { E::load_first(s, from.as_ptr(), n) } }
}

/// The first `n <= LANES` lanes to `to`, where there must be place for them.
#[inline(always)]
pub(crate) unsafe fn store<E: Element, S: Simd<E::Real>>(s: S, to: *mut E, n: usize, values: S::V) {
    // SAFETY: the caller's promise.
    unsafe { if n == S::LANES { E::store(s, to, values) } else { E::store_first(s, to, n, values) } }
}

/// The first `n <= LANES` lanes to `row[start..start + n]`.
#[inline(always)]
pub(crate) fn put<E: Element, S: Simd<E::Real>>(s: S, row: &mut [E], start: usize, n: usize, values: S::V) {
    // SAFETY: the slice holds n values.
    unsafe { store(s, row[start..start + n].as_mut_ptr(), n, values) }
}

/// A buffer that several threads fill, each its own part.
pub(crate) struct Outlet<'a, E> {
    start: *mut E,
    length: usize,
    owner: PhantomData<&'a mut [E]>,
}

// SAFETY: it is no more than a pointer; whoever writes through it vouches that no two threads write one place.
unsafe impl<E: Send> Sync for Outlet<'_, E> {}

impl<'a, E> Outlet<'a, E> {
    /// To overwrite `values`.
    pub(crate) fn new(values: &'a mut [E]) -> Self {
        Self { start: values.as_mut_ptr(), length: values.len(), owner: PhantomData }
    }

    /// To fill a vector of `length` values from scratch; its length is for the caller to set, once all are written.
    pub(crate) fn fresh(values: &'a mut Vec<E>, length: usize) -> Self {
        *values = memory::with_capacity(length);
        Self { start: values.as_mut_ptr(), length, owner: PhantomData }
    }

    /// The same, filled with zeros first if `zeroed`.
    pub(crate) fn fresh_or_zeroed(values: &'a mut Vec<E>, length: usize, zeroed: bool) -> Self
    where
        E: Element,
    {
        let outlet = Self::fresh(values, length);
        if zeroed {
            // SAFETY: there is room for `length` values; zero bits are a zero of every element type.
            unsafe { outlet.start.write_bytes(0, length) };
        }
        outlet
    }

    /// The place of `count` values from `offset`; panics outside the buffer.
    ///
    /// Writing there is sound while no other thread does.
    #[inline(always)]
    pub(crate) fn at(&self, offset: usize, count: usize) -> *mut E {
        assert!(offset <= self.length && count <= self.length - offset);
        // SAFETY: within the buffer.
        unsafe { self.start.add(offset) }
    }
}

/// A new CPU tensor of `data`.
pub(crate) fn tensor<E: Element>(data: Vec<E>, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cpu(storage(data)), shape, candle_core::op::BackpropOp::none(), false)
}

/// `data` as candle holds it.
pub(crate) fn storage<E: Element>(data: Vec<E>) -> CpuStorage {
    E::to_cpu_storage_owned(data)
}
