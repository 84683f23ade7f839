//! The keys of `config.json` that families share.

use serde_json::{Map, Value, json};

use crate::config::{Biases, ModelConfig, RopeConfig, RopeScaling};

/// Adds entries.
pub(crate) fn set<const N: usize>(map: &mut Map<String, Value>, entries: [(&str, Value); N]) {
    map.extend(entries.map(|(key, value)| (key.to_owned(), value)));
}

/// The sizes, under the names that most families have.
pub(crate) fn sizes(config: &ModelConfig, map: &mut Map<String, Value>) {
    set(
        map,
        [
            ("vocab_size", json!(config.vocab_size)),
            ("hidden_size", json!(config.hidden_size)),
            ("intermediate_size", json!(config.intermediate_size)),
            ("num_hidden_layers", json!(config.num_hidden_layers)),
            ("num_attention_heads", json!(config.num_attention_heads)),
            ("num_key_value_heads", json!(config.num_key_value_heads)),
            ("head_dim", json!(config.head_dim)),
            ("max_position_embeddings", json!(config.max_position_embeddings)),
            ("rms_norm_eps", json!(config.norm_eps)),
            ("tie_word_embeddings", json!(config.tie_word_embeddings)),
        ],
    );
}

/// Base and scaling of a rotary table; the scaling is an object with its `rope_type`, or null.
pub(crate) fn rope(rope: &RopeConfig) -> (Value, Value) {
    let scaling = match &rope.scaling {
        RopeScaling::Default => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } => json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "attention_factor": attention_factor,
            "truncate": truncate,
        }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    };
    (json!(rope.theta), scaling)
}

/// `layer_types`.
pub(crate) fn layer_types(config: &ModelConfig) -> Value {
    let kinds = config.layer_attention.iter().map(|layer| match layer.sliding_window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    });
    kinds.collect()
}

/// Kiln's extension, where the biases aren't the family's `own` or the embedding's factor isn't its `factor`.
pub(crate) fn extension(config: &ModelConfig, own: Biases, factor: f64, map: &mut Map<String, Value>) {
    let mut kiln = Map::new();
    let Biases { qkv, o, mlp } = config.biases;
    if config.biases != own {
        set(&mut kiln, [("qkv_bias", json!(qkv)), ("o_bias", json!(o)), ("mlp_bias", json!(mlp))]);
    }
    if config.embedding_multiplier != factor {
        set(&mut kiln, [("embedding_multiplier", json!(config.embedding_multiplier))]);
    }
    if !kiln.is_empty() {
        set(map, [("kiln", Value::Object(kiln))]);
    }
}

/// `per_layer_config`: widths of the blocks that differ from the model's.
pub(crate) fn layer_shapes(config: &ModelConfig, map: &mut Map<String, Value>) {
    let (keys, global) = (config.family.widths, config.common_shape());
    let mut blocks = Map::new();
    for (index, shape) in config.layer_shapes.iter().enumerate() {
        let mut block = Map::new();
        let widths = [
            (Some(keys.heads), shape.num_attention_heads, global.num_attention_heads),
            (keys.key_value_heads, shape.num_key_value_heads, global.num_key_value_heads),
            (Some(keys.channels), shape.intermediate_size, global.intermediate_size),
        ];
        for (key, width, usual) in widths {
            if let Some(key) = key
                && width != usual
            {
                set(&mut block, [(key, json!(width))]);
            }
        }
        if !block.is_empty() {
            blocks.insert(index.to_string(), Value::Object(block));
        }
    }
    if !blocks.is_empty() {
        set(map, [("per_layer_config", Value::Object(blocks))]);
    }
}
