//! The arguments of the kernels, laid out as `retention.cuh` has them, and their launches.

use super::plan::{Kernel, Plan};
use crate::backend::cuda::{
    Argument, Buffer, Element, Guards, Held, Launch, Module, Packed, device_of, fits,
};
use crate::ops::retention::Sizes;
use crate::{Error, Result};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, Shape, Storage, Tensor};

/// Threads of the kernels of `retention_carry.cu`; lanes of a warp.
pub(super) const THREADS: usize = 256;
pub(super) const LANES: usize = 32;

/// `[B, T, Hx, width]`, steps in elements; `share` heads share one of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heads {
    data: u64,
    row: i64,
    token: i64,
    head: i64,
    share: i64,
}

impl Heads {
    /// `[B, length, heads, width]`, one for each head.
    pub(super) fn contiguous(data: u64, [length, heads, width]: [usize; 3]) -> Self {
        let [row, token, head] = [length * heads * width, heads * width, width].map(|n| n as i64);
        Self { data, row, token, head, share: 1 }
    }
}

/// `struct Retention` of `retention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arguments {
    q: Heads,
    k: Heads,
    v: Heads,
    pub(super) o: Heads,
    log_decay: u64,
    marks: u64,
    pub(super) initial: u64,
    pub(super) state: u64,
    pub(super) carried: u64,
    factors: u64,
    key_step: i64,
    value_step: i64,
    inner: f32,
    outer: f32,
    length: i32,
    heads: i32,
    keys: i32,
    values: i32,
    segment: i32,
    segments: i32,
    per_token: i32,
    backwards: i32,
    aligned: i32,
}

/// The decays of a call.
#[derive(Clone, Copy)]
pub(super) struct Decays<'a> {
    /// `[H]` or `[B, T, H]`, contiguous f32.
    pub(super) log_decay: &'a Tensor,
    /// `[B, T]`
    pub(super) marks: Option<&'a Tensor>,
    pub(super) plan: Plan,
    pub(super) heads: usize,
}

/// A walk through time: `S = decay S + inner k^T v`, `o = outer q S`. Tensors have unit stride, states are contiguous f32.
#[derive(Clone, Copy)]
pub(super) struct Walk<'a> {
    pub(super) q: &'a Tensor,
    pub(super) k: &'a Tensor,
    pub(super) v: &'a Tensor,
    pub(super) decays: Decays<'a>,
    pub(super) inner: f32,
    pub(super) outer: f32,
    /// Whether states lie in memory with values before keys.
    pub(super) transposed: bool,
    pub(super) backwards: bool,
    /// `[B, H, K, V]`, before the walk's first token.
    pub(super) initial: Option<&'a Tensor>,
}

impl Walk<'_> {
    pub(super) fn dims(&self) -> Result<[usize; 5]> {
        let (batch, length, _, keys) = self.q.dims4()?;
        Ok([batch, length, self.decays.heads, keys, self.v.dim(3)?])
    }

    pub(super) fn segments(&self) -> Result<usize> {
        Ok(self.q.dim(1)?.div_ceil(self.decays.plan.segment))
    }

    /// The states before each segment, `[B H, segments, K V]`; `None` for a single one.
    pub(super) fn states<E: Element>(&self, what: &str) -> Result<Option<Tensor>> {
        let [batch, _, heads, keys, values] = self.dims()?;
        let (segments, device) = (self.segments()?, &device_of(self.q)?);
        if segments == 1 {
            return Ok(None);
        }
        let (rows, numbers) = (batch * heads, keys * values);
        let mut carried = Buffer::<f32>::new(device, rows * segments * numbers)?;
        let mut factors = Buffer::<f32>::new(device, rows * segments)?;
        let (locks, stream) = (Locks::new(self, None), device.cuda_stream());
        {
            let guards = &mut Guards::default();
            let mut arguments = locks.arguments::<E>(self, device, &stream, guards)?;
            arguments.carried = carried.pointer(&stream, guards);
            arguments.factors = factors.pointer(&stream, guards);
            let launcher = Launcher { what, device };
            let carry: [&dyn Argument; 6] = [
                &arguments.carried,
                &arguments.factors,
                &arguments.initial,
                &(numbers as i64),
                &(segments as i32),
                &arguments.backwards,
            ];
            // SAFETY: `Locks` gives pointers and steps of tensors whose shapes were checked, and the buffers have the
            // sizes that the kernels fill.
            unsafe {
                launcher.walk::<E>("retention_states", self, arguments)?;
                launcher.plain("retention_carry", [numbers.div_ceil(THREADS), rows], &carry)?;
            }
        }
        Ok(Some(carried.tensor(device, (rows, segments, numbers))))
    }

    /// Outputs and the state after the last token, from the states before each segment.
    pub(super) fn outputs<E: Element>(&self, what: &str, states: Option<&Tensor>) -> Result<Results<E>> {
        self.results(what, states, false)
    }

    /// The same token by token; neither transposed nor backwards.
    pub(super) fn steps<E: Element>(&self, what: &str) -> Result<Results<E>> {
        self.results(what, None, true)
    }

    fn results<E: Element>(&self, what: &str, states: Option<&Tensor>, steps: bool) -> Result<Results<E>> {
        let [batch, length, heads, keys, values] = self.dims()?;
        let device = &device_of(self.q)?;
        let mut o = Buffer::<E>::new(device, batch * length * heads * values)?;
        let mut state = Buffer::<f32>::new(device, batch * heads * keys * values)?;
        let (locks, stream) = (Locks::new(self, states), device.cuda_stream());
        {
            let guards = &mut Guards::default();
            let mut arguments = locks.arguments::<E>(self, device, &stream, guards)?;
            arguments.o = Heads::contiguous(o.pointer(&stream, guards), [length, heads, values]);
            arguments.aligned &= (values * size_of::<E>()).is_multiple_of(16) as i32;
            arguments.state = state.pointer(&stream, guards);
            let launcher = Launcher { what, device };
            // SAFETY: as in `states`.
            unsafe {
                match steps {
                    true => launcher.step::<E>(self, arguments)?,
                    false => launcher.walk::<E>("retention", self, arguments)?,
                }
            }
        }
        let shape = if self.transposed { [values, keys] } else { [keys, values] };
        Ok(Results {
            o,
            state,
            o_shape: (batch, length, heads, values),
            state_shape: (batch, heads, shape[0], shape[1]),
            device: device.clone(),
        })
    }
}

/// What a walk leaves.
pub(super) struct Results<E: Element> {
    o: Buffer<E>,
    state: Buffer<f32>,
    o_shape: (usize, usize, usize, usize),
    state_shape: (usize, usize, usize, usize),
    device: CudaDevice,
}

impl<E: Element> Results<E> {
    /// Outputs `[B, T, H, V]` and state `[B, H, K, V]`, untracked.
    pub(super) fn tensors(self) -> [Tensor; 2] {
        [self.o.tensor(&self.device, self.o_shape), self.state.tensor(&self.device, self.state_shape)]
    }

    /// The same for a graph.
    pub(super) fn storages(self) -> [(Storage, Shape); 2] {
        let (o, state) = (self.o.storage(&self.device), self.state.storage(&self.device));
        [(o, self.o_shape.into()), (state, self.state_shape.into())]
    }
}

/// The steps of a tensor at `data`.
pub(super) fn steps(data: u64, x: &Tensor, heads: usize) -> Heads {
    let [row, token, head] = [0, 1, 2].map(|i| x.stride()[i] as i64);
    Heads { data, row, token, head, share: (heads / x.dims()[2]) as i64 }
}

/// The tensors of a walk, held.
pub(super) struct Locks<'a> {
    tensors: Vec<(&'static str, Held<'a>)>,
}

impl<'a> Locks<'a> {
    pub(super) fn new(walk: &Walk<'a>, states: Option<&'a Tensor>) -> Self {
        let all = [
            ("retention: q", Some(walk.q)),
            ("retention: k", Some(walk.k)),
            ("retention: v", Some(walk.v)),
            ("retention: log_decay", Some(walk.decays.log_decay)),
            ("retention: segments", walk.decays.marks),
            ("retention: initial_state", walk.initial),
            ("retention: states", states),
        ];
        Self { tensors: all.into_iter().filter_map(|(name, x)| Some((name, Held::new(x?)))).collect() }
    }

    /// The arguments of a kernel, results aside.
    pub(super) fn arguments<'s, E: Element>(
        &'s self,
        walk: &Walk,
        device: &CudaDevice,
        stream: &'s CudaStream,
        guards: &mut Guards<'s>,
    ) -> Result<Arguments> {
        let mut pointer = |name: &str| match self.tensors.iter().find(|(own, _)| *own == name) {
            Some((_, held)) => held.pointer(name, device, stream, guards),
            None => Ok::<_, Error>(0),
        };
        let heads = walk.decays.heads;
        let mut aligned = true;
        let mut sequence = |name: &str, x: &Tensor| {
            let heads = steps(pointer(name)?, x, heads);
            let places = [heads.row, heads.token, heads.head].map(|n| n as usize * size_of::<E>());
            aligned &= heads.data.is_multiple_of(16) && places.iter().all(|n| n.is_multiple_of(16));
            Ok::<_, Error>(heads)
        };
        let (q, k, v) = (
            sequence("retention: q", walk.q)?,
            sequence("retention: k", walk.k)?,
            sequence("retention: v", walk.v)?,
        );
        let [_, length, heads, keys, values] = walk.dims()?;
        let [key_step, value_step] = if walk.transposed { [1, keys] } else { [values, 1] };
        Ok(Arguments {
            q,
            k,
            v,
            log_decay: pointer("retention: log_decay")?,
            marks: pointer("retention: segments")?,
            initial: pointer("retention: initial_state")?,
            carried: pointer("retention: states")?,
            key_step: key_step as i64,
            value_step: value_step as i64,
            inner: walk.inner,
            outer: walk.outer,
            length: length as i32,
            heads: heads as i32,
            keys: keys as i32,
            values: values as i32,
            segment: walk.decays.plan.segment as i32,
            segments: walk.segments()? as i32,
            per_token: (walk.decays.log_decay.rank() == 3) as i32,
            backwards: walk.backwards as i32,
            aligned: aligned as i32,
            ..Arguments::default()
        })
    }
}

/// The module of walk `name` and its name there.
fn place_of(name: &str, element: &str, kernel: &Kernel) -> (Module, String) {
    let module = match (element, kernel.hopper) {
        ("bf16", false) => Module::RetentionBf16,
        ("bf16", true) => Module::RetentionHopperBf16,
        ("f16", false) => Module::RetentionF16,
        ("f16", true) => Module::RetentionHopperF16,
        _ => Module::RetentionF32,
    };
    let hopper = if kernel.hopper { "_hopper" } else { "" };
    (module, format!("{name}{hopper}_{element}_{}_{}", kernel.keys, kernel.values))
}

/// Whether the device has the shared memory that the kernels of a plan ask for, those of gradients if `tracked`.
pub(super) fn fit(
    device: &CudaDevice,
    sizes: &Sizes,
    plan: &Plan,
    element: &str,
    tracked: bool,
) -> Result<bool> {
    let both = [(sizes.keys, sizes.values), (sizes.values, sizes.keys)];
    for (keys, values) in both.into_iter().take(1 + tracked as usize) {
        let Some(kernel) = Kernel::new(keys, values, plan) else { return Ok(false) };
        for name in ["retention", "retention_states"] {
            let (module, name) = place_of(name, element, &kernel);
            if !fits(device, module, &name)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Launches of one call.
pub(super) struct Launcher<'a> {
    pub(super) what: &'a str,
    pub(super) device: &'a CudaDevice,
}

impl Launcher<'_> {
    /// # Safety
    /// The pointers of `arguments` lead to what its sizes say.
    unsafe fn walk<E: Element>(&self, name: &str, walk: &Walk, arguments: Arguments) -> Result<()> {
        let [batch, _, heads, keys, values] = walk.dims()?;
        let kernel = Kernel::new(keys, values, &walk.decays.plan);
        let kernel = kernel.ok_or_else(|| Error::value("retention: keys", "at most 512", keys))?;
        let (module, kernel_name) = place_of(name, E::NAME, &kernel);
        let launch = Launch {
            what: self.what,
            device: self.device,
            module,
            kernel: &kernel_name,
            grid: [values.div_ceil(kernel.values), batch * heads, walk.segments()?],
            threads: kernel.threads(),
            dynamic: true,
        };
        // SAFETY: the kernel takes one `Retention`; the caller vouches for what it points at.
        unsafe { launch.run(&[&Packed(arguments)]) }
    }

    /// A kernel of `retention_carry.cu`.
    ///
    /// # Safety
    /// As [`Launch::run`].
    pub(super) unsafe fn plain(
        &self,
        kernel: &str,
        grid: [usize; 2],
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        let launch = Launch {
            what: self.what,
            device: self.device,
            module: Module::RetentionCarry,
            kernel,
            grid: [grid[0], grid[1], 1],
            threads: THREADS as u32,
            dynamic: false,
        };
        // SAFETY: the caller's promise.
        unsafe { launch.run(arguments) }
    }
}
