//! Activation recomputation.

use super::record::{record_all, storage_of};
use super::tape::{Sums, during};
use candle_core::{Result, Tensor, Var};

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
    // on a tape of its own, which ends here and takes the activations with it
    let outputs = during(|| f(&detached))?.0.iter().map(storage_of).collect::<Result<Vec<_>>>()?;
    let tracked: Vec<bool> = inputs.iter().map(|x| x.track_op()).collect();
    let parameters: Vec<Tensor> = parameters.iter().map(|p| (*p).clone()).collect();
    record_all("checkpoint", &all, outputs, move |gradients| {
        let leaf = |(x, &tracked): (&Tensor, &bool)| {
            if tracked { Ok(Var::from_tensor(x)?.into_inner()) } else { Ok(x.clone()) }
        };
        let leaves = detached.iter().zip(&tracked).map(leaf).collect::<Result<Vec<_>>>()?;
        let (outputs, entries) = during(|| f(&leaves))?;
        let mut seeds = vec![];
        for (output, gradient) in outputs.into_iter().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            if output.shape() != gradient.shape() || output.dtype() != gradient.dtype() {
                candle_core::bail!("checkpoint: the function returned other shapes the second time")
            }
            seeds.push((output, gradient.clone()));
        }
        let mut sums = Sums::default();
        sums.add_all(seeds)?;
        sums.back(entries)?;
        Ok(leaves.iter().chain(&parameters).map(|x| sums.get(x)).collect())
    })
}
