//! Vectorised functions, in any instruction set and for f32 and f64.
//!
//! Bounds (checked by the tests of this module over the whole range; one ulp is 6e-8 in f32, 1.1e-16 in f64):
//!
//! | function | relative error f32 / f64 | range |
//! |---|---|---|
//! | [`exp2`] | 3 ulp / 3 ulp | all; below 2^-125 (2^-1021) the result may be zero |
//! | [`exp`] | 3 ulp / 3 ulp | all; the same |
//! | [`sigmoid`], [`silu`] | 5 ulp / 5 ulp | all; the same |
//! | [`softplus`] | 6 ulp / 6 ulp | all: log(1 + e^x) without overflow, relative accuracy in both tails |
//! | [`gelu`], [`gelu_tanh`] | 6 ulp / 6 ulp of the larger of 1 and the result | all |
//!
//! NaN gives NaN. The base 2 form is exact at 0, so a decay with zero step is exactly 1.

use super::simd::{Real, Simd};

/// 2^r for |r| <= 1/2.
#[inline(always)]
fn exp2_fraction<T: Real, S: Simd<T>>(s: S, r: S::V) -> S::V {
    polynomial(s, T::EXP2, r)
}

/// Horner's rule; `coefficients` from the lowest power.
#[inline(always)]
fn polynomial<T: Real, S: Simd<T>>(s: S, coefficients: &[T], x: S::V) -> S::V {
    let mut sum = s.splat(coefficients[coefficients.len() - 1]);
    for &c in coefficients.iter().rev().skip(1) {
        sum = s.fma(sum, x, s.splat(c));
    }
    sum
}

/// `x` held within +- `limit`; NaN stays NaN.
#[inline(always)]
fn clamp<T: Real, S: Simd<T>>(s: S, x: S::V, limit: T) -> S::V {
    s.max(s.splat(-limit), s.min(s.splat(limit), x))
}

/// 2^x.
#[inline(always)]
pub(crate) fn exp2<T: Real, S: Simd<T>>(s: S, x: S::V) -> S::V {
    let x = clamp(s, x, T::EXP2_LIMIT);
    let k = s.round(x);
    s.ldexp(exp2_fraction(s, s.sub(x, k)), k)
}

/// e^x.
#[inline(always)]
pub(crate) fn exp<T: Real, S: Simd<T>>(s: S, x: S::V) -> S::V {
    let x = clamp(s, x, T::EXP2_LIMIT * T::LN_2_HI);
    let k = s.round(s.mul(x, s.splat(T::LOG2_E)));
    let r = s.nfma(k, s.splat(T::LN_2_HI), x);
    let r = s.nfma(k, s.splat(T::LN_2_LO), r);
    s.ldexp(exp2_fraction(s, s.mul(r, s.splat(T::LOG2_E))), k)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<T: Real, S: Simd<T>>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.splat(T::ZERO), x));
    s.div(s.splat(T::ONE), s.add(s.splat(T::ONE), e))
}

/// x / (1 + e^-x), also called swish.
#[inline(always)]
pub(crate) fn silu<T: Real, S: Simd<T>>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}

/// d silu / dx, given x and sigmoid(x).
#[inline(always)]
pub(crate) fn silu_grad<T: Real, S: Simd<T>>(s: S, x: S::V, sigmoid: S::V) -> S::V {
    let one = s.splat(T::ONE);
    s.mul(sigmoid, s.fma(x, s.sub(one, sigmoid), one))
}

/// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(y) = 2 atanh(y / (2 + y)).
#[inline(always)]
pub(crate) fn softplus<T: Real, S: Simd<T>>(s: S, x: S::V) -> S::V {
    let zero = s.splat(T::ZERO);
    let y = exp(s, s.min(s.sub(zero, x), x));
    let q = s.div(y, s.add(s.splat(T::ONE + T::ONE), y));
    let log = s.mul(s.add(q, q), polynomial(s, T::ATANH, s.mul(q, q)));
    s.add(s.max(zero, x), log)
}

/// P(X > |x|) of a standard normal X: erfc(|x| / sqrt 2) / 2.
#[inline(always)]
fn normal_tail<T: Real, S: Simd<T>>(s: S, x: S::V) -> S::V {
    let x = s.max(s.sub(s.splat(T::ZERO), x), x);
    let z = s.min(s.splat(T::ERFC_LIMIT), s.mul(x, s.splat(T::from_f64(std::f64::consts::FRAC_1_SQRT_2))));
    let two = s.splat(T::ONE + T::ONE);
    let t = s.div(two, s.add(two, z));
    let [slope, offset] = T::ERFC_MAP;
    let p = polynomial(s, T::ERFC, s.fma(t, s.splat(slope), s.splat(offset)));
    let e = exp(s, s.nfma(z, z, p));
    s.mul(s.mul(t, e), s.splat(T::from_f64(0.5)))
}

/// x P(X < x) of a standard normal X, the exact GELU, and its derivative.
#[inline(always)]
pub(crate) fn gelu<T: Real, S: Simd<T>>(s: S, x: S::V) -> [S::V; 2] {
    let (zero, one) = (s.splat(T::ZERO), s.splat(T::ONE));
    let tail = normal_tail(s, x);
    let magnitude = s.max(s.sub(zero, x), x);
    // beyond the limit the tail is zero, and infinity times zero would be no number
    let held = s.min(s.splat(T::ERFC_LIMIT * T::from_f64(2.0)), magnitude);
    let value = s.nfma(held, tail, s.max(zero, x));
    // one for positive x, else zero
    let step = s.max(zero, s.min(one, s.mul(x, s.splat(T::from_f64(1e30)))));
    let below = s.nfma(s.sub(s.add(step, step), one), tail, step);
    let density = exp(s, s.mul(s.mul(held, held), s.splat(T::from_f64(-0.5))));
    let density = s.mul(density, s.splat(T::from_f64(0.398_942_280_401_432_7)));
    [value, s.fma(clamp(s, x, T::ERFC_LIMIT * T::from_f64(2.0)), density, below)]
}

/// The GELU by its approximation x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative.
#[inline(always)]
pub(crate) fn gelu_tanh<T: Real, S: Simd<T>>(s: S, x: S::V) -> [S::V; 2] {
    let one = s.splat(T::ONE);
    let factor = s.splat(T::from_f64(2.0 * 0.797_884_560_802_865_4));
    let cubic = T::from_f64(0.044_715);
    // where the sigmoid has long been 0 or 1, the cube may not overflow
    let held = clamp(s, x, T::from_f64(40.0));
    let square = s.mul(held, held);
    let u = s.mul(s.mul(factor, held), s.fma(square, s.splat(cubic), one));
    let gate = sigmoid(s, u);
    let inner = s.mul(factor, s.fma(square, s.splat(cubic * T::from_f64(3.0)), one));
    let slope = s.mul(s.mul(s.mul(held, gate), s.sub(one, gate)), inner);
    let beyond = s.max(s.splat(T::ZERO), s.sub(x, held));
    [s.fma(held, gate, beyond), s.add(gate, slope)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::{Isa, Kernel};

    /// Applies one function to a slice.
    struct Map<'a, T>(&'static str, &'a [T], &'a mut [T]);

    impl<T: Real> Kernel<T> for Map<'_, T> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd<T>>(self, s: S) {
            for (x, y) in self.1.chunks(S::LANES).zip(self.2.chunks_mut(S::LANES)) {
                // SAFETY: both pointers hold x.len() <= LANES values.
                unsafe {
                    let v = s.load_first(x.as_ptr(), x.len());
                    let v = match self.0 {
                        "exp2" => exp2(s, v),
                        "exp" => exp(s, v),
                        "sigmoid" => sigmoid(s, v),
                        "silu" => silu(s, v),
                        "gelu" => gelu(s, v)[0],
                        "gelu_tanh" => gelu_tanh(s, v)[0],
                        _ => softplus(s, v),
                    };
                    s.store_first(y.as_mut_ptr(), x.len(), v);
                }
            }
        }
    }

    fn exact(name: &str, x: f64) -> f64 {
        match name {
            "exp2" => x.exp2(),
            "exp" => x.exp(),
            "sigmoid" => 1.0 / (1.0 + (-x).exp()),
            "silu" => x / (1.0 + (-x).exp()),
            _ => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        }
    }

    fn check<T: Real + std::fmt::Debug>(ulp: f64, normal: f64, range: f64) {
        let xs: Vec<T> = (0..40_007)
            .map(|i| T::from_f64(range * (i as f64 / 20_003.0 - 1.0) * if i % 3 == 0 { 0.01 } else { 1.0 }))
            .collect();
        for &isa in Isa::available() {
            for (name, bound) in
                [("exp2", 3.0), ("exp", 3.0), ("sigmoid", 5.0), ("silu", 5.0), ("softplus", 6.0)]
            {
                let mut ys = vec![T::ZERO; xs.len()];
                T::dispatch_on(isa, Map(name, &xs, &mut ys));
                for (x, y) in xs.iter().zip(&ys) {
                    let want = exact(name, x.to_f64());
                    let error = (y.to_f64() - want).abs();
                    assert!(
                        error <= bound * ulp * want.abs() + normal,
                        "{isa:?} {name}({x:?}) = {y:?}, want {want}, off by {} ulp",
                        error / want.abs() / ulp
                    );
                }
            }
        }
    }

    #[test]
    fn bounds_hold_in_every_instruction_set() {
        check::<f32>(2f64.powi(-24), 2f64.powi(-124), 86.0);
        check::<f64>(2f64.powi(-53), 2f64.powi(-1020), 700.0);
    }

    fn check_gelu<T: Real + std::fmt::Debug>(ulp: f64) {
        let xs: Vec<T> = (0..40_007).map(|i| T::from_f64(14.0 * (i as f64 / 20_003.0 - 1.0))).collect();
        let exact = |x: f64| 0.5 * x * candle_core::cpu::erf::erfc_f64(-x / 2f64.sqrt());
        let tanh = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh());
        for &isa in Isa::available() {
            for (name, exact) in [("gelu", &exact as &dyn Fn(f64) -> f64), ("gelu_tanh", &tanh)] {
                let mut ys = vec![T::ZERO; xs.len()];
                T::dispatch_on(isa, Map(name, &xs, &mut ys));
                for (x, y) in xs.iter().zip(&ys) {
                    let want = exact(x.to_f64());
                    let error = (y.to_f64() - want).abs();
                    assert!(
                        error <= 6.0 * ulp * want.abs().max(1.0),
                        "{isa:?} {name}({x:?}) = {y:?}, want {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn gelu_is_exact_in_every_instruction_set() {
        check_gelu::<f32>(2f64.powi(-24));
        check_gelu::<f64>(2f64.powi(-53));
    }

    #[test]
    fn extremes_saturate_and_nan_stays() {
        for &isa in Isa::available() {
            let xs = [0.0f32, -0.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40];
            let run = |name| {
                let mut ys = [0f32; 8];
                f32::dispatch_on(isa, Map(name, &xs, &mut ys));
                ys
            };
            for name in ["exp", "exp2"] {
                let ys = run(name);
                assert_eq!(ys[..6], [1.0, 1.0, f32::INFINITY, 0.0, f32::INFINITY, 0.0], "{isa:?}");
                assert!(ys[6].is_nan() && ys[7] == 1.0);
            }
            let ys = run("softplus");
            assert_eq!(ys[2], 1e30);
            assert_eq!(ys[3], 0.0);
            assert!(ys[6].is_nan());
            for name in ["gelu", "gelu_tanh"] {
                let ys = run(name);
                assert_eq!((ys[2], ys[4]), (1e30, f32::INFINITY), "{isa:?} {name}");
                assert!([0, 1, 3, 5, 7].iter().all(|&i| ys[i].abs() < 1e-39), "{isa:?} {name} {ys:?}");
                assert!(ys[6].is_nan());
            }
            let ys = run("sigmoid");
            assert_eq!((ys[2], ys[3]), (1.0, 0.0));
            assert!(ys[6].is_nan());
        }
    }
}
