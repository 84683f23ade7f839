//! Families whose norms stand behind attention and MLP only: OLMo 2 and 3, EXAONE 4.

use super::{
    Family, GgufArchitecture, NormPlace, Part, Parts,
    class::{self, ATTENTION_BIAS, Class, Rope, Windows},
    llama::{BLOCK, LIKE_LLAMA},
    norm,
};
use crate::{config::SpecialTokens, hf::rope::RopeKeys};

const fn block([query, key]: [NormPlace; 2]) -> [Part; 11] {
    [
        BLOCK[1],
        BLOCK[2],
        BLOCK[3],
        BLOCK[4],
        norm("self_attn.q_norm", query, "attn_q_norm"),
        norm("self_attn.k_norm", key, "attn_k_norm"),
        norm("post_attention_layernorm", NormPlace::PostAttention, "post_attention_norm"),
        BLOCK[6],
        BLOCK[7],
        BLOCK[8],
        norm("post_feedforward_layernorm", NormPlace::PostMlp, "post_ffw_norm"),
    ]
}

const OLMO_BLOCK: [Part; 11] = block([NormPlace::Queries, NormPlace::Keys]);
const EXAONE_BLOCK: [Part; 11] = block([NormPlace::QueryHead, NormPlace::KeyHead]);

const CLASS: Class = Class { norm_eps: 1e-5, bias_keys: &[ATTENTION_BIAS], ..class::LLAMA };

const FAMILY: Family = Family {
    blocks: &[Parts(&OLMO_BLOCK)],
    special_tokens: || SpecialTokens { bos: None, eos: vec![50_279], pad: Some(1) },
    ..LIKE_LLAMA
};

pub(super) static OLMO2: Family = Family {
    model_type: "olmo2",
    architecture: "Olmo2ForCausalLM",
    gguf: GgufArchitecture::plain("olmo2"),
    class: CLASS,
    ..FAMILY
};

pub(super) static OLMO3: Family = Family {
    model_type: "olmo3",
    architecture: "Olmo3ForCausalLM",
    gguf: Some(GgufArchitecture { name: "olmo2", windowed: true, ..GgufArchitecture::PLAIN }),
    class: Class {
        windows: Windows::Pattern { window: Some(4096), period: 4, keys: &[] },
        rope: Rope::ByKind([RopeKeys::based(5e5), RopeKeys::based(5e5)]),
        ..CLASS
    },
    ..FAMILY
};

pub(super) static EXAONE4: Family = Family {
    model_type: "exaone4",
    architecture: "Exaone4ForCausalLM",
    gguf: Some(GgufArchitecture { name: "exaone4", slides_with: Some(64), ..GgufArchitecture::PLAIN }),
    blocks: &[Parts(&EXAONE_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(0), eos: vec![2], pad: None },
    class: Class {
        key_value_heads: Some(32),
        bias_keys: &[],
        windows: Windows::Pattern { window: Some(4096), period: 4, keys: &["sliding_window_pattern"] },
        rope: Rope::Sliding { all_without: true },
        ..CLASS
    },
    ..FAMILY
};
