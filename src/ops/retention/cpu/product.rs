//! Products of matrices that lie row by row in slices.

use crate::backend::cpu::matrix::{Matrix, multiply};
use crate::backend::cpu::simd::Real;

/// `[rows, columns]` of a slice.
pub(super) fn rows<T>(data: &[T], rows: usize, columns: usize) -> Matrix<'_, T> {
    Matrix::new(data, [rows, columns], [columns, 1])
}

/// `y = a b`, or with `keep` `y = keep y + a b`; `y` is `[rows of a, columns of b]`.
pub(super) fn product<T: Real>(a: Matrix<T>, b: Matrix<T>, y: &mut [T], keep: Option<T>) {
    let ([m, k], [depth, n]) = (a.dims, b.dims);
    assert!(k == depth && y.len() >= m * n);
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: y holds m rows of n.
    unsafe { multiply(a, b, y.as_mut_ptr(), n, keep) }
}
