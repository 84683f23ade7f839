//! Text to token ids and back.

mod folder;
mod sentencepiece;
mod stream;
#[cfg(test)]
mod tests;
mod vocabulary_files;

use std::{ops::Range, path::Path};

use kiln_quant_core::hash::hex;
use sha2::{Digest, Sha256};

pub(crate) use self::folder::contradictions;
pub use self::stream::DecodeStream;
use crate::{Error, Result, config::SpecialTokens, gguf::Gguf};

/// A tokenizer with its special tokens and its chat template.
///
/// Token ids and texts are those of the model's own files: nothing is truncated or padded, and decoding doesn't tidy
/// up spaces before punctuation.
///
/// ```
/// use kiln_models::Tokenizer;
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let tokenizer = Tokenizer::from_folder(folder)?;
/// let ids = tokenizer.encode("The President", true)?;
/// assert_eq!(tokenizer.decode(&ids, false)?, "The President");
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Reads a checkpoint folder: `tokenizer.json`, or else SentencePiece's `tokenizer.model` (BPE or unigram, of
    /// normalization `identity`), or else `vocab.json` and `merges.txt` of GPT-2's or Qwen 2's class; special tokens, further added tokens and the chat template from
    /// `tokenizer_config.json` if it is there; `chat_template.jinja`, which goes before the latter; and the
    /// `eos_token_id`s of `generation_config.json`, or else of `config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if none of them is there, [`Error::File`] for files that aren't what they should be or
    /// contradict each other, [`Error::Tokenizer`] for a tokenizer that the `tokenizers` crate refuses.
    pub fn from_folder(path: impl AsRef<Path>) -> Result<Self> {
        folder::read(path.as_ref())
    }

    /// Writes the files that [`from_folder`](Self::from_folder) reads: `tokenizer.json`, `tokenizer_config.json`,
    /// `generation_config.json` and, with a chat template, `chat_template.jinja`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tokenizer`] for a special id without a token.
    pub fn save_folder(&self, path: impl AsRef<Path>) -> Result<()> {
        folder::write(self, path.as_ref())
    }

    /// SHA-256 of all that decides ids, in hexadecimal.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn fingerprint(&self) -> Result<String> {
        Ok(hex(Sha256::digest(self.to_json()?)))
    }

    /// The contents of `tokenizer.json`.
    pub(crate) fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(error)
    }

    /// Makes the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`) that splits words as GPT-2, SmolLM,
    /// LLaMA 3 or Qwen 2 does, or SentencePiece's BPE with byte fallback (`llama`).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another kind of tokenizer, [`Error::File`] for keys that are missing or don't fit
    /// together.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        Ok(Self {
            inner: crate::gguf::build_tokenizer(file.metadata())?,
            special: file.special_tokens()?,
            chat_template: file.chat_template(),
        })
    }

    /// The ids of `text`; `add_special` adds what the model expects around a text (a begin-of-sequence token, for
    /// some). Special tokens written out in `text` become their ids either way.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`encode`](Self::encode), with the bytes of `text` that each id stands for (none for what `add_special` adds).
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.encode(text, add_special).map_err(error)?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// The text of `ids`, without special tokens if `skip_special`. Bytes that aren't UTF-8 read as U+FFFD; an id
    /// without a token (a padded row of an embedding) gives nothing.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(error)
    }

    /// A decoder that takes ids one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids with a meaning.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// The Jinja source of the chat template, for [`ChatTemplate::new`](crate::chat::ChatTemplate::new).
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

/// The tokenizer library's refusal.
fn error(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer(error.to_string())
}
