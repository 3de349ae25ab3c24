//! The causal convolution.

use crate::agree::{agree, to, tolerance};
use crate::common::*;
use crate::gpu;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{CausalConv1d, Segments, causal_conv1d};

#[test]
fn any_shape_flag_and_dtype() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(1);
    for seed in 0..150 {
        let (batch, channels, taps) =
            (random.int(1, 3), [1, 3, 8, 64, 130, 516][random.int(0, 5)], random.int(1, 8));
        let length = [1, 2, 3, 7, 8, 9, 31, 33, 65, 130, 301][random.int(0, 10)];
        let dtype = [DType::F32, DType::BF16, DType::F16][seed % 3];
        // filters too long for a kernel take the composed form, whose gradients candle adds up in the dtype
        let taps = if dtype == DType::F32 && seed % 5 == 0 { 9 } else { taps };
        let mut flag = || random.int(0, 1) == 1;
        let [bias, silu, state, packed, slice] = [flag(), flag(), flag(), flag(), flag()];
        let wide = random.normal((batch, length, 3 * channels + 1)).to_dtype(dtype).unwrap();
        let x = if slice {
            wide.narrow(2, channels, channels).unwrap()
        } else {
            wide.narrow(2, 0, channels).unwrap()
        };
        let other = random.normal((batch, channels, taps - 1)).to_dtype(DType::F32).unwrap();
        let weight = random.normal((channels, taps)).to_dtype(dtype).unwrap();
        let shift = random.normal(channels).to_dtype(dtype).unwrap();
        let marks: Vec<u8> = (0..batch * length).map(|_| [0, 0, 0, 0, 0, 1, 2][random.int(0, 6)]).collect();
        let marks = Tensor::from_vec(marks, (batch, length), &Device::Cpu).unwrap();
        let segments = Segments::from_marks(&marks).unwrap();
        let mut inputs = vec![if slice { x } else { x.contiguous().unwrap() }, weight];
        inputs.extend(bias.then_some(shift));
        inputs.extend((state && taps > 1).then_some(other));
        let what = format!(
            "{dtype:?} [{batch}, {length}, {channels}] K {taps} bias {bias} silu {silu} state {state} packed {packed}"
        );
        agree(&what, &device, &inputs, tolerance(dtype), |x| {
            let (y, last) = causal_conv1d(&CausalConv1d {
                x: &x[0],
                weight: &x[1],
                bias: bias.then(|| &x[2]),
                silu,
                initial_state: (state && taps > 1).then(|| &x[2 + bias as usize]),
                segments: packed.then_some(&segments),
            })?;
            Ok(vec![y, last])
        });
    }
}

#[test]
fn single_steps_are_the_whole() {
    let Some(device) = gpu() else { return };
    let random = &mut Random::new(2);
    let t = [random.normal((2, 20, 24)), random.normal((24, 4)), random.normal((2, 24, 3))];
    let t: Vec<Tensor> = to(&t.map(|x| x.to_dtype(DType::F32).unwrap()), &device);
    let run = |x: &Tensor, state: &Tensor| {
        let args = CausalConv1d {
            x,
            weight: &t[1],
            bias: None,
            silu: true,
            initial_state: Some(state),
            segments: None,
        };
        causal_conv1d(&args).unwrap()
    };
    let (whole, last) = run(&t[0], &t[2]);
    let (mut state, mut steps) = (t[2].clone(), vec![]);
    for i in 0..20 {
        let (y, next) = run(&t[0].narrow(1, i, 1).unwrap(), &state);
        state = next;
        steps.push(y);
    }
    let cpu = |x: &Tensor| x.to_device(&Device::Cpu).unwrap();
    assert_eq!(bits(&cpu(&Tensor::cat(&steps, 1).unwrap())), bits(&cpu(&whole)));
    assert_eq!(bits(&cpu(&state)), bits(&cpu(&last)));
}

#[test]
fn no_memory_is_an_error_with_the_operators_name_and_shape() {
    let Some(device) = gpu() else { return };
    // one row that counts as 2^26 tokens: its result would take a terabyte
    let row = Tensor::zeros((1, 1, 4096), DType::F32, &device).unwrap();
    let weight = Tensor::ones((4096, 4), DType::F32, &device).unwrap();
    let run = |x: &Tensor| {
        let args =
            CausalConv1d { x, weight: &weight, bias: None, silu: false, initial_state: None, segments: None };
        causal_conv1d(&args)
    };
    let error = run(&row.broadcast_as((1, 1 << 26, 4096)).unwrap()).unwrap_err().to_string();
    assert!(error.contains("causal_conv1d of [1, 67108864, 4096]"), "{error}");
    assert!(error.contains("1099511627776 bytes"), "{error}");
    // and the device goes on
    assert_eq!(values(&run(&row).unwrap().0), vec![0.0; 4096]);
}
