//! What a `tokenizer.json` may ask for.
//!
//! The library `tokenizers` trusts its files: it panics on some, allocates what they say, and lets patterns and rules run as
//! long as they do. So a file is looked at before it is handed over, and what can't be bounded is refused: patterns with
//! lookaround, other than the `\s+(?!\S)` that nearly all have, or back references, on which its engine tracks back and at
//! some point silently gives up; rules that make a text more than [`MAX_GROWTH`] times longer; pieces and words whose cost
//! isn't in proportion to the text.

use std::panic::{AssertUnwindSafe, catch_unwind};

use regex::Regex;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::ModelWrapper;

use super::pattern;

/// How much longer all normalization together may make a text.
const MAX_GROWTH: usize = 64;
/// Components in one of the parts, nested ones included.
const MAX_COMPONENTS: usize = 256;
/// Length of a pattern, and of a text that is put in.
const MAX_PATTERN: usize = 4096;
/// Characters of a unigram's piece: each place of a text is compared with so many.
const MAX_PIECE: usize = 256;
/// Characters of a word of WordPiece, which takes the square of it.
const MAX_WORD: usize = 200;
/// Special tokens around a text.
const MAX_SPECIAL: usize = 1024;
/// Bytes of a precompiled normalization.
const MAX_CHARSMAP: usize = 4 << 20;

/// What is wrong: the field, what was expected, what was found.
pub(super) type Problem = (String, String, String);
type Checked<T = ()> = Result<T, Problem>;

fn problem(field: &str, expected: impl Into<String>, found: impl ToString) -> Problem {
    (field.into(), expected.into(), found.to_string())
}

/// All of the file but the vocabulary.
#[derive(Deserialize)]
pub(super) struct Outline {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

impl Outline {
    /// Checks a file before the library reads it.
    pub(super) fn of(bytes: &[u8]) -> Checked<Self> {
        let outline: Self =
            serde_json::from_slice(bytes).map_err(|error| problem("JSON", "a tokenizer", error))?;
        let parts = [
            ("normalizer", &outline.normalizer),
            ("pre_tokenizer", &outline.pre_tokenizer),
            ("post_processor", &outline.post_processor),
            ("decoder", &outline.decoder),
        ];
        for (part, value) in parts {
            let Some(value) = value.as_ref().filter(|value| !value.is_null()) else { continue };
            let mut found = Found { part, growth: 1, components: 0 };
            found.component(value)?;
        }
        Ok(outline)
    }

    /// Checks what the library made of the file.
    pub(super) fn check_built(&self, tokenizer: &tokenizers::Tokenizer) -> Checked {
        check_model(tokenizer)?;
        for AddedToken { id, content } in &self.added_tokens {
            let found = tokenizer.token_to_id(content);
            // The library passes over empty ones.
            if !content.is_empty() && found != Some(*id) {
                let expected = format!("id {id}, the next free one or the vocabulary's");
                return Err(problem(
                    &format!("added_tokens.{content}"),
                    expected,
                    found.map_or("none".into(), |id| id.to_string()),
                ));
            }
        }
        Ok(())
    }
}

/// A vocabulary whose cost is in proportion to the text.
pub(super) fn check_model(tokenizer: &tokenizers::Tokenizer) -> Checked {
    match tokenizer.get_model() {
        ModelWrapper::WordPiece(model) if model.max_input_chars_per_word > MAX_WORD => Err(problem(
            "model.max_input_chars_per_word",
            format!("at most {MAX_WORD}"),
            model.max_input_chars_per_word,
        )),
        ModelWrapper::Unigram(model) => {
            let longest = model.iter().map(|(piece, _)| piece.chars().count()).max().unwrap_or(0);
            match longest <= MAX_PIECE {
                true => Ok(()),
                false => {
                    Err(problem("model.vocab", format!("pieces of at most {MAX_PIECE} characters"), longest))
                }
            }
        }
        ModelWrapper::BPE(model) if model.dropout.is_some_and(|dropout| dropout > 0.0) => {
            Err(problem("model.dropout", "none: ids would be drawn", model.dropout.unwrap_or(0.0)))
        }
        _ => Ok(()),
    }
}

/// What was seen of a part.
struct Found {
    part: &'static str,
    growth: usize,
    components: usize,
}

impl Found {
    fn field(&self, name: &str) -> String {
        format!("{}.{name}", self.part)
    }

    fn component(&mut self, value: &Value) -> Checked {
        self.components += 1;
        if self.components > MAX_COMPONENTS {
            return Err(problem(self.part, format!("at most {MAX_COMPONENTS} components"), "more"));
        }
        let kind = value["type"].as_str().unwrap_or_default();
        let list = match kind {
            "Sequence" => Some(match self.part {
                "normalizer" => "normalizers",
                "pre_tokenizer" => "pretokenizers",
                "post_processor" => "processors",
                _ => "decoders",
            }),
            _ => None,
        };
        if let Some(name) = list {
            let items =
                value[name].as_array().ok_or_else(|| problem(&self.field(name), "a list", &value[name]))?;
            return items.iter().try_for_each(|item| self.component(item));
        }
        let growth = match (self.part, kind) {
            ("normalizer", "BertNormalizer" | "NFD" | "NFC") => 4,
            // U+FDFA has 3 bytes and becomes 33.
            ("normalizer", "NFKC" | "NFKD") => 11,
            ("normalizer", "Lowercase" | "ByteLevel") => 2,
            ("normalizer", "Strip" | "StripAccents" | "Nmt") => 1,
            ("normalizer", "Prepend") => {
                self.short("prepend", &value["prepend"])?;
                1
            }
            ("normalizer", "Precompiled") => self.charsmap(&value["precompiled_charsmap"])?,
            ("normalizer" | "decoder", "Replace") => self.replace(value)?,
            ("pre_tokenizer", "Split") => {
                self.pattern(&value["pattern"])?;
                1
            }
            ("pre_tokenizer", "FixedLength") => {
                let length = value["length"].as_u64().unwrap_or(5);
                if length == 0 {
                    return Err(problem(&self.field("length"), "at least 1", length));
                }
                1
            }
            (
                "pre_tokenizer",
                "BertPreTokenizer" | "ByteLevel" | "CharDelimiterSplit" | "Metaspace" | "Whitespace"
                | "WhitespaceSplit" | "Punctuation" | "Digits" | "UnicodeScripts",
            )
            | ("post_processor", "BertProcessing" | "RobertaProcessing" | "ByteLevel")
            | (
                "decoder",
                "BPEDecoder" | "ByteLevel" | "WordPiece" | "Metaspace" | "CTC" | "Fuse" | "ByteFallback",
            ) => 1,
            ("post_processor", "TemplateProcessing") => {
                self.template(value)?;
                1
            }
            ("decoder", "Strip") => {
                // From the end it would count below the beginning of a short token.
                match value["stop"].as_u64() {
                    Some(0) => 1,
                    _ => return Err(problem(&self.field("stop"), "0", &value["stop"])),
                }
            }
            _ => return Err(problem(&self.field("type"), "a component that is known", &value["type"])),
        };
        self.growth = self.growth.saturating_mul(growth);
        match self.growth <= MAX_GROWTH {
            true => Ok(()),
            false => {
                let expected = format!("rules that make a text at most {MAX_GROWTH} times longer");
                Err(problem(self.part, expected, format!("up to {} times", self.growth)))
            }
        }
    }

    fn short<'v>(&self, name: &str, value: &'v Value) -> Checked<&'v str> {
        let text = value.as_str().ok_or_else(|| problem(&self.field(name), "a text", value))?;
        match text.len() <= MAX_PATTERN {
            true => Ok(text),
            false => Err(problem(&self.field(name), format!("at most {MAX_PATTERN} bytes"), text.len())),
        }
    }

    /// How much longer a replacement makes a text.
    fn replace(&self, value: &Value) -> Checked<usize> {
        let content = self.short("content", &value["content"])?;
        let shortest = match self.pattern(&value["pattern"])? {
            Pattern::Text(text) => text.len(),
            Pattern::Regex(regex) => {
                // Matches of nothing are found anywhere.
                let places = ["", "a", " ", "1", "\n", "a b", "_"];
                let is_empty = |text: &&str| regex.find_iter(text).any(|found| found.is_empty());
                usize::from(!places.iter().any(is_empty))
            }
        };
        match shortest {
            0 => Err(problem(
                &self.field("pattern"),
                "a pattern that doesn't match nothing",
                &value["pattern"],
            )),
            shortest => Ok(content.len().div_ceil(shortest).max(1)),
        }
    }

    fn pattern(&self, value: &Value) -> Checked<Pattern> {
        if let Some(text) = value.get("String") {
            return Ok(Pattern::Text(self.short("pattern", text)?.to_owned()));
        }
        let pattern = self.short("pattern", &value["Regex"])?;
        pattern::bounded(pattern).map(Pattern::Regex).map_err(|reason| {
            let expected = r"a regular expression without back references and lookaround (but `\s+(?!\S)`)";
            problem(&self.field("pattern"), expected, format!("{pattern:?}: {reason}"))
        })
    }

    /// Tokens that a template puts in are declared, and it has one text.
    fn template(&self, value: &Value) -> Checked {
        let special = &value["special_tokens"];
        let mut inserted = 0;
        for (name, places) in [("single", ["A"].as_slice()), ("pair", &["A", "B"])] {
            let pieces =
                value[name].as_array().ok_or_else(|| problem(&self.field(name), "a list", &value[name]))?;
            for piece in pieces {
                if let Some(place) = piece["Sequence"]["id"].as_str() {
                    if !places.contains(&place) {
                        return Err(problem(&self.field(name), format!("the sequences {places:?}"), place));
                    }
                    continue;
                }
                let token = &piece["SpecialToken"]["id"];
                let ids = token.as_str().and_then(|token| special[token]["ids"].as_array());
                let ids = ids.ok_or_else(|| problem(&self.field(name), "tokens of special_tokens", token))?;
                inserted += ids.len();
            }
        }
        match inserted <= MAX_SPECIAL {
            true => Ok(()),
            false => {
                Err(problem(&self.field("single"), format!("at most {MAX_SPECIAL} special tokens"), inserted))
            }
        }
    }

    /// A trie of which every place that a text can lead to is there, and the texts that it leads to. Returns how much longer
    /// these are.
    ///
    /// Format: little-endian length of the trie in bytes, the trie's words of 32 bits (Darts: bit 8 has a leaf, bits 10 to 31
    /// the offset, shifted by 8 if bit 9 is set, bits 0 to 7 and 31 the label), texts that end in a zero.
    fn charsmap(&self, value: &Value) -> Checked<usize> {
        let wrong = |expected: &str, found: String| {
            Err(problem(&self.field("precompiled_charsmap"), expected, found))
        };
        let text = value.as_str().unwrap_or_default();
        let bytes = match base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text) {
            Ok(bytes) if bytes.len() <= MAX_CHARSMAP => bytes,
            Ok(bytes) => return wrong("at most 4 MiB", bytes.len().to_string()),
            Err(error) => return wrong("base64", error.to_string()),
        };
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else {
            return wrong("a length", "less".into());
        };
        let length = u32::from_le_bytes(*length) as usize;
        let Some((trie, texts)) =
            rest.split_at_checked(length).filter(|_| length >= 4 && length.is_multiple_of(4))
        else {
            return wrong("a trie as long as it says", format!("{length} of {} bytes", rest.len()));
        };
        let Ok(texts) = std::str::from_utf8(texts) else {
            return wrong("texts in UTF-8", "other bytes".into());
        };
        let (units, _) = trie.as_chunks::<4>();
        let units: Vec<usize> = units.iter().map(|unit| u32::from_le_bytes(*unit) as usize).collect();
        let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let (mut seen, mut level, mut depth, mut growth) =
            (vec![false; units.len()], vec![offset(units[0])], 0, 1);
        while !level.is_empty() {
            depth += 1;
            let mut next = Vec::new();
            for state in level {
                for byte in 1..=255 {
                    let Some(&unit) = units.get(state ^ byte) else {
                        return wrong("a trie whose places are all there", format!("place {}", state ^ byte));
                    };
                    if unit & (1 << 31 | 0xff) != byte {
                        continue;
                    }
                    let target = state ^ byte ^ offset(unit);
                    if unit & 1 << 8 != 0 {
                        let place = units.get(target).map(|leaf| leaf & ((1 << 31) - 1));
                        let Some(text) = place.and_then(|place| texts.get(place..)) else {
                            return wrong("places of texts", format!("{place:?} of {}", texts.len()));
                        };
                        let length = text.find('\0').unwrap_or(text.len());
                        growth = growth.max(length.div_ceil(depth));
                    }
                    match seen.get_mut(target) {
                        Some(seen) if !*seen => {
                            *seen = true;
                            next.push(target);
                        }
                        Some(_) => {}
                        None => return wrong("a trie whose places are all there", format!("place {target}")),
                    }
                }
            }
            level = next;
        }
        Ok(growth)
    }
}

enum Pattern {
    Text(String),
    Regex(Regex),
}

/// Calls the library, whose panics are errors.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> crate::Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(super::error),
        Err(_) => Err(super::error("the tokenizer failed on the text: a panic")),
    }
}
