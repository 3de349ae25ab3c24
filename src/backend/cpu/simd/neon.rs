//! Arm's 128-bit SIMD: 4 lanes of f32, 2 of f64.

use super::Simd;
use half::bf16;
use std::arch::aarch64::*;

/// The proof that this CPU has the 128-bit SIMD.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    /// The token; callable only where the features are enabled.
    #[target_feature(enable = "neon")]
    pub(crate) fn assume() -> Self {
        Self(())
    }
}

impl Simd<f32> for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> float32x4_t {
        // SAFETY: the token proves the instruction, the caller vouches for the values at p.
        unsafe { vld1q_f32(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: float32x4_t) {
        // SAFETY: the token proves the instruction, the caller vouches for the values at p.
        unsafe { vst1q_f32(p, v) }
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    fn nfma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vfmsq_f32(c, a, b) }
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vsqrtq_f32(a) }
    }
    #[inline(always)]
    fn round(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    fn ldexp(self, a: float32x4_t, k: float32x4_t) -> float32x4_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe {
            let k = vaddq_s32(vcvtq_s32_f32(k), vdupq_n_s32(126));
            let k = vminq_s32(vmaxq_s32(k, vdupq_n_s32(0)), vdupq_n_s32(254));
            let half = vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32::<23>(k)));
            vaddq_f32(half, half)
        }
    }
    #[inline(always)]
    fn sum(self, a: float32x4_t) -> f32 {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vaddvq_f32(a) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> float32x4_t {
        // SAFETY: the token proves the instruction, the caller vouches for the values at p.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) }
    }
}

impl Simd<f64> for Neon {
    type V = float64x2_t;
    const LANES: usize = 2;

    #[inline(always)]
    fn splat(self, x: f64) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vdupq_n_f64(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f64) -> float64x2_t {
        // SAFETY: the token proves the instruction, the caller vouches for the values at p.
        unsafe { vld1q_f64(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f64, v: float64x2_t) {
        // SAFETY: the token proves the instruction, the caller vouches for the values at p.
        unsafe { vst1q_f64(p, v) }
    }
    #[inline(always)]
    fn add(self, a: float64x2_t, b: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vaddq_f64(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: float64x2_t, b: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vsubq_f64(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: float64x2_t, b: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vmulq_f64(a, b) }
    }
    #[inline(always)]
    fn div(self, a: float64x2_t, b: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vdivq_f64(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: float64x2_t, b: float64x2_t, c: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vfmaq_f64(c, a, b) }
    }
    #[inline(always)]
    fn nfma(self, a: float64x2_t, b: float64x2_t, c: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vfmsq_f64(c, a, b) }
    }
    #[inline(always)]
    fn max(self, a: float64x2_t, b: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vbslq_f64(vcgtq_f64(a, b), a, b) }
    }
    #[inline(always)]
    fn min(self, a: float64x2_t, b: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vbslq_f64(vcltq_f64(a, b), a, b) }
    }
    #[inline(always)]
    fn sqrt(self, a: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vsqrtq_f64(a) }
    }
    #[inline(always)]
    fn round(self, a: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vrndnq_f64(a) }
    }
    #[inline(always)]
    fn ldexp(self, a: float64x2_t, k: float64x2_t) -> float64x2_t {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe {
            let k = vaddq_s64(vcvtq_s64_f64(k), vdupq_n_s64(1022));
            let k = vandq_s64(k, vreinterpretq_s64_u64(vcgezq_s64(k)));
            let half = vmulq_f64(a, vreinterpretq_f64_s64(vshlq_n_s64::<52>(k)));
            vaddq_f64(half, half)
        }
    }
    #[inline(always)]
    fn sum(self, a: float64x2_t) -> f64 {
        // SAFETY: the token proves that the CPU has the instruction.
        unsafe { vaddvq_f64(a) }
    }
}
