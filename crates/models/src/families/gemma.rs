//! Gemma 1, 2 and 3, text only: gains `1 + w`, GELU, a scaled embedding; from 2 on norms before and after each branch,
//! windows, capped or scaled scores.

use super::{
    Activation, Family, GgufArchitecture, LinearRole, ModulePath, NormKind, NormPlace, Part, Parts,
    class::{self, ATTENTION_BIAS, Class, GELU_TANH, HeadDim, Keys, LLAMA_KEYS, Multipliers, Rope, Windows},
    linear,
    llama::{BLOCK, LIKE_LLAMA},
    norm,
};
use crate::{
    Result,
    config::{ModelConfig, SpecialTokens},
    hf::{Fields, rope::RopeKeys},
};

const GEMMA2_BLOCK: [Part; 11] = [
    norm("input_layernorm", NormPlace::PreAttention, "attn_norm"),
    linear("self_attn.q_proj", LinearRole::Query, "attn_q"),
    linear("self_attn.k_proj", LinearRole::Key, "attn_k"),
    linear("self_attn.v_proj", LinearRole::Value, "attn_v"),
    linear("self_attn.o_proj", LinearRole::Output, "attn_output"),
    norm("post_attention_layernorm", NormPlace::PostAttention, "post_attention_norm"),
    norm("pre_feedforward_layernorm", NormPlace::PreMlp, "ffn_norm"),
    linear("mlp.gate_proj", LinearRole::Gate, "ffn_gate"),
    linear("mlp.up_proj", LinearRole::Up, "ffn_up"),
    linear("mlp.down_proj", LinearRole::Down, "ffn_down"),
    norm("post_feedforward_layernorm", NormPlace::PostMlp, "post_ffw_norm"),
];

const GEMMA3_BLOCK: [Part; 13] = {
    let [a, b, c, d, e, f, g, h, i, j, k] = GEMMA2_BLOCK;
    let query = norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm");
    let key = norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm");
    [a, b, c, d, e, query, key, f, g, h, i, j, k]
};

/// The name of Gemma 1's activation in its first files, where it means the tanh form too.
const GEMMA_ACTIVATIONS: &[(&str, Activation)] =
    &[GELU_TANH[0], GELU_TANH[1], GELU_TANH[2], ("gelu", Activation::GeluTanh)];

const CLASS: Class = Class {
    head_dim: HeadDim::Default(256),
    max_positions: 8192,
    tied: true,
    activations: GELU_TANH,
    bias_keys: &[ATTENTION_BIAS],
    scales_embedding: true,
    read_more: refuse_encoders,
    ..class::LLAMA
};

const FAMILY: Family = Family {
    norm: NormKind::RmsOnePlus,
    special_tokens: || SpecialTokens { bos: Some(2), eos: vec![1], pad: Some(0) },
    ..LIKE_LLAMA
};

/// Norms stand in GGUF files as the gains that they are.
const fn gguf(name: &'static str) -> Option<GgufArchitecture> {
    Some(GgufArchitecture { name, norms_plus_one: true, ..GgufArchitecture::PLAIN })
}

/// Encoders made of these models see all of a text.
fn refuse_encoders(fields: &Fields<'_>, _: &mut ModelConfig) -> Result<()> {
    fields.refuse_unless("use_bidirectional_attention", false)
}

pub(super) static GEMMA: Family = Family {
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    gguf: gguf("gemma"),
    blocks: &[Parts(&BLOCK)],
    module: ModulePath { root: "Gemma", left_out: "" },
    class: Class {
        key_value_heads: Some(16),
        activations: GEMMA_ACTIVATIONS,
        ignored: &["hidden_activation"],
        ..CLASS
    },
    ..FAMILY
};

const SOFTCAP: Option<(&str, Option<f64>)> = Some(("final_logit_softcapping", None));

pub(super) static GEMMA2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    gguf: gguf("gemma2"),
    blocks: &[Parts(&GEMMA2_BLOCK)],
    module: ModulePath { root: "Gemma2", left_out: "" },
    class: Class {
        keys: GEMMA2_KEYS,
        key_value_heads: Some(4),
        windows: Windows::Pattern { window: Some(4096), period: 2, keys: &[] },
        multipliers: Multipliers {
            query_scalar: Some(("query_pre_attn_scalar", 256.0)),
            logit_softcap: Some(("final_logit_softcapping", Some(30.0))),
            attention_softcap: Some(("attn_logit_softcapping", Some(50.0))),
            ..class::LLAMA.multipliers
        },
        ..CLASS
    },
    ..FAMILY
};

const GEMMA2_KEYS: Keys = Keys { activation: &["hidden_activation", "hidden_act"], ..LLAMA_KEYS };

pub(super) static GEMMA3: Family = Family {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    gguf: gguf("gemma3"),
    blocks: &[Parts(&GEMMA3_BLOCK)],
    module: ModulePath { root: "Gemma3", left_out: "" },
    class: Class {
        keys: GEMMA2_KEYS,
        key_value_heads: Some(4),
        max_positions: 131_072,
        windows: Windows::Pattern {
            window: Some(4096),
            period: 6,
            keys: &["sliding_window_pattern", "_sliding_window_pattern"],
        },
        rope: Rope::ByKind([RopeKeys::based(1e6), RopeKeys::based(1e4)]),
        multipliers: Multipliers {
            query_scalar: Some(("query_pre_attn_scalar", 256.0)),
            logit_softcap: SOFTCAP,
            ..class::LLAMA.multipliers
        },
        // In the configuration, but never used: Gemma 2's.
        ignored: &["attn_logit_softcapping"],
        ..CLASS
    },
    ..FAMILY
};
