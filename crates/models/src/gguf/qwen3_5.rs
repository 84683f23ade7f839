//! Qwen 3.5's hyperparameters, and the order in which files have the value heads of its delta nets.
//!
//! Source: llama.cpp's model code and conversion script.

use serde_json::{Value as Json, json};

use super::{
    by_block::{Facts, Own},
    config::Keys,
    names::Tiles,
    rope,
    value::{Array, Value},
};
use crate::{
    Result,
    config::{DeltaNetConfig, ModelConfig, RopeScaling},
    hf::{
        config::{MAX_HEADS, MAX_LAYERS, MAX_WIDTH},
        parse_config,
    },
};

/// The key that says which blocks are delta nets.
const RECURRENT: &str = "attention.recurrent_layers";
/// Without it, the last one of so many blocks attends.
const INTERVAL: &str = "full_attention_interval";
/// How many of the blocks, the last ones, predict tokens beyond the next.
pub(super) const PREDICTORS: &str = "nextn_predict_layers";
/// Keys beside those of other architectures.
pub(super) const KNOWN: [&str; 7] = [
    RECURRENT,
    INTERVAL,
    "ssm.conv_kernel",
    "ssm.group_count",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
];

/// The heads of delta nets.
pub(super) fn delta_net(keys: &Keys) -> Result<DeltaNetConfig> {
    let size = |key: &str, most: usize| {
        let found = keys.required_size(key)?;
        if found > most {
            return Err(keys.metadata.error(&keys.key(key), &format!("at most {most}"), found.to_string()));
        }
        Ok(found)
    };
    let key_heads = size("ssm.group_count", MAX_HEADS)?;
    let value_heads = size("ssm.time_step_rank", MAX_HEADS)?;
    let inner = size("ssm.inner_size", MAX_WIDTH)?;
    for (key, found, divisor) in
        [("ssm.time_step_rank", value_heads, key_heads), ("ssm.inner_size", inner, value_heads)]
    {
        if !found.is_multiple_of(divisor) {
            let expected = format!("a multiple of {divisor}");
            return Err(keys.metadata.error(&keys.key(key), &expected, found.to_string()));
        }
    }
    Ok(DeltaNetConfig {
        key_heads,
        value_heads,
        key_dim: size("ssm.state_size", MAX_WIDTH)?,
        value_dim: inner / value_heads,
        convolution: size("ssm.conv_kernel", MAX_WIDTH)?,
    })
}

/// The model's shape.
pub(super) fn config(keys: &Keys, facts: &Facts) -> Result<ModelConfig> {
    let size = |key: &str| keys.required_size(key);
    let number = |key: &str| keys.metadata.require(&keys.key(key), keys.positive(key)?);
    let layers = layers(keys)?;
    let delta = delta_net(keys)?;
    let head_dim = size("attention.key_length")?;
    if keys.size("attention.value_length")?.is_some_and(|width| width != head_dim) {
        let expected = format!("{head_dim}, the width of keys");
        return Err(keys.metadata.unsupported_value(&keys.key("attention.value_length"), &expected));
    }
    if rope::from_keys(keys, size("context_length")?)? != RopeScaling::Default {
        return Err(keys.metadata.unsupported(&keys.key("rope.scaling"), "a scaling", "none"));
    }
    let rotated = keys.size("rope.dimension_count")?.unwrap_or(head_dim);
    if rotated > head_dim {
        let expected = format!("at most {head_dim}, the width of a head");
        return Err(keys.metadata.error(&keys.key("rope.dimension_count"), &expected, rotated.to_string()));
    }
    let recurrent = recurrent(keys, layers)?;
    let kinds = recurrent.iter().map(|recurrent| match recurrent {
        true => "linear_attention",
        false => "full_attention",
    });
    let heads = size("attention.head_count")?;
    let map = json!({
        "model_type": "qwen3_5_text",
        "vocab_size": facts.vocab_size,
        "hidden_size": size("embedding_length")?,
        "intermediate_size": size("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "max_position_embeddings": size("context_length")?,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon")?,
        "attention_bias": facts.biased,
        "layer_types": kinds.collect::<Vec<_>>(),
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.convolution,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": keys.positive("rope.freq_base")?.unwrap_or(10_000.0),
            "partial_rotary_factor": rotated as f64 / head_dim as f64,
        },
        "tie_word_embeddings": facts.tied,
    });
    match map {
        Json::Object(map) => parse_config(&map),
        _ => unreachable!("made an object above"),
    }
}

/// Blocks that predict the next token.
pub(super) fn layers(keys: &Keys) -> Result<usize> {
    let (all, name) = (keys.required_size("block_count")?, keys.key(PREDICTORS));
    let further = keys.metadata.usize(&name)?.unwrap_or(0);
    if further >= all {
        return Err(keys.metadata.error(&name, &format!("fewer than the {all} blocks"), further.to_string()));
    }
    let layers = all - further;
    if layers > MAX_LAYERS {
        let expected = format!("at most {MAX_LAYERS}");
        return Err(keys.metadata.error(&keys.key("block_count"), &expected, layers.to_string()));
    }
    Ok(layers)
}

fn recurrent(keys: &Keys, layers: usize) -> Result<Vec<bool>> {
    let name = keys.key(RECURRENT);
    match keys.metadata.get(&name) {
        None => {
            let interval = keys.size(INTERVAL)?.unwrap_or(4);
            Ok((1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect())
        }
        Some(Value::Array(Array::Bool(recurrent))) if recurrent.len() >= layers => {
            Ok(recurrent[..layers].to_vec())
        }
        Some(_) => {
            Err(keys.metadata.error(&name, &format!("booleans for {layers} blocks"), "something else".into()))
        }
    }
}

/// Whether readers, which take values to be as wide as keys, compute what `config` says.
pub(crate) fn is_readable(config: &ModelConfig) -> bool {
    config.delta_net.is_some_and(|delta| delta.key_dim == delta.value_dim)
}

/// Keys beside those that all architectures have.
pub(super) fn keys(config: &ModelConfig) -> Vec<Own> {
    let count = |count: usize| Value::Uint(count as u64);
    let layers = config.num_hidden_layers;
    let recurrent: Vec<bool> = (0..layers).map(|layer| config.parts(layer).is_recurrent()).collect();
    // Readers ask for the shares of a position's three axes, which are one for text, among rotated pairs.
    let pairs = config.rope.first().map_or(0, |rope| rope.rotated(config.head_dim) / 2) as i64;
    let sections = vec![(pairs + 2) / 3, (pairs + 1) / 3, pairs / 3, 0];
    let mut own = vec![("rope.dimension_sections", Value::Array(Array::Int(sections)))];
    // Older readers know the interval only.
    let interval = recurrent.iter().position(|recurrent| !recurrent).map_or(layers + 1, |first| first + 1);
    if (1..=layers).all(|layer| recurrent[layer - 1] != layer.is_multiple_of(interval)) {
        own.push((INTERVAL, count(interval)));
    }
    own.push((RECURRENT, Value::Array(Array::Bool(recurrent))));
    if let Some(delta) = config.delta_net {
        own.extend([
            ("ssm.conv_kernel", count(delta.convolution)),
            ("ssm.state_size", count(delta.key_dim)),
            ("ssm.group_count", count(delta.key_heads)),
            ("ssm.time_step_rank", count(delta.value_heads)),
            ("ssm.inner_size", count(delta.value_heads * delta.value_dim)),
        ]);
    }
    own
}

/// Rows before those of value heads, and rows of a head.
fn parts(tiles: Tiles, delta: &DeltaNetConfig) -> [usize; 2] {
    match tiles {
        Tiles::Mixed => [2 * delta.key_heads * delta.key_dim, delta.value_dim],
        Tiles::Values => [0, delta.value_dim],
        Tiles::Heads => [0, 1],
    }
}

/// How many rows there are.
pub(super) fn rows(tiles: Tiles, delta: &DeltaNetConfig) -> usize {
    let [before, unit] = parts(tiles, delta);
    before + delta.value_heads * unit
}

/// The checkpoint's row for each row of a file: value heads stand by key heads there, in files one of each key head in turn.
/// `None` if it is the same.
pub(crate) fn tiled(tiles: Tiles, delta: &DeltaNetConfig) -> Option<Vec<usize>> {
    let DeltaNetConfig { key_heads, value_heads, .. } = *delta;
    let per_key = value_heads / key_heads;
    if per_key == 1 {
        return None;
    }
    let [before, unit] = parts(tiles, delta);
    let heads = (0..per_key).flat_map(|of_key| (0..key_heads).map(move |key| key * per_key + of_key));
    let rows = heads.flat_map(|head| before + head * unit..before + (head + 1) * unit);
    Some((0..before).chain(rows).collect())
}
