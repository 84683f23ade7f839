//! `config.json` and `generation_config.json` to [`ModelConfig`], [`SpecialTokens`] and [`Quantization`].

use std::{collections::BTreeSet, path::Path};

use serde_json::{Map, Value};

use super::{
    Quantization, awq, bnb, compressed, fp8, gptq, hqq,
    json::{Fields, MAX_CONFIG_BYTES, read_object},
    mlx, packed, wrapper,
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
pub(crate) const MAX_EXPERTS: usize = 1 << 12;
/// Longest context and window.
pub(crate) const MAX_POSITIONS: usize = 1 << 28;

/// Keys that change nothing in the mathematics: training-time dropout, initialisation, book-keeping.
const IGNORED: &[&str] = &[
    "_attn_implementation",
    "_name_or_path",
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "is_decoder",
    "num_nextn_predict_layers",
    "resid_pdrop",
    "residual_dropout",
    "auto_map",
    "dropout",
    "dtype",
    "init_std",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "layerdrop",
    "num_labels",
    "pretraining_tp",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// How classes of models for sequence classification end, and those of language models.
const CLASSIFIER: &str = "ForSequenceClassification";
const LANGUAGE_MODELS: [&str; 2] = ["ForCausalLM", "LMHeadModel"];

/// What the JSON files of a folder say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FolderConfig {
    pub model: ModelConfig,
    pub special_tokens: SpecialTokens,
    pub quantization: Quantization,
    pub unknown_keys: Vec<String>,
    /// The class that this is the text part of.
    pub text_part_of: Option<&'static str>,
    /// The class, if it is one for sequence classification.
    pub classifier: Option<String>,
    /// What its outputs are called, if the file says so.
    pub labels: Vec<String>,
}

/// The class for sequence classification beside this one of language models.
pub(crate) fn classifier_of(architecture: &str) -> String {
    let stem = LANGUAGE_MODELS.iter().find_map(|suffix| architecture.strip_suffix(suffix));
    format!("{}{CLASSIFIER}", stem.unwrap_or(architecture))
}

/// The values of `id2label` in the order of their numbers; none where a number is missing or a name is no text.
fn labels(fields: &Fields<'_>) -> Vec<String> {
    let names = fields.get("id2label").and_then(Value::as_object);
    let names = names.and_then(|names| {
        let name = |index: usize| Some(names.get(&index.to_string())?.as_str()?.to_owned());
        (0..names.len()).map(name).collect()
    });
    names.unwrap_or_default()
}

/// Reads `config.json`, and `generation_config.json` and `quantize_config.json` where they exist.
pub(super) fn read_folder(folder: &Path) -> Result<FolderConfig> {
    let path = folder.join("config.json");
    let object = read_object(&path, MAX_CONFIG_BYTES)?;
    let outer = Fields::new(&path, "", &object);
    let text = wrapper::text_config(&outer, &object)?;
    let text_part_of = text.as_ref().map(|(_, class)| *class);
    let fields = match &text {
        Some((text, _)) => Fields::new(&path, "text_config.", text),
        None => outer,
    };
    let family = family(&fields)?;
    let mut model = family.class.read(&fields, family)?;
    let class = fields.strings("architectures")?.unwrap_or_default().first().copied();
    let classifier = class.filter(|class| class.ends_with(CLASSIFIER)).map(str::to_owned);
    let labels = classifier.as_ref().map(|_| labels(&fields)).unwrap_or_default();
    // A score head is in the place of the language model's, whether that was the embedding or not.
    model.tie_word_embeddings |= classifier.is_some();
    let mut special_tokens = special_tokens(&fields, (family.special_tokens)())?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        let object = read_object(&generation, MAX_CONFIG_BYTES)?;
        special_tokens = generation_tokens(&Fields::new(&generation, "", &object), special_tokens)?;
    }
    let quantization = quantization(&fields, folder)?;
    fields.know(IGNORED);
    let unknown_keys = fields.unknown();
    Ok(FolderConfig { model, special_tokens, quantization, unknown_keys, text_part_of, classifier, labels })
}

/// The shape that the object of a `config.json` describes.
pub(crate) fn parse(object: &Map<String, Value>) -> Result<ModelConfig> {
    let fields = Fields::new(Path::new("config.json"), "", object);
    let family = family(&fields)?;
    family.class.read(&fields, family)
}

/// The family that `architectures` and `model_type` name; one of them is enough.
fn family(fields: &Fields<'_>) -> Result<&'static Family> {
    let architectures = fields.strings("architectures")?.unwrap_or_default();
    let by_architecture = match architectures.first() {
        None => None,
        Some(&name) => {
            let found = match name.strip_suffix(CLASSIFIER) {
                Some(stem) => {
                    let mut classes = LANGUAGE_MODELS.iter().map(|suffix| format!("{stem}{suffix}"));
                    classes.find_map(|class| Family::by_architecture(&class))
                }
                None => Family::by_architecture(name),
            };
            Some(found.ok_or_else(|| Error::Unsupported {
                path: fields.path(),
                field: "architectures".into(),
                found: name.into(),
                supported: known(name, |family| family.architecture),
            })?)
        }
    };
    let by_type = match fields.str("model_type")? {
        None => None,
        Some(name) => Some(
            Family::by_model_type(name)
                .ok_or_else(|| fields.unsupported("model_type", &known(name, |family| family.model_type)))?,
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

/// All families' names, those most like `name` first and set apart.
fn known(name: &str, of: fn(&Family) -> &'static str) -> String {
    let name = name.to_lowercase();
    let mut names = FAMILIES.map(of);
    names.sort_by_key(|known| distance(&name, &known.to_lowercase()));
    let [nearest, others @ ..] = names.as_slice() else { return String::new() };
    format!("{}; nearest: {nearest}", [&[*nearest][..], others].concat().join(", "))
}

/// Letters to change, add or take away to make one name of another (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    // No name of a family is near as long.
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let a = &a[..a.len().min(100)];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
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
        head: own.head,
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
    let (class, layers) = (config.family.class, config.num_hidden_layers);
    let keys = class.keys;
    let first = |keys: &[&'static str]| keys.first().copied();
    let [heads, key_value_heads, channels] = [keys.heads, keys.key_value_heads, keys.channels].map(first);
    let has_experts = config.experts.is_some();
    let of_experts = class.expert_widths().map(|key| (has_experts && !key.is_empty()).then_some(key));
    let mut shapes: Vec<_> = (0..layers).map(|index| config.layer(index)).collect();
    let mut head_dims: Vec<_> = (0..layers).map(|index| config.head_dim_of(index)).collect();
    let mut seen = BTreeSet::new();
    for index in blocks.keys() {
        // Padded with zeros, where there are ten or more layers.
        let number = index.parse().ok().filter(|i| index.bytes().all(|c| c.is_ascii_digit()) && *i < layers);
        let Some(number) = number.filter(|number: &usize| seen.insert(*number)) else {
            return Err(blocks.wrong(index, &format!("the index of one of {layers} layers as key, once")));
        };
        let (shape, head_dim) = (&mut shapes[number], &mut head_dims[number]);
        let global = *shape;
        let block = blocks.object(index)?.ok_or_else(|| blocks.wrong(index, "an object"))?;
        let width = |key: Option<&str>, max, global| match key {
            Some(key) => Ok(block.size(key, max)?.unwrap_or(global)),
            None => Ok::<_, Error>(global),
        };
        let num_attention_heads = width(heads, MAX_HEADS, global.num_attention_heads)?;
        let as_many = match key_value_heads {
            Some(_) => global.num_key_value_heads,
            None => num_attention_heads,
        };
        *shape = LayerShape {
            num_attention_heads,
            num_key_value_heads: width(key_value_heads, MAX_HEADS, as_many)?,
            intermediate_size: width(channels, MAX_WIDTH, global.intermediate_size)?,
            expert_width: width(of_experts[0], MAX_WIDTH, global.expert_width)?,
            shared_expert_width: width(of_experts[1], MAX_WIDTH, global.shared_expert_width)?,
        };
        let of_heads = class.head_dims.then_some("head_dim");
        *head_dim = width(of_heads, MAX_WIDTH, *head_dim)?;
        let known = [heads, key_value_heads, channels, of_heads].into_iter().chain(of_experts).flatten();
        refuse_unknown(&block, &known.collect::<Vec<_>>().join(", "))?;
        if !shape.num_attention_heads.is_multiple_of(shape.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", shape.num_attention_heads);
            return Err(block.wrong("num_key_value_heads", &expected));
        }
    }
    config.set_layers(shapes);
    config.set_head_dims(head_dims);
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
    const SUPPORTED: &str = "bitsandbytes, gptq, awq, hqq, fp8, compressed-tensors, mxfp4, kiln";
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
        Some("hqq") => {
            hqq::config(&inner);
            Quantization::Hqq
        }
        Some("fp8") => Quantization::Fp8(fp8::config(&inner)?),
        Some("compressed-tensors") => compressed::config(&inner)?,
        Some("kiln") => packed::config(&inner)?,
        // Read to dense, expert by expert: see `hf::experts`.
        Some("mxfp4") => {
            inner.know(&["modules_to_not_convert"]);
            Quantization::None
        }
        // Before quant_method existed.
        None if inner.present("load_in_4bit") => bnb::config(&inner)?,
        _ => return Err(inner.unsupported("quant_method", SUPPORTED)),
    };
    fields.add_unknown(inner.unknown());
    Ok(quantization)
}
