//! The models to test with: every mixer and family, with other options each.

use subquadratic::layers::retention::{HeadNorm, RetentionRotary, RetentionScaling, ShortConv};
use subquadratic::layers::{MlpConfig, RetentionConfig};
use subquadratic::models::{
    BlockConfig, Family, FeedForwardConfig, MixerConfig, ModelConfig, NormConfig, Residual,
};
use subquadratic::ops::{Activation, RotaryStyle};

/// Tokens of every model.
pub const VOCABULARY: usize = 23;
/// A model of each family, with other options each.
pub fn configs() -> [ModelConfig; 5] {
    let config = |family, tied| {
        let mut config = ModelConfig::mamba(10, 2, VOCABULARY);
        (config.family, config.tie_embeddings) = (family, tied);
        config
    };
    let mut falcon = config(Family::FalconMamba, false);
    for block in &mut falcon.blocks {
        let MixerConfig::Mamba(mixer) = &mut block.mixer else { panic!("a Mamba") };
        (mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.dt_rank) = (17, 3, 2, 2);
        (mixer.bias, mixer.conv_bias, mixer.inner_norm_eps) = (true, false, Some(1e-3));
    }
    let mut original = config(Family::MambaOriginal, false);
    let norm = NormConfig::Layer { eps: 1e-5 };
    (original.vocab_multiple, original.final_norm, original.residual_in_fp32) = (8, Some(norm), false);
    for block in &mut original.blocks {
        (block.norm, block.mlp) = (norm, Some(FeedForwardConfig { norm, layer: MlpConfig::joint(10, 128) }));
    }
    // torchscale's with a norm behind the sums, and fla's with all of its options
    let retnet = |family, change: &dyn Fn(&mut BlockConfig, &mut RetentionConfig)| {
        let mut config = ModelConfig { family, ..ModelConfig::retnet(8, 2, VOCABULARY) };
        for block in &mut config.blocks {
            let MixerConfig::Retention(mut mixer) = block.mixer.clone() else { panic!("retention") };
            (mixer.heads, mixer.kv_heads, mixer.head_key, mixer.head_value) = (2, 2, 4, 3);
            change(block, &mut mixer);
            block.mixer = MixerConfig::Retention(mixer);
        }
        config
    };
    let mut deep = retnet(Family::RetNetTorchscale, &|block, _| {
        block.residual = Residual { scale: 1.4, post_norm: true };
    });
    (deep.embedding_norm, deep.embedding_scale, deep.final_norm) = (deep.final_norm, 2.5, None);
    let fla = retnet(Family::RetNet { fused_norm: false }, &|_, mixer| {
        mixer.kv_heads = 1;
        mixer.rotary = mixer.rotary.map(|rotary| RetentionRotary { style: RotaryStyle::Half, ..rotary });
        mixer.scaling = RetentionScaling::None;
        mixer.short_conv = Some(ShortConv { width: 3, bias: true });
        mixer.norm = HeadNorm { kind: NormConfig::Layer { eps: 1e-5 }, affine: true };
        (mixer.gate, mixer.bias) = (Some(Activation::Gelu), true);
    });
    [config(Family::Mamba, true), falcon, original, deep, fla]
}
