//! A projection: weight and optional bias.

use super::Parameter;
use super::parameter::Reader;
use crate::Result;
use candle_core::Tensor;

/// `x weight^T + bias`, as part of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    /// `name.weight` `[outputs, inputs]` and, where asked, `name.bias` `[outputs]`.
    pub(crate) fn parameters(name: &str, outputs: usize, inputs: usize, bias: bool) -> Vec<Parameter> {
        let mut all = vec![Parameter::new(&format!("{name}.weight"), &[outputs, inputs])];
        if bias {
            all.push(Parameter::new(&format!("{name}.bias"), &[outputs]));
        }
        all
    }

    /// Reads what the layer declares of it.
    pub(crate) fn read(read: &Reader, name: &str) -> Result<Self> {
        Ok(Self { weight: read.get(&format!("{name}.weight"))?, bias: read.maybe(&format!("{name}.bias"))? })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::ops::linear(x, &self.weight, self.bias.as_ref())
    }

    /// The outputs in parts.
    pub(crate) fn forward_parts<const N: usize>(
        &self,
        x: &Tensor,
        widths: [usize; N],
    ) -> Result<[Tensor; N]> {
        crate::ops::linear::linear_parts(x, &self.weight, self.bias.as_ref(), widths)
    }
}
