//! An example as a person would read it.

use std::fmt;

use crate::{Dataset, Result};

/// An example as text, with what is learned of it marked: what a person looks at before a long run.
///
/// Its text puts `⟦` and `⟧` around learned tokens, and behind a text that has one its class or number.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Preview {
    /// Runs of the text, and whether they are learned.
    pub parts: Vec<(String, bool)>,
    /// Tokens.
    pub tokens: usize,
    /// Tokens that are learned.
    pub targets: usize,
    /// The class or number of the text.
    pub value: Option<f32>,
}

impl Dataset {
    /// The example `index` as text; `decode` turns ids into text, special tokens included.
    ///
    /// ```
    /// use kiln_training::{DataOptions, Dataset, Example};
    /// let example = Example::answer(&[72, 105, 32], &[89, 111]);
    /// let data = Dataset::from_examples([example], &DataOptions::new(16, 256))?;
    /// let ascii = |ids: &[u32]| ids.iter().map(|id| *id as u8 as char).collect();
    /// assert_eq!(data.preview(0, ascii)?.to_string(), "Hi ⟦Yo⟧");
    /// # Ok::<(), kiln_training::Error>(())
    /// ```
    ///
    /// # Errors
    /// A file of tokens that can't be read.
    ///
    /// # Panics
    /// If there is no such example.
    pub fn preview(&self, index: usize, mut decode: impl FnMut(&[u32]) -> String) -> Result<Preview> {
        let example = self.example(index)?;
        let (mut parts, mut start) = (Vec::new(), 0);
        // Of the first token nothing is learned, whatever its flag.
        let is_learned = |(index, scored): (usize, &bool)| index > 0 && *scored && example.value.is_none();
        let flags: Vec<bool> = example.scored.iter().enumerate().map(is_learned).collect();
        for run in flags.chunk_by(|a, b| a == b) {
            parts.push((decode(&example.ids[start..start + run.len()]), run[0]));
            start += run.len();
        }
        let (tokens, targets, value) = (example.ids.len(), example.targets(), example.value);
        Ok(Preview { parts, tokens, targets, value })
    }
}

impl fmt::Display for Preview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parts.iter().try_for_each(|(text, learned)| match learned {
            true => write!(f, "⟦{text}⟧"),
            false => f.write_str(text),
        })?;
        self.value.map_or(Ok(()), |value| write!(f, " ⟦{value}⟧"))
    }
}
