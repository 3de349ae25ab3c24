//! Evo 2, after the package vtx: Hyena layers with long (real poles), medium and short filters, and attention.

use super::striped_hyena::{activation, attention_config, indices, layers, model, positions, write_shared};
use super::{Family, Keys, Object};
use crate::layers::ModalHyenaConfig;
use crate::layers::attention::QkvLayout;
use crate::layers::modal_hyena::{ChannelOrder, HyenaFilter};
use crate::models::{MixerConfig, ModelConfig};
use crate::ops::Activation;
use crate::{Error, Result};
use serde_json::{Value, json};

/// Filters of at least as many taps are convolved with, shorter ones correlated.
const MEDIUM: usize = 128;

pub(super) fn read(keys: &Keys) -> Result<ModelConfig> {
    let hidden_size = keys.required_size("hidden_size")?;
    let heads = keys.required_size("num_attention_heads")?;
    let layers = layers(keys)?;
    keys.only("hyena_flip_x1x2", &json!(false))?;
    // long filters are never shared, whatever these say
    keys.ignore(&["hyena_filter_groups", "hcl_filter_groups", "num_filters"]);
    let order = match (keys.flag("interleave", false)?, keys.flag("column_split_hyena", true)?) {
        (true, false) => ChannelOrder::Interleaved,
        (false, true) => ChannelOrder::Columns { heads },
        (false, false) => ChannelOrder::Thirds,
        (true, true) => return Err(keys.wrong("interleave", "false beside column_split_hyena", "true")),
    };
    let layout = match keys.flag("column_split", true)? {
        true => QkvLayout::JointByHead,
        false => QkvLayout::Joint,
    };
    let groups = |key: &str| Ok::<_, Error>(keys.size(key)?.unwrap_or(hidden_size));
    let states = keys.size("state_size")?.unwrap_or(16);
    let long = HyenaFilter::Real { states, groups: hidden_size };
    let taps = |length: &str, default: usize, filter_groups: &str| -> Result<HyenaFilter> {
        let (taps, groups) = (keys.size(length)?.unwrap_or(default), groups(filter_groups)?);
        Ok(match taps >= MEDIUM {
            true => HyenaFilter::Medium { taps, groups },
            false => HyenaFilter::Short { taps, groups },
        })
    };
    let medium = taps("hcm_filter_length", 128, "hcm_filter_groups")?;
    let short = taps("hcs_filter_length", 7, "hcs_filter_groups")?;
    let listed = |key: &str| Ok::<_, Error>(indices(keys, key, layers)?.unwrap_or_default());
    let attention = listed("attn_layer_idxs")?;
    let filters = [
        (long, listed("hcl_layer_idxs")?),
        (medium, listed("hcm_layer_idxs")?),
        (short, listed("hcs_layer_idxs")?),
    ];
    let projection_bias = keys.flag("qkv_proj_bias", false)?;
    let (short_taps, short_bias) =
        (keys.size("short_filter_length")?.unwrap_or(3), keys.flag("short_filter_bias", false)?);
    let out_bias = keys.flag("hyena_out_proj_bias", false)?;
    let mixer = |i: usize| {
        if attention.contains(&i) {
            return Ok(MixerConfig::Attention(attention_config(keys, layout, 1e6)?));
        }
        let Some(&(filter, _)) = filters.iter().find(|(_, layers)| layers.contains(&i)) else {
            let got = format!("no mixer for layer {i}");
            return Err(keys.wrong("hcl_layer_idxs", "every layer in one of the lists of layers", &got));
        };
        let d_model = hidden_size;
        let config =
            ModalHyenaConfig { d_model, short_taps, filter, order, projection_bias, short_bias, out_bias };
        Ok(MixerConfig::ModalHyena(config))
    };
    let mixers = (0..layers).map(mixer).collect::<Result<Vec<_>>>()?;
    let mut activations = vec![activation(keys, Activation::Gelu)?; layers];
    if keys.flag("evo2_style_activations", false)? {
        activations[1..].fill(Activation::Identity);
    }
    attention_config(keys, layout, 1e6)?;
    model(keys, Family::Evo2, mixers, &activations)
}

pub(super) fn write(config: &ModelConfig) -> Result<Object> {
    let mut keys = write_shared(config)?;
    let mut put = |key: &str, value: Value| drop(keys.insert(key.into(), value));
    let mixers = || config.blocks.iter().map(|block| &block.mixer);
    let hyena = || {
        mixers().filter_map(|mixer| match mixer {
            MixerConfig::ModalHyena(hyena) => Some(hyena),
            _ => None,
        })
    };
    // the two kinds of filters with taps, whose names say nothing: the longer one first
    let taps = |filter: &HyenaFilter| match *filter {
        HyenaFilter::Medium { taps, groups } | HyenaFilter::Short { taps, groups } => Some((taps, groups)),
        _ => None,
    };
    let mut kinds: Vec<_> = hyena().filter_map(|layer| taps(&layer.filter)).collect();
    kinds.sort_by(|a, b| b.cmp(a));
    kinds.dedup();
    if let [(taps, _)] = kinds[..]
        && taps < MEDIUM
    {
        kinds.insert(0, (MEDIUM, config.hidden_size));
    }
    for (name, kind) in ["hcm", "hcs"].into_iter().zip(kinds.iter().map(Some).chain([None, None])) {
        let is = |mixer: &MixerConfig| matches!(mixer, MixerConfig::ModalHyena(layer) if kind.is_some() && taps(&layer.filter) == kind.copied());
        put(&format!("{name}_layer_idxs"), json!(positions(config, is)));
        if let Some((taps, groups)) = kind {
            put(&format!("{name}_filter_length"), (*taps).into());
            put(&format!("{name}_filter_groups"), (*groups).into());
        }
    }
    let is_long = |mixer: &MixerConfig| matches!(mixer, MixerConfig::ModalHyena(layer) if matches!(layer.filter, HyenaFilter::Real { .. }));
    put("hcl_layer_idxs", json!(positions(config, is_long)));
    for layer in hyena() {
        if let HyenaFilter::Real { states, groups } = layer.filter {
            put("state_size", states.into());
            put("hcl_filter_groups", groups.into());
        }
        put("interleave", (layer.order == ChannelOrder::Interleaved).into());
        put("hyena_out_proj_bias", layer.out_bias.into());
        put("qkv_proj_bias", layer.projection_bias.into());
    }
    let by_head = mixers().any(|mixer| {
        matches!(mixer, MixerConfig::Attention(attention) if attention.layout == QkvLayout::JointByHead)
    });
    put("column_split", by_head.into());
    let later = config.blocks.get(1).and_then(|block| block.mlp).map(|mlp| mlp.layer.activation);
    put("evo2_style_activations", (later == Some(Activation::Identity)).into());
    keys.extend(super::token_keys(&config.tokens));
    Ok(keys)
}
