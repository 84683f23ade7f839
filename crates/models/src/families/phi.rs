//! Phi-1 to Phi-2: attention and MLP side by side on one layer norm. Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: LLaMA with fused
//! matrices and LongRoPE.

use serde_json::json;

use super::{
    Family, FusedRows, GgufArchitecture, LLAMA_NAMES, LinearRole, Names, NormKind, NormPlace, Part, Parts,
    class::{self, BLOCK as ALL, Class, GELU_TANH, Keys, LLAMA_KEYS, Rope, Windows},
    linear,
    llama::{BLOCK, LIKE_LLAMA},
    plain_norm,
};
use crate::{
    config::{Biases, SpecialTokens},
    export::config_keys::set,
    hf::rope::RopeKeys,
};

const PHI_BLOCK: [Part; 7] = [
    BLOCK[0],
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    linear("self_attn.dense", LinearRole::Output, "attn_output"),
    linear("mlp.fc1", LinearRole::Up, "ffn_up"),
    linear("mlp.fc2", LinearRole::Down, "ffn_down"),
];

/// The same with norms over each query and key head.
const PHI_NORMS_BLOCK: [Part; 9] = {
    let [a, b, c, d, e, f, g] = PHI_BLOCK;
    let query = plain_norm("self_attn.q_layernorm", NormPlace::QueryHead);
    let key = plain_norm("self_attn.k_layernorm", NormPlace::KeyHead);
    [a, b, c, d, e, query, key, f, g]
};

pub(super) static PHI: Family = Family {
    model_type: "phi",
    architecture: "PhiForCausalLM",
    gguf: Some(GgufArchitecture { name: "phi2", parallel_kinds: &[0], ..GgufArchitecture::PLAIN }),
    names: Names { final_norm: "model.final_layernorm", ..LLAMA_NAMES },
    norm: NormKind::Layer,
    blocks: &[Parts(&PHI_BLOCK), Parts(&PHI_NORMS_BLOCK)],
    class: Class {
        keys: Keys { norm_eps: &["layer_norm_eps"], ..LLAMA_KEYS },
        norm_eps: 1e-5,
        activations: GELU_TANH_NEW,
        always: Biases { head: true, ..ALL },
        bias_keys: &[],
        rope: Rope::One(RopeKeys { partial: Some(0.5), ..RopeKeys::DEFAULT }),
        parallel: true,
        only: &[("tie_word_embeddings", false)],
        read_more: |fields, config| {
            if fields.bool("qk_layernorm")?.unwrap_or(false) {
                config.block_kinds = vec![1; config.num_hidden_layers];
            }
            Ok(())
        },
        write_more: |config, map| set(map, [("qk_layernorm", json!(config.block_kinds.contains(&1)))]),
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

const GELU_TANH_NEW: &[(&str, super::Activation)] = &[GELU_TANH[1], GELU_TANH[0], GELU_TANH[2]];

const PHI3_BLOCK: [Part; 6] = [
    BLOCK[0],
    linear("self_attn.qkv_proj", LinearRole::QueryKeyValue(FusedRows::Concatenated), "attn_qkv"),
    BLOCK[4],
    BLOCK[5],
    linear("mlp.gate_up_proj", LinearRole::GateUp, "ffn_up"),
    BLOCK[8],
];

pub(super) static PHI3: Family = Family {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    gguf: GgufArchitecture::plain("phi3"),
    blocks: &[Parts(&PHI3_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![32_000], pad: Some(32_000) },
    class: Class {
        max_positions: 4096,
        norm_eps: 1e-5,
        bias_keys: &[],
        windows: Windows::All(None),
        rope: Rope::One(RopeKeys { partial: Some(1.0), ..RopeKeys::DEFAULT }),
        // Read with the rotary parameters.
        ignored: &["original_max_position_embeddings"],
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};
