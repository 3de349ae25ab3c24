//! Explicit SIMD, chosen at run time.
//!
//! A kernel is written once, generic over an instruction set `S: Simd<T>`, and started through [`dispatch`], which
//! compiles it once per set (AVX-512, AVX2, NEON, scalar) and picks the widest that this machine has. Siblings
//! implement the same operations under the same names; [`scalar`] is the one to read.
//!
//! An instruction-set token ([`avx512::Avx512`], ...) is made only by [`dispatch_on`] after the CPU has been asked, so
//! holding one is the proof that its instructions exist. Arithmetic is therefore safe; loads and stores take pointers
//! and are not.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod element;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

pub(crate) use element::{Element, Real};

use half::{bf16, f16};

/// The widest register, in lanes, of any instruction set and scalar type.
pub(crate) const MAX_LANES: usize = 16;

/// The operations of one instruction set on registers of `T`.
pub(crate) trait Simd<T: Real>: Copy + Send + Sync + 'static {
    /// A register.
    type V: Copy + Send + Sync;
    /// How many `T` it holds.
    const LANES: usize;

    /// All lanes `x`.
    fn splat(self, x: T) -> Self::V;
    /// `LANES` values from `p`, which needs no alignment.
    unsafe fn load(self, p: *const T) -> Self::V;
    /// `LANES` values to `p`.
    unsafe fn store(self, p: *mut T, v: Self::V);

    /// The first `n <= LANES` values from `p`; zero in the other lanes. Touches nothing beyond them.
    #[inline(always)]
    unsafe fn load_first(self, p: *const T, n: usize) -> Self::V {
        let mut lanes = [T::ZERO; MAX_LANES];
        // SAFETY: the caller vouches for n values at p, and n <= LANES <= MAX_LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }
    /// The first `n <= LANES` lanes to `p`.
    #[inline(always)]
    unsafe fn store_first(self, p: *mut T, n: usize, v: Self::V) {
        let mut lanes = [T::ZERO; MAX_LANES];
        // SAFETY: the caller vouches for n values at p, and n <= LANES <= MAX_LANES.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }

    /// Asks for the cache line at `p`, which need not be valid, where the set can.
    #[inline(always)]
    fn prefetch<E>(self, _: *const E) {}

    /// Turns a square of `LANES` rows, `stride` apart, into columns: `to[j to_stride + i] = from[i stride + j]`.
    #[inline(always)]
    unsafe fn transpose(self, from: *const T, stride: usize, to: *mut T, to_stride: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller vouches for both squares.
                unsafe { to.add(j * to_stride + i).write(*from.add(i * stride + j)) };
            }
        }
    }

    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a b + c`, fused where the set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a b`, fused where the set can.
    fn nfma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `a 2^k` for integral `k` of at most 127 (1023 in f64) + 1; results below the normal range may become zero.
    fn ldexp(self, a: Self::V, k: Self::V) -> Self::V;
    /// The sum of the lanes, in an order that depends on the instruction set alone.
    fn sum(self, a: Self::V) -> T;

    /// `LANES` bfloat16 values, widened.
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V {
        // SAFETY: the caller vouches for LANES values at p.
        unsafe { load_each(self, p, Self::LANES, |x| T::from_f64(x.to_f64())) }
    }
    /// `LANES` values rounded to bfloat16, ties to even.
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut bf16, v: Self::V) {
        // SAFETY: the caller vouches for LANES values at p.
        unsafe { store_each(self, p, Self::LANES, v, |x| bf16::from_f64(x.to_f64())) }
    }
    /// `LANES` half-precision values, widened.
    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Self::V {
        // SAFETY: the caller vouches for LANES values at p.
        unsafe { load_each(self, p, Self::LANES, |x| T::from_f64(x.to_f64())) }
    }
    /// `LANES` values rounded to half precision, ties to even.
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut f16, v: Self::V) {
        // SAFETY: the caller vouches for LANES values at p.
        unsafe { store_each(self, p, Self::LANES, v, |x| f16::from_f64(x.to_f64())) }
    }
}

/// `n` values of another type, converted one by one into a register; the other lanes are zero.
#[inline(always)]
unsafe fn load_each<T: Real, S: Simd<T>, E: Copy>(
    simd: S,
    p: *const E,
    n: usize,
    convert: impl Fn(E) -> T,
) -> S::V {
    let mut lanes = [T::ZERO; MAX_LANES];
    for (i, lane) in lanes.iter_mut().enumerate().take(n) {
        // SAFETY: the caller vouches for n values at p.
        *lane = convert(unsafe { *p.add(i) });
    }
    // SAFETY: LANES <= MAX_LANES.
    unsafe { simd.load(lanes.as_ptr()) }
}

/// The first `n` lanes, converted one by one to another type.
#[inline(always)]
unsafe fn store_each<T: Real, S: Simd<T>, E>(
    simd: S,
    p: *mut E,
    n: usize,
    v: S::V,
    convert: impl Fn(T) -> E,
) {
    let mut lanes = [T::ZERO; MAX_LANES];
    // SAFETY: LANES <= MAX_LANES, and the caller vouches for n values at p.
    unsafe {
        simd.store(lanes.as_mut_ptr(), v);
        for (i, lane) in lanes.iter().enumerate().take(n) {
            p.add(i).write(convert(*lane));
        }
    }
}

/// A computation to be compiled once per instruction set.
pub(crate) trait Kernel<T: Real> {
    /// What it returns.
    type Output;
    /// The body; must be `#[inline(always)]`, so that it is compiled with the instructions of `S`.
    fn run<S: Simd<T>>(self, simd: S) -> Self::Output;
}

/// The instruction sets a kernel can run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// Arm's 128-bit SIMD.
    Neon,
    /// Plain Rust.
    Scalar,
}

impl Isa {
    /// Those of this machine, the widest first. The environment variable `SUBQUADRATIC_ISA` (`avx512`, `avx2`, `neon` or
    /// `scalar`), read once, takes away what comes before it.
    pub(crate) fn available() -> &'static [Isa] {
        use std::sync::OnceLock;
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let all =
                [(Isa::Avx512, "avx512"), (Isa::Avx2, "avx2"), (Isa::Neon, "neon"), (Isa::Scalar, "scalar")];
            let widest = std::env::var("SUBQUADRATIC_ISA").ok();
            let first = all.iter().position(|&(_, name)| widest.as_deref() == Some(name)).unwrap_or(0);
            all[first..].iter().map(|&(isa, _)| isa).filter(|isa| isa.is_available()).collect()
        })
    }

    /// The widest of this machine.
    pub(crate) fn best() -> Isa {
        Self::available()[0]
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            Isa::Scalar => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }
}

/// Runs `kernel` on the widest instruction set of this machine.
#[inline]
pub(crate) fn dispatch<T: Real, K: Kernel<T>>(kernel: K) -> K::Output {
    T::dispatch_on(Isa::best(), kernel)
}

/// The body of [`Real::dispatch_on`] for one scalar type.
macro_rules! dispatch_on {
    ($t:ty) => {
        fn dispatch_on<K: $crate::backend::cpu::simd::Kernel<$t>>(
            isa: $crate::backend::cpu::simd::Isa,
            kernel: K,
        ) -> K::Output {
            use $crate::backend::cpu::simd::{Isa, Kernel};
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512<K: Kernel<$t>>(kernel: K) -> K::Output {
                kernel.run($crate::backend::cpu::simd::avx512::Avx512::assume())
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<K: Kernel<$t>>(kernel: K) -> K::Output {
                kernel.run($crate::backend::cpu::simd::avx2::Avx2::assume())
            }
            #[cfg(target_arch = "aarch64")]
            #[target_feature(enable = "neon")]
            fn neon<K: Kernel<$t>>(kernel: K) -> K::Output {
                kernel.run($crate::backend::cpu::simd::neon::Neon::assume())
            }
            if !Isa::available().contains(&isa) {
                return kernel.run($crate::backend::cpu::simd::scalar::Scalar);
            }
            match isa {
                // SAFETY: available() asked the CPU for exactly these features.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => unsafe { avx512(kernel) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => unsafe { avx2(kernel) },
                // SAFETY: as above.
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => unsafe { neon(kernel) },
                _ => kernel.run($crate::backend::cpu::simd::scalar::Scalar),
            }
        }
    };
}
use dispatch_on;
