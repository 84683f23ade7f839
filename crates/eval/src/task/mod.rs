//! Tasks: from rows of a data set to requests, and from answers to scores.

mod data;
mod description;
mod exact_match;
mod fewshot;
mod library;
#[cfg(feature = "parquet")]
mod parquet;
mod prepare;
mod score;
mod template;

use std::{
    fmt,
    path::{Path, PathBuf},
};

pub use data::{DataFolder, TaskData, read_documents};
pub use description::{
    DatasetFiles, FewshotOptions, Filter, FilterPipeline, GenerationOptions, Metric, MetricOptions,
    OneOrMany, OutputType, Sampler, TaskDescription,
};
pub use library::Group;
pub use prepare::{Gold, PreparedDocument, Requests};
pub use score::{Response, Score, Scored};
pub use template::Document;

use self::{
    exact_match::{Normalizer, Pipeline},
    template::{Template, Templates},
};
use crate::{Error, Result, error::Problem};

/// A task, ready to make requests of documents and scores of answers.
///
/// Templates know Jinja, Python's methods on strings, lists and dictionaries (`strip`, `split`, `capitalize`, `index`
/// and so on), and the filters `regex_replace(pattern, replacement)`, `wikihow_clean` (HellaSwag's preparation) and
/// `wikitext_detokenize` ([`detokenize`](crate::wikitext::detokenize)).
///
/// ```
/// use kiln_eval::{Requests, Task, TaskData};
/// let task = Task::from_json(r#"{
///     "task": "capitals",
///     "output_type": "multiple_choice",
///     "test_split": "test",
///     "doc_to_text": "The capital of {{ country }} is",
///     "doc_to_choice": "cities",
///     "doc_to_target": "answer",
///     "metric_list": [{"metric": "acc"}]
/// }"#)?;
/// let row = serde_json::json!({"country": "France", "cities": ["Lima", "Paris"], "answer": 1});
/// let data = TaskData { evaluated: vec![row.as_object().unwrap().clone()], ..TaskData::default() };
/// let documents = task.prepare(&data, 0, None, 1234)?;
/// let Requests::Pairs { contexts, continuations } = &documents[0].requests else { unreachable!() };
/// assert_eq!(contexts, &["The capital of France is"]);
/// assert_eq!(continuations, &[" Lima", " Paris"]);
/// # Ok::<(), kiln_eval::Error>(())
/// ```
#[derive(Debug)]
pub struct Task {
    description: TaskDescription,
    /// Where `data_files` are.
    folder: PathBuf,
    templates: Templates,
    text: Template,
    target: Template,
    choices: Option<Choices>,
    preamble: Template,
    original: Option<Template>,
    metrics: Vec<CompiledMetric>,
    filters: Vec<Pipeline>,
}

#[derive(Debug)]
enum Choices {
    Fixed(Vec<String>),
    Template(Template),
}

#[derive(Debug)]
struct CompiledMetric {
    metric: Metric,
    normalizer: Normalizer,
}

impl Task {
    /// Checks and compiles a description.
    ///
    /// # Errors
    /// [`Error::Task`] with the field that contradicts the others or doesn't compile.
    pub fn new(description: TaskDescription) -> Result<Self> {
        Self::in_folder(description, PathBuf::new())
    }

    /// Reads a description from JSON.
    ///
    /// # Errors
    /// [`Error::Data`] for what isn't a description, and as [`new`](Self::new).
    pub fn from_json(json: &str) -> Result<Self> {
        let description = serde_json::from_str(json);
        Self::new(description.map_err(|error| Error::data("task", "a task's description", error))?)
    }

    /// Reads a description from a file; its `data_files` are beside it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`] for what isn't a description, and as [`new`](Self::new).
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let description = serde_json::from_slice(&bytes)
            .map_err(|error| Error::file(path, "JSON", "a task's description", error))?;
        Self::in_folder(description, path.parent().unwrap_or(Path::new("")).to_path_buf())
    }

    fn in_folder(description: TaskDescription, folder: PathBuf) -> Result<Self> {
        let name = description.task.clone();
        let refused = |problem: Problem| Error::task(&name, &problem.field, problem.expected, problem.found);
        check(&description).map_err(refused)?;
        let mut templates = Templates::new();
        let mut compile = |field: &str, source: &str| templates.compile(field, source).map_err(refused);
        let text = compile("doc_to_text", &description.doc_to_text)?;
        let target = compile("doc_to_target", &description.doc_to_target)?;
        let preamble = compile("description", &description.description)?;
        let original = description.original_text.as_deref();
        let original = original.map(|source| compile("original_text", source)).transpose()?;
        let choices = match &description.doc_to_choice {
            None => None,
            Some(OneOrMany::Many(choices)) => Some(Choices::Fixed(choices.clone())),
            Some(OneOrMany::One(source)) => Some(Choices::Template(compile("doc_to_choice", source)?)),
        };
        let metrics = description.metric_list.iter().map(CompiledMetric::new);
        let metrics = metrics.collect::<Result<_, _>>().map_err(refused)?;
        let filters = Pipeline::all(&description.filter_list).map_err(refused)?;
        Ok(Self {
            description,
            folder,
            templates,
            text,
            target,
            choices,
            preamble,
            original,
            metrics,
            filters,
        })
    }

    /// What it was made of.
    pub fn description(&self) -> &TaskDescription {
        &self.description
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.description.task
    }

    /// What it is scored by first; none of a task without metrics.
    pub fn first_metric(&self) -> Option<Metric> {
        self.metrics.first().map(|compiled| compiled.metric)
    }

    /// The split that is scored.
    pub fn evaluated_split(&self) -> &str {
        let splits = [&self.description.test_split, &self.description.validation_split];
        splits.into_iter().flatten().next().map_or("test", String::as_str)
    }

    /// The split that examples come from.
    pub fn fewshot_split(&self) -> &str {
        let description = &self.description;
        let splits = [&description.fewshot_split, &description.training_split, &description.validation_split];
        splits.into_iter().flatten().next().map_or(self.evaluated_split(), String::as_str)
    }

    /// The files of a split, if the description names them.
    fn split_files(&self, split: &str) -> Option<Vec<PathBuf>> {
        let files = &self.description.dataset_kwargs.as_ref()?.data_files;
        let files = files.get(split)?.as_slice();
        Some(files.iter().map(|file| self.folder.join(file)).collect())
    }

    /// Whether the description names files of the split that is scored.
    pub fn has_own_data(&self) -> bool {
        self.split_files(self.evaluated_split()).is_some()
    }
}

impl CompiledMetric {
    fn new(options: &MetricOptions) -> Result<Self, Problem> {
        Ok(Self { metric: options.metric, normalizer: Normalizer::new(options)? })
    }
}

/// What can be said without a document.
fn check(description: &TaskDescription) -> Result<(), Problem> {
    let fail = |field: &str, expected: String, found: String| Err(Problem::new(field, expected, found));
    let output = description.output_type;
    if description.task.is_empty() {
        return fail("task", "a name".into(), "none".into());
    }
    if description.test_split.is_none() && description.validation_split.is_none() {
        return fail("test_split", "it or validation_split".into(), "neither".into());
    }
    if output == OutputType::MultipleChoice && description.doc_to_choice.is_none() {
        return fail("doc_to_choice", "choices".into(), "none".into());
    }
    if let Some(OneOrMany::Many(choices)) = &description.doc_to_choice
        && choices.is_empty()
    {
        return fail("doc_to_choice", "at least one choice".into(), "an empty list".into());
    }
    if description.metric_list.is_empty() {
        return fail("metric_list", "at least one metric".into(), "an empty list".into());
    }
    for options in &description.metric_list {
        let metric = options.metric;
        if !metric.outputs().contains(&output) {
            let expected = format!("a metric of {}", name(&output));
            return fail("metric_list", expected, name(&metric));
        }
        if let Some(aggregation) = &options.aggregation
            && aggregation != metric.aggregation()
        {
            let expected = format!("aggregation {} of {}", metric.aggregation(), name(&metric));
            return fail("metric_list", expected, aggregation.clone());
        }
        if let Some(higher) = options.higher_is_better
            && higher != metric.higher_is_better()
        {
            let expected = format!("higher_is_better {} of {}", metric.higher_is_better(), name(&metric));
            return fail("metric_list", expected, higher.to_string());
        }
    }
    if !description.filter_list.is_empty() && output != OutputType::GenerateUntil {
        return fail("filter_list", "filters of generated texts only".into(), name(&output));
    }
    let Some(generation) = &description.generation_kwargs else { return Ok(()) };
    if generation.do_sample || generation.temperature != 0.0 {
        return fail("generation_kwargs", "greedy generation".into(), "sampling".into());
    }
    if generation.max_gen_toks == 0 {
        return fail("generation_kwargs", "max_gen_toks from 1".into(), "0".into());
    }
    Ok(())
}

/// As descriptions spell it.
pub(crate) fn name(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// As descriptions spell it.
impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&name(self))
    }
}

impl Metric {
    fn outputs(self) -> &'static [OutputType] {
        use OutputType::*;
        match self {
            Self::Acc => &[MultipleChoice, Loglikelihood],
            Self::AccNorm | Self::AccBytes | Self::F1 | Self::Mcc => &[MultipleChoice],
            Self::ExactMatch => &[MultipleChoice, GenerateUntil],
            Self::Perplexity => &[Loglikelihood],
            Self::WordPerplexity | Self::BytePerplexity | Self::BitsPerByte => &[LoglikelihoodRolling],
        }
    }

    /// The harness's name for how documents are put together.
    pub fn aggregation(self) -> &'static str {
        match self {
            Self::Acc | Self::AccNorm | Self::AccBytes | Self::ExactMatch => "mean",
            Self::F1 => "f1",
            Self::Mcc => "matthews_corrcoef",
            Self::Perplexity => "perplexity",
            Self::WordPerplexity | Self::BytePerplexity => "weighted_perplexity",
            Self::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether more is better.
    pub fn higher_is_better(self) -> bool {
        !matches!(self, Self::Perplexity | Self::WordPerplexity | Self::BytePerplexity | Self::BitsPerByte)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn base() -> Value {
        json!({
            "task": "t", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "q",
            "doc_to_target": "a", "doc_to_choice": ["x", "y"], "metric_list": [{"metric": "acc"}],
        })
    }

    #[test]
    fn contradictions_are_refused_by_field() {
        for (key, value, part) in [
            ("task", json!(""), "task"),
            ("test_split", json!(null), "neither"),
            ("doc_to_choice", json!([]), "doc_to_choice"),
            ("doc_to_choice", json!(null), "doc_to_choice"),
            ("metric_list", json!([]), "metric_list"),
            (
                "metric_list",
                json!([{"metric": "perplexity"}]),
                "a metric of multiple_choice, found perplexity",
            ),
            ("metric_list", json!([{"metric": "acc", "aggregation": "f1"}]), "aggregation mean of acc"),
            ("metric_list", json!([{"metric": "acc", "higher_is_better": false}]), "higher_is_better true"),
            ("metric_list", json!([{"metric": "bleu"}]), "bleu"),
            ("doc_to_text", json!("{{ x"), "doc_to_text"),
            ("output", json!(1), "output"),
            ("filter_list", json!([{"name": "a", "filter": [{"function": "regex"}]}]), "filter_list"),
            ("generation_kwargs", json!({"do_sample": true}), "generation_kwargs"),
            ("generation_kwargs", json!({"max_gen_toks": 0}), "max_gen_toks"),
        ] {
            let mut description = base();
            description[key] = value.clone();
            let error = Task::from_json(&description.to_string()).unwrap_err().to_string();
            assert!(error.contains(part), "{key} {value}: {error}");
        }
        assert!(Task::from_json(&base().to_string()).is_ok());
    }

    #[test]
    fn a_file_names_its_own_data() {
        let folder = tempfile::tempdir().unwrap();
        let mut description = base();
        description["dataset_kwargs"] = json!({"data_files": {"test": ["a.jsonl", "b.jsonl"]}});
        let path = folder.path().join("t.json");
        std::fs::write(&path, description.to_string()).unwrap();
        std::fs::write(folder.path().join("a.jsonl"), "{\"q\": \"1\", \"a\": 0}\n").unwrap();
        std::fs::write(folder.path().join("b.jsonl"), "{\"q\": \"2\", \"a\": 1}\n").unwrap();
        let task = Task::from_file(&path).unwrap();
        assert!(task.has_own_data());
        let data = DataFolder::new("nowhere").load(&task, 0).unwrap();
        assert_eq!(data.evaluated.len(), 2);
        std::fs::write(&path, "{").unwrap();
        assert!(Task::from_file(&path).unwrap_err().to_string().contains("t.json: JSON"));
    }
}
