//! The passes over memory that training makes beside the model, each in blocks of fixed size: the results do not
//! depend on the number of threads.

use crate::backend::cpu::math;
use crate::backend::cpu::simd::{Element, Kernel, MAX_LANES, Real, Simd, dispatch};
use crate::backend::cpu::view::Rows;
use candle_core::WithDType;
use rayon::prelude::*;

use super::IGNORE;

/// Elements a task works on.
const BLOCK: usize = 1 << 14;

/// `sum x^2`, in f64.
pub(super) fn sum_of_squares<E: Element>(x: &[E]) -> f64 {
    let blocks: Vec<f64> = x.par_chunks(BLOCK).map(|x| dispatch(SumOfSquares(x))).collect();
    blocks.iter().sum()
}

struct SumOfSquares<'a, E>(&'a [E]);

impl<T: Real, E: Element<Real = T>> Kernel<T> for SumOfSquares<'_, E> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) -> f64 {
        const LANES: usize = 16;
        let mut sums = [0f64; LANES];
        let mut chunks = self.0.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                let x = x.widen().to_f64();
                *sum += x * x;
            }
        }
        let rest: f64 = chunks.remainder().iter().map(|x| x.widen().to_f64().powi(2)).sum();
        sums.iter().sum::<f64>() + rest
    }
}

/// `sum += x`
pub(super) fn add_into<T: Real, E: Element<Real = T>>(sum: &mut [T], x: &[E]) {
    sum.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(sum, x)| dispatch(AddInto { sum, x }));
}

struct AddInto<'a, T, E> {
    sum: &'a mut [T],
    x: &'a [E],
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for AddInto<'_, T, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        for (sum, x) in self.sum.chunks_mut(S::LANES).zip(self.x.chunks(S::LANES)) {
            let n = sum.len().min(x.len());
            // SAFETY: both slices hold n values, and n <= LANES.
            unsafe {
                if n == S::LANES {
                    let y = s.add(s.load(sum.as_ptr()), E::load(s, x.as_ptr()));
                    s.store(sum.as_mut_ptr(), y);
                } else {
                    let y = s.add(s.load_first(sum.as_ptr(), n), E::load_first(s, x.as_ptr(), n));
                    s.store_first(sum.as_mut_ptr(), n, y);
                }
            }
        }
    }
}

/// The numbers of one AdamW step, the same for all elements of a parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// Factor of the gradient (clipping, averaging).
    pub(super) gradient_scale: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) epsilon: f64,
    /// `1 - rate * decay`
    pub(super) keep: f64,
    /// `rate / (1 - beta1^t)`
    pub(super) size: f64,
    /// `1 / sqrt(1 - beta2^t)`
    pub(super) root_scale: f64,
}

/// One parameter of AdamW in memory: `weight` is what the model reads, `master` the same in `T` where the weight is
/// narrower, else empty.
pub(super) struct Parameter<'a, T, E> {
    pub(super) weight: &'a mut [E],
    pub(super) master: &'a mut [T],
    pub(super) first: &'a mut [T],
    pub(super) second: &'a mut [T],
}

/// One step, one pass: reads gradient, moments and master weight, writes moments, master and weight.
pub(super) fn adamw<T, E, G>(parameter: Parameter<T, E>, gradient: &[G], step: &Step)
where
    T: Real,
    E: Element<Real = T>,
    G: Element<Real = T>,
{
    let Parameter { weight, master, first, second } = parameter;
    let moments = first.par_chunks_mut(BLOCK).zip(second.par_chunks_mut(BLOCK));
    let rest = weight.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK)).zip(moments);
    if master.is_empty() {
        rest.for_each(|((weight, gradient), (first, second))| {
            let parameter = Parameter { weight, master: &mut [], first, second };
            dispatch(AdamW { parameter, gradient, step });
        });
    } else {
        rest.zip(master.par_chunks_mut(BLOCK)).for_each(|(((weight, gradient), (first, second)), master)| {
            let parameter = Parameter { weight, master, first, second };
            dispatch(AdamW { parameter, gradient, step });
        });
    }
}

struct AdamW<'a, T, E, G> {
    parameter: Parameter<'a, T, E>,
    gradient: &'a [G],
    step: &'a Step,
}

impl<T: Real, E: Element<Real = T>, G: Element<Real = T>> Kernel<T> for AdamW<'_, T, E, G> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let Parameter { weight, master, first, second } = self.parameter;
        let splat = |x: f64| s.splat(T::from_f64(x));
        let step = self.step;
        let (scale, keep, size) = (splat(step.gradient_scale), splat(step.keep), splat(step.size));
        let (b1, c1, b2, c2) =
            (splat(step.beta1), splat(1.0 - step.beta1), splat(step.beta2), splat(1.0 - step.beta2));
        let (root_scale, epsilon) = (splat(step.root_scale), splat(step.epsilon));
        let length = weight.len();
        assert!(self.gradient.len() == length && first.len() == length && second.len() == length);
        assert!(master.is_empty() || master.len() == length);
        for i in (0..length).step_by(S::LANES) {
            let n = S::LANES.min(length - i);
            // SAFETY: all slices hold `length` values (asserted above), i + n <= length and n <= LANES.
            unsafe {
                let g = s.mul(load(s, self.gradient, i, n), scale);
                let m = s.fma(b1, load(s, first, i, n), s.mul(c1, g));
                let v = s.fma(b2, load(s, second, i, n), s.mul(c2, s.mul(g, g)));
                let divisor = s.fma(s.sqrt(v), root_scale, epsilon);
                let p = if master.is_empty() { load(s, weight, i, n) } else { load(s, master, i, n) };
                let p = s.nfma(size, s.div(m, divisor), s.mul(p, keep));
                store(s, first, i, n, m);
                store(s, second, i, n, v);
                store(s, weight, i, n, p);
                if !master.is_empty() {
                    store(s, master, i, n, p);
                }
            }
        }
    }
}

/// `n` values of `x` from index `i`; the caller vouches for them and for `n <= LANES`.
#[inline(always)]
unsafe fn load<T: Real, S: Simd<T>, E: Element<Real = T>>(s: S, x: &[E], i: usize, n: usize) -> S::V {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        let p = x.as_ptr().add(i);
        if n == S::LANES { E::load(s, p) } else { E::load_first(s, p, n) }
    }
}

/// `n` values to `x` at index `i`; the caller vouches for the room and for `n <= LANES`.
#[inline(always)]
unsafe fn store<T: Real, S: Simd<T>, E: Element<Real = T>>(s: S, x: &mut [E], i: usize, n: usize, v: S::V) {
    // SAFETY: the caller's promise, passed on.
    unsafe {
        let p = x.as_mut_ptr().add(i);
        if n == S::LANES { E::store(s, p, v) } else { E::store_first(s, p, n, v) }
    }
}

/// Of each row `log(sum_v exp(x[v]))`, and the sum of `log_sum - x[target]` over the rows with a target.
pub(super) fn log_sum_exp<E: Element>(rows: Rows<E>, targets: &[u32]) -> (Vec<E::Real>, f64) {
    let each: Vec<(E::Real, f64)> = targets
        .par_iter()
        .enumerate()
        .map(|(t, &target)| {
            if target == IGNORE {
                return (E::Real::ZERO, 0.0);
            }
            let row = rows.row([t]);
            let log_sum: f64 = dispatch(LogSumExp(row));
            (<E::Real as WithDType>::from_f64(log_sum), log_sum - row[target as usize].widen().to_f64())
        })
        .collect();
    let total = each.iter().map(|(_, loss)| loss).sum();
    (each.into_iter().map(|(log_sum, _)| log_sum).collect(), total)
}

struct LogSumExp<'a, E>(&'a [E]);

impl<T: Real, E: Element<Real = T>> Kernel<T> for LogSumExp<'_, E> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> f64 {
        // a NaN may be lost here, but comes back with the sum
        let mut lanes = s.splat(self.0.first().map_or(T::ZERO, |x| x.widen()));
        let whole = self.0.len() / S::LANES * S::LANES;
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: i + LANES <= self.0.len().
            lanes = s.max(unsafe { load(s, self.0, i, S::LANES) }, lanes);
        }
        let mut all = [T::ZERO; MAX_LANES];
        // SAFETY: LANES <= MAX_LANES.
        unsafe { s.store(all.as_mut_ptr(), lanes) };
        let rest = self.0[whole..].iter().map(|x| x.widen());
        let largest =
            all[..S::LANES].iter().copied().chain(rest).fold(all[0], |a, b| if b > a { b } else { a });
        let mut sum = 0.0;
        // short runs in T, their sums in f64
        for block in self.0.chunks(64 * S::LANES) {
            let mut part = s.splat(T::ZERO);
            let whole = block.len() / S::LANES * S::LANES;
            for i in (0..whole).step_by(S::LANES) {
                // SAFETY: i + LANES <= block.len().
                let x = unsafe { load(s, block, i, S::LANES) };
                part = s.add(part, math::exp(s, s.sub(x, s.splat(largest))));
            }
            sum += s.sum(part).to_f64();
            for x in &block[whole..] {
                sum += (x.widen() - largest).to_f64().exp();
            }
        }
        largest.to_f64() + sum.ln()
    }
}

/// `(softmax(x) - [v = target]) scale` of every row with a target, zero elsewhere.
pub(super) fn softmax_less_target<E: Element>(
    rows: Rows<E>,
    log_sums: &[E::Real],
    targets: &[u32],
    scale: f64,
) -> Vec<E> {
    let width = rows.width();
    let mut gradient = vec![E::narrow(E::Real::ZERO); targets.len() * width];
    gradient.par_chunks_mut(width.max(1)).enumerate().for_each(|(t, y)| {
        if targets[t] == IGNORE {
            return;
        }
        let x = rows.row([t]);
        let target = targets[t] as usize;
        let log_sum = log_sums[t];
        dispatch(ScaledSoftmax { x, y: &mut *y, log_sum, scale: <E::Real as WithDType>::from_f64(scale) });
        let p = (x[target].widen() - log_sum).to_f64().exp_m1();
        y[target] = E::narrow(<E::Real as WithDType>::from_f64(p * scale));
    });
    gradient
}

struct ScaledSoftmax<'a, T, E> {
    x: &'a [E],
    y: &'a mut [E],
    log_sum: T,
    scale: T,
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for ScaledSoftmax<'_, T, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let length = self.x.len();
        assert_eq!(self.y.len(), length);
        for i in (0..length).step_by(S::LANES) {
            let n = S::LANES.min(length - i);
            // SAFETY: both slices hold `length` values, i + n <= length and n <= LANES.
            unsafe {
                let x = s.sub(load(s, self.x, i, n), s.splat(self.log_sum));
                store(s, self.y, i, n, s.mul(math::exp(s, x), s.splat(self.scale)));
            }
        }
    }
}
