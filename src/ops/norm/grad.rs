//! The operator in candle's graph, and its backward pass on the CPU.
//!
//! With `h = dy` (`dy SiLU(z)` where the gate comes after), `dn = h weight`, `r` the reciprocal deviation and `E` the
//! mean over a group,
//!
//! ```text
//! RMS norm    ds = r (dn - n E[dn n])
//! layer norm  ds = r (dn - E[dn] - n E[dn n])
//! dweight     = sum over rows of h n        dbias = sum over rows of h
//! dx = dresidual = ds + dsum                without a gate before the norm
//! dx = ds SiLU(z), dz = ds x SiLU'(z)       with one
//! dz = dy (n weight + bias) SiLU'(z)        with one after it
//! ```
//!
//! `s`, its moments and the gate are computed again: only the arguments are kept. The sums over rows are added up within
//! a piece of the rows, then over the pieces in order: the same bits for any number of threads.

use super::cpu::{Prepared, Problem};
use super::{Norm, NormInput, NormKind};
use crate::autograd::{Gradients, record_all};
use crate::backend::cpu::math::{sigmoid, silu_grad};
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd};
use crate::backend::cpu::view::{
    Held, Outlet, Rows, lanes, load, put, storage, store, tensor, with_unit_stride,
};
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// Norm and sum of checked arguments on the CPU.
pub(super) fn on_cpu(
    name: &'static str,
    input: &NormInput,
    norm: &Norm,
    group: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    let run = match (input.x.dtype(), input.residual.map(Tensor::dtype)) {
        (DType::F32, _) => typed::<f32, f32>,
        (DType::F64, _) => typed::<f64, f64>,
        (DType::BF16, Some(DType::F32)) => typed::<bf16, f32>,
        (DType::BF16, _) => typed::<bf16, bf16>,
        (DType::F16, Some(DType::F32)) => typed::<f16, f32>,
        (DType::F16, _) => typed::<f16, f16>,
        (other, _) => return Err(Error::dtype(format!("{name}: x"), "f32, f64, bf16 or f16", other)),
    };
    run(name, input, norm, group)
}

fn typed<E: Element, R: Element<Real = E::Real>>(
    name: &'static str,
    input: &NormInput,
    norm: &Norm,
    group: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    let (y, sum) = {
        let prepared = Prepared::new(input)?;
        let locks = prepared.hold();
        Problem::<E, R>::new(input, norm, group, &locks)?.forward()
    };
    let shape = input.x.shape();
    let mut inputs = vec![input.x];
    inputs.extend([input.residual, input.z, norm.weight, norm.bias].into_iter().flatten());
    let mut outputs = vec![(Storage::Cpu(storage(y)), shape.clone())];
    outputs.extend(sum.map(|sum| (Storage::Cpu(storage(sum)), shape.clone())));
    let saved = Saved::new(input, norm, group);
    let outputs = record_all(name, &inputs, outputs, move |gradients| {
        let (dy, dsum) = (gradients.first().cloned().flatten(), gradients.get(1).cloned().flatten());
        Ok(saved.backward::<E, R>(dy, dsum)?)
    })?;
    let mut outputs = outputs.into_iter();
    let y = outputs.next().ok_or_else(|| Error::value(name, "a result", "none"))?;
    Ok((y, outputs.next()))
}

/// The arguments, detached, for the backward pass.
struct Saved {
    x: Tensor,
    residual: Option<Tensor>,
    z: Option<Tensor>,
    norm_before_gate: bool,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    kind: NormKind,
    eps: f64,
    group: usize,
}

impl Saved {
    fn new(input: &NormInput, norm: &Norm, group: usize) -> Self {
        let detach = |x: Option<&Tensor>| x.map(Tensor::detach);
        Self {
            x: input.x.detach(),
            residual: detach(input.residual),
            z: detach(input.z),
            norm_before_gate: input.norm_before_gate,
            weight: detach(norm.weight),
            bias: detach(norm.bias),
            kind: norm.kind,
            eps: norm.eps,
            group,
        }
    }

    /// The gradients in the order of the recorded inputs, from those of the norm and of the sum.
    fn backward<E: Element, R: Element<Real = E::Real>>(
        &self,
        dy: Option<Tensor>,
        dsum: Option<Tensor>,
    ) -> Result<Gradients> {
        let Self { kind, eps, group, norm_before_gate, .. } = *self;
        let (residual, z) = (self.residual.as_ref(), self.z.as_ref());
        let input = NormInput { x: &self.x, residual, z, norm_before_gate };
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref());
        let norm = Norm { kind, weight, bias, eps, group_size: None };
        let prepared = Prepared::new(&input)?;
        let locks = prepared.hold();
        let problem = Problem::<E, R>::new(&input, &norm, group, &locks)?;
        let strided = |x: Option<Tensor>| x.map(|x| with_unit_stride(&x)).transpose();
        let (dy, dsum) = (strided(dy)?, strided(dsum)?);
        let (dy, dsum) = (dy.as_ref().map(Held::new), dsum.as_ref().map(Held::new));
        let dy = dy.as_ref().map(|dy| dy.rows::<E>()).transpose()?;
        let dsum = dsum.as_ref().map(|dsum| dsum.rows::<R>()).transpose()?;

        let elements = problem.elements();
        let (mut dx, mut dresidual, mut dz) = (Vec::new(), Vec::new(), Vec::new());
        let outlets = Outlets {
            x: Outlet::fresh(&mut dx, elements),
            residual: residual.map(|_| Outlet::fresh(&mut dresidual, elements)),
            z: z.map(|_| Outlet::fresh(&mut dz, elements)),
        };
        let work = |rows| Backward { problem: &problem, rows, dy, dsum, outlets: &outlets };
        let sums = problem.over_rows(work);
        // SAFETY: the pieces cover all rows, and each wrote all channels of its own.
        unsafe {
            dx.set_len(elements);
            dresidual.set_len(if residual.is_some() { elements } else { 0 });
            dz.set_len(if z.is_some() { elements } else { 0 });
        }
        let mut total = vec![E::Real::ZERO; 2 * problem.channels];
        for sums in sums {
            total.iter_mut().zip(sums).for_each(|(total, sum)| *total += sum);
        }
        let dbias = total.split_off(problem.channels);

        let shape = self.x.shape();
        let mut gradients = vec![Some(tensor(dx, shape))];
        gradients.extend(residual.map(|_| Some(tensor(dresidual, shape))));
        gradients.extend(z.map(|_| Some(tensor(dz, shape))));
        for (parameter, gradient) in [(weight, total), (bias, dbias)] {
            let Some(parameter) = parameter else { continue };
            gradients.push(Some(tensor(gradient, parameter.shape()).to_dtype(parameter.dtype())?));
        }
        Ok(gradients)
    }
}

/// Where the gradients of the sequences go.
struct Outlets<'a, E: Element, R: Element> {
    x: Outlet<'a, E>,
    residual: Option<Outlet<'a, R>>,
    z: Option<Outlet<'a, E>>,
}

/// Goes through a piece of the rows; returns its share of the gradients of weight and bias, one after the other.
struct Backward<'a, E: Element, R: Element<Real = E::Real>> {
    problem: &'a Problem<'a, E, R>,
    rows: Range<usize>,
    dy: Option<Rows<'a, E>>,
    dsum: Option<Rows<'a, R>>,
    outlets: &'a Outlets<'a, E, R>,
}

impl<T: Real, E: Element<Real = T>, R: Element<Real = T>> Kernel<T> for Backward<'_, E, R> {
    type Output = Vec<T>;

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) -> Vec<T> {
        let p = self.problem;
        let zeros = |n| vec![T::ZERO; n];
        let mut scratch =
            Scratch { values: zeros(p.channels), slopes: zeros(p.channels), sums: zeros(2 * p.channels) };
        for row in self.rows.clone() {
            p.gather(s, row, &mut scratch.values);
            for group in (0..p.channels).step_by(p.group) {
                self.group(s, row, group..group + p.group, &mut scratch);
            }
        }
        scratch.sums
    }
}

struct Scratch<T> {
    /// `s` of a row.
    values: Vec<T>,
    /// `dn` of a row.
    slopes: Vec<T>,
    /// The gradients of weight and bias over the rows so far.
    sums: Vec<T>,
}

impl<T: Real, E: Element<Real = T>, R: Element<Real = T>> Backward<'_, E, R> {
    /// One group of one row.
    #[inline(always)]
    fn group<S: Simd<T>>(&self, s: S, row: usize, channels: Range<usize>, scratch: &mut Scratch<T>) {
        let p = self.problem;
        let Scratch { values, slopes, sums } = scratch;
        let moments = p.moments(s, &values[channels.clone()]);
        let zero = s.splat(T::ZERO);
        let (dweight, dbias) = sums.split_at_mut(p.channels);
        let (mut mean, mut product) = (zero, zero);
        for (c, n) in lanes(s, channels.clone()) {
            let normal = p.normal(s, load(s, values, c, n), moments);
            let mut h = self.dy.map_or(zero, |dy| load(s, dy.nth(row), c, n));
            if let (Some(z), Some(dz), true) = (&p.z, &self.outlets.z, p.gate_after) {
                let z = load(s, z.nth(row), c, n);
                let gate = sigmoid(s, z);
                let slope = s.mul(p.affine(s, normal, c, n), silu_grad(s, z, gate));
                // SAFETY: `at` checked the place; no other task has this row.
                unsafe { store(s, dz.at(row * p.channels + c, n), n, s.mul(h, slope)) };
                h = s.mul(h, s.mul(z, gate));
            }
            let weighted = s.fma(h, normal, load(s, dweight, c, n));
            put(s, dweight, c, n, weighted);
            let summed = s.add(load(s, dbias, c, n), h);
            put(s, dbias, c, n, summed);
            // lanes beyond the group have a zero gradient
            let slope = p.weight.as_ref().map_or(h, |weight| s.mul(h, load(s, weight, c, n)));
            put(s, slopes, c, n, slope);
            mean = s.add(mean, slope);
            product = s.fma(slope, normal, product);
        }
        let count = T::from_f64(p.group as f64);
        let mut product = s.sum(product) / count;
        if p.kind == NormKind::RmsOutside {
            // the root alone, without eps, is what moves
            let root = T::ONE / moments.scale - p.eps;
            product = if root > T::ZERO { product / (moments.scale * root) } else { T::ZERO };
        }
        let product = s.splat(product);
        let mean = match p.kind {
            NormKind::Rms | NormKind::RmsOutside => zero,
            NormKind::Layer => s.splat(s.sum(mean) / count),
        };
        let scale = s.splat(moments.scale);
        for (c, n) in lanes(s, channels) {
            let normal = s.mul(s.sub(load(s, values, c, n), s.splat(moments.mean)), scale);
            let slope = s.sub(load(s, slopes, c, n), mean);
            let mut ds = s.mul(scale, s.nfma(normal, product, slope));
            let at = row * p.channels + c;
            if let Some(dsum) = &self.dsum {
                ds = s.add(ds, load(s, dsum.nth(row), c, n));
            }
            // SAFETY: `at` checked the places; no other task has this row.
            unsafe {
                if let Some(residual) = &self.outlets.residual {
                    store(s, residual.at(at, n), n, ds);
                }
                if let (Some(z), Some(dz), false) = (&p.z, &self.outlets.z, p.gate_after) {
                    let z = load(s, z.nth(row), c, n);
                    let gate = sigmoid(s, z);
                    let slope = s.mul(load(s, p.x.nth(row), c, n), silu_grad(s, z, gate));
                    store(s, dz.at(at, n), n, s.mul(ds, slope));
                    ds = s.mul(ds, s.mul(z, gate));
                }
                store(s, self.outlets.x.at(at, n), n, ds);
            }
        }
    }
}
