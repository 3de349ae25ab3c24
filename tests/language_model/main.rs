//! The streaming law for whole models, in logits, states and gradients: how tokens are cut into calls, packed and padded
//! does not matter, nor whether a state lay on disk in between, nor whether activations are kept.

#[path = "../common/mod.rs"]
mod common;

mod configs;

use candle_core::{DType, Device, Tensor, Var};
use common::{Random, assert_close, bits, rounding, values, weighted_sum};
use configs::{VOCABULARY, configs};
use subquadratic::autograd::backward;
use subquadratic::layers::LayerState;
use subquadratic::models::{LanguageModel, ModelConfig, ModelState};
use subquadratic::ops::Segments;

/// A trainable model with weights of the size that training leaves.
fn model(config: &ModelConfig, dtype: DType) -> LanguageModel {
    let model = LanguageModel::init(config, 1, dtype, &Device::Cpu).unwrap();
    let mut random = Random::new(2);
    for variable in model.variables().values() {
        let change = (random.normal(variable.shape()) * 0.3).unwrap().to_dtype(variable.dtype()).unwrap();
        variable.set(&(variable.as_tensor() + change).unwrap()).unwrap();
    }
    model
}

fn ids(random: &mut Random, rows: usize, length: usize) -> Tensor {
    let ids: Vec<u32> = (0..rows * length).map(|_| random.int(0, VOCABULARY - 1) as u32).collect();
    Tensor::from_vec(ids, (rows, length), &Device::Cpu).unwrap()
}

/// States as a sequence before may have left them.
fn random_state(model: &LanguageModel, batch: usize, random: &mut Random) -> ModelState {
    let mut state = model.init_state(batch).unwrap();
    for block in &mut state.blocks {
        for (_, tensor) in block.tensors_mut() {
            let leaf = (random.normal(tensor.shape()) * 0.5).unwrap().to_dtype(tensor.dtype()).unwrap();
            *tensor = Var::from_tensor(&leaf).unwrap().into_inner();
        }
    }
    state
}

fn tensors(state: &ModelState) -> Vec<Tensor> {
    state.blocks.iter().flat_map(LayerState::tensors).map(|(_, x)| x.clone()).collect()
}

fn tokens(ids: &Tensor, start: usize, length: usize) -> Tensor {
    ids.narrow(1, start, length).unwrap()
}

/// What a run gives: logits and final states, then the gradients of all of them in every variable and initial state.
struct Outcome {
    values: Vec<Tensor>,
    gradients: Vec<(String, Tensor)>,
}

impl Outcome {
    fn of(
        model: &LanguageModel,
        initial: Option<&ModelState>,
        logits: Tensor,
        state: Option<&ModelState>,
    ) -> Self {
        let mut outputs = vec![logits];
        outputs.extend(state.map(tensors).unwrap_or_default());
        let store = backward(weighted_sum(&outputs).unwrap()).unwrap();
        let leaves = initial.map(tensors).unwrap_or_default().into_iter().enumerate();
        let leaves = leaves.map(|(i, x)| (format!("initial state {i}"), x));
        let variables = model.variables().iter().map(|(name, x)| (name.clone(), x.as_tensor().clone()));
        let gradient =
            |(name, x): (String, Tensor)| (name, store.get(&x).cloned().unwrap_or(x.zeros_like().unwrap()));
        Self {
            values: outputs.iter().map(Tensor::detach).collect(),
            gradients: variables.chain(leaves).map(gradient).collect(),
        }
    }

    #[track_caller]
    fn assert_equals(&self, what: &str, want: &Self, tolerance: f64) {
        assert_eq!(self.values.len(), want.values.len());
        for (i, (got, want)) in self.values.iter().zip(&want.values).enumerate() {
            assert_close(&format!("{what}: output {i}"), got, want, tolerance);
        }
        for ((name, got), (_, want)) in self.gradients.iter().zip(&want.gradients) {
            assert_close(&format!("{what}: gradient of {name}"), got, want, 100.0 * tolerance);
        }
    }
}

/// The calls of `parts` tokens, one after another.
fn in_parts(model: &LanguageModel, ids: &Tensor, parts: &[usize], initial: &ModelState) -> Outcome {
    let (mut state, mut start, mut logits) = (initial.clone(), 0, vec![]);
    for &n in parts {
        logits.push(model.forward_with_state(&tokens(ids, start, n), &mut state).unwrap());
        start += n;
    }
    assert_eq!(state.positions, vec![start; ids.dim(0).unwrap()]);
    Outcome::of(model, Some(initial), Tensor::cat(&logits, 1).unwrap(), Some(&state))
}

#[test]
fn every_cut_is_one_call() {
    let mut random = Random::new(1);
    for config in configs() {
        let model = model(&config, DType::F64);
        let length = 9;
        let ids = ids(&mut random, 2, length);
        let initial = random_state(&model, 2, &mut random);
        let want = in_parts(&model, &ids, &[length], &initial);
        assert!(want.gradients.iter().all(|(_, g)| values(g).iter().any(|&g| g != 0.0)));
        let mut cuts: Vec<Vec<usize>> = (1..length).map(|n| vec![n, length - n]).collect();
        cuts.extend((0..4).map(|_| random.split(length, 4, 1)));
        cuts.push(vec![1; length]);
        for cut in cuts {
            let got = in_parts(&model, &ids, &cut, &initial);
            got.assert_equals(&format!("{:?} cut into {cut:?}", config.family), &want, 1e-12);
        }
    }
}

#[test]
fn every_cut_is_one_call_in_every_dtype() {
    let mut random = Random::new(2);
    for config in configs() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let model = model(&config, dtype).frozen().unwrap();
            let ids = ids(&mut random, 2, 12);
            let run = |parts: &[usize]| {
                let (mut state, mut start, mut logits) = (model.init_state(2).unwrap(), 0, vec![]);
                for &n in parts {
                    logits.push(model.forward_with_state(&tokens(&ids, start, n), &mut state).unwrap());
                    start += n;
                }
                let mut all = vec![Tensor::cat(&logits, 1).unwrap()];
                assert_eq!(all[0].dtype(), dtype);
                all.extend(tensors(&state));
                all
            };
            let want = run(&[12]);
            for parts in [vec![1; 12], random.split(12, 3, 1)] {
                for (i, (got, want)) in run(&parts).iter().zip(&want).enumerate() {
                    // roundings of activations, through two blocks that amplify them some
                    let what = format!("{:?} {dtype:?} {parts:?}: {i}", config.family);
                    assert_close(&what, got, want, 40.0 * rounding(dtype));
                }
            }
        }
    }
}

/// At every cut: what is loaded goes on bit for bit as what was saved.
#[test]
fn a_state_may_lie_on_disk_in_between() {
    let mut random = Random::new(3);
    let dir = tempfile::tempdir().unwrap();
    for (config, dtype) in configs().iter().zip([DType::F64, DType::F32, DType::BF16]) {
        let model = model(config, dtype).frozen().unwrap();
        let ids = ids(&mut random, 3, 8);
        for cut in 1..8 {
            let mut state = model.init_state(3).unwrap();
            model.prefill(&tokens(&ids, 0, cut), None, &mut state).unwrap();
            let path = dir.path().join("state.safetensors");
            state.save(&path).unwrap();
            let mut loaded = ModelState::load(&path, &Device::Cpu).unwrap();
            let rest = tokens(&ids, cut, 8 - cut);
            let [want, got] = [&mut state, &mut loaded].map(|s| model.forward_with_state(&rest, s).unwrap());
            assert_eq!(bits(&got), bits(&want));
            for (got, want) in tensors(&loaded).iter().zip(tensors(&state)) {
                assert_eq!(bits(got), bits(&want));
            }
            assert_eq!(loaded.positions, [8; 3]);
        }
    }
}

/// Rows alone, each from its own state; packed into one row, from fresh states; padded left and right with tokens that
/// must not matter.
#[test]
fn packed_and_padded_rows_equal_bare_rows() {
    let mut random = Random::new(4);
    for config in configs() {
        let model = model(&config, DType::F64);
        for lengths in [[1, 7, 4], [5, 5, 1], [2, 1, 9]] {
            let longest = *lengths.iter().max().unwrap();
            let all = ids(&mut random, 3, longest);
            let rubbish = ids(&mut random, 3, longest);
            let rows: Vec<Tensor> =
                (0..3).map(|b| tokens(&all.narrow(0, b, 1).unwrap(), 0, lengths[b])).collect();
            let what = format!("{:?} {lengths:?}", config.family);

            let logits = rows.iter().map(|row| model.forward(row).unwrap()).collect::<Vec<_>>();
            let want = Outcome::of(&model, None, Tensor::cat(&logits, 1).unwrap(), None);
            let total = lengths.iter().sum::<usize>();
            let segments = Segments::packed(&[lengths.to_vec()], total).unwrap();
            let mut state = random_state(&model, 1, &mut random);
            let logits = model
                .forward_segments(&Tensor::cat(&rows, 1).unwrap(), Some(&segments), Some(&mut state))
                .unwrap();
            assert_eq!(state.positions, [lengths[2]]);
            Outcome::of(&model, None, logits, None).assert_equals(&format!("{what} packed"), &want, 1e-12);

            let initial = random_state(&model, 3, &mut random);
            let (mut logits, mut states) = (vec![], vec![]);
            for (b, row) in rows.iter().enumerate() {
                let mut state = initial.select(&[b]).unwrap();
                logits.push(model.forward_with_state(row, &mut state).unwrap());
                states.push(tensors(&state));
            }
            let ends: Vec<Tensor> =
                (0..3).map(|b| tokens(&logits[b], lengths[b] - 1, 1).squeeze(1).unwrap()).collect();
            let mut joined = initial.clone();
            let places = joined.blocks.iter_mut().flat_map(LayerState::tensors_mut);
            for (i, (_, tensor)) in places.enumerate() {
                let rows: Vec<&Tensor> = states.iter().map(|state| &state[i]).collect();
                *tensor = Tensor::cat(&rows, 0).unwrap();
            }
            let want = Outcome::of(&model, Some(&initial), Tensor::cat(&logits, 1).unwrap(), Some(&joined));
            for left in [true, false] {
                let place = |b: usize| if left { longest - lengths[b] } else { 0 };
                let pad = |b: usize| {
                    let rubbish = rubbish.narrow(0, b, 1).unwrap();
                    let before = tokens(&rubbish, 0, place(b));
                    let after = tokens(&rubbish, 0, longest - lengths[b] - place(b));
                    let parts = [before, rows[b].clone(), after];
                    let parts: Vec<&Tensor> = parts.iter().filter(|x| x.elem_count() > 0).collect();
                    Tensor::cat(&parts, 1).unwrap()
                };
                let padded = Tensor::cat(&[pad(0), pad(1), pad(2)], 0).unwrap();
                let make = if left { Segments::left_padded } else { Segments::right_padded };
                let segments = make(&lengths, longest).unwrap();
                let mut state = initial.clone();
                let logits = model.forward_segments(&padded, Some(&segments), Some(&mut state)).unwrap();
                assert_eq!(state.positions, lengths);
                let part = |b: usize| tokens(&logits.narrow(0, b, 1).unwrap(), place(b), lengths[b]);
                let logits = Tensor::cat(&[part(0), part(1), part(2)], 1).unwrap();
                let what = format!("{what} padded, left {left}");
                Outcome::of(&model, Some(&initial), logits, Some(&state)).assert_equals(&what, &want, 1e-12);
                // the head of the last tokens alone, tracked and not
                for model in [&model, &model.frozen().unwrap()] {
                    let mut state = initial.clone();
                    let last = model.prefill(&padded, Some(&segments), &mut state).unwrap();
                    assert_close(&what, &last, &Tensor::cat(&ends, 0).unwrap(), 1e-12);
                }
            }
        }
    }
}

/// Untracked, long inputs go through the stack in chunks: not to be seen, wherever a row begins or ends.
#[test]
fn long_inputs_equal_themselves_in_one_piece() {
    let mut random = Random::new(5);
    let length = 1100;
    for config in configs() {
        let model = model(&config, DType::F64);
        let frozen = model.frozen().unwrap();
        for batch in [1, 3] {
            let ids = ids(&mut random, batch, length);
            let own = |random: &mut Random| (0..batch).map(|_| random.int(1, length)).collect::<Vec<_>>();
            let packed =
                |random: &mut Random| (0..batch).map(|_| random.split(length - 3, 4, 0)).collect::<Vec<_>>();
            let edge = [512, 513, 170][..batch].to_vec();
            let all = [
                None,
                Some(Segments::left_padded(&own(&mut random), length).unwrap()),
                Some(Segments::right_padded(&own(&mut random), length).unwrap()),
                Some(Segments::right_padded(&edge, length).unwrap()),
                Some(Segments::packed(&packed(&mut random), length).unwrap()),
            ];
            for segments in &all {
                let run = |model: &LanguageModel| {
                    let mut state = model.init_state(batch).unwrap();
                    let logits = model.forward_segments(&ids, segments.as_ref(), Some(&mut state)).unwrap();
                    let mut again = model.init_state(batch).unwrap();
                    let last = model.prefill(&ids, segments.as_ref(), &mut again).unwrap();
                    assert_eq!(again.positions, state.positions);
                    // logits at padding mean nothing
                    let marks = segments.as_ref().map(|s| s.marks(&Device::Cpu).unwrap());
                    let logits = match marks {
                        Some(marks) => {
                            let real =
                                marks.lt(2u8).unwrap().to_dtype(DType::F64).unwrap().unsqueeze(2).unwrap();
                            logits.broadcast_mul(&real).unwrap()
                        }
                        None => logits,
                    };
                    let mut all = vec![logits.detach(), last.detach()];
                    all.extend(tensors(&state).iter().chain(&tensors(&again)).map(Tensor::detach));
                    (all, state.positions)
                };
                let (got, want) = (run(&frozen), run(&model));
                assert_eq!(got.1, want.1);
                for (i, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
                    assert_close(&format!("{:?} {batch} {i}", config.family), got, want, 1e-11);
                }
            }
        }
    }
}

/// Rows of a state may be taken, doubled and put in another order.
#[test]
fn rows_do_not_know_their_neighbours() {
    let mut random = Random::new(6);
    for config in configs() {
        let model = model(&config, DType::F32).frozen().unwrap();
        let (before, after) = (ids(&mut random, 3, 6), ids(&mut random, 4, 5));
        let mut state = model.init_state(3).unwrap();
        model.forward_with_state(&before, &mut state).unwrap();
        let rows = [2, 0, 0, 1];
        let mut chosen = state.select(&rows).unwrap();
        let got = model.forward_with_state(&after, &mut chosen).unwrap();
        for (i, &row) in rows.iter().enumerate() {
            let mut alone = model.init_state(1).unwrap();
            model.forward_with_state(&before.narrow(0, row, 1).unwrap(), &mut alone).unwrap();
            let want = model.forward_with_state(&after.narrow(0, i, 1).unwrap(), &mut alone).unwrap();
            assert_close("logits", &got.narrow(0, i, 1).unwrap(), &want, 1e-5);
            assert_close("state", &tensors(&chosen)[1].narrow(0, i, 1).unwrap(), &tensors(&alone)[1], 1e-5);
        }
        state.reset().unwrap();
        let fresh = model.init_state(3).unwrap();
        assert_eq!(state.positions, fresh.positions);
        let [a, b] = [&mut state, &mut fresh.clone()].map(|s| model.forward_with_state(&before, s).unwrap());
        assert_eq!(bits(&a), bits(&b));
    }
}

/// Activations computed again give the gradients of activations kept, through states and segments too.
#[test]
fn recomputation_changes_nothing() {
    let mut random = Random::new(7);
    for config in configs() {
        let model = model(&config, DType::F64);
        let mut again = model.clone();
        again.set_recompute(true);
        let ids = ids(&mut random, 2, 8);
        let initial = random_state(&model, 2, &mut random);
        let marks =
            Tensor::new(&[[2u8, 0, 0, 1, 0, 0, 1, 2], [0, 0, 2, 2, 0, 1, 0, 0]], &Device::Cpu).unwrap();
        let segments = Segments::from_marks(&marks).unwrap();
        for segments in [None, Some(&segments)] {
            let run = |model: &LanguageModel| {
                let mut state = initial.clone();
                let first = segments.map(|s| s.narrow(0..3));
                let second = segments.map(|s| s.narrow(3..8));
                let a =
                    model.forward_segments(&tokens(&ids, 0, 3), first.as_ref(), Some(&mut state)).unwrap();
                let b =
                    model.forward_segments(&tokens(&ids, 3, 5), second.as_ref(), Some(&mut state)).unwrap();
                assert!(a.track_op());
                Outcome::of(model, Some(&initial), Tensor::cat(&[a, b], 1).unwrap(), Some(&state))
            };
            run(&again).assert_equals(&format!("{:?}", config.family), &run(&model), 1e-13);
        }
        let plain = (model.forward(&ids).unwrap(), again.forward(&ids).unwrap());
        assert_eq!(bits(&plain.0), bits(&plain.1));
    }
}
