//! OPT with pre-norm blocks: all sizes but 350M, whose block is another and which is refused.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, LearnedPositions, LinearRole, ModulePath, Names, NormKind, NormPlace, Part, Widths,
    linear, norm,
};
use crate::{
    Result,
    config::{Biases, LayerAttention, ModelConfig, SpecialTokens},
    export::config_keys::{self, set},
    hf::{
        Fields,
        config::{self, MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH},
    },
};

const BLOCK: [Part; 8] = [
    norm("self_attn_layer_norm", NormPlace::PreAttention, "attn_norm"),
    linear("self_attn.q_proj", LinearRole::Query, "attn_q"),
    linear("self_attn.k_proj", LinearRole::Key, "attn_k"),
    linear("self_attn.v_proj", LinearRole::Value, "attn_v"),
    linear("self_attn.out_proj", LinearRole::Output, "attn_output"),
    norm("final_layer_norm", NormPlace::PreMlp, "ffn_norm"),
    linear("fc1", LinearRole::Up, "ffn_up"),
    linear("fc2", LinearRole::Down, "ffn_down"),
];

/// Epsilon of torch's LayerNorm, which OPT has no key for.
const NORM_EPS: f64 = 1e-5;

pub(super) static OPT: Family = Family {
    model_type: "opt",
    architecture: "OPTForCausalLM",
    names: Names {
        embedding: "model.decoder.embed_tokens",
        positions: Some(LearnedPositions { path: "model.decoder.embed_positions", offset: 2 }),
        blocks: "model.decoder.layers",
        final_norm: "model.decoder.final_layer_norm",
        head: "lm_head",
    },
    norm: NormKind::Layer,
    activation: Activation::Relu,
    block: &BLOCK,
    widths: Widths { heads: "num_attention_heads", key_value_heads: None, channels: "ffn_dim" },
    gguf: None,
    special_tokens: || SpecialTokens { bos: Some(2), eos: vec![2], pad: Some(1) },
    own_biases: all_or_none,
    module: ModulePath { root: "Opt", left_out: "model." },
    read,
    write,
};

/// One key, `enable_bias`, stands for the biases of all linears.
fn all_or_none(biases: Biases) -> Biases {
    let any = biases.qkv || biases.o || biases.mlp;
    Biases { qkv: any, o: any, mlp: any }
}

fn read(fields: &Fields<'_>, family: &'static Family) -> Result<ModelConfig> {
    if !matches!(fields.str("activation_function")?, None | Some("relu")) {
        return Err(fields.unsupported("activation_function", "relu"));
    }
    fields.refuse_unless("do_layer_norm_before", true)?;
    fields.refuse_unless("_remove_final_layer_norm", false)?;
    fields.know(&["prefix"]);
    let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
    fields.refuse_unless("word_embed_proj_dim", hidden_size)?;
    let num_attention_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
    // transformers knows no `head_dim` here; pruned checkpoints of ours do.
    let head_dim = match fields.size("head_dim", MAX_WIDTH)? {
        Some(head_dim) => head_dim,
        None => config::equal_share(fields, hidden_size, num_attention_heads)?,
    };
    let num_hidden_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
    let bias = fields.bool("enable_bias")?.unwrap_or(true);
    let mut config = ModelConfig {
        family,
        vocab_size: fields.required_size("vocab_size", MAX_VOCABULARY)?,
        hidden_size,
        intermediate_size: fields.required_size("ffn_dim", MAX_WIDTH)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim,
        max_position_embeddings: fields.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(2048),
        norm_eps: NORM_EPS,
        norm_affine: fields.bool("layer_norm_elementwise_affine")?.unwrap_or(true),
        rope: Vec::new(),
        layer_attention: vec![LayerAttention { sliding_window: None, rope: None }; num_hidden_layers],
        query_pre_attn_scalar: None,
        embedding_multiplier: 1.0,
        logit_softcap: None,
        biases: Biases { qkv: bias, o: bias, mlp: bias },
        tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(true),
        layer_shapes: Vec::new(),
    };
    config::set_layer_shapes(fields, &mut config)?;
    Ok(config)
}

fn write(config: &ModelConfig, map: &mut Map<String, Value>) {
    set(
        map,
        [
            ("activation_function", json!("relu")),
            ("do_layer_norm_before", json!(true)),
            ("vocab_size", json!(config.vocab_size)),
            ("hidden_size", json!(config.hidden_size)),
            ("word_embed_proj_dim", json!(config.hidden_size)),
            ("ffn_dim", json!(config.intermediate_size)),
            ("num_hidden_layers", json!(config.num_hidden_layers)),
            ("num_attention_heads", json!(config.num_attention_heads)),
            ("max_position_embeddings", json!(config.max_position_embeddings)),
            ("enable_bias", json!(config.biases.o)),
            ("layer_norm_elementwise_affine", json!(config.norm_affine)),
            ("tie_word_embeddings", json!(config.tie_word_embeddings)),
        ],
    );
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        set(map, [("head_dim", json!(config.head_dim))]);
    }
    config_keys::layer_shapes(config, map);
}
