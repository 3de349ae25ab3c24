//! A head alone, whose time is cut into stretches.

use crate::common::*;
use candle_core::{Device, Tensor};
use subquadratic::ops::{Form, Retention, Segments, retention};

/// A single head of a single row is cut into stretches of time; beside another row it is not. Outputs, states and gradients
/// are the same, for every kind of decay, packed or not; its bits are those of any number of threads.
#[test]
fn a_single_head_is_cut_into_stretches_of_time() {
    let mut random = Random::new(31);
    // more than 32 pieces of 64 tokens, ragged
    let length = 2190;
    for (per_token, resets, packed) in [
        (false, false, false),
        (true, false, false),
        (true, true, false),
        (false, false, true),
        (true, true, true),
    ] {
        let dims = |width: usize| (1, length, 1, width);
        let log_decay = match per_token {
            false => random.uniform(1, -0.02, -0.01),
            true => random.uniform((1, length, 1), -0.1, -0.001),
        };
        let reset = Tensor::from_vec(
            (0..length).map(|t| u8::from(resets && t % 211 == 210)).collect::<Vec<_>>(),
            (1, length, 1),
            &Device::Cpu,
        )
        .unwrap();
        let tensors = [
            random.normal(dims(3)),
            random.normal(dims(3)),
            random.normal(dims(4)),
            log_decay,
            random.normal((1, 1, 3, 4)),
        ];
        let other: Vec<_> = tensors.iter().map(|x| x.affine(0.5, -0.001).unwrap()).collect();
        let marks: Vec<u8> = (0..length)
            .map(|t| [0, 1, 2][usize::from(t % 97 == 50) + usize::from(t % 97 == 9) * 2])
            .collect();
        let run = |x: &[Tensor], form: Form| {
            let batch = x[0].dim(0)?;
            let marks = Tensor::from_vec(marks.repeat(batch), (batch, length), &Device::Cpu)?;
            let segments = if packed { Some(Segments::from_marks(&marks)?) } else { None };
            let log_decay = if per_token {
                let lowest = x[3].zeros_like()?.affine(0.0, f64::NEG_INFINITY)?;
                reset.broadcast_as(x[3].shape())?.where_cond(&lowest, &x[3])?
            } else {
                x[3].clone()
            };
            let (o, state) = retention(&Retention {
                q: &x[0],
                k: &x[1],
                v: &x[2],
                log_decay: &log_decay,
                scale: 0.6,
                initial_state: Some(&x[4]),
                segments: segments.as_ref(),
                form,
            })?;
            Ok(vec![o, state])
        };
        let beside = |x: &[Tensor]| {
            let mut both = vec![];
            for (i, (x, other)) in x.iter().zip(&other).enumerate() {
                both.push(if i == 3 && !per_token { x.clone() } else { Tensor::cat(&[x, other], 0)? });
            }
            run(&both, Form::Auto)?.iter().map(|y| Ok(y.narrow(0, 0, 1)?)).collect()
        };
        let (got, got_gradients) = gradients(&tensors, |x| run(x, Form::Auto));
        let (want, want_gradients) = gradients(&tensors, beside);
        let what = format!("per token {per_token}, resets {resets}, packed {packed}");
        for (got, want) in got.iter().chain(&got_gradients).zip(want.iter().chain(&want_gradients)) {
            assert_close(&what, got, want, 1e-11);
        }
        let bits_of = |threads| {
            with_threads(threads, || {
                let (outputs, gradients) = gradients(&tensors, |x| run(x, Form::Auto));
                outputs.iter().chain(&gradients).flat_map(bits).collect::<Vec<_>>()
            })
        };
        assert_eq!(bits_of(1), bits_of(3), "{what}");
    }
}
