//! Gemma 3, text only: norms before and after each branch with gains `1 + w`, norms on query and key heads, sliding
//! and full blocks with rotary tables of their own, a scaled embedding.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, LLAMA_NAMES, LLAMA_WIDTHS, LinearRole, ModulePath, NormKind, NormPlace, Part, linear,
    norm,
};
use crate::{
    Result,
    config::{Biases, LayerAttention, ModelConfig, SpecialTokens},
    export::config_keys::{self, set},
    hf::{
        Fields,
        config::{self, Defaults, MAX_LAYERS, MAX_POSITIONS},
        rope,
    },
};

const BLOCK: [Part; 13] = [
    norm("input_layernorm", NormPlace::PreAttention, "attn_norm"),
    linear("self_attn.q_proj", LinearRole::Query, "attn_q"),
    linear("self_attn.k_proj", LinearRole::Key, "attn_k"),
    linear("self_attn.v_proj", LinearRole::Value, "attn_v"),
    linear("self_attn.o_proj", LinearRole::Output, "attn_output"),
    norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
    norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
    norm("post_attention_layernorm", NormPlace::PostAttention, "post_attention_norm"),
    norm("pre_feedforward_layernorm", NormPlace::PreMlp, "ffn_norm"),
    linear("mlp.gate_proj", LinearRole::Gate, "ffn_gate"),
    linear("mlp.up_proj", LinearRole::Up, "ffn_up"),
    linear("mlp.down_proj", LinearRole::Down, "ffn_down"),
    norm("post_feedforward_layernorm", NormPlace::PostMlp, "post_ffw_norm"),
];

/// The rotary table of full blocks.
const FULL: usize = 0;
/// The rotary table of sliding blocks.
const SLIDING: usize = 1;
/// Bases of their frequencies where the file is silent.
const DEFAULT_THETAS: [f64; 2] = [1e6, 1e4];
const DEFAULT_WINDOW: usize = 4096;
/// One block in so many is full, where the file is silent.
const DEFAULT_PATTERN: usize = 6;
/// The scores' scale is this to the power of -1/2, where the file is silent.
const DEFAULT_QUERY_SCALAR: f64 = 256.0;

pub(super) static GEMMA3: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    names: LLAMA_NAMES,
    norm: NormKind::RmsOnePlus,
    activation: Activation::GeluTanhGated,
    block: &BLOCK,
    widths: LLAMA_WIDTHS,
    gguf: None,
    special_tokens: || SpecialTokens { bos: Some(2), eos: vec![1], pad: Some(0) },
    own_biases: attention_only,
    module: ModulePath { root: "Gemma3", left_out: "" },
    read,
    write,
};

/// One key, `attention_bias`, stands for q, k, v and o; the MLP has none.
fn attention_only(biases: Biases) -> Biases {
    Biases { qkv: biases.o, o: biases.o, mlp: false }
}

fn read(fields: &Fields<'_>, family: &'static Family) -> Result<ModelConfig> {
    for key in ["hidden_activation", "hidden_act"] {
        if !matches!(fields.str(key)?, None | Some("gelu_pytorch_tanh" | "gelu_new")) {
            return Err(fields.unsupported(key, "gelu_pytorch_tanh"));
        }
    }
    fields.refuse_unless("use_bidirectional_attention", false)?;
    // In the configuration, but never used: Gemma 2's.
    fields.know(&["attn_logit_softcapping"]);
    let defaults = Defaults {
        head_dim: Some(256),
        key_value_heads: Some(4),
        max_positions: 131_072,
        tied: true,
        norm_eps: 1e-6,
    };
    let mut config = config::sizes(fields, family, &defaults)?;
    config.rope =
        rope::parse_by_layer_type(fields, config.max_position_embeddings, config.head_dim, DEFAULT_THETAS)?;
    let window = match fields.present("sliding_window") {
        true => fields.size("sliding_window", MAX_POSITIONS)?,
        false => Some(DEFAULT_WINDOW),
    };
    config.layer_attention = slides(fields, config.num_hidden_layers)?
        .into_iter()
        .map(|slides| match slides {
            true => LayerAttention { sliding_window: window, rope: Some(SLIDING) },
            false => LayerAttention { sliding_window: None, rope: Some(FULL) },
        })
        .collect();
    let scalar = fields.positive("query_pre_attn_scalar")?.unwrap_or(DEFAULT_QUERY_SCALAR);
    config.query_pre_attn_scalar = Some(scalar);
    config.embedding_multiplier = (config.hidden_size as f64).sqrt();
    config.logit_softcap = fields.positive("final_logit_softcapping")?;
    let bias = fields.bool("attention_bias")?.unwrap_or(false);
    config.biases = Biases { qkv: bias, o: bias, mlp: false };
    config::extension(fields, &mut config)?;
    config::set_layer_shapes(fields, &mut config)?;
    Ok(config)
}

/// Which blocks slide: `layer_types`, else all but each `sliding_window_pattern`-th.
fn slides(fields: &Fields<'_>, layers: usize) -> Result<Vec<bool>> {
    let pattern = match fields.size("sliding_window_pattern", MAX_LAYERS)? {
        Some(pattern) => pattern,
        None => fields.size("_sliding_window_pattern", MAX_LAYERS)?.unwrap_or(DEFAULT_PATTERN),
    };
    let by_pattern = || (1..=layers).map(|layer| !layer.is_multiple_of(pattern)).collect();
    Ok(config::slides(fields, layers)?.unwrap_or_else(by_pattern))
}

fn write(config: &ModelConfig, map: &mut Map<String, Value>) {
    set(map, [("hidden_activation", json!("gelu_pytorch_tanh"))]);
    config_keys::sizes(config, map);
    let tables = ["full_attention", "sliding_attention"].into_iter().zip(&config.rope);
    let tables = tables.map(|(kind, rope)| {
        let (theta, scaling) = config_keys::rope(rope);
        let mut table = match scaling {
            Value::Object(table) => table,
            _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        set(&mut table, [("rope_theta", theta)]);
        (kind.to_owned(), Value::Object(table))
    });
    let window = config.layer_attention.iter().find_map(|layer| layer.sliding_window);
    set(
        map,
        [
            ("rope_parameters", Value::Object(tables.collect())),
            ("sliding_window", json!(window)),
            ("layer_types", config_keys::layer_types(config)),
            ("query_pre_attn_scalar", json!(config.query_pre_attn_scalar)),
            ("final_logit_softcapping", json!(config.logit_softcap)),
            ("attn_logit_softcapping", Value::Null),
            ("attention_bias", json!(config.biases.o)),
            ("use_bidirectional_attention", json!(false)),
        ],
    );
    let factor = (config.hidden_size as f64).sqrt();
    config_keys::extension(config, attention_only(config.biases), factor, map);
    config_keys::layer_shapes(config, map);
}
