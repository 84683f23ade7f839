//! The tokenizer of a checkpoint folder in Hugging Face's layout.

use std::{
    collections::BTreeMap,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use kiln_quant_core::write_atomically;
use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::{
    Tokenizer,
    check::{Outline, Problem},
    error, sentencepiece, vocabulary_files,
};
use crate::{Error, Result, config::SpecialTokens};

/// Largest `tokenizer.json`: four times what the largest vocabularies take.
const MAX_BYTES: u64 = 128 << 20;

/// See [`Tokenizer::from_folder`].
pub(super) fn read(folder: &Path) -> Result<Tokenizer> {
    let path = folder.join("tokenizer_config.json");
    let config: FolderConfig = read_json(&path)?.unwrap_or_default();
    let mut inner = tokenizer(folder, &config)?;
    config.add_tokens(&path, &mut inner)?;
    let jinja = folder.join("chat_template.jinja");
    let chat_template = match read_optional(&jinja)? {
        Some(bytes) => {
            Some(String::from_utf8(bytes).map_err(|error| file_error(&jinja, "text", "UTF-8", error))?)
        }
        None => config.chat_template.as_ref().and_then(Templates::default_one),
    };
    let special = config.special_tokens(&path, &inner, end_ids(folder)?)?;
    Ok(Tokenizer { inner, special, chat_template })
}

/// The folder's tokenizer, of whichever file it has.
fn tokenizer(folder: &Path, config: &FolderConfig) -> Result<tokenizers::Tokenizer> {
    let path = folder.join("tokenizer.json");
    let pieces = folder.join("tokenizer.model");
    if !path.exists() {
        if pieces.exists() {
            let size = std::fs::metadata(&pieces).map_err(Error::io(&pieces))?.len();
            if size > sentencepiece::MAX_BYTES {
                return Err(file_error(&pieces, "size", "at most 64 MiB", size));
            }
            let bytes = std::fs::read(&pieces).map_err(Error::io(&pieces))?;
            let (bos, eos) = (config.add_bos_token.unwrap_or(true), config.add_eos_token.unwrap_or(false));
            return sentencepiece::read(&pieces, &bytes, bos, eos);
        }
        if let Some(mut tokenizer) = vocabulary_files::read(folder, config.tokenizer_class.as_deref())? {
            // Nothing in the files tells these from other tokens.
            let named = [&config.bos_token, &config.eos_token, &config.unk_token, &config.pad_token];
            let texts = named.into_iter().flatten().map(Token::content).chain([vocabulary_files::END]);
            let known: Vec<&str> = texts.filter(|text| tokenizer.token_to_id(text).is_some()).collect();
            let special = known.into_iter().map(|text| AddedToken::from(text, true).normalized(false));
            tokenizer.add_special_tokens(special).map_err(error)?;
            return Ok(tokenizer);
        }
    }
    let size = std::fs::metadata(&path).map_err(Error::io(&path))?.len();
    if size > MAX_BYTES {
        return Err(file_error(&path, "size", &format!("at most {MAX_BYTES} bytes"), size));
    }
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    parse(&path, &bytes)
}

/// See [`Tokenizer::save_folder`].
pub(super) fn write(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    for (name, bytes) in files(tokenizer)? {
        write_atomically(&folder.join(name), |file| file.write_all(&bytes))?;
    }
    Ok(())
}

/// Names and contents of what [`write`] writes.
pub(super) fn files(tokenizer: &Tokenizer) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    let mut save = |name: &str, text: String| files.push((name.to_owned(), text.into_bytes()));
    save("tokenizer.json", tokenizer.to_json()?);
    let special = &tokenizer.special;
    let token = |id: Option<u32>| match id {
        None => Ok(None),
        Some(id) => {
            let token = tokenizer.id_to_token(id);
            token.map(Some).ok_or_else(|| error(format!("special id {id}: expected a token, found none")))
        }
    };
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token(special.bos)?,
        "eos_token": token(special.eos.first().copied())?,
        "pad_token": token(special.pad)?,
        "clean_up_tokenization_spaces": false,
    });
    save("tokenizer_config.json", config.to_string());
    let generation = json!({
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
    });
    save("generation_config.json", generation.to_string());
    if let Some(template) = &tokenizer.chat_template {
        save("chat_template.jinja", template.clone());
    }
    Ok(files)
}

/// What a folder's tokenizer and its configuration say otherwise of the same token; the tokenizer's is used.
pub(crate) fn contradictions(folder: &Path, config: &SpecialTokens) -> Vec<String> {
    // What can't be read is the tokenizer's error.
    let Ok(Some(tokenizer)) = read_json::<FolderConfig>(&folder.join("tokenizer_config.json")) else {
        return Vec::new();
    };
    let id_of = |token: &Option<Token>| {
        let content = token.as_ref()?.content();
        let added = tokenizer.added_tokens_decoder.iter().find(|(_, added)| added.content == content)?;
        Some((content.to_owned(), added.0.parse::<u32>().ok()?))
    };
    let mut notes = Vec::new();
    let mut compare = |name: &str, token: &Option<Token>, other: &[u32]| {
        if let Some((text, id)) = id_of(token).filter(|(_, id)| !other.is_empty() && !other.contains(id)) {
            notes.push(format!(
                "{name} is {text:?} (id {id}) in tokenizer_config.json and {other:?} in the model's configuration: the \
                 tokenizer's is used"
            ));
        }
    };
    compare("bos_token", &tokenizer.bos_token, config.bos.as_slice());
    compare("eos_token", &tokenizer.eos_token, &config.eos);
    compare("pad_token", &tokenizer.pad_token, config.pad.as_slice());
    notes
}

fn file_error(path: &Path, field: &str, expected: &str, found: impl std::fmt::Display) -> Error {
    Error::File {
        path: path.into(),
        field: field.into(),
        expected: expected.into(),
        found: found.to_string(),
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let wrong = |(field, expected, found): Problem| file_error(path, &field, &expected, found);
    let outline = Outline::of(bytes).map_err(wrong)?;
    // The library indexes by lengths from the file in a few places; a bad file must be an error nonetheless.
    let parsed = catch_unwind(AssertUnwindSafe(|| tokenizers::Tokenizer::from_bytes(bytes)));
    let parsed =
        parsed.map_err(|_| file_error(path, "model", "a consistent tokenizer", "one that can't be built"))?;
    let mut tokenizer = parsed.map_err(|error| file_error(path, "JSON", "a tokenizer", error))?;
    outline.check_built(&tokenizer).map_err(wrong)?;
    // A training script's truncation would silently cut texts.
    tokenizer.with_truncation(None).map_err(error)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// The bytes of a file, or `None` if there is none.
fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    let Some(bytes) = read_optional(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| file_error(path, "JSON", "a valid file", error))
}

/// What is read of `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
struct FolderConfig {
    tokenizer_class: Option<String>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
    chat_template: Option<Templates>,
    #[serde(default)]
    added_tokens_decoder: BTreeMap<String, Added>,
}

/// A token as text, or as an object with its text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object { content: String },
}

impl Token {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) | Self::Object { content } => content,
        }
    }
}

/// One chat template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn default_one(&self) -> Option<String> {
        match self {
            Self::One(template) => Some(template.clone()),
            Self::Named(named) => {
                named.iter().find(|one| one.name == "default").map(|one| one.template.clone())
            }
        }
    }
}

/// An entry of `added_tokens_decoder`.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct Added {
    content: String,
    special: bool,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
    normalized: bool,
}

impl Default for Added {
    fn default() -> Self {
        Self {
            content: String::new(),
            special: false,
            lstrip: false,
            rstrip: false,
            single_word: false,
            normalized: true,
        }
    }
}

impl FolderConfig {
    /// Ids of the tokens that have a role; `ends` are further ids that end generation.
    fn special_tokens(
        &self,
        path: &Path,
        tokenizer: &tokenizers::Tokenizer,
        ends: Vec<u32>,
    ) -> Result<SpecialTokens> {
        let id = |token: &Option<Token>| {
            let Some(token) = token else { return Ok(None) };
            let id = tokenizer.token_to_id(token.content());
            id.map(Some).ok_or_else(|| file_error(path, token.content(), "a token of tokenizer.json", "none"))
        };
        let mut eos = Vec::from_iter(id(&self.eos_token)?);
        for end in ends {
            if !eos.contains(&end) {
                eos.push(end);
            }
        }
        Ok(SpecialTokens { bos: id(&self.bos_token)?, eos, pad: id(&self.pad_token)? })
    }

    /// Adds the tokens that `tokenizer.json` lacks; all must get the ids they have here.
    fn add_tokens(&self, path: &Path, tokenizer: &mut tokenizers::Tokenizer) -> Result<()> {
        let mut missing = Vec::new();
        for (id, added) in &self.added_tokens_decoder {
            let number: u32 =
                id.parse().map_err(|error| file_error(path, "added_tokens_decoder", "ids as keys", error))?;
            match tokenizer.token_to_id(&added.content) {
                Some(found) if found != number => {
                    return Err(file_error(
                        path,
                        &added.content,
                        &format!("id {found}, as in tokenizer.json"),
                        number,
                    ));
                }
                Some(_) => {}
                None => missing.push((number, added)),
            }
        }
        missing.sort_by_key(|&(id, _)| id);
        for (id, added) in missing {
            let token = AddedToken::from(added.content.as_str(), added.special)
                .lstrip(added.lstrip)
                .rstrip(added.rstrip)
                .single_word(added.single_word)
                .normalized(added.normalized);
            tokenizer.add_tokens([token]).map_err(error)?;
            let found = tokenizer.token_to_id(&added.content);
            if found != Some(id) {
                let expected = "the next free id of tokenizer.json, or a token it has";
                return Err(file_error(path, &added.content, expected, id));
            }
        }
        Ok(())
    }
}

/// `eos_token_id` of `generation_config.json`, or else of `config.json`: an id or several.
fn end_ids(folder: &Path) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let path = folder.join(name);
        let config: Option<Value> = read_json(&path)?;
        let ids = match config.as_ref().and_then(|config| config.get("eos_token_id")) {
            None | Some(Value::Null) => continue,
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        let id = |id: &Value| {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            number.ok_or_else(|| file_error(&path, "eos_token_id", "token ids", id))
        };
        return ids.iter().map(id).collect();
    }
    Ok(Vec::new())
}
