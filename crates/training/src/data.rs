//! Training data: token sequences with a mask of the tokens that are learned.
//!
//! Three kinds of file, by extension: `.txt` (one text, tokenised as a whole and cut into windows), `.u16le` (token ids
//! as little-endian 16-bit numbers, cut in the same way) and `.jsonl` (one example a line, see [`Dataset::open`]).

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use kiln_models::Windows;
use kiln_quant_core::hash::hex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Message;
use crate::batch::permutation;
use crate::error::{Error, Problem, Result};
use crate::jsonl::{Form, Row};

/// What the data pipeline needs of a tokenizer.
pub trait TokenizeText {
    /// The ids of `text`; with `add_special` also the tokens that the tokenizer puts around a text, such as BOS.
    ///
    /// # Errors
    /// The tokenizer's refusal, in words.
    fn encode(&self, text: &str, add_special: bool) -> std::result::Result<Vec<u32>, String>;

    /// The ids of `prompt` and `completion` as one text, and for each whether it stands for a part of the completion, alone
    /// or with the prompt's end. As given here, that is told from the prompt's own ids; a tokenizer that knows which
    /// characters a token stands for should go by those.
    ///
    /// # Errors
    /// The tokenizer's refusal, in words.
    fn completion(
        &self,
        prompt: &str,
        completion: &str,
        add_special: bool,
    ) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
        let alone = self.encode(prompt, add_special)?;
        let ids = self.encode(&format!("{prompt}{completion}"), add_special)?;
        let shared = ids.iter().zip(&alone).take_while(|(id, alone)| id == alone).count();
        let learned = (0..ids.len()).map(|index| index >= shared).collect();
        Ok((ids, learned))
    }

    /// The ids of a conversation in the model's own template, and for each whether the assistant said it.
    ///
    /// # Errors
    /// A conversation that the template refuses, in words.
    fn chat(&self, messages: &[Message]) -> std::result::Result<(Vec<u32>, Vec<bool>), String>;
}

/// A token sequence. `scored[i]` tells whether predicting `ids[i]` from the tokens before it is learned; of the first
/// token it has no effect, because nothing comes before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// As long as `ids`.
    pub scored: Vec<bool>,
}

impl Example {
    /// A sequence of which every token is learned.
    pub fn all_scored(ids: Vec<u32>) -> Self {
        let scored = vec![true; ids.len()];
        Self { ids, scored }
    }

    fn targets(&self) -> usize {
        self.scored.iter().skip(1).filter(|scored| **scored).count()
    }

    /// Index of the first token that is learned.
    fn first_target(&self) -> Option<usize> {
        self.scored.iter().skip(1).position(|scored| *scored).map(|index| index + 1)
    }
}

/// What happens to an example with more than `seq_len` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LongSequences {
    /// Its first `seq_len` tokens are used.
    #[default]
    Truncate,
    /// It becomes several examples of `seq_len` consecutive tokens and a rest.
    Split,
    /// It is an error.
    Error,
}

/// How files become examples.
///
/// | name | default | purpose | range |
/// | --- | --- | --- | --- |
/// | `seq_len` | required | most tokens of an example | at least 2 |
/// | `vocab_size` | required | ids must be below it | |
/// | `eos` | none | token appended to text and completion rows that don't end in it, and learned | below `vocab_size` |
/// | `add_special` | true | the tokenizer's own additions (BOS) at the start of texts and prompts | |
/// | `long` | truncate | what happens to longer rows | |
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct DataOptions {
    /// Most tokens of an example.
    pub seq_len: usize,
    /// Size of the model's vocabulary.
    pub vocab_size: usize,
    /// The token that ends text and completion rows.
    pub eos: Option<u32>,
    /// Whether the tokenizer adds its special tokens at the start.
    pub add_special: bool,
    /// What happens to longer rows.
    pub long: LongSequences,
}

impl DataOptions {
    /// Examples of at most `seq_len` tokens below `vocab_size`; everything else as in the table.
    pub fn new(seq_len: usize, vocab_size: usize) -> Self {
        Self { seq_len, vocab_size, eos: None, add_special: true, long: LongSequences::default() }
    }

    /// Sets `eos`.
    #[must_use]
    pub fn with_eos(mut self, eos: u32) -> Self {
        self.eos = Some(eos);
        self
    }

    /// Sets `add_special`.
    #[must_use]
    pub fn with_add_special(mut self, add_special: bool) -> Self {
        self.add_special = add_special;
        self
    }

    /// Sets `long`.
    #[must_use]
    pub fn with_long(mut self, long: LongSequences) -> Self {
        self.long = long;
        self
    }

    fn validate(&self) -> Result<()> {
        if self.seq_len < 2 {
            let expected = "at least 2 tokens, one to see and one to predict";
            return Err(Problem::new("seq_len", expected, self.seq_len).argument());
        }
        match self.eos {
            Some(eos) if eos as usize >= self.vocab_size => {
                Err(Problem::new("eos", format!("an id below {}", self.vocab_size), eos).argument())
            }
            _ => Ok(()),
        }
    }
}

/// What became of the rows, or of the one text, of a data set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct DataReport {
    /// Rows read; 1 for a text or an id file.
    pub rows: usize,
    /// Examples made of them.
    pub examples: usize,
    /// Tokens in the examples.
    pub tokens: usize,
    /// Tokens that are learned.
    pub targets: usize,
    /// Rows that were cut to `seq_len`.
    pub truncated: usize,
    /// Rows that became several examples.
    pub split: usize,
    /// Tokens left out: what was cut off, and examples without a token to learn.
    pub dropped_tokens: usize,
    /// Examples left out because no token of theirs is learned: a prompt that fills `seq_len`, a text of one token.
    pub without_targets: usize,
    /// Rows of which nothing is learned at all.
    pub dropped: Vec<DroppedRow>,
    /// Keys of rows that no form of row has, sorted.
    pub ignored_fields: BTreeSet<String>,
}

/// A row of which nothing is learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DroppedRow {
    /// The line of the file, or the number of the example, counted from 1.
    pub line: usize,
    /// Why.
    pub reason: DropReason,
}

/// Why nothing of a row is learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// No message is the assistant's.
    NoAssistant {
        /// The roles of the messages.
        roles: Vec<String>,
    },
    /// The first token to learn lies beyond `seq_len`.
    TooLong {
        /// Tokens before it.
        before: usize,
    },
    /// There is no token to learn, or nothing before it.
    NoTarget,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAssistant { roles } => {
                write!(f, "no message has the role assistant; the roles are {}", roles.join(", "))
            }
            Self::TooLong { before } => {
                write!(f, "the {before} tokens before the first one to learn fill the sequence")
            }
            Self::NoTarget => f.write_str("it has no token to learn"),
        }
    }
}

/// Some lines for a person: counts, then what was cut, left out or ignored, where there is any.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, examples, tokens, targets, truncated, split, dropped_tokens, .. } = self;
        write!(f, "{rows} rows became {examples} examples of {tokens} tokens, {targets} of them learned")?;
        if *truncated > 0 {
            write!(f, "\n{truncated} rows were cut")?;
        }
        if *split > 0 {
            write!(f, "\n{split} rows were split")?;
        }
        if *dropped_tokens > 0 {
            write!(f, "\n{dropped_tokens} tokens were left out")?;
        }
        for DroppedRow { line, reason } in &self.dropped {
            write!(f, "\nrow in line {line} was left out: {reason}")?;
        }
        if !self.ignored_fields.is_empty() {
            let keys: Vec<&str> = self.ignored_fields.iter().map(String::as_str).collect();
            write!(f, "\nkeys without a meaning: {}", keys.join(", "))?;
        }
        Ok(())
    }
}

/// What some editors put before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The examples of a file, ready to be batched.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    examples: Vec<Example>,
    options: DataOptions,
    report: DataReport,
}

impl Dataset {
    /// Reads a file by its extension.
    ///
    /// A `.txt` or `.u16le` file is one sequence, cut into consecutive windows of `seq_len` tokens; the last may be
    /// shorter (a rest of one token is left out). A row of a `.jsonl` file has one of three forms, the same in the
    /// whole file; blank lines are skipped and other keys are ignored and reported:
    ///
    /// - `{"text": ".."}`: all tokens are learned.
    /// - `{"prompt": "..", "completion": ".."}`: both are tokenised together, and the tokens from the first one on in
    ///   which that differs from the prompt alone are learned.
    /// - `{"messages": [{"role": "..", "content": ".."}, ..]}`: rendered by the model's template; what the assistant
    ///   says is learned.
    ///
    /// # Errors
    /// [`Error::Data`] naming line and key for a row of no form or of several, of another form than the first, or that
    /// the tokenizer refuses; [`Error::File`] for an unknown extension, broken text and a data set without a token to
    /// learn; ids outside the vocabulary; options out of range; the operating system's refusal.
    pub fn open(path: impl AsRef<Path>, tokenizer: &dyn TokenizeText, options: &DataOptions) -> Result<Self> {
        Self::read_file(path.as_ref(), tokenizer, options)
    }

    fn read_file(path: &Path, tokenizer: &dyn TokenizeText, options: &DataOptions) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("txt") => {
                let text = String::from_utf8(read(path)?).map_err(|error| {
                    let field = format!("byte {}", error.utf8_error().valid_up_to());
                    Problem::new(field, "UTF-8 text", "other bytes").in_file(path)
                })?;
                let ids = tokenizer.encode(&text, options.add_special).map_err(|reason| {
                    Problem::new("text", "text that the tokenizer accepts", reason).in_file(path)
                })?;
                // Examples are copies: one of the text less meanwhile.
                drop(text);
                Self::stream(ids, options, |problem| problem.in_file(path))
            }
            Some("u16le") => {
                let bytes = read(path)?;
                if bytes.len() % 2 != 0 {
                    let problem = Problem::new("size", "an even number of bytes", bytes.len());
                    return Err(problem.in_file(path));
                }
                let ids = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]).into());
                Self::stream(ids.collect(), options, |problem| problem.in_file(path))
            }
            Some("jsonl") => Self::rows(path, tokenizer, options),
            other => {
                let expected = ".txt, .u16le or .jsonl";
                let found = other.map_or("none".to_owned(), |other| format!(".{other}"));
                Err(Problem::new("extension", expected, found).in_file(path))
            }
        }
    }

    /// One sequence of ids, cut into windows as [`open`](Self::open) cuts a text.
    ///
    /// # Errors
    /// [`Error::Argument`] for options out of range, fewer than two ids, or an id outside the vocabulary.
    pub fn from_ids(ids: Vec<u32>, options: &DataOptions) -> Result<Self> {
        Self::stream(ids, options, Problem::argument)
    }

    /// Examples made elsewhere; longer ones are treated as `options.long` says.
    ///
    /// # Errors
    /// [`Error::Argument`] for options out of range, a mask of another length than its ids, an id outside the
    /// vocabulary, or examples without a token to learn.
    pub fn from_examples(examples: impl IntoIterator<Item = Example>, options: &DataOptions) -> Result<Self> {
        let mut dataset = Self::empty(options)?;
        for (index, example) in examples.into_iter().enumerate() {
            dataset.push(example, index + 1, None).map_err(Problem::argument)?;
        }
        dataset.finished(Problem::argument)
    }

    fn empty(options: &DataOptions) -> Result<Self> {
        options.validate()?;
        Ok(Self { examples: Vec::new(), options: options.clone(), report: DataReport::default() })
    }

    fn stream(ids: Vec<u32>, options: &DataOptions, place: impl Fn(Problem) -> Error) -> Result<Self> {
        let options = DataOptions { long: LongSequences::Split, ..options.clone() };
        let mut dataset = Self::empty(&options)?;
        dataset.push(Example::all_scored(ids), 1, None).map_err(&place)?;
        dataset.finished(place)
    }

    fn rows(path: &Path, tokenizer: &dyn TokenizeText, options: &DataOptions) -> Result<Self> {
        let mut dataset = Self::empty(options)?;
        let mut first: Option<(usize, Form)> = None;
        let mut reader = BufReader::new(open(path)?);
        let mut text = Vec::new();
        for line in 1.. {
            text.clear();
            if reader.read_until(b'\n', &mut text).map_err(Error::io(path))? == 0 {
                break;
            }
            if line == 1 && text.starts_with(BYTE_ORDER_MARK) {
                text.drain(..BYTE_ORDER_MARK.len());
            }
            if text.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let place = |problem: Problem| problem.in_line(path, line);
            let (row, ignored) = Row::parse(&text).map_err(place)?;
            let (first_line, form) = *first.get_or_insert((line, row.form()));
            if row.form() != form {
                let expected = format!("{}, as in line {first_line}", form.keys());
                return Err(place(Problem::new("form of the row", expected, row.form().keys())));
            }
            dataset.report.ignored_fields.extend(ignored);
            let example = row.encode(tokenizer, options).map_err(place)?;
            dataset.push(example, line, row.drop_reason()).map_err(place)?;
        }
        dataset.finished(|problem| problem.in_file(path))
    }

    /// Adds the row of `line`; `reason` is why it has no token to learn, where that is known.
    fn push(
        &mut self,
        example: Example,
        line: usize,
        reason: Option<DropReason>,
    ) -> std::result::Result<(), Problem> {
        let DataOptions { seq_len, vocab_size, long, .. } = self.options;
        let length = example.ids.len();
        if example.scored.len() != length {
            return Err(Problem::new("mask", format!("{length} entries, one per id"), example.scored.len()));
        }
        if let Some((index, id)) = example.ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size)
        {
            return Err(Problem::new(format!("token {index}"), format!("an id below {vocab_size}"), id));
        }
        self.report.rows += 1;
        let (kept, first) = (self.examples.len(), example.first_target());
        match long {
            _ if length <= seq_len => self.keep(example),
            LongSequences::Error => {
                return Err(Problem::new("length", format!("at most {seq_len} tokens"), length));
            }
            LongSequences::Truncate => {
                self.report.truncated += 1;
                self.report.dropped_tokens += length - seq_len;
                let Example { mut ids, mut scored } = example;
                ids.truncate(seq_len);
                scored.truncate(seq_len);
                self.keep(Example { ids, scored });
            }
            LongSequences::Split => {
                self.report.split += 1;
                for (ids, scored) in example.ids.chunks(seq_len).zip(example.scored.chunks(seq_len)) {
                    self.keep(Example { ids: ids.into(), scored: scored.into() });
                }
            }
        }
        if self.examples.len() == kept {
            let reason = reason.unwrap_or(match first {
                Some(before) => DropReason::TooLong { before },
                None => DropReason::NoTarget,
            });
            self.report.dropped.push(DroppedRow { line, reason });
        }
        Ok(())
    }

    fn keep(&mut self, example: Example) {
        match example.targets() {
            0 => {
                self.report.without_targets += 1;
                self.report.dropped_tokens += example.ids.len();
            }
            targets => {
                self.report.examples += 1;
                self.report.tokens += example.ids.len();
                self.report.targets += targets;
                self.examples.push(example);
            }
        }
    }

    /// The data without a share of its examples, and that share: what to learn from, and what to score on.
    ///
    /// `share` of the examples, rounded, but at least one of each part; `seed` chooses which. Both keep the file's order,
    /// and their reports count their own examples only.
    ///
    /// # Errors
    /// [`Error::Argument`] for a share that is not between 0 and 1, or fewer than two examples.
    pub fn split(self, share: f64, seed: u64) -> Result<(Self, Self)> {
        let count = self.examples.len();
        if !(share > 0.0 && share < 1.0) {
            return Err(Problem::new("share", "a number between 0 and 1", share).argument());
        }
        if count < 2 {
            return Err(Problem::new("examples", "at least two to split", count).argument());
        }
        let held_out = ((count as f64 * share).round() as usize).clamp(1, count - 1);
        let mut is_held_out = vec![false; count];
        for index in permutation(count, seed, 0).into_iter().take(held_out) {
            is_held_out[index] = true;
        }
        let options = self.options;
        let part = |kept: bool| {
            let mut part =
                Self { examples: Vec::new(), options: options.clone(), report: DataReport::default() };
            for (example, held_out) in self.examples.iter().zip(&is_held_out) {
                if *held_out == kept {
                    part.report.rows += 1;
                    part.keep(example.clone());
                }
            }
            part
        };
        Ok((part(false), part(true)))
    }

    fn finished(self, place: impl Fn(Problem) -> Error) -> Result<Self> {
        if self.examples.is_empty() {
            let expected = "at least one example with a token to learn";
            return Err(place(Problem::new(
                "examples",
                expected,
                format!("none in {} rows", self.report.rows),
            )));
        }
        Ok(self)
    }

    /// The examples, in the file's order; never empty, each of 2 to `seq_len` tokens.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The first `count` examples that fill their `seq_len`, as texts to calibrate or measure a model on.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are fewer, or none are asked for.
    pub fn windows(&self, count: usize) -> Result<Windows> {
        let full = self.examples.iter().filter(|example| example.ids.len() == self.options.seq_len);
        let windows: Vec<Vec<u32>> = full.take(count).map(|example| example.ids.clone()).collect();
        if windows.len() < count || count == 0 {
            let expected = format!("at least 1 and at most the {} examples of full length", windows.len());
            return Err(Problem::new("windows", expected, count).argument());
        }
        Ok(Windows::new(windows)?)
    }

    /// The options they were made with.
    pub fn options(&self) -> &DataOptions {
        &self.options
    }

    /// What became of the rows.
    pub fn report(&self) -> &DataReport {
        &self.report
    }

    /// SHA-256 of all ids and masks, in hexadecimal: tells a resumed run whether it has the same data.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for example in &self.examples {
            hash.update((example.ids.len() as u64).to_le_bytes());
            for (id, scored) in example.ids.iter().zip(&example.scored) {
                hash.update(id.to_le_bytes());
                hash.update([u8::from(*scored)]);
            }
        }
        hex(hash.finalize())
    }
}

/// A regular file: a device could go on for ever.
fn open(path: &Path) -> Result<File> {
    let file = File::open(path).map_err(Error::io(path))?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Problem::new("type", "a regular file", "something else").in_file(path));
    }
    Ok(file)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(Error::io(path))?;
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    /// One token a byte; BOS is 256, a turn starts with 257 and ends with 258, and texts with `\0` are refused.
    pub(crate) struct Bytes;

    impl TokenizeText for Bytes {
        fn encode(&self, text: &str, add_special: bool) -> std::result::Result<Vec<u32>, String> {
            if text.contains('\0') {
                return Err("a zero byte".into());
            }
            Ok(add_special.then_some(256).into_iter().chain(text.bytes().map(u32::from)).collect())
        }

        fn chat(&self, messages: &[Message]) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
            let mut ids = Vec::new();
            let mut scored = Vec::new();
            for Message { role, content, .. } in messages {
                let said = matches!(role.as_str(), "assistant");
                if !said && role != "user" {
                    return Err(format!("unknown role {role}"));
                }
                ids.push(257);
                scored.push(false);
                ids.extend(content.bytes().map(u32::from).chain([258]));
                scored.resize(ids.len(), said);
            }
            Ok((ids, scored))
        }
    }

    fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn options(seq_len: usize) -> DataOptions {
        DataOptions::new(seq_len, 300)
    }

    fn jsonl(content: &str, options: &DataOptions) -> Result<Dataset> {
        let (_folder, path) = file("rows.jsonl", content);
        Dataset::open(&path, &Bytes, options)
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_text_becomes_consecutive_windows() {
        let (_folder, path) = file("text.txt", "abcdefghij");
        let dataset = Dataset::open(&path, &Bytes, &options(4)).unwrap();
        let windows: Vec<_> = dataset.examples().iter().map(|example| example.ids.clone()).collect();
        assert_eq!(windows, [vec![256, 97, 98, 99], ids("defg"), ids("hij")]);
        assert!(dataset.examples().iter().all(|example| example.scored.iter().all(|scored| *scored)));
        assert_eq!((dataset.report().tokens, dataset.report().targets), (11, 8));
        let mut plain = options(3);
        plain.add_special = false;
        let dataset = Dataset::open(&path, &Bytes, &plain).unwrap();
        assert_eq!(dataset.examples().len(), 3);
        assert_eq!(dataset.report().dropped_tokens, 1, "a rest of one token predicts nothing");
    }

    #[test]
    fn ids_are_read_as_they_are() {
        let (_folder, path) = file("ids.u16le", [1, 0, 2, 1, 3, 0, 4, 0]);
        let dataset = Dataset::open(&path, &Bytes, &options(3)).unwrap();
        assert_eq!(dataset.examples()[0].ids, [1, 258, 3]);
        assert_eq!(dataset.report().dropped_tokens, 1);
        assert_eq!(dataset, Dataset::from_ids(vec![1, 258, 3, 4], &options(3)).unwrap());
    }

    #[test]
    fn text_rows_are_learned_whole_and_end_in_eos() {
        let mut options = options(9);
        options.eos = Some(299);
        let dataset = jsonl("{\"text\": \"ab\"}\n\n{\"text\": \"cdé\", \"id\": 7}", &options).unwrap();
        assert_eq!(dataset.examples()[0], Example::all_scored(vec![256, 97, 98, 299]));
        assert_eq!(dataset.examples()[1].ids, [256, 99, 100, 195, 169, 299]);
        assert_eq!(dataset.report().rows, 2);
        assert_eq!(dataset.report().ignored_fields, BTreeSet::from(["id".to_owned()]));
    }

    #[test]
    fn only_completions_are_learned() {
        let mut options = options(9);
        options.eos = Some(299);
        let dataset = jsonl(r#"{"prompt": "ab", "completion": "cd"}"#, &options).unwrap();
        assert_eq!(dataset.examples()[0].ids, [256, 97, 98, 99, 100, 299]);
        assert_eq!(dataset.examples()[0].scored, [false, false, false, true, true, true]);
        assert_eq!(dataset.report().targets, 3);
    }

    #[test]
    fn a_token_across_prompt_and_completion_is_learned() {
        struct Pairs;
        impl TokenizeText for Pairs {
            fn encode(&self, text: &str, _: bool) -> std::result::Result<Vec<u32>, String> {
                Ok(text
                    .as_bytes()
                    .chunks(2)
                    .map(|pair| pair.iter().map(|byte| u32::from(*byte)).sum())
                    .collect())
            }
            fn chat(&self, _: &[Message]) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
                Err("no template".into())
            }
        }
        let (_folder, path) = file("rows.jsonl", r#"{"prompt": "abc", "completion": "de"}"#);
        let dataset = Dataset::open(&path, &Pairs, &options(9)).unwrap();
        assert_eq!(dataset.examples()[0].ids, [97 + 98, 99 + 100, 101]);
        assert_eq!(dataset.examples()[0].scored, [false, true, true]);
    }

    #[test]
    fn only_the_assistant_is_learned() {
        let row =
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}"#;
        let mut options = options(16);
        options.eos = Some(299);
        let dataset = jsonl(row, &options).unwrap();
        assert_eq!(
            dataset.examples()[0].ids,
            [257, 97, 258, 257, 98, 99, 258],
            "no eos beside the template's own end"
        );
        assert_eq!(dataset.examples()[0].scored, [false, false, false, false, true, true, true]);
    }

    #[test]
    fn long_rows_are_cut_split_or_refused_and_counted() {
        let rows = "{\"text\": \"abcdef\"}\n{\"text\": \"xy\"}";
        let mut options = options(3);
        options.add_special = false;
        let cut = jsonl(rows, &options).unwrap();
        assert_eq!(cut.examples()[0].ids, ids("abc"));
        assert_eq!((cut.report().truncated, cut.report().dropped_tokens, cut.report().examples), (1, 3, 2));
        options.long = LongSequences::Split;
        let split = jsonl(rows, &options).unwrap();
        assert_eq!(split.examples()[1].ids, ids("def"));
        assert_eq!((split.report().split, split.report().dropped_tokens, split.report().examples), (1, 0, 3));
        options.long = LongSequences::Error;
        let error = jsonl(rows, &options).unwrap_err();
        assert!(matches!(&error, Error::Data { line: 1, field, .. } if field == "length"), "{error}");
    }

    #[test]
    fn prompts_that_leave_no_room_are_left_out_and_counted() {
        let rows =
            "{\"prompt\": \"abcdef\", \"completion\": \"g\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}";
        let dataset = jsonl(rows, &options(4)).unwrap();
        assert_eq!((dataset.examples().len(), dataset.report().without_targets), (1, 1));
        assert_eq!(dataset.report().dropped_tokens, 8);
        let report = dataset.report().to_string();
        let expected =
            "row in line 1 was left out: the 7 tokens before the first one to learn fill the sequence";
        assert!(report.contains(expected), "{report}");
    }

    #[test]
    fn rows_without_an_assistant_are_left_out_by_line() {
        let chat = |role| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "{role}", "content": "b"}}]}}"#
            )
        };
        let rows = format!("\u{feff}{}\n\n{}\n", chat("assistant"), chat("user"));
        let dataset = jsonl(&rows, &options(16)).unwrap();
        assert_eq!(dataset.examples().len(), 1);
        let reason = DropReason::NoAssistant { roles: vec!["user".into(), "user".into()] };
        assert_eq!(dataset.report().dropped, [DroppedRow { line: 3, reason }]);
        let report = dataset.report().to_string();
        assert!(report.contains("line 3") && report.contains("the roles are user, user"), "{report}");
    }

    #[test]
    fn fields_of_messages_reach_the_template() {
        struct Named;
        impl TokenizeText for Named {
            fn encode(&self, _: &str, _: bool) -> std::result::Result<Vec<u32>, String> {
                Err("chats only".into())
            }
            fn chat(&self, messages: &[Message]) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
                let named = messages.iter().filter(|message| message.extra["name"] == "Ada").count();
                Ok((vec![1, named as u32], vec![true; 2]))
            }
        }
        let row = r#"{"messages": [{"role": "assistant", "content": "a", "name": "Ada"}]}"#;
        let (_folder, path) = file("rows.jsonl", row);
        assert_eq!(Dataset::open(&path, &Named, &options(9)).unwrap().examples()[0].ids, [1, 1]);
    }

    #[test]
    fn windows_are_the_first_full_examples() {
        let data = Dataset::from_ids((0..25).collect(), &options(10)).unwrap();
        assert_eq!(data.windows(2).unwrap().length(), 10);
        for count in [0, 3] {
            assert!(data.windows(count).unwrap_err().to_string().starts_with("windows"));
        }
    }

    #[test]
    fn a_split_gives_every_example_to_one_part() {
        let all = Dataset::from_ids((0..200).collect(), &options(10)).unwrap();
        let (train, held_out) = all.clone().split(0.25, 3).unwrap();
        assert_eq!((train.examples().len(), held_out.examples().len()), (15, 5));
        assert_eq!((train.report().targets, held_out.report().examples), (15 * 9, 5));
        let mut firsts: Vec<u32> =
            train.examples().iter().chain(held_out.examples()).map(|example| example.ids[0]).collect();
        assert!(train.examples().is_sorted_by_key(|example| example.ids[0]));
        firsts.sort_unstable();
        assert_eq!(firsts, (0..20).map(|i| 10 * i).collect::<Vec<u32>>());
        assert_eq!(all.clone().split(0.25, 3).unwrap().1, held_out);
        assert_ne!(all.clone().split(0.25, 4).unwrap().1, held_out);
        assert_eq!(all.clone().split(1e-9, 3).unwrap().1.examples().len(), 1);
        for share in [0.0, 1.0, f64::NAN, -0.5] {
            assert!(all.clone().split(share, 3).unwrap_err().to_string().starts_with("share"));
        }
        let one = Dataset::from_ids(vec![1, 2], &options(10)).unwrap();
        assert!(one.split(0.5, 0).unwrap_err().to_string().starts_with("examples"));
    }

    #[test]
    fn bad_rows_name_line_and_field() {
        let good = r#"{"text": "abc"}"#;
        let cases = [
            (r#"{"text": 3}"#, "text"),
            (r#"{"text": null}"#, "text"),
            (r#"{"id": 3}"#, "text"),
            ("{}", "text"),
            ("[]", "row"),
            ("{\"text\"", "row"),
            ("nonsense", "row"),
            (r#"{"text": "a", "messages": []}"#, "messages"),
            (r#"{"text": "a", "prompt": "b", "completion": "c"}"#, "prompt"),
            (r#"{"prompt": "b"}"#, "completion"),
            (r#"{"completion": "b"}"#, "prompt"),
            (r#"{"prompt": "b", "completion": 1}"#, "completion"),
            (r#"{"messages": []}"#, "messages"),
            (r#"{"messages": "hi"}"#, "messages"),
            (r#"{"messages": [3]}"#, "messages[0]"),
            (r#"{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}"#, "messages[1]"),
            (r#"{"messages": [{"role": "user", "content": null, "tool_calls": []}]}"#, "messages[0]"),
            (r#"{"text": "a\u0000"}"#, "text"),
            (r#"{"prompt": "b", "completion": "c"}"#, "form"),
        ];
        for (row, name) in cases {
            let error = jsonl(&format!("{good}\n\n{row}\n{good}"), &options(9)).unwrap_err();
            let named = matches!(&error, Error::Data { line: 3, field, .. } if field.starts_with(name));
            assert!(named, "{row}: {error}");
        }
        let error = jsonl(r#"{"messages": [{"role": "robot", "content": "a"}]}"#, &options(9)).unwrap_err();
        assert!(error.to_string().contains("line 1: messages: "), "{error}");
        assert!(error.to_string().ends_with("found unknown role robot"), "{error}");
    }

    #[test]
    fn empty_data_sets_and_unknown_files_are_errors() {
        for (name, content) in [
            ("a.jsonl", ""),
            ("a.jsonl", "\n \n"),
            ("a.jsonl", r#"{"text": ""}"#),
            ("a.txt", ""),
            ("a.u16le", ""),
            ("a.u16le", "ab"),
            ("a.u16le", "abc"),
            ("a.csv", "a,b"),
            ("a", "abc"),
        ] {
            let (_folder, path) = file(name, content);
            let error = Dataset::open(&path, &Bytes, &DataOptions::new(8, 1 << 16)).unwrap_err();
            assert!(matches!(&error, Error::File { .. }), "{name} {content:?}: {error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        let (folder, path) = file("a.txt", [b'a', 0xff]);
        let error = Dataset::open(&path, &Bytes, &options(8)).unwrap_err();
        assert!(error.to_string().contains("byte 1"), "{error}");
        assert!(matches!(
            Dataset::open(path.with_extension("jsonl"), &Bytes, &options(8)),
            Err(Error::Io { .. })
        ));
        let folder_named_txt = folder.path().join("b.txt");
        std::fs::create_dir(&folder_named_txt).unwrap();
        assert!(Dataset::open(&folder_named_txt, &Bytes, &options(8)).is_err());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_named() {
        let (_folder, path) = file("a.u16le", [1, 0, 44, 1]);
        let error = Dataset::open(&path, &Bytes, &options(8)).unwrap_err();
        assert!(error.to_string().contains("token 1: expected an id below 300, found 300"), "{error}");
        let error = jsonl(r#"{"text": "abc"}"#, &DataOptions::new(8, 99)).unwrap_err();
        assert!(matches!(&error, Error::Data { line: 1, field, .. } if field == "token 0"), "{error}");
    }

    #[test]
    fn options_out_of_range_are_named() {
        assert!(Dataset::from_ids(vec![1, 2], &options(1)).unwrap_err().to_string().contains("seq_len"));
        let mut options = options(4);
        options.eos = Some(300);
        assert!(Dataset::from_ids(vec![1, 2], &options).unwrap_err().to_string().contains("eos"));
        let uneven = Example { ids: vec![1, 2], scored: vec![true] };
        assert!(
            Dataset::from_examples([uneven], &self::options(4)).unwrap_err().to_string().contains("mask")
        );
    }

    #[test]
    fn the_fingerprint_tells_data_apart() {
        let fingerprint = |ids: &[u32]| Dataset::from_ids(ids.to_vec(), &options(4)).unwrap().fingerprint();
        assert_eq!(fingerprint(&[1, 2, 3]), fingerprint(&[1, 2, 3]));
        assert_ne!(fingerprint(&[1, 2, 3]), fingerprint(&[1, 2, 4]));
        let mut masked = Example::all_scored(vec![1, 2, 3]);
        masked.scored[1] = false;
        let masked = Dataset::from_examples([masked], &options(4)).unwrap();
        assert_ne!(masked.fingerprint(), fingerprint(&[1, 2, 3]));
        assert_eq!(masked.fingerprint().len(), 64);
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_file_give_an_answer(
            content in prop::collection::vec(any::<u8>(), 0..120), name in "a\\.(txt|u16le|jsonl)",
        ) {
            let (_folder, path) = file(&name, content);
            let _ = Dataset::open(&path, &Bytes, &options(5));
        }

        #[test]
        fn no_token_is_lost_uncounted(
            lengths in prop::collection::vec(0usize..20, 1..20), seq_len in 2usize..8, split: bool,
        ) {
            let mut options = options(seq_len);
            options.long = if split { LongSequences::Split } else { LongSequences::Truncate };
            let examples = lengths.iter().map(|length| Example::all_scored((0..*length as u32).collect()));
            if let Ok(dataset) = Dataset::from_examples(examples, &options) {
                let report = dataset.report();
                prop_assert_eq!(report.tokens + report.dropped_tokens, lengths.iter().sum::<usize>());
                prop_assert_eq!(report.rows, lengths.len());
                prop_assert_eq!(report.examples, dataset.examples().len());
                prop_assert!(dataset.examples().iter().all(|e| (2..=seq_len).contains(&e.ids.len())));
            }
        }
    }
}
