//! What fla and torchscale compute from the same arguments; `tests/fixtures/make_retention.py` made them.

use crate::case::FORMS;
use crate::common::*;
use candle_core::{DType, Device, Tensor};
use subquadratic::ops::{Form, Retention, retention};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/retention.safetensors");
const HEADS: usize = 3;

/// RetNet's decays.
fn decays() -> Tensor {
    let logs: Vec<f64> = (0..HEADS).map(|h| (-(2f64.powi(-5 - h as i32))).ln_1p()).collect();
    Tensor::new(logs, &Device::Cpu).unwrap()
}

#[test]
fn fla_and_torchscale_agree() {
    let fixture = candle_core::safetensors::load(FIXTURE, &Device::Cpu).unwrap();
    let wide = |name: &str| fixture[name].to_dtype(DType::F64).unwrap();
    let (q, k, v, g, state) = (wide("q"), wide("k"), wide("v"), wide("g"), wide("state"));
    let length = q.dim(1).unwrap();
    let scale = (q.dim(3).unwrap() as f64).powf(-0.5);
    let run = |log_decay: &Tensor, scale: f64, initial_state: Option<&Tensor>, form: Form| {
        let args = Retention { q: &q, k: &k, v: &v, log_decay, scale, initial_state, segments: None, form };
        retention(&args).unwrap()
    };
    for form in FORMS {
        let (o, last) = run(&g, scale, Some(&state), form);
        // fla computes these in float32, whatever it is given
        for name in ["chunk", "recurrent"] {
            assert_close(name, &o, &wide(name), 2e-6);
            assert_close(name, &last, &wide(&format!("{name}_state")), 2e-6);
        }
        assert_close("retention", &run(&decays(), scale, None, form).0, &wide("retention"), 2e-6);

        // torchscale divides by the root of the sum of the decays so far
        let (o, last) = run(&decays(), 1.0, None, form);
        let sum = |t: usize, log: f64| (0..=t).map(|n| (log * n as f64).exp()).sum::<f64>().sqrt();
        let logs = values(&decays());
        let roots: Vec<f64> = (0..length).flat_map(|t| logs.iter().map(move |&log| sum(t, log))).collect();
        let roots = Tensor::from_vec(roots, (1, length, HEADS, 1), &Device::Cpu).unwrap();
        assert_close("torchscale", &o.broadcast_div(&roots).unwrap(), &wide("torchscale"), 1e-12);
        let root = roots.narrow(1, length - 1, 1).unwrap().reshape((1, HEADS, 1, 1)).unwrap();
        let last = last.broadcast_div(&root).unwrap().transpose(2, 3).unwrap();
        assert_close("torchscale", &last, &wide("torchscale_state"), 1e-12);
    }
}
