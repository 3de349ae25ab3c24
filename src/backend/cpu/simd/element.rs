//! What a tensor holds ([`Element`]) and what is computed with ([`Real`]).

use super::{Isa, Kernel, Simd, dispatch_on, load_each, store_each};
use candle_core::WithDType;
use half::{bf16, f16};
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// A type to compute in: f32 or f64.
pub(crate) trait Real:
    Element<Real = Self>
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// log2 e
    const LOG2_E: Self;
    /// The high part of ln 2: its product with any exponent is exact.
    const LN_2_HI: Self;
    /// ln 2 less its high part.
    const LN_2_LO: Self;
    /// Arguments of exp2 beyond +- this are clamped to it; it lies beyond overflow and underflow.
    const EXP2_LIMIT: Self;
    /// Minimax coefficients of 2^r on [-1/2, 1/2], lowest power first; the lowest is 1.
    const EXP2: &'static [Self];
    /// Minimax coefficients of atanh(s)/s in s^2 on [0, 1/9], lowest power first; the lowest is 1.
    const ATANH: &'static [Self];
    /// Chebyshev fit, as powers, of log(erfc(z) / t) + z^2 in [`Self::ERFC_MAP`] of t = 2 / (2 + z).
    const ERFC: &'static [Self];
    /// Slope and offset that map t to [-1, 1].
    const ERFC_MAP: [Self; 2];
    /// The largest z of the fit: erfc is zero beyond.
    const ERFC_LIMIT: Self;

    /// The square root.
    fn sqrt(self) -> Self;
    /// The nearest integer, ties to even.
    fn round_ties_even(self) -> Self;
    /// `self 2^k` for integral k, as [`Simd::ldexp`].
    fn ldexp(self, k: Self) -> Self;
    /// Runs `kernel` on `isa`, or on plain Rust where this machine lacks it.
    fn dispatch_on<K: Kernel<Self>>(isa: Isa, kernel: K) -> K::Output;
}

/// A type tensors are stored in: f32, f64, bf16, f16. The two halves are computed with in f32.
pub(crate) trait Element: WithDType {
    /// The type to compute in.
    type Real: Real;
    /// Widens.
    fn widen(self) -> Self::Real;
    /// Rounds to nearest, ties to even.
    fn narrow(x: Self::Real) -> Self;
    /// `LANES` values from `p`, widened.
    unsafe fn load<S: Simd<Self::Real>>(simd: S, p: *const Self) -> S::V;
    /// `LANES` values to `p`, rounded.
    unsafe fn store<S: Simd<Self::Real>>(simd: S, p: *mut Self, v: S::V);
    /// The first `n <= LANES` values from `p`, widened; zero in the other lanes.
    #[inline(always)]
    unsafe fn load_first<S: Simd<Self::Real>>(simd: S, p: *const Self, n: usize) -> S::V {
        // SAFETY: the caller vouches for n values at p.
        unsafe { load_each(simd, p, n, Self::widen) }
    }
    /// The first `n <= LANES` lanes to `p`, rounded.
    #[inline(always)]
    unsafe fn store_first<S: Simd<Self::Real>>(simd: S, p: *mut Self, n: usize, v: S::V) {
        // SAFETY: the caller vouches for n values at p.
        unsafe { store_each(simd, p, n, v, Self::narrow) }
    }
}

macro_rules! real {
    ($t:ty, $bits:ty, $int:ty, $mantissa:expr, $bias:expr, { $($constants:item)* }) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            $($constants)*

            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn round_ties_even(self) -> Self {
                <$t>::round_ties_even(self)
            }
            #[inline(always)]
            fn ldexp(self, k: Self) -> Self {
                // 2^(k-1), then doubled: k up to bias + 1 without overflow on the way
                let exponent = (k as $int + ($bias - 1)).clamp(0, 2 * $bias);
                self * <$t>::from_bits((exponent as $bits) << $mantissa) * 2.0
            }
            dispatch_on!($t);
        }

        impl Element for $t {
            type Real = $t;
            #[inline(always)]
            fn widen(self) -> $t {
                self
            }
            #[inline(always)]
            fn narrow(x: $t) -> Self {
                x
            }
            #[inline(always)]
            unsafe fn load<S: Simd<$t>>(simd: S, p: *const Self) -> S::V {
                // SAFETY: the caller's promise, passed on.
                unsafe { simd.load(p) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd<$t>>(simd: S, p: *mut Self, v: S::V) {
                // SAFETY: the caller's promise, passed on.
                unsafe { simd.store(p, v) }
            }
            #[inline(always)]
            unsafe fn load_first<S: Simd<$t>>(simd: S, p: *const Self, n: usize) -> S::V {
                // SAFETY: the caller's promise, passed on.
                unsafe { simd.load_first(p, n) }
            }
            #[inline(always)]
            unsafe fn store_first<S: Simd<$t>>(simd: S, p: *mut Self, n: usize, v: S::V) {
                // SAFETY: the caller's promise, passed on.
                unsafe { simd.store_first(p, n, v) }
            }
        }
    };
}

real!(f32, u32, i32, 23, 127, {
    const LOG2_E: Self = std::f32::consts::LOG2_E;
    const LN_2_HI: Self = 0.693_359_4;
    const LN_2_LO: Self = -2.121_944_4e-4;
    const EXP2_LIMIT: Self = 150.0;
    const EXP2: &'static [Self] = &[
        1.0,
        std::f32::consts::LN_2,
        0.240_226_47,
        0.055_503_287,
        0.009_618_489,
        0.001_339_993,
        0.000_153_457_8,
    ];
    const ATANH: &'static [Self] = &[1.0, 0.333_333_4, 0.199_993_45, 0.143_103_6, 0.106_966_35, 0.122_064_99];
    const ERFC: &'static [Self] = &[
        -0.558_595_36,
        0.570_307_1,
        0.015_745_074,
        -0.029_470_338,
        -0.001_045_551_8,
        0.003_707_476_7,
        -0.000_275_961_15,
        -0.000_534_320_6,
        0.000_129_868_22,
        5.486_024_7e-5,
        -2.285_577e-5,
    ];
    const ERFC_MAP: [Self; 2] = [2.4, -1.4];
    const ERFC_LIMIT: Self = 10.0;
});

real!(f64, u64, i64, 52, 1023, {
    const LOG2_E: Self = std::f64::consts::LOG2_E;
    const LN_2_HI: Self = 6.931_471_803_691_238e-1;
    const LN_2_LO: Self = 1.908_214_929_270_587_7e-10;
    const EXP2_LIMIT: Self = 1100.0;
    const EXP2: &'static [Self] = &[
        1.0,
        std::f64::consts::LN_2,
        0.240_226_506_959_101_55,
        0.055_504_108_664_819_925,
        0.009_618_129_107_587_348,
        0.001_333_355_814_678_877_4,
        0.000_154_035_304_624_988_2,
        0.000_015_252_733_491_096_09,
        1.321_543_309_730_757_4e-6,
        1.017_819_755_844_643e-7,
        7.074_104_341_827_516e-9,
        4.435_452_351_864_883_4e-10,
    ];
    const ATANH: &'static [Self] = &[
        1.0,
        0.333_333_333_333_333_3,
        0.200_000_000_000_001_37,
        0.142_857_142_856_872_23,
        0.111_111_111_138_732_65,
        0.090_909_089_234_024_66,
        0.076_923_141_980_224_75,
        0.066_664_978_905_928_25,
        0.058_853_359_530_373_725,
        0.052_272_224_184_437_89,
        0.050_505_942_839_954_354,
        0.028_875_519_383_974_48,
        0.080_440_177_422_944_57,
    ];
    const ERFC: &'static [Self] = &[
        -0.625_988_355_117_740_3,
        0.632_411_109_638_832_8,
        0.032_640_568_259_383_815,
        -0.039_822_372_181_287_72,
        -0.005_124_254_593_180_361,
        0.006_556_208_728_579_815,
        0.000_422_590_074_565_546_3,
        -0.001_418_218_901_760_098,
        0.000_135_302_548_717_293_92,
        0.000_303_739_257_612_069_5,
        -9.904_795_632_541_807e-5,
        -4.998_464_227_333_072e-5,
        3.749_911_882_128_683e-5,
        1.795_364_359_933_252e-6,
        -9.735_953_633_099_282e-6,
        2.585_180_171_444_286_6e-6,
        1.506_394_878_580_380_3e-6,
        -1.121_659_549_685_113_6e-6,
        2.783_467_451_243_062_3e-8,
        2.558_718_482_876_424e-7,
        -8.726_927_342_392_335e-8,
        -3.184_211_127_474_446e-8,
        2.268_944_191_543_018_3e-8,
        1.466_760_622_421_389_3e-9,
        -2.311_513_232_143_239e-9,
    ];
    const ERFC_MAP: [Self; 2] = [2.145_454_545_454_545_5, -1.145_454_545_454_545_5];
    const ERFC_LIMIT: Self = 27.5;
});

macro_rules! half {
    ($t:ty, $load:ident, $store:ident) => {
        impl Element for $t {
            type Real = f32;
            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(x: f32) -> Self {
                <$t>::from_f32(x)
            }
            #[inline(always)]
            unsafe fn load<S: Simd<f32>>(simd: S, p: *const Self) -> S::V {
                // SAFETY: the caller's promise, passed on.
                unsafe { simd.$load(p) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd<f32>>(simd: S, p: *mut Self, v: S::V) {
                // SAFETY: the caller's promise, passed on.
                unsafe { simd.$store(p, v) }
            }
        }
    };
}

half!(bf16, load_bf16, store_bf16);
half!(f16, load_f16, store_f16);
