//! One lane of plain Rust: the sibling to read, and the one every machine has.

use super::{Real, Simd};

/// Needs no instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

impl<T: Real> Simd<T> for Scalar {
    type V = T;
    const LANES: usize = 1;

    #[inline(always)]
    fn splat(self, x: T) -> T {
        x
    }
    #[inline(always)]
    unsafe fn load(self, p: *const T) -> T {
        // SAFETY: the caller vouches for one value at p.
        unsafe { *p }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut T, v: T) {
        // SAFETY: the caller vouches for one value at p.
        unsafe { *p = v }
    }
    #[inline(always)]
    fn add(self, a: T, b: T) -> T {
        a + b
    }
    #[inline(always)]
    fn sub(self, a: T, b: T) -> T {
        a - b
    }
    #[inline(always)]
    fn mul(self, a: T, b: T) -> T {
        a * b
    }
    #[inline(always)]
    fn div(self, a: T, b: T) -> T {
        a / b
    }
    #[inline(always)]
    fn fma(self, a: T, b: T, c: T) -> T {
        a * b + c
    }
    #[inline(always)]
    fn nfma(self, a: T, b: T, c: T) -> T {
        c - a * b
    }
    #[inline(always)]
    fn max(self, a: T, b: T) -> T {
        if a > b { a } else { b }
    }
    #[inline(always)]
    fn min(self, a: T, b: T) -> T {
        if a < b { a } else { b }
    }
    #[inline(always)]
    fn sqrt(self, a: T) -> T {
        a.sqrt()
    }
    #[inline(always)]
    fn round(self, a: T) -> T {
        a.round_ties_even()
    }
    #[inline(always)]
    fn ldexp(self, a: T, k: T) -> T {
        a.ldexp(k)
    }
    #[inline(always)]
    fn sum(self, a: T) -> T {
        a
    }
}
