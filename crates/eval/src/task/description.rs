//! What a task is, as data: the harness's own keys, read from JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A task of the lm-evaluation-harness, described by its own keys; a file of it is JSON, which is also YAML, so that the
/// harness reads it too.
///
/// Templates are Jinja over a document's fields, with Python's methods and the filters of [`Task`](crate::Task); a
/// template that is a bare name is that field.
///
/// | key | default | meaning |
/// | --- | --- | --- |
/// | `task` | – | the name |
/// | `output_type` | – | [`OutputType`] |
/// | `dataset_path`, `dataset_name` | none | where [`DataFolder`](crate::DataFolder) looks |
/// | `dataset_kwargs` | none | `{"data_files": {"test": "file.jsonl"}}`, from the description's folder |
/// | `training_split`, `validation_split`, `test_split` | none | names of splits; test is scored, or else validation |
/// | `fewshot_split` | training, else validation, else test | where examples come from |
/// | `fewshot_config` | `{"sampler": "default"}` | how examples are drawn: `default` (at random) or `first_n` |
/// | `description` | empty | template of what goes before everything |
/// | `doc_to_text` | – | template of the question; a number picks one of the choices as context (Winogrande) |
/// | `doc_to_target` | – | template of the answer: a text, or the number of a choice |
/// | `doc_to_choice` | none | the choices: a list, a field, or an expression `{{ .. }}` that gives a list |
/// | `target_delimiter` | `" "` | between question and answer |
/// | `fewshot_delimiter` | `"\n\n"` | after an example |
/// | `num_fewshot` | 0 | examples, if the evaluation doesn't say |
/// | `metric_list` | – | [`MetricOptions`] |
/// | `filter_list` | one named `none` | what is made of a generated text ([`FilterPipeline`]) |
/// | `generation_kwargs` | stops at `fewshot_delimiter` | [`GenerationOptions`] |
/// | `document_id` | none | field with an id that no other document has; Kiln's own key |
/// | `original_text` | `doc_to_target` | template of the text whose words and bytes divide a rolling likelihood; Kiln's own key |
/// | `metadata` | none | anything, such as `{"version": 1.0}` |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskDescription {
    /// The name.
    pub task: String,
    /// What is asked of the model.
    pub output_type: OutputType,
    /// The data set's name, as on the Hugging Face hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_path: Option<String>,
    /// Its configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_name: Option<String>,
    /// Its files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_kwargs: Option<DatasetFiles>,
    /// Name of the training split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_split: Option<String>,
    /// Name of the validation split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_split: Option<String>,
    /// Name of the test split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_split: Option<String>,
    /// Name of the split that examples come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fewshot_split: Option<String>,
    /// How examples are drawn.
    #[serde(default)]
    pub fewshot_config: FewshotOptions,
    /// Template of what goes before everything.
    #[serde(default)]
    pub description: String,
    /// Template of the question.
    pub doc_to_text: String,
    /// Template of the answer.
    pub doc_to_target: String,
    /// The choices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doc_to_choice: Option<OneOrMany>,
    /// Between question and answer.
    #[serde(default = "space")]
    pub target_delimiter: String,
    /// After an example.
    #[serde(default = "blank_line")]
    pub fewshot_delimiter: String,
    /// Examples, if the evaluation doesn't say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_fewshot: Option<usize>,
    /// What is computed.
    pub metric_list: Vec<MetricOptions>,
    /// What is made of a generated text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filter_list: Vec<FilterPipeline>,
    /// How a text is generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation_kwargs: Option<GenerationOptions>,
    /// Field with an id that no other document has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document_id: Option<String>,
    /// Template of the text whose words and bytes divide a rolling likelihood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_text: Option<String>,
    /// Anything.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub metadata: serde_json::Value,
}

fn space() -> String {
    " ".into()
}

fn blank_line() -> String {
    "\n\n".into()
}

/// What is asked of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OutputType {
    /// The likelihood of each choice.
    MultipleChoice,
    /// The likelihood of the answer.
    Loglikelihood,
    /// The likelihood of a whole text.
    LoglikelihoodRolling,
    /// A text.
    GenerateUntil,
}

/// One text, or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    /// The texts.
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Many(texts) => texts,
        }
    }
}

/// Files by split.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetFiles {
    /// Paths from the description's folder.
    pub data_files: BTreeMap<String, OneOrMany>,
}

/// How examples are drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FewshotOptions {
    /// The order.
    #[serde(default)]
    pub sampler: Sampler,
}

/// The order in which examples are drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Sampler {
    /// At random, anew for each document.
    #[default]
    Default,
    /// The first of the split.
    FirstN,
}

/// A figure, and how it is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricOptions {
    /// Which.
    pub metric: Metric,
    /// The harness's name for how documents are put together; each metric has one, and no other is accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<String>,
    /// Whether more is better; known for each metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub higher_is_better: Option<bool>,
    /// Patterns that [`ExactMatch`](Metric::ExactMatch) deletes from both texts, one after another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub regexes_to_ignore: Vec<String>,
    /// Whether [`ExactMatch`](Metric::ExactMatch) takes capitals for small letters.
    #[serde(default)]
    pub ignore_case: bool,
    /// Whether it deletes ASCII punctuation.
    #[serde(default)]
    pub ignore_punctuation: bool,
    /// Whether it deletes digits.
    #[serde(default)]
    pub ignore_numbers: bool,
}

/// A figure. Names are the harness's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Metric {
    /// The likeliest choice is right; of a single answer, each token is the model's first choice.
    Acc,
    /// The same with log-likelihoods divided by the choices' characters.
    AccNorm,
    /// The same with log-likelihoods divided by the choices' UTF-8 bytes.
    AccBytes,
    /// The generated text is the answer; of choices, each token of the right one is the model's first choice.
    ExactMatch,
    /// F1 of the choices numbered 1.
    F1,
    /// Matthews's correlation of choices and answers.
    Mcc,
    /// `exp(-mean log-likelihood of an answer)`.
    Perplexity,
    /// `exp(-log-likelihood of all texts / words)`.
    WordPerplexity,
    /// `exp(-log-likelihood of all texts / bytes)`.
    BytePerplexity,
    /// `-log-likelihood of all texts / bytes / ln 2`.
    BitsPerByte,
}

/// What is made of a generated text before it is compared: functions one after another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterPipeline {
    /// Its name in reports.
    pub name: String,
    /// The functions.
    pub filter: Vec<Filter>,
}

/// A function on generated texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "function", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Filter {
    /// What a pattern matches: the whole, or its group, or the first of several groups that took part. Patterns are
    /// those of the crate `regex`.
    Regex {
        /// The pattern.
        #[serde(default = "numbers")]
        regex_pattern: String,
        /// Which match; negative ones count from the last, -1.
        #[serde(default)]
        group_select: i64,
        /// What stands for no match.
        #[serde(default = "invalid")]
        fallback: String,
    },
    /// The text without whitespace at its ends.
    RemoveWhitespace,
    /// In lower case.
    Lowercase,
    /// In upper case.
    Uppercase,
    /// The first of the generated texts; there is only one.
    TakeFirst,
}

fn numbers() -> String {
    r"#### (\-?[0-9\.\,]+)".into()
}

fn invalid() -> String {
    "[invalid]".into()
}

/// How a text is generated: greedily, until one of some texts appears.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerationOptions {
    /// Texts that end it and aren't part of it; the end-of-sequence token ends it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<OneOrMany>,
    /// Tokens at most.
    #[serde(default = "gen_toks")]
    pub max_gen_toks: usize,
    /// Must be false.
    #[serde(default)]
    pub do_sample: bool,
    /// Must be 0.
    #[serde(default)]
    pub temperature: f64,
}

fn gen_toks() -> usize {
    256
}
