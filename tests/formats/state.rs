//! Saved states, and what a model says to wrong ids and states.

use super::*;
use subquadratic::generate::{GenerationConfig, generate};
use subquadratic::layers::LayerState;
use subquadratic::models::ModelState;
use subquadratic::ops::Segments;

fn read_to(model: &LanguageModel) -> ModelState {
    let mut state = model.init_state(2).unwrap();
    model.forward_with_state(&ids(), &mut state).unwrap();
    state
}

fn bits(state: &ModelState) -> Vec<u64> {
    state.blocks.iter().flat_map(LayerState::tensors).flat_map(|(_, x)| common::bits(x)).collect()
}

#[test]
fn a_state_comes_back_bit_for_bit() {
    for family in FAMILIES {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let model = model(&config(family), dtype);
            let state = read_to(&model);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("state.safetensors");
            state.save(&path).unwrap();
            assert_eq!(names(dir.path()), ["state.safetensors"]);
            let mut back = ModelState::load(&path, &Device::Cpu).unwrap();
            assert_eq!((bits(&back), &back.positions), (bits(&state), &state.positions));
            assert_eq!(back.bytes(), state.bytes());
            let mut state = state;
            let [a, b] = [&mut state, &mut back]
                .map(|state| common::bits(&model.forward_with_state(&ids(), state).unwrap()));
            assert_eq!(a, b);
        }
    }
}

#[test]
fn files_that_are_no_states_are_refused() {
    let model = model(&config(Family::Mamba), DType::F32);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.safetensors");
    let state = read_to(&model);
    state.save(&path).unwrap();
    let good = fs::read(&path).unwrap();
    let fails = |words: &[&str]| {
        let error = ModelState::load(&path, &Device::Cpu).expect_err("a state").to_string();
        assert!(error.contains("state.safetensors"), "{error}");
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    for length in [0, 7, 8, 60, good.len() - 1] {
        fs::write(&path, &good[..length]).unwrap();
        fails(&[]);
    }
    write_safetensors(&path, model.parameters(), &[]).unwrap();
    fails(&["saved state"]);

    // a state in form, wrong in content
    let text = String::from_utf8_lossy(&good).into_owned();
    let kind = text.split("\"model\":\"").nth(1).unwrap().split('"').next().unwrap().to_string();
    let tensors = || {
        let mut all = BTreeMap::new();
        all.insert("positions".to_string(), Tensor::new(&[7i64, 7], &Device::Cpu).unwrap());
        for (i, block) in state.blocks.iter().enumerate() {
            for (name, tensor) in block.tensors() {
                all.insert(format!("blocks.{i}.{name}"), tensor.clone());
            }
        }
        all
    };
    let write = |tensors: &BTreeMap<String, Tensor>, version: &str| {
        let format = ("format", "subquadratic.state");
        write_safetensors(
            &path,
            tensors,
            &[format, ("version", version), ("model", &kind), ("mixers", "mamba mamba")],
        )
        .unwrap();
    };
    write(&tensors(), "1");
    assert_eq!(bits(&ModelState::load(&path, &Device::Cpu).unwrap()), bits(&state));
    write(&tensors(), "2");
    fails(&["version"]);
    for mixers in [None, Some("mamba abacus")] {
        let mut metadata = vec![("format", "subquadratic.state"), ("version", "1"), ("model", kind.as_str())];
        metadata.extend(mixers.map(|mixers| ("mixers", mixers)));
        write_safetensors(&path, &tensors(), &metadata).unwrap();
        fails(&["mixers"]);
    }
    let new = |x: &[i64]| Tensor::new(x, &Device::Cpu).unwrap();
    let changed = |name: &str, tensor: Option<Tensor>| {
        let mut all = tensors();
        match tensor {
            Some(tensor) => drop(all.insert(name.into(), tensor)),
            None => drop(all.remove(name)),
        }
        write(&all, "1");
    };
    for (name, tensor) in [
        ("positions", None),
        ("positions", Some(new(&[7, -1]))),
        ("positions", Some(new(&[7]))),
        ("positions", Some(new(&[7, 7]).reshape((1, 2)).unwrap())),
        ("positions", Some(Tensor::new(&[7f32, 7.0], &Device::Cpu).unwrap())),
        ("blocks.1.conv", None),
        ("blocks.1.scan", Some(new(&[1, 2]))),
        ("blocks.1.scan", None),
        ("blocks.1.scan", Some(Tensor::zeros((3, 36, 5), DType::F32, &Device::Cpu).unwrap())),
        ("blocks.0.conv", Some(Tensor::zeros((2, 36, 2), DType::BF16, &Device::Cpu).unwrap())),
    ] {
        changed(name, tensor);
        // a batch that is not that of the positions shows at the first block
        fails(&[if name == "positions" { "" } else { name }]);
    }
    // sizes that only the model knows
    for (name, tensor) in [
        ("blocks.1.scan", Some(Tensor::zeros((2, 36, 6), DType::F32, &Device::Cpu).unwrap())),
        ("blocks.0.conv", Some(Tensor::zeros((2, 72), DType::F32, &Device::Cpu).unwrap())),
    ] {
        changed(name, tensor);
        let mut state = ModelState::load(&path, &Device::Cpu).unwrap();
        let before = bits(&state);
        let error = model.forward_with_state(&ids(), &mut state).unwrap_err().to_string();
        assert!(error.contains("state"), "{error}");
        assert_eq!((bits(&state), &state.positions[..]), (before, &[7, 7][..]));
    }
}

#[test]
fn states_of_another_model_or_batch_are_refused_and_left_alone() {
    let ours = model(&config(Family::Mamba), DType::F32);
    let refused = |mut state: ModelState, words: &[&str]| {
        let before = bits(&state);
        let error = ours.forward_with_state(&ids(), &mut state).unwrap_err().to_string();
        assert!(error.contains("state") && words.iter().all(|word| error.contains(word)), "{error}");
        let error = ours.prefill(&ids(), None, &mut state).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert_eq!(before, bits(&state));
    };
    refused(ours.init_state(3).unwrap(), &["batch of 2", "3"]);
    refused(model(&config(Family::FalconMamba), DType::F32).init_state(2).unwrap(), &["falcon_mamba"]);
    refused(model(&config(Family::Mamba), DType::F64).init_state(2).unwrap(), &["F32", "F64"]);
    let mut deeper = config(Family::Mamba);
    deeper.blocks.push(deeper.blocks[0].clone());
    refused(model(&deeper, DType::F32).init_state(2).unwrap(), &["3 x mamba"]);
    assert!(ours.init_state(0).unwrap_err().to_string().contains("batch"));
    let error = ours.init_state(2).unwrap().select(&[0, 2]).unwrap_err().to_string();
    assert!(error.contains("row") && error.contains('2'), "{error}");
    // ids that are refused leave the state too
    let mut state = read_to(&ours);
    let before = bits(&state);
    let bad = Tensor::new(&[[1u32, 2], [3, 21]], &Device::Cpu).unwrap();
    let error = ours.forward_with_state(&bad, &mut state).unwrap_err().to_string();
    assert!(error.contains("row 1, position 1") && error.contains("vocab_size = 21"), "{error}");
    assert_eq!((before, [7, 7].to_vec()), (bits(&state), state.positions));
}

#[test]
fn ids_that_are_none_are_refused() {
    let model = model(&config(Family::MambaOriginal), DType::F32);
    let message = |ids: &Tensor| model.forward(ids).unwrap_err().to_string();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    for shape in [&[1, 0][..], &[0, 1], &[0, 0], &[3], &[1, 1, 1], &[]] {
        assert!(message(&zeros(shape, DType::U32)).contains("[B, L]"));
    }
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        assert!(message(&zeros(&[1, 2], dtype)).contains("u32, u8 or i64"));
    }
    // the vocabulary has 21 tokens and the embedding 24 rows
    for (id, place) in [(21i64, 0), (23, 1), (24, 2), (-1, 0), (i64::MAX, 1), (1 << 32, 2)] {
        let mut row = [1i64, 2, 3];
        row[place] = id;
        let error = message(&Tensor::new(&[[0, 0, 0], row], &Device::Cpu).unwrap());
        let position = format!("row 1, position {place}");
        assert!(error.contains(&position) && error.contains(&id.to_string()), "{error}");
    }
    for dtype in [DType::U8, DType::I64, DType::U32] {
        let logits = model.forward(&ids().to_dtype(dtype).unwrap()).unwrap();
        assert_eq!(logits.dims(), [2, 7, 21]);
    }
    assert!(generate(&model, &[Vec::<u32>::new()], GenerationConfig::greedy(1)).is_err());

    let segments = |lengths: &[usize], length| Segments::left_padded(lengths, length);
    for wrong in [segments(&[7], 7), segments(&[7, 7, 7], 7), segments(&[6, 6], 6)] {
        let error = model.forward_segments(&ids(), Some(&wrong.unwrap()), None).unwrap_err().to_string();
        assert!(error.contains("segments") && error.contains("[2, 7]"), "{error}");
    }
    let mut state = model.init_state(2).unwrap();
    let error = model.prefill(&ids(), Some(&segments(&[7, 0], 7).unwrap()), &mut state).unwrap_err();
    assert!(error.to_string().contains("row 1"), "{error}");
    assert!(segments(&[8, 7], 7).is_err());
    for lengths in [vec![8], vec![7, 1], vec![usize::MAX, 2], vec![3, usize::MAX]] {
        let error = Segments::packed(&[lengths], 7).unwrap_err().to_string();
        assert!(error.contains("at most L = 7"), "{error}");
    }
}

/// What was there stays, and no litter is left.
#[test]
fn paths_that_cannot_be_written_are_named() {
    let model = model(&config(Family::Mamba), DType::F32);
    let state = read_to(&model);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let taken = dir.path().join("taken");
    fs::create_dir_all(taken.join("inside")).unwrap();
    for path in
        [file.join("state"), dir.path().join("no/such/folder"), taken.clone(), "/".into(), "..".into()]
    {
        let error = state.save(&path).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
    for path in [file.clone(), file.join("model"), "/proc/nowhere".into()] {
        let error = model.save(&path).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert_eq!(names(dir.path()), ["file", "taken"]);
    assert_eq!(names(&taken), ["inside"]);

    // a model that is saved where one is, but whose weights cannot take their place
    let saved = Saved::of(Family::Mamba);
    let config = fs::read(saved.path("config.json")).unwrap();
    fs::remove_file(saved.path("model.safetensors")).unwrap();
    fs::create_dir(saved.path("model.safetensors")).unwrap();
    let other = super::model(&super::config(Family::FalconMamba), DType::F32);
    let error = other.save(saved.dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors"), "{error}");
    assert_eq!(names(saved.dir.path()), ["config.json", "model.safetensors"]);
    assert_eq!(fs::read(saved.path("config.json")).unwrap(), config);
    // dtypes that the format has no reader for here
    let odd = BTreeMap::from([("x".to_string(), Tensor::zeros(1, DType::I16, &Device::Cpu).unwrap())]);
    assert!(write_safetensors(&dir.path().join("odd"), &odd, &[]).unwrap_err().to_string().contains('x'));
}

/// Writers of one path do not mix their files.
#[test]
fn writers_of_one_path_leave_one_whole_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    std::thread::scope(|scope| {
        for i in 0..4 {
            let path = &path;
            scope.spawn(move || {
                let tensor = Tensor::full(f64::from(i), 30_000 + i as usize, &Device::Cpu).unwrap();
                let tensors = BTreeMap::from([("x".to_string(), tensor)]);
                (0..20).for_each(|_| write_safetensors(path, &tensors, &[]).unwrap());
            });
        }
    });
    assert_eq!(names(dir.path()), ["x.safetensors"]);
    let x = common::values(&candle_core::safetensors::load(&path, &Device::Cpu).unwrap()["x"]);
    assert!(x.len() == 30_000 + x[0] as usize && x.iter().all(|&value| value == x[0]));
}
