//! Decoding with a pool of states: every mixer, on the CPU.

#[path = "../common/mod.rs"]
mod common;
#[path = "../language_model/configs.rs"]
mod configs;
mod laws;

use candle_core::{DType, Device};
use configs::{VOCABULARY, configs};
use subquadratic::models::{BlockConfig, LanguageModel, MixerConfig, ModelConfig, NormConfig};

fn model(config: &ModelConfig, dtype: DType) -> LanguageModel {
    LanguageModel::init(config, 1, dtype, &Device::Cpu).unwrap().frozen().unwrap()
}

/// Attention, whose states grow, between Mamba blocks.
fn hybrid() -> ModelConfig {
    let mut config = ModelConfig::mamba(16, 3, VOCABULARY);
    let attention = subquadratic::layers::AttentionConfig::new(16, 2);
    config.blocks[1] =
        BlockConfig::new(NormConfig::Rms { eps: 1e-5 }, MixerConfig::Attention(attention), None);
    config
}

#[test]
fn every_model_follows_itself() {
    for config in configs().iter().chain([&hybrid()]) {
        laws::follows_the_model(&format!("{:?}", config.family), &model(config, DType::F64), 5, 60, 1e-9);
    }
}

#[test]
fn the_most_probable_token() {
    laws::greedy_is_the_largest_logit(&model(&configs()[0], DType::F32));
    laws::steps_in_a_row_are_steps_in_turn("on the CPU", &model(&configs()[0], DType::F32));
}

#[test]
fn nonsense() {
    laws::refuses_nonsense(&model(&configs()[0], DType::F32));
}
