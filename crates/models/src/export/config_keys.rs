//! The keys of `config.json` that families share.

use serde_json::{Map, Value, json};

use crate::{
    config::{Biases, ModelConfig, RopeConfig, RopeScaling},
    hf::rope::RopeKeys,
};

/// Adds entries.
pub(crate) fn set<const N: usize>(map: &mut Map<String, Value>, entries: [(&str, Value); N]) {
    map.extend(entries.map(|(key, value)| (key.to_owned(), value)));
}

/// The keys of a rotary table, as transformers before 5 spelt them; as it does now where silence would mean the class's own
/// scaling.
pub(crate) fn rope(rope: &RopeConfig, keys: &RopeKeys, map: &mut Map<String, Value>) {
    match keys.absent {
        Some(_) => set(map, [("rope_parameters", Value::Object(parameters(rope)))]),
        None => set(map, [("rope_theta", json!(rope.theta)), ("rope_scaling", scaling(rope))]),
    }
    if keys.partial.is_some() {
        set(map, [("partial_rotary_factor", json!(rope.partial_rotary_factor))]);
    }
    // Phi-3 reads it here only.
    if let RopeScaling::LongRope { original_max_position_embeddings, .. } = rope.scaling {
        set(map, [("original_max_position_embeddings", json!(original_max_position_embeddings))]);
    }
}

/// `rope_parameters` of a table for full and one for sliding blocks.
pub(crate) fn rope_by_layer_type(tables: &[RopeConfig], map: &mut Map<String, Value>) {
    let tables = ["full_attention", "sliding_attention"].into_iter().zip(tables);
    let tables = tables.map(|(kind, rope)| (kind.to_owned(), Value::Object(parameters(rope))));
    let tables = Value::Object(tables.collect());
    set(map, [("rope_parameters", tables)]);
}

/// A table as transformers 5 spells it: type, theta and all else in one object.
fn parameters(rope: &RopeConfig) -> Map<String, Value> {
    let mut table = match scaling(rope) {
        Value::Object(table) => table,
        _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
    };
    set(&mut table, [("rope_theta", json!(rope.theta))]);
    if let RopeScaling::Proportional { .. } = rope.scaling {
        set(&mut table, [("partial_rotary_factor", json!(rope.partial_rotary_factor))]);
    }
    table
}

/// An object with its `rope_type`, or null.
fn scaling(rope: &RopeConfig) -> Value {
    match &rope.scaling {
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
        RopeScaling::Proportional { factor: 1.0 } => json!({"rope_type": "proportional"}),
        RopeScaling::Proportional { factor } => json!({"rope_type": "proportional", "factor": factor}),
        RopeScaling::Alpha { alpha } => json!({"rope_type": "dynamic", "alpha": alpha, "factor": 1.0}),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings,
            attention_factor,
        } => json!({
            "rope_type": "longrope",
            "short_factor": short_factor,
            "long_factor": long_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
            "attention_factor": attention_factor,
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
    }
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
    let Biases { qkv, o, mlp, .. } = config.biases;
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
    let (keys, global) = (config.family.class.keys, config.common_shape());
    let [expert, shared] = config.family.class.expert_widths();
    let mut blocks = Map::new();
    for index in 0..config.num_hidden_layers {
        let (shape, mut block) = (config.layer(index), Map::new());
        let widths = [
            (&["head_dim"][..], config.head_dim_of(index), config.head_dim),
            (keys.heads, shape.num_attention_heads, global.num_attention_heads),
            (keys.key_value_heads, shape.num_key_value_heads, global.num_key_value_heads),
            (keys.channels, shape.intermediate_size, global.intermediate_size),
            (&[expert][..], shape.expert_width, global.expert_width),
            (&[shared][..], shape.shared_expert_width, global.shared_expert_width),
        ];
        for (keys, width, usual) in widths {
            if let Some(key) = keys.first()
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
