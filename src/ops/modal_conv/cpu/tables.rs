//! The powers of the poles, made in f64 once per call.
//!
//! For `T = 16` they are `2 T + 1` numbers per state and `T + 1` powers in f64: some 500 bytes.

use super::super::Sizes;
use super::super::plan::CHUNK;
use super::{lanes_of, to_blocks};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Kernel, Real, Simd, dispatch};

/// The tables of all blocks of channels, one after another.
pub(in super::super) struct Tables<T> {
    kernel: Vec<T>,
    out: Vec<T>,
    into: Vec<T>,
    powers: Vec<f64>,
    lanes: usize,
    components: usize,
    complex: bool,
}

/// The tables of one block, `C` being the real numbers of a channel's state.
#[derive(Clone, Copy)]
pub(in super::super) struct Block<'a, T> {
    /// `k[e]`, `D` included in the first: `[T, LANES]`
    pub(super) kernel: &'a [T],
    /// `R p^(i + 1)`, its real part and minus its imaginary part: `[C, T, LANES]`
    pub(super) out: &'a [T],
    /// `p^e`: `[C, T, LANES]`
    pub(super) into: &'a [T],
    /// `p^n`, `n <= T`: `[T + 1, C, LANES]`
    pub(super) powers: &'a [f64],
    pub(super) complex: bool,
}

/// Poles (not logarithms), residues and `D` in f64 as tensors have them.
pub(in super::super) struct Parameters {
    pub(in super::super) poles: Vec<f64>,
    pub(in super::super) residues: Vec<f64>,
    pub(in super::super) d: Option<Vec<f64>>,
}

impl<T: Real> Tables<T> {
    pub(in super::super) fn new(parameters: &Parameters, sizes: &Sizes) -> Self {
        let lanes = lanes_of::<T>();
        let (channels, components) = (sizes.channels, sizes.components());
        let poles: Vec<f64> = to_blocks(&parameters.poles, channels, components, lanes);
        let residues: Vec<f64> = to_blocks(&parameters.residues, channels, components, lanes);
        let zeros = vec![0.0; channels];
        let d: Vec<f64> = to_blocks(parameters.d.as_ref().unwrap_or(&zeros), channels, 1, lanes);
        let blocks: Vec<usize> = (0..channels.div_ceil(lanes)).collect();
        let complex = sizes.complex;
        let made = parallel::map(&blocks, channels * components * CHUNK, |&block| {
            let part =
                |x: &'_ [f64], width: usize| x[block * width * lanes..(block + 1) * width * lanes].to_vec();
            let (poles, residues) = (part(&poles, components), part(&residues, components));
            dispatch::<T, _>(Make { poles, residues, d: part(&d, 1), complex })
        });
        let mut tables =
            Self { kernel: vec![], out: vec![], into: vec![], powers: vec![], lanes, components, complex };
        for made in made {
            tables.kernel.extend(made.0);
            tables.out.extend(made.1);
            tables.into.extend(made.2);
            tables.powers.extend(made.3);
        }
        tables
    }

    pub(super) fn block(&self, index: usize) -> Block<'_, T> {
        let size = self.components * CHUNK * self.lanes;
        let powers = self.components * (CHUNK + 1) * self.lanes;
        Block {
            kernel: &self.kernel[index * CHUNK * self.lanes..(index + 1) * CHUNK * self.lanes],
            out: &self.out[index * size..(index + 1) * size],
            into: &self.into[index * size..(index + 1) * size],
            powers: &self.powers[index * powers..(index + 1) * powers],
            complex: self.complex,
        }
    }

    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }
}

/// Makes the tables of one block: kernel, out, into, powers.
struct Make {
    poles: Vec<f64>,
    residues: Vec<f64>,
    d: Vec<f64>,
    complex: bool,
}

impl<T: Real> Kernel<T> for Make {
    type Output = (Vec<T>, Vec<T>, Vec<T>, Vec<f64>);

    #[inline(always)]
    fn run<S: Simd<T>>(self, _: S) -> Self::Output {
        let lanes = S::LANES;
        let components = self.poles.len() / lanes;
        let width = if self.complex { 2 } else { 1 };
        let mut kernel = vec![0.0; CHUNK * lanes];
        kernel[..lanes].copy_from_slice(&self.d);
        let mut out = vec![T::ZERO; components * CHUNK * lanes];
        let mut into = out.clone();
        let mut powers = vec![0.0; (CHUNK + 1) * components * lanes];
        let zero = vec![0.0; lanes];
        for c in (0..components).step_by(width) {
            let pair = |x: &'_ [f64]| -> [Vec<f64>; 2] {
                let part = |c: usize| x[c * lanes..(c + 1) * lanes].to_vec();
                [part(c), if self.complex { part(c + 1) } else { zero.clone() }]
            };
            let ([pr, pi], [rr, ri]) = (pair(&self.poles), pair(&self.residues));
            let (mut re, mut im) = (vec![1.0; lanes], zero.clone());
            for n in 0..=CHUNK {
                let row = (n * components + c) * lanes;
                powers[row..row + lanes].copy_from_slice(&re);
                if self.complex {
                    powers[row + lanes..row + 2 * lanes].copy_from_slice(&im);
                }
                for lane in 0..lanes {
                    let (zr, zi) = (
                        rr[lane] * re[lane] - ri[lane] * im[lane],
                        rr[lane] * im[lane] + ri[lane] * re[lane],
                    );
                    let at = |c: usize, i: usize| (c * CHUNK + i) * lanes + lane;
                    if n < CHUNK {
                        kernel[n * lanes + lane] += zr;
                        into[at(c, n)] = T::from_f64(re[lane]);
                        if self.complex {
                            into[at(c + 1, n)] = T::from_f64(im[lane]);
                        }
                    }
                    if n > 0 {
                        out[at(c, n - 1)] = T::from_f64(zr);
                        if self.complex {
                            out[at(c + 1, n - 1)] = T::from_f64(-zi);
                        }
                    }
                    let next = re[lane] * pr[lane] - im[lane] * pi[lane];
                    im[lane] = re[lane] * pi[lane] + im[lane] * pr[lane];
                    re[lane] = next;
                }
            }
        }
        (kernel.into_iter().map(T::from_f64).collect(), out, into, powers)
    }
}
