//! LLaMA 1–3, SmolLM2 and the families that differ from it in biases, windows and norms on heads: Mistral, Qwen2, Qwen3.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, GgufArchitecture, LLAMA_NAMES, LLAMA_WIDTHS, LinearRole, ModulePath, NormKind,
    NormPlace, Part, linear, norm,
};
use crate::{
    Result,
    config::{Biases, LayerAttention, ModelConfig, SpecialTokens},
    export::config_keys::{self, set},
    hf::{
        Fields,
        config::{self, Defaults, MAX_POSITIONS},
        rope,
    },
};

/// Window where the file is silent (transformers' class default).
const DEFAULT_WINDOW: usize = 4096;

const BLOCK: [Part; 9] = [
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
const QWEN3_BLOCK: [Part; 11] = [
    BLOCK[0],
    BLOCK[1],
    BLOCK[2],
    BLOCK[3],
    BLOCK[4],
    norm("self_attn.q_norm", NormPlace::QueryHead, "attn_q_norm"),
    norm("self_attn.k_norm", NormPlace::KeyHead, "attn_k_norm"),
    BLOCK[5],
    BLOCK[6],
    BLOCK[7],
    BLOCK[8],
];

/// What differs between these families' classes.
struct Class {
    /// Biases on q, k and v without being asked.
    qkv_bias: bool,
    /// Whether there is the key `attention_bias`, for q, k, v and o.
    attention_bias: bool,
    /// Whether there is the key `mlp_bias`.
    mlp_bias: bool,
    windows: Windows,
    /// Width of a head where the file is silent; `None` shares the model's width.
    head_dim: Option<usize>,
    /// Key and value heads where the file is silent; `None` as many as query heads.
    key_value_heads: Option<usize>,
    max_positions: usize,
}

/// Which blocks have a sliding window.
enum Windows {
    /// None.
    Never,
    /// All, if there is one.
    All,
    /// Those that `layer_types` or `max_window_layers` choose.
    ByLayer,
}

const LLAMA_CLASS: Class = Class {
    qkv_bias: false,
    attention_bias: true,
    mlp_bias: true,
    windows: Windows::Never,
    head_dim: None,
    key_value_heads: None,
    max_positions: 2048,
};

const MISTRAL_CLASS: Class = Class {
    qkv_bias: false,
    attention_bias: false,
    mlp_bias: false,
    windows: Windows::All,
    head_dim: None,
    key_value_heads: Some(8),
    max_positions: 4096 * 32,
};

const QWEN2_CLASS: Class = Class {
    qkv_bias: true,
    attention_bias: false,
    mlp_bias: false,
    windows: Windows::ByLayer,
    head_dim: None,
    key_value_heads: Some(32),
    max_positions: 32_768,
};

const QWEN3_CLASS: Class =
    Class { qkv_bias: false, attention_bias: true, head_dim: Some(128), ..QWEN2_CLASS };

const LLAMA_MODULE: ModulePath = ModulePath { root: "Llama", left_out: "" };
const NO_TOKENS: fn() -> SpecialTokens = SpecialTokens::default;
const LLAMA_TOKENS: fn() -> SpecialTokens = || SpecialTokens { bos: Some(1), eos: vec![2], pad: None };

pub(super) static LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    names: LLAMA_NAMES,
    norm: NormKind::Rms,
    activation: Activation::SiluGated,
    block: &BLOCK,
    widths: LLAMA_WIDTHS,
    gguf: Some(GgufArchitecture { name: "llama", interleaved: true, windowed: false }),
    special_tokens: LLAMA_TOKENS,
    own_biases: |biases| LLAMA_CLASS.biases(biases),
    module: LLAMA_MODULE,
    read: |fields, family| read(fields, family, &LLAMA_CLASS),
    write: |config, map| write(config, &LLAMA_CLASS, map),
};

pub(super) static MISTRAL: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    names: LLAMA_NAMES,
    norm: NormKind::Rms,
    activation: Activation::SiluGated,
    block: &BLOCK,
    widths: LLAMA_WIDTHS,
    gguf: Some(GgufArchitecture { name: "llama", interleaved: true, windowed: true }),
    special_tokens: LLAMA_TOKENS,
    own_biases: |biases| MISTRAL_CLASS.biases(biases),
    module: LLAMA_MODULE,
    read: |fields, family| read(fields, family, &MISTRAL_CLASS),
    write: |config, map| write(config, &MISTRAL_CLASS, map),
};

pub(super) static QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    names: LLAMA_NAMES,
    norm: NormKind::Rms,
    activation: Activation::SiluGated,
    block: &BLOCK,
    widths: LLAMA_WIDTHS,
    gguf: Some(GgufArchitecture { name: "qwen2", interleaved: false, windowed: false }),
    special_tokens: NO_TOKENS,
    own_biases: |biases| QWEN2_CLASS.biases(biases),
    module: LLAMA_MODULE,
    read: |fields, family| read(fields, family, &QWEN2_CLASS),
    write: |config, map| write(config, &QWEN2_CLASS, map),
};

pub(super) static QWEN3: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    names: LLAMA_NAMES,
    norm: NormKind::Rms,
    activation: Activation::SiluGated,
    block: &QWEN3_BLOCK,
    widths: LLAMA_WIDTHS,
    gguf: Some(GgufArchitecture { name: "qwen3", interleaved: false, windowed: false }),
    special_tokens: NO_TOKENS,
    own_biases: |biases| QWEN3_CLASS.biases(biases),
    module: LLAMA_MODULE,
    read: |fields, family| read(fields, family, &QWEN3_CLASS),
    write: |config, map| write(config, &QWEN3_CLASS, map),
};

impl Class {
    /// The biases that the class's keys express, `biases` being those wanted.
    fn biases(&self, biases: Biases) -> Biases {
        let attention = self.attention_bias && biases.o;
        Biases { qkv: attention || self.qkv_bias, o: attention, mlp: self.mlp_bias && biases.mlp }
    }
}

fn read(fields: &Fields<'_>, family: &'static Family, class: &Class) -> Result<ModelConfig> {
    if !matches!(fields.str("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(fields.unsupported("hidden_act", "silu"));
    }
    let defaults = Defaults {
        head_dim: class.head_dim,
        key_value_heads: class.key_value_heads,
        max_positions: class.max_positions,
        tied: false,
        norm_eps: 1e-6,
    };
    let attention_bias = class.attention_bias && fields.bool("attention_bias")?.unwrap_or(false);
    let own = Biases {
        qkv: attention_bias || class.qkv_bias,
        o: attention_bias,
        mlp: class.mlp_bias && fields.bool("mlp_bias")?.unwrap_or(false),
    };
    let mut config = config::sizes(fields, family, &defaults)?;
    config.rope = vec![rope::parse(fields, config.max_position_embeddings, config.head_dim)?];
    let windows = windows(fields, &class.windows, config.num_hidden_layers)?;
    let attention = |window| LayerAttention { sliding_window: window, rope: Some(0) };
    config.layer_attention = windows.into_iter().map(attention).collect();
    config.biases = own;
    config::extension(fields, &mut config)?;
    config::set_layer_shapes(fields, &mut config)?;
    Ok(config)
}

/// The window of every block. Mistral has one for all; Qwen2 and Qwen3 choose blocks by `layer_types` or, without it,
/// from `max_window_layers` on; LLaMA's class knows none.
fn windows(fields: &Fields<'_>, windows: &Windows, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = || match fields.present("sliding_window") {
        true => fields.size("sliding_window", MAX_POSITIONS),
        false => Ok(Some(DEFAULT_WINDOW)),
    };
    match windows {
        Windows::Never => Ok(vec![None; layers]),
        Windows::All => Ok(vec![window()?; layers]),
        Windows::ByLayer => {
            fields.know(&["sliding_window"]);
            let used = fields.bool("use_sliding_window")?.unwrap_or(false);
            let window = if used { window()? } else { None };
            let first = match fields.get("max_window_layers").map(|value| value.as_u64()) {
                None => 28,
                Some(Some(first)) => first,
                Some(None) => return Err(fields.wrong("max_window_layers", "a number of layers")),
            };
            match config::slides(fields, layers)? {
                Some(slides) => slides
                    .into_iter()
                    .map(|slides| match (slides, window) {
                        (false, _) => Ok(None),
                        (true, Some(_)) => Ok(window),
                        (true, None) => {
                            Err(fields.wrong("sliding_window", "a window, as layer_types asks for one"))
                        }
                    })
                    .collect(),
                None => Ok((0..layers as u64).map(|layer| window.filter(|_| layer >= first)).collect()),
            }
        }
    }
}

fn write(config: &ModelConfig, class: &Class, map: &mut Map<String, Value>) {
    set(map, [("hidden_act", json!("silu"))]);
    config_keys::sizes(config, map);
    if let Some(rope) = config.rope.first() {
        let (theta, scaling) = config_keys::rope(rope);
        set(map, [("rope_theta", theta), ("rope_scaling", scaling)]);
    }
    let own = class.biases(config.biases);
    if class.attention_bias {
        set(map, [("attention_bias", json!(own.o))]);
    }
    if class.mlp_bias {
        set(map, [("mlp_bias", json!(config.biases.mlp))]);
    }
    let window = config.sliding_windows().into_iter().flatten().next();
    match class.windows {
        Windows::Never => {}
        Windows::All => set(map, [("sliding_window", json!(window))]),
        Windows::ByLayer => set(
            map,
            [
                ("use_sliding_window", json!(window.is_some())),
                ("sliding_window", json!(window)),
                ("layer_types", config_keys::layer_types(config)),
            ],
        ),
    }
    config_keys::extension(config, own, 1.0, map);
    config_keys::layer_shapes(config, map);
}
