//! What a pool of states must do, on any device.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{Form, Retention, RetentionPool, RetentionPoolConfig, retention};

const SLOTS: usize = 5;

/// Sizes and dtypes of a session.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// Of queries, keys and values.
    pub heads: [usize; 3],
    pub keys: usize,
    pub values: usize,
    pub per_token: bool,
    /// Of the sequences and of the states.
    pub dtype: DType,
    pub state: DType,
    pub window: usize,
}

impl Session {
    fn heads(&self) -> usize {
        self.heads.into_iter().max().unwrap()
    }

    fn pool(&self, device: &Device) -> RetentionPool {
        let Self { keys, values, state, window, .. } = *self;
        let config = RetentionPoolConfig::new(SLOTS, self.heads(), keys, values);
        RetentionPool::new(RetentionPoolConfig { dtype: state, window, ..config }, device).unwrap()
    }

    /// q, k, v and decays of `rows` rows of `length` tokens.
    fn tokens(&self, random: &mut Random, rows: usize, length: usize, constant: &Tensor) -> Vec<Tensor> {
        let [q, k, v] = self.heads;
        let mut all = vec![
            random.normal((rows, length, q, self.keys)).to_dtype(self.dtype).unwrap(),
            random.normal((rows, length, k, self.keys)).to_dtype(self.dtype).unwrap(),
            random.normal((rows, length, v, self.values)).to_dtype(self.dtype).unwrap(),
        ];
        all.push(match self.per_token {
            true => random.uniform((rows, length, self.heads()), -0.3, 0.0).to_dtype(DType::F32).unwrap(),
            false => constant.clone(),
        });
        all
    }
}

pub fn args(t: &[Tensor]) -> Retention<'_> {
    Retention {
        q: &t[0],
        k: &t[1],
        v: &t[2],
        log_decay: &t[3],
        scale: 0.3,
        initial_state: None,
        segments: None,
        form: Form::Recurrent,
    }
}

/// One row of a call, its first `count` tokens.
fn row(t: &[Tensor], row: usize, count: usize) -> Vec<Tensor> {
    let part = |x: &Tensor| x.narrow(0, row, 1).unwrap().narrow(1, 0, count).unwrap();
    let decay = if t[3].rank() == 3 { part(&t[3]) } else { t[3].clone() };
    vec![part(&t[0]), part(&t[1]), part(&t[2]), decay]
}

fn on(device: &Device, t: &[Tensor]) -> Vec<Tensor> {
    t.iter().map(|x| x.to_device(device).unwrap()).collect()
}

fn home(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap()
}

/// A session drawn at random: rows that come and go, idle ones, one token or many, drafts of which some are kept, states put
/// into slots and read from them. Outputs and states are those of the operator, row by row. Returns all outputs.
#[track_caller]
pub fn follows_the_operator(device: &Device, session: Session, seed: u64, tolerance: f64) -> Vec<Tensor> {
    let random = &mut Random::new(seed);
    let (heads, wide) = (session.heads(), if session.state == DType::F64 { DType::F64 } else { DType::F32 });
    let constant = random.uniform(heads, -0.2, 0.0).to_dtype(wide).unwrap();
    let there = constant.to_device(device).unwrap();
    let mut pool = session.pool(device);
    let fresh = Tensor::zeros((1, heads, session.keys, session.values), wide, &Device::Cpu).unwrap();
    let mut states = vec![fresh.clone(); SLOTS];
    let mut all = vec![];
    for call in 0..40 {
        let what = format!("{session:?} call {call}");
        let mut free: Vec<usize> = (0..SLOTS).collect();
        let slots: Vec<Option<usize>> = (0..random.int(1, SLOTS))
            .map(|_| {
                let slot = free.remove(random.int(0, free.len() - 1));
                (random.int(0, 4) > 0).then_some(slot)
            })
            .collect();
        let length = [1, 1, 1, 2, 3, 8, 11][random.int(0, 6)];
        let t = session.tokens(random, slots.len(), length, &constant);
        let mut moved = on(device, &t);
        if !session.per_token {
            moved[3] = there.clone();
        }
        let drafted = random.int(0, 2) == 0;
        let o = if drafted { pool.draft(&args(&moved), &slots) } else { pool.step(&args(&moved), &slots) };
        let o = home(&o.unwrap());
        assert_eq!(
            (o.dims(), o.dtype()),
            ([slots.len(), length, heads, session.values].as_slice(), session.dtype)
        );
        let counts: Vec<usize> =
            slots.iter().map(|_| if drafted { random.int(0, length) } else { length }).collect();
        for (b, slot) in slots.iter().enumerate() {
            let got = o.narrow(0, b, 1).unwrap();
            let Some(slot) = *slot else {
                assert!(values(&got).iter().all(|x| *x == 0.0), "{what}: idle row {b}");
                continue;
            };
            let all = row(&t, b, length);
            let want = retention(&Retention { initial_state: Some(&states[slot]), ..args(&all) }).unwrap().0;
            assert_close(&format!("{what}: row {b}"), &got, &want, tolerance);
            if counts[b] > 0 {
                let kept = row(&t, b, counts[b]);
                let args = Retention { initial_state: Some(&states[slot]), ..args(&kept) };
                states[slot] = retention(&args).unwrap().1.to_dtype(wide).unwrap();
            }
        }
        if drafted {
            pool.accept(&counts).unwrap();
        }
        all.push(o);
        let slot = random.int(0, SLOTS - 1);
        match random.int(0, 9) {
            0 => {
                pool.reset(slot).unwrap();
                states[slot] = fresh.clone();
            }
            1 => {
                states[slot] = random.normal(fresh.shape()).to_dtype(wide).unwrap();
                pool.set_state(slot, &states[slot].to_device(device).unwrap()).unwrap();
            }
            2 => assert_close(&what, &home(&pool.state(slot).unwrap()), &states[slot], tolerance),
            _ => {}
        }
    }
    for (slot, want) in states.iter().enumerate() {
        let got = home(&pool.state(slot).unwrap());
        assert_eq!(got.dtype(), wide);
        assert_close(&format!("{session:?}: state {slot}"), &got, want, tolerance);
    }
    all
}

/// How long states wait to be written changes no bit of the outputs, if they are wide.
#[track_caller]
pub fn windows_change_no_bit(device: &Device, session: Session, seed: u64, tolerance: f64) {
    let run = |window| {
        let session = Session { window, ..session };
        let outputs = follows_the_operator(device, session, seed, tolerance);
        outputs.iter().map(bits).collect::<Vec<_>>()
    };
    let want = run(1);
    for window in [2, 4, 8, 13] {
        assert!(run(window) == want, "{session:?} window {window}");
    }
}

/// Calls that a pool refuses, by name; it goes on as before.
pub fn refuses_nonsense(device: &Device) {
    let session = Session {
        heads: [2, 1, 2],
        keys: 6,
        values: 5,
        per_token: false,
        dtype: DType::F32,
        state: DType::F32,
        window: 3,
    };
    let random = &mut Random::new(1);
    let constant = random.uniform(2, -0.2, 0.0).to_dtype(DType::F32).unwrap();
    let t = on(device, &session.tokens(random, 2, 3, &constant));
    let mut pool = session.pool(device);
    let before = bits(&home(&pool.state(1).unwrap()));
    let mut fails = |f: &dyn Fn(&mut RetentionPool) -> subquadratic::Result<()>, part: &str| {
        let error = f(&mut pool).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let slots = [Some(0), Some(1)];
    fails(&|pool| pool.step(&args(&t), &[Some(0), Some(SLOTS)]).map(drop), "below 5");
    fails(&|pool| pool.step(&args(&t), &[Some(1), Some(1)]).map(drop), "1 twice");
    fails(&|pool| pool.step(&args(&t), &[Some(1)]).map(drop), "one for each of 2 rows");
    fails(&|pool| pool.set_state(9, &t[0]), "below 5");
    fails(&|pool| pool.set_state(0, &t[0]), "[H, K, V] = [2, 6, 5]");
    fails(&|pool| pool.state(5).map(drop), "below 5");
    fails(&|pool| pool.accept(&[1, 1]), "one that waits");
    fails(
        &|pool| {
            pool.draft(&args(&t), &slots)?;
            pool.accept(&[1, 4])
        },
        "at most 3",
    );
    fails(&|pool| pool.accept(&[1]), "2 counts");
    let other = on(device, &Session { keys: 7, ..session }.tokens(random, 2, 3, &constant));
    fails(&|pool| pool.step(&args(&other), &slots).map(drop), "[2, 6, 5]");
    let state = home(&t[0]).to_device(device).unwrap();
    let given = Retention { initial_state: Some(&state), ..args(&t) };
    fails(&|pool| pool.step(&given, &slots).map(drop), "initial");
    let wide: Vec<Tensor> = t.iter().map(|x| x.to_dtype(DType::F64).unwrap()).collect();
    fails(&|pool| pool.step(&args(&wide), &slots).map(drop), "F32");
    assert!(bits(&home(&pool.state(1).unwrap())) == before);
    pool.step(&args(&t), &slots).unwrap();
    let config = RetentionPoolConfig::new(1, 1, 1, 1);
    for (config, part) in [
        (RetentionPoolConfig { window: 0, ..config }, "window"),
        (RetentionPoolConfig { keys: 0, ..config }, "keys"),
        (RetentionPoolConfig { dtype: DType::U32, ..config }, "dtype"),
    ] {
        let error = RetentionPool::new(config, device).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// Relative distance of the outputs of states in bf16 from those in f32 over the last eighth of `length` single tokens of
/// RetNet's heads, one figure a head.
pub fn drift(device: &Device, window: usize, length: usize) -> Vec<f64> {
    let (heads, width) = (8, 16);
    let random = &mut Random::new(3);
    let logs: Vec<f32> = (0..heads).map(|h| (-(2f32.powi(-5 - h))).ln_1p()).collect();
    let decays = Tensor::new(logs, device).unwrap();
    let config = RetentionPoolConfig::new(1, heads as usize, width, width);
    let mut wide = RetentionPool::new(config, device).unwrap();
    let mut short =
        RetentionPool::new(RetentionPoolConfig { dtype: DType::BF16, window, ..config }, device).unwrap();
    let mut outputs = [vec![], vec![]];
    for token in 0..length {
        let mut draw = || random.normal((1, 1, heads as usize, width)).to_dtype(DType::F32).unwrap();
        let mut t = on(device, &[draw(), draw(), draw()]);
        t.push(decays.clone());
        for (pool, outputs) in [&mut wide, &mut short].into_iter().zip(&mut outputs) {
            let o = pool.step(&args(&t), &[Some(0)]).unwrap();
            if token >= length - length / 8 {
                outputs.push(o);
            }
        }
    }
    let [wide, short] = outputs.map(|all| home(&Tensor::cat(&all, 1).unwrap()));
    let head = |x: &Tensor, h: usize| x.narrow(2, h, 1).unwrap();
    (0..heads as usize).map(|h| relative_errors(&head(&short, h), &head(&wide, h)).0).collect()
}
