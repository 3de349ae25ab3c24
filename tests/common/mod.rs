//! What the integration tests share: random tensors, closeness, gradients and their finite differences.
//!
//! Every helper is tested below, in every test file (so that none is unused there).

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// A seeded source of random numbers and tensors on the CPU.
pub struct Random(pub StdRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// An integer of `low..=high`.
    pub fn int(&mut self, low: usize, high: usize) -> usize {
        self.0.random_range(low..=high)
    }

    /// Uniform in `low..high`, f64.
    pub fn uniform(&mut self, shape: impl Into<Shape>, low: f64, high: f64) -> Tensor {
        let shape = shape.into();
        let values: Vec<f64> = (0..shape.elem_count()).map(|_| self.0.random_range(low..high)).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Standard normal, f64.
    pub fn normal(&mut self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let mut value = || {
            let radius = (-2.0 * self.0.random_range(f64::MIN_POSITIVE..1.0).ln()).sqrt();
            radius * (self.0.random_range(0.0..1.0) * std::f64::consts::TAU).cos()
        };
        let values: Vec<f64> = (0..shape.elem_count()).map(|_| value()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// A random cut of `length` into `parts` lengths of at least `least`.
    pub fn split(&mut self, length: usize, parts: usize, least: usize) -> Vec<usize> {
        let spare = length - parts * least;
        let mut cuts: Vec<usize> = (1..parts).map(|_| self.int(0, spare)).collect();
        cuts.extend([0, spare]);
        cuts.sort();
        cuts.windows(2).map(|pair| pair[1] - pair[0] + least).collect()
    }
}

/// The values, as f64.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The bits of the values, widened to f64: equal where the tensors are bit-identical.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    values(tensor).into_iter().map(f64::to_bits).collect()
}

/// Root of the mean square error over that of `want`, and the largest error over the largest of `want`.
pub fn relative_errors(got: &Tensor, want: &Tensor) -> (f64, f64) {
    let (got, want) = (values(got), values(want));
    let errors = || got.iter().zip(&want).map(|(a, b)| (a - b).abs());
    let largest = |values: &mut dyn Iterator<Item = f64>| {
        values.fold(0.0, |a: f64, b: f64| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) })
    };
    let floor = |x: f64| if x == 0.0 { 1.0 } else { x };
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let rms = (squares(&mut errors()) / floor(squares(&mut want.iter().copied()))).sqrt();
    (rms, largest(&mut errors()) / floor(largest(&mut want.iter().map(|x| x.abs()))))
}

/// Same shape, and both [`relative_errors`] at most `tolerance` (against zeros: absolute).
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    let (rms, max) = relative_errors(got, want);
    assert!(rms <= tolerance && max <= tolerance, "{what}: relative error rms {rms:.1e}, max {max:.1e}");
}

/// Half a unit in the last place at 1: the error of one rounding to `dtype`.
pub fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-53),
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        other => panic!("no rounding of {other:?}"),
    }
}

/// The sum of all outputs, each element with a fixed random weight, in f64.
pub fn weighted_sum(outputs: &[Tensor]) -> Result<Tensor> {
    let mut random = Random::new(7);
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for output in outputs {
        let weights = random.normal(output.shape());
        sum = (sum + (output.to_dtype(DType::F64)? * weights)?.sum_all()?)?;
    }
    Ok(sum)
}

/// The outputs of `f`, and the gradient of their [`weighted_sum`] in each input.
pub fn gradients(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> subquadratic::Result<Vec<Tensor>>,
) -> (Vec<Tensor>, Vec<Tensor>) {
    let leaves: Vec<Tensor> = inputs.iter().map(|x| Var::from_tensor(x).unwrap().into_inner()).collect();
    let outputs = f(&leaves).unwrap();
    let store = weighted_sum(&outputs).unwrap().backward().unwrap();
    let gradients = leaves.iter().map(|x| store.get(x).cloned().unwrap_or_else(|| x.zeros_like().unwrap()));
    let gradients = gradients.collect();
    (outputs.iter().map(|y| y.detach()).collect(), gradients)
}

/// Every gradient of `f`'s [`weighted_sum`] equals its central differences, and none is zero; inputs in f64.
#[track_caller]
pub fn check_gradients(
    what: &str,
    names: &[&str],
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> subquadratic::Result<Vec<Tensor>>,
) {
    const STEP: f64 = 1e-5;
    let (_, exact) = gradients(inputs, &f);
    assert_eq!(names.len(), inputs.len());
    for (i, (name, input)) in names.iter().zip(inputs).enumerate() {
        let base = values(input);
        let value_with = |place: usize, change: f64| {
            let mut moved = base.clone();
            moved[place] += change;
            let mut inputs = inputs.to_vec();
            inputs[i] = Tensor::from_vec(moved, input.shape(), &Device::Cpu).unwrap();
            weighted_sum(&f(&inputs).unwrap()).unwrap().to_scalar::<f64>().unwrap()
        };
        let difference = |place: usize| (value_with(place, STEP) - value_with(place, -STEP)) / (2.0 * STEP);
        let differences: Vec<f64> = (0..base.len()).map(difference).collect();
        let differences = Tensor::from_vec(differences, input.shape(), &Device::Cpu).unwrap();
        assert!(values(&exact[i]).iter().any(|&g| g != 0.0), "{what}: the gradient of {name} is zero");
        assert_close(&format!("{what}: gradient of {name}"), &exact[i], &differences, 1e-7);
    }
}

/// `f` on a pool of `threads` threads.
pub fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
}

#[test]
fn the_helpers_hold() {
    let mut random = Random::new(1);
    let x = random.normal(1000);
    assert!(values(&x.sqr().unwrap().mean_all().unwrap())[0] > 0.8);
    assert!(values(&random.uniform(100, 1.0, 2.0)).iter().all(|&x| (1.0..2.0).contains(&x)));
    let parts = random.split(20, 5, 2);
    assert!(parts.len() == 5 && parts.iter().sum::<usize>() == 20 && parts.iter().all(|&n| n >= 2));

    let near = (&x * (1.0 + 1e-9)).unwrap();
    assert_close("near", &near, &x, 1e-8);
    assert_ne!(bits(&near), bits(&x));
    assert_eq!(relative_errors(&x.zeros_like().unwrap(), &x), (1.0, 1.0));
    assert!(relative_errors(&(&x * f64::NAN).unwrap(), &x).1.is_nan());
    assert!(rounding(DType::F64) < rounding(DType::BF16));

    let x = x.narrow(0, 0, 9).unwrap();
    check_gradients("squares", &["x"], &[x], |x| Ok(vec![x[0].sqr()?]));
    assert_eq!(with_threads(3, rayon::current_num_threads), 3);
}
