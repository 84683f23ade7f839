//! Decoding ids one by one.

use super::Tokenizer;
use crate::Result;

/// Turns ids into text as they come; see [`Tokenizer::decode_stream`].
///
/// A token may end within a character, and the text of a token may depend on the one before. So text is held back
/// until it ends with a whole character.
///
/// ```
/// # use kiln_models::Tokenizer;
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let tokenizer = Tokenizer::from_folder(folder)?;
/// let mut stream = tokenizer.decode_stream(true);
/// let mut text = String::new();
/// for id in tokenizer.encode("a “quote”", false)? {
///     text += &stream.push(id)?;
/// }
/// text += &stream.finish()?;
/// assert_eq!(text, "a “quote”");
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Ids whose text was given out, as context, then ids whose text is held back.
    ids: Vec<u32>,
    /// How many of them are context.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), shown: 0 }
    }

    /// The text that `id` completes; empty if a character is still open.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.held_back()?;
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// What is still held back: incomplete characters, as U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer).
    pub fn finish(self) -> Result<String> {
        self.held_back()
    }

    fn held_back(&self) -> Result<String> {
        let context = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special)?;
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        match text.strip_prefix(&context) {
            Some(rest) => Ok(rest.to_owned()),
            // Byte tokens in a row read as U+FFFD all together while one character among them is incomplete.
            None => self.tokenizer.decode(&self.ids[self.shown..], self.skip_special),
        }
    }
}
