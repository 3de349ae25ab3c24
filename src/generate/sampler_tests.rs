//! Every filter against its definition, and the draw against the probabilities.

use super::*;
use candle_core::Device;
use proptest::prelude::*;

/// The tokens that the definitions keep, and whether one of them hangs on rounding.
fn by_definition(config: &GenerationConfig, logits: &[f64]) -> (Vec<u32>, bool) {
    let n = logits.len();
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = logits.iter().map(|x| ((x - largest) / config.temperature).exp()).collect();
    let outranks = |j: usize, i: usize| logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
    let mut kept: Vec<usize> = (0..n).collect();
    let mut close = false;
    if let Some(k) = config.top_k {
        kept.retain(|&i| (0..n).filter(|&j| outranks(j, i)).count() < k);
    }
    if config.top_p < 1.0 {
        let all: f64 = kept.iter().map(|&i| p[i]).sum();
        let before = kept.clone();
        kept.retain(|&i| {
            let above: f64 = before.iter().filter(|&&j| outranks(j, i)).map(|&j| p[j]).sum();
            close |= (above / all - config.top_p).abs() < 1e-12;
            above < config.top_p * all
        });
    }
    if config.min_p > 0.0 {
        let most = kept.iter().map(|&i| p[i]).fold(0.0, f64::max);
        kept.retain(|&i| {
            close |= (p[i] / most - config.min_p).abs() < 1e-12;
            p[i] >= config.min_p * most
        });
    }
    (kept.into_iter().map(|i| i as u32).collect(), close)
}

fn logits() -> impl Strategy<Value = Vec<f64>> {
    // small vocabularies with many equal logits, and larger ones with none
    let few = prop::collection::vec((-4i32..4).prop_map(f64::from), 1..40);
    let many = prop::collection::vec(-6.0..6.0f64, 100..700);
    let masked = prop::collection::vec(
        prop_oneof![2 => (-3.0..3.0f64).boxed(), 1 => Just(f64::NEG_INFINITY).boxed()],
        2..50,
    )
    .prop_filter("one must be left", |x| x.iter().any(|x| x.is_finite()));
    prop_oneof![few, many, masked]
}

fn config() -> impl Strategy<Value = GenerationConfig> {
    let top_k = prop_oneof![Just(None), (1usize..80).prop_map(Some)];
    let top_p = prop_oneof![Just(1.0), 0.01..1.0f64];
    let min_p = prop_oneof![Just(0.0), 0.0..1.0f64, Just(1.0)];
    (0.1..3.0f64, top_k, top_p, min_p).prop_map(|(temperature, top_k, top_p, min_p)| GenerationConfig {
        temperature,
        top_k,
        top_p,
        min_p,
        ..Default::default()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn filters_keep_what_their_definitions_keep(logits in logits(), config in config()) {
        let best = argmax(&logits).unwrap();
        // in rooms that have been used
        let mut candidates = Candidates::default();
        candidates.find(&GenerationConfig { top_k: Some(2), ..config.clone() }, &[0.0, 2.0, 1.0], 2.0);
        candidates.find(&config, &logits, logits[best as usize]);
        let got = candidates.ids();
        let (want, close) = by_definition(&config, &logits);
        prop_assert!(got.contains(&best));
        prop_assert!(close || got == want, "{config:?}\n{logits:?}\n{got:?}\n{want:?}");
    }

    #[test]
    fn the_penalty_divides_positive_logits_and_multiplies_negative_ones(
        logits in prop::collection::vec(-3.0..3.0f64, 2..30),
        seen in prop::collection::vec(0u32..30, 0..20),
        penalty in 0.2..4.0f64,
    ) {
        let config = GenerationConfig { repetition_penalty: penalty, ..GenerationConfig::greedy(1) };
        let mut sampler = Sampler::new(&config, 0).unwrap();
        // in two parts and twice: a token counts once
        sampler.observe(&seen);
        sampler.observe(&seen[..seen.len() / 2]);
        let mut want = logits.clone();
        for (id, x) in want.iter_mut().enumerate() {
            if seen.contains(&(id as u32)) {
                *x = if *x < 0.0 { *x * penalty } else { *x / penalty };
            }
        }
        let mut got = logits;
        let id = sampler.draw(&mut got).unwrap();
        prop_assert_eq!(&got, &want);
        prop_assert_eq!(id, argmax(&want).unwrap());
        prop_assert!(sampler.seen.contains(&id));
    }
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = [0.3, -1.0, 2.0, 0.0, 1.1];
    let config = GenerationConfig { temperature: 0.8, ..Default::default() };
    let p: Vec<f64> = logits.iter().map(|x: &f64| (x / 0.8).exp()).collect();
    let sum: f64 = p.iter().sum();
    let draws = 40_000;
    let mut counts = [0usize; 5];
    let mut sampler = Sampler::new(&config, 0).unwrap();
    for _ in 0..draws {
        counts[sampler.draw(&mut logits.clone()).unwrap() as usize] += 1;
    }
    for (count, p) in counts.iter().zip(p) {
        let p = p / sum;
        // five standard deviations
        let slack = 5.0 * (p * (1.0 - p) / draws as f64).sqrt();
        assert!((*count as f64 / draws as f64 - p).abs() < slack, "{counts:?}");
    }
}

#[test]
fn a_seed_is_a_stream_and_a_row_the_next_seed() {
    let stream = |seed: u64, row: usize| {
        let config = GenerationConfig { seed, ..Default::default() };
        let mut sampler = Sampler::new(&config, row).unwrap();
        (0..50).map(|_| sampler.draw(&mut [0.0; 100]).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(stream(7, 0), stream(7, 0));
    assert_eq!(stream(7, 2), stream(9, 0));
    assert_ne!(stream(7, 0), stream(8, 0));
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut sampler = Sampler::new(&GenerationConfig::greedy(1), 0).unwrap();
    assert_eq!(sampler.draw(&mut [1.0, 3.0, 2.0, 3.0]).unwrap(), 1);
    assert_eq!(sampler.draw(&mut [f64::NEG_INFINITY, -5.0]).unwrap(), 1);
    let half = Tensor::new(&[0.5f32, 1.5, 1.0], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    assert_eq!(sampler.sample(&half).unwrap(), 1);
}

#[test]
fn logits_without_a_distribution_are_refused() {
    let message = |logits: &[f64]| {
        let mut sampler = Sampler::new(&GenerationConfig::default(), 0).unwrap();
        sampler.draw(&mut logits.to_vec()).unwrap_err().to_string()
    };
    assert!(message(&[0.0, 1.0, f64::NAN]).contains("token 2"));
    assert!(message(&[f64::NAN, 1.0]).contains("token 0"));
    assert!(message(&[0.0, f64::INFINITY]).contains("inf"));
    assert!(message(&[f64::NEG_INFINITY; 3]).contains("-infinity"));
    assert!(message(&[]).contains("at least one"));
    let mut sampler = Sampler::new(&GenerationConfig::default(), 0).unwrap();
    let matrix = Tensor::zeros((1, 3), DType::F32, &Device::Cpu).unwrap();
    assert!(sampler.sample(&matrix).unwrap_err().to_string().contains("[V]"));
}

#[test]
fn settings_outside_their_range_are_refused_by_name() {
    let fails = |change: fn(&mut GenerationConfig), name: &str| {
        let mut config = GenerationConfig::default();
        change(&mut config);
        let message = config.validate().unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
        assert!(Sampler::new(&config, 0).is_err());
    };
    fails(|c| c.temperature = -0.1, "temperature");
    fails(|c| c.temperature = f64::NAN, "temperature");
    fails(|c| c.temperature = f64::INFINITY, "temperature");
    fails(|c| c.top_p = 0.0, "top_p");
    fails(|c| c.top_p = 1.1, "top_p");
    fails(|c| c.top_p = f64::NAN, "top_p");
    fails(|c| c.min_p = -0.1, "min_p");
    fails(|c| c.min_p = 1.5, "min_p");
    fails(|c| c.top_k = Some(0), "top_k");
    fails(|c| c.repetition_penalty = 0.0, "repetition_penalty");
    fails(|c| c.repetition_penalty = f64::NAN, "repetition_penalty");
}
