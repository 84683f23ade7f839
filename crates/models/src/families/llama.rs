//! LLaMA 1–3, SmolLM2 and the families that differ from it by little: biases, windows, norms on heads, multipliers, an MLP
//! without a gate.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, GgufArchitecture, LLAMA_NAMES, LinearRole, ModulePath, Names, NormKind, NormPlace,
    Part, Parts, RotaryPairs, VectorRole,
    class::{
        self, ATTENTION_BIAS, BLOCK as ALL, BiasKey, Class, HeadDim, Keys, LLAMA_KEYS, MLP_BIAS, Multipliers,
        QKV, Rope, Windows,
    },
    linear, norm, plain_linear, plain_norm, vector,
};
use crate::{
    Error, Result,
    config::{LayerAttention, ModelConfig, QueryTemperature, SpecialTokens},
    export::config_keys::set,
    hf::{
        Fields,
        config::{MAX_LAYERS, MAX_POSITIONS},
        rope::RopeKeys,
    },
};

pub(super) const BLOCK: [Part; 9] = [
    norm("input_layernorm", NormPlace::PreAttention, "attn_norm"),
    linear("self_attn.q_proj", LinearRole::Query, "attn_q"),
    linear("self_attn.k_proj", LinearRole::Key, "attn_k"),
    linear("self_attn.v_proj", LinearRole::Value, "attn_v"),
    linear("self_attn.o_proj", LinearRole::Output, "attn_output"),
    norm("post_attention_layernorm", NormPlace::PreMlp, "ffn_norm"),
    linear("mlp.gate_proj", LinearRole::Gate, "ffn_gate"),
    linear("mlp.up_proj", LinearRole::Up, "ffn_up"),
    linear("mlp.down_proj", LinearRole::Down, "ffn_down"),
];

/// The same with norms over each query and key head.
const QWEN3_BLOCK: [Part; 11] = with_head_norms([
    norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
    norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
]);

/// LLaMA's block with two norms behind the attention's linears.
const fn with_head_norms([query, key]: [Part; 2]) -> [Part; 11] {
    let [a, b, c, d, e, f, g, h, i] = BLOCK;
    [a, b, c, d, e, query, key, f, g, h, i]
}

/// LLaMA's attention with an MLP without a gate.
const ARCEE_BLOCK: [Part; 8] =
    [BLOCK[0], BLOCK[1], BLOCK[2], BLOCK[3], BLOCK[4], BLOCK[5], BLOCK[7], BLOCK[8]];

const APERTUS_BLOCK: [Part; 14] = [
    norm("attention_layernorm", NormPlace::PreAttention, "attn_norm"),
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    BLOCK[4],
    norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
    norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
    norm("feedforward_layernorm", NormPlace::PreMlp, "ffn_norm"),
    BLOCK[7],
    vector("mlp.act_fn.alpha_p", VectorRole::XieluPositive),
    vector("mlp.act_fn.alpha_n", VectorRole::XieluNegative),
    vector("mlp.act_fn.beta", VectorRole::XieluBeta),
    vector("mlp.act_fn.eps", VectorRole::XieluEps),
    BLOCK[8],
];

const NANOCHAT_BLOCK: [Part; 10] = [
    BLOCK[0],
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    BLOCK[4],
    plain_norm("self_attn.q_norm", NormPlace::RotatedQueryHead),
    plain_norm("self_attn.k_norm", NormPlace::RotatedKeyHead),
    BLOCK[5],
    plain_linear("mlp.fc1", LinearRole::Up),
    plain_linear("mlp.fc2", LinearRole::Down),
];

pub(super) const NO_TOKENS: fn() -> SpecialTokens = SpecialTokens::default;

pub(super) const LLAMA_FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    aliases: &["LLaMAForCausalLM"],
    names: LLAMA_NAMES,
    norm: NormKind::Rms,
    blocks: &[Parts(&BLOCK)],
    rotary_pairs: RotaryPairs::Halves,
    turns_back: false,
    norms_values: false,
    conv1d: false,
    gguf: Some(GgufArchitecture { name: "llama", interleaved: true, ..GgufArchitecture::PLAIN }),
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: None },
    module: ModulePath { root: "Llama", left_out: "" },
    class: class::LLAMA,
};

pub(super) static LLAMA: Family = LLAMA_FAMILY;

/// An architecture whose queries and keys stand in GGUF files as LLaMA's.
pub(super) const INTERLEAVED: GgufArchitecture =
    GgufArchitecture { name: "llama", interleaved: true, ..GgufArchitecture::PLAIN };

pub(super) static MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    aliases: &[],
    gguf: Some(GgufArchitecture { windowed: true, ..INTERLEAVED }),
    class: Class {
        bias_keys: &[],
        windows: Windows::All(Some(4096)),
        key_value_heads: Some(8),
        max_positions: 4096 * 32,
        ..class::LLAMA
    },
    ..LLAMA_FAMILY
};

const QWEN2_CLASS: Class = Class {
    always: QKV,
    bias_keys: &[],
    windows: Windows::ByLayer,
    key_value_heads: Some(32),
    max_positions: 32_768,
    ..class::LLAMA
};

pub(super) static QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    aliases: &[],
    gguf: GgufArchitecture::plain("qwen2"),
    special_tokens: NO_TOKENS,
    class: QWEN2_CLASS,
    ..LLAMA_FAMILY
};

pub(super) static QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    aliases: &[],
    blocks: &[Parts(&QWEN3_BLOCK)],
    gguf: GgufArchitecture::plain("qwen3"),
    special_tokens: NO_TOKENS,
    class: Class {
        always: class::NO_BIASES,
        bias_keys: &[ATTENTION_BIAS],
        head_dim: HeadDim::Default(128),
        ..QWEN2_CLASS
    },
    ..LLAMA_FAMILY
};

/// LLaMA's family without what only it has.
pub(super) const LIKE_LLAMA: Family = Family { aliases: &[], gguf: None, ..LLAMA_FAMILY };

pub(super) static SMOLLM3: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    gguf: Some(GgufArchitecture { name: "smollm3", unrotated_period: Some(NO_ROPE_INTERVAL), ..INTERLEAVED }),
    special_tokens: || SpecialTokens { bos: Some(128_000), eos: vec![128_001], pad: Some(128_004) },
    class: Class {
        key_value_heads: Some(4),
        max_positions: 32_768,
        tied: true,
        rope: Rope::One(RopeKeys { theta: 2e6, ..RopeKeys::DEFAULT }),
        read_more: read_smollm3,
        write_more: write_smollm3,
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

/// One block in so many isn't rotated, where the file is silent.
const NO_ROPE_INTERVAL: usize = 4;

/// `no_rope_layers` has a 1 for each block that *is* rotated.
fn read_smollm3(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let layers = config.num_hidden_layers;
    let interval = fields.size("no_rope_layer_interval", MAX_LAYERS)?.unwrap_or(NO_ROPE_INTERVAL);
    let rotated: Vec<bool> = match fields.get("no_rope_layers") {
        None => (1..=layers).map(|layer| !layer.is_multiple_of(interval)).collect(),
        Some(list) => {
            let wrong = || fields.wrong("no_rope_layers", &format!("a list of {layers} numbers, 1 or 0"));
            let list = list.as_array().filter(|list| list.len() == layers).ok_or_else(wrong)?;
            let list: Option<Vec<bool>> = list
                .iter()
                .map(|value| value.as_u64().filter(|value| *value < 2).map(|value| value == 1))
                .collect();
            list.ok_or_else(wrong)?
        }
    };
    let window = match fields.bool("use_sliding_window")?.unwrap_or(false) {
        true => fields.size("sliding_window", MAX_POSITIONS)?,
        false => {
            fields.know(&["sliding_window"]);
            None
        }
    };
    let slides = match crate::hf::config::slides(fields, layers)? {
        Some(slides) => slides,
        None => rotated.iter().map(|rotated| !rotated && window.is_some()).collect(),
    };
    let layers = rotated.into_iter().zip(slides).map(|(rotated, slides)| {
        let sliding_window = match (slides, window) {
            (true, None) => {
                return Err(fields.wrong("sliding_window", "a window, as layer_types asks for one"));
            }
            (slides, window) => window.filter(|_| slides),
        };
        Ok::<_, Error>(LayerAttention { sliding_window, rope: rotated.then_some(0) })
    });
    config.layer_attention = layers.collect::<Result<_>>()?;
    Ok(())
}

fn write_smollm3(config: &ModelConfig, map: &mut Map<String, Value>) {
    let window = config.layer_attention.iter().find_map(|layer| layer.sliding_window);
    let rotated: Vec<u8> =
        config.layer_attention.iter().map(|layer| u8::from(layer.rope.is_some())).collect();
    set(
        map,
        [
            ("no_rope_layers", json!(rotated)),
            ("use_sliding_window", json!(window.is_some())),
            ("sliding_window", json!(window)),
            ("layer_types", crate::export::config_keys::layer_types(config)),
        ],
    );
}

pub(super) static GRANITE: Family = GRANITE_FAMILY;

const GRANITE_FAMILY: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    gguf: Some(GgufArchitecture { name: "granite", ..INTERLEAVED }),
    class: Class { multipliers: Multipliers::GRANITE, ..class::LLAMA },
    ..LIKE_LLAMA
};

const GRANITE_HYBRID_BLOCK: [Part; 8] = [
    BLOCK[0],
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    BLOCK[4],
    BLOCK[5],
    plain_linear("shared_mlp.input_linear", LinearRole::GateUp),
    plain_linear("shared_mlp.output_linear", LinearRole::Down),
];

/// Granite 4 where all layers are attention and none has experts.
pub(super) static GRANITE_HYBRID: Family = Family {
    model_type: "granitemoehybrid",
    architecture: "GraniteMoeHybridForCausalLM",
    blocks: &[Parts(&GRANITE_HYBRID_BLOCK)],
    class: Class {
        keys: Keys { channels: &["shared_intermediate_size"], ..LLAMA_KEYS },
        bias_keys: &[ATTENTION_BIAS],
        ignored: &[
            "intermediate_size",
            "mamba_chunk_size",
            "mamba_conv_bias",
            "mamba_d_conv",
            "mamba_d_head",
            "mamba_d_state",
            "mamba_expand",
            "mamba_n_groups",
            "mamba_n_heads",
            "mamba_proj_bias",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
            "time_step_limit",
        ],
        read_more: read_granite_hybrid,
        write_more: write_granite_hybrid,
        ..GRANITE_FAMILY.class
    },
    ..LIKE_LLAMA
};

fn read_granite_hybrid(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    if fields.get("num_local_experts").and_then(Value::as_u64) != Some(0) {
        return Err(fields.unsupported("num_local_experts", "0, models without experts"));
    }
    let first = match fields.strings("layer_types")? {
        Some(types) => Some(("layer_types", types)),
        None => fields.strings("layers_block_type")?.map(|types| ("layers_block_type", types)),
    };
    let supported = "attention for every layer";
    let Some((key, types)) = first else { return Err(fields.unsupported("layer_types", supported)) };
    if types.len() != config.num_hidden_layers {
        return Err(fields.wrong(key, &format!("a list of {} entries", config.num_hidden_layers)));
    }
    if let Some(other) = types.iter().find(|kind| !matches!(**kind, "attention" | "full_attention")) {
        return Err(Error::Unsupported {
            path: fields.path(),
            field: key.into(),
            found: (*other).into(),
            supported: supported.into(),
        });
    }
    match fields.str("position_embedding_type")? {
        Some("rope") => {}
        None => config.layer_attention.iter_mut().for_each(|layer| layer.rope = None),
        Some(_) => return Err(fields.unsupported("position_embedding_type", "rope or null")),
    }
    Ok(())
}

fn write_granite_hybrid(config: &ModelConfig, map: &mut Map<String, Value>) {
    let rotated = config.layer_attention.iter().any(|layer| layer.rope.is_some());
    // The class divides its inner width by this, though no layer needs it.
    let heads = if (2 * config.hidden_size).is_multiple_of(128) { 128 } else { 1 };
    set(
        map,
        [
            ("intermediate_size", json!(config.intermediate_size)),
            ("layer_types", json!(vec!["attention"; config.num_hidden_layers])),
            ("mamba_n_heads", json!(heads)),
            ("num_experts_per_tok", json!(0)),
            ("num_local_experts", json!(0)),
            ("position_embedding_type", if rotated { json!("rope") } else { Value::Null }),
        ],
    );
}

pub(super) static MINISTRAL: Family = Family {
    model_type: "ministral",
    architecture: "MinistralForCausalLM",
    class: Class {
        bias_keys: &[],
        windows: Windows::All(Some(4096)),
        key_value_heads: Some(8),
        max_positions: 131_072,
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static MINISTRAL3: Family = Family {
    model_type: "ministral3",
    architecture: "Ministral3ForCausalLM",
    gguf: Some(GgufArchitecture { name: "mistral3", temperature: true, ..INTERLEAVED }),
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: Some(11) },
    class: Class {
        bias_keys: &[],
        head_dim: HeadDim::Default(128),
        key_value_heads: Some(8),
        windows: Windows::All(None),
        max_positions: 262_144,
        norm_eps: 1e-5,
        rope: Rope::One(RopeKeys {
            theta: 1e6,
            absent: Some(
                r#"{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
                    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}"#,
            ),
            known: &["llama_4_scaling_beta", "max_position_embeddings"],
            ..RopeKeys::DEFAULT
        }),
        read_more: read_ministral3,
        write_more: write_ministral3,
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

/// What `llama_4_scaling_beta` is where the object with the rotary parameters isn't there.
const TEMPERATURE_BETA: f64 = 0.1;
/// The original length where that object isn't there.
const TEMPERATURE_POSITIONS: usize = 16_384;

fn read_ministral3(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let inner = match fields.object("rope_scaling")? {
        Some(inner) => Some(inner),
        None => fields.object("rope_parameters")?,
    };
    let (beta, original) = match &inner {
        None => (TEMPERATURE_BETA, TEMPERATURE_POSITIONS),
        Some(inner) => {
            let beta = inner.f64("llama_4_scaling_beta")?.unwrap_or(0.0);
            if !(beta.is_finite() && beta >= 0.0) {
                return Err(inner.wrong("llama_4_scaling_beta", "a number of at least 0"));
            }
            let original = inner.size("original_max_position_embeddings", MAX_POSITIONS)?;
            (beta, original.unwrap_or(config.max_position_embeddings))
        }
    };
    if beta != 0.0 {
        config.query_temperature =
            Some(QueryTemperature { beta, original_max_position_embeddings: original });
    }
    Ok(())
}

fn write_ministral3(config: &ModelConfig, map: &mut Map<String, Value>) {
    let beta = config.query_temperature.map_or(0.0, |temperature| temperature.beta);
    let Some(Value::Object(mut table)) = map.remove("rope_parameters") else { return };
    set(&mut table, [("llama_4_scaling_beta", json!(beta))]);
    if let Some(temperature) = config.query_temperature {
        let original = temperature.original_max_position_embeddings;
        set(&mut table, [("original_max_position_embeddings", json!(original))]);
    }
    set(map, [("rope_parameters", Value::Object(table))]);
}

/// LLaMA's, under other names in GGUF files.
const SEED_OSS_BLOCK: [Part; 9] = {
    let [a, b, c, d, e, _, g, h, i] = BLOCK;
    let before_mlp = norm("post_attention_layernorm", NormPlace::PreMlp, "post_attention_norm");
    [a, b, c, d, e, before_mlp, g, h, i]
};

pub(super) static SEED_OSS: Family = Family {
    model_type: "seed_oss",
    architecture: "SeedOssForCausalLM",
    blocks: &[Parts(&SEED_OSS_BLOCK)],
    gguf: GgufArchitecture::plain("seed_oss"),
    special_tokens: || SpecialTokens { bos: Some(0), eos: vec![2], pad: Some(1) },
    class: Class {
        head_dim: HeadDim::Default(128),
        key_value_heads: Some(8),
        max_positions: 524_288,
        bias_keys: &[
            BiasKey { key: "attention_bias", default: true, covers: QKV },
            BiasKey { key: "attention_out_bias", default: false, covers: class::OUTPUT },
            MLP_BIAS,
        ],
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

const HUNYUAN_BLOCK: [Part; 11] = with_head_norms([
    norm("self_attn.query_layernorm", NormPlace::RotatedQueryHead, "attn_q_norm"),
    norm("self_attn.key_layernorm", NormPlace::RotatedKeyHead, "attn_k_norm"),
]);

pub(super) static HUNYUAN: Family = Family {
    model_type: "hunyuan_v1_dense",
    architecture: "HunYuanDenseV1ForCausalLM",
    gguf: GgufArchitecture::plain("hunyuan-dense"),
    blocks: &[Parts(&HUNYUAN_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: Some(0) },
    class: Class {
        norm_eps: 1e-5,
        bias_keys: &[ATTENTION_BIAS],
        only: &[("use_qk_norm", true)],
        ignored: &["eod_token_id", "attention_head_dim"],
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static HELIUM: Family = Family {
    model_type: "helium",
    architecture: "HeliumForCausalLM",
    rotary_pairs: RotaryPairs::Neighbours,
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: Some(3) },
    class: Class {
        head_dim: HeadDim::Default(128),
        key_value_heads: Some(20),
        max_positions: 4096,
        norm_eps: 1e-8,
        bias_keys: &[BiasKey { key: "attention_bias", default: false, covers: QKV }, MLP_BIAS],
        rope: Rope::One(RopeKeys { theta: 1e5, ..RopeKeys::DEFAULT }),
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static ERNIE4_5: Family = Family {
    model_type: "ernie4_5",
    architecture: "Ernie4_5ForCausalLM",
    aliases: &["Ernie4_5_ForCausalLM"],
    gguf: GgufArchitecture::plain("ernie4_5"),
    rotary_pairs: RotaryPairs::Neighbours,
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: Some(0) },
    class: Class {
        head_dim: HeadDim::Default(128),
        key_value_heads: Some(2),
        max_positions: 131_072,
        norm_eps: 1e-5,
        tied: true,
        bias_keys: &[BiasKey { key: "use_bias", default: false, covers: ALL }],
        rope: Rope::One(RopeKeys { theta: 5e5, ..RopeKeys::DEFAULT }),
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static ARCEE: Family = Family {
    model_type: "arcee",
    architecture: "ArceeForCausalLM",
    gguf: Some(GgufArchitecture { name: "arcee", ..INTERLEAVED }),
    blocks: &[Parts(&ARCEE_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(128_000), eos: vec![128_001], pad: None },
    class: Class {
        max_positions: 4096,
        norm_eps: 1e-5,
        activations: &[("relu2", Activation::Relu2)],
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static APERTUS: Family = Family {
    model_type: "apertus",
    architecture: "ApertusForCausalLM",
    gguf: GgufArchitecture::plain("apertus"),
    blocks: &[Parts(&APERTUS_BLOCK)],
    special_tokens: || SpecialTokens { bos: Some(1), eos: vec![2], pad: Some(3) },
    class: Class {
        max_positions: 65_536,
        norm_eps: 1e-5,
        activations: &[("xielu", Activation::Xielu)],
        bias_keys: &[ATTENTION_BIAS],
        rope: Rope::One(RopeKeys {
            theta: 1.2e7,
            absent: Some(
                r#"{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 12000000.0}"#,
            ),
            ..RopeKeys::DEFAULT
        }),
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};

pub(super) static NANOCHAT: Family = Family {
    model_type: "nanochat",
    architecture: "NanoChatForCausalLM",
    names: Names { embedding_norm: Some("model.embed_norm"), ..LLAMA_NAMES },
    blocks: &[Parts(&NANOCHAT_BLOCK)],
    turns_back: true,
    special_tokens: || SpecialTokens { bos: Some(0), eos: vec![1], pad: Some(1) },
    class: Class {
        activations: &[("relu2", Activation::Relu2)],
        bias_keys: &[ATTENTION_BIAS],
        multipliers: Multipliers {
            logit_softcap: Some(("final_logit_softcapping", Some(15.0))),
            ..class::LLAMA.multipliers
        },
        read_more: |_, config| {
            // Norms without weights.
            config.norm_affine = false;
            Ok(())
        },
        ..class::LLAMA
    },
    ..LIKE_LLAMA
};
