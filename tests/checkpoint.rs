//! Text as batches, and trainings that go on from a checkpoint as if they had never stopped.

mod common;

use candle_core::{DType, Device};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use subquadratic::models::{LanguageModel, ModelConfig, load};
use subquadratic::train::{
    AdamWConfig, Batch, Group, Order, Position, Schedule, TextBatches, Trainer, TrainerConfig,
    latest_checkpoint,
};

/// 0, 1, 2, ... so that a token tells its place.
fn counting(tokens: u32, rows: usize, length: usize, order: Order) -> TextBatches {
    TextBatches::new((0..tokens).collect(), rows, length, order).unwrap()
}

fn rows(batch: &Batch) -> (Vec<Vec<u32>>, Vec<Vec<u32>>) {
    (batch.inputs.to_vec2().unwrap(), batch.targets.to_vec2().unwrap())
}

#[test]
fn sequential_rows_read_on_and_carry() {
    let mut text = counting(48, 2, 5, Order::Sequential);
    assert_eq!(text.batches_per_epoch(), 4);
    for epoch in 0..2 {
        for window in 0..4 {
            let batch = text.next_batch(&Device::Cpu).unwrap();
            let (inputs, targets) = rows(&batch);
            for (row, start) in [(0, 0), (1, 23)] {
                let first = start + 5 * window;
                assert_eq!(inputs[row], (first..first + 5).collect::<Vec<_>>());
                assert_eq!(targets[row], (first + 1..first + 6).collect::<Vec<_>>());
            }
            assert_eq!(batch.carry, window > 0);
            assert_eq!(text.position(), Position { epoch, batch: u64::from(window) + 1 });
        }
    }
}

#[test]
fn shuffled_windows_cover_the_text_in_another_order_every_epoch() {
    let order = |seed| {
        let mut text = counting(1000, 3, 10, Order::Shuffled { seed });
        let mut epochs = vec![];
        for _ in 0..3 {
            let mut starts = vec![];
            for _ in 0..text.batches_per_epoch() {
                let batch = text.next_batch(&Device::Cpu).unwrap();
                assert!(!batch.carry);
                let (inputs, targets) = rows(&batch);
                for (inputs, targets) in inputs.iter().zip(targets) {
                    assert_eq!(inputs[1..], targets[..9]);
                    assert_eq!(targets[9], inputs[0] + 10);
                    starts.push(inputs[0]);
                }
            }
            assert!(starts.len() >= 96);
            assert_eq!(starts.iter().collect::<HashSet<_>>().len(), starts.len(), "no window twice");
            assert!(starts.iter().all(|start| start % 10 == starts[0] % 10), "no overlap");
            assert!(!starts.is_sorted_by(|a, b| a < b));
            epochs.push(starts);
            // the first batch of the next epoch sets its own length
            let mut next = text.clone();
            next.next_batch(&Device::Cpu).unwrap();
            let position = Position { epoch: next.position().epoch, batch: 0 };
            text.seek(position).unwrap();
        }
        epochs
    };
    let epochs = order(1);
    assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
    assert_eq!(epochs, order(1));
    assert_ne!(epochs, order(2));
}

#[test]
fn a_position_is_all_there_is_to_keep() {
    for order in [Order::Sequential, Order::Shuffled { seed: 4 }] {
        let mut text = counting(200, 2, 7, order);
        for _ in 0..23 {
            text.next_batch(&Device::Cpu).unwrap();
            let mut other = counting(200, 2, 7, order);
            other.seek(text.position()).unwrap();
            let mut same = text.clone();
            for _ in 0..15 {
                let (a, b) =
                    (same.next_batch(&Device::Cpu).unwrap(), other.next_batch(&Device::Cpu).unwrap());
                assert_eq!((rows(&a), a.carry), (rows(&b), b.carry));
            }
        }
        let beyond = Position { epoch: 0, batch: 1000 };
        assert!(text.seek(beyond).unwrap_err().to_string().contains("1000"));
    }
}

#[test]
fn texts_too_short_are_refused() {
    assert!(TextBatches::bytes(&[0; 11], 2, 5, Order::Sequential).is_ok());
    for (tokens, rows, length, order) in [
        (10, 2, 5, Order::Sequential),
        (14, 2, 5, Order::Shuffled { seed: 0 }),
        (10, 0, 5, Order::Sequential),
        (10, 2, 0, Order::Sequential),
        (10, usize::MAX, 5, Order::Sequential),
        (0, 1, 1, Order::Sequential),
    ] {
        assert!(TextBatches::bytes(&vec![0; tokens], rows, length, order).is_err());
    }
    // any cut of a shuffled epoch leaves a whole batch
    for seed in 0..50 {
        let text = vec![0; 15];
        let mut text = TextBatches::bytes(&text, 2, 5, Order::Shuffled { seed }).unwrap();
        (0..5).for_each(|_| drop(text.next_batch(&Device::Cpu).unwrap()));
    }
}

fn text(order: Order) -> TextBatches {
    TextBatches::bytes(&b"the quick brown fox jumps over the lazy dog. ".repeat(6), 2, 12, order).unwrap()
}

fn trainer(dtype: DType) -> Trainer {
    let model = LanguageModel::init(&ModelConfig::mamba(16, 2, 256), 1, dtype, &Device::Cpu).unwrap();
    let mut config = TrainerConfig::new(Schedule::cosine(1.0 / 300.0, 3, 14));
    config.optimizer =
        AdamWConfig { beta1: 0.9, beta2: 0.987_654_321_012_345_6, epsilon: 1e-8, weight_decay: 0.1 };
    config.max_gradient_norm = 0.7;
    let group = |name: &str, x: &candle_core::Tensor| {
        let usual = Group::usual(name, x);
        if name.contains("embeddings") { Group { rate: 1.0 / 3.0, ..usual } } else { usual }
    };
    Trainer::with_groups(model, config, group).unwrap()
}

/// The bits of losses and norms of `steps` steps of two micro-batches, and of the parameters after.
fn train(trainer: &mut Trainer, text: &mut TextBatches, steps: usize) -> Vec<u64> {
    let mut bits = vec![];
    for _ in 0..steps {
        let batches = [text.next_batch(&Device::Cpu).unwrap(), text.next_batch(&Device::Cpu).unwrap()];
        let report = trainer.step(&batches).unwrap();
        bits.extend([report.loss, report.gradient_norm, report.learning_rate].map(f64::to_bits));
    }
    bits.extend(trainer.model().variables().values().flat_map(|x| common::bits(x)));
    bits
}

#[test]
fn a_resumed_training_is_the_unbroken_one_bit_for_bit() {
    for (dtype, order) in [
        (DType::F32, Order::Sequential),
        (DType::F32, Order::Shuffled { seed: 2 }),
        (DType::BF16, Order::Sequential),
        (DType::F64, Order::Sequential),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (mut unbroken, mut text) = (trainer(dtype), text(order));
        train(&mut unbroken, &mut text, 5);
        unbroken.save(folder.path(), &text.position(), 1).unwrap();

        let (mut resumed, position) = Trainer::resume::<Position>(folder.path(), &Device::Cpu).unwrap();
        assert_eq!(position, text.position());
        assert_eq!((resumed.steps(), resumed.tokens()), (unbroken.steps(), unbroken.tokens()));
        assert_eq!(resumed.config(), unbroken.config());
        let mut again = crate::text(order);
        again.seek(position).unwrap();
        let (a, b) = (train(&mut unbroken, &mut text, 6), train(&mut resumed, &mut again, 6));
        assert!(a == b, "{dtype:?} {order:?}");
        // and through a second checkpoint
        resumed.save(folder.path(), &again.position(), 1).unwrap();
        let (mut third, position) = Trainer::resume::<Position>(folder.path(), &Device::Cpu).unwrap();
        again.seek(position).unwrap();
        assert!(train(&mut unbroken, &mut text, 2) == train(&mut third, &mut again, 2));
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

fn steps_of(folder: &Path) -> u64 {
    Trainer::resume::<u32>(folder, &Device::Cpu).unwrap().0.steps()
}

#[test]
fn the_newest_checkpoints_are_kept_and_models_load_them() {
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, mut text) = (trainer(DType::F32), text(Order::Sequential));
    let nested = folder.path().join("a/b");
    assert_eq!(latest_checkpoint(&nested).unwrap(), None);
    for _ in 0..3 {
        train(&mut trainer, &mut text, 1);
        trainer.save(&nested, &1u32, 2).unwrap();
    }
    assert_eq!(names(&nested), ["step-00000002", "step-00000003"]);
    let latest = latest_checkpoint(&nested).unwrap().unwrap();
    assert_eq!(latest, nested.join("step-00000003"));
    assert_eq!(latest_checkpoint(&latest).unwrap(), Some(latest.clone()));
    assert_eq!((steps_of(&nested), steps_of(&nested.join("step-00000002"))), (3, 2));
    let model = load(&latest, DType::F32, &Device::Cpu).unwrap();
    for (name, variable) in trainer.model().variables() {
        assert_eq!(common::bits(&model.parameters()[name]), common::bits(variable), "{name}");
    }
    // the same step again takes the place of the first
    trainer.save(&nested, &7u32, 2).unwrap();
    assert_eq!(names(&nested), ["step-00000002", "step-00000003"]);
    assert_eq!(Trainer::resume::<u32>(&nested, &Device::Cpu).unwrap().1, 7);
}

#[test]
fn an_interrupted_write_leaves_the_previous_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (mut trainer, mut text) = (trainer(DType::F32), text(Order::Sequential));
    let path = |name: &str| folder.path().join(name);
    train(&mut trainer, &mut text, 1);
    let first = trainer.save(folder.path(), &1u32, 1).unwrap();

    // killed while writing: some files, one of them cut
    copy(&first, &path("step-00000002.partial"));
    fs::remove_file(path("step-00000002.partial/training.json")).unwrap();
    fs::write(path("step-00000002.partial/model.safetensors"), b"cut").unwrap();
    assert_eq!(steps_of(folder.path()), 1);

    // killed between the two renames of a step that is saved again
    copy(&first, &path("step-00000001.partial"));
    fs::rename(&first, path("step-00000001.replaced")).unwrap();
    assert_eq!(steps_of(folder.path()), 1);
    fs::rename(path("step-00000001.replaced"), &first).unwrap();

    // a write that fails: the target is in the way
    train(&mut trainer, &mut text, 1);
    fs::remove_dir_all(path("step-00000002.partial")).unwrap();
    fs::write(path("step-00000002.partial"), b"a file").unwrap();
    let error = trainer.save(folder.path(), &2u32, 1).unwrap_err().to_string();
    assert!(error.contains("step-00000002.partial"), "{error}");
    assert_eq!(steps_of(folder.path()), 1);

    // the next write cleans up after it
    fs::remove_file(path("step-00000002.partial")).unwrap();
    copy(&first, &path("step-00000002.partial"));
    trainer.save(folder.path(), &2u32, 1).unwrap();
    assert_eq!(steps_of(folder.path()), 2);
    assert!(!path("step-00000002.partial").exists() && !first.exists());
    assert!(trainer.save("/proc/nowhere", &0u32, 1).is_err());
}

#[test]
fn damaged_checkpoints_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = |path: &Path| Trainer::resume::<u32>(path, &Device::Cpu).unwrap_err().to_string();
    assert!(message(folder.path()).contains("step-N"));
    let (mut trainer, mut text) = (trainer(DType::BF16), text(Order::Sequential));
    train(&mut trainer, &mut text, 1);
    let good = trainer.save(folder.path(), &1u32, 1).unwrap();
    let broken = |change: &dyn Fn(&Path), words: &[&str]| {
        let place: PathBuf = folder.path().join("copy");
        copy(&good, &place);
        change(&place);
        let message = message(&place);
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
        fs::remove_dir_all(place).unwrap();
    };
    let cut = |name: &'static str| {
        move |place: &Path| {
            let bytes = fs::read(place.join(name)).unwrap();
            fs::write(place.join(name), &bytes[..bytes.len() / 2]).unwrap();
        }
    };
    for name in
        ["training.json", "optimizer.safetensors", "model.safetensors", "config.json", "state-0.safetensors"]
    {
        broken(&cut(name), &[name]);
        if name != "training.json" {
            broken(&|place| fs::remove_file(place.join(name)).unwrap(), &[name.split('.').next().unwrap()]);
        }
    }
    let edit = |from: &'static str, to: &'static str| {
        move |place: &Path| {
            let path = place.join("training.json");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    broken(&edit("\"version\": 1", "\"version\": 9"), &["version 1", "9"]);
    broken(&edit("\"bf16\"", "\"b17\""), &["training.json", "b17"]);
    broken(&edit("\"position\": 1", "\"position\": []"), &["training.json", "position"]);
    broken(&edit("\"dtype\": \"bf16\"", "\"dtype\": \"f64\""), &["first.", "F64"]);
    broken(&edit("layers.0.norm.weight", "layers.7.norm.weight"), &["group", "layers.0.norm.weight"]);
}
