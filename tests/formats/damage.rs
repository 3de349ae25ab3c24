//! Files damaged at random: an error that names the file or a model, and never a panic.

use super::*;
use proptest::prelude::*;
use std::sync::OnceLock;
use subquadratic::models::ModelState;

/// What happened to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flip(prop::sample::Index, u8),
    /// Four or eight bytes, where sizes and offsets are.
    Number(prop::sample::Index, u64, usize),
    Cut(prop::sample::Index),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        // half of the places lie where the structure is rather than the weights
        let place = |index: &prop::sample::Index, bytes: &[u8]| match index.index(4) {
            0 | 1 => index.index(bytes.len().max(1)),
            2 => index.index(bytes.len().clamp(1, 600)),
            _ => bytes.len().saturating_sub(1 + index.index(bytes.len().clamp(1, 600))),
        };
        let part = |at: usize, n: usize, bytes: &[u8]| at..(at + n).min(bytes.len());
        match self {
            Self::Flip(index, mask) => {
                let at = place(index, bytes);
                bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= mask);
            }
            Self::Number(index, value, size) => {
                let range = part(place(index, bytes), *size, bytes);
                let n = range.len();
                bytes[range].copy_from_slice(&value.to_le_bytes()[..n]);
            }
            Self::Cut(index) => bytes.truncate(place(index, bytes)),
            Self::Remove(index, n) => drop(bytes.drain(part(place(index, bytes), *n, bytes))),
            Self::Repeat(index, n) => {
                let range = part(place(index, bytes), *n, bytes);
                let again = bytes[range.clone()].to_vec();
                bytes.splice(range.end..range.end, again);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let value = prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 31), Just(0), any::<u64>()];
    prop_oneof![
        3 => (at(), 1u8..).prop_map(|(at, mask)| Damage::Flip(at, mask)),
        2 => (at(), value, prop_oneof![Just(4usize), Just(8)]).prop_map(|(at, v, n)| Damage::Number(at, v, n)),
        1 => at().prop_map(Damage::Cut),
        1 => (at(), 1usize..40).prop_map(|(at, n)| Damage::Remove(at, n)),
        1 => (at(), 1usize..40).prop_map(|(at, n)| Damage::Repeat(at, n)),
    ]
}

/// A checkpoint of each way to store weights, and a state, by the file that is damaged.
fn files() -> &'static [(TempDir, &'static str)] {
    static FILES: OnceLock<Vec<(TempDir, &'static str)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let sharded = || {
            let saved = Saved::of(Family::FalconMamba);
            saved.shard(2);
            saved.dir
        };
        let fixture = |folder: &str, weights: &str| {
            let dir = tempfile::tempdir().unwrap();
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder);
            for name in ["config.json", weights] {
                fs::copy(folder.join(name), dir.path().join(name)).unwrap();
            }
            dir
        };
        let state = Saved::of(Family::Mamba);
        let path = state.path("state.safetensors");
        state.model.init_state(2).unwrap().save(path).unwrap();
        vec![
            (Saved::of(Family::Mamba).dir, "config.json"),
            (Saved::of(Family::MambaOriginal).dir, "config.json"),
            (Saved::of(Family::Mamba).dir, "model.safetensors"),
            (sharded(), INDEX),
            (sharded(), "model-1.safetensors"),
            (fixture("mamba-original-bin", "pytorch_model.bin"), "pytorch_model.bin"),
            (fixture("striped-hyena", "model.safetensors"), "config.json"),
            (fixture("evo2-pt", "evo2_tiny.pt"), "config.json"),
            (fixture("evo2-pt", "evo2_tiny.pt"), "evo2_tiny.pt"),
            (fixture("jamba", "model.safetensors"), "config.json"),
            (state.dir, "state.safetensors"),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn damaged_files_never_panic(
        file in 0usize..11,
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let (dir, name) = &files()[file];
        let copy = tempfile::tempdir().unwrap();
        for other in names(dir.path()) {
            fs::copy(dir.path().join(&other), copy.path().join(&other)).unwrap();
        }
        let path = copy.path().join(name);
        let mut bytes = fs::read(&path).unwrap();
        damages.iter().for_each(|damage| damage.apply(&mut bytes));
        fs::write(&path, &bytes).unwrap();

        let here = copy.path().display().to_string();
        if *name == "state.safetensors" {
            static MODEL: OnceLock<LanguageModel> = OnceLock::new();
            let model = MODEL.get_or_init(|| model(&config(Family::Mamba), DType::F32));
            match ModelState::load(&path, &Device::Cpu) {
                Ok(mut state) => drop(model.forward_with_state(&ids(), &mut state)),
                Err(error) => prop_assert!(error.to_string().contains(&here), "{error}"),
            }
            return Ok(());
        }
        match load(copy.path(), DType::F32, &Device::Cpu) {
            Ok(model) => {
                let ids = Tensor::new(&[[0u32, 0]], &Device::Cpu).unwrap();
                model.forward(&ids).unwrap();
            }
            Err(error) => prop_assert!(error.to_string().contains(&here), "{error}"),
        }
    }
}
