//! Activation recomputation.

use super::record::{record_all, storage_of};
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor, Var};

/// Runs `f` without keeping its activations: the backward pass computes them again.
///
/// `parameters` are the variables that `f` reads beside its `inputs`; only these and the inputs get gradients. Memory
/// between the passes is that of inputs and outputs; the cost is a second forward pass. `f` must be deterministic.
///
/// With nothing tracked this is `f` itself. On Metal, which has no custom gradients, too: nothing is saved there.
///
/// # Errors
/// Those of `f`; and a tracked parameter that is no variable: its gradient could not be told from its own inputs'.
pub fn checkpoint<F>(inputs: &[&Tensor], parameters: &[&Tensor], f: F) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
{
    let all: Vec<&Tensor> = inputs.iter().chain(parameters).copied().collect();
    if !all.iter().any(|x| x.track_op()) || all.iter().any(|x| x.device().is_metal()) {
        return f(&inputs.iter().map(|&x| x.clone()).collect::<Vec<_>>());
    }
    if let Some(derived) = parameters.iter().find(|p| p.track_op() && !p.is_variable()) {
        candle_core::bail!("checkpoint: a parameter of shape {:?} is not a variable", derived.dims())
    }
    let detached: Vec<Tensor> = inputs.iter().map(|x| x.detach()).collect();
    let outputs = f(&detached)?.iter().map(storage_of).collect::<Result<Vec<_>>>()?;
    let tracked: Vec<bool> = inputs.iter().map(|x| x.track_op()).collect();
    let parameters: Vec<Tensor> = parameters.iter().map(|p| (*p).clone()).collect();
    record_all("checkpoint", &all, outputs, move |gradients| {
        let leaf = |(x, &tracked): (&Tensor, &bool)| {
            if tracked { Ok(Var::from_tensor(x)?.into_inner()) } else { Ok(x.clone()) }
        };
        let leaves = detached.iter().zip(&tracked).map(leaf).collect::<Result<Vec<_>>>()?;
        let mut seeds: Option<Tensor> = None;
        for (output, gradient) in f(&leaves)?.iter().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            if !output.track_op() {
                continue;
            }
            let seed = output.apply_op1(Seed(gradient.clone()))?;
            seeds = Some(match seeds {
                Some(seeds) => (seeds + seed)?,
                None => seed,
            });
        }
        let Some(seeds) = seeds else { return Ok(vec![None; leaves.len() + parameters.len()]) };
        let gradients = seeds.backward()?;
        Ok(leaves.iter().chain(&parameters).map(|x| gradients.get(x).map(Tensor::detach)).collect())
    })
}

/// Gives a tensor a gradient computed elsewhere: one meaningless number forward, the gradient backward.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        super::record::cpu_token()
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        storage: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        super::record::cuda_token(storage)
    }
    fn bwd(&self, output: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        if output.shape() != self.0.shape() || output.dtype() != self.0.dtype() {
            return Err(Error::msg("checkpoint: the function returned other shapes the second time"));
        }
        Ok(Some(self.0.clone()))
    }
}
