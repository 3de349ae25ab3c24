//! Weights in safetensors, whole and sharded: what does not fit is listed, what is damaged is named.

use super::*;
use serde_json::json;

fn tensor(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

/// All at once: a user mends a checkpoint in one go.
#[test]
fn everything_that_does_not_fit_is_listed_at_once() {
    let saved = Saved::of(Family::Mamba);
    saved.with_tensors(|tensors| {
        tensors.remove("backbone.layers.0.mixer.D");
        tensors.remove("backbone.norm_f.weight");
        tensors.insert("backbone.layers.0.mixer.E".into(), tensor(&[3], DType::F32));
        tensors.insert("other.weight".into(), tensor(&[1], DType::I64));
        tensors.insert("backbone.layers.1.mixer.A_log".into(), tensor(&[36, 4], DType::F32));
        tensors.insert("backbone.layers.1.mixer.D".into(), tensor(&[36], DType::I64));
        tensors.insert("backbone.layers.1.norm.weight".into(), tensor(&[12], DType::U32));
    });
    saved.fails(&[
        "model.safetensors",
        "2 missing, 2 unexpected, 3 of the wrong shape or dtype",
        "missing: backbone.layers.0.mixer.D, backbone.norm_f.weight",
        "unexpected: backbone.layers.0.mixer.E, other.weight",
        "backbone.layers.1.mixer.A_log: expected shape [36, 5], got [36, 4]",
        "backbone.layers.1.mixer.D: expected a float dtype, got I64",
        "backbone.layers.1.norm.weight: expected f64, f32, bf16 or f16, got U32",
    ]);
    // the same number of elements is not the same shape
    saved.with_tensors(|tensors| {
        tensors.insert("backbone.layers.0.mixer.A_log".into(), tensor(&[5, 36], DType::F32));
    });
    saved.fails(&["A_log: expected shape [36, 5], got [5, 36]"]);
    // names of the family in question
    let saved = Saved::of(Family::MambaOriginal);
    saved.with_tensors(|tensors| drop(tensors.remove("backbone.embedding.weight")));
    saved.fails(&["missing: backbone.embedding.weight"]);
}

#[test]
fn heads_are_tied_as_the_config_says() {
    let saved = Saved::of(Family::Mamba);
    let want = common::values(&saved.model.forward(&ids()).unwrap());
    let logits = || common::values(&saved.load().unwrap().forward(&ids()).unwrap());
    const EMBEDDING: &str = "backbone.embeddings.weight";
    let embedding = saved.model.parameters()[EMBEDDING].clone();
    // stored twice, or as the head alone
    saved.with_tensors(|tensors| drop(tensors.insert("lm_head.weight".into(), embedding.clone())));
    assert_eq!(logits(), want);
    saved.with_tensors(|tensors| {
        let embedding = tensors.remove(EMBEDDING).unwrap();
        tensors.insert("lm_head.weight".into(), embedding);
    });
    assert_eq!(logits(), want);
    // another head than the config's
    saved.with_tensors(|tensors| drop(tensors.insert("lm_head.weight".into(), (&embedding * 2.0).unwrap())));
    saved.fails(&["lm_head.weight", EMBEDDING, "ties"]);
    // early conversions call it as the original does; both names at once are ambiguous
    saved.with_tensors(|tensors| {
        let embedding = tensors.remove(EMBEDDING).unwrap();
        tensors.insert("backbone.embedding.weight".into(), embedding);
    });
    assert_eq!(logits(), want);
    saved.with_tensors(|tensors| drop(tensors.insert("backbone.embedding.weight".into(), embedding)));
    saved.fails(&[EMBEDDING, "another name of backbone.embedding.weight"]);
}

#[test]
fn a_folder_without_weights_says_what_it_looked_for() {
    let saved = Saved::of(Family::FalconMamba);
    fs::remove_file(saved.path("model.safetensors")).unwrap();
    let path = saved.dir.path().display().to_string();
    saved.fails(&[&path, "no weights", "model.safetensors", "pytorch_model.bin"]);
    fs::create_dir(saved.path("model.safetensors")).unwrap();
    saved.fails(&["model.safetensors"]);
}

/// A safetensors file of a header and some bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn damaged_safetensors_are_named() {
    let saved = Saved::of(Family::Mamba);
    let path = saved.path("model.safetensors");
    let good = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let lengths =
        (0..8).chain([8, 9, 100, 7 + header, 8 + header, 9 + header, good.len() / 2, good.len() - 1]);
    for length in lengths {
        fs::write(&path, &good[..length]).unwrap();
        saved.fails(&["model.safetensors"]);
    }
    let mut longer = good.clone();
    longer.push(0);
    fs::write(&path, longer).unwrap();
    saved.fails(&["model.safetensors", "truncated or damaged"]);

    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
    };
    let huge = u64::MAX.to_le_bytes();
    let claims =
        [huge.to_vec(), [&huge[..], b"{}"].concat(), [&(1u64 << 40).to_le_bytes()[..], b"{}"].concat()];
    let headers = [
        file("", 0),
        file("nonsense", 0),
        file("[]", 0),
        file("{", 0),
        file(&"[".repeat(50_000), 0),
        file(&entry("F32", "[2]", "[0, 4]"), 4),
        file(&entry("F32", "[1]", "[4, 8]"), 8),
        file(&entry("F32", "[1]", "[4, 0]"), 4),
        file(&entry("F32", "[9223372036854775808, 2]", "[0, 0]"), 0),
        file(&entry("F32", "[4294967296, 4294967296]", "[0, 0]"), 0),
        file(&entry("F32", "[4611686018427387904]", "[0, 0]"), 0),
        file(&entry("F32", "[-1]", "[0, 4]"), 4),
        file(&entry("F32", "[1]", "[0, 18446744073709551615]"), 4),
        file(&entry("Q4", "[1]", "[0, 4]"), 4),
        file(&entry("F32", "1", "[0, 4]"), 4),
        file(&entry("F32", "[1]", "[0]"), 4),
    ];
    for bytes in claims.into_iter().chain(headers) {
        fs::write(&path, &bytes).unwrap();
        saved.fails(&["model.safetensors"]);
    }
    // sound files of something else
    for header in ["{}".to_string(), entry("F8_E4M3", "[1]", "[0, 1]")] {
        fs::write(&path, file(&header, usize::from(header.len() > 2))).unwrap();
        saved.fails(&["model.safetensors", "missing: backbone.embeddings.weight"]);
    }
    for shape in ["[0, 18446744073709551615, 2]", "[18446744073709551615, 0]"] {
        let bytes = file(&entry("F32", shape, "[0, 0]"), 0);
        fs::write(&path, bytes).unwrap();
        saved.fails(&["model.safetensors"]);
    }
}

#[test]
fn damaged_indices_are_named() {
    let saved = Saved::of(Family::Mamba);
    saved.shard(3);
    saved.load().unwrap();
    let path = saved.path(INDEX);
    let good = fs::read_to_string(&path).unwrap();
    let map = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut index: Value = serde_json::from_str(&good).unwrap();
        change(index["weight_map"].as_object_mut().unwrap());
        fs::write(&path, index.to_string()).unwrap();
    };
    for bad in ["", "{", "[]", "{}", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 3}}"#] {
        fs::write(&path, bad).unwrap();
        saved.fails(&[INDEX]);
    }
    fs::write(&path, r#"{"weight_map": {}}"#).unwrap();
    saved.fails(&[INDEX, "missing: backbone.embeddings.weight"]);

    // outside the folder
    let name = "backbone.norm_f.weight";
    for place in ["../other.safetensors", "/etc/passwd", "a/b", "..", "", "model-0.safetensors/"] {
        map(&|map| drop(map.insert(name.into(), place.into())));
        saved.fails(&[INDEX, name]);
    }
    // in another shard than the index says, or in none
    map(&|map| {
        for (tensor, shard) in map.iter_mut().filter(|(tensor, _)| tensor.contains("layers.1.mixer.D")) {
            assert_eq!(tensor, "backbone.layers.1.mixer.D");
            *shard = json!(shard_name(usize::from(shard == &shard_name(0))));
        }
        map.insert("extra".into(), shard_name(0).into());
    });
    saved.fails(&[INDEX, "missing: backbone.layers.1.mixer.D in model-", "extra in model-0.safetensors"]);
    // a shard holds what nobody asked for
    map(&|_| ());
    let shard = saved.path(&shard_name(1));
    let bytes = fs::read(&shard).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        candle_core::safetensors::load(&shard, &Device::Cpu).unwrap().into_iter().collect();
    tensors.insert("surplus".into(), tensor(&[2], DType::F32));
    write_safetensors(&shard, &tensors, &[]).unwrap();
    saved.fails(&[INDEX, "unexpected: surplus"]);
    // damaged and lost shards: the lost ones all at once
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    saved.fails(&["model-1.safetensors"]);
    fs::remove_file(&shard).unwrap();
    fs::remove_file(saved.path(&shard_name(2))).unwrap();
    saved.fails(&[INDEX, "model-1.safetensors", "model-2.safetensors"]);
}

#[test]
fn weights_that_are_not_finite_are_named_on_request() {
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let saved = Saved::of(Family::Mamba);
        saved.load().unwrap().check_finite().unwrap();
        let spoil = |x: &Tensor, value: f64| {
            let mut values = common::values(x);
            *values.last_mut().unwrap() = value;
            Tensor::from_vec(values, x.shape(), &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap()
        };
        saved.with_tensors(|tensors| {
            for (name, value) in [
                ("backbone.layers.0.mixer.D", f64::NAN),
                ("backbone.layers.1.mixer.in_proj.weight", f64::NEG_INFINITY),
            ] {
                let spoilt = spoil(&tensors[name], value);
                tensors.insert(name.into(), spoilt);
            }
        });
        let model = load(saved.dir.path(), dtype, &Device::Cpu).unwrap();
        let error = model.check_finite().unwrap_err().to_string();
        for name in ["backbone.layers.0.mixer.D", "backbone.layers.1.mixer.in_proj.weight"] {
            assert!(error.contains(name), "{error}");
        }
        assert!(!error.contains("norm_f") && !error.contains("layers.1.mixer.D"), "{error}");
    }
}
