//! PyTorch state dicts: read as data and never run, whatever the pickle asks for.

use super::*;

/// A pickle and the data beside it, as `torch.save` lays them out in a zip file of stored entries.
struct Zip {
    entries: Vec<(String, Vec<u8>)>,
    /// 0 is stored, 8 deflated.
    method: u16,
}

impl Zip {
    fn new(pickle: &[u8], storages: &[(&str, Vec<u8>)]) -> Self {
        let mut entries = vec![("archive/data.pkl".to_string(), pickle.to_vec())];
        entries.extend(storages.iter().map(|(key, data)| (format!("archive/data/{key}"), data.clone())));
        Self { entries, method: 0 }
    }

    fn bytes(&self) -> Vec<u8> {
        let (mut all, mut directory) = (vec![], vec![]);
        for (name, data) in &self.entries {
            let offset = all.len() as u32;
            let size = (data.len() as u32).to_le_bytes();
            let mut common = vec![20, 0, 0, 0];
            common.extend(self.method.to_le_bytes());
            common.extend([0; 8]);
            common.extend([size, size].concat());
            common.extend((name.len() as u16).to_le_bytes());
            common.extend([0, 0]);
            all.extend([&b"PK\x03\x04"[..], &common, name.as_bytes(), data].concat());
            directory.extend([&b"PK\x01\x02\x14\x00"[..], &common, &[0; 10], &offset.to_le_bytes()].concat());
            directory.extend(name.as_bytes());
        }
        let (count, start, size) = (self.entries.len() as u16, all.len() as u32, directory.len() as u32);
        all.extend(directory);
        all.extend(b"PK\x05\x06\0\0\0\0");
        all.extend([count.to_le_bytes(), count.to_le_bytes()].concat());
        all.extend([size.to_le_bytes(), start.to_le_bytes()].concat());
        all.extend([0, 0]);
        all
    }
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn number(n: i32) -> Vec<u8> {
    [&b"J"[..], &n.to_le_bytes()].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(".to_vec(), items.concat(), b"t".to_vec()].concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

/// What a tensor is in the pickle of a state dict.
#[derive(Clone)]
struct Pickled {
    storage: &'static str,
    key: &'static str,
    offset: Vec<u8>,
    shape: Vec<i32>,
    strides: Vec<i32>,
}

impl Pickled {
    fn new(key: &'static str, shape: &[i32]) -> Self {
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        Self { storage: "FloatStorage", key, offset: number(0), shape: shape.into(), strides }
    }

    fn bytes(&self) -> Vec<u8> {
        let sizes = |sizes: &[i32]| tuple(&sizes.iter().map(|&n| number(n)).collect::<Vec<_>>());
        let place =
            tuple(&[text("storage"), global("torch", self.storage), text(self.key), text("cpu"), number(1)]);
        let arguments = tuple(&[
            [place, b"Q".to_vec()].concat(),
            self.offset.clone(),
            sizes(&self.shape),
            sizes(&self.strides),
            vec![0x89],
            [global("collections", "OrderedDict"), b")R".to_vec()].concat(),
        ]);
        [global("torch._utils", "_rebuild_tensor_v2"), arguments, b"R".to_vec()].concat()
    }
}

fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|(key, value)| [text(key), value.clone()].concat()).collect();
    [&b"}("[..], &items, b"u"].concat()
}

fn pickle(value: &[u8]) -> Vec<u8> {
    [&b"\x80\x02"[..], value, b"."].concat()
}

/// A saved model whose weights are a file of ours.
fn saved_as(bytes: &[u8]) -> Saved {
    let saved = Saved::of(Family::MambaOriginal);
    fs::remove_file(saved.path("model.safetensors")).unwrap();
    fs::write(saved.path("pytorch_model.bin"), bytes).unwrap();
    saved
}

#[track_caller]
fn refused(bytes: &[u8], words: &[&str]) {
    saved_as(bytes).fails(&[&["pytorch_model.bin"], words].concat());
}

/// The writer above is right: a whole model goes through it, plain, nested and as parameters.
#[test]
fn a_state_dict_is_read() {
    let model = model(&config(Family::MambaOriginal), DType::F32);
    let keys: Vec<&'static str> =
        (0..model.parameters().len()).map(|i| &*i.to_string().leak()).collect::<Vec<_>>();
    let (mut items, mut storages) = (vec![], vec![]);
    for (key, (name, tensor)) in keys.iter().zip(model.parameters()) {
        let shape: Vec<i32> = tensor.dims().iter().map(|&n| n as i32).collect();
        let mut pickled = Pickled::new(key, &shape);
        // an offset into a larger storage
        pickled.offset = number(3);
        let mut value = pickled.bytes();
        if name.ends_with("norm.weight") {
            value = [
                global("torch._utils", "_rebuild_parameter"),
                tuple(&[value, vec![0x88], b"}".to_vec()]),
                b"R".to_vec(),
            ]
            .concat();
        }
        items.push((name.as_str(), value));
        let data = common::values(tensor).into_iter().flat_map(|x| (x as f32).to_le_bytes());
        storages.push((*key, [vec![7u8; 12], data.collect()].concat()));
    }
    for nested in [false, true] {
        let value = if nested {
            dict(&[("epoch", number(3)), ("state_dict", dict(&items)), ("optimizer", b"N".to_vec())])
        } else {
            dict(&items)
        };
        let saved = saved_as(&Zip::new(&pickle(&value), &storages).bytes());
        let back = saved.load().unwrap();
        let logits = |model: &LanguageModel| common::bits(&model.forward(&ids()).unwrap());
        assert_eq!(logits(&back), logits(&model));
    }
}

#[test]
fn nothing_is_run() {
    let marker = std::env::temp_dir().join(format!("subquadratic-{}", std::process::id()));
    let command = format!("touch {}", marker.display());
    for (module, name) in [("posix", "system"), ("builtins", "eval"), ("torch._utils", "_rebuild_tensor_v2")]
    {
        let call = [global(module, name), tuple(&[text(&command)]), b"R".to_vec()].concat();
        refused(&Zip::new(&pickle(&call), &[]).bytes(), &["not a dict"]);
        refused(&Zip::new(&pickle(&dict(&[("a", call)])), &[]).bytes(), &["`a`"]);
    }
    // the other opcodes that make objects or calls: instances, reductions, extensions, builds
    for code in [&b"(cposix\nsystem\no"[..], b"(iposix\nsystem\n", b"\x82\x01", b"\x92", b"\x93", b"P1\n"] {
        refused(&Zip::new(&pickle(code), &[]).bytes(), &["PyTorch state dict"]);
    }
    assert!(!marker.exists());
}

#[test]
fn tensors_beyond_their_data_are_refused() {
    let good = Pickled::new("0", &[2, 3]);
    let data = [("0", vec![0u8; 24])];
    let with = |change: &dyn Fn(&mut Pickled)| {
        let mut pickled = good.clone();
        change(&mut pickled);
        Zip::new(&pickle(&dict(&[("a", pickled.bytes())])), &data).bytes()
    };
    refused(&with(&|_| ()), &["missing: backbone.embedding.weight", "unexpected: a"]);
    let long = |n: i64| [&b"\x8a\x08"[..], &n.to_le_bytes()].concat();
    type Change = Box<dyn Fn(&mut Pickled)>;
    let cases: [(Change, &str); 12] = [
        (Box::new(|p| p.shape = vec![7]), "contiguous"),
        (Box::new(|p| (p.shape, p.strides) = (vec![7], vec![1])), "larger than its data"),
        (Box::new(|p| p.offset = number(1)), "larger than its data"),
        (Box::new(|p| p.offset = number(-1)), "without offset"),
        (Box::new(move |p| p.offset = long(i64::MAX)), "larger than its data"),
        (Box::new(|p| (p.shape, p.strides) = (vec![i32::MAX; 3], vec![1; 3])), "contiguous"),
        (Box::new(|p| p.shape = vec![-2, 3]), "without shape"),
        (Box::new(|p| p.strides = vec![1, 2]), "contiguous"),
        (Box::new(|p| p.strides = vec![0, 0]), "contiguous"),
        (Box::new(|p| p.key = "1"), "the data of `a` is missing"),
        (Box::new(|p| p.storage = "IntStorage"), "a"),
        (Box::new(|p| p.storage = "DoubleStorage"), "larger than its data"),
    ];
    for (change, word) in &cases {
        refused(&with(change), &["a", word]);
    }
    // sizes whose product overflows, with the strides that belong to it
    let mut huge = good.clone();
    (huge.shape, huge.strides) = (vec![i32::MAX, i32::MAX, 16], vec![0; 3]);
    let sizes = |sizes: &[i64]| tuple(&sizes.iter().map(|&n| long(n)).collect::<Vec<_>>());
    let place = tuple(&[text("storage"), global("torch", "FloatStorage"), text("0"), text("cpu"), number(1)]);
    for shape in [[1i64 << 62, 4, 1], [i64::MAX, i64::MAX, 1], [0, i64::MAX, i64::MAX]] {
        let last = shape[2];
        let strides = [shape[1].saturating_mul(last), last, 1];
        let place = [place.clone(), b"Q".to_vec()].concat();
        let arguments = tuple(&[place, number(0), sizes(&shape), sizes(&strides), vec![0x89]]);
        let tensor = [global("torch._utils", "_rebuild_tensor_v2"), arguments, b"R".to_vec()].concat();
        refused(&Zip::new(&pickle(&dict(&[("a", tensor)])), &data).bytes(), &["a"]);
    }
    let unnamed = [&b"}("[..], &number(1), &good.bytes(), b"u"].concat();
    refused(&Zip::new(&pickle(&unnamed), &data).bytes(), &["a key that is no string"]);
    refused(&Zip::new(&pickle(&dict(&[("a", number(1))])), &data).bytes(), &["`a`", "expected a tensor"]);
}

#[test]
fn pickles_that_make_no_sense_are_refused() {
    let cases: &[&[u8]] = &[
        b"",
        b".",
        b"\x80",
        b"\x80\x02",
        b"t.",
        b"u.",
        b"}u.",
        b"(u.",
        b"}(Nu.",
        b"]s.",
        b"NNs.",
        b"]a.",
        b"}Na.",
        b"R.",
        b"NR.",
        b"b.",
        b"Q.",
        b"q\0.",
        b"h\0.",
        b"j\0\0\0\0.",
        b"\x85.",
        b"N\x87.",
        b"(N\x86.",
        b"X\xff\xff\xff\xffabc.",
        b"X\x03\0\0\0ab",
        b"cposix",
        b"cposix\nsystem",
        b"\x8a\xff.",
        b"\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01.",
        b"G\0\0.",
        b"J\0.",
        b"M\0",
        b"\xff.",
        // a list in itself, a dict in itself: values refer to each other, and nobody walks them
        b"]q\0h\0a.",
        b"}q\0X\x01\0\0\0ah\0s.",
    ];
    for case in cases {
        refused(&Zip::new(case, &[]).bytes(), &["PyTorch state dict"]);
        refused(&Zip::new(&pickle(case), &[]).bytes(), &["PyTorch state dict"]);
    }
    // nested deep, and doubled often
    let deep = [vec![b'('; 200_000], vec![b't'; 200_000]].concat();
    refused(&Zip::new(&pickle(&deep), &[]).bytes(), &["not a dict"]);
    let mut doubled = b")q\0".to_vec();
    (0..60u8).for_each(|i| doubled.extend([b'h', i, b'h', i, 0x86, b'q', i + 1]));
    refused(&Zip::new(&pickle(&doubled), &[]).bytes(), &["not a dict"]);
}

#[test]
fn zip_files_that_make_no_sense_are_refused() {
    let data = [("0", vec![0u8; 24])];
    let value = pickle(&dict(&[("a", Pickled::new("0", &[2, 3]).bytes())]));
    let zip = || Zip::new(&value, &data);
    let good = zip().bytes();
    refused(&good, &["unexpected: a"]);
    for length in (0..good.len()).step_by(5) {
        refused(&good[..length], &["PyTorch state dict"]);
    }
    refused(b"\x80\x02\x8a\x0alegacy torch.save without a zip file", &["no directory"]);
    refused(&Zip { method: 8, ..zip() }.bytes(), &["compressed"]);
    refused(&Zip { entries: vec![], method: 0 }.bytes(), &["data.pkl"]);
    let mut big_endian = zip();
    big_endian.entries.push(("archive/byteorder".into(), b"big".to_vec()));
    refused(&big_endian.bytes(), &["little-endian"]);

    let directory = good.windows(4).position(|x| x == b"PK\x01\x02").unwrap();
    let end = good.windows(4).position(|x| x == b"PK\x05\x06").unwrap();
    // entry: size, extra length, comment length, header offset; end: count, size and start of the directory
    let fields = [(24, 4), (20, 4), (28, 2), (30, 2), (32, 2), (42, 4)].map(|(at, n)| (directory + at, n));
    let ends = [(10, 2), (12, 4), (16, 4)].map(|(at, n)| (end + at, n));
    for (at, bytes) in fields.into_iter().chain(ends) {
        for value in [0xff, 0x7f, 0x01] {
            let mut bad = good.clone();
            bad[at..at + bytes].fill(value);
            let saved = saved_as(&bad);
            // a smaller entry may still be sound; whatever is said names the file
            saved.fails(&["pytorch_model.bin"]);
        }
    }
    // a locator of a wider directory that lies outside
    let mut wide = good[..end].to_vec();
    wide.extend(b"PK\x06\x07\0\0\0\0");
    wide.extend(u64::MAX.to_le_bytes());
    wide.extend([1, 0, 0, 0]);
    wide.extend(&good[end..]);
    refused(&wide, &["truncated"]);
    let index = r#"{"weight_map": {"a": "pytorch_model-1.bin"}}"#;
    let saved = saved_as(&good);
    fs::rename(saved.path("pytorch_model.bin"), saved.path("pytorch_model-1.bin")).unwrap();
    fs::write(saved.path("pytorch_model.bin.index.json"), index).unwrap();
    saved.fails(&["pytorch_model.bin.index.json", "unexpected: a"]);
}
