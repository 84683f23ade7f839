//! Families with layer norms: StarCoder2, StableLM, GPT-2, GPT-NeoX (Pythia), Falcon, BLOOM.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, FusedRows, GgufArchitecture, LLAMA_NAMES, LearnedPositions, LinearRole, ModulePath,
    Names, NormKind, NormPlace, Part, Parts,
    class::{
        self, ATTENTION, BLOCK as ALL, BiasKey, Class, GELU_TANH, HeadDim, Keys, LLAMA_KEYS, MLP, QKV, Rope,
        Windows,
    },
    linear,
    llama::{BLOCK, LIKE_LLAMA},
    norm, plain_norm,
};
use crate::{
    Result,
    config::{AttentionScale, ModelConfig, SpecialTokens},
    export::config_keys::set,
    hf::{Fields, config::MAX_HEADS, rope::RopeKeys},
};

const GELU: &[(&str, Activation)] = &[("gelu", Activation::Gelu), GELU_TANH[0], GELU_TANH[1], GELU_TANH[2]];

/// LLaMA's family with layer norms.
const FAMILY: Family = Family { norm: NormKind::Layer, ..LIKE_LLAMA };

const CLASS: Class = Class { head_dim: HeadDim::Implied, norm_eps: 1e-5, ..class::LLAMA };

const STARCODER2_BLOCK: [Part; 8] = [
    BLOCK[0],
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    BLOCK[4],
    BLOCK[5],
    linear("mlp.c_fc", LinearRole::Up, "ffn_up"),
    linear("mlp.c_proj", LinearRole::Down, "ffn_down"),
];

pub(super) static STARCODER2: Family = Family {
    model_type: "starcoder2",
    architecture: "Starcoder2ForCausalLM",
    gguf: GgufArchitecture::plain("starcoder2"),
    blocks: &[Parts(&STARCODER2_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(50_256), eos: vec![50_256], pad: None },
    class: Class {
        keys: Keys { norm_eps: &["norm_epsilon"], ..LLAMA_KEYS },
        key_value_heads: Some(2),
        max_positions: 4096,
        tied: true,
        activations: GELU_TANH,
        bias_keys: &[BiasKey { key: "use_bias", default: true, covers: ALL }],
        windows: Windows::All(None),
        ..CLASS
    },
    ..FAMILY
};

/// LLaMA's block without a norm of the MLP, which reads the attention's.
const STABLELM_PARALLEL_BLOCK: [Part; 8] =
    [BLOCK[0], BLOCK[1], BLOCK[2], BLOCK[3], BLOCK[4], BLOCK[6], BLOCK[7], BLOCK[8]];

pub(super) static STABLELM: Family = Family {
    model_type: "stablelm",
    architecture: "StableLmForCausalLM",
    aliases: &["StableLMEpochForCausalLM", "stablelm_epoch"],
    gguf: Some(GgufArchitecture { name: "stablelm", parallel_kinds: &[1], ..GgufArchitecture::PLAIN }),
    blocks: &[Parts(&BLOCK), Parts(&STABLELM_PARALLEL_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(0), eos: vec![0], pad: None },
    class: Class {
        keys: Keys { norm_eps: &["layer_norm_eps", "norm_eps"], ..LLAMA_KEYS },
        key_value_heads: Some(32),
        max_positions: 4096,
        bias_keys: &[BiasKey { key: "use_qkv_bias", default: false, covers: QKV }],
        rope: Rope::One(RopeKeys { partial: Some(0.25), ..RopeKeys::DEFAULT }),
        only: &[("qk_layernorm", false)],
        read_more: |fields, config| {
            if fields.bool("use_parallel_residual")?.unwrap_or(false) {
                config.parallel = true;
                config.block_kinds = vec![1; config.num_hidden_layers];
            }
            Ok(())
        },
        write_more: write_parallel,
        ..CLASS
    },
    ..FAMILY
};

fn write_parallel(config: &ModelConfig, map: &mut Map<String, Value>) {
    set(map, [("use_parallel_residual", json!(config.parallel))]);
}

const GPT2_BLOCK: [Part; 6] = [
    norm("ln_1", NormPlace::PreAttention, "attn_norm"),
    linear("attn.c_attn", LinearRole::QueryKeyValue(FusedRows::Concatenated), "attn_qkv"),
    linear("attn.c_proj", LinearRole::Output, "attn_output"),
    norm("ln_2", NormPlace::PreMlp, "ffn_norm"),
    linear("mlp.c_fc", LinearRole::Up, "ffn_up"),
    linear("mlp.c_proj", LinearRole::Down, "ffn_down"),
];

pub(super) static GPT2: Family = Family {
    model_type: "gpt2",
    architecture: "GPT2LMHeadModel",
    gguf: GgufArchitecture::plain("gpt2"),
    names: Names {
        embedding: "transformer.wte",
        positions: Some(LearnedPositions { path: "transformer.wpe", offset: 0 }),
        embedding_norm: None,
        blocks: "transformer.h",
        final_norm: "transformer.ln_f",
        head: "lm_head",
        per_layer: None,
        projections: None,
    },
    blocks: &[Parts(&GPT2_BLOCK)],
    conv1d: true,
    special_tokens: || SpecialTokens { bos: Some(50_256), eos: vec![50_256], pad: None },
    module: ModulePath { root: "Gpt2", left_out: "" },
    class: Class {
        keys: Keys {
            hidden: &["n_embd", "hidden_size"],
            layers: &["n_layer", "num_hidden_layers"],
            heads: &["n_head", "num_attention_heads"],
            key_value_heads: &[],
            channels: &["n_inner"],
            positions: &["n_positions", "max_position_embeddings", "n_ctx"],
            norm_eps: &["layer_norm_epsilon"],
            activation: &["activation_function"],
        },
        four_times: true,
        max_positions: 1024,
        tied: true,
        activations: &[
            GELU_TANH[1],
            GELU_TANH[0],
            GELU_TANH[2],
            ("gelu", Activation::Gelu),
            ("relu", Activation::Relu),
        ],
        always: ALL,
        bias_keys: &[],
        rope: Rope::Never,
        // The scale by the block's number is a table of its own, which no published model has.
        only: &[("scale_attn_by_inverse_layer_idx", false), ("add_cross_attention", false)],
        ignored: &[
            "reorder_and_upcast_attn",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
            "task_specific_params",
        ],
        read_more: |fields, config| {
            if !fields.bool("scale_attn_weights")?.unwrap_or(true) {
                config.attention_scale = AttentionScale::Factor(1.0);
            }
            Ok(())
        },
        write_more: |config, map| {
            set(map, [("scale_attn_weights", json!(config.attention_scale == AttentionScale::HeadDim))]);
        },
        ..CLASS
    },
    ..FAMILY
};

const GPT_NEOX_BLOCK: [Part; 6] = [
    norm("input_layernorm", NormPlace::PreAttention, "attn_norm"),
    linear("attention.query_key_value", LinearRole::QueryKeyValue(FusedRows::Grouped), "attn_qkv"),
    linear("attention.dense", LinearRole::Output, "attn_output"),
    norm("post_attention_layernorm", NormPlace::PreMlp, "ffn_norm"),
    linear("mlp.dense_h_to_4h", LinearRole::Up, "ffn_up"),
    linear("mlp.dense_4h_to_h", LinearRole::Down, "ffn_down"),
];

pub(super) static GPT_NEOX: Family = Family {
    model_type: "gpt_neox",
    architecture: "GPTNeoXForCausalLM",
    gguf: Some(GgufArchitecture { name: "gptneox", parallel_key: true, ..GgufArchitecture::PLAIN }),
    names: Names {
        embedding: "gpt_neox.embed_in",
        blocks: "gpt_neox.layers",
        final_norm: "gpt_neox.final_layer_norm",
        head: "embed_out",
        ..LLAMA_NAMES
    },
    blocks: &[Parts(&GPT_NEOX_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(0), eos: vec![2], pad: None },
    module: ModulePath { root: "GptNeox", left_out: "" },
    class: Class {
        keys: Keys { key_value_heads: &[], norm_eps: &["layer_norm_eps"], ..LLAMA_KEYS },
        activations: GELU,
        always: MLP,
        bias_keys: &[BiasKey { key: "attention_bias", default: true, covers: ATTENTION }],
        rope: Rope::One(RopeKeys { partial: Some(0.25), ..RopeKeys::DEFAULT }),
        read_more: |fields, config| {
            config.parallel = fields.bool("use_parallel_residual")?.unwrap_or(true);
            Ok(())
        },
        write_more: |config, map| {
            write_parallel(config, map);
            // The class's own names for what others call rope_theta and partial_rotary_factor.
            if let Some(rope) = config.rope.first() {
                let (theta, partial) = (json!(rope.theta), json!(rope.partial_rotary_factor));
                set(map, [("rotary_emb_base", theta), ("rotary_pct", partial)]);
            }
        },
        ..CLASS
    },
    ..FAMILY
};

const FALCON_OUTPUT: Part = linear("self_attention.dense", LinearRole::Output, "attn_output");
const FALCON_UP: Part = linear("mlp.dense_h_to_4h", LinearRole::Up, "ffn_up");
const FALCON_DOWN: Part = linear("mlp.dense_4h_to_h", LinearRole::Down, "ffn_down");
const FALCON_INPUT_NORM: Part = norm("input_layernorm", NormPlace::PreAttention, "attn_norm");
const FALCON_MLP_NORM: Part = plain_norm("post_attention_layernorm", NormPlace::PreMlp);

const fn falcon_qkv(rows: FusedRows) -> Part {
    linear("self_attention.query_key_value", LinearRole::QueryKeyValue(rows), "attn_qkv")
}

/// Falcon's blocks by their norms (two of their own side by side, one for both side by side, one after the other) and by
/// the order of the rows of queries, keys and values.
const FALCON_BLOCKS: &[Parts] = &[
    Parts(&[
        norm("ln_attn", NormPlace::PreAttention, "attn_norm_2"),
        falcon_qkv(FusedRows::Grouped),
        FALCON_OUTPUT,
        norm("ln_mlp", NormPlace::PreMlp, "attn_norm"),
        FALCON_UP,
        FALCON_DOWN,
    ]),
    Parts(&[FALCON_INPUT_NORM, falcon_qkv(FusedRows::Grouped), FALCON_OUTPUT, FALCON_UP, FALCON_DOWN]),
    Parts(&[FALCON_INPUT_NORM, falcon_qkv(FusedRows::Concatenated), FALCON_OUTPUT, FALCON_UP, FALCON_DOWN]),
    Parts(&[
        FALCON_INPUT_NORM,
        falcon_qkv(FusedRows::Grouped),
        FALCON_OUTPUT,
        FALCON_MLP_NORM,
        FALCON_UP,
        FALCON_DOWN,
    ]),
    Parts(&[
        FALCON_INPUT_NORM,
        falcon_qkv(FusedRows::Concatenated),
        FALCON_OUTPUT,
        FALCON_MLP_NORM,
        FALCON_UP,
        FALCON_DOWN,
    ]),
];

const TRANSFORMER_NAMES: Names = Names {
    embedding: "transformer.word_embeddings",
    blocks: "transformer.h",
    final_norm: "transformer.ln_f",
    ..LLAMA_NAMES
};

pub(super) static FALCON: Family = Family {
    model_type: "falcon",
    architecture: "FalconForCausalLM",
    aliases: &["RWForCausalLM", "RefinedWeb", "RefinedWebModel"],
    gguf: Some(GgufArchitecture { name: "falcon", parallel_kinds: &[0, 1, 2], ..GgufArchitecture::PLAIN }),
    names: TRANSFORMER_NAMES,
    blocks: FALCON_BLOCKS,
    special_tokens: || SpecialTokens { bos: Some(11), eos: vec![11], pad: None },
    module: ModulePath { root: "Falcon", left_out: "" },
    class: Class {
        keys: Keys {
            layers: &["num_hidden_layers", "n_layer"],
            heads: &["num_attention_heads", "n_head"],
            key_value_heads: &["num_kv_heads", "n_head_kv"],
            channels: &["ffn_hidden_size"],
            norm_eps: &["layer_norm_epsilon"],
            activation: &["activation"],
            ..LLAMA_KEYS
        },
        four_times: true,
        tied: true,
        activations: GELU,
        bias_keys: &[BiasKey { key: "bias", default: false, covers: ALL }],
        read_more: read_falcon,
        write_more: write_falcon,
        ..CLASS
    },
    ..FAMILY
};

fn read_falcon(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    fields.refuse_unless("apply_residual_connection_post_layernorm", false)?;
    let new = fields.bool("new_decoder_architecture")?.unwrap_or(false);
    let multi_query = fields.bool("multi_query")?.unwrap_or(true);
    let parallel = fields.bool("parallel_attn")?.unwrap_or(true);
    let norms = fields.size("num_ln_in_parallel_attn", 2)?.unwrap_or(2);
    let heads = config.num_attention_heads;
    // Key heads are a key of the new form only.
    config.num_key_value_heads = match (new, multi_query) {
        (true, _) => {
            match super::class::first(&["num_kv_heads", "n_head_kv"], |key| fields.size(key, MAX_HEADS))? {
                Some(key_value_heads) if heads.is_multiple_of(key_value_heads) => key_value_heads,
                Some(_) => {
                    return Err(
                        fields.wrong("num_kv_heads", &format!("a divisor of num_attention_heads, {heads}"))
                    );
                }
                None => heads,
            }
        }
        (false, true) => 1,
        (false, false) => heads,
    };
    config.parallel = new || parallel;
    let kind = match (new, parallel, multi_query) {
        (true, ..) if norms == 2 => 0,
        (true, ..) | (false, true, false) => 1,
        (false, true, true) => 2,
        (false, false, false) => 3,
        (false, false, true) => 4,
    };
    if kind != 0 {
        config.block_kinds = vec![kind; config.num_hidden_layers];
    }
    if fields.bool("alibi")?.unwrap_or(false) {
        // The scale is on the sum of score and bias.
        config.alibi = (config.head_dim as f64).powf(-0.5);
        config.rope.clear();
        config.layer_attention.iter_mut().for_each(|layer| layer.rope = None);
    }
    Ok(())
}

fn write_falcon(config: &ModelConfig, map: &mut Map<String, Value>) {
    let kind = config.block_kinds.first().copied().unwrap_or(0);
    let heads = config.num_attention_heads;
    // A model with a kind of block in common with the old form is written in the new one, unless norms stand one after the other.
    let new = kind < 2;
    set(
        map,
        [
            ("new_decoder_architecture", json!(new)),
            ("multi_query", json!(matches!(kind, 2 | 4))),
            ("parallel_attn", json!(config.parallel)),
            ("num_ln_in_parallel_attn", json!(if kind == 0 { 2 } else { 1 })),
            ("num_kv_heads", json!(if new { config.num_key_value_heads } else { heads })),
            ("alibi", json!(config.alibi != 0.0)),
        ],
    );
}

const BLOOM_BLOCK: [Part; 6] = [
    FALCON_INPUT_NORM,
    falcon_qkv(FusedRows::Grouped),
    FALCON_OUTPUT,
    norm("post_attention_layernorm", NormPlace::PreMlp, "ffn_norm"),
    FALCON_UP,
    FALCON_DOWN,
];

pub(super) static BLOOM: Family = Family {
    model_type: "bloom",
    architecture: "BloomForCausalLM",
    gguf: Some(GgufArchitecture { name: "bloom", alibi: true, ..GgufArchitecture::PLAIN }),
    names: Names { embedding_norm: Some("transformer.word_embeddings_layernorm"), ..TRANSFORMER_NAMES },
    blocks: &[Parts(&BLOOM_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: None },
    module: ModulePath { root: "Bloom", left_out: "" },
    class: Class {
        keys: Keys {
            hidden: &["hidden_size", "n_embed"],
            layers: &["n_layer", "num_hidden_layers"],
            heads: &["n_head", "num_attention_heads"],
            key_value_heads: &[],
            // No key of the class, where it is always four times the width; of pruned models.
            channels: &["n_inner"],
            positions: &["seq_length"],
            norm_eps: &["layer_norm_epsilon"],
            activation: &["hidden_act"],
        },
        four_times: true,
        tied: true,
        activations: GELU_TANH,
        always: ALL,
        bias_keys: &[],
        rope: Rope::Never,
        only: &[("apply_residual_connection_post_layernorm", false)],
        ignored: &[
            "slow_but_exact",
            "masked_softmax_fusion",
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "offset_alibi",
            "skip_bias_add",
            "skip_bias_add_qkv",
            "unk_token_id",
        ],
        read_more: |_, config| {
            config.alibi = 1.0;
            Ok(())
        },
        ..CLASS
    },
    ..FAMILY
};
