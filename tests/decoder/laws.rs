//! What a decoder must hold, on any device and whatever its kernels.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::layers::LayerState;
use subquadratic::models::{Decoder, LanguageModel, ModelState};

fn host(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap()
}

/// The states agree in every tensor.
#[track_caller]
pub fn assert_same_state(what: &str, got: &ModelState, want: &ModelState, tolerance: f64) {
    assert_eq!(got.positions, want.positions, "{what}");
    for (got, want) in got.blocks.iter().zip(&want.blocks) {
        let both = got.saved().unwrap().into_iter().zip(want.saved().unwrap());
        both.for_each(|((name, got), (_, want))| {
            assert_close(&format!("{what}: {name}"), &host(&got), &host(&want), tolerance);
        });
    }
}

/// Sequences in random slots, that come and go, some rows idle, one to three tokens a call, some of them taken back: every
/// logit and state is that of the sequence alone, through the model's own forward pass.
pub fn follows_the_model(what: &str, model: &LanguageModel, slots: usize, calls: usize, tolerance: f64) {
    let random = &mut Random::new(1);
    let mut decoder = Decoder::new(model, slots).unwrap();
    let fresh = || model.init_state(1).unwrap();
    let mut states: Vec<ModelState> = (0..slots).map(|_| fresh()).collect();
    for call in 0..calls {
        let rows = random.int(1, slots.min(4));
        let mut free: Vec<usize> = (0..slots).collect();
        // few different shapes, so that each comes several times
        let tokens = [1, 1, 2, 3][random.int(0, 3)].min(8 / rows).max(1);
        let mut rows: Vec<Option<usize>> = vec![None; rows];
        for row in &mut rows {
            *row = (random.int(0, 5) > 0).then(|| free.remove(random.int(0, free.len() - 1)));
        }
        let vocabulary = model.config().vocab_size;
        let ids: Vec<u32> = (0..rows.len() * tokens).map(|_| random.int(0, vocabulary - 1) as u32).collect();
        let draft = random.int(0, 2) == 0;
        let logits = if draft { decoder.draft(&rows, &ids) } else { decoder.step(&rows, &ids) };
        let logits = logits.unwrap();
        assert_eq!(logits.dims(), [rows.len(), tokens, vocabulary]);
        let counts: Vec<usize> = rows.iter().map(|_| random.int(0, tokens)).collect();
        if draft {
            decoder.accept(&counts).unwrap();
        }
        for (row, slot) in rows.iter().enumerate() {
            let Some(slot) = *slot else { continue };
            let what =
                format!("{what}: call {call}, {rows:?} x {tokens}, draft {draft} {counts:?}, row {row}");
            let own = &ids[row * tokens..(row + 1) * tokens];
            let read = |ids: &[u32], state: &mut ModelState| {
                let ids = Tensor::new(ids, model.device()).unwrap().unsqueeze(0).unwrap();
                model.forward_with_state(&ids, state).unwrap()
            };
            let mut after = states[slot].clone();
            let want = read(own, &mut after);
            assert_close(&what, &host(&logits.narrow(0, row, 1).unwrap()), &host(&want), tolerance);
            let kept = if draft { counts[row] } else { tokens };
            if kept == tokens {
                states[slot] = after;
            } else if kept > 0 {
                read(&own[..kept], &mut states[slot]);
            }
            assert_same_state(&what, &decoder.state(slot).unwrap(), &states[slot], tolerance);
        }
        // now and then a sequence ends, and another takes its slot, behind a prompt or afresh
        let slot = random.int(0, slots - 1);
        match random.int(0, 7) {
            0 => {
                decoder.reset(slot).unwrap();
                states[slot] = fresh();
            }
            1 => {
                let mut state = model.init_state(2).unwrap();
                let prompt: Vec<u32> = (0..10).map(|_| random.int(0, vocabulary - 1) as u32).collect();
                let prompt = Tensor::from_vec(prompt, (2, 5), model.device()).unwrap();
                model.prefill(&prompt, None, &mut state).unwrap();
                decoder.set_state(slot, &state, 1).unwrap();
                states[slot] = state.select(&[1]).unwrap();
            }
            _ => {}
        }
    }
}

/// The most probable token is that of the logits.
pub fn greedy_is_the_largest_logit(model: &LanguageModel) {
    let mut both = [Decoder::new(model, 3).unwrap(), Decoder::new(model, 3).unwrap()];
    let slots = [Some(2), None, Some(0)];
    let mut ids = vec![1, 0, 2];
    for _ in 0..6 {
        let logits = both[0].step(&slots, &ids).unwrap().squeeze(1).unwrap();
        let want = host(&logits.to_dtype(DType::F32).unwrap().argmax(1).unwrap()).to_vec1::<u32>().unwrap();
        let got = both[1].step_greedy(&slots, &ids).unwrap();
        assert_eq!([got[0], got[2]], [want[0], want[2]]);
        ids = vec![got[0], 0, got[2]];
    }
}

/// Greedy steps in a row are greedy steps in turn, rows end behind a stop token, and their states are left there.
pub fn steps_in_a_row_are_steps_in_turn(what: &str, model: &LanguageModel) {
    let random = &mut Random::new(2);
    let vocabulary = model.config().vocab_size;
    for (steps, slots) in [
        (1, vec![Some(0)]),
        (2, vec![Some(3), None, Some(1)]),
        (16, vec![Some(1)]),
        (37, vec![Some(2), Some(0)]),
    ] {
        let [mut in_turn, mut in_a_row] = [0, 1].map(|_| Decoder::new(model, 4).unwrap());
        let prompt: Vec<u32> = slots.iter().map(|_| random.int(0, vocabulary - 1) as u32).collect();
        let mut token = |ids: &[u32]| in_turn.step_greedy(&slots, ids).unwrap();
        let mut tokens = vec![token(&prompt)];
        for step in 1..steps {
            tokens.push(token(&tokens[step - 1]));
        }
        for stop in
            [vec![], vec![tokens[steps / 2][0]], vec![tokens[0][0], tokens[steps - 1][slots.len() - 1]]]
        {
            let what = format!("{what}: {steps} steps, {slots:?}, stop at {stop:?}");
            let got = in_a_row.greedy(&slots, &prompt, steps, &stop).unwrap();
            let mut alone = Decoder::new(model, 4).unwrap();
            for (row, slot) in slots.iter().enumerate() {
                let Some(slot) = *slot else {
                    assert!(got[row].is_empty(), "{what}");
                    continue;
                };
                let mut want: Vec<u32> = tokens.iter().map(|tokens| tokens[row]).collect();
                if let Some(last) = want.iter().position(|id| stop.contains(id)) {
                    want.truncate(last + 1);
                }
                assert_eq!(got[row], want, "{what}: row {row}");
                let seen = [&prompt[row..=row], &want[..want.len() - 1]].concat();
                seen.iter().for_each(|&id| drop(alone.step(&[Some(slot)], &[id]).unwrap()));
                let states = [&in_a_row, &alone].map(|decoder| decoder.state(slot).unwrap());
                assert_same_state(&what, &states[0], &states[1], 1e-5);
                in_a_row.reset(slot).unwrap();
            }
        }
    }
    // a logit that is no number ends its row
    let mut decoder = Decoder::new(model, 2).unwrap();
    let nan = {
        let mut state = model.init_state(1).unwrap();
        let parts = state.blocks[0].tensors_mut();
        parts.into_iter().for_each(|(_, part)| *part = part.affine(1.0, f64::NAN).unwrap());
        state
    };
    decoder.set_state(1, &nan, 0).unwrap();
    let error = decoder.greedy(&[Some(0), Some(1)], &[1, 1], 5, &[]).unwrap_err().to_string();
    assert!(error.contains("logits of row 1"), "{error}");
    assert!(decoder.greedy(&[Some(0)], &[1, 2], 5, &[]).unwrap_err().to_string().contains("one a row"));
    assert!(decoder.greedy(&[Some(0)], &[1], 5, &[]).is_ok());
}

/// What makes no sense is refused, and changes nothing.
pub fn refuses_nonsense(model: &LanguageModel) {
    let mut decoder = Decoder::new(model, 2).unwrap();
    let vocabulary = model.config().vocab_size as u32;
    decoder.step(&[Some(0)], &[1]).unwrap();
    let refused = |result: subquadratic::Result<Tensor>, part: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(decoder.step(&[Some(2)], &[1]), "slot: expected below 2, got 2");
    refused(decoder.step(&[Some(1), Some(1)], &[1, 1]), "1 twice");
    refused(decoder.step(&[Some(0), Some(1)], &[1, 1, 1]), "number of ids");
    refused(decoder.step(&[], &[]), "number of ids");
    refused(decoder.step(&[Some(0)], &[vocabulary]), "vocab_size");
    assert!(decoder.accept(&[1]).unwrap_err().to_string().contains("one that waits"));
    decoder.draft(&[Some(0)], &[1, 2]).unwrap();
    assert!(decoder.accept(&[3]).unwrap_err().to_string().contains("at most 2"));
    decoder.accept(&[2]).unwrap();
    assert_eq!(decoder.state(0).unwrap().positions, [3]);
    assert!(decoder.state(2).is_err() && decoder.reset(2).is_err());
    assert!(Decoder::new(model, 0).is_err());
    let other = model.init_state(1).unwrap();
    assert!(decoder.set_state(0, &other, 1).is_err());
}
