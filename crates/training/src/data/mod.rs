//! Training data: token sequences with a mask of the tokens that are learned.

mod mixture;
mod preview;
mod report;
mod row;
mod source;
mod store;
mod values;

use std::{borrow::Cow, io::Read, path::Path, sync::OnceLock};

use kiln_models::Windows;
use kiln_quant_core::hash::hex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

pub use self::{
    preview::Preview,
    report::{DataReport, DropReason, DroppedRow},
    row::Form,
};
use self::{
    row::Row,
    source::{for_each_row, has_rows, open},
    store::{NewStore, Store},
    values::Values,
};
use crate::{
    Message,
    batch::permutation,
    error::{Error, Problem, Result},
};

/// What a template renders, and which messages are learned.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Conversation {
    /// The turns.
    pub messages: Vec<Message>,
    /// Variables of the template for this conversation: `tools`, and what a row's `chat_template_kwargs` hold.
    pub variables: Map<String, Value>,
    /// For each message whether it is learned, if it is the assistant's.
    pub learned: Vec<bool>,
}

impl Conversation {
    /// Turns of which all that the assistant says is learned.
    pub fn new(messages: Vec<Message>) -> Self {
        let learned = vec![true; messages.len()];
        Self { messages, variables: Map::new(), learned }
    }
}

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

    /// The ids of a conversation in the model's own template, and for each whether it is a part of a message of the
    /// assistant that is learned.
    ///
    /// # Errors
    /// A conversation that the template refuses, in words.
    fn chat(&self, conversation: &Conversation) -> std::result::Result<(Vec<u32>, Vec<bool>), String>;

    /// Whether there is a template.
    fn has_chat(&self) -> bool {
        true
    }
}

/// A token sequence. `scored[i]` tells whether predicting `ids[i]` from the tokens before it is learned; of the first
/// token it has no effect, because nothing comes before it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// As long as `ids`.
    pub scored: Vec<bool>,
    /// What its losses are multiplied by; above 0.
    pub weight: f32,
    /// Whether it is a good answer, for losses on answers with labels.
    pub label: Option<bool>,
    /// The class of the text, from 0, or a number, which a [`Classifier`](kiln_models::Classifier) says at its last token. No
    /// token is then learned, and `scored` has no effect.
    pub value: Option<f32>,
}

impl Example {
    /// A sequence of weight 1 of which the tokens with a flag are learned.
    pub fn new(ids: Vec<u32>, scored: Vec<bool>) -> Self {
        Self { ids, scored, weight: 1.0, label: None, value: None }
    }

    /// A sequence of which every token is learned.
    pub fn all_scored(ids: Vec<u32>) -> Self {
        let scored = vec![true; ids.len()];
        Self::new(ids, scored)
    }

    /// A prompt and its answer, which is learned.
    pub fn answer(prompt: &[u32], answer: &[u32]) -> Self {
        let scored = [vec![false; prompt.len()], vec![true; answer.len()]].concat();
        Self::new([prompt, answer].concat(), scored)
    }

    /// A text of a class, from 0, or of a number.
    pub fn valued(ids: Vec<u32>, value: f32) -> Self {
        let scored = vec![false; ids.len()];
        Self { value: Some(value), ..Self::new(ids, scored) }
    }

    /// Sets `label`.
    #[must_use]
    pub fn with_label(mut self, label: bool) -> Self {
        self.label = Some(label);
        self
    }

    /// Sets `weight`.
    #[must_use]
    pub fn with_weight(mut self, weight: f32) -> Self {
        self.weight = weight;
        self
    }

    pub(crate) fn targets(&self) -> usize {
        if self.value.is_some() {
            return usize::from(!self.ids.is_empty());
        }
        self.scored.iter().skip(1).filter(|scored| **scored).count()
    }

    /// Index of the first token that is learned.
    pub(crate) fn first_target(&self) -> Option<usize> {
        if self.value.is_some() {
            return None;
        }
        self.scored.iter().skip(1).position(|scored| *scored).map(|index| index + 1)
    }

    fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.scored.truncate(length);
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
    /// It becomes several examples of `seq_len` consecutive tokens and a rest; pairs and answers with labels can't.
    Split,
    /// It is an error.
    Error,
}

/// Which of the assistant's messages of a conversation are learned; those of weight 0 never are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Learned {
    /// All of them.
    #[default]
    AllAnswers,
    /// The last one.
    LastAnswer,
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
/// | `form` | by the keys | the rows' form | |
/// | `learned` | all answers | which answers of a conversation are learned | |
/// | `max_prompt` | none | most tokens before the first learned one; of more, the last are kept | at least 1 |
/// | `max_answer` | none | most tokens from the first learned one on; of more, the first are kept | at least 1 |
/// | `classes` | none | names of classes, for labels that are texts: the first is class 0 | distinct |
///
/// A row is cut to `max_prompt` first, then to `max_answer`, then treated as `long` says. The two limits don't touch texts with
/// classes or numbers.
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
    /// The rows' form; by their keys if left out.
    #[serde(default)]
    pub form: Option<Form>,
    /// Which answers of a conversation are learned.
    #[serde(default)]
    pub learned: Learned,
    /// Most tokens before the first learned one.
    #[serde(default)]
    pub max_prompt: Option<usize>,
    /// Most tokens from the first learned one on.
    #[serde(default)]
    pub max_answer: Option<usize>,
    /// Names of classes, for labels that are texts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
}

impl DataOptions {
    /// Examples of at most `seq_len` tokens below `vocab_size`; everything else as in the table.
    pub fn new(seq_len: usize, vocab_size: usize) -> Self {
        Self {
            seq_len,
            vocab_size,
            eos: None,
            add_special: true,
            long: LongSequences::default(),
            form: None,
            learned: Learned::default(),
            max_prompt: None,
            max_answer: None,
            classes: Vec::new(),
        }
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

    /// Sets `form`.
    #[must_use]
    pub fn with_form(mut self, form: Form) -> Self {
        self.form = Some(form);
        self
    }

    /// Sets `learned`.
    #[must_use]
    pub fn with_learned(mut self, learned: Learned) -> Self {
        self.learned = learned;
        self
    }

    /// Sets `max_prompt`.
    #[must_use]
    pub fn with_max_prompt(mut self, max_prompt: usize) -> Self {
        self.max_prompt = Some(max_prompt);
        self
    }

    /// Sets `max_answer`.
    #[must_use]
    pub fn with_max_answer(mut self, max_answer: usize) -> Self {
        self.max_answer = Some(max_answer);
        self
    }

    /// Sets `classes`: a label that is one of these texts is the class of its place.
    #[must_use]
    pub fn with_classes<S: Into<String>>(mut self, classes: impl IntoIterator<Item = S>) -> Self {
        self.classes = classes.into_iter().map(Into::into).collect();
        self
    }

    fn validate(&self) -> Result<()> {
        let twice = |(index, class): &(usize, &String)| self.classes[..*index].contains(class);
        if let Some((_, class)) = self.classes.iter().enumerate().find(twice) {
            return Err(Problem::new("classes", "distinct names", format!("\"{class}\" twice")).argument());
        }
        if self.seq_len < 2 {
            let expected = "at least 2 tokens, one to see and one to predict";
            return Err(Problem::new("seq_len", expected, self.seq_len).argument());
        }
        for (name, limit) in [("max_prompt", self.max_prompt), ("max_answer", self.max_answer)] {
            if limit == Some(0) {
                return Err(Problem::new(name, "at least 1", 0).argument());
            }
        }
        match self.eos {
            Some(eos) if eos as usize >= self.vocab_size => {
                Err(Problem::new("eos", format!("an id below {}", self.vocab_size), eos).argument())
            }
            _ => Ok(()),
        }
    }
}

/// The examples of a file, ready to be batched.
///
/// They are in memory, or, after [`open_on_disk`](Self::open_on_disk), in a file of tokens that is read by position.
#[derive(Debug, Clone)]
pub struct Dataset {
    store: Store,
    /// Whether each two examples are a pair.
    is_pairs: bool,
    has_weights: bool,
    has_labels: bool,
    /// Of texts with classes or numbers.
    values: Option<Values>,
    options: DataOptions,
    report: DataReport,
    /// What each epoch has of a mixture's parts.
    parts: Option<Vec<mixture::Part>>,
    fingerprint: OnceLock<String>,
}

/// A data set that is being made.
struct Builder {
    store: NewStore,
    is_pairs: bool,
    has_weights: bool,
    /// Examples with labels.
    labels: usize,
    values: Values,
    options: DataOptions,
    report: DataReport,
}

/// What ends the making of a data set: something about the row at hand, or anything else.
enum Refused {
    Row(Problem),
    Other(Error),
}

impl Refused {
    fn at(self, place: impl FnOnce(Problem) -> Error) -> Error {
        match self {
            Self::Row(problem) => place(problem),
            Self::Other(error) => error,
        }
    }
}

impl Dataset {
    /// Reads a file by its extension.
    ///
    /// A `.txt` file (one text) or `.u16le` file (ids as little-endian 16-bit numbers) is one sequence, cut into
    /// consecutive windows of `seq_len` tokens; the last may be shorter (a rest of one token is left out). The rows of
    /// `.jsonl` (a row a line; blank lines are skipped), `.json` (a list of rows, or an object with one) and `.parquet`
    /// files (feature `parquet`) are all of one [`Form`], that of the first, if the options don't name it. Keys that the
    /// form doesn't have are ignored and reported.
    ///
    /// Prompt and completion are tokenised together, and the tokens from the first one on in which that differs from the
    /// prompt alone are learned. Conversations are rendered by the model's template; what the assistant says is learned.
    ///
    /// # Errors
    /// [`Error::Data`] naming line and key for a row of no form or of several, of another form than the first, or that
    /// the tokenizer refuses; [`Error::File`] for an unknown extension, broken text and a data set without a token to
    /// learn; ids outside the vocabulary; options out of range; the operating system's refusal.
    pub fn open(path: impl AsRef<Path>, tokenizer: &dyn TokenizeText, options: &DataOptions) -> Result<Self> {
        Self::read_file(path.as_ref(), tokenizer, Builder::new(NewStore::in_memory(), options)?)
    }

    /// As [`open`](Self::open); the tokens go to a nameless file in `folder`, which is gone with the data set, and are read
    /// from there when they are needed. Rows are read one at a time, so that memory holds 8 bytes for each example; a `.txt` or
    /// `.u16le` file is read whole first.
    ///
    /// # Errors
    /// As [`open`](Self::open), and the operating system's refusal of that file.
    pub fn open_on_disk(
        path: impl AsRef<Path>,
        tokenizer: &dyn TokenizeText,
        options: &DataOptions,
        folder: impl AsRef<Path>,
    ) -> Result<Self> {
        let store = NewStore::on_disk(folder.as_ref())?;
        Self::read_file(path.as_ref(), tokenizer, Builder::new(store, options)?)
    }

    fn read_file(path: &Path, tokenizer: &dyn TokenizeText, builder: Builder) -> Result<Self> {
        let in_file = |problem: Problem| problem.in_file(path);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("txt") => {
                let text = String::from_utf8(read(path)?).map_err(|error| {
                    let field = format!("byte {}", error.utf8_error().valid_up_to());
                    Problem::new(field, "UTF-8 text", "other bytes").in_file(path)
                })?;
                let ids = tokenizer.encode(&text, builder.options.add_special).map_err(|reason| {
                    Problem::new("text", "text that the tokenizer accepts", reason).in_file(path)
                })?;
                // Examples are copies: one of the text less meanwhile.
                drop(text);
                builder.stream(ids, in_file)
            }
            Some("u16le") => {
                let bytes = read(path)?;
                if bytes.len() % 2 != 0 {
                    let problem = Problem::new("size", "an even number of bytes", bytes.len());
                    return Err(problem.in_file(path));
                }
                let ids = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]).into());
                builder.stream(ids.collect(), in_file)
            }
            Some(extension) if has_rows(extension) => builder.rows(path, extension, tokenizer),
            other => {
                let expected = ".txt, .u16le, .jsonl, .json or .parquet";
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
        Builder::new(NewStore::in_memory(), options)?.stream(ids, Problem::argument)
    }

    /// Examples made elsewhere; longer ones are treated as the options say.
    ///
    /// # Errors
    /// [`Error::Argument`] for options out of range, a mask of another length than its ids, an id outside the
    /// vocabulary, a weight that isn't finite and at least 0, labels of some but not all, or examples without a token to
    /// learn.
    pub fn from_examples(examples: impl IntoIterator<Item = Example>, options: &DataOptions) -> Result<Self> {
        let mut builder = Builder::new(NewStore::in_memory(), options)?;
        for (index, example) in examples.into_iter().enumerate() {
            builder.push(vec![example], index + 1, None).map_err(|refused| refused.at(Problem::argument))?;
        }
        builder.finished(Problem::argument)
    }

    /// Pairs made elsewhere: of each the chosen answer with its prompt, and the rejected one with the same.
    ///
    /// # Errors
    /// As [`from_examples`](Self::from_examples), and for pairs that would have to be split.
    pub fn from_pairs(pairs: impl IntoIterator<Item = [Example; 2]>, options: &DataOptions) -> Result<Self> {
        let mut builder = Builder::new(NewStore::in_memory(), options)?;
        builder.is_pairs = true;
        for (index, pair) in pairs.into_iter().enumerate() {
            builder.push(pair.into(), index + 1, None).map_err(|refused| refused.at(Problem::argument))?;
        }
        builder.finished(Problem::argument)
    }

    /// The data without a share of its examples, and that share: what to learn from, and what to score on.
    ///
    /// `share` of the examples (or pairs), rounded, but at least one of each part; `seed` chooses which. Both keep the
    /// file's order, and their reports count their own examples only.
    ///
    /// # Errors
    /// [`Error::Argument`] for a share that is not between 0 and 1, fewer than two examples, or a mixture, whose parts are to
    /// be split before; a file of tokens that can't be read.
    pub fn split(self, share: f64, seed: u64) -> Result<(Self, Self)> {
        let count = self.units();
        if self.parts.is_some() {
            return Err(
                Problem::new("data", "a set that is no mixture: its parts can be split", "one").argument()
            );
        }
        if !(share > 0.0 && share < 1.0) {
            return Err(Problem::new("share", "a number between 0 and 1", share).argument());
        }
        if count < 2 {
            return Err(Problem::new("examples", "at least two to split", count).argument());
        }
        let held_out = ((count as f64 * share).round() as usize).clamp(1, count - 1);
        let mut is_held_out = vec![false; count];
        for index in permutation(count, seed, 0).into_iter().take(held_out) {
            is_held_out[index as usize] = true;
        }
        let part = |kept: bool| -> Result<Self> {
            let units = (0..count).filter(|unit| is_held_out[*unit] == kept);
            let indices: Vec<usize> = units.flat_map(|unit| self.unit(unit)).collect();
            self.part(&indices)
        };
        Ok((part(false)?, part(true)?))
    }

    fn part(&self, indices: &[usize]) -> Result<Self> {
        let store = self.store.part(indices);
        let mut report = DataReport { rows: indices.len() / self.unit_size(), ..DataReport::default() };
        for index in 0..store.len() {
            let example = store.get(index)?;
            report.examples += 1;
            report.tokens += example.ids.len();
            report.targets += example.targets();
            report.values += usize::from(example.value.is_some());
        }
        let Self { is_pairs, has_weights, has_labels, values, .. } = *self;
        let options = self.options.clone();
        let (parts, fingerprint) = (None, OnceLock::new());
        Ok(Self { store, is_pairs, has_weights, has_labels, values, options, report, parts, fingerprint })
    }

    /// Number of examples; never 0.
    #[allow(clippy::len_without_is_empty, reason = "there is no empty data set")]
    pub fn len(&self) -> usize {
        self.store.len()
    }

    /// Whether the examples are pairs: of each two, the first is better.
    pub fn is_pairs(&self) -> bool {
        self.is_pairs
    }

    /// Pairs, or examples.
    pub fn units(&self) -> usize {
        self.len() / self.unit_size()
    }

    fn unit_size(&self) -> usize {
        if self.is_pairs { 2 } else { 1 }
    }

    /// The examples of a pair, or one.
    pub(crate) fn unit(&self, unit: usize) -> std::ops::Range<usize> {
        let size = self.unit_size();
        unit * size..(unit + 1) * size
    }

    /// Whether the examples are labelled good or bad.
    pub fn has_labels(&self) -> bool {
        self.has_labels
    }

    /// Whether the examples are texts with classes or numbers.
    pub fn has_values(&self) -> bool {
        self.values.is_some()
    }

    /// The classes or numbers.
    pub(crate) fn values(&self) -> Option<Values> {
        self.values
    }

    /// Whether losses are to be multiplied by weights.
    pub(crate) fn has_weights(&self) -> bool {
        self.has_weights
    }

    /// Tokens of the longest example of a pair, or of an example.
    pub(crate) fn unit_tokens(&self, unit: usize) -> usize {
        self.unit(unit).map(|index| self.store.tokens(index)).max().unwrap_or(0)
    }

    /// An example, in the file's order, of 2 to `seq_len` tokens, or, with a class or a number, of 1 or more.
    ///
    /// # Errors
    /// A file of tokens that can't be read.
    ///
    /// # Panics
    /// If there is no such example.
    pub fn example(&self, index: usize) -> Result<Cow<'_, Example>> {
        self.store.get(index)
    }

    /// All examples, in the file's order.
    pub fn examples(&self) -> impl Iterator<Item = Result<Cow<'_, Example>>> {
        (0..self.len()).map(|index| self.example(index))
    }

    /// The first `count` examples that fill their `seq_len`, as texts to calibrate or measure a model on.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are fewer, or none are asked for.
    pub fn windows(&self, count: usize) -> Result<Windows> {
        let full = (0..self.len()).filter(|index| self.store.tokens(*index) == self.options.seq_len);
        let windows = full.take(count).map(|index| Ok(self.example(index)?.ids.clone()));
        let windows = windows.collect::<Result<Vec<Vec<u32>>>>()?;
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

    /// SHA-256 of all ids, masks, weights and labels, in hexadecimal: tells a resumed run whether it has the same data.
    /// Computed once.
    ///
    /// # Errors
    /// A file of tokens that can't be read.
    pub fn fingerprint(&self) -> Result<String> {
        if let Some(found) = self.fingerprint.get() {
            return Ok(found.clone());
        }
        let mut hash = Sha256::new();
        let mut bytes = Vec::new();
        for example in self.examples() {
            let example = example?;
            bytes.clear();
            bytes.extend((example.ids.len() as u64).to_le_bytes());
            for (id, scored) in example.ids.iter().zip(&example.scored) {
                bytes.extend(id.to_le_bytes());
                bytes.push(u8::from(*scored));
            }
            if self.has_weights || example.label.is_some() {
                bytes.extend(example.weight.to_le_bytes());
                bytes.push(example.label.map_or(2, u8::from));
            }
            if let Some(value) = example.value {
                bytes.extend(value.to_le_bytes());
            }
            hash.update(&bytes);
        }
        if self.is_pairs {
            hash.update("pairs");
        }
        if let Some(parts) = &self.parts {
            hash.update(format!("{parts:?}"));
        }
        let found = hex(hash.finalize());
        Ok(self.fingerprint.get_or_init(|| found).clone())
    }
}

impl Builder {
    fn new(store: NewStore, options: &DataOptions) -> Result<Self> {
        options.validate()?;
        let (options, report) = (options.clone(), DataReport::default());
        let values = Values::default();
        Ok(Self { store, is_pairs: false, has_weights: false, labels: 0, values, options, report })
    }

    fn stream(mut self, ids: Vec<u32>, place: impl Fn(Problem) -> Error) -> Result<Dataset> {
        let options = self.options.clone();
        self.options =
            DataOptions { long: LongSequences::Split, max_prompt: None, max_answer: None, ..options };
        self.push(vec![Example::all_scored(ids)], 1, None).map_err(|refused| refused.at(&place))?;
        self.finished(place)
    }

    fn rows(mut self, path: &Path, extension: &str, tokenizer: &dyn TokenizeText) -> Result<Dataset> {
        let mut first: Option<(usize, Form)> = None;
        for_each_row(path, extension, &mut |line, row| {
            let place = |problem: Problem| problem.in_line(path, line);
            let form = match self.options.form {
                Some(form) => form,
                None => Form::of(&row).map_err(place)?,
            };
            let (first_line, expected) = *first.get_or_insert((line, form));
            if form != expected {
                let expected = format!("{}, as in line {first_line}", expected.keys());
                return Err(place(Problem::new("form of the row", expected, form.keys())));
            }
            self.is_pairs = form == Form::Pair;
            let (row, ignored) = Row::parse(row, form, &self.options.classes).map_err(place)?;
            self.report.ignored_fields.extend(ignored);
            let examples = row.encode(tokenizer, &self.options).map_err(place)?;
            self.push(examples, line, row.drop_reason()).map_err(|refused| refused.at(place))
        })?;
        self.finished(|problem| problem.in_file(path))
    }

    /// Adds the row of `line`: an example, or a pair. `reason` is why nothing of it is learned, where that is known.
    fn push(
        &mut self,
        examples: Vec<Example>,
        line: usize,
        reason: Option<DropReason>,
    ) -> std::result::Result<(), Refused> {
        for example in &examples {
            self.check(example).map_err(Refused::Row)?;
        }
        self.report.rows += 1;
        let leave_out = |report: &mut DataReport, examples: &[Example], reason| {
            report.dropped_tokens += examples.iter().map(|example| example.ids.len()).sum::<usize>();
            report.drop_row(line, reason);
        };
        if let Some(reason) = reason {
            let nothing = matches!(reason, DropReason::NoAssistant { .. });
            self.report.without_targets += if nothing { examples.len() } else { 0 };
            leave_out(&mut self.report, &examples, reason);
            return Ok(());
        }
        if examples.iter().any(|example| example.weight == 0.0) {
            leave_out(&mut self.report, &examples, DropReason::NoWeight);
            return Ok(());
        }
        let first = examples.iter().map(Example::first_target).min().flatten();
        let (mut kept, mut cut) = (Vec::new(), 0);
        for example in examples {
            let (parts, tokens) = self.cut(example).map_err(Refused::Row)?;
            kept.push(parts);
            cut += tokens;
        }
        if cut > 0 {
            self.report.cut(line, cut);
        }
        let mut kept: Vec<Example> = kept.into_iter().flatten().collect();
        if self.is_pairs && kept.iter().any(|example| example.targets() == 0) {
            self.report.without_targets += kept.len();
            self.report.dropped_tokens += kept.iter().map(|example| example.ids.len()).sum::<usize>();
            kept.clear();
        }
        let before = self.store.len();
        for example in kept {
            self.keep(example).map_err(Refused::Other)?;
        }
        if self.store.len() == before {
            let reason = match first {
                Some(before) => DropReason::TooLong { before },
                None => DropReason::NoTarget,
            };
            self.report.drop_row(line, reason);
        }
        Ok(())
    }

    fn check(&self, example: &Example) -> std::result::Result<(), Problem> {
        let (length, vocab_size) = (example.ids.len(), self.options.vocab_size);
        if self.is_pairs && example.label.is_some() {
            return Err(Problem::new("label", "none, of a side of a pair", "one"));
        }
        if example.scored.len() != length {
            return Err(Problem::new("mask", format!("{length} entries, one per id"), example.scored.len()));
        }
        if !(example.weight.is_finite() && example.weight >= 0.0) {
            return Err(Problem::new("weight", "a finite number, at least 0", example.weight));
        }
        if self.is_pairs && example.value.is_some() {
            return Err(Problem::new("value", "none, of a side of a pair", "one"));
        }
        if let Some(value) = example.value.filter(|value| !value.is_finite()) {
            return Err(Problem::new("value", "a finite number", value));
        }
        match example.ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
            Some((index, id)) => {
                Err(Problem::new(format!("token {index}"), format!("an id below {vocab_size}"), id))
            }
            None => Ok(()),
        }
    }

    /// The parts of an example that fit the limits, and how many tokens were cut off.
    fn cut(&mut self, mut example: Example) -> std::result::Result<(Vec<Example>, usize), Problem> {
        let DataOptions { seq_len, long, max_prompt, max_answer, .. } = self.options;
        let whole = example.ids.len();
        if let Some(first) = example.first_target() {
            let over = first.saturating_sub(max_prompt.unwrap_or(first));
            example.ids.drain(..over);
            example.scored.drain(..over);
            let longest = max_answer.map_or(usize::MAX, |most| most.saturating_add(first - over));
            example.truncate(longest);
        }
        let length = example.ids.len();
        match long {
            _ if length <= seq_len => {}
            LongSequences::Error => {
                return Err(Problem::new("length", format!("at most {seq_len} tokens"), length));
            }
            LongSequences::Split if self.is_pairs || example.label.is_some() || example.value.is_some() => {
                return Err(Problem::new(
                    "length",
                    format!(
                        "at most {seq_len} tokens: answers that are compared, and texts of a class, can't be split"
                    ),
                    length,
                ));
            }
            LongSequences::Truncate => example.truncate(seq_len),
            LongSequences::Split => {
                self.report.split += 1;
                let parts = example.ids.chunks(seq_len).zip(example.scored.chunks(seq_len));
                let part = |(ids, scored): (&[u32], &[bool])| {
                    let Example { weight, label, value, .. } = example;
                    Example { ids: ids.into(), scored: scored.into(), weight, label, value }
                };
                return Ok((parts.map(part).collect(), whole - length));
            }
        }
        let cut = whole - example.ids.len();
        Ok((vec![example], cut))
    }

    fn keep(&mut self, example: Example) -> Result<()> {
        match example.targets() {
            0 => {
                self.report.without_targets += 1;
                self.report.dropped_tokens += example.ids.len();
            }
            targets => {
                self.report.examples += 1;
                self.report.tokens += example.ids.len();
                self.report.targets += targets;
                self.has_weights |= example.weight != 1.0;
                self.labels += usize::from(example.label.is_some());
                if let Some(value) = example.value {
                    self.values.add(value);
                    self.report.values += 1;
                }
                self.store.push(example)?;
            }
        }
        Ok(())
    }

    fn finished(self, place: impl Fn(Problem) -> Error) -> Result<Dataset> {
        let Self { store, is_pairs, has_weights, labels, values, options, report } = self;
        if store.len() == 0 {
            let expected = "at least one example with a token to learn";
            let mut found = format!("none in {} rows", report.rows);
            if let Some(DroppedRow { line, reason }) = report.dropped.first() {
                found.push_str(&format!("; of line {line}: {reason}"));
            }
            return Err(place(Problem::new("examples", expected, found)));
        }
        if labels != 0 && labels != store.len() {
            let expected = format!("labels of all {} examples, or of none", store.len());
            return Err(place(Problem::new("label", expected, labels)));
        }
        let count = values.count();
        if count != 0 && (count != store.len() || labels != 0) {
            let expected = format!("a class or number for all {} examples, or for none", store.len());
            return Err(place(Problem::new("value", expected, count)));
        }
        let (store, has_labels) = (store.finished()?, labels != 0);
        let values = (count != 0).then_some(values);
        let (parts, fingerprint) = (None, OnceLock::new());
        Ok(Dataset { store, is_pairs, has_weights, has_labels, values, options, report, parts, fingerprint })
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(Error::io(path))?;
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{collections::BTreeSet, path::PathBuf};

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

        fn chat(&self, conversation: &Conversation) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
            let mut ids = Vec::new();
            let mut scored = Vec::new();
            for (Message { role, content, .. }, learned) in
                conversation.messages.iter().zip(&conversation.learned)
            {
                let said = role == "assistant" && *learned;
                if role != "assistant" && role != "user" && role != "system" {
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

    fn all(dataset: &Dataset) -> Vec<Example> {
        dataset.examples().map(|example| example.unwrap().into_owned()).collect()
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn a_text_becomes_consecutive_windows() {
        let (_folder, path) = file("text.txt", "abcdefghij");
        let dataset = Dataset::open(&path, &Bytes, &options(4)).unwrap();
        let windows: Vec<_> = all(&dataset).into_iter().map(|example| example.ids).collect();
        assert_eq!(windows, [vec![256, 97, 98, 99], ids("defg"), ids("hij")]);
        assert!(all(&dataset).iter().all(|example| example.scored.iter().all(|scored| *scored)));
        assert_eq!((dataset.report().tokens, dataset.report().targets), (11, 8));
        let mut plain = options(3);
        plain.add_special = false;
        let dataset = Dataset::open(&path, &Bytes, &plain).unwrap();
        assert_eq!(dataset.len(), 3);
        assert_eq!(dataset.report().dropped_tokens, 1, "a rest of one token predicts nothing");
    }

    #[test]
    fn ids_are_read_as_they_are() {
        let (_folder, path) = file("ids.u16le", [1, 0, 2, 1, 3, 0, 4, 0]);
        let dataset = Dataset::open(&path, &Bytes, &options(3)).unwrap();
        assert_eq!(dataset.example(0).unwrap().ids, [1, 258, 3]);
        assert_eq!(dataset.report().dropped_tokens, 1);
        assert_eq!(all(&dataset), all(&Dataset::from_ids(vec![1, 258, 3, 4], &options(3)).unwrap()));
    }

    #[test]
    fn text_rows_are_learned_whole_and_end_in_eos() {
        let mut options = options(9);
        options.eos = Some(299);
        let dataset = jsonl("{\"text\": \"ab\"}\n\n{\"text\": \"cdé\", \"id\": 7}", &options).unwrap();
        assert_eq!(*dataset.example(0).unwrap(), Example::all_scored(vec![256, 97, 98, 299]));
        assert_eq!(dataset.example(1).unwrap().ids, [256, 99, 100, 195, 169, 299]);
        assert_eq!(dataset.report().rows, 2);
        assert_eq!(dataset.report().ignored_fields, BTreeSet::from(["id".to_owned()]));
    }

    #[test]
    fn only_completions_are_learned() {
        let mut options = options(9);
        options.eos = Some(299);
        let dataset = jsonl(r#"{"prompt": "ab", "completion": "cd"}"#, &options).unwrap();
        assert_eq!(dataset.example(0).unwrap().ids, [256, 97, 98, 99, 100, 299]);
        assert_eq!(dataset.example(0).unwrap().scored, [false, false, false, true, true, true]);
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
            fn chat(&self, _: &Conversation) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
                Err("no template".into())
            }
        }
        let (_folder, path) = file("rows.jsonl", r#"{"prompt": "abc", "completion": "de"}"#);
        let dataset = Dataset::open(&path, &Pairs, &options(9)).unwrap();
        assert_eq!(dataset.example(0).unwrap().ids, [97 + 98, 99 + 100, 101]);
        assert_eq!(dataset.example(0).unwrap().scored, [false, true, true]);
    }

    #[test]
    fn only_the_assistant_is_learned() {
        let row =
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]}"#;
        let mut options = options(16);
        options.eos = Some(299);
        let dataset = jsonl(row, &options).unwrap();
        assert_eq!(
            dataset.example(0).unwrap().ids,
            [257, 97, 258, 257, 98, 99, 258],
            "no eos beside the template's own end"
        );
        assert_eq!(dataset.example(0).unwrap().scored, [false, false, false, false, true, true, true]);
    }

    #[test]
    fn long_rows_are_cut_split_or_refused_and_counted() {
        let rows = "{\"text\": \"abcdef\"}\n{\"text\": \"xy\"}";
        let mut options = options(3);
        options.add_special = false;
        let cut = jsonl(rows, &options).unwrap();
        assert_eq!(cut.example(0).unwrap().ids, ids("abc"));
        assert_eq!((cut.report().truncated, cut.report().dropped_tokens, cut.report().examples), (1, 3, 2));
        options.long = LongSequences::Split;
        let split = jsonl(rows, &options).unwrap();
        assert_eq!(split.example(1).unwrap().ids, ids("def"));
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
        assert_eq!((dataset.len(), dataset.report().without_targets), (1, 1));
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
        assert_eq!(dataset.len(), 1);
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
            fn chat(
                &self,
                conversation: &Conversation,
            ) -> std::result::Result<(Vec<u32>, Vec<bool>), String> {
                let named =
                    conversation.messages.iter().filter(|message| message.extra["name"] == "Ada").count();
                Ok((vec![1, named as u32], vec![true; 2]))
            }
        }
        let row = r#"{"messages": [{"role": "assistant", "content": "a", "name": "Ada"}]}"#;
        let (_folder, path) = file("rows.jsonl", row);
        assert_eq!(Dataset::open(&path, &Named, &options(9)).unwrap().example(0).unwrap().ids, [1, 1]);
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
        let whole = Dataset::from_ids((0..200).collect(), &options(10)).unwrap();
        let (train, held_out) = whole.clone().split(0.25, 3).unwrap();
        assert_eq!((train.len(), held_out.len()), (15, 5));
        assert_eq!((train.report().targets, held_out.report().examples), (15 * 9, 5));
        let mut firsts: Vec<u32> =
            all(&train).iter().chain(&all(&held_out)).map(|example| example.ids[0]).collect();
        assert!(all(&train).is_sorted_by_key(|example| example.ids[0]));
        firsts.sort_unstable();
        assert_eq!(firsts, (0..20).map(|i| 10 * i).collect::<Vec<u32>>());
        assert_eq!(
            whole.clone().split(0.25, 3).unwrap().1.fingerprint().unwrap(),
            held_out.fingerprint().unwrap()
        );
        assert_ne!(
            whole.clone().split(0.25, 4).unwrap().1.fingerprint().unwrap(),
            held_out.fingerprint().unwrap()
        );
        assert_eq!(whole.clone().split(1e-9, 3).unwrap().1.len(), 1);
        for share in [0.0, 1.0, f64::NAN, -0.5] {
            assert!(whole.clone().split(share, 3).unwrap_err().to_string().starts_with("share"));
        }
        let one = Dataset::from_ids(vec![1, 2], &options(10)).unwrap();
        assert!(one.split(0.5, 0).unwrap_err().to_string().starts_with("examples"));
    }

    #[test]
    fn bad_rows_name_line_and_field() {
        let good = r#"{"text": "abc"}"#;
        let cases = [
            (r#"{"text": 3}"#, "text"),
            (r#"{"text": null}"#, "keys"),
            (r#"{"id": 3}"#, "keys"),
            ("{}", "keys"),
            ("[]", "row"),
            ("{\"text\"", "row"),
            ("nonsense", "row"),
            (r#"{"text": "a", "messages": []}"#, "keys"),
            (r#"{"text": "a", "prompt": "b", "completion": "c"}"#, "keys"),
            (r#"{"prompt": "b"}"#, "keys"),
            (r#"{"completion": "b"}"#, "keys"),
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
            let before = if name == "form" { good } else { "" };
            let error = jsonl(&format!("{before}\n\n{row}\n{good}"), &options(9)).unwrap_err();
            let named = matches!(&error, Error::Data { line: 3, field, .. } if field.starts_with(name));
            assert!(named, "{row}: {error}");
        }
        let error = jsonl(r#"{"messages": [{"role": "robot", "content": "a"}]}"#, &options(9)).unwrap_err();
        assert!(error.to_string().contains("line 1: messages: "), "{error}");
        assert!(error.to_string().ends_with("found unknown role robot"), "{error}");
    }

    #[test]
    fn lists_are_read_as_lines_are() {
        let rows =
            [r#"{"prompt": "ab", "completion": "cd"}"#, r#"{"prompt": "x", "completion": "y", "weight": 2}"#];
        let lines = jsonl(&rows.join("\n"), &options(9)).unwrap();
        let wrapped = format!(r#"{{"version": [1][0], "note": {{"a": [1]}}, "rows": [{}]}}"#, rows.join(","));
        let wrapped = wrapped.replace("[1][0]", "\"1\"");
        for content in [format!("[{}]", rows.join(",")), format!("\u{feff}[{}]", rows.join(",\n")), wrapped] {
            let (_folder, path) = file("rows.json", &content);
            let found = Dataset::open(&path, &Bytes, &options(9)).unwrap();
            assert_eq!(all(&found), all(&lines), "{content}");
        }
        for (content, name) in [
            ("[3]", "after row 0"),
            (r#"[{"text": "a"}, 3]"#, "after row 1"),
            (r#"[{"text": "a"}"#, "after row 1"),
            (r#"{"a": 3}"#, "after row 0"),
            (r#"{"a": [{"text": "a"}], "b": [{"text": "a"}]}"#, "after row"),
            ("3", "after row 0"),
            ("", "after row 0"),
        ] {
            let (_folder, path) = file("rows.json", content);
            let error = Dataset::open(&path, &Bytes, &options(9)).unwrap_err().to_string();
            assert!(error.contains(name), "{content}: {error}");
        }
        let (_folder, path) = file("rows.json", r#"[{"text": "a"}, {"text": 3}]"#);
        let error = Dataset::open(&path, &Bytes, &options(9)).unwrap_err();
        assert!(matches!(&error, Error::Data { line: 2, field, .. } if field == "text"), "{error}");
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn rows_of_tables_are_read() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/training/chat.parquet");
        let found = Dataset::open(path, &Bytes, &DataOptions::new(64, 300)).unwrap();
        let expected = jsonl(
            concat!(
                r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}"#,
                "\n",
                r#"{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}"#,
            ),
            &DataOptions::new(64, 300),
        );
        assert_eq!(all(&found), all(&expected.unwrap()));
    }

    #[test]
    fn prompts_and_answers_have_their_own_limits() {
        let row = r#"{"prompt": "abcdef", "completion": "ghijkl"}"#;
        let cut = jsonl(row, &options(20).with_max_prompt(3).with_max_answer(2)).unwrap();
        assert_eq!(cut.example(0).unwrap().ids, ids("defgh"), "the prompt's end, the answer's beginning");
        assert_eq!((cut.report().truncated, cut.report().dropped_tokens), (1, 8));
        assert_eq!(cut.report().truncated_lines, [1]);
        let pair = r#"{"prompt": "abcdef", "chosen": "gh", "rejected": "ijkl"}"#;
        let cut = jsonl(pair, &options(5).with_max_prompt(2)).unwrap();
        let sides: Vec<Vec<u32>> = all(&cut).into_iter().map(|example| example.ids).collect();
        assert_eq!(sides, [ids("efgh"), ids("efijk")]);
        let error = Dataset::from_ids(vec![1, 2], &options(5).with_max_answer(0)).unwrap_err().to_string();
        assert!(error.starts_with("max_answer"), "{error}");
    }

    #[test]
    fn pairs_that_lose_a_side_are_left_out_whole() {
        let rows = [
            r#"{"prompt": "abcdef", "chosen": "g", "rejected": "h"}"#,
            r#"{"prompt": "a", "chosen": "g", "rejected": "g"}"#,
            r#"{"prompt": "a", "chosen": "", "rejected": "g"}"#,
            r#"{"prompt": "a", "chosen": "b", "rejected": "g"}"#,
        ];
        let data = jsonl(&rows.join("\n"), &options(4)).unwrap();
        assert!(data.is_pairs() && data.units() == 1);
        let lines: Vec<usize> = data.report().dropped.iter().map(|row| row.line).collect();
        assert_eq!(lines, [1, 2, 3]);
        let (train, held_out) = {
            let pairs = (0..10u32).map(|i| [1, 2].map(|side| Example::answer(&[i], &[side, i])));
            Dataset::from_pairs(pairs, &options(4)).unwrap().split(0.3, 1).unwrap()
        };
        assert_eq!((train.units(), held_out.units(), held_out.len()), (7, 3, 6));
        for unit in 0..train.units() {
            let [a, b] = [2 * unit, 2 * unit + 1].map(|index| train.example(index).unwrap());
            assert_eq!((a.ids[0], a.ids[1], b.ids[1]), (b.ids[0], 1, 2), "sides stay together");
        }
    }

    #[test]
    fn the_last_answer_alone_or_those_with_a_weight() {
        let row = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
            {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]}"#
            .replace('\n', "");
        let learned = |options: &DataOptions| {
            let example = jsonl(&row, options).unwrap().example(0).unwrap().into_owned();
            let ids = example.ids.into_iter().zip(example.scored);
            ids.filter(|(_, scored)| *scored).map(|(id, _)| id).collect::<Vec<u32>>()
        };
        assert_eq!(learned(&options(32)), [100, 258, 102, 258]);
        assert_eq!(learned(&options(32).with_learned(Learned::LastAnswer)), [102, 258]);
    }

    #[test]
    fn a_set_on_disk_is_the_set_in_memory() {
        let rows: Vec<String> = (0..50)
            .map(|i| {
                format!(
                    r#"{{"prompt": "{}", "completion": "{i}", "label": {}, "weight": {}}}"#,
                    "x".repeat(i),
                    i % 2,
                    i + 1
                )
            })
            .collect();
        let (folder, path) = file("rows.jsonl", rows.join("\n"));
        let memory = Dataset::open(&path, &Bytes, &options(40)).unwrap();
        let disk = Dataset::open_on_disk(&path, &Bytes, &options(40), folder.path()).unwrap();
        assert_eq!(all(&disk), all(&memory));
        assert_eq!(disk.fingerprint().unwrap(), memory.fingerprint().unwrap());
        assert_eq!(disk.report(), memory.report());
        let ((a, b), (c, d)) = (disk.split(0.3, 1).unwrap(), memory.split(0.3, 1).unwrap());
        assert_eq!((all(&a), all(&b)), (all(&c), all(&d)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the file of tokens has no name");
        assert!(Dataset::open_on_disk(&path, &Bytes, &options(40), folder.path().join("none")).is_err());
    }

    #[test]
    fn a_mixture_gives_each_set_its_share_and_passes_over_nothing() {
        let set = |first: u32, count: u32| {
            Dataset::from_examples(
                (first..first + count).map(|id| Example::all_scored(vec![id, 299])),
                &options(4),
            )
            .unwrap()
        };
        let mixed = Dataset::mixture([(set(0, 6), 1.0), (set(100, 20), 2.0)]).unwrap();
        assert_eq!((mixed.units_in_epoch(), mixed.len()), (18, 26));
        for seed in [None, Some(7)] {
            let mut seen = BTreeSet::new();
            for epoch in 0..5 {
                let units = mixed.units_of(epoch, seed);
                assert_eq!(units.iter().filter(|unit| **unit < 6).collect::<BTreeSet<_>>().len(), 6);
                let many = units.iter().filter(|unit| **unit >= 6);
                assert_eq!(many.clone().count(), 12);
                seen.extend(many.copied());
                assert_eq!(seen.len(), (12 * (epoch as usize + 1)).min(20), "{seed:?} {epoch}");
            }
        }
        assert_ne!(mixed.units_of(0, Some(1)), mixed.units_of(0, Some(2)));
        assert!(mixed.clone().split(0.5, 0).is_err());
        assert!(Dataset::mixture([(mixed.clone(), 1.0)]).unwrap_err().to_string().starts_with("mixture:"));
        let pairs =
            Dataset::from_pairs([[Example::answer(&[1], &[2]), Example::answer(&[1], &[3])]], &options(4));
        for (parts, name) in [
            (vec![], "mixture"),
            (vec![(set(0, 3), 0.0)], "mixture.weight"),
            (vec![(set(0, 3), f64::NAN)], "mixture.weight"),
            (vec![(set(0, 3), 1.0), (set(0, 3), 100.0)], "mixture.weight"),
            (vec![(set(0, 3), 1.0), (pairs.unwrap(), 1.0)], "mixture"),
        ] {
            assert!(Dataset::mixture(parts).unwrap_err().to_string().starts_with(name), "{name}");
        }
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
        let uneven = Example::new(vec![1, 2], vec![true]);
        assert!(
            Dataset::from_examples([uneven], &self::options(4)).unwrap_err().to_string().contains("mask")
        );
    }

    #[test]
    fn the_fingerprint_tells_data_apart() {
        let fingerprint =
            |ids: &[u32]| Dataset::from_ids(ids.to_vec(), &options(4)).unwrap().fingerprint().unwrap();
        assert_eq!(fingerprint(&[1, 2, 3]), fingerprint(&[1, 2, 3]));
        assert_ne!(fingerprint(&[1, 2, 3]), fingerprint(&[1, 2, 4]));
        let mut masked = Example::all_scored(vec![1, 2, 3]);
        masked.scored[1] = false;
        let masked = Dataset::from_examples([masked], &options(4)).unwrap();
        assert_ne!(masked.fingerprint().unwrap(), fingerprint(&[1, 2, 3]));
        assert_eq!(masked.fingerprint().unwrap().len(), 64);
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
                prop_assert_eq!(report.examples, dataset.len());
                prop_assert!(all(&dataset).iter().all(|e| (2..=seq_len).contains(&e.ids.len())));
            }
        }
    }
}
