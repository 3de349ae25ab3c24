//! What a layer asks of a checkpoint.

use crate::ops::accumulation_dtype;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Init, VarBuilder};
use rand::Rng;

/// A parameter as a layer declares it: its upstream name, its shape and whether it may be narrower than f32.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// The name below the layer's prefix, as in `dt_proj.weight`.
    pub name: String,
    /// The shape.
    pub shape: Vec<usize>,
    /// Kept in f32 or wider whatever the model's dtype: decays, and what else a rounding would ruin.
    pub wide: bool,
}

impl Parameter {
    /// A parameter in the model's dtype.
    pub fn new(name: &str, shape: &[usize]) -> Self {
        Self { name: name.into(), shape: shape.into(), wide: false }
    }

    /// A parameter in f32 or wider.
    pub fn wide(name: &str, shape: &[usize]) -> Self {
        Self { wide: true, ..Self::new(name, shape) }
    }

    /// The same below `prefix`.
    pub fn under(mut self, prefix: &str) -> Self {
        self.name = format!("{prefix}.{}", self.name);
        self
    }

    /// The dtype it has in a model of `dtype`.
    pub fn dtype(&self, dtype: DType) -> DType {
        if self.wide { accumulation_dtype(dtype) } else { dtype }
    }

    /// Its number of elements, or `None` where that overflows.
    pub(crate) fn elements(&self) -> Option<usize> {
        let count = self.shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n))?;
        // in bytes of the widest dtype, as an allocation may have them
        (count <= isize::MAX as usize / 8).then_some(count)
    }

    /// Reads it from `vb`.
    pub(crate) fn read(&self, vb: &VarBuilder) -> Result<Tensor> {
        let hint = if self.name.ends_with("norm.weight") || self.name.ends_with("D") {
            Init::Const(1.0)
        } else if self.shape.len() > 1 && !self.wide {
            let fan_in: usize = self.shape[1..].iter().product();
            let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
            Init::Uniform { lo: -bound, up: bound }
        } else {
            Init::Const(0.0)
        };
        Ok(vb.get_with_hints_dtype(self.shape.clone(), &self.name, hint, self.dtype(vb.dtype()))?)
    }
}

/// The parameters of one layer, read by name from a `VarBuilder`.
pub(crate) struct Reader<'a> {
    declared: Vec<Parameter>,
    vb: VarBuilder<'a>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(declared: Vec<Parameter>, vb: VarBuilder<'a>) -> Self {
        Self { declared, vb }
    }

    /// A parameter that the layer declares.
    pub(crate) fn get(&self, name: &str) -> Result<Tensor> {
        let undeclared = || Error::value(name, "a parameter of the layer", "no such parameter");
        self.maybe(name)?.ok_or_else(undeclared)
    }

    /// A parameter that the layer may go without.
    pub(crate) fn maybe(&self, name: &str) -> Result<Option<Tensor>> {
        let declared = self.declared.iter().find(|parameter| parameter.name == name);
        declared.map(|parameter| parameter.read(&self.vb)).transpose()
    }
}

/// `[shape]` of f32, uniform in `±bound`.
pub(crate) fn uniform(rng: &mut impl Rng, shape: &[usize], bound: f64) -> Result<Tensor> {
    let draw = |_| rng.random_range(-1.0..=1.0f64) * bound;
    filled(shape, draw)
}

/// The default of PyTorch's linear and convolution layers, `kaiming_uniform(sqrt 5)`: uniform in `±fan_in^-1/2`.
pub(crate) fn fan_in_uniform(rng: &mut impl Rng, shape: &[usize], scale: f64) -> Result<Tensor> {
    let fan_in: usize = shape.iter().skip(1).product();
    uniform(rng, shape, scale / (fan_in.max(1) as f64).sqrt())
}

/// `[shape]` of f32, normal with standard deviation `std`.
pub(crate) fn normal(rng: &mut impl Rng, shape: &[usize], std: f64) -> Result<Tensor> {
    // Box and Muller; 1 - u is never zero
    let draw = |_| {
        let (u, v): (f64, f64) = (rng.random(), rng.random());
        std * (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    };
    filled(shape, draw)
}

/// `[shape]` of f32 from the element's index.
pub(crate) fn filled(shape: &[usize], draw: impl FnMut(usize) -> f64) -> Result<Tensor> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count).map(draw).map(|x| x as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Refuses a parameter list that no memory could hold.
pub(crate) fn check_sizes(parameters: &[Parameter]) -> Result<()> {
    for parameter in parameters {
        if parameter.elements().is_none() {
            let expected = "a number of elements that fits in memory";
            return Err(Error::value(&parameter.name, expected, format!("{:?}", parameter.shape)));
        }
    }
    Ok(())
}
