//! What every benchmark needs: shapes, random tensors, and the measuring itself.

use candle_core::{DType, Device, Tensor, Var};
use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Deserialize;
use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};
use subquadratic::{Result, autograd::vjp};

/// One line of shapes.json: a name and sizes by letter.
#[derive(Clone, Deserialize)]
pub struct Shape {
    /// Its name in the ids.
    pub name: String,
    #[serde(flatten)]
    sizes: BTreeMap<String, usize>,
}

impl Shape {
    /// The size that goes by `letter`.
    pub fn size(&self, letter: &str) -> usize {
        *self.sizes.get(letter).unwrap_or_else(|| panic!("shapes.json: {} has no {letter}", self.name))
    }

    /// Several sizes.
    pub fn sizes<const N: usize>(&self, letters: [&str; N]) -> [usize; N] {
        letters.map(|letter| self.size(letter))
    }
}

/// A place to run, with random numbers and the shapes and dtypes that suit it.
pub struct Bench {
    /// The GPU of a build with the feature `cuda`, else the CPU.
    pub device: Device,
    shapes: BTreeMap<String, Vec<Shape>>,
    rng: StdRng,
}

impl Bench {
    /// On the best device of this build.
    pub fn new() -> Result<Self> {
        let shapes = serde_json::from_str(include_str!("shapes.json")).expect("shapes.json is well formed");
        Ok(Self { device: Device::cuda_if_available(0)?, shapes, rng: StdRng::seed_from_u64(0) })
    }

    /// The shapes of an operator: those named `cpu-...` on the CPU, all of them elsewhere.
    pub fn shapes(&self, operator: &str) -> Vec<Shape> {
        let fits = |shape: &&Shape| !self.device.is_cpu() || shape.name.starts_with("cpu-");
        self.shapes[operator].iter().filter(fits).cloned().collect()
    }

    /// The dtypes measured.
    pub fn dtypes(&self) -> &'static [DType] {
        if self.device.is_cpu() { &[DType::F32, DType::BF16] } else { &[DType::F32, DType::BF16, DType::F16] }
    }

    /// Uniform in `range`.
    pub fn uniform(&mut self, dims: &[usize], range: std::ops::Range<f32>, dtype: DType) -> Result<Tensor> {
        if !self.device.is_cpu() {
            return Ok(Tensor::rand(range.start, range.end, dims, &self.device)?.to_dtype(dtype)?);
        }
        let count = dims.iter().product();
        let values: Vec<f32> = (0..count).map(|_| self.rng.random_range(range.clone())).collect();
        Ok(Tensor::from_vec(values, dims, &self.device)?.to_dtype(dtype)?)
    }

    /// Token ids below `vocabulary`, `[B, L]` of u32.
    pub fn tokens(&mut self, batch: usize, length: usize, vocabulary: u32) -> Result<Tensor> {
        let ids: Vec<u32> = (0..batch * length).map(|_| self.rng.random_range(0..vocabulary)).collect();
        Ok(Tensor::from_vec(ids, (batch, length), &self.device)?)
    }
}

/// The dtype as the ids name it.
pub fn name(dtype: DType) -> &'static str {
    dtype.as_str()
}

/// A trainable copy.
pub fn var(tensor: &Tensor) -> Var {
    Var::from_tensor(tensor).expect("a variable")
}

/// A group of benchmarks, short enough that all of them together take minutes.
pub fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group
}

/// Measures `run` until its work on `device` is done. A GPU gets all runs of a sample in a row, as a model's layers would
/// give them, and is waited for behind the last.
pub fn measure<T>(
    group: &mut BenchmarkGroup<WallTime>,
    id: String,
    throughput: Throughput,
    device: &Device,
    run: impl FnMut() -> Result<T>,
) {
    measure_runs(group, id, throughput, device, 1, run);
}

/// As [`measure`], one of the `each` that every run has.
pub fn measure_runs<T>(
    group: &mut BenchmarkGroup<WallTime>,
    id: String,
    throughput: Throughput,
    device: &Device,
    each: u64,
    mut run: impl FnMut() -> Result<T>,
) {
    group.throughput(throughput);
    let mut fresh = true;
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|count| {
            // what the first run makes (a model, a kernel loaded) is not timed
            if std::mem::take(&mut fresh) {
                drop(run().expect("a benchmark runs"));
            }
            device.synchronize().expect("the device synchronises");
            let start = Instant::now();
            let runs = count.div_ceil(each);
            for _ in 0..runs {
                drop(black_box(run().expect("a benchmark runs")));
            }
            device.synchronize().expect("the device synchronises");
            start.elapsed().mul_f64(count as f64 / (runs * each) as f64)
        });
    });
}

/// Measures `<id>/step` as [`measure`] does; and on a GPU `<id>/graph`, one run of many recorded as a CUDA graph, so that
/// only the device's time counts.
pub fn measure_step<T>(
    group: &mut BenchmarkGroup<WallTime>,
    id: &str,
    throughput: Throughput,
    device: &Device,
    mut run: impl FnMut() -> Result<T>,
) {
    measure(group, format!("{id}/step"), throughput.clone(), device, &mut run);
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        use candle_core::cuda_backend::cudarc::driver::sys;
        const EACH: u64 = 20;
        group.throughput(throughput);
        group.bench_function(format!("{id}/graph"), |bencher| {
            let stream = cuda.cuda_stream();
            drop(run().expect("a benchmark runs"));
            device.synchronize().expect("the device synchronises");
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            stream.begin_capture(mode).expect("a stream records");
            (0..EACH).for_each(|_| drop(black_box(run().expect("a benchmark is recorded"))));
            let (mut recorded, mut graph) = (std::ptr::null_mut(), std::ptr::null_mut());
            let mut parameters = sys::CUDA_GRAPH_INSTANTIATE_PARAMS {
                flags: 0,
                hUploadStream: std::ptr::null_mut(),
                hErrNode_out: std::ptr::null_mut(),
                result_out: sys::CUgraphInstantiateResult::CUDA_GRAPH_INSTANTIATE_SUCCESS,
            };
            // SAFETY: the stream is recording, all places exist, and what the graph reads and writes lives as long as it does.
            unsafe {
                let ended = sys::cuStreamEndCapture(stream.cu_stream(), &raw mut recorded);
                ended.result().expect("a recording");
                let ready = sys::cuGraphInstantiateWithParams(&raw mut graph, recorded, &raw mut parameters);
                ready.result().expect("a graph");
            }
            // SAFETY: as above.
            let launch =
                || unsafe { sys::cuGraphLaunch(graph, stream.cu_stream()) }.result().expect("a graph runs");
            launch();
            device.synchronize().expect("the device synchronises");
            bencher.iter_custom(|count| {
                let launches = count.div_ceil(EACH);
                let start = Instant::now();
                (0..launches).for_each(|_| launch());
                device.synchronize().expect("the device synchronises");
                start.elapsed().mul_f64(count as f64 / (launches * EACH) as f64)
            });
            // SAFETY: nothing runs any more.
            unsafe {
                let _ = (sys::cuGraphExecDestroy(graph), sys::cuGraphDestroy(recorded));
            }
        });
    }
}

/// Measures `<id>/fwd`, `run` on plain tensors, and `<id>/fwd_bwd`, `run` on variables with their gradients from one of
/// its result.
pub fn measure_both(
    group: &mut BenchmarkGroup<WallTime>,
    id: &str,
    throughput: Throughput,
    inputs: &[Tensor],
    run: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let device = inputs[0].device();
    measure(group, format!("{id}/fwd"), throughput.clone(), device, || run(inputs));
    let variables: Vec<Tensor> = inputs.iter().map(|input| var(input).as_tensor().clone()).collect();
    let gradient = LazyCell::new(|| {
        let like = run(inputs).expect("a benchmark runs");
        let wide = Tensor::rand(-1f32, 1f32, like.shape(), device).expect("a gradient");
        wide.to_dtype(like.dtype()).expect("a gradient")
    });
    measure(group, format!("{id}/fwd_bwd"), throughput, device, || vjp(|| run(&variables), &gradient));
}
