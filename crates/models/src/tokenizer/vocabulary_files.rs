//! `vocab.json` and `merges.txt`: byte-level BPE, in the way of the class that `tokenizer_config.json` names.

use std::path::Path;

use crate::{
    Error, Result,
    gguf::{Array, Metadata, Value, build_tokenizer},
};

/// The end of a text in both classes.
pub(super) const END: &str = "<|endoftext|>";
/// Longest of the files.
const MAX_BYTES: u64 = 64 << 20;
/// Ids for each token of the file, and beside them: unused ones take memory too.
const MAX_IDS: [usize; 2] = [4, 1 << 12];

/// The way in which a class splits words, in GGUF's terms; without a class that of GPT-2, whose files these are.
fn words(class: Option<&str>) -> Option<&'static str> {
    match class.map(|class| class.trim_end_matches("Fast")) {
        None | Some("GPT2Tokenizer") => Some("gpt-2"),
        Some("Qwen2Tokenizer") => Some("qwen2"),
        _ => None,
    }
}

/// The tokenizer of a folder's files; `None` if it doesn't have both.
pub(super) fn read(folder: &Path, class: Option<&str>) -> Result<Option<tokenizers::Tokenizer>> {
    let [vocabulary, merges] = ["vocab.json", "merges.txt"].map(|name| folder.join(name));
    if !(vocabulary.exists() && merges.exists()) {
        return Ok(None);
    }
    let Some(words) = words(class) else {
        return Err(Error::Unsupported {
            path: folder.join("tokenizer_config.json"),
            field: "tokenizer_class".into(),
            found: class.unwrap_or_default().into(),
            supported: "GPT2Tokenizer, Qwen2Tokenizer beside vocab.json, or a tokenizer.json".into(),
        });
    };
    let wrong = |path: &Path, field: &str, expected: &str, found: String| Error::File {
        path: path.into(),
        field: field.into(),
        expected: expected.into(),
        found,
    };
    let text = |path: &Path| {
        let size = std::fs::metadata(path).map_err(Error::io(path))?.len();
        if size > MAX_BYTES {
            return Err(wrong(path, "size", "at most 64 MiB", format!("{size} bytes")));
        }
        std::fs::read_to_string(path).map_err(Error::io(path))
    };
    let ids: std::collections::HashMap<String, u32> = serde_json::from_str(&text(&vocabulary)?)
        .map_err(|error| wrong(&vocabulary, "JSON", "ids by token", error.to_string()))?;
    let count = ids.values().max().map_or(0, |most| *most as usize + 1);
    let most = MAX_IDS[0] * ids.len() + MAX_IDS[1];
    if count > most {
        let expected = format!("ids below {most} for {} tokens", ids.len());
        return Err(wrong(&vocabulary, "ids", &expected, (count - 1).to_string()));
    }
    // Ids that no token has stay empty: gaps.
    let mut tokens = vec![String::new(); count];
    for (token, id) in ids {
        let slot = &mut tokens[id as usize];
        if !slot.is_empty() {
            return Err(wrong(&vocabulary, &token, "an id of its own", format!("that of {slot:?}")));
        }
        *slot = token;
    }
    let pairs = text(&merges)?;
    let pairs = pairs.lines().filter(|line| !line.is_empty() && !line.starts_with("#version"));
    let mut metadata = Metadata::new(&merges);
    for (key, value) in [
        ("model", Value::String("gpt2".into())),
        ("pre", Value::String(words.into())),
        ("tokens", Value::Array(Array::String(tokens))),
        ("merges", Value::Array(Array::String(pairs.map(str::to_owned).collect()))),
        ("add_bos_token", Value::Bool(false)),
    ] {
        metadata.insert(format!("tokenizer.ggml.{key}"), value);
    }
    build_tokenizer(&metadata).map(Some)
}
