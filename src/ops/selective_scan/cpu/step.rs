//! The forward pass of few tokens: lanes are states, so that `A` and the states are read as they lie.
//!
//! One token is three passes: the steps of all channels, the states of one channel after another, the outputs of all
//! channels. Per channel of 16 f32 states: 15 operations and a sum over lanes.

use super::Scanned;
use crate::Result;
use crate::backend::cpu::math::{exp2, silu, softplus};
use crate::backend::cpu::simd::{Element, Isa, Kernel, Real, Simd};
use crate::backend::cpu::view::{Held, Rows, with_unit_stride};
use crate::ops::selective_scan::{SelectiveScan, Sizes};
use crate::ops::{Segments, accumulation_dtype};
use candle_core::Tensor;

/// Scans few tokens; `args` as for [`super::Operands::new`].
pub(in super::super) fn step<E: Element>(isa: Isa, args: &SelectiveScan, sizes: Sizes) -> Result<Scanned<E>> {
    let dtype = accumulation_dtype(args.u.dtype());
    let contiguous = |x: &Tensor| Ok::<_, crate::Error>(x.to_dtype(dtype)?.contiguous()?.flatten_all()?);
    let optional = |x: Option<&Tensor>| x.map(contiguous).transpose();
    let (a, d, bias) = (contiguous(args.a)?, optional(args.d)?, optional(args.delta_bias)?);
    let rows = |x: &Tensor| -> Result<Tensor> {
        Ok(with_unit_stride(&if x.rank() == 4 { x.flatten_from(2)? } else { x.clone() })?)
    };
    let (u, delta, b, c) = (rows(args.u)?, rows(args.delta)?, rows(args.b)?, rows(args.c)?);
    let z = args.z.map(rows).transpose()?;
    let [u, delta, b, c, a] = [&u, &delta, &b, &c, &a].map(Held::new);
    let [z, d, bias] = [&z, &d, &bias].map(|x| x.as_ref().map(Held::new));
    let vector = |x: &'_ Option<Held<'_>>| -> Result<Option<Vec<E::Real>>> {
        x.as_ref().map(|x| Ok(x.rows::<E::Real>()?.row([]).to_vec())).transpose()
    };
    let (d, bias) = (vector(&d)?, vector(&bias)?);
    let state = match args.initial_state {
        Some(state) => state.flatten_all()?.to_vec1()?,
        None => vec![E::Real::ZERO; sizes.batch * sizes.channels * sizes.states],
    };
    let y = vec![E::narrow(E::Real::ZERO); sizes.batch * sizes.length * sizes.channels];
    let few = Few {
        sizes,
        segments: Segments::or_whole(args.segments, sizes.batch, sizes.length),
        u: u.rows()?,
        delta: delta.rows()?,
        z: z.as_ref().map(|z| z.rows()).transpose()?,
        b: b.rows()?,
        c: c.rows()?,
        a: a.rows::<E::Real>()?.row([]),
        d: d.as_deref(),
        bias: bias.as_deref(),
        softplus: args.softplus,
        out: Scanned { y, state, kept: vec![] },
    };
    Ok(E::Real::dispatch_on(isa, few))
}

struct Few<'a, E: Element> {
    sizes: Sizes,
    segments: Segments,
    u: Rows<'a, E>,
    delta: Rows<'a, E>,
    z: Option<Rows<'a, E>>,
    /// Rows are tokens of `[G N]`, or channels of `[N]` where constant.
    b: Rows<'a, E::Real>,
    c: Rows<'a, E::Real>,
    /// `[D, N]`
    a: &'a [E::Real],
    d: Option<&'a [E::Real]>,
    bias: Option<&'a [E::Real]>,
    softplus: bool,
    out: Scanned<E>,
}

impl<E: Element> Few<'_, E> {
    /// The `N` numbers of `B` or `C` that channel `d` meets at a token.
    #[inline(always)]
    fn coefficient<'b>(
        &self,
        rows: &Rows<'b, E::Real>,
        side: usize,
        at: [usize; 2],
        d: usize,
    ) -> &'b [E::Real] {
        let n = self.sizes.states;
        match self.sizes.groups[side] {
            None => rows.row([d]),
            Some(groups) => &rows.row(at)[d / (self.sizes.channels / groups) * n..][..n],
        }
    }
}

/// The registers that cover `n` numbers: where each begins and how many lanes of it count.
#[inline(always)]
fn registers(n: usize, lanes: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n).step_by(lanes).map(move |start| (start, lanes.min(n - start)))
}

impl<E: Element> Kernel<E::Real> for Few<'_, E> {
    type Output = Scanned<E>;

    #[inline(always)]
    fn run<S: Simd<E::Real>>(mut self, s: S) -> Scanned<E> {
        let (channels, n) = (self.sizes.channels, self.sizes.states);
        let mut delta = vec![E::Real::ZERO; channels];
        let mut y = vec![E::Real::ZERO; channels];
        for row in 0..self.sizes.batch {
            for run in self.segments.row(row).to_vec() {
                if run.fresh {
                    self.out.state[row * channels * n..(row + 1) * channels * n].fill(E::Real::ZERO);
                }
                for t in run.tokens {
                    self.steps(s, [row, t], &mut delta);
                    self.states(s, [row, t], &delta, &mut y);
                    self.outputs(s, [row, t], &y);
                }
            }
        }
        self.out
    }
}

impl<E: Element> Few<'_, E> {
    /// The steps of a token, after bias and softplus.
    #[inline(always)]
    fn steps<S: Simd<E::Real>>(&self, s: S, at: [usize; 2], delta: &mut [E::Real]) {
        let from = self.delta.row(at);
        for (i, lanes) in registers(self.sizes.channels, S::LANES) {
            // SAFETY: the slices hold `lanes` numbers.
            unsafe {
                let mut v = E::load_first(s, from[i..i + lanes].as_ptr(), lanes);
                if let Some(bias) = self.bias {
                    v = s.add(v, s.load_first(bias[i..i + lanes].as_ptr(), lanes));
                }
                let v = if self.softplus { softplus(s, v) } else { v };
                s.store_first(delta[i..i + lanes].as_mut_ptr(), lanes, v);
            }
        }
    }

    /// Moves the states of a row on by a token; `y` becomes `C h` of every channel.
    #[inline(always)]
    fn states<S: Simd<E::Real>>(&mut self, s: S, at: [usize; 2], delta: &[E::Real], y: &mut [E::Real]) {
        let (channels, n) = (self.sizes.channels, self.sizes.states);
        let u = self.u.row(at);
        for d in 0..channels {
            let b = self.coefficient(&self.b, 0, at, d);
            let c = self.coefficient(&self.c, 1, at, d);
            let (rate, input) = (s.splat(delta[d] * E::Real::LOG2_E), s.splat(delta[d] * u[d].widen()));
            let a = &self.a[d * n..(d + 1) * n];
            let h = &mut self.out.state[(at[0] * channels + d) * n..][..n];
            let mut sum = s.splat(E::Real::ZERO);
            for (i, lanes) in registers(n, S::LANES) {
                // SAFETY: all slices hold N numbers, and i + lanes <= N.
                unsafe {
                    let load = |x: &[E::Real]| match lanes == S::LANES {
                        true => s.load(x.as_ptr().add(i)),
                        false => s.load_first(x.as_ptr().add(i), lanes),
                    };
                    let next = s.fma(exp2(s, s.mul(rate, load(a))), load(h), s.mul(input, load(b)));
                    match lanes == S::LANES {
                        true => s.store(h.as_mut_ptr().add(i), next),
                        false => s.store_first(h.as_mut_ptr().add(i), lanes, next),
                    }
                    sum = s.fma(next, load(c), sum);
                }
            }
            y[d] = s.sum(sum);
        }
    }

    /// Writes the outputs of a token: skip and gate.
    #[inline(always)]
    fn outputs<S: Simd<E::Real>>(&mut self, s: S, at: [usize; 2], y: &[E::Real]) {
        let channels = self.sizes.channels;
        let u = self.u.row(at);
        let to = &mut self.out.y[(at[0] * self.sizes.length + at[1]) * channels..][..channels];
        for (i, lanes) in registers(channels, S::LANES) {
            // SAFETY: all slices hold `lanes` numbers from i.
            unsafe {
                let mut v = s.load_first(y[i..i + lanes].as_ptr(), lanes);
                if let Some(d) = self.d {
                    let u = E::load_first(s, u[i..i + lanes].as_ptr(), lanes);
                    v = s.fma(s.load_first(d[i..i + lanes].as_ptr(), lanes), u, v);
                }
                if let Some(z) = &self.z {
                    v = s.mul(v, silu(s, E::load_first(s, z.row(at)[i..i + lanes].as_ptr(), lanes)));
                }
                E::store_first(s, to[i..i + lanes].as_mut_ptr(), lanes, v);
            }
        }
    }
}
