//! The CPU path: elementwise, one read and one write; rows are read where they lie.
//!
//! At some 15 operations for an exponential, 16 lanes compute faster than two threads read: memory is the floor.

use super::Activation;
use crate::autograd::record;
use crate::backend::cpu::math::{gelu, gelu_tanh, sigmoid, silu, silu_grad, softplus};
use crate::backend::cpu::parallel;
use crate::backend::cpu::simd::{Element, Kernel, Real, Simd, dispatch};
use crate::backend::cpu::view::{Held, Outlet, Rows, lanes, load, storage, store, tensor, with_unit_stride};
use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// The functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Sigmoid,
    Softplus,
    Activation(Activation),
    /// `x act(z)`: the only one with a second argument.
    Gate(Activation),
}

impl Function {
    fn name(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::Softplus => "softplus",
            Self::Activation(activation) => activation.name(),
            Self::Gate(_) => "gate",
        }
    }

    #[inline(always)]
    fn value<T: Real, S: Simd<T>>(self, s: S, x: S::V, z: S::V) -> S::V {
        match self {
            Self::Sigmoid => sigmoid(s, x),
            Self::Softplus => softplus(s, x),
            Self::Activation(activation) => activation.value(s, x),
            Self::Gate(activation) => s.mul(x, activation.value(s, z)),
        }
    }

    /// The derivatives in `x` and, of the gate, in `z`.
    #[inline(always)]
    fn slopes<T: Real, S: Simd<T>>(self, s: S, x: S::V, z: S::V) -> [S::V; 2] {
        let one = s.splat(T::ONE);
        match self {
            Self::Sigmoid => {
                let y = sigmoid(s, x);
                [s.mul(y, s.sub(one, y)), one]
            }
            Self::Softplus => [sigmoid(s, x), one],
            Self::Activation(activation) => [activation.value_and_slope(s, x)[1], one],
            Self::Gate(activation) => {
                let [value, slope] = activation.value_and_slope(s, z);
                [value, s.mul(x, slope)]
            }
        }
    }
}

impl Activation {
    #[inline(always)]
    fn value<T: Real, S: Simd<T>>(self, s: S, x: S::V) -> S::V {
        match self {
            Self::Silu => silu(s, x),
            Self::Gelu => gelu(s, x)[0],
            Self::GeluTanh => gelu_tanh(s, x)[0],
            Self::Relu => s.max(s.splat(T::ZERO), x),
            Self::Identity => x,
        }
    }

    #[inline(always)]
    fn value_and_slope<T: Real, S: Simd<T>>(self, s: S, x: S::V) -> [S::V; 2] {
        match self {
            Self::Silu => {
                let gate = sigmoid(s, x);
                [s.mul(x, gate), silu_grad(s, x, gate)]
            }
            Self::Gelu => gelu(s, x),
            Self::GeluTanh => gelu_tanh(s, x),
            // one for every positive number, else zero
            Self::Relu => {
                let y = s.max(s.splat(T::ZERO), x);
                let scaled = s.mul(s.mul(y, s.splat(T::from_f64(1e30))), s.splat(T::from_f64(1e30)));
                [y, s.min(s.splat(T::ONE), scaled)]
            }
            Self::Identity => [x, s.splat(T::ONE)],
        }
    }
}

/// `function` of checked arguments on the CPU; `z` for the gate alone.
pub(super) fn on_cpu(function: Function, x: &Tensor, z: Option<&Tensor>) -> Result<Tensor> {
    let (forward, backward): (Forward, Backward) = match x.dtype() {
        DType::F32 => (forward::<f32>, backward::<f32>),
        DType::F64 => (forward::<f64>, backward::<f64>),
        DType::BF16 => (forward::<bf16>, backward::<bf16>),
        DType::F16 => (forward::<f16>, backward::<f16>),
        other => {
            let name = format!("{}: x", function.name());
            return Err(Error::dtype(name, "f32, f64, bf16 or f16", other));
        }
    };
    let y = forward(function, x, z)?;
    let mut inputs = vec![x];
    inputs.extend(z);
    let (saved, saved_z) = (x.detach(), z.map(Tensor::detach));
    let [y] = record(function.name(), &inputs, [(y, x.shape().clone())], move |[dy]| {
        let count = 1 + usize::from(saved_z.is_some());
        let Some(dy) = dy else { return Ok(vec![None; count]) };
        let gradients = backward(function, &saved, saved_z.as_ref(), dy)?;
        Ok(gradients.into_iter().map(Some).collect())
    })?;
    Ok(y)
}

type Forward = fn(Function, &Tensor, Option<&Tensor>) -> Result<Storage>;
type Backward = fn(Function, &Tensor, Option<&Tensor>, &Tensor) -> Result<Vec<Tensor>>;

/// Numbers that a piece of the work has about.
const PIECE: usize = 1 << 14;

/// A part of all rows: some rows, or of a single long row some columns.
struct Piece {
    rows: Range<usize>,
    columns: Range<usize>,
}

fn pieces(rows: usize, width: usize) -> Vec<Piece> {
    if rows == 1 {
        let columns = parallel::pieces(width, PIECE);
        return columns.into_iter().map(|columns| Piece { rows: 0..1, columns }).collect();
    }
    let rows = parallel::pieces(rows, PIECE.div_ceil(width.max(1)));
    rows.into_iter().map(|rows| Piece { rows, columns: 0..width }).collect()
}

/// One long row where all tensors are contiguous, else as they are with unit stride.
fn unify<const N: usize>(tensors: [Option<&Tensor>; N]) -> Result<[Option<Tensor>; N]> {
    let flat = tensors.iter().flatten().all(|x| x.is_contiguous());
    let unify = |x: &Tensor| if flat { x.flatten_all() } else { with_unit_stride(x) };
    let mut unified = [const { None }; N];
    for (to, x) in unified.iter_mut().zip(tensors) {
        *to = x.map(unify).transpose()?;
    }
    Ok(unified)
}

fn forward<E: Element>(function: Function, x: &Tensor, z: Option<&Tensor>) -> Result<Storage> {
    let [x, z] = unify([Some(x), z])?;
    let (x, z) = (x.as_ref().map(Held::new), z.as_ref().map(Held::new));
    let x = x.as_ref().map(Held::rows::<E>).transpose()?;
    let x = x.ok_or_else(|| Error::value(function.name(), "an argument", "none"))?;
    let z = z.as_ref().map(Held::rows::<E>).transpose()?;
    let elements = x.count() * x.width();
    let mut y = Vec::new();
    let outlet = Outlet::fresh(&mut y, elements);
    parallel::map(&pieces(x.count(), x.width()), elements, |piece| {
        dispatch(Apply { function, x, z, dy: None, piece, outlets: [Some(&outlet), None] })
    });
    // SAFETY: the pieces cover all rows and columns, and each wrote its own.
    unsafe { y.set_len(elements) };
    Ok(Storage::Cpu(storage(y)))
}

fn backward<E: Element>(
    function: Function,
    x: &Tensor,
    z: Option<&Tensor>,
    dy: &Tensor,
) -> Result<Vec<Tensor>> {
    let shape = x.shape();
    let [x, z, dy] = unify([Some(x), z, Some(dy)])?;
    let held = [&x, &dy].map(|x| x.as_ref().map(Held::new));
    let [Some(x), Some(dy)] = &held else { return Err(Error::value(function.name(), "arguments", "none")) };
    let (x, dy) = (x.rows::<E>()?, dy.rows::<E>()?);
    let z = z.as_ref().map(Held::new);
    let z = z.as_ref().map(Held::rows::<E>).transpose()?;
    let elements = x.count() * x.width();
    let (mut dx, mut dz) = (Vec::new(), Vec::new());
    let first = Outlet::fresh(&mut dx, elements);
    let second = z.map(|_| Outlet::fresh(&mut dz, elements));
    parallel::map(&pieces(x.count(), x.width()), elements, |piece| {
        let outlets = [Some(&first), second.as_ref()];
        dispatch(Apply { function, x, z, dy: Some(dy), piece, outlets })
    });
    // SAFETY: the pieces cover all rows and columns, and each wrote its own.
    unsafe {
        dx.set_len(elements);
        dz.set_len(if z.is_some() { elements } else { 0 });
    }
    let mut gradients = vec![tensor(dx, shape)];
    gradients.extend(z.map(|_| tensor(dz, shape)));
    Ok(gradients)
}

/// The values, or with `dy` the gradients, of a piece.
struct Apply<'a, E: Element> {
    function: Function,
    x: Rows<'a, E>,
    z: Option<Rows<'a, E>>,
    dy: Option<Rows<'a, E>>,
    piece: &'a Piece,
    outlets: [Option<&'a Outlet<'a, E>>; 2],
}

impl<T: Real, E: Element<Real = T>> Kernel<T> for Apply<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        // the function is chosen once, not for every register
        match self.function {
            Function::Sigmoid => self.each(s, Function::Sigmoid),
            Function::Softplus => self.each(s, Function::Softplus),
            Function::Activation(Activation::Silu) => self.each(s, Function::Activation(Activation::Silu)),
            Function::Activation(Activation::Gelu) => self.each(s, Function::Activation(Activation::Gelu)),
            Function::Activation(Activation::GeluTanh) => {
                self.each(s, Function::Activation(Activation::GeluTanh))
            }
            Function::Activation(Activation::Relu) => self.each(s, Function::Activation(Activation::Relu)),
            Function::Activation(Activation::Identity) => {
                self.each(s, Function::Activation(Activation::Identity))
            }
            Function::Gate(Activation::Silu) => self.each(s, Function::Gate(Activation::Silu)),
            Function::Gate(Activation::Gelu) => self.each(s, Function::Gate(Activation::Gelu)),
            Function::Gate(Activation::GeluTanh) => self.each(s, Function::Gate(Activation::GeluTanh)),
            Function::Gate(Activation::Relu) => self.each(s, Function::Gate(Activation::Relu)),
            Function::Gate(Activation::Identity) => self.each(s, Function::Gate(Activation::Identity)),
        }
    }
}

impl<T: Real, E: Element<Real = T>> Apply<'_, E> {
    #[inline(always)]
    fn each<S: Simd<T>>(&self, s: S, function: Function) {
        let width = self.x.width();
        for row in self.piece.rows.clone() {
            let x = self.x.nth(row);
            let (z, dy) = (self.z.map(|z| z.nth(row)), self.dy.map(|dy| dy.nth(row)));
            for (c, n) in lanes(s, self.piece.columns.clone()) {
                let x = load(s, x, c, n);
                let z = z.map_or(x, |z| load(s, z, c, n));
                let results = match dy {
                    None => [function.value(s, x, z), x],
                    Some(dy) => {
                        let dy = load(s, dy, c, n);
                        function.slopes(s, x, z).map(|slope| s.mul(dy, slope))
                    }
                };
                for (outlet, result) in self.outlets.iter().zip(results) {
                    let Some(outlet) = outlet else { continue };
                    // SAFETY: `at` checked the place; no other piece has it.
                    unsafe { store(s, outlet.at(row * width + c, n), n, result) };
                }
            }
        }
    }
}
