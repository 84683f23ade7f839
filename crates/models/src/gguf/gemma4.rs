//! Gemma 4's hyperparameters, whose blocks differ in widths, keys and windows: read as the keys of `config.json` that say the
//! same, and written from a configuration.
//!
//! Source: llama.cpp's model code and conversion script.

use serde_json::{Map, Value as Json, json};

use super::{
    by_block::{Facts, Own},
    config::Keys,
    rope,
    value::{Array, Metadata, Value},
};
use crate::{
    Result,
    config::{ModelConfig, RopeConfig, RopeScaling},
    families::Channels,
    hf::{config::MAX_LAYERS, parse_config},
};

/// What divides the frequencies of channels that aren't rotated.
const UNROTATED: f32 = 1e30;

/// The model's shape.
pub(super) fn config(keys: &Keys, facts: &Facts) -> Result<ModelConfig> {
    let size = |key: &str| keys.required_size(key);
    let number = |key: &str| keys.metadata.require(&keys.key(key), keys.positive(key)?);
    let layers = size("block_count")?;
    if layers > MAX_LAYERS {
        let expected = format!("at most {MAX_LAYERS}");
        return Err(keys.metadata.error(&keys.key("block_count"), &expected, layers.to_string()));
    }
    let slides = pattern(keys, layers)?;
    let heads = each(keys, "attention.head_count", layers)?;
    let groups = each(keys, "attention.head_count_kv", layers)?;
    let channels = each(keys, "feed_forward_length", layers)?;
    let [full, sliding] = [size("attention.key_length")?, size("attention.key_length_swa")?];
    for (key, expected) in [("attention.value_length", full), ("attention.value_length_swa", sliding)] {
        if keys.size(key)?.is_some_and(|found| found != expected) {
            return Err(keys
                .metadata
                .unsupported_value(&keys.key(key), &format!("{expected}, as of the keys")));
        }
    }
    if keys.size("rope.dimension_count")?.is_some_and(|found| found != full) {
        let expected = format!("{full}, the width of a head with full attention");
        return Err(keys.metadata.unsupported_value(&keys.key("rope.dimension_count"), &expected));
    }
    if rope::from_keys(keys, size("context_length")?)? != RopeScaling::Default {
        return Err(keys.metadata.unsupported(&keys.key("rope.scaling"), "a scaling", "none"));
    }
    let head_dim = |index: usize| if slides[index] { sliding } else { full };
    let mut blocks = Map::new();
    for index in 0..layers {
        let mut block = Map::new();
        let pairs = [
            ("num_attention_heads", &heads as &dyn Fn(usize) -> usize),
            ("num_key_value_heads", &groups),
            ("intermediate_size", &channels),
        ];
        for (key, of) in pairs {
            if of(index) != of(0) {
                block.insert(key.into(), json!(of(index)));
            }
        }
        if head_dim(index) != sliding {
            block.insert("head_dim".into(), json!(head_dim(index)));
        }
        if !block.is_empty() {
            blocks.insert(index.to_string(), Json::Object(block));
        }
    }
    let theta = |key: &str, usual: f64| Ok::<_, crate::Error>(keys.positive(key)?.unwrap_or(usual));
    let rotated = rotated_share(keys.metadata, facts.factors.as_deref(), full)?;
    let sliding_share = keys.size("rope.dimension_count_swa")?.unwrap_or(sliding) as f64 / sliding as f64;
    let kinds = slides.iter().map(|slides| if *slides { "sliding_attention" } else { "full_attention" });
    let zero = |key: &str| Ok::<_, crate::Error>(keys.metadata.usize(&keys.key(key))?.unwrap_or(0));
    let experts = zero("expert_count")?;
    let mut map = json!({
        "model_type": "gemma4_text",
        "vocab_size": facts.vocab_size,
        "hidden_size": size("embedding_length")?,
        "intermediate_size": channels(0),
        "num_hidden_layers": layers,
        "num_attention_heads": heads(0),
        "num_key_value_heads": groups(0),
        "head_dim": sliding,
        "per_layer_config": blocks,
        "max_position_embeddings": size("context_length")?,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon")?,
        "sliding_window": size("attention.sliding_window")?,
        "layer_types": kinds.collect::<Vec<_>>(),
        "num_kv_shared_layers": zero("attention.shared_kv_layers")?,
        "attention_k_eq_v": facts.keys_only,
        "hidden_size_per_layer_input": zero("embedding_length_per_layer_input")?,
        "vocab_size_per_layer_input": facts.vocab_size_per_layer,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional", "rope_theta": theta("rope.freq_base", 1e6)?,
                "partial_rotary_factor": rotated,
            },
            "sliding_attention": {
                "rope_type": "default", "rope_theta": theta("rope.freq_base_swa", 1e4)?,
                "partial_rotary_factor": sliding_share,
            },
        },
        // 0 is none; readers take silence for a cap of their own.
        "final_logit_softcapping":
            keys.metadata.f64(&keys.key("final_logit_softcapping"))?.filter(|cap| *cap != 0.0),
        "tie_word_embeddings": facts.tied,
        "enable_moe_block": experts > 0,
    });
    if experts > 0 {
        map["num_experts"] = json!(experts);
        map["top_k_experts"] = json!(size("expert_used_count")?);
        map["moe_intermediate_size"] = json!(size("expert_feed_forward_length")?);
    }
    match map {
        Json::Object(map) => parse_config(&map),
        _ => unreachable!("made an object above"),
    }
}

/// A size of each block: one for all, or a list.
fn each(keys: &Keys, key: &str, layers: usize) -> Result<impl Fn(usize) -> usize + use<>> {
    let name = keys.key(key);
    let list = match keys.metadata.get(&name) {
        Some(Value::Array(_)) => keys.metadata.require(&name, keys.metadata.ints(&name)?)?,
        _ => vec![keys.required_size(key)? as i64; layers],
    };
    let sizes: Vec<usize> = list.iter().filter_map(|size| usize::try_from(*size).ok()).collect();
    if sizes.len() != layers || sizes.contains(&0) {
        let expected = format!("a positive number for each of {layers} blocks");
        return Err(keys.metadata.error(&name, &expected, format!("{} of {}", sizes.len(), list.len())));
    }
    Ok(move |index: usize| sizes[index])
}

/// Which blocks slide.
fn pattern(keys: &Keys, layers: usize) -> Result<Vec<bool>> {
    let key = keys.key("attention.sliding_window_pattern");
    match keys.metadata.get(&key) {
        Some(Value::Array(Array::Bool(slides))) if slides.len() == layers => Ok(slides.clone()),
        _ => Err(keys.metadata.error(&key, &format!("{layers} booleans"), "something else".into())),
    }
}

/// The share of a head's channels that full attention rotates: the first of its factors are 1, the others divide to nothing.
fn rotated_share(metadata: &Metadata, factors: Option<&[f32]>, head_dim: usize) -> Result<f64> {
    let Some(factors) = factors else { return Ok(1.0) };
    let rotated = factors.iter().take_while(|factor| **factor == 1.0).count();
    let rest_is_still = factors[rotated..].iter().all(|factor| *factor >= UNROTATED * 0.5);
    if factors.len() != head_dim / 2 || rotated == 0 || !rest_is_still {
        let expected = format!("{} factors, 1 and then {UNROTATED:e}", head_dim / 2);
        return Err(metadata.error(super::names::ROPE_FACTORS, &expected, "others".into()));
    }
    Ok(rotated as f64 / factors.len() as f64)
}

/// The keys of `config` beside those that all architectures have, some of which these replace.
pub(super) fn keys(config: &ModelConfig) -> Vec<Own> {
    let layers = 0..config.num_hidden_layers;
    let count = |count: usize| Value::Uint(count as u64);
    let list = |of: &dyn Fn(usize) -> usize| {
        Value::Array(Array::Uint(layers.clone().map(|i| of(i) as u64).collect()))
    };
    let slides: Vec<bool> =
        config.layer_attention.iter().map(|layer| layer.sliding_window.is_some()).collect();
    let head_dim = |wanted: bool| {
        let index = slides.iter().position(|slides| *slides == wanted);
        index.map_or(config.head_dim, |index| config.head_dim_of(index))
    };
    let shared = layers.clone().filter(|index| config.key_value_source(*index) != *index).count();
    let mut own = vec![
        ("feed_forward_length", list(&|index| config.width(Channels::Mlp, index))),
        ("attention.head_count", list(&|index| config.layer(index).num_attention_heads)),
        ("attention.head_count_kv", list(&|index| config.layer(index).num_key_value_heads)),
        ("attention.key_length", count(head_dim(false))),
        ("attention.value_length", count(head_dim(false))),
        ("attention.key_length_swa", count(head_dim(true))),
        ("attention.value_length_swa", count(head_dim(true))),
        ("attention.shared_kv_layers", count(shared)),
        ("attention.sliding_window_pattern", Value::Array(Array::Bool(slides.clone()))),
        ("embedding_length_per_layer_input", count(config.per_layer_input.map_or(0, |inputs| inputs.width))),
        ("rope.dimension_count", count(head_dim(false))),
    ];
    if config.logit_softcap.is_none() {
        own.push(("final_logit_softcapping", Value::F32(0.0)));
    }
    if let [_, sliding] = config.rope.as_slice() {
        own.push(("rope.dimension_count_swa", count(sliding.rotated(head_dim(true)))));
    }
    own
}

/// `rope_freqs.weight`: which channels full attention rotates.
pub(super) fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    let full = config.layer_attention.iter().position(|layer| layer.sliding_window.is_none())?;
    let half = config.head_dim_of(full) / 2;
    let RopeConfig { scaling: RopeScaling::Proportional { .. }, partial_rotary_factor, .. } =
        config.rope.first()?
    else {
        return None;
    };
    let rotated = (half as f64 * partial_rotary_factor) as usize;
    Some((0..half).map(|pair| if pair < rotated { 1.0 } else { UNROTATED }).collect())
}
