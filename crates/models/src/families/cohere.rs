//! Cohere's Command models: attention and MLP side by side on one layer norm without bias, rotary positions of neighbouring
//! channels, scaled logits.

use super::{
    Family, GgufArchitecture, NormKind, Part, Parts, RotaryPairs,
    class::{self, ATTENTION_BIAS, Class, Keys, LLAMA_KEYS, Multipliers, Rope, Windows},
    llama::{BLOCK, LIKE_LLAMA},
};
use crate::config::SpecialTokens;

const COHERE_BLOCK: [Part; 8] =
    [BLOCK[0], BLOCK[1], BLOCK[2], BLOCK[3], BLOCK[4], BLOCK[6], BLOCK[7], BLOCK[8]];

const CLASS: Class = Class {
    keys: Keys { norm_eps: &["layer_norm_eps"], ..LLAMA_KEYS },
    max_positions: 8192,
    tied: true,
    norm_eps: 1e-5,
    bias_keys: &[ATTENTION_BIAS],
    multipliers: Multipliers { logits: Some(("logit_scale", 0.0625)), ..class::LLAMA.multipliers },
    parallel: true,
    ..class::LLAMA
};

const GGUF: GgufArchitecture =
    GgufArchitecture { parallel_kinds: &[0], always_tied: true, ..GgufArchitecture::PLAIN };

const FAMILY: Family = Family {
    norm: NormKind::LayerGain,
    blocks: &[Parts(&COHERE_BLOCK)],
    rotary_pairs: RotaryPairs::Neighbours,
    special_tokens: || SpecialTokens { bos: Some(5), eos: vec![255_001], pad: Some(0) },
    ..LIKE_LLAMA
};

pub(super) static COHERE2: Family = Family {
    model_type: "cohere2",
    architecture: "Cohere2ForCausalLM",
    gguf: Some(GgufArchitecture { name: "cohere2", ..GGUF }),
    class: Class {
        windows: Windows::Pattern { window: Some(4096), period: 4, keys: &["sliding_window_pattern"] },
        rope: Rope::Sliding { all_without: false },
        ..CLASS
    },
    ..FAMILY
};

pub(super) static COHERE: Family = Family {
    model_type: "cohere",
    architecture: "CohereForCausalLM",
    gguf: Some(GgufArchitecture { name: "command-r", ..GGUF }),
    class: Class { only: &[("use_qk_norm", false)], ..CLASS },
    ..FAMILY
};
