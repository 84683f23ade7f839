//! GLM-4 and its predecessor: a fused gate, partial rotary positions of neighbouring channels.

use super::{
    Family, GgufArchitecture, LinearRole, NormPlace, Part, Parts, RotaryPairs,
    class::{self, BiasKey, Class, HeadDim, QKV, Rope},
    linear,
    llama::{BLOCK, LIKE_LLAMA},
    norm,
};
use crate::{config::SpecialTokens, hf::rope::RopeKeys};

const GATE_UP: Part = linear("mlp.gate_up_proj", LinearRole::GateUp, "ffn_up");

const GLM4_BLOCK: [Part; 10] = [
    BLOCK[0],
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    BLOCK[4],
    norm("post_self_attn_layernorm", NormPlace::PostAttention, "post_attention_norm"),
    norm("post_attention_layernorm", NormPlace::PreMlp, "ffn_norm"),
    GATE_UP,
    BLOCK[8],
    norm("post_mlp_layernorm", NormPlace::PostMlp, "post_ffw_norm"),
];

const GLM_BLOCK: [Part; 8] = [BLOCK[0], BLOCK[1], BLOCK[2], BLOCK[3], BLOCK[4], BLOCK[5], GATE_UP, BLOCK[8]];

const FAMILY: Family = Family {
    rotary_pairs: RotaryPairs::Neighbours,
    special_tokens: || SpecialTokens { bos: None, eos: vec![151_329, 151_336, 151_338], pad: Some(151_329) },
    class: Class {
        head_dim: HeadDim::Default(128),
        key_value_heads: Some(2),
        max_positions: 131_072,
        norm_eps: 1.5625e-7,
        bias_keys: &[BiasKey { key: "attention_bias", default: true, covers: QKV }],
        rope: Rope::One(RopeKeys { partial: Some(0.5), ..RopeKeys::DEFAULT }),
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static GLM4: Family = Family {
    model_type: "glm4",
    architecture: "Glm4ForCausalLM",
    gguf: GgufArchitecture::plain("glm4"),
    blocks: &[Parts(&GLM4_BLOCK)],
    ..FAMILY
};

pub(super) static GLM: Family =
    Family { model_type: "glm", architecture: "GlmForCausalLM", blocks: &[Parts(&GLM_BLOCK)], ..FAMILY };
