//! `config.json` from a model's shape.

use serde_json::{Map, Value, json};

use super::{FloatType, Format};
use crate::{
    Result,
    config::{LayerShape, LlamaConfig, ModelConfig, OptConfig, RopeConfig, RopeScaling, SpecialTokens},
    hf,
};

/// The configuration in the spelling that transformers, mlx-lm and Kiln's own reader understand. It is read back before
/// it is returned, so that no setting gets lost.
pub(super) fn config_json(
    config: &ModelConfig,
    special: &SpecialTokens,
    float: FloatType,
) -> Result<Map<String, Value>> {
    let mut map = Map::new();
    match config {
        ModelConfig::Llama(config) => llama(config, &mut map),
        ModelConfig::Opt(config) => opt(config, &mut map),
    }
    let eos = match special.eos.as_slice() {
        [one] => json!(one),
        [] => Value::Null,
        several => json!(several),
    };
    set(
        &mut map,
        [
            ("bos_token_id", json!(special.bos)),
            ("eos_token_id", eos),
            ("pad_token_id", json!(special.pad)),
            ("torch_dtype", json!(float.name())),
            ("use_cache", json!(true)),
        ],
    );
    let refuse = |found: String| {
        let expected = "a model that Hugging Face's keys describe";
        Format::HuggingFace.refuse("config.json", expected, found)
    };
    match hf::parse_config(&map) {
        Ok(found) if found == *config => Ok(map),
        Ok(_) => Err(refuse(format!("{config:?}"))),
        Err(error) => Err(refuse(error.to_string())),
    }
}

fn set<const N: usize>(map: &mut Map<String, Value>, entries: [(&str, Value); N]) {
    map.extend(entries.map(|(key, value)| (key.to_owned(), value)));
}

/// Architecture, model type, and which biases the architecture has on q, k, v, on o and in the MLP.
struct Family {
    architecture: &'static str,
    model_type: &'static str,
    biases: [bool; 3],
}

impl Family {
    /// The architecture of transformers that computes what `config` says; what its keys can't say of biases, Kiln's
    /// extension does.
    fn of(config: &LlamaConfig) -> Self {
        let window = config.sliding_window.first().copied().flatten();
        let mixed_windows = config.sliding_window.iter().any(|other| *other != window);
        let [qkv, o, mlp] = [config.qkv_bias, config.o_bias, config.mlp_bias];
        let (architecture, model_type, biases) = if config.qk_norm {
            ("Qwen3ForCausalLM", "qwen3", [o, o, false])
        } else if mixed_windows || qkv && !o {
            ("Qwen2ForCausalLM", "qwen2", [true, false, false])
        } else if window.is_some() {
            ("MistralForCausalLM", "mistral", [false; 3])
        } else {
            ("LlamaForCausalLM", "llama", [o, o, mlp])
        };
        Self { architecture, model_type, biases }
    }
}

fn llama(config: &LlamaConfig, map: &mut Map<String, Value>) {
    let family = Family::of(config);
    set(
        map,
        [
            ("architectures", json!([family.architecture])),
            ("model_type", json!(family.model_type)),
            ("hidden_act", json!("silu")),
            ("vocab_size", json!(config.vocab_size)),
            ("hidden_size", json!(config.hidden_size)),
            ("intermediate_size", json!(config.intermediate_size)),
            ("num_hidden_layers", json!(config.num_hidden_layers)),
            ("num_attention_heads", json!(config.num_attention_heads)),
            ("num_key_value_heads", json!(config.num_key_value_heads)),
            ("head_dim", json!(config.head_dim)),
            ("max_position_embeddings", json!(config.max_position_embeddings)),
            ("rms_norm_eps", json!(config.rms_norm_eps)),
            ("tie_word_embeddings", json!(config.tie_word_embeddings)),
        ],
    );
    rope(&config.rope, map);
    if matches!(family.model_type, "llama" | "qwen3") {
        set(map, [("attention_bias", json!(family.biases[0]))]);
    }
    if family.model_type == "llama" {
        set(map, [("mlp_bias", json!(config.mlp_bias))]);
    }
    windows(config, family.model_type, map);
    let biases = [config.qkv_bias, config.o_bias, config.mlp_bias];
    if biases != family.biases {
        set(map, [("kiln", json!({"qkv_bias": biases[0], "o_bias": biases[1], "mlp_bias": biases[2]}))]);
    }
    let global = LlamaConfig { layer_shapes: Vec::new(), ..config.clone() }.layer(0);
    per_layer(&config.layer_shapes, global, "intermediate_size", true, map);
}

fn windows(config: &LlamaConfig, model_type: &str, map: &mut Map<String, Value>) {
    let windows = &config.sliding_window;
    let window = windows.iter().copied().flatten().next();
    match model_type {
        "mistral" => set(map, [("sliding_window", json!(window))]),
        "qwen2" | "qwen3" => {
            let kind = |window: &Option<usize>| match window {
                Some(_) => "sliding_attention",
                None => "full_attention",
            };
            let kinds: Vec<&str> = windows.iter().map(kind).collect();
            set(
                map,
                [
                    ("use_sliding_window", json!(window.is_some())),
                    ("sliding_window", json!(window)),
                    ("layer_types", json!(kinds)),
                ],
            );
        }
        _ => {}
    }
}

fn rope(rope: &RopeConfig, map: &mut Map<String, Value>) {
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
    set(map, [("rope_theta", json!(rope.theta)), ("rope_scaling", scaling)]);
}

fn opt(config: &OptConfig, map: &mut Map<String, Value>) {
    set(
        map,
        [
            ("architectures", json!(["OPTForCausalLM"])),
            ("model_type", json!("opt")),
            ("activation_function", json!("relu")),
            ("do_layer_norm_before", json!(true)),
            ("vocab_size", json!(config.vocab_size)),
            ("hidden_size", json!(config.hidden_size)),
            ("word_embed_proj_dim", json!(config.hidden_size)),
            ("ffn_dim", json!(config.ffn_dim)),
            ("num_hidden_layers", json!(config.num_hidden_layers)),
            ("num_attention_heads", json!(config.num_attention_heads)),
            ("max_position_embeddings", json!(config.max_position_embeddings)),
            ("enable_bias", json!(config.bias)),
            ("layer_norm_elementwise_affine", json!(config.layer_norm_affine)),
            ("tie_word_embeddings", json!(config.tie_word_embeddings)),
        ],
    );
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        set(map, [("head_dim", json!(config.head_dim))]);
    }
    let global = OptConfig { layer_shapes: Vec::new(), ..config.clone() }.layer(0);
    per_layer(&config.layer_shapes, global, "ffn_dim", false, map);
}

/// Widths of the blocks that differ from the model's.
fn per_layer(
    shapes: &[LayerShape],
    global: LayerShape,
    channels: &str,
    has_key_heads: bool,
    map: &mut Map<String, Value>,
) {
    let mut blocks = Map::new();
    for (index, shape) in shapes.iter().enumerate() {
        let mut block = Map::new();
        if shape.num_attention_heads != global.num_attention_heads {
            set(&mut block, [("num_attention_heads", json!(shape.num_attention_heads))]);
        }
        if has_key_heads && shape.num_key_value_heads != global.num_key_value_heads {
            set(&mut block, [("num_key_value_heads", json!(shape.num_key_value_heads))]);
        }
        if shape.intermediate_size != global.intermediate_size {
            set(&mut block, [(channels, json!(shape.intermediate_size))]);
        }
        if !block.is_empty() {
            blocks.insert(index.to_string(), Value::Object(block));
        }
    }
    if !blocks.is_empty() {
        set(map, [("per_layer_config", Value::Object(blocks))]);
    }
}
