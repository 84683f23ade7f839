//! Text to token ids and back.

mod check;
mod folder;
#[cfg(test)]
mod hostile_tests;
mod pattern;
mod pieces;
mod sentencepiece;
mod stream;
#[cfg(test)]
mod tests;
mod vocabulary_files;

use std::{ops::Range, path::Path};

use kiln_quant_core::hash::hex;
use sha2::{Digest, Sha256};

use self::check::guarded;
pub(crate) use self::folder::contradictions;
pub use self::stream::DecodeStream;
use crate::{Error, Result, config::SpecialTokens, gguf::Gguf};

/// A tokenizer with its special tokens and its chat template.
///
/// Token ids and texts are those of the model's own files: nothing is truncated or padded, and decoding doesn't tidy
/// up spaces before punctuation. A long text is worked on in pieces, whose ids are those of the whole. A file that asks for what can't be bounded is refused: patterns with lookaround (but
/// `\\s+(?!\\S)`) or back references, rules that make a text more than 64 times longer, unigram pieces of more than 256
/// characters, WordPiece's words of more than 200.
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

    /// Names and contents of the files that [`save_folder`](Self::save_folder) writes.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a special id without a token.
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        folder::files(self)
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
        if text.len() <= pieces::PIECE {
            let encoding = guarded(|| self.inner.encode_fast(text, add_special))?;
            return Ok(encoding.get_ids().to_vec());
        }
        let [before, after] = self.around(add_special)?;
        let mut ids = before;
        pieces::encode(self, text, |(id, _)| ids.push(id))?;
        ids.extend(after);
        Ok(ids)
    }

    /// As [`encode`](Self::encode), with the bytes of `text` that each id stands for (none for what `add_special` adds).
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<Vec<(u32, Range<usize>)>> {
        let [before, after] = self.around(add_special)?;
        let mut tokens: Vec<(u32, Range<usize>)> = before.into_iter().map(|id| (id, 0..0)).collect();
        match text.len() <= pieces::PIECE {
            true => tokens.extend(self.encode_whole(text)?),
            false => pieces::encode(self, text, |token| tokens.push(token))?,
        }
        tokens.extend(after.into_iter().map(|id| (id, 0..0)));
        Ok(tokens)
    }

    /// The ids of a text, at once, with the bytes that each stands for.
    fn encode_whole(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(|| self.inner.encode(text, false))?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// What `add_special` puts before and behind a text.
    fn around(&self, add_special: bool) -> Result<[Vec<u32>; 2]> {
        // Any text will do that has tokens.
        const TEXT: &str = "a";
        if !add_special {
            return Ok([Vec::new(), Vec::new()]);
        }
        let encoding = guarded(|| self.inner.encode_fast(TEXT, true))?;
        let (ids, special) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        let first = special.iter().position(|&mask| mask == 0).unwrap_or(ids.len());
        let last = special.iter().rposition(|&mask| mask == 0).map_or(ids.len(), |last| last + 1);
        Ok([ids[..first].to_vec(), ids[last..].to_vec()])
    }

    /// The text of `ids`, without special tokens if `skip_special`. Bytes that aren't UTF-8 read as U+FFFD; an id
    /// without a token (a padded row of an embedding) gives nothing.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special))
    }

    /// A decoder that takes ids one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The same with further tokens, whose ids follow the others, and the ids. Written out in a text they become their ids;
    /// special ones are left out by `skip_special`.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty token, one that is there already and one that is named twice; [`Error::Tokenizer`].
    pub fn with_added_tokens<S: AsRef<str>>(&self, tokens: &[S], special: bool) -> Result<(Self, Vec<u32>)> {
        let mut added = self.clone();
        let mut ids = Vec::new();
        for token in tokens.iter().map(AsRef::as_ref) {
            let wrong = |found: &str| Error::Argument {
                name: "tokens".into(),
                expected: "tokens that the tokenizer doesn't have, each once".into(),
                found: found.into(),
            };
            if token.trim().is_empty() {
                return Err(wrong("an empty one"));
            }
            if added.token_to_id(token).is_some() {
                return Err(wrong(token));
            }
            // As transformers adds them.
            let token = tokenizers::AddedToken::from(token, special).normalized(!special);
            guarded(|| match special {
                true => added.inner.add_special_tokens([token.clone()]),
                false => added.inner.add_tokens([token.clone()]),
            })?;
            ids.push(added.token_to_id(&token.content).ok_or_else(|| wrong(&token.content))?);
        }
        Ok((added, ids))
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
