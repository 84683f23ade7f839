//! A tokenizer as `tokenizer.ggml.*` keys: carried over from a GGUF file, or made from a `tokenizer.json`.

use std::{collections::HashMap, path::Path};

use serde_json::Value as Json;

use super::Format;
use crate::{
    Checkpoint, Error, Result, Tokenizer,
    config::SpecialTokens,
    gguf::{Array, Metadata, Step, Value, WORDS, Words, build_tokenizer, token_kind},
};

/// Texts on which two ways of splitting words differ: what is written must read them as the original does.
const PROBES: [&str; 6] = [
    "The harpooneers, it's THEY'LL don't I'M",
    "1 22 333 4444 55555 3.14 1,234,567 x12y",
    "  two  spaces\tand\n\n lines \r\n",
    "naïve café cafe\u{301} — “quotes” … 日本語 🦀 \u{a0}nbsp",
    "x=y+z; {\"a\": [1, 2]} // !!?\n#",
    " leading and trailing ",
];

/// The keys for a model of `vocab_size` rows.
pub(super) fn keys(
    source: &Checkpoint,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Value)>> {
    if let Some(tokenizer) = source.own_tokenizer() {
        return describe(tokenizer, tokenizer.special(), vocab_size, notes);
    }
    if let Some(gguf) = source.gguf() {
        let metadata = gguf.metadata();
        let own = metadata.keys().filter(|key| key.starts_with("tokenizer."));
        let value = |key: &str| metadata.get(key).map(|value| (key.to_owned(), value.clone()));
        return Ok(own.filter_map(value).collect());
    }
    if !source.path().join("tokenizer.json").exists() {
        notes
            .push(format!("{} has no tokenizer.json, so the file has no tokenizer", source.path().display()));
        return Ok(Vec::new());
    }
    let tokenizer = source.tokenizer()?;
    describe(&tokenizer, tokenizer.special(), vocab_size, notes)
}

/// The keys that describe `tokenizer`, for `vocab_size` rows; they are read back before they are returned.
pub(crate) fn describe(
    tokenizer: &Tokenizer,
    special: &SpecialTokens,
    vocab_size: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Value)>> {
    let description = Description::of(tokenizer)?;
    let keys = description.keys(tokenizer, special, vocab_size)?;
    notes.extend(check(&keys, tokenizer, metaspace(&description.json).is_some())?);
    Ok(keys)
}

fn refuse(field: &str, expected: &str, found: impl Into<String>) -> Error {
    Format::Gguf.refuse(&format!("tokenizer {field}"), expected, found)
}

/// What is read of a `tokenizer.json`.
struct Description {
    json: Json,
    /// `tokenizer.ggml.model`.
    model: &'static str,
    /// `tokenizer.ggml.pre`.
    pre: &'static str,
}

impl Description {
    fn of(tokenizer: &Tokenizer) -> Result<Self> {
        let json: Json = serde_json::from_str(&tokenizer.to_json()?)
            .map_err(|error| refuse("JSON", "an object", error.to_string()))?;
        let model = &json["model"];
        if model["type"] != "BPE" {
            return Err(refuse("model", "BPE", model["type"].to_string()));
        }
        for key in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
            // Some files have an empty text for none.
            if !model[key].is_null() && model[key] != "" {
                return Err(refuse(key, "none", model[key].to_string()));
            }
        }
        if model["byte_fallback"] == true {
            return Ok(Self { json, model: "llama", pre: "default" });
        }
        let pre = words(&json)?.names[0];
        Ok(Self { json, model: "gpt2", pre })
    }

    fn keys(
        &self,
        tokenizer: &Tokenizer,
        special: &SpecialTokens,
        vocab_size: usize,
    ) -> Result<Vec<(String, Value)>> {
        let (tokens, kinds) = self.tokens(tokenizer, vocab_size)?;
        let mut keys =
            vec![("model", Value::String(self.model.into())), ("pre", Value::String(self.pre.into()))];
        if self.model == "gpt2" {
            let merges = self.merges()?.into_iter().map(|[left, right]| format!("{left} {right}"));
            keys.push(("merges", Value::Array(Array::String(merges.collect()))));
        } else {
            keys.push(("scores", Value::Array(Array::Float(self.scores(&tokens)?))));
            let prefix = self.json["normalizer"].to_string().contains("Prepend")
                || metaspace(&self.json).is_some_and(|step| step["prepend_scheme"] != "never");
            keys.push(("add_space_prefix", Value::Bool(prefix)));
        }
        keys.push(("tokens", Value::Array(Array::String(tokens))));
        keys.push(("token_type", Value::Array(Array::Int(kinds))));
        let around = tokenizer.encode("", true)?;
        let id = |id: u32| Value::Uint(id.into());
        if let Some(bos) = special.bos {
            keys.push(("bos_token_id", id(bos)));
        }
        for (name, &eos) in ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().zip(&special.eos) {
            keys.push((name, id(eos)));
        }
        if let Some(pad) = special.pad {
            keys.push(("padding_token_id", id(pad)));
        }
        keys.push((
            "add_bos_token",
            Value::Bool(special.bos.is_some() && around.first() == special.bos.as_ref()),
        ));
        let eos = special.eos.first();
        let ends = eos.is_some() && around.last() == eos && (around.len() > 1 || special.bos != eos.copied());
        keys.push(("add_eos_token", Value::Bool(ends)));
        let mut keys: Vec<_> =
            keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
        if let Some(template) = tokenizer.chat_template() {
            keys.push(("tokenizer.chat_template".into(), Value::String(template.into())));
        }
        Ok(keys)
    }

    /// Texts and kinds of all rows of the embedding; rows without a token get a name of their own.
    fn tokens(&self, tokenizer: &Tokenizer, vocab_size: usize) -> Result<(Vec<String>, Vec<i64>)> {
        let count = tokenizer.vocab_size();
        let mut kinds = vec![token_kind::NORMAL; vocab_size];
        let mut tokens = Vec::with_capacity(vocab_size);
        for (id, kind) in (0u32..).zip(&mut kinds) {
            tokens.push(match tokenizer.id_to_token(id) {
                Some(token) => {
                    let is_byte = self.model == "llama" && token.len() == 6 && token.starts_with("<0x");
                    if is_byte {
                        *kind = token_kind::BYTE;
                    } else if self.json["model"]["unk_token"] == token {
                        *kind = token_kind::UNKNOWN;
                    }
                    token
                }
                None => {
                    *kind = token_kind::UNUSED;
                    format!("[PAD{id}]")
                }
            });
        }
        let beyond = (vocab_size..vocab_size + count).find(|&id| tokenizer.id_to_token(id as u32).is_some());
        if let Some(id) = beyond {
            return Err(refuse(
                "tokens",
                &format!("ids below {vocab_size}, the rows of the embedding"),
                id.to_string(),
            ));
        }
        for added in self.json["added_tokens"].as_array().into_iter().flatten() {
            let kind = if added["special"] == true { token_kind::CONTROL } else { token_kind::USER_DEFINED };
            if let Some(slot) = added["id"].as_u64().and_then(|id| kinds.get_mut(id as usize))
                && *slot != token_kind::UNKNOWN
            {
                *slot = kind;
            }
        }
        Ok((tokens, kinds))
    }

    fn merges(&self) -> Result<Vec<[String; 2]>> {
        let wrong = |merge: &Json| refuse("merges", "two tokens without spaces", merge.to_string());
        let pair = |merge: &Json| {
            let parts: Vec<&str> = match merge {
                Json::String(text) => text.split(' ').collect(),
                merge => merge.as_array().into_iter().flatten().filter_map(Json::as_str).collect(),
            };
            match parts.as_slice() {
                [left, right] if !left.contains(' ') && !right.contains(' ') => {
                    Ok([(*left).to_owned(), (*right).to_owned()])
                }
                _ => Err(wrong(merge)),
            }
        };
        self.json["model"]["merges"].as_array().into_iter().flatten().map(pair).collect()
    }

    /// Scores under which SentencePiece merges in the order of the merges: the earlier the first merge that gives a
    /// token, the higher.
    fn scores(&self, tokens: &[String]) -> Result<Vec<f64>> {
        let mut ranks = HashMap::new();
        for (rank, [left, right]) in self.merges()?.into_iter().enumerate() {
            ranks.entry(left + &right).or_insert(rank);
        }
        Ok(tokens.iter().map(|token| ranks.get(token).map_or(0.0, |&rank| -(rank as f64) - 1.0)).collect())
    }
}

/// The step that writes spaces as SentencePiece does, in the newer spelling of its tokenizers.
fn metaspace(json: &Json) -> Option<&Json> {
    let pre = &json["pre_tokenizer"];
    let steps = pre["pretokenizers"].as_array().map_or(std::slice::from_ref(pre), Vec::as_slice);
    steps.iter().find(|step| step["type"] == "Metaspace")
}

/// The name of the way in which a byte-level tokenizer splits words.
fn words(json: &Json) -> Result<&'static Words> {
    let pre = &json["pre_tokenizer"];
    let steps: Vec<&Json> = match pre["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![pre],
    };
    let bytes = |step: &Json, split: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && (step["use_regex"] != false) == split
    };
    let is = |step: &Step, json: &Json| match *step {
        Step::Digits => json["type"] == "Digits" && json["individual_digits"] == true,
        Step::Pattern(pattern) => {
            json["type"] == "Split"
                && json["behavior"] == "Isolated"
                && json["invert"] != true
                && json["pattern"]["Regex"] == pattern
        }
    };
    let (normalizer, ignores_merges) = (&json["normalizer"], json["model"]["ignore_merges"] == true);
    let splits = |words: &&Words| {
        steps.split_last().is_some_and(|(last, first)| {
            bytes(last, words.as_gpt2)
                && first.len() == words.steps.len()
                && first.iter().zip(words.steps).all(|(json, step)| is(step, json))
        })
    };
    let composes = |words: &&Words| match words.composes {
        true => normalizer["type"] == "NFC",
        false => normalizer.is_null(),
    };
    let known = || WORDS.iter().filter(splits);
    let name = |words: &Words| words.names[0];
    let names = |words: &[&Words]| words.iter().map(|words| name(words)).collect::<Vec<_>>().join(", ");
    let alike: Vec<&Words> = known().collect();
    if alike.is_empty() {
        let expected = names(&WORDS.iter().collect::<Vec<_>>());
        return Err(refuse("pre_tokenizer", &format!("one of {expected}"), pre.to_string()));
    }
    let composed: Vec<&Words> = alike.iter().copied().filter(composes).collect();
    if composed.is_empty() {
        let expected = format!("that of {}", names(&alike));
        return Err(refuse("normalizer", &expected, normalizer.to_string()));
    }
    composed.iter().copied().find(|words| words.ignores_merges == ignores_merges).ok_or_else(|| {
        refuse("ignore_merges", &format!("that of {}", names(&composed)), ignores_merges.to_string())
    })
}

/// Builds the tokenizer that a reader of the keys has, which must give the ids of the original; but one in the newer
/// spelling puts a space before a text that has none only, the format's before any, which a note tells.
fn check(keys: &[(String, Value)], tokenizer: &Tokenizer, is_metaspace: bool) -> Result<Option<String>> {
    let mut note = None;
    let mut metadata = Metadata::new(Path::new("the tokenizer to be written"));
    for (key, value) in keys {
        metadata.insert(key.clone(), value.clone());
    }
    let rebuilt = build_tokenizer(&metadata)?;
    for text in PROBES {
        let found = rebuilt.encode_fast(text, true).map_err(|error| Error::Tokenizer(error.to_string()))?;
        if found.get_ids() == tokenizer.encode(text, true)? {
            continue;
        }
        if is_metaspace && text.starts_with(' ') {
            note = Some("a text that begins with a space gets one more from readers of the file".to_owned());
        } else {
            return Err(refuse(
                "vocabulary",
                "one that GGUF's keys describe",
                format!("other ids for {text:?}"),
            ));
        }
    }
    Ok(note)
}
