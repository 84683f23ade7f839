//! Texts to tokens, as the harness does it.

use kiln_models::Tokenizer;

use crate::{error::Problem, python};

/// Tokens of a context, and of what continues it.
pub(super) type TokenPair = (Vec<u32>, Vec<u32>);

/// A tokenizer with the harness's rules for special tokens.
#[derive(Debug)]
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// What stands before a text without context.
    pub(super) prefix: u32,
    prefix_text: String,
    /// Whether special tokens are added; `None` leaves it to the tokenizer, and adds none to a text that begins with
    /// one.
    add_special: Option<bool>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        prefix: u32,
        add_special: Option<bool>,
    ) -> crate::Result<Self> {
        let prefix_text = tokenizer.decode(&[prefix], false)?;
        Ok(Self { tokenizer, prefix, prefix_text, add_special })
    }

    pub(super) fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    pub(super) fn add_special(&self) -> Option<bool> {
        self.add_special
    }

    /// Tokens of a text that stands on its own.
    pub(super) fn encode(&self, text: &str) -> crate::Result<Vec<u32>> {
        let has_prefix = !self.prefix_text.is_empty() && text.starts_with(&self.prefix_text);
        let special = !has_prefix && self.add_special.unwrap_or(true);
        Ok(self.tokenizer.encode(text, special)?)
    }

    /// Tokens of a context and of its continuation, split by the count of the context's own.
    pub(super) fn encode_pair(
        &self,
        context: &str,
        continuation: &str,
    ) -> crate::Result<Result<TokenPair, Problem>> {
        let none = |what: &str| Ok(Err(Problem::new(what, "at least one token", "none")));
        if context.is_empty() {
            let ids = self.tokenizer.encode(continuation, false)?;
            return match ids.first() {
                None => none("continuation"),
                // The continuation brings its own prefix.
                Some(&first) if first == self.prefix => match ids.len() {
                    1 => none("continuation"),
                    _ => Ok(Ok((ids[..1].to_vec(), ids[1..].to_vec()))),
                },
                Some(_) => Ok(Ok((vec![self.prefix], ids))),
            };
        }
        // Whitespace at the context's end belongs to the word that follows.
        let kept = context.trim_end_matches(python::is_space);
        let mut whole = self.encode(&format!("{context}{continuation}"))?;
        let count = self.encode(kept)?.len();
        if count == 0 {
            return none("context");
        }
        if count >= whole.len() {
            return none("continuation");
        }
        let continuation = whole.split_off(count);
        Ok(Ok((whole, continuation)))
    }
}
