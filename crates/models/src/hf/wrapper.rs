//! Multimodal checkpoints whose text part is a model of its own: its configuration is an object within theirs, its tensors
//! stand under a prefix.

use serde_json::{Map, Value};

use super::json::Fields;
use crate::Result;

/// A class around a text model.
struct Wrapper {
    architecture: &'static str,
    model_type: &'static str,
    /// The text part's `model_type` where its object has none.
    text: &'static str,
}

const WRAPPERS: [Wrapper; 5] = [
    Wrapper { architecture: "Gemma3ForConditionalGeneration", model_type: "gemma3", text: "gemma3_text" },
    Wrapper { architecture: "Gemma4ForConditionalGeneration", model_type: "gemma4", text: "gemma4_text" },
    Wrapper {
        architecture: "Gemma4UnifiedForConditionalGeneration",
        model_type: "gemma4_unified",
        text: "gemma4_text",
    },
    Wrapper { architecture: "Qwen3_5ForConditionalGeneration", model_type: "qwen3_5", text: "qwen3_5_text" },
    Wrapper { architecture: "Mistral3ForConditionalGeneration", model_type: "mistral3", text: "mistral" },
];

/// Keys outside the text part that hold for it where it doesn't have them itself.
const SHARED: [&str; 6] = [
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "quantization",
    "quantization_config",
    "tie_word_embeddings",
];

/// Prefixes of the text part's tensors, and what they have alone.
const PREFIXES: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// The text part's configuration and the wrapper's class, if `config` is that of a wrapper.
pub(super) fn text_config(
    config: &Fields<'_>,
    object: &Map<String, Value>,
) -> Result<Option<(Map<String, Value>, &'static str)>> {
    let architecture = config.strings("architectures")?.unwrap_or_default().first().copied();
    let model_type = config.str("model_type")?;
    let known = |wrapper: &&Wrapper| match architecture {
        Some(architecture) => wrapper.architecture == architecture,
        None => model_type == Some(wrapper.model_type),
    };
    let Some(wrapper) = WRAPPERS.iter().find(known) else { return Ok(None) };
    let Some(Value::Object(text)) = object.get("text_config") else {
        return Err(
            config.wrong("text_config", &format!("an object, the text part of {}", wrapper.architecture))
        );
    };
    let mut text = text.clone();
    text.remove("architectures");
    text.entry("model_type").or_insert_with(|| wrapper.text.into());
    for key in SHARED {
        if let (None, Some(value)) = (text.get(key), object.get(key)) {
            text.insert(key.into(), value.clone());
        }
    }
    Ok(Some((text, wrapper.architecture)))
}

/// The name that a tensor of the text part has alone; `None` for all others.
pub(super) fn text_name(name: &str) -> Option<String> {
    if name.starts_with("lm_head.") {
        return Some(name.to_owned());
    }
    PREFIXES.iter().find_map(|(prefix, alone)| Some(format!("{alone}{}", name.strip_prefix(prefix)?)))
}
