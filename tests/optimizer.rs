//! The optimiser, the gradients' sums and norms and the schedule, each against its definition.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{Random, assert_close, values};
use std::collections::BTreeMap;
use subquadratic::models::{LanguageModel, ModelConfig};
use subquadratic::train::{AdamW, AdamWConfig, Gradients, Group, Schedule};

/// Variables under their names.
fn named(variables: &[(&str, &Tensor)]) -> BTreeMap<String, Var> {
    variables.iter().map(|(name, x)| (name.to_string(), Var::from_tensor(x).unwrap())).collect()
}

/// The gradients of `sum w g` for chosen `g`: exactly `g`.
fn exact(variables: &BTreeMap<String, Var>, gradients: &[Tensor]) -> Gradients {
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu).unwrap();
    for (variable, gradient) in variables.values().zip(gradients) {
        let gradient = gradient.to_dtype(variable.dtype()).unwrap();
        let term = (variable.as_tensor() * gradient).unwrap().to_dtype(DType::F64).unwrap();
        loss = (loss + term.sum_all().unwrap()).unwrap();
    }
    Gradients::take(variables, &mut loss.backward().unwrap())
}

/// AdamW as the paper has it, one number at a time.
struct Reference {
    config: AdamWConfig,
    decay: f64,
    weight: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Reference {
    fn new(config: &AdamWConfig, decay: f64, weight: &Tensor) -> Self {
        let weight = values(weight);
        let zeros = vec![0.0; weight.len()];
        Self { config: config.clone(), decay, first: zeros.clone(), second: zeros, weight, steps: 0 }
    }

    fn step(&mut self, gradient: &Tensor, rate: f64) {
        self.steps += 1;
        let AdamWConfig { beta1, beta2, epsilon, .. } = self.config;
        for (i, g) in values(gradient).into_iter().enumerate() {
            self.first[i] = beta1 * self.first[i] + (1.0 - beta1) * g;
            self.second[i] = beta2 * self.second[i] + (1.0 - beta2) * g * g;
            let m = self.first[i] / (1.0 - beta1.powi(self.steps));
            let v = self.second[i] / (1.0 - beta2.powi(self.steps));
            self.weight[i] -= rate * self.decay * self.weight[i];
            self.weight[i] -= rate * m / (v.sqrt() + epsilon);
        }
    }
}

#[test]
fn adamw_is_the_formula() {
    let mut random = Random::new(1);
    let config = AdamWConfig { beta1: 0.85, beta2: 0.97, epsilon: 1e-3, weight_decay: 0.2 };
    // longer than one block of the kernel, and not a multiple of a register
    for (dtype, shape, tolerance) in [
        (DType::F64, (7, 13), 1e-14),
        (DType::F32, (3, 11003), 2e-6),
        (DType::BF16, (5, 4099), 5e-3),
        (DType::F16, (1, 37), 1e-3),
    ] {
        let start = random.normal(shape).to_dtype(dtype).unwrap();
        let variables = named(&[("decays.weight", &start), ("x.bias", &start)]);
        let mut optimizer = AdamW::new(&variables, config.clone()).unwrap();
        let mut references = [Reference::new(&config, 0.2, &start), Reference::new(&config, 0.0, &start)];
        for step in 0..6 {
            let rate = 0.05 / (step + 1) as f64;
            let mut g = [random.normal(shape), random.normal(shape)];
            for g in &mut g {
                *g = g.to_dtype(dtype).unwrap().to_dtype(DType::F64).unwrap();
            }
            optimizer.step(&exact(&variables, &g), rate).unwrap();
            for (reference, g) in references.iter_mut().zip(&g) {
                reference.step(g, rate);
            }
        }
        assert_eq!(optimizer.steps(), 6);
        let state = optimizer.state().unwrap();
        for ((name, variable), reference) in variables.iter().zip(&references) {
            let tensor = |x: &[f64]| Tensor::from_slice(x, shape, &Device::Cpu).unwrap();
            let weight = tensor(&reference.weight);
            assert_close(&format!("{dtype:?} {name}"), variable, &weight, tolerance);
            // moments and masters are as good as f32 whatever the weights' dtype
            let fine = if dtype == DType::F64 { 1e-14 } else { 2e-6 };
            assert_close("first moment", &state[&format!("first.{name}")], &tensor(&reference.first), fine);
            assert_close(
                "second moment",
                &state[&format!("second.{name}")],
                &tensor(&reference.second),
                fine,
            );
            match state.get(&format!("master.{name}")) {
                Some(master) => {
                    assert_close("master", master, &weight, fine);
                    assert_eq!(master.dtype(), DType::F32);
                    let rounded = master.to_dtype(dtype).unwrap();
                    assert_eq!(
                        common::bits(&rounded),
                        common::bits(variable),
                        "the weight is its master, rounded"
                    );
                }
                None => assert!(matches!(dtype, DType::F32 | DType::F64)),
            }
        }
    }
}

#[test]
fn bf16_weights_learn_from_steps_smaller_than_their_rounding() {
    let start = Tensor::new(&[1.0f32], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    let variables = named(&[("w", &start)]);
    let mut optimizer = AdamW::new(&variables, AdamWConfig::default()).unwrap();
    let g = Tensor::new(&[1.0f64], &Device::Cpu).unwrap();
    for _ in 0..100 {
        // 1 - 1e-3 is no bf16 number
        optimizer.step(&exact(&variables, std::slice::from_ref(&g)), 1e-3).unwrap();
    }
    assert!((values(&variables["w"])[0] - 0.9).abs() < 0.004, "{}", variables["w"]);
}

#[test]
fn a_scaled_gradient_is_a_gradient_times_the_scale() {
    let mut random = Random::new(2);
    let start = random.normal((4, 5));
    let g = random.normal((4, 5));
    let (a, b) = (named(&[("w", &start)]), named(&[("w", &start)]));
    let config = AdamWConfig { epsilon: 0.1, ..Default::default() };
    let mut scaled = exact(&a, std::slice::from_ref(&g));
    scaled.scale(0.25);
    AdamW::new(&a, config.clone()).unwrap().step(&scaled, 0.1).unwrap();
    let quarter = exact(&b, &[(g * 0.25).unwrap()]);
    AdamW::new(&b, config).unwrap().step(&quarter, 0.1).unwrap();
    assert_close("weight", &a["w"], &b["w"], 1e-14);
    assert_close("get", &scaled.get("w").unwrap().unwrap(), &quarter.get("w").unwrap().unwrap(), 1e-15);
}

#[test]
fn the_usual_groups_decay_matrices_only() {
    let model = LanguageModel::init(&ModelConfig::mamba(16, 2, 40), 1, DType::F32, &Device::Cpu).unwrap();
    let optimizer = AdamW::new(model.variables(), AdamWConfig::default()).unwrap();
    let groups = optimizer.groups();
    assert_eq!(groups.len(), model.variables().len());
    let mut decaying = 0;
    for (name, group) in groups {
        let last = name.rsplit('.').next().unwrap();
        let free = ["A_log", "D", "bias", "dt_bias"].contains(&last) || name.contains("norm");
        assert_eq!(group, Group { rate: 1.0, decay: if free { 0.0 } else { 1.0 } }, "{name}");
        decaying += usize::from(!free);
    }
    // embedding, and in each block in_proj, conv1d, x_proj, dt_proj, out_proj
    assert_eq!(decaying, 1 + 2 * 5);
}

#[test]
fn groups_of_ones_own() {
    let one = Tensor::ones((2, 2), DType::F64, &Device::Cpu).unwrap();
    let variables = named(&[("decays", &one), ("frozen", &one), ("slow", &one)]);
    let group = |name: &str, _: &Tensor| match name {
        "decays" => Group { rate: 1.0, decay: 3.0 },
        "slow" => Group { rate: 0.5, decay: 0.0 },
        _ => Group { rate: 0.0, decay: 1.0 },
    };
    let mut optimizer = AdamW::with_groups(&variables, AdamWConfig::default(), group).unwrap();
    let g = vec![one.clone(); 3];
    optimizer.step(&exact(&variables, &g), 0.1).unwrap();
    let first = |name: &str| values(&variables[name])[0];
    assert!((first("decays") - (1.0 - 0.1 * 0.1 * 3.0 - 0.1)).abs() < 1e-7);
    assert_eq!(first("frozen"), 1.0);
    assert!((first("slow") - 0.95).abs() < 1e-7);
    let negative = |_: &str, _: &Tensor| Group { rate: -1.0, decay: 0.0 };
    let error = AdamW::with_groups(&variables, AdamWConfig::default(), negative).unwrap_err().to_string();
    assert!(error.contains("decays"), "{error}");
}

#[test]
fn clipping_scales_all_gradients_to_the_norm() {
    let mut random = Random::new(3);
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let (a, b) = (random.normal((3, 70)), random.normal(5));
        let (a, b) = (a.to_dtype(dtype).unwrap(), b.to_dtype(dtype).unwrap());
        let variables = named(&[("a", &a), ("b", &b)]);
        let norm = values(&a).iter().chain(&values(&b)).map(|x| x * x).sum::<f64>().sqrt();
        let gradients = || exact(&variables, &[a.clone(), b.clone()]);
        for (largest, after) in [(0.5, 0.5), (1e6, norm), (f64::INFINITY, norm)] {
            let mut clipped = gradients();
            assert!((clipped.clip(largest).unwrap() / norm - 1.0).abs() < 1e-6);
            assert!((clipped.norm().unwrap() / after - 1.0).abs() < 1e-6);
            let got = clipped.get("a").unwrap().unwrap();
            let want = (a.to_dtype(DType::F64).unwrap() * (after / norm)).unwrap();
            assert_close("a", &got, &want, 4.0 * common::rounding(dtype));
        }
        for bad in [0.0, -1.0, f64::NAN] {
            assert!(gradients().clip(bad).is_err());
        }
        for bad in [f64::NAN, f64::INFINITY] {
            let bad = (b.ones_like().unwrap().to_dtype(DType::F64).unwrap() * bad).unwrap();
            let mut gradients = exact(&variables, &[a.clone(), bad]);
            assert!(!gradients.clip(1.0).unwrap().is_finite());
        }
    }
}

#[test]
fn sums_of_gradients_are_wide() {
    let mut random = Random::new(4);
    let shape = (3, 6007);
    for (dtype, tolerance) in [(DType::F64, 1e-15), (DType::F32, 1e-6), (DType::BF16, 1e-6)] {
        let variables = named(&[("w", &random.normal(shape).to_dtype(dtype).unwrap())]);
        let parts: Vec<Tensor> = (0..5).map(|_| random.normal(shape).to_dtype(dtype).unwrap()).collect();
        let mut sum = exact(&variables, &parts[..1]);
        let mut want = parts[0].to_dtype(DType::F64).unwrap();
        for part in &parts[1..] {
            let mut next = exact(&variables, std::slice::from_ref(part));
            next.scale(0.5);
            sum.add(&next).unwrap();
            sum.add(&exact(&variables, std::slice::from_ref(part))).unwrap();
            want = (want + part.to_dtype(DType::F64).unwrap() * 1.5).unwrap();
        }
        assert_close("sum", &sum.get("w").unwrap().unwrap(), &want, tolerance);
        assert_eq!(values(&exact(&variables, &parts[..1]).get("w").unwrap().unwrap()), values(&parts[0]));
    }
}

#[test]
fn the_schedule_warms_up_and_falls() {
    let schedule = Schedule { peak: 2.0, warmup: 4, steps: 12, min_ratio: 0.25 };
    let rates: Vec<f64> = (0..15).map(|step| schedule.rate(step)).collect();
    assert_eq!(rates[..5], [0.5, 1.0, 1.5, 2.0, 2.0]);
    assert!((rates[8] - (0.25 + 0.75 * 0.5) * 2.0).abs() < 1e-12);
    assert!(rates[4..12].windows(2).all(|pair| pair[0] > pair[1]));
    assert_eq!(rates[12..], [0.5; 3]);
    let none = Schedule { warmup: 0, ..schedule.clone() };
    assert_eq!(none.rate(0), 2.0);
    // a warm-up longer than the training still ends in the lowest rate
    assert_eq!(Schedule { steps: 2, ..schedule.clone() }.rate(3), 2.0);
    assert_eq!(Schedule { steps: 2, ..schedule }.rate(4), 0.5);
    assert_eq!(Schedule::constant(0.3).rate(1000), 0.3);
    assert!(Schedule { peak: f64::NAN, ..none.clone() }.validate().is_err());
    assert!(Schedule { min_ratio: 1.5, ..none }.validate().is_err());
}
