//! `config.json` and `generation_config.json` to [`ModelConfig`], [`SpecialTokens`] and [`Quantization`].

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Quantization, awq, bnb, gptq,
    json::{Fields, MAX_CONFIG_BYTES, read_object},
    mlx, packed,
};
use crate::{
    Error, Result,
    config::{Biases, LayerShape, ModelConfig, SpecialTokens},
    families::{FAMILIES, Family},
};

// No size of a file is believed beyond these: far above every published model, small enough for arithmetic.
pub(crate) const MAX_VOCABULARY: usize = 1 << 24;
pub(crate) const MAX_WIDTH: usize = 1 << 22;
pub(crate) const MAX_LAYERS: usize = 1 << 12;
pub(crate) const MAX_HEADS: usize = 1 << 16;
/// Longest context and window.
pub(crate) const MAX_POSITIONS: usize = 1 << 28;

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
    let family = family(&fields)?;
    let model = (family.read)(&fields, family)?;
    let mut special_tokens = special_tokens(&fields, (family.special_tokens)())?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        let object = read_object(&generation, MAX_CONFIG_BYTES)?;
        special_tokens = generation_tokens(&Fields::new(&generation, "", &object), special_tokens)?;
    }
    let quantization = quantization(&fields, folder)?;
    fields.know(IGNORED);
    Ok(FolderConfig { model, special_tokens, quantization, unknown_keys: fields.unknown() })
}

/// The shape that the object of a `config.json` describes.
pub(crate) fn parse(object: &Map<String, Value>) -> Result<ModelConfig> {
    let fields = Fields::new(Path::new("config.json"), "", object);
    let family = family(&fields)?;
    (family.read)(&fields, family)
}

/// The family that `architectures` and `model_type` name; one of them is enough.
fn family(fields: &Fields<'_>) -> Result<&'static Family> {
    let list = |name: fn(&Family) -> &'static str| FAMILIES.map(name).join(", ");
    let architectures = fields.strings("architectures")?.unwrap_or_default();
    let by_architecture = match architectures.first() {
        None => None,
        Some(&name) => {
            let found = FAMILIES.into_iter().find(|family| family.architecture == name);
            Some(found.ok_or_else(|| Error::Unsupported {
                path: fields.path(),
                field: "architectures".into(),
                found: name.into(),
                supported: list(|family| family.architecture),
            })?)
        }
    };
    let by_type = match fields.str("model_type")? {
        None => None,
        Some(name) => Some(
            Family::by_model_type(name)
                .ok_or_else(|| fields.unsupported("model_type", &list(|family| family.model_type)))?,
        ),
    };
    match (by_architecture, by_type) {
        (Some(architecture), Some(kind)) if architecture != kind => {
            Err(fields.wrong("model_type", &format!("{}, as architectures says", architecture.model_type)))
        }
        (Some(family), _) | (None, Some(family)) => Ok(family),
        (None, None) => Err(fields.wrong("architectures", "the name of an architecture")),
    }
}

/// What a family's class takes where the file is silent.
pub(crate) struct Defaults {
    /// Width of a head; `None` shares the model's width.
    pub head_dim: Option<usize>,
    /// Key and value heads; `None` as many as query heads.
    pub key_value_heads: Option<usize>,
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    pub norm_eps: f64,
}

/// The sizes, with the keys that most families share. No rotary tables, windows and biases yet, nor widths by block.
pub(crate) fn sizes(
    fields: &Fields<'_>,
    family: &'static Family,
    defaults: &Defaults,
) -> Result<ModelConfig> {
    let hidden_size = fields.required_size("hidden_size", MAX_WIDTH)?;
    let num_hidden_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
    let num_attention_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
    let head_dim = match (fields.size("head_dim", MAX_WIDTH)?, defaults.head_dim) {
        (Some(head_dim), _) | (None, Some(head_dim)) => head_dim,
        (None, None) => equal_share(fields, hidden_size, num_attention_heads)?,
    };
    // Rotary positions turn pairs of channels.
    if !head_dim.is_multiple_of(2) {
        return Err(fields.wrong("head_dim", "an even number"));
    }
    Ok(ModelConfig {
        family,
        vocab_size: fields.required_size("vocab_size", MAX_VOCABULARY)?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size", MAX_WIDTH)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: key_value_heads(fields, defaults.key_value_heads, num_attention_heads)?,
        head_dim,
        max_position_embeddings: fields
            .size("max_position_embeddings", MAX_POSITIONS)?
            .unwrap_or(defaults.max_positions),
        norm_eps: epsilon(fields, defaults.norm_eps)?,
        norm_affine: true,
        rope: Vec::new(),
        layer_attention: Vec::new(),
        query_pre_attn_scalar: None,
        embedding_multiplier: 1.0,
        logit_softcap: None,
        biases: Biases::default(),
        tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(defaults.tied),
        layer_shapes: Vec::new(),
    })
}

/// The width of a head that is an equal share of the model's.
pub(crate) fn equal_share(fields: &Fields<'_>, hidden_size: usize, heads: usize) -> Result<usize> {
    if hidden_size.is_multiple_of(heads) {
        return Ok(hidden_size / heads);
    }
    Err(fields.wrong("num_attention_heads", &format!("a divisor of hidden_size, {hidden_size}")))
}

/// Reads Kiln's extension `kiln` over what the family's keys say: biases that they can't express, as bias compensation of
/// pruned models adds them, and the embedding's factor, which Gemma's keys derive from the width before pruning.
pub(crate) fn extension(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let Some(kiln) = fields.object("kiln")? else { return Ok(()) };
    let bias = |key: &str, own: bool| Ok::<_, Error>(kiln.bool(key)?.unwrap_or(own));
    let own = config.biases;
    config.biases = Biases {
        qkv: bias("qkv_bias", own.qkv)?,
        o: bias("o_bias", own.o)?,
        mlp: bias("mlp_bias", own.mlp)?,
    };
    if let Some(factor) = kiln.positive("embedding_multiplier")? {
        config.embedding_multiplier = factor;
    }
    refuse_unknown(&kiln, "qkv_bias, o_bias, mlp_bias, embedding_multiplier")
}

/// Sets the widths of the blocks where some differ: `per_layer_config`, a map from a block's index to the keys that
/// differ there, as transformers 5 spells it.
pub(crate) fn set_layer_shapes(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()> {
    let Some(blocks) = fields.object("per_layer_config")? else { return Ok(()) };
    let (keys, global, layers) = (config.family.widths, config.common_shape(), config.num_hidden_layers);
    let mut shapes = vec![global; layers];
    for index in blocks.keys() {
        let shape = index.parse().ok().filter(|i: &usize| i.to_string() == index);
        let Some(shape) = shape.and_then(|i| shapes.get_mut(i)) else {
            return Err(blocks.wrong(index, &format!("the index of one of {layers} layers as key")));
        };
        let block = blocks.object(index)?.ok_or_else(|| blocks.wrong(index, "an object"))?;
        let num_attention_heads = block.size(keys.heads, MAX_HEADS)?.unwrap_or(global.num_attention_heads);
        *shape = LayerShape {
            num_attention_heads,
            num_key_value_heads: match keys.key_value_heads {
                Some(key) => block.size(key, MAX_HEADS)?.unwrap_or(global.num_key_value_heads),
                None => num_attention_heads,
            },
            intermediate_size: block.size(keys.channels, MAX_WIDTH)?.unwrap_or(global.intermediate_size),
        };
        let known = [Some(keys.heads), keys.key_value_heads, Some(keys.channels)];
        let known = known.into_iter().flatten().collect::<Vec<_>>();
        refuse_unknown(&block, &known.join(", "))?;
        if !shape.num_attention_heads.is_multiple_of(shape.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", shape.num_attention_heads);
            return Err(block.wrong("num_key_value_heads", &expected));
        }
    }
    config.set_layers(shapes);
    Ok(())
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

fn epsilon(fields: &Fields<'_>, default: f64) -> Result<f64> {
    let epsilon = fields.f64("rms_norm_eps")?.unwrap_or(default);
    if (0.0..1.0).contains(&epsilon) {
        Ok(epsilon)
    } else {
        Err(fields.wrong("rms_norm_eps", "a number in 0..1"))
    }
}

/// `num_key_value_heads`: `null` means as many as query heads, absence means transformers' class default.
fn key_value_heads(fields: &Fields<'_>, absent: Option<usize>, heads: usize) -> Result<usize> {
    let default = if fields.present("num_key_value_heads") { heads } else { absent.unwrap_or(heads) };
    let key_value_heads = fields.size("num_key_value_heads", MAX_HEADS)?.unwrap_or(default);
    if heads.is_multiple_of(key_value_heads) {
        Ok(key_value_heads)
    } else {
        Err(fields.wrong("num_key_value_heads", &format!("a divisor of num_attention_heads, {heads}")))
    }
}

/// `layer_types`, if it is there: whether each block has the sliding window.
pub(crate) fn slides(fields: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(types) = fields.strings("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        return Err(fields.wrong("layer_types", &format!("a list of {layers} entries")));
    }
    let slides = types.iter().map(|kind| match *kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(Error::Unsupported {
            path: fields.path(),
            field: "layer_types".into(),
            found: other.into(),
            supported: "full_attention, sliding_attention".into(),
        }),
    });
    slides.collect::<Result<_>>().map(Some)
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
