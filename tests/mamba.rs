//! The Mamba layer: the streaming law in outputs, states and gradients, finite differences, initialisation, bad input.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{Random, assert_close, check_gradients, gradients, rounding, values};
use rand::{SeedableRng, rngs::StdRng};
use std::collections::HashMap;
use subquadratic::layers::mamba::TimeStepScheme;
use subquadratic::layers::{Mamba, MambaConfig, MambaState};
use subquadratic::ops::{Segments, accumulation_dtype};
use subquadratic::{Error, Result};

/// All options on, and all off; odd sizes; one tap.
fn configs() -> [MambaConfig; 4] {
    let plain = MambaConfig { d_inner: 6, d_state: 3, d_conv: 4, dt_rank: 2, ..MambaConfig::new(4) };
    [
        MambaConfig { bias: true, inner_norm_eps: Some(1e-3), ..plain.clone() },
        MambaConfig { conv_bias: false, d_conv: 2, ..plain.clone() },
        MambaConfig { d_conv: 1, d_state: 1, dt_rank: 1, d_inner: 5, ..plain.clone() },
        plain,
    ]
}

/// Parameters of the size that training leaves, f64, in the order of the config.
fn parameters(config: &MambaConfig, random: &mut Random) -> Vec<Tensor> {
    let draw = |p: subquadratic::layers::Parameter| match p.name.as_str() {
        "A_log" => random.uniform(p.shape, -1.0, 1.0),
        "dt_proj.bias" => random.uniform(p.shape, -3.0, 0.0),
        _ => (random.normal(p.shape) * 0.5).unwrap(),
    };
    config.parameters().into_iter().map(draw).collect()
}

fn layer(config: &MambaConfig, parameters: &[Tensor]) -> Result<Mamba> {
    let names = config.parameters().into_iter().map(|p| p.name);
    let dtype = parameters[0].dtype();
    let tensors: HashMap<String, Tensor> = names.zip(parameters.iter().cloned()).collect();
    Mamba::new(config, VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))
}

fn random_state(config: &MambaConfig, batch: usize, random: &mut Random) -> [Tensor; 2] {
    [
        random.normal((batch, config.d_inner, config.d_conv - 1)),
        random.normal((batch, config.d_inner, config.d_state)),
    ]
}

/// Input, states and parameters: what everything below is differentiated in.
struct Case {
    config: MambaConfig,
    inputs: Vec<Tensor>,
    names: Vec<String>,
}

impl Case {
    fn new(config: MambaConfig, batch: usize, length: usize, random: &mut Random) -> Self {
        let mut inputs = vec![random.normal((batch, length, config.d_model))];
        inputs.extend(random_state(&config, batch, random));
        inputs.extend(parameters(&config, random));
        let mut names = vec!["x".to_string(), "conv state".into(), "scan state".into()];
        names.extend(config.parameters().into_iter().map(|p| p.name));
        Self { config, inputs, names }
    }

    fn to_dtype(&self, dtype: DType) -> Vec<Tensor> {
        let declared = self.config.parameters();
        let cast = |(i, x): (usize, &Tensor)| match i {
            1 | 2 => x.to_dtype(accumulation_dtype(dtype)).unwrap(),
            _ if i > 2 => x.to_dtype(declared[i - 3].dtype(dtype)).unwrap(),
            _ => x.to_dtype(dtype).unwrap(),
        };
        self.inputs.iter().enumerate().map(cast).collect()
    }
}

/// The layer from the inputs of a [`Case`], going on from the state given: output and state.
fn whole(config: &MambaConfig, inputs: &[Tensor], segments: Option<&Segments>) -> Result<Vec<Tensor>> {
    let mut state = MambaState { conv: inputs[1].clone(), scan: inputs[2].clone() };
    let y = layer(config, &inputs[3..])?.forward_segments(&inputs[0], segments, Some(&mut state))?;
    Ok(vec![y, state.conv, state.scan])
}

#[track_caller]
fn all_close(what: &str, names: &[String], got: &[Tensor], want: &[Tensor], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_close(
            &format!("{what}: {}", names.get(i).map_or("output", |name| name)),
            got,
            want,
            tolerance,
        );
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let mut random = Random::new(1);
    for config in configs() {
        let case = Case::new(config, 2, 5, &mut random);
        // a layer with one tap carries no inputs on: there is nothing to differentiate in
        let empty = case.config.d_conv == 1;
        let inputs: Vec<Tensor> = case.inputs.iter().filter(|x| x.elem_count() > 0).cloned().collect();
        let names: Vec<&str> =
            case.names.iter().map(String::as_str).filter(|&n| !(empty && n == "conv state")).collect();
        check_gradients(&format!("{:?}", case.config), &names, &inputs, |inputs| {
            let mut all = inputs.to_vec();
            if empty {
                all.insert(1, case.inputs[1].clone());
            }
            let outputs = whole(&case.config, &all, None)?;
            Ok(outputs.into_iter().filter(|y| y.elem_count() > 0).collect())
        });
    }
}

#[test]
fn splits_change_no_output_state_or_gradient() {
    let mut random = Random::new(2);
    // whole registers of channels and states, and a ragged rest of each
    let wide = MambaConfig { d_inner: 40, d_state: 18, ..MambaConfig::new(20) };
    let small = configs().into_iter().flat_map(|config| [1, 2, 9, 33].map(|length| (config.clone(), length)));
    for (config, length) in small.chain([(wide, 70)]) {
        let case = Case::new(config.clone(), 2, length, &mut random);
        let mut splits = vec![vec![1; length], vec![length]];
        if length == 9 {
            splits.extend((1..length).map(|n| vec![n, length - n]));
        } else {
            let parts = random.int(1, length.min(5));
            splits.push(random.split(length, parts, 1));
        }
        let want = gradients(&case.inputs, |inputs| whole(&config, inputs, None));
        for split in splits {
            let got = gradients(&case.inputs, |inputs| {
                let layer = layer(&config, &inputs[3..])?;
                let mut state = MambaState { conv: inputs[1].clone(), scan: inputs[2].clone() };
                let (mut start, mut ys) = (0, vec![]);
                for &n in &split {
                    ys.push(layer.forward_with_state(&inputs[0].narrow(1, start, n)?, &mut state)?);
                    start += n;
                }
                Ok(vec![Tensor::cat(&ys, 1)?, state.conv, state.scan])
            });
            let what = format!("{config:?} cut into {split:?}");
            all_close(&what, &[], &got.0, &want.0, 1e-12);
            all_close(&what, &case.names, &got.1, &want.1, 1e-10);
        }
    }
}

/// In every dtype: the states agree as far as the weights' roundings let them.
#[test]
fn steps_equal_one_call_in_every_dtype() {
    let mut random = Random::new(3);
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        for config in configs() {
            let case = Case::new(config.clone(), 3, 12, &mut random);
            let inputs = case.to_dtype(dtype);
            let want = whole(&config, &inputs, None).unwrap();
            let layer = layer(&config, &inputs[3..]).unwrap();
            let mut state = MambaState { conv: inputs[1].clone(), scan: inputs[2].clone() };
            let step = |t| layer.forward_with_state(&inputs[0].narrow(1, t, 1).unwrap(), &mut state).unwrap();
            let ys: Vec<Tensor> = (0..12).map(step).collect();
            assert_eq!(ys[0].dtype(), dtype);
            assert_eq!(state.scan.dtype(), accumulation_dtype(dtype));
            let got = [Tensor::cat(&ys, 1).unwrap(), state.conv, state.scan];
            all_close(&format!("{dtype:?} {config:?}"), &[], &got, &want, 40.0 * rounding(dtype));
        }
    }
}

/// Rows alone; the same rows packed into one, and padded left and right: outputs, final states and gradients.
#[test]
fn packed_and_padded_rows_equal_bare_rows() {
    let mut random = Random::new(4);
    for config in configs() {
        for _ in 0..3 {
            let lengths: Vec<usize> = (0..3).map(|_| random.int(1, 9)).collect();
            let (total, longest) = (lengths.iter().sum::<usize>(), lengths.iter().copied().max().unwrap());
            let mut case = Case::new(config.clone(), 3, 1, &mut random);
            case.inputs[0] = random.normal((total, config.d_model));
            let rows = |x: &Tensor| -> Result<Vec<Tensor>> {
                let starts = (0..3).map(|b| lengths[..b].iter().sum::<usize>());
                starts.zip(&lengths).map(|(start, &n)| Ok(x.narrow(0, start, n)?.unsqueeze(0)?)).collect()
            };
            let bare = |with_state: bool| {
                gradients(&case.inputs, |inputs| {
                    let layer = layer(&config, &inputs[3..])?;
                    let (mut ys, mut convs, mut scans) = (vec![], vec![], vec![]);
                    for (b, row) in rows(&inputs[0])?.iter().enumerate() {
                        let mut state = layer.init_state(1)?;
                        if with_state {
                            state = MambaState {
                                conv: inputs[1].narrow(0, b, 1)?,
                                scan: inputs[2].narrow(0, b, 1)?,
                            };
                        }
                        ys.push(layer.forward_with_state(row, &mut state)?);
                        convs.push(state.conv);
                        scans.push(state.scan);
                    }
                    let y = Tensor::cat(&ys, 1)?;
                    Ok(if with_state {
                        vec![y, Tensor::cat(&convs, 0)?, Tensor::cat(&scans, 0)?]
                    } else {
                        vec![y]
                    })
                })
            };
            let want = bare(false);
            let got = gradients(&case.inputs, |inputs| {
                let segments = Segments::packed(std::slice::from_ref(&lengths), total)?;
                let y = layer(&config, &inputs[3..])?;
                Ok(vec![y.forward_segments(&inputs[0].unsqueeze(0)?, Some(&segments), None)?])
            });
            let what = format!("{config:?} packed {lengths:?}");
            all_close(&what, &[], &got.0, &want.0, 1e-12);
            all_close(&what, &case.names, &got.1, &want.1, 1e-10);

            let want = bare(true);
            for left in [true, false] {
                // padding holds rubbish that must not leak
                let rubbish = random.normal((3, longest, config.d_model));
                let place = |b: usize| if left { longest - lengths[b] } else { 0 };
                let got = gradients(&case.inputs, |inputs| {
                    let pad = |(b, row): (usize, &Tensor)| {
                        let rubbish = rubbish.narrow(0, b, 1)?;
                        let before = rubbish.narrow(1, 0, place(b))?;
                        let after = rubbish.narrow(1, 0, longest - lengths[b] - place(b))?;
                        let parts = [before, row.clone(), after];
                        let parts: Vec<&Tensor> = parts.iter().filter(|x| x.elem_count() > 0).collect();
                        Ok(Tensor::cat(&parts, 1)?)
                    };
                    let padded = rows(&inputs[0])?.iter().enumerate().map(pad).collect::<Result<Vec<_>>>()?;
                    let make = if left { Segments::left_padded } else { Segments::right_padded };
                    let mut inputs = inputs.to_vec();
                    inputs[0] = Tensor::cat(&padded, 0)?;
                    let mut outputs = whole(&config, &inputs, Some(&make(&lengths, longest)?))?;
                    let y = |b: usize| outputs[0].narrow(0, b, 1)?.narrow(1, place(b), lengths[b]);
                    outputs[0] = Tensor::cat(&[y(0)?, y(1)?, y(2)?], 1)?;
                    Ok(outputs)
                });
                let what = format!("{config:?} padded {lengths:?}");
                all_close(&what, &[], &got.0, &want.0, 1e-12);
                all_close(&what, &case.names, &got.1, &want.1, 1e-10);
            }
        }
    }
}

/// A layer of plain tensors computes A once; a layer of variables follows them.
#[test]
fn variables_may_change_under_the_layer() {
    let mut random = Random::new(5);
    let config = configs()[3].clone();
    let values = parameters(&config, &mut random);
    let vars: Vec<Var> = values.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tracked: Vec<Tensor> = vars.iter().map(|x| x.as_tensor().clone()).collect();
    let x = random.normal((1, 6, config.d_model));
    let trained = layer(&config, &tracked).unwrap();
    assert_close(
        "before",
        &trained.forward(&x).unwrap(),
        &layer(&config, &values).unwrap().forward(&x).unwrap(),
        1e-14,
    );
    let moved: Vec<Tensor> = values.iter().map(|x| (x * 1.1).unwrap()).collect();
    vars.iter().zip(&moved).for_each(|(var, x)| var.set(x).unwrap());
    assert_close(
        "after",
        &trained.forward(&x).unwrap(),
        &layer(&config, &moved).unwrap().forward(&x).unwrap(),
        1e-14,
    );
}

#[test]
fn the_initialisation_is_the_published_one() {
    let config = MambaConfig { bias: true, ..MambaConfig::new(64) };
    let init = |seed| Mamba::init(&config, &mut StdRng::seed_from_u64(seed), 0.5).unwrap();
    let all: HashMap<String, Tensor> = init(1).into_iter().collect();
    let again: HashMap<String, Tensor> = init(1).into_iter().collect();
    let names: Vec<String> = config.parameters().into_iter().map(|p| p.name).collect();
    assert!(names.iter().all(|name| values(&all[name]) == values(&again[name])));
    assert_ne!(values(&all["in_proj.weight"]), values(&init(2)[0].1));
    for p in config.parameters() {
        assert_eq!(all[&p.name].dims(), p.shape, "{}", p.name);
    }
    let steps: Vec<f64> = values(&all["dt_proj.bias"]).into_iter().map(|x| x.exp().ln_1p()).collect();
    assert!(steps.iter().all(|dt| (0.999e-3..0.1001).contains(dt)), "{steps:?}");
    let short = steps.iter().filter(|&&dt| dt < 1e-2).count() as f64 / steps.len() as f64;
    assert!((0.3..0.7).contains(&short), "half of the steps are below their geometric mean: {short}");
    for row in values(&all["A_log"]).chunks(16) {
        assert!(row.iter().enumerate().all(|(n, x)| (x.exp() - (n + 1) as f64).abs() < 1e-5));
    }
    assert!(values(&all["D"]).iter().all(|&d| d == 1.0));
    assert!(values(&all["in_proj.bias"]).iter().chain(&values(&all["out_proj.bias"])).all(|&b| b == 0.0));
    let bounds = [
        ("in_proj.weight", 64f64.powf(-0.5)),
        ("conv1d.weight", 0.5),
        ("conv1d.bias", 0.5),
        ("x_proj.weight", 128f64.powf(-0.5)),
        ("dt_proj.weight", 4f64.powf(-0.5)),
        ("out_proj.weight", 0.5 * 128f64.powf(-0.5)),
    ];
    for (name, bound) in bounds {
        let values = values(&all[name]);
        let std = (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt();
        assert!(values.iter().all(|x| x.abs() <= bound * (1.0 + 1e-6)), "{name}");
        assert!((std / bound * 3f64.sqrt() - 1.0).abs() < 0.15, "{name}: uniform, got {}", std / bound);
    }
    let mut constant = config.clone();
    constant.time_step.scheme = TimeStepScheme::Constant;
    let all: HashMap<_, _> =
        Mamba::init(&constant, &mut StdRng::seed_from_u64(1), 1.0).unwrap().into_iter().collect();
    assert!(values(&all["dt_proj.weight"]).iter().all(|&w| w == 0.5));
}

/// As a user of candle's VarMap has it.
#[test]
fn a_var_map_holds_the_parameters() {
    let config = MambaConfig::new(8);
    let map = VarMap::new();
    for (name, value) in Mamba::init(&config, &mut StdRng::seed_from_u64(1), 1.0).unwrap() {
        map.data().lock().unwrap().insert(format!("mixer.{name}"), Var::from_tensor(&value).unwrap());
    }
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let x = Random::new(1).normal((1, 7, 8)).to_dtype(DType::F32).unwrap();
    let y = Mamba::new(&config, vb.pp("mixer")).unwrap().forward(&x).unwrap();
    let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert_eq!(map.all_vars().len(), config.parameters().len());
    assert!(map.all_vars().iter().all(|var| values(gradients.get(var).unwrap()).iter().any(|&g| g != 0.0)));

    // an empty map gets values that train
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let y = Mamba::new(&config, vb).unwrap().forward(&x).unwrap();
    assert!(values(&y).iter().any(|&y| y != 0.0) && map.all_vars().len() == config.parameters().len());
}

#[test]
fn bad_input_is_refused_by_name_and_leaves_the_state() {
    let mut random = Random::new(6);
    let config = configs()[0].clone();
    let values_of = parameters(&config, &mut random);
    let mamba = layer(&config, &values_of).unwrap();
    let refused = |x: Tensor, mut state: MambaState, what: &str| {
        let before = [state.conv.clone(), state.scan.clone()];
        let error = mamba.forward_with_state(&x, &mut state).unwrap_err().to_string();
        assert!(error.contains(what), "expected `{what}` in: {error}");
        assert_eq!((values(&state.conv), values(&state.scan)), (values(&before[0]), values(&before[1])));
    };
    let state = |batch| {
        let [conv, scan] = random_state(&config, batch, &mut Random::new(batch as u64));
        MambaState { conv, scan }
    };
    refused(random.normal((2, 3, 5)), state(2), "[B, L, 4]");
    refused(random.normal((2, 3)), state(2), "[B, L, 4]");
    refused(random.normal((2, 3, 4)), state(3), "state");
    let other = MambaState { conv: state(2).conv, scan: random.normal((2, 6, 4)) };
    refused(random.normal((2, 3, 4)), other, "state: scan");
    let narrow = random.normal((2, 3, 4)).to_dtype(DType::F32).unwrap();
    refused(narrow, state(2), "dtype");

    let no_tokens = Tensor::zeros((2, 0, 4), DType::F64, &Device::Cpu).unwrap();
    assert_eq!(mamba.forward(&no_tokens).unwrap().dims(), [2, 0, 4]);
    for (wrong, name) in [
        (MambaConfig { d_state: 0, ..config.clone() }, "d_state"),
        (MambaConfig { d_conv: 0, ..config.clone() }, "d_conv"),
        (MambaConfig { d_inner: usize::MAX, ..config.clone() }, "d_inner"),
        (MambaConfig { d_inner: 1 << 31, d_model: 1 << 31, ..config.clone() }, "in_proj.weight"),
        (MambaConfig { inner_norm_eps: Some(f64::NAN), ..config.clone() }, "inner_norm_eps"),
    ] {
        let error = layer(&wrong, &values_of).unwrap_err();
        assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(name), "{error}");
    }
    let missing = Mamba::new(&config, VarBuilder::from_tensors(HashMap::new(), DType::F32, &Device::Cpu));
    assert!(missing.unwrap_err().to_string().contains("in_proj.weight"));
}
