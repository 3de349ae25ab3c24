//! The filter token by token, in chunks, and across any hand-over.

use crate::case::*;
use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{LongConvState, Segments, StreamConv, long_conv_with_state};

fn fresh(case: &Case, dtype: DType) -> LongConvState {
    LongConvState::new(case.batch, case.channels, dtype, &Device::Cpu).unwrap()
}

/// `t` in pieces through one state.
fn in_pieces(case: &Case, t: &[Tensor], pieces: &[usize]) -> Tensor {
    let args = case.args(t, None);
    let stream = StreamConv::new(args.filter, args.d, case.channels).unwrap();
    let mut state = fresh(case, t[1].dtype());
    let (mut start, mut ys) = (0, vec![]);
    for &length in pieces {
        let part = |x: &Tensor| x.narrow(1, start, length).unwrap();
        let [pre, post] = [args.pre_gate.map(part), args.post_gate.map(part)];
        let y = stream.forward(&part(&t[0]), [pre.as_ref(), post.as_ref()], None, &mut state);
        ys.push(y.unwrap());
        start += length;
    }
    Tensor::cat(&ys, 1).unwrap()
}

#[test]
fn single_tokens_equal_the_whole() {
    for (length, taps) in [(1, 1), (2, 9), (700, 700), (700, 50), (300, 1000), (64, 64), (65, 2)] {
        let case = Case { taps, ..Case::full(2, length, 5) };
        let t = case.tensors(1);
        let y = in_pieces(&case, &t, &vec![1; length]);
        assert_close(&format!("{length} {taps}"), &y, &oracle(&case, &t), 1e-11);
        let t = cast(&t, DType::F32);
        let y = in_pieces(&case, &t, &vec![1; length]);
        assert_close(
            &format!("f32 {length} {taps}"),
            &y.to_dtype(DType::F64).unwrap(),
            &oracle(&case, &t),
            1e-5,
        );
    }
}

#[test]
fn any_split_equals_the_whole() {
    let mut random = Random::new(2);
    for seed in 0..40 {
        let (length, groups) = (random.int(1, 900), random.int(1, 3));
        let case = Case { groups, taps: random.int(1, 1200), ..Case::full(1, length, 6 * groups) };
        let t = case.tensors(seed);
        let parts = random.int(1, length.min(12));
        let mut pieces = random.split(length, parts, 1);
        if seed % 2 == 0 {
            // a prompt, then single tokens
            let rest = length - pieces[0];
            pieces.truncate(1);
            pieces.extend(vec![1; rest]);
        }
        let y = in_pieces(&case, &t, &pieces);
        assert_close(&format!("{case:?} {pieces:?}"), &y, &oracle(&case, &t), 1e-11);
    }
}

#[test]
fn a_state_selects_saves_and_forks() {
    let case = Case { taps: 400, ..Case::full(3, 300, 5) };
    let t = case.tensors(3);
    let whole = oracle(&case, &t);
    let args = case.args(&t, None);
    let stream = StreamConv::new(args.filter, args.d, 5).unwrap();
    let run = |state: &mut LongConvState, rows: &[u32], start: usize, length: usize| {
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let part = |x: &Tensor| x.index_select(&rows, 0).unwrap().narrow(1, start, length).unwrap();
        let gates = [Some(part(&t[4])), Some(part(&t[5]))];
        let y = stream.forward(&part(&t[0]), [gates[0].as_ref(), gates[1].as_ref()], None, state).unwrap();
        assert_close("continued", &y, &part(&whole), 1e-11);
    };
    let mut state = fresh(&case, DType::F64);
    run(&mut state, &[0, 1, 2], 0, 77);
    for at in 77..140 {
        run(&mut state, &[0, 1, 2], at, 1);
    }
    let mut fork = state.clone();
    run(&mut fork, &[0, 1, 2], 140, 100);
    let mut chosen = state.select(&[2, 0, 2]).unwrap();
    for at in 140..200 {
        run(&mut chosen, &[2, 0, 2], at, 1);
    }
    let (past, lengths) = state.past().unwrap();
    assert_eq!((past.dims(), lengths.as_slice()), (&[3, 140, 5][..], &[140; 3][..]));
    let mut loaded = LongConvState::from_past(&past, &lengths).unwrap();
    run(&mut loaded, &[0, 1, 2], 140, 1);
    run(&mut loaded, &[0, 1, 2], 141, 159);
    run(&mut state, &[0, 1, 2], 140, 33);
    state.reset();
    run(&mut state, &[0, 1, 2], 0, 20);
    assert!(state.bytes() > 0);
    assert!(state.select(&[3]).is_err());
}

#[test]
fn packed_rows_and_padding_go_through_a_state() {
    let case = Case::full(2, 120, 4);
    let t = case.tensors(4);
    let segments = Segments::packed(&[vec![50, 60], vec![120]], 120).unwrap();
    let expected = case.run(&t, Some(&segments)).unwrap();
    let mut state = fresh(&case, DType::F64);
    let y = long_conv_with_state(&case.args(&t, Some(&segments)), &mut state).unwrap();
    assert_close("packed", &y, &expected[0], 1e-11);
    assert_eq!(state.past().unwrap().1, [60, 119]);
    let padded = Segments::left_padded(&[30, 0], 120).unwrap();
    let y = long_conv_with_state(&case.args(&t, Some(&padded)), &mut state).unwrap();
    assert!(values(&y.narrow(0, 1, 1).unwrap()).iter().all(|&y| y == 0.0));
    let lengths = state.past().unwrap().1;
    assert_eq!(lengths, [90, 119]);
}

#[test]
fn gradients_pass_through_the_state() {
    let case = Case::full(2, 40, 3);
    let t = case.tensors(5);
    let whole = case.all(&t, None);
    let inputs: Vec<Tensor> = case.used().iter().map(|&i| t[i].clone()).collect();
    let run = |x: &[Tensor]| {
        let t = case.place(&t, x);
        let args = case.args(&t, None);
        let mut state = fresh(&case, DType::F64);
        let mut ys = vec![];
        for (start, length) in [(0, 17), (17, 1), (18, 22)] {
            let part = |x: &Tensor| x.narrow(1, start, length);
            let (x, pre, post) = (part(&t[0])?, part(&t[4])?, part(&t[5])?);
            let stream = StreamConv::new(args.filter, args.d, 3)?;
            ys.push(stream.forward(&x, [Some(&pre), Some(&post)], None, &mut state)?);
        }
        Ok(vec![Tensor::cat(&ys, 1)?])
    };
    let (y, found) = gradients(&inputs, run);
    for (got, want) in y.iter().chain(&found).zip(&whole) {
        assert_close("through the state", got, want, 1e-11);
    }
}

#[test]
fn bad_states_are_refused_and_left_alone() {
    let case = Case::full(2, 8, 3);
    let t = case.tensors(6);
    let mut other = LongConvState::new(1, 3, DType::F64, &Device::Cpu).unwrap();
    assert!(long_conv_with_state(&case.args(&t, None), &mut other).is_err());
    let mut narrow = LongConvState::new(2, 3, DType::F32, &Device::Cpu).unwrap();
    assert!(long_conv_with_state(&case.args(&t, None), &mut narrow).is_err());
    assert!(LongConvState::new(2, 3, DType::U8, &Device::Cpu).is_err());
    let past = Tensor::zeros((2, 4, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(LongConvState::from_past(&past, &[5, 1]).is_err());
    assert!(LongConvState::from_past(&past, &[1]).is_err());
}
