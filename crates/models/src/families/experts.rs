//! Families whose MLP is a mixture of experts: Mixtral, Qwen 2 and 3 MoE, OLMoE, Granite MoE, gpt-oss.

use serde_json::{Map, Value, json};

use super::{
    ExpertsPart, Family, GgufArchitecture, LinearRole, ModulePath, NormPlace, Part, Parts, StackedExperts,
    VectorRole,
    class::{
        self, ATTENTION, ATTENTION_BIAS, BiasKey, Class, ExpertKeys, HeadDim, MLP, Multipliers, QKV, Rope,
        Windows,
    },
    linear,
    llama::{BLOCK, INTERLEAVED, LIKE_LLAMA, NO_TOKENS},
    norm, plain_norm, vector,
};
use crate::{
    Result,
    config::{ClampedSwiglu, ModelConfig, SpecialTokens},
    export::config_keys::set,
    hf::{
        Fields,
        config::{MAX_LAYERS, MAX_POSITIONS},
        rope::RopeKeys,
    },
};

const fn router(name: &'static str) -> Part {
    linear(name, LinearRole::Router, "ffn_gate_inp")
}

const fn experts(name: &'static str, linears: [&'static str; 3]) -> Part {
    let (module, router) = ("mlp.experts", Some("mlp.gate.weight"));
    Part::Experts(ExpertsPart { name, linears, gguf: STACKS, stacked: None, module, router })
}

/// What experts are stacked in in GGUF files.
const STACKS: [&str; 3] = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];

/// LLaMA's attention and norms.
const ATTENTION_PARTS: [Part; 6] = [BLOCK[0], BLOCK[1], BLOCK[2], BLOCK[3], BLOCK[4], BLOCK[5]];
const ROUTER: Part = router("mlp.gate");
const EXPERTS: Part = experts("mlp.experts", ["gate_proj", "up_proj", "down_proj"]);

const fn with_experts(router: Part, experts: Part) -> [Part; 8] {
    let [a, b, c, d, e, f] = ATTENTION_PARTS;
    [a, b, c, d, e, f, router, experts]
}

const fn with_norms([query, key]: [Part; 2]) -> [Part; 10] {
    let [a, b, c, d, e, f] = ATTENTION_PARTS;
    [a, b, c, d, e, query, key, f, ROUTER, EXPERTS]
}

const fn dense_with_norms([query, key]: [Part; 2]) -> [Part; 11] {
    let [a, b, c, d, e, f] = ATTENTION_PARTS;
    [a, b, c, d, e, query, key, f, BLOCK[6], BLOCK[7], BLOCK[8]]
}

/// How a class spells experts, with transformers' usual keys.
const KEYS: ExpertKeys = ExpertKeys {
    width: "moe_intermediate_size",
    normalise: Some(false),
    sparse_layers: false,
    shared_width: "",
    optional: false,
};

const FAMILY: Family = LIKE_LLAMA;
const CLASS: Class = Class {
    bias_keys: &[],
    ignored: &["output_router_logits", "router_aux_loss_coef", "router_jitter_noise"],
    ..class::LLAMA
};

const MIXTRAL_BLOCK: [Part; 8] =
    with_experts(router("block_sparse_moe.gate"), experts("block_sparse_moe.experts", ["w1", "w3", "w2"]));

pub(super) static MIXTRAL: Family = Family {
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    gguf: Some(INTERLEAVED),
    blocks: &[Parts(&MIXTRAL_BLOCK)],
    class: Class {
        key_value_heads: Some(8),
        max_positions: 131_072,
        norm_eps: 1e-5,
        windows: Windows::All(None),
        rope: Rope::One(RopeKeys { theta: 1e6, ..RopeKeys::DEFAULT }),
        experts: Some(ExpertKeys { width: "intermediate_size", normalise: None, ..KEYS }),
        ..CLASS
    },
    ..FAMILY
};

const QWEN2_MOE_BLOCK: [Part; 12] = {
    let [a, b, c, d, e, f] = ATTENTION_PARTS;
    [
        a,
        b,
        c,
        d,
        e,
        f,
        ROUTER,
        EXPERTS,
        linear("mlp.shared_expert.gate_proj", LinearRole::SharedGate, "ffn_gate_shexp"),
        linear("mlp.shared_expert.up_proj", LinearRole::SharedUp, "ffn_up_shexp"),
        linear("mlp.shared_expert.down_proj", LinearRole::SharedDown, "ffn_down_shexp"),
        linear("mlp.shared_expert_gate", LinearRole::SharedExpertGate, "ffn_gate_inp_shexp"),
    ]
};

pub(super) static QWEN2_MOE: Family = Family {
    model_type: "qwen2_moe",
    architecture: "Qwen2MoeForCausalLM",
    gguf: Some(GgufArchitecture { name: "qwen2moe", normalises: false, ..GgufArchitecture::PLAIN }),
    blocks: &[Parts(&QWEN2_MOE_BLOCK), Parts(&BLOCK)],
    special_tokens: NO_TOKENS,
    class: Class {
        key_value_heads: Some(16),
        max_positions: 32_768,
        bias_keys: &[BiasKey { key: "qkv_bias", default: true, covers: QKV }],
        experts: Some(ExpertKeys {
            sparse_layers: true,
            shared_width: "shared_expert_intermediate_size",
            ..KEYS
        }),
        read_more: read_qwen2_windows,
        write_more: write_qwen_windows,
        ..CLASS
    },
    ..FAMILY
};

/// The window of blocks that slide, if any may.
fn used_window(fields: &Fields<'_>) -> Result<Option<usize>> {
    fields.know(&["sliding_window", "max_window_layers"]);
    match fields.bool("use_sliding_window")?.unwrap_or(false) {
        true => Ok(Some(fields.size("sliding_window", MAX_POSITIONS)?.unwrap_or(4096))),
        false => Ok(None),
    }
}

fn read_qwen2_windows(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let window = used_window(fields)?;
    let first = fields.size("max_window_layers", MAX_LAYERS)?.unwrap_or(28);
    let slides = match crate::hf::config::slides(fields, config.num_hidden_layers)? {
        Some(slides) => slides,
        None => (0..config.num_hidden_layers).map(|layer| layer % 2 == 0 && layer < first).collect(),
    };
    for (layer, slides) in config.layer_attention.iter_mut().zip(slides) {
        layer.sliding_window = window.filter(|_| slides);
    }
    Ok(())
}

fn write_qwen_windows(config: &ModelConfig, map: &mut Map<String, Value>) {
    let window = config.layer_attention.iter().find_map(|layer| layer.sliding_window);
    set(map, [("use_sliding_window", json!(window.is_some())), ("sliding_window", json!(window))]);
    if window.is_some() {
        set(map, [("layer_types", crate::export::config_keys::layer_types(config))]);
    }
}

const QWEN3_NORMS: [Part; 2] = [
    norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
    norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
];
const QWEN3_MOE_BLOCK: [Part; 10] = with_norms(QWEN3_NORMS);
const QWEN3_DENSE_BLOCK: [Part; 11] = dense_with_norms(QWEN3_NORMS);

pub(super) static QWEN3_MOE: Family = Family {
    model_type: "qwen3_moe",
    architecture: "Qwen3MoeForCausalLM",
    gguf: GgufArchitecture::plain("qwen3moe"),
    blocks: &[Parts(&QWEN3_MOE_BLOCK), Parts(&QWEN3_DENSE_BLOCK)],
    special_tokens: NO_TOKENS,
    class: Class {
        key_value_heads: Some(4),
        max_positions: 32_768,
        bias_keys: &[ATTENTION_BIAS],
        experts: Some(ExpertKeys { sparse_layers: true, ..KEYS }),
        read_more: |fields, config| {
            let window = used_window(fields)?;
            config.layer_attention.iter_mut().for_each(|layer| layer.sliding_window = window);
            Ok(())
        },
        write_more: write_qwen_windows,
        ..CLASS
    },
    ..FAMILY
};

const OLMOE_BLOCK: [Part; 10] = with_norms([
    plain_norm("self_attn.q_norm", NormPlace::Queries),
    plain_norm("self_attn.k_norm", NormPlace::Keys),
]);

pub(super) static OLMOE: Family = Family {
    model_type: "olmoe",
    architecture: "OlmoeForCausalLM",
    blocks: &[Parts(&OLMOE_BLOCK)],
    special_tokens: || SpecialTokens { bos: None, eos: vec![50_279], pad: Some(1) },
    class: Class {
        max_positions: 4096,
        norm_eps: 1e-5,
        bias_keys: &[ATTENTION_BIAS],
        experts: Some(ExpertKeys { width: "intermediate_size", ..KEYS }),
        read_more: |fields, config| {
            config.qkv_clip = fields.positive("clip_qkv")?;
            Ok(())
        },
        write_more: |config, map| set(map, [("clip_qkv", json!(config.qkv_clip))]),
        ..CLASS
    },
    ..FAMILY
};

const GRANITEMOE_BLOCK: [Part; 8] = with_experts(
    router("block_sparse_moe.router.layer"),
    Part::Experts(ExpertsPart {
        name: "block_sparse_moe.experts",
        linears: ["gate_proj", "up_proj", "down_proj"],
        gguf: STACKS,
        stacked: Some(StackedExperts {
            tensors: ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"],
            biases: ["", ""],
            interleaved: false,
        }),
        module: "block_sparse_moe.experts",
        router: Some("block_sparse_moe.router.weight"),
    }),
);

pub(super) static GRANITEMOE: Family = Family {
    model_type: "granitemoe",
    architecture: "GraniteMoeForCausalLM",
    gguf: Some(GgufArchitecture { name: "granitemoe", ..INTERLEAVED }),
    blocks: &[Parts(&GRANITEMOE_BLOCK)],
    class: Class {
        bias_keys: &[ATTENTION_BIAS],
        multipliers: Multipliers::GRANITE,
        experts: Some(ExpertKeys { width: "intermediate_size", normalise: None, ..KEYS }),
        ..CLASS
    },
    ..FAMILY
};

const GPT_OSS_BLOCK: [Part; 10] = {
    let [a, b, c, d, e, _] = ATTENTION_PARTS;
    [
        a,
        b,
        c,
        d,
        e,
        vector("self_attn.sinks", VectorRole::Sinks),
        norm("post_attention_layernorm", NormPlace::PreMlp, "post_attention_norm"),
        router("mlp.router"),
        vector("mlp.router.bias", VectorRole::RouterBias),
        Part::Experts(ExpertsPart {
            name: "mlp.experts",
            linears: ["gate_proj", "up_proj", "down_proj"],
            gguf: STACKS,
            stacked: Some(StackedExperts {
                tensors: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                biases: ["mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"],
                interleaved: true,
            }),
            module: "mlp.experts",
            router: Some("mlp.router.weight"),
        }),
    ]
};

pub(super) static GPT_OSS: Family = Family {
    model_type: "gpt_oss",
    architecture: "GptOssForCausalLM",
    gguf: Some(GgufArchitecture { name: "gpt-oss", rounds_yarn: false, ..GgufArchitecture::PLAIN }),
    blocks: &[Parts(&GPT_OSS_BLOCK)],
    special_tokens: NO_TOKENS,
    module: ModulePath { root: "GptOss", left_out: "" },
    class: Class {
        head_dim: HeadDim::Default(64),
        key_value_heads: Some(8),
        max_positions: 131_072,
        norm_eps: 1e-5,
        always: MLP,
        bias_keys: &[BiasKey { key: "attention_bias", default: true, covers: ATTENTION }],
        windows: Windows::Pattern { window: Some(128), period: 2, keys: &[] },
        rope: Rope::One(RopeKeys {
            theta: 1.5e5,
            absent: Some(
                r#"{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
                    "original_max_position_embeddings": 4096}"#,
            ),
            ..RopeKeys::DEFAULT
        }),
        experts: Some(ExpertKeys { width: "intermediate_size", normalise: None, ..KEYS }),
        read_more: |fields, config| {
            fields.know(&["initial_context_length", "swiglu_alpha", "swiglu_limit"]);
            let alpha = fields.positive("swiglu_alpha")?.unwrap_or(1.702);
            let limit = fields.positive("swiglu_limit")?.unwrap_or(7.0);
            if let Some(experts) = &mut config.experts {
                experts.clamped = Some(ClampedSwiglu { alpha, limit });
            }
            Ok(())
        },
        write_more: |config, map| {
            if let Some(clamped) = config.experts.and_then(|experts| experts.clamped) {
                set(map, [("swiglu_alpha", json!(clamped.alpha)), ("swiglu_limit", json!(clamped.limit))]);
            }
        },
        ..CLASS
    },
    ..FAMILY
};
