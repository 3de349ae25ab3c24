//! Matrices in CPU tensors, read where they lie, and their product on one thread by the crate gemm.

use super::simd::{Element, Real};
use crate::Result;
use candle_core::{Storage, StorageRef, Tensor};
use gemm::{Parallelism, gemm};
use std::marker::PhantomData;

/// The matrix of `tensor`'s rows (all dimensions but the last taken together): itself where the rows lie at one
/// distance, else a contiguous copy. To be held afterwards.
pub(crate) fn as_matrix(tensor: &Tensor) -> Result<Tensor> {
    Ok(if row_stride(tensor).is_some() { tensor.clone() } else { tensor.contiguous()? })
}

/// The distance of the rows, where there is one.
fn row_stride(tensor: &Tensor) -> Option<usize> {
    let (dims, strides) = (tensor.dims(), tensor.stride());
    let outer = dims.len().saturating_sub(1);
    let mut stride = None;
    let mut expected = 0;
    for (&n, &s) in dims[..outer].iter().zip(&strides[..outer]).rev().filter(|&(&n, _)| n != 1) {
        match stride {
            None => stride = Some(s),
            Some(_) if s != expected => return None,
            Some(_) => {}
        }
        expected = n * s;
    }
    // a single row, or none
    Some(stride.unwrap_or(0))
}

/// A tensor held for reading, its storage locked.
pub(crate) struct Held<'a> {
    storage: StorageRef<'a>,
    tensor: &'a Tensor,
}

impl<'a> Held<'a> {
    /// Locks the storage of a CPU tensor.
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        Self { storage: tensor.storage_and_layout().0, tensor }
    }

    /// The rows of a tensor that went through [`as_matrix`].
    pub(crate) fn matrix<E: Element>(&self) -> Result<Matrix<'_, E>> {
        let tensor = self.tensor;
        let columns = tensor.dims().last().copied().unwrap_or(1);
        let column_stride = tensor.stride().last().copied().unwrap_or(1);
        let Some(row_stride) = row_stride(tensor) else {
            return Err(candle_core::Error::msg("the rows lie at no one distance").into());
        };
        let rows = tensor.dims()[..tensor.rank().saturating_sub(1)].iter().product();
        let Storage::Cpu(storage) = &*self.storage else {
            return Err(candle_core::Error::msg(format!(
                "expected a tensor on the CPU, got one on {:?}",
                tensor.device()
            ))
            .into());
        };
        let start = tensor.layout().start_offset();
        let data = &E::cpu_storage_as_slice(storage)?[start..];
        Ok(Matrix::new(data, [rows, columns], [row_stride, column_stride]))
    }
}

/// A matrix: `[i, j]` lies `strides[0] i + strides[1] j` from the start.
pub(crate) struct Matrix<'a, E> {
    start: *const E,
    pub(crate) dims: [usize; 2],
    pub(crate) strides: [usize; 2],
    owner: PhantomData<&'a [E]>,
}

impl<E> Clone for Matrix<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Matrix<'_, E> {}

// SAFETY: it stands for a shared slice.
unsafe impl<E: Sync> Send for Matrix<'_, E> {}
// SAFETY: as above.
unsafe impl<E: Sync> Sync for Matrix<'_, E> {}

impl<'a, E> Matrix<'a, E> {
    /// Of `data`, which must hold all of it.
    pub(crate) fn new(data: &'a [E], dims: [usize; 2], strides: [usize; 2]) -> Self {
        if dims[0] > 0 && dims[1] > 0 {
            let last = (dims[0] - 1) * strides[0] + (dims[1] - 1) * strides[1];
            assert!(last < data.len(), "a matrix beyond its data");
        }
        Self { start: data.as_ptr(), dims, strides, owner: PhantomData }
    }

    /// Columns for rows.
    pub(crate) fn transposed(self) -> Self {
        let ([r, c], [rs, cs]) = (self.dims, self.strides);
        Self { dims: [c, r], strides: [cs, rs], ..self }
    }

    /// The part from `start` of `dims`; panics outside the matrix.
    pub(crate) fn part(self, start: [usize; 2], dims: [usize; 2]) -> Self {
        for i in 0..2 {
            assert!(start[i] + dims[i] <= self.dims[i], "a part beyond its matrix");
        }
        let offset = if dims[0] == 0 || dims[1] == 0 {
            0
        } else {
            start[0] * self.strides[0] + start[1] * self.strides[1]
        };
        // SAFETY: an element of the matrix, or the start of an empty one.
        Self { start: unsafe { self.start.add(offset) }, dims, ..self }
    }

    /// The first element, if there is any.
    pub(crate) fn as_ptr(&self) -> *const E {
        self.start
    }

    /// One element; panics outside the matrix.
    #[inline(always)]
    pub(crate) fn at(&self, i: usize, j: usize) -> &'a E {
        assert!(i < self.dims[0] && j < self.dims[1]);
        // SAFETY: an element of the data that `new` was given.
        unsafe { &*self.start.add(i * self.strides[0] + j * self.strides[1]) }
    }

    /// A row whose elements are neighbours; panics where they are not, or outside the matrix.
    pub(crate) fn row(&self, i: usize) -> &'a [E] {
        assert!(i < self.dims[0] && (self.strides[1] == 1 || self.dims[1] <= 1));
        // SAFETY: the row lies in the data that `new` was given.
        unsafe { std::slice::from_raw_parts(self.start.add(i * self.strides[0]), self.dims[1]) }
    }
}

impl<'a, E> Matrix<'a, E> {
    /// The same elements under another type's name.
    ///
    /// # Safety
    /// The two types are one.
    pub(crate) unsafe fn cast<F>(self) -> Matrix<'a, F> {
        Matrix { start: self.start.cast(), dims: self.dims, strides: self.strides, owner: PhantomData }
    }
}

/// `y = a b`, or with `keep` `y = keep y + a b`.
///
/// # Safety
/// `y` has a place for every element, rows `stride` apart, filled if it is to be kept.
pub(crate) unsafe fn multiply<T: Real>(
    a: Matrix<T>,
    b: Matrix<T>,
    y: *mut T,
    stride: usize,
    keep: Option<T>,
) {
    let ([m, k], [_, n]) = (a.dims, b.dims);
    let [[a_row, a_column], [b_row, b_column], [y_row, _]] =
        [a.strides, b.strides, [stride, 1]].map(|strides| strides.map(|stride| stride as isize));
    let (alpha, one, none) = (keep.unwrap_or(T::ZERO), T::ONE, Parallelism::None);
    // SAFETY: the matrices hold what their dims say, y by the caller's promise.
    unsafe {
        gemm(
            m,
            n,
            k,
            y,
            1,
            y_row,
            keep.is_some(),
            a.as_ptr(),
            a_column,
            a_row,
            b.as_ptr(),
            b_column,
            b_row,
            alpha,
            one,
            false,
            false,
            false,
            none,
        )
    }
}
