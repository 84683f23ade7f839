//! `config.json` and `generation_config.json` to [`ModelConfig`], [`SpecialTokens`] and [`Quantization`].

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Quantization, awq, bnb, gptq,
    json::{Fields, MAX_CONFIG_BYTES, read_object},
    mlx, packed, rope,
};
use crate::{
    Error, Result,
    config::{LayerShape, LlamaConfig, ModelConfig, OptConfig, SpecialTokens},
};

// No size of a file is believed beyond these: far above every published model, small enough for arithmetic.
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 16;
/// Longest context and window.
pub(super) const MAX_POSITIONS: usize = 1 << 28;

/// Window of Mistral and Qwen2 where the file is silent (transformers' class default).
const DEFAULT_WINDOW: usize = 4096;

/// Keys that change nothing in the mathematics: training-time dropout, initialisation, book-keeping.
const IGNORED: &[&str] = &[
    "_attn_implementation",
    "_name_or_path",
    "activation_dropout",
    "attention_dropout",
    "auto_map",
    "dropout",
    "dtype",
    "init_std",
    "initializer_range",
    "is_llama_config",
    "layerdrop",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// What the JSON files of a folder say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FolderConfig {
    pub model: ModelConfig,
    pub special_tokens: SpecialTokens,
    pub quantization: Quantization,
    pub unknown_keys: Vec<String>,
}

/// Reads `config.json`, and `generation_config.json` and `quantize_config.json` where they exist.
pub(super) fn read_folder(folder: &Path) -> Result<FolderConfig> {
    let path = folder.join("config.json");
    let object = read_object(&path, MAX_CONFIG_BYTES)?;
    let fields = Fields::new(&path, "", &object);
    let family = Family::of(&fields)?;
    let model = model(&fields, family)?;
    let mut special_tokens = special_tokens(&fields, family.special_tokens())?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        let object = read_object(&generation, MAX_CONFIG_BYTES)?;
        special_tokens = generation_tokens(&Fields::new(&generation, "", &object), special_tokens)?;
    }
    let quantization = quantization(&fields, folder)?;
    fields.know(IGNORED);
    Ok(FolderConfig { model, special_tokens, quantization, unknown_keys: fields.unknown() })
}

fn model(fields: &Fields<'_>, family: Family) -> Result<ModelConfig> {
    Ok(match family {
        Family::Opt => ModelConfig::Opt(opt(fields)?),
        _ => ModelConfig::Llama(llama(fields, family)?),
    })
}

/// The shape that the object of a `config.json` describes.
pub(crate) fn parse(object: &Map<String, Value>) -> Result<ModelConfig> {
    let fields = Fields::new(Path::new("config.json"), "", object);
    model(&fields, Family::of(&fields)?)
}

/// The architectures of transformers that Kiln implements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Opt,
}

const FAMILIES: [(&str, &str, Family); 5] = [
    ("LlamaForCausalLM", "llama", Family::Llama),
    ("MistralForCausalLM", "mistral", Family::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Family::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Family::Qwen3),
    ("OPTForCausalLM", "opt", Family::Opt),
];

impl Family {
    fn of(fields: &Fields<'_>) -> Result<Self> {
        let architectures = fields.strings("architectures")?.unwrap_or_default();
        let model_type = fields.str("model_type")?;
        let by_architecture = match architectures.first() {
            None => None,
            Some(&name) => Some(FAMILIES.iter().find(|family| family.0 == name).ok_or_else(|| {
                let names: Vec<_> = FAMILIES.iter().map(|family| family.0).collect();
                Error::Unsupported {
                    path: fields.path(),
                    field: "architectures".into(),
                    found: name.into(),
                    supported: names.join(", "),
                }
            })?),
        };
        let by_type = match model_type {
            None => None,
            Some(name) => Some(FAMILIES.iter().find(|family| family.1 == name).ok_or_else(|| {
                let names: Vec<_> = FAMILIES.iter().map(|family| family.1).collect();
                fields.unsupported("model_type", &names.join(", "))
            })?),
        };
        match (by_architecture, by_type) {
            (Some(architecture), Some(kind)) if architecture != kind => {
                Err(fields.wrong("model_type", &format!("{}, as architectures says", architecture.1)))
            }
            (Some(family), _) | (None, Some(family)) => Ok(family.2),
            (None, None) => Err(fields.wrong("architectures", "the name of an architecture")),
        }
    }

    /// transformers' class defaults, for files that leave the ids out.
    fn special_tokens(self) -> SpecialTokens {
        match self {
            Self::Llama | Self::Mistral => SpecialTokens { bos: Some(1), eos: vec![2], pad: None },
            Self::Qwen2 | Self::Qwen3 => SpecialTokens::default(),
            Self::Opt => SpecialTokens { bos: Some(2), eos: vec![2], pad: Some(1) },
        }
    }

    /// transformers' class default of `max_position_embeddings`.
    fn positions(self) -> usize {
        match self {
            Self::Llama | Self::Opt => 2048,
            Self::Mistral => 4096 * 32,
            Self::Qwen2 | Self::Qwen3 => 32_768,
        }
    }
}

fn llama(fields: &Fields<'_>, family: Family) -> Result<LlamaConfig> {
    if !matches!(fields.str("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(fields.unsupported("hidden_act", "silu"));
    }
    let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
    let num_hidden_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
    let num_attention_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
    let head_dim = head_dim(fields, family, hidden_size, num_attention_heads)?;
    let max_position_embeddings =
        fields.size("max_position_embeddings", MAX_POSITIONS)?.unwrap_or(family.positions());
    let attention_bias = match family {
        Family::Llama | Family::Qwen3 => fields.bool("attention_bias")?.unwrap_or(false),
        _ => false,
    };
    let mlp_bias = family == Family::Llama && fields.bool("mlp_bias")?.unwrap_or(false);
    let [qkv_bias, o_bias, mlp_bias] =
        biases(fields, [attention_bias || family == Family::Qwen2, attention_bias, mlp_bias])?;
    let mut config = LlamaConfig {
        vocab_size: fields.required_size("vocab_size", MAX_VOCABULARY)?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size", MAX_WIDTH)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: key_value_heads(fields, family, num_attention_heads)?,
        head_dim,
        max_position_embeddings,
        rms_norm_eps: epsilon(fields)?,
        rope: rope::parse(fields, max_position_embeddings, head_dim)?,
        sliding_window: sliding_window(fields, family, num_hidden_layers)?,
        qkv_bias,
        o_bias,
        mlp_bias,
        qk_norm: family == Family::Qwen3,
        tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
        layer_shapes: Vec::new(),
    };
    config.set_layers(layer_shapes(fields, num_hidden_layers, config.layer(0), LLAMA_WIDTHS)?);
    Ok(config)
}

/// Kiln's extension `kiln`: biases that the architecture's own keys can't express, as bias compensation of pruned
/// models adds them.
fn biases(fields: &Fields<'_>, own: [bool; 3]) -> Result<[bool; 3]> {
    let Some(kiln) = fields.object("kiln")? else { return Ok(own) };
    let bias = |key: &str, own: bool| Ok::<_, Error>(kiln.bool(key)?.unwrap_or(own));
    let biases = [bias("qkv_bias", own[0])?, bias("o_bias", own[1])?, bias("mlp_bias", own[2])?];
    refuse_unknown(&kiln, "qkv_bias, o_bias, mlp_bias")?;
    Ok(biases)
}

/// Keys of `per_layer_config` for query heads, key and value heads, MLP channels.
const LLAMA_WIDTHS: [Option<&str>; 3] =
    [Some("num_attention_heads"), Some("num_key_value_heads"), Some("intermediate_size")];
const OPT_WIDTHS: [Option<&str>; 3] = [Some("num_attention_heads"), None, Some("ffn_dim")];

/// The widths of each block where some differ: `per_layer_config`, a map from a block's index to the keys that differ
/// there, as transformers 5 spells it. Empty without it.
fn layer_shapes(
    fields: &Fields<'_>,
    layers: usize,
    global: LayerShape,
    [heads, key_value_heads, channels]: [Option<&str>; 3],
) -> Result<Vec<LayerShape>> {
    let Some(blocks) = fields.object("per_layer_config")? else { return Ok(Vec::new()) };
    let mut shapes = vec![global; layers];
    for index in blocks.keys() {
        let shape = index.parse().ok().filter(|i: &usize| i.to_string() == index);
        let Some(shape) = shape.and_then(|i| shapes.get_mut(i)) else {
            return Err(blocks.wrong(index, &format!("the index of one of {layers} layers as key")));
        };
        let block = blocks.object(index)?.ok_or_else(|| blocks.wrong(index, "an object"))?;
        let width = |key: Option<&str>, max, otherwise| match key {
            Some(key) => Ok::<_, Error>(block.size(key, max)?.unwrap_or(otherwise)),
            None => Ok(otherwise),
        };
        shape.num_attention_heads = width(heads, MAX_HEADS, global.num_attention_heads)?;
        shape.num_key_value_heads = match key_value_heads {
            Some(_) => width(key_value_heads, MAX_HEADS, global.num_key_value_heads)?,
            None => shape.num_attention_heads,
        };
        shape.intermediate_size = width(channels, MAX_WIDTH, global.intermediate_size)?;
        let known = [heads, key_value_heads, channels].into_iter().flatten().collect::<Vec<_>>();
        refuse_unknown(&block, &known.join(", "))?;
        if !shape.num_attention_heads.is_multiple_of(shape.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", shape.num_attention_heads);
            return Err(block.wrong("num_key_value_heads", &expected));
        }
    }
    Ok(shapes)
}

/// In objects of our own, what isn't understood is an error.
fn refuse_unknown(fields: &Fields<'_>, supported: &str) -> Result<()> {
    match fields.unknown().first() {
        Some(key) => Err(Error::Unsupported {
            path: fields.path(),
            field: key.clone(),
            found: "this key".into(),
            supported: supported.into(),
        }),
        None => Ok(()),
    }
}

fn epsilon(fields: &Fields<'_>) -> Result<f64> {
    let epsilon = fields.f64("rms_norm_eps")?.unwrap_or(1e-6);
    if (0.0..1.0).contains(&epsilon) {
        Ok(epsilon)
    } else {
        Err(fields.wrong("rms_norm_eps", "a number in 0..1"))
    }
}

/// `head_dim`; where absent 128 for Qwen3 and an equal share of the width for the others.
fn head_dim(fields: &Fields<'_>, family: Family, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match fields.size("head_dim", MAX_WIDTH)? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 => 128,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(
                fields.wrong("num_attention_heads", &format!("a divisor of hidden_size, {hidden_size}"))
            );
        }
    };
    // Rotary positions turn pairs of channels.
    if head_dim.is_multiple_of(2) { Ok(head_dim) } else { Err(fields.wrong("head_dim", "an even number")) }
}

/// `num_key_value_heads`: `null` means as many as query heads, absence means transformers' class default.
fn key_value_heads(fields: &Fields<'_>, family: Family, heads: usize) -> Result<usize> {
    let absent = match family {
        Family::Mistral => 8,
        Family::Qwen2 | Family::Qwen3 => 32,
        Family::Llama | Family::Opt => heads,
    };
    let default = if fields.present("num_key_value_heads") { heads } else { absent };
    let key_value_heads = fields.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(default);
    if heads.is_multiple_of(key_value_heads) {
        Ok(key_value_heads)
    } else {
        Err(fields.wrong("num_key_value_heads", &format!("a divisor of num_attention_heads, {heads}")))
    }
}

/// The window of every block. Mistral has one for all; Qwen2 and Qwen3 choose blocks by `layer_types` or, without it,
/// from `max_window_layers` on; LLaMA's class knows none.
fn sliding_window(fields: &Fields<'_>, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = || match fields.present("sliding_window") {
        true => fields.size("sliding_window", MAX_POSITIONS),
        false => Ok(Some(DEFAULT_WINDOW)),
    };
    match family {
        Family::Llama | Family::Opt => Ok(vec![None; layers]),
        Family::Mistral => Ok(vec![window()?; layers]),
        Family::Qwen2 | Family::Qwen3 => {
            fields.know(&["sliding_window"]);
            let used = fields.bool("use_sliding_window")?.unwrap_or(false);
            let window = if used { window()? } else { None };
            let first = match fields.get("max_window_layers").map(|value| value.as_u64()) {
                None => 28,
                Some(Some(first)) => first,
                Some(None) => return Err(fields.wrong("max_window_layers", "a number of layers")),
            };
            match fields.strings("layer_types")? {
                Some(types) => layer_types(fields, &types, window, layers),
                None => Ok((0..layers as u64).map(|layer| window.filter(|_| layer >= first)).collect()),
            }
        }
    }
}

fn layer_types(
    fields: &Fields<'_>,
    types: &[&str],
    window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>> {
    if types.len() != layers {
        return Err(fields.wrong("layer_types", &format!("a list of {layers} entries")));
    }
    let window_of = |kind: &&str| match *kind {
        "full_attention" => Ok(None),
        "sliding_attention" if window.is_some() => Ok(window),
        "sliding_attention" => Err(fields.wrong("sliding_window", "a window, as layer_types asks for one")),
        other => Err(Error::Unsupported {
            path: fields.path(),
            field: "layer_types".into(),
            found: other.into(),
            supported: "full_attention, sliding_attention".into(),
        }),
    };
    types.iter().map(window_of).collect()
}

fn opt(fields: &Fields<'_>) -> Result<OptConfig> {
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
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            let expected = format!("a divisor of hidden_size, {hidden_size}");
            return Err(fields.wrong("num_attention_heads", &expected));
        }
    };
    let mut config = OptConfig {
        vocab_size: fields.required_size("vocab_size", MAX_VOCABULARY)?,
        hidden_size,
        ffn_dim: fields.required_size("ffn_dim", MAX_WIDTH)?,
        num_hidden_layers: fields.required_size("num_hidden_layers", MAX_LAYERS)?,
        num_attention_heads,
        head_dim,
        max_position_embeddings: fields
            .size("max_position_embeddings", MAX_POSITIONS)?
            .unwrap_or(Family::Opt.positions()),
        bias: fields.bool("enable_bias")?.unwrap_or(true),
        layer_norm_affine: fields.bool("layer_norm_elementwise_affine")?.unwrap_or(true),
        tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(true),
        layer_shapes: Vec::new(),
    };
    config.set_layers(layer_shapes(fields, config.num_hidden_layers, config.layer(0), OPT_WIDTHS)?);
    Ok(config)
}

/// Ids of `config.json`: absent ones by the class's default, `null` and negative ones are none.
fn special_tokens(fields: &Fields<'_>, defaults: SpecialTokens) -> Result<SpecialTokens> {
    let one = |key, default| if fields.present(key) { token_id(fields, key) } else { Ok(default) };
    Ok(SpecialTokens {
        bos: one("bos_token_id", defaults.bos)?,
        pad: one("pad_token_id", defaults.pad)?,
        eos: if fields.present("eos_token_id") { token_ids(fields, "eos_token_id")? } else { defaults.eos },
    })
}

/// Ids of `generation_config.json` go before those of `config.json`.
fn generation_tokens(fields: &Fields<'_>, config: SpecialTokens) -> Result<SpecialTokens> {
    let eos = token_ids(fields, "eos_token_id")?;
    Ok(SpecialTokens {
        bos: token_id(fields, "bos_token_id")?.or(config.bos),
        pad: token_id(fields, "pad_token_id")?.or(config.pad),
        eos: if eos.is_empty() { config.eos } else { eos },
    })
}

fn token_id(fields: &Fields<'_>, key: &str) -> Result<Option<u32>> {
    Ok(token_ids(fields, key)?.first().copied())
}

fn token_ids(fields: &Fields<'_>, key: &str) -> Result<Vec<u32>> {
    let Some(value) = fields.get(key) else { return Ok(Vec::new()) };
    let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let mut ids = Vec::new();
    for value in values {
        match value.as_i64() {
            // Old LLaMA files write -1 for "none".
            Some(..0) => {}
            Some(id) if u32::try_from(id).is_ok() => ids.push(id as u32),
            _ => return Err(fields.wrong(key, "a token id or a list of token ids")),
        }
    }
    Ok(ids)
}

/// `quantization_config`, or else the file `quantize_config.json` of older GPTQ folders.
fn quantization(fields: &Fields<'_>, folder: &Path) -> Result<Quantization> {
    const SUPPORTED: &str = "bitsandbytes, gptq, awq, kiln";
    if let Some(inner) = fields.object("quantization")? {
        // A copy, for other tools.
        fields.know(&["quantization_config"]);
        let config = mlx::config(&inner)?;
        fields.add_unknown(inner.unknown());
        return Ok(Quantization::Mlx(config));
    }
    let Some(inner) = fields.object("quantization_config")? else {
        let path = folder.join("quantize_config.json");
        if !path.exists() {
            return Ok(Quantization::None);
        }
        let object = read_object(&path, MAX_CONFIG_BYTES)?;
        let inner = Fields::new(&path, "", &object);
        inner.refuse_unless("quant_method", "gptq")?;
        let config = gptq::config(&inner)?;
        let unknown = inner.unknown().into_iter().map(|key| format!("quantize_config.json: {key}"));
        fields.add_unknown(unknown);
        return Ok(Quantization::Gptq(config));
    };
    let quantization = match inner.str("quant_method")? {
        Some("bitsandbytes") => bnb::config(&inner)?,
        Some("gptq") => Quantization::Gptq(gptq::config(&inner)?),
        Some("awq") => Quantization::Awq(awq::config(&inner)?),
        Some("kiln") => packed::config(&inner)?,
        // Before quant_method existed.
        None if inner.present("load_in_4bit") => bnb::config(&inner)?,
        _ => return Err(inner.unsupported("quant_method", SUPPORTED)),
    };
    fields.add_unknown(inner.unknown());
    Ok(quantization)
}
