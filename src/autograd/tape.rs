//! A tape of this crate's operators, beside candle's graph.
//!
//! candle's backward pass begins the gradient of every tensor with zeros and adds each part to it: a write, two reads and a
//! write more for every activation, in a bf16 Mamba block on a GPU a quarter of the time. On a tape, the first part of a
//! gradient *is* the gradient; only a tensor used twice costs a sum. And an operator on a tape is one entry of a list, not
//! the nodes that carry it through candle's graph.
//!
//! While a tape runs on a thread, [`record`](super::record) puts operators on it, and their results are leaves to candle:
//! candle's graph lives on in the pieces between two of them (a slice, a change of dtype), each with leaves of the tape
//! or variables at its end. The backward pass goes through the tape from the last entry on and sends gradients through
//! such pieces where it meets them, so that any mix of operations is differentiated.

use super::graph::{Backward, Seed, check_gradient};
use crate::Error;
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Shape, Storage, Tensor, TensorId, backprop::GradStore};
use std::cell::RefCell;
use std::collections::HashMap;

thread_local! {
    static TAPE: RefCell<Option<Vec<Entry>>> = const { RefCell::new(None) };
}

/// A recorded operator.
pub(super) struct Entry {
    name: &'static str,
    inputs: Vec<Input>,
    outputs: Vec<TensorId>,
    backward: Box<Backward>,
}

enum Input {
    Constant,
    /// A variable, or a result of the tape. Its memory is not held.
    Leaf {
        id: TensorId,
        shape: Shape,
        dtype: DType,
    },
    /// Made of such by candle's operations.
    Derived(Tensor),
}

/// Whether this thread records on a tape.
pub(super) fn is_running() -> bool {
    TAPE.with_borrow(Option::is_some)
}

/// Puts an operator on the running tape; the outputs, as leaves.
pub(super) fn push(
    name: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<(Storage, Shape)>,
    backward: Box<Backward>,
) -> Vec<Tensor> {
    let input = |x: &&Tensor| match (x.is_variable(), x.track_op()) {
        (true, _) => Input::Leaf { id: x.id(), shape: x.shape().clone(), dtype: x.dtype() },
        (false, true) => Input::Derived((*x).clone()),
        (false, false) => Input::Constant,
    };
    let inputs = inputs.iter().map(input).collect();
    let leaf = |(storage, shape)| Tensor::from_storage(storage, shape, BackpropOp::none(), true);
    let outputs: Vec<Tensor> = outputs.into_iter().map(leaf).collect();
    let entry = Entry { name, inputs, outputs: outputs.iter().map(Tensor::id).collect(), backward };
    TAPE.with_borrow_mut(|tape| tape.get_or_insert_default().push(entry));
    outputs
}

/// Runs `f` with a fresh tape; one that runs already waits.
pub(super) fn during<T, E>(
    f: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Vec<Entry>), E> {
    /// Puts the outer tape back, after a panic too.
    struct Outer(Option<Vec<Entry>>);
    impl Drop for Outer {
        fn drop(&mut self) {
            TAPE.set(self.0.take());
        }
    }
    let outer = Outer(TAPE.replace(Some(vec![])));
    let value = f()?;
    let entries = TAPE.take().unwrap_or_default();
    drop(outer);
    Ok((value, entries))
}

/// Gradients by tensor.
#[derive(Default)]
pub(super) struct Sums(HashMap<TensorId, Tensor>);

impl Sums {
    /// Adds the gradients that candle's pass from `end` gives the leaves.
    fn through(&mut self, end: &Tensor) -> Result<()> {
        let store = end.backward()?;
        for &id in store.get_ids() {
            if let Some(gradient) = store.get_id(id) {
                self.add(id, gradient.detach())?;
            }
        }
        Ok(())
    }

    fn add(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(&id) {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        };
        self.0.insert(id, sum);
        Ok(())
    }

    /// Goes back through a tape, whose entries are dropped on the way.
    pub(super) fn back(&mut self, mut entries: Vec<Entry>) -> Result<()> {
        while let Some(Entry { name, inputs, outputs, backward }) = entries.pop() {
            let outputs: Vec<Option<Tensor>> = outputs.iter().map(|id| self.0.remove(id)).collect();
            if outputs.iter().all(Option::is_none) {
                continue;
            }
            let gradients = backward(&outputs)?;
            if gradients.len() != inputs.len() {
                candle_core::bail!("{name}: {} gradients for {} inputs", gradients.len(), inputs.len())
            }
            let mut derived = vec![];
            for (place, (input, gradient)) in inputs.into_iter().zip(gradients).enumerate() {
                let Some(gradient) = gradient else { continue };
                match input {
                    Input::Constant => {}
                    Input::Leaf { id, shape, dtype } => {
                        check_gradient(name, place, &gradient, &shape, dtype)?;
                        self.add(id, gradient)?;
                    }
                    Input::Derived(x) => {
                        check_gradient(name, place, &gradient, x.shape(), x.dtype())?;
                        derived.push((x, gradient));
                    }
                }
            }
            self.add_all(derived)?;
        }
        Ok(())
    }

    /// Gives tensors their gradients: leaves have them then, others pass them on through candle's graph.
    pub(super) fn add_all(&mut self, gradients: Vec<(Tensor, Tensor)>) -> Result<()> {
        let mut seeds: Option<Tensor> = None;
        for (x, gradient) in gradients {
            if x.is_variable() {
                self.add(x.id(), gradient)?;
            } else if x.track_op() {
                let seed = x.apply_op1(Seed(gradient))?;
                seeds = Some(match seeds {
                    Some(seeds) => (seeds + seed)?,
                    None => seed,
                });
            }
        }
        seeds.map_or(Ok(()), |seeds| self.through(&seeds))
    }

    /// The gradient of a tensor.
    pub(super) fn get(&self, tensor: &Tensor) -> Option<Tensor> {
        self.0.get(&tensor.id()).cloned()
    }

    fn into_store(self) -> Result<GradStore> {
        // candle makes stores in no other way
        let mut store = Tensor::zeros((), DType::F32, &Device::Cpu)?.backward()?;
        for (id, gradient) in self.0 {
            store.insert_id(id, gradient);
        }
        Ok(store)
    }
}

/// The value of `f` and the gradients of its sum in all variables it was made of: `f()?` and its `backward()`, at less
/// cost.
///
/// In `f`, the operators, layers and models of this crate go on a tape instead of into candle's graph: gradients are not
/// begun with zeros and added up one by one, which on a GPU saves a read and a write of every activation and many small
/// launches. candle's own operations may stand between them. Results are the same but for the rounding of sums. A value
/// that leaves `f` by another way than its result has no gradient; detach it.
///
/// ```
/// # use candle_core::{DType, Device, Var};
/// # use subquadratic::{autograd::value_and_grad, ops::linear};
/// # fn main() -> subquadratic::Result<()> {
/// let weight = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let x = candle_core::Tensor::new(&[[1f32, 2.0, 3.0]], &Device::Cpu)?;
/// let (loss, gradients) = value_and_grad(|| Ok(linear(&x, &weight, None)?.sqr()?.sum_all()?))?;
/// assert_eq!(loss.to_scalar::<f32>()?, 72.0);
/// assert_eq!(gradients.get(&weight).unwrap().to_vec2::<f32>()?[0], [12.0, 24.0, 36.0]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `f` and of the backward pass.
pub fn value_and_grad(f: impl FnOnce() -> crate::Result<Tensor>) -> crate::Result<(Tensor, GradStore)> {
    let (value, entries) = during(f)?;
    let mut sums = Sums::default();
    sums.through(&value)?;
    sums.back(entries)?;
    Ok((value.detach(), sums.into_store()?))
}

/// The value of `f` and its vector-Jacobian product: as [`value_and_grad`], from a `gradient` of the value instead of ones.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// # use subquadratic::autograd::vjp;
/// # fn main() -> subquadratic::Result<()> {
/// let x = Var::new(&[1f32, 2.0, 3.0], &Device::Cpu)?;
/// let (value, gradients) = vjp(|| Ok(x.sqr()?), &Tensor::new(&[1f32, 0.0, 10.0], &Device::Cpu)?)?;
/// assert_eq!(value.to_vec1::<f32>()?, [1.0, 4.0, 9.0]);
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f32>()?, [2.0, 0.0, 60.0]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `f` and of the backward pass; a `gradient` of another shape or dtype than the value's.
pub fn vjp(
    f: impl FnOnce() -> crate::Result<Tensor>,
    gradient: &Tensor,
) -> crate::Result<(Tensor, GradStore)> {
    let (value, entries) = during(f)?;
    if gradient.shape() != value.shape() {
        return Err(Error::shape("vjp: gradient", format!("{:?}", value.dims()), gradient.dims()));
    }
    if gradient.dtype() != value.dtype() {
        return Err(Error::dtype("vjp: gradient", format!("{:?}", value.dtype()), gradient.dtype()));
    }
    let mut sums = Sums::default();
    sums.add_all(vec![(value.clone(), gradient.detach())])?;
    sums.back(entries)?;
    Ok((value.detach(), sums.into_store()?))
}
