//! Operators with any number of inputs and outputs in candle's graph.
//!
//! candle's custom operators take at most three inputs and return one output. [`connect`] lifts both limits with small
//! nodes that carry one meaningless number forward and the real gradients backward:
//!
//! ```text
//! inputs --> Port (3 inputs each) --> Join --> Core --> Emit --> output 0
//!                                                  \--> Emit --> output 1
//! ```
//!
//! candle visits nodes from the outputs: each `Emit` leaves its output's gradient with the recording, `Core` then runs
//! the operator's backward once, and each `Port` hands out the gradients of its inputs. What is left is keyed by
//! thread, so that two threads may go backward through one graph.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// Gradients in the order of the inputs (or outputs); `None` where there is none.
pub(crate) type Gradients = Vec<Option<Tensor>>;

pub(super) type Backward = dyn Fn(&[Option<Tensor>]) -> Result<Gradients> + Send + Sync;

/// Puts an operator with a tracked input into the graph; the outputs.
pub(super) fn connect(
    name: &'static str,
    inputs: &[&Tensor],
    outputs: Vec<(Storage, Shape)>,
    backward: Box<Backward>,
) -> Result<Vec<Tensor>> {
    let tracked: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].track_op()).collect();
    let recording = Arc::new(Recording {
        name,
        tracked: (0..inputs.len()).map(|i| inputs[i].track_op()).collect(),
        outputs: outputs.len(),
        backward,
        passes: Mutex::new(HashMap::new()),
    });
    let mut tokens = Vec::new();
    for group in tracked.chunks(3) {
        let port = Port { recording: recording.clone(), inputs: group.to_vec() };
        let group: Vec<&Tensor> = group.iter().map(|&i| inputs[i]).collect();
        tokens.push(apply(&group, port)?);
    }
    while tokens.len() > 1 {
        tokens = tokens
            .chunks(3)
            .map(|group| {
                let join = Port { recording: recording.clone(), inputs: vec![] };
                apply(&group.iter().collect::<Vec<_>>(), join)
            })
            .collect::<Result<_>>()?;
    }
    let core = tokens[0].apply_op1(Core(recording.clone()))?;
    let emit = |(index, (storage, shape))| {
        let result = Mutex::new(Some((storage, shape)));
        core.apply_op1(Emit { recording: recording.clone(), index, result })
    };
    outputs.into_iter().enumerate().map(emit).collect()
}

fn apply(inputs: &[&Tensor], port: Port) -> Result<Tensor> {
    match inputs {
        [a] => a.apply_op1(port),
        [a, b] => a.apply_op2(b, port),
        [a, b, c] => a.apply_op3(b, c, port),
        _ => candle_core::bail!("a port takes one to three tensors, got {}", inputs.len()),
    }
}

/// What the nodes of one recorded operator share.
struct Recording {
    name: &'static str,
    /// Which inputs get a gradient.
    tracked: Vec<bool>,
    outputs: usize,
    backward: Box<Backward>,
    passes: Mutex<HashMap<ThreadId, Pass>>,
}

/// One backward pass under way.
#[derive(Default)]
struct Pass {
    outputs: Gradients,
    inputs: Gradients,
    /// How many inputs are still to fetch their gradient; with the last the pass is forgotten.
    waiting: usize,
}

impl Recording {
    fn passes(&self) -> MutexGuard<'_, HashMap<ThreadId, Pass>> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_output_gradient(&self, index: usize, gradient: Tensor) {
        let mut passes = self.passes();
        let pass = passes.entry(thread::current().id()).or_default();
        pass.outputs.resize(self.outputs, None);
        pass.outputs[index] = Some(gradient);
    }

    fn run(&self) -> Result<()> {
        let id = thread::current().id();
        let mut outputs = self.passes().remove(&id).unwrap_or_default().outputs;
        outputs.resize(self.outputs, None);
        let mut inputs = (self.backward)(&outputs)?;
        if inputs.len() != self.tracked.len() {
            candle_core::bail!("{}: {} gradients for {} inputs", self.name, inputs.len(), self.tracked.len())
        }
        let mut waiting = 0;
        for (gradient, &tracked) in inputs.iter_mut().zip(&self.tracked) {
            if tracked {
                waiting += 1;
            } else {
                *gradient = None;
            }
        }
        self.passes().insert(id, Pass { outputs: vec![], inputs, waiting });
        Ok(())
    }

    /// The gradient of input `index`, zero if the operator gave none.
    fn input_gradient(&self, index: usize, input: &Tensor) -> Result<Option<Tensor>> {
        let id = thread::current().id();
        let mut passes = self.passes();
        let gradient = passes.get_mut(&id).and_then(|pass| {
            pass.waiting = pass.waiting.saturating_sub(1);
            pass.inputs.get_mut(index)?.take()
        });
        if passes.get(&id).is_some_and(|pass| pass.waiting == 0) {
            passes.remove(&id);
        }
        drop(passes);
        let Some(gradient) = gradient else { return input.zeros_like().map(Some) };
        check_gradient(self.name, index, &gradient, input.shape(), input.dtype())?;
        Ok(Some(gradient))
    }
}

/// The forward pass of an operator of one input that emits a token.
macro_rules! token_forward {
    () => {
        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            cpu_token()
        }
        #[cfg(feature = "cuda")]
        fn cuda_fwd(
            &self,
            storage: &candle_core::CudaStorage,
            _: &Layout,
        ) -> Result<(candle_core::CudaStorage, Shape)> {
            cuda_token(storage)
        }
    };
}

/// A gradient is like its input.
pub(super) fn check_gradient(
    name: &str,
    index: usize,
    gradient: &Tensor,
    shape: &Shape,
    dtype: DType,
) -> Result<()> {
    if gradient.shape() != shape || gradient.dtype() != dtype {
        let (got, got_dtype) = (gradient.shape(), gradient.dtype());
        candle_core::bail!("{name}: gradient {index} is {got_dtype:?} {got:?}, its input {dtype:?} {shape:?}")
    }
    Ok(())
}

/// Gives a tensor a gradient computed elsewhere: one meaningless number forward, the gradient backward.
pub(super) struct Seed(pub(super) Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }
    token_forward!();
    fn bwd(&self, output: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        check_gradient("seed", 0, &self.0, output.shape(), output.dtype())?;
        Ok(Some(self.0.clone()))
    }
}

/// Takes up to three inputs, emits a token; `inputs` are their indices (none: the inputs are tokens themselves).
struct Port {
    recording: Arc<Recording>,
    inputs: Vec<usize>,
}

impl Port {
    fn gradient(&self, place: usize, input: &Tensor) -> Result<Option<Tensor>> {
        match self.inputs.get(place) {
            Some(&index) => self.recording.input_gradient(index, input),
            None => input.zeros_like().map(Some),
        }
    }
}

/// The tokens' storage: one number.
fn cpu_token() -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(vec![0.0]), 1.into()))
}

#[cfg(feature = "cuda")]
fn cuda_token(like: &candle_core::CudaStorage) -> Result<(candle_core::CudaStorage, Shape)> {
    use candle_core::{backend::BackendDevice, backend::BackendStorage};
    let shape = Shape::from(1);
    Ok((like.device().zeros_impl(&shape, DType::F32)?, shape))
}

/// The three arities of [`Port`] differ in nothing else.
macro_rules! port {
    ($op:ident, $($storage:ident $layout:ident $input:ident $place:literal),+ => $gradients:ty) => {
        impl $op for Port {
            fn name(&self) -> &'static str {
                self.recording.name
            }
            fn cpu_fwd(
                &self,
                $($storage: &CpuStorage, $layout: &Layout),+
            ) -> Result<(CpuStorage, Shape)> {
                cpu_token()
            }
            #[cfg(feature = "cuda")]
            fn cuda_fwd(
                &self,
                $($storage: &candle_core::CudaStorage, $layout: &Layout),+
            ) -> Result<(candle_core::CudaStorage, Shape)> {
                port!(@first $($storage)+)
            }
            fn bwd(&self, $($input: &Tensor,)+ _: &Tensor, _: &Tensor) -> Result<$gradients> {
                let gradients = ($(self.gradient($place, $input)?),+);
                Ok(gradients)
            }
        }
    };
    (@first $first:ident $($rest:ident)*) => {{
        $(let _ = $rest;)*
        cuda_token($first)
    }};
}

port!(CustomOp1, _s1 _l1 a 0 => Option<Tensor>);
port!(CustomOp2, _s1 _l1 a 0, _s2 _l2 b 1 => (Option<Tensor>, Option<Tensor>));
port!(
    CustomOp3, _s1 _l1 a 0, _s2 _l2 b 1, _s3 _l3 c 2
    => (Option<Tensor>, Option<Tensor>, Option<Tensor>)
);

/// Runs the operator's backward once all its outputs' gradients are in.
struct Core(Arc<Recording>);

impl CustomOp1 for Core {
    fn name(&self) -> &'static str {
        self.0.name
    }
    token_forward!();
    fn bwd(&self, token: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.0.run()?;
        token.zeros_like().map(Some)
    }
}

/// Puts one output, computed beforehand, into the graph.
struct Emit {
    recording: Arc<Recording>,
    index: usize,
    result: Mutex<Option<(Storage, Shape)>>,
}

impl Emit {
    fn take(&self) -> Result<(Storage, Shape)> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.ok_or_else(|| candle_core::Error::msg(format!("{}: output taken twice", self.recording.name)))
    }
}

impl CustomOp1 for Emit {
    fn name(&self) -> &'static str {
        self.recording.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: inputs on the CPU, output elsewhere", self.name()),
        }
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => candle_core::bail!("{}: inputs on CUDA, output elsewhere", self.name()),
        }
    }
    fn bwd(&self, token: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        self.recording.take_output_gradient(self.index, gradient.clone());
        token.zeros_like().map(Some)
    }
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
