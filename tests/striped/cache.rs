//! The keys and values that attention keeps: how much they take, that clones do not disturb each other, their limit.

use super::*;

/// A frozen model of one attention block, or of a pattern.
fn frozen(pattern: &str, width: usize, dtype: DType, change: impl Fn(&mut AttentionConfig)) -> LanguageModel {
    let mut config = ModelConfig::striped(pattern, width, 11).unwrap();
    for block in &mut config.blocks {
        if let MixerConfig::Attention(attention) = &mut block.mixer {
            change(attention);
        }
    }
    LanguageModel::init(&config, 5, dtype, &Device::Cpu).unwrap().frozen().unwrap()
}

/// The state's size after every one of `count` tokens.
fn sizes(model: &LanguageModel, count: usize) -> Vec<usize> {
    let ids = tokens(&mut Random::new(1), 1, count);
    let mut state = model.init_state(1).unwrap();
    let mut size = |t| {
        model.forward_with_state(&ids.narrow(1, t, 1).unwrap(), &mut state).unwrap();
        state.bytes()
    };
    (0..count).map(&mut size).collect()
}

#[test]
fn a_state_grows_with_attention_alone() {
    let size = |pattern: &str, length: usize| {
        let model = frozen(pattern, 64, DType::F32, |_| ());
        let mut state = model.init_state(1).unwrap();
        model.forward_with_state(&tokens(&mut Random::new(6), 1, length), &mut state).unwrap();
        state.bytes()
    };
    assert_eq!(size("hyena mamba retention", 10), size("hyena mamba retention", 200));
    assert_eq!(size("attention hyena", 200) - size("attention hyena", 100), 100 * 2 * 64 * 4);
    let model = frozen("hyena attention mamba", 64, DType::F32, |_| ());
    let mut state = model.init_state(2).unwrap();
    model.forward_with_state(&tokens(&mut Random::new(6), 2, 9), &mut state).unwrap();
    let sizes = state.sizes();
    assert_eq!(
        sizes.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
        ["modal_hyena", "attention", "mamba"]
    );
    assert_eq!(sizes[0].1, 2 * 4 * (3 * 64 * 2 + 64 * 8 * 2));
    assert_eq!(sizes[1].1, 9 * 2 * 2 * 64 * 4);
    assert_eq!(sizes.iter().map(|(_, bytes)| bytes).sum::<usize>(), state.bytes());
    // in several calls of the stack, whose sum is known
    assert_eq!(size("attention", 2000), 2000 * 2 * 64 * 4);
}

#[test]
fn keys_are_as_wide_as_the_weights() {
    for (dtype, bytes) in [(DType::F64, 8), (DType::F32, 4), (DType::BF16, 2), (DType::F16, 2)] {
        let model = frozen("attention", 64, dtype, |_| ());
        let ids = tokens(&mut Random::new(2), 2, 50);
        let mut state = model.init_state(2).unwrap();
        let first = model.forward_with_state(&ids.narrow(1, 0, 20).unwrap(), &mut state).unwrap();
        assert_eq!(state.bytes(), 20 * 2 * 2 * 64 * bytes);
        assert!(state.blocks[0].tensors().iter().all(|(_, x)| x.dtype() == dtype));
        let steps = (20..50).map(|t| ids.narrow(1, t, 1).unwrap());
        let mut logits = vec![first];
        logits.extend(steps.map(|id| model.forward_with_state(&id, &mut state).unwrap()));
        let whole = model.forward(&ids).unwrap();
        let what = format!("{dtype:?}");
        assert_close(&what, &Tensor::cat(&logits, 1).unwrap(), &whole, 8.0 * rounding(dtype));
        // and comes back from a file
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("state.safetensors");
        state.save(&file).unwrap();
        let mut back = ModelState::load(&file, &Device::Cpu).unwrap();
        let next = tokens(&mut Random::new(3), 2, 3);
        let [a, b] = [&mut state, &mut back].map(|s| bits(&model.forward_with_state(&next, s).unwrap()));
        assert_eq!(a, b, "{what}");
    }
}

#[test]
fn steps_write_into_room_that_grows_seldom_and_not_far_beyond_need() {
    let sizes = sizes(&frozen("attention", 32, DType::F32, |_| ()), 2000);
    let token = 2 * 32 * 4;
    let growths = sizes.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(growths < 16, "copied {growths} times in 2000 steps");
    for (t, &size) in sizes.iter().enumerate() {
        assert!(size >= (t + 1) * token, "{size} bytes for {t}");
        assert!(size <= ((t + 1) * 5 / 4 + 130) * token, "{size} bytes for {t}");
    }
}

#[test]
fn a_window_keeps_no_more_than_itself() {
    let model = frozen("attention", 32, DType::F32, |attention| attention.window = Some(50));
    let sizes = sizes(&model, 1500);
    let most = sizes.iter().max().unwrap();
    assert!(*most <= (50 * 5 / 4 + 130) * 2 * 32 * 4, "{most}");
    assert!(sizes[400..].iter().all(|size| size == most), "grows with the sequence");
}

/// What one state goes on to is nothing to its clones, whoever was first.
#[test]
fn clones_go_on_alone() {
    for window in [None, Some(6)] {
        let model = frozen("attention mamba", D, DType::F64, |attention| attention.window = window);
        let random = &mut Random::new(3);
        let mut branches = vec![(model.init_state(1).unwrap(), Vec::<Tensor>::new())];
        for _ in 0..60 {
            let mut at = random.int(0, branches.len() - 1);
            if random.int(0, 3) == 0 && branches.len() < 8 {
                branches.push(branches[at].clone());
                at = random.int(0, branches.len() - 1);
            }
            let count = random.int(1, 3);
            let ids = tokens(random, 1, count);
            let (state, said) = &mut branches[at];
            let got = model.forward_with_state(&ids, state).unwrap();
            said.push(ids);
            let whole = model.forward(&Tensor::cat(said, 1).unwrap()).unwrap();
            let end = whole.narrow(1, whole.dim(1).unwrap() - count, count).unwrap();
            assert_close(&format!("window {window:?}"), &got, &end, 1e-11);
        }
        assert_eq!(branches.len(), 8);
    }
}

/// Rows that have had different numbers of tokens go on step by step, beyond the window too.
#[test]
fn rows_of_different_lengths_take_steps_together() {
    for window in [None, Some(1), Some(5), Some(12)] {
        let model = frozen("attention", D, DType::F64, |attention| attention.window = window);
        let random = &mut Random::new(4);
        let lengths = [1, 9, 4];
        let prompt = tokens(random, 3, 9);
        let mut state = model.init_state(3).unwrap();
        let segments = Segments::left_padded(&lengths, 9).unwrap();
        model.forward_segments(&prompt, Some(&segments), Some(&mut state)).unwrap();
        let rest = tokens(random, 3, 20);
        let steps = (0..20).map(|t| rest.narrow(1, t, 1).unwrap());
        let got: Vec<Tensor> = steps.map(|id| model.forward_with_state(&id, &mut state).unwrap()).collect();
        let got = Tensor::cat(&got, 1).unwrap();
        for (row, length) in lengths.into_iter().enumerate() {
            let own = |x: &Tensor| x.narrow(0, row, 1).unwrap();
            let prompt = own(&prompt).narrow(1, 9 - length, length).unwrap();
            let whole = model.forward(&Tensor::cat(&[prompt, own(&rest)], 1).unwrap()).unwrap();
            let want = whole.narrow(1, length, 20).unwrap();
            assert_close(&format!("window {window:?}, row {row}"), &own(&got), &want, 1e-11);
        }
        // as does the shortest alone
        let next = tokens(random, 1, 1);
        let got = model.forward_with_state(&next, &mut state.select(&[0]).unwrap()).unwrap();
        let said =
            [prompt.narrow(0, 0, 1).unwrap().narrow(1, 8, 1).unwrap(), rest.narrow(0, 0, 1).unwrap(), next];
        let whole = model.forward(&Tensor::cat(&said, 1).unwrap()).unwrap();
        assert_close("selected", &got, &whole.narrow(1, 21, 1).unwrap(), 1e-11);
    }
}

#[test]
fn a_sequence_beyond_the_limit_is_refused_before_any_work() {
    let model = frozen("attention", D, DType::F32, |attention| attention.max_length = Some(600));
    let random = &mut Random::new(7);
    let mut state = model.init_state(1).unwrap();
    model.forward_with_state(&tokens(random, 1, 600), &mut state).unwrap();
    let before = bits(state.blocks[0].tensors()[0].1);
    let error = model.forward_with_state(&tokens(random, 1, 1), &mut state).unwrap_err().to_string();
    assert!(error.contains("at most max_length = 600") && error.contains("got 601"), "{error}");
    assert_eq!(
        (state.positions.as_slice(), bits(state.blocks[0].tensors()[0].1)),
        ([600].as_slice(), before)
    );
    for length in [601, 5000] {
        let error = model.forward(&tokens(random, 1, length)).unwrap_err().to_string();
        assert!(error.contains(&format!("got {length}")), "{error}");
    }
    // each of several sequences in a row has its own
    let packed = Segments::packed(&[vec![600, 300]], 900).unwrap();
    model.forward_segments(&tokens(random, 1, 900), Some(&packed), None).unwrap();
    let packed = Segments::packed(&[vec![601, 299]], 900).unwrap();
    let error = model.forward_segments(&tokens(random, 1, 900), Some(&packed), None).unwrap_err().to_string();
    assert!(error.contains("max_length = 600"), "{error}");
}
