//! Complex numbers, a pair of registers each, and the butterflies of radix 2 to 5.

use crate::backend::cpu::simd::{Real, Simd};

/// A complex number a lane.
#[derive(Clone, Copy)]
pub(in super::super) struct Complex<V> {
    pub(in super::super) re: V,
    pub(in super::super) im: V,
}

impl<V: Copy> Complex<V> {
    /// `self w`
    #[inline(always)]
    pub(in super::super) fn times<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        let re = s.nfma(self.im, w.im, s.mul(self.re, w.re));
        let im = s.fma(self.im, w.re, s.mul(self.re, w.im));
        Self { re, im }
    }
    /// `self conj(w)`
    #[inline(always)]
    pub(in super::super) fn times_conjugate<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        let re = s.fma(self.im, w.im, s.mul(self.re, w.re));
        let im = s.nfma(self.re, w.im, s.mul(self.im, w.re));
        Self { re, im }
    }
    #[inline(always)]
    fn plus<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        Self { re: s.add(self.re, w.re), im: s.add(self.im, w.im) }
    }
    #[inline(always)]
    fn minus<T: Real, S: Simd<T, V = V>>(self, s: S, w: Self) -> Self {
        Self { re: s.sub(self.re, w.re), im: s.sub(self.im, w.im) }
    }
    /// `self + x w`, for real `x`
    #[inline(always)]
    fn plus_scaled<T: Real, S: Simd<T, V = V>>(self, s: S, x: T, w: Self) -> Self {
        Self { re: s.fma(s.splat(x), w.re, self.re), im: s.fma(s.splat(x), w.im, self.im) }
    }
    /// `i self`
    #[inline(always)]
    fn turned<T: Real, S: Simd<T, V = V>>(self, s: S) -> Self {
        Self { re: s.sub(s.splat(T::ZERO), self.im), im: self.re }
    }
    /// Real and imaginary part exchanged: a transform of such is the transform back, so exchanged.
    #[inline(always)]
    fn swapped(self) -> Self {
        Self { re: self.im, im: self.re }
    }
    /// From where the registers lie one after the other.
    ///
    /// # Safety
    /// `p` points at two registers.
    #[inline(always)]
    pub(in super::super) unsafe fn load<T: Real, S: Simd<T, V = V>>(s: S, p: *const T) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self { re: s.load(p), im: s.load(p.add(S::LANES)) } }
    }
    /// To where two registers have room.
    ///
    /// # Safety
    /// `p` points at two registers.
    #[inline(always)]
    pub(in super::super) unsafe fn store<T: Real, S: Simd<T, V = V>>(self, s: S, p: *mut T) {
        // SAFETY: the caller's promise.
        unsafe {
            s.store(p, self.re);
            s.store(p.add(S::LANES), self.im);
        }
    }
}

/// `sum_q a[q] w^(jq)` for every `j`, with `w = e^(2 pi i / R)`.
#[inline(always)]
fn butterfly<T: Real, S: Simd<T>, const R: usize>(s: S, a: &mut [Complex<S::V>; R]) {
    match R {
        2 => (a[0], a[1]) = (a[0].plus(s, a[1]), a[0].minus(s, a[1])),
        3 => {
            let (sum, difference) = (a[1].plus(s, a[2]), a[1].minus(s, a[2]));
            let middle = a[0].plus_scaled(s, T::from_f64(-0.5), sum);
            let turned = difference.turned(s);
            let sine = T::from_f64(0.75f64.sqrt());
            a[0] = a[0].plus(s, sum);
            a[1] = middle.plus_scaled(s, sine, turned);
            a[2] = middle.plus_scaled(s, -sine, turned);
        }
        4 => {
            let (even, odd) = (a[0].plus(s, a[2]), a[1].plus(s, a[3]));
            let (low, high) = (a[0].minus(s, a[2]), a[1].minus(s, a[3]));
            a[0] = even.plus(s, odd);
            a[2] = even.minus(s, odd);
            a[1] = Complex { re: s.sub(low.re, high.im), im: s.add(low.im, high.re) };
            a[3] = Complex { re: s.add(low.re, high.im), im: s.sub(low.im, high.re) };
        }
        5 => {
            let turn = |k: f64| (k * std::f64::consts::TAU / 5.0).sin_cos();
            let [(s1, c1), (s2, c2)] = [turn(1.0), turn(2.0)];
            let [s1, c1, s2, c2] = [s1, c1, s2, c2].map(T::from_f64);
            let (p1, p2) = (a[1].plus(s, a[4]), a[2].plus(s, a[3]));
            let (m1, m2) = (a[1].minus(s, a[4]).turned(s), a[2].minus(s, a[3]).turned(s));
            let zero = Complex { re: s.splat(T::ZERO), im: s.splat(T::ZERO) };
            let middle = [
                a[0].plus_scaled(s, c1, p1).plus_scaled(s, c2, p2),
                a[0].plus_scaled(s, c2, p1).plus_scaled(s, c1, p2),
            ];
            let side = [
                zero.plus_scaled(s, s1, m1).plus_scaled(s, s2, m2),
                zero.plus_scaled(s, s2, m1).plus_scaled(s, -s1, m2),
            ];
            a[0] = a[0].plus(s, p1).plus(s, p2);
            (a[1], a[4]) = (middle[0].plus(s, side[0]), middle[0].minus(s, side[0]));
            (a[2], a[3]) = (middle[1].plus(s, side[1]), middle[1].minus(s, side[1]));
        }
        _ => {}
    }
}

#[inline(always)]
pub(super) fn forward<T: Real, S: Simd<T>, const R: usize>(
    s: S,
    a: &mut [Complex<S::V>; R],
    w: &[Complex<S::V>; R],
) {
    for q in 1..R {
        a[q] = a[q].times(s, w[q]);
    }
    butterfly(s, a);
}

#[inline(always)]
pub(super) fn backward<T: Real, S: Simd<T>, const R: usize>(
    s: S,
    a: &mut [Complex<S::V>; R],
    w: &[Complex<S::V>; R],
) {
    *a = a.map(Complex::swapped);
    butterfly(s, a);
    *a = a.map(Complex::swapped);
    for q in 1..R {
        a[q] = a[q].times_conjugate(s, w[q]);
    }
}
