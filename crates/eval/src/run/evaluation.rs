//! Tasks, asked of a scorer.

use std::{
    collections::HashSet,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Instant,
};

use super::{
    report::{Report, TaskReport},
    samples::{Header, Sample, SampleLog},
};
use crate::{
    Error, GenerateRequest, Metric, PreparedDocument, Requests, Response, Result, Score, Scorer, Task,
    TaskData,
};

/// How far an evaluation of tasks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskProgress {
    /// Documents scored, those of an earlier run included.
    pub documents: usize,
    /// Documents in all.
    pub total: usize,
    /// Documents that an earlier run had scored.
    pub resumed: usize,
}

/// Told after each document; may end the evaluation, which then fails with [`Error::Interrupted`].
pub type OnTaskProgress<'a> = &'a mut dyn FnMut(TaskProgress) -> ControlFlow<()>;

/// An evaluation of tasks as the lm-evaluation-harness 0.4.13 does it.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `shots` | the task's, or 0 | examples shown before each question | up to what the pool holds |
/// | `limit` | none | documents of each task | from 1 |
/// | `seed` | 1234 | of the generator that draws examples, one a task | any |
/// | `resamples` | 100,000 | of the bootstrap (F1, Matthews's correlation, perplexity); 0: no standard errors at all | 0, or from 2 |
/// | `samples` | none | the log: a file of JSON lines; where it exists, the run goes on after it | |
/// | `model` | empty | what the report and the log call the model; a log of another one isn't resumed | any |
///
/// Documents are scored in an order that suits the model. Interrupted by its callback or by anything else, an evaluation
/// with a log goes on where it was: the same tasks, options and model, once more.
///
/// ```
/// use burn::tensor::Device;
/// use kiln_eval::{Evaluation, ModelScorer, Task, TaskData};
/// use kiln_models::{Checkpoint, LoadOptions};
///
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let checkpoint = Checkpoint::open(folder)?;
/// let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
/// let tokenizer = checkpoint.tokenizer()?;
/// let scorer = ModelScorer::new(&model, &tokenizer)?.with_batch(8)?;
///
/// let row = serde_json::json!({"goal": "To make ice,", "sol1": "freeze water", "sol2": "burn wood", "label": 0});
/// let data = TaskData { evaluated: vec![row.as_object().unwrap().clone()], fewshot: vec![] };
/// let tasks = [(Task::builtin("piqa")?, data)];
/// let report = Evaluation::new().evaluate(&scorer, &tasks)?;
/// println!("{report}");
/// # assert_eq!(report.tasks[0].documents, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evaluation {
    /// Examples shown before each question.
    pub shots: Option<usize>,
    /// Documents of each task.
    pub limit: Option<usize>,
    /// Of the generator that draws examples.
    pub seed: u64,
    /// Of the bootstrap.
    pub resamples: usize,
    /// The log.
    pub samples: Option<PathBuf>,
    /// What the report and the log call the model.
    pub model: String,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self { shots: None, limit: None, seed: 1234, resamples: 100_000, samples: None, model: String::new() }
    }
}

/// A document on its way.
struct Pending<'a> {
    task: usize,
    document: &'a PreparedDocument,
    responses: Vec<Option<Response>>,
}

/// Scores of a document, by metric and filter.
type Scores = std::collections::BTreeMap<(Metric, String), Score>;

impl Evaluation {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `shots`.
    #[must_use]
    pub fn with_shots(mut self, shots: usize) -> Self {
        self.shots = Some(shots);
        self
    }

    /// Sets `limit`.
    #[must_use]
    pub fn with_limit(mut self, limit: usize) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Sets `seed`.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets `resamples`.
    #[must_use]
    pub fn with_resamples(mut self, resamples: usize) -> Self {
        self.resamples = resamples;
        self
    }

    /// Sets `samples`.
    #[must_use]
    pub fn with_samples(mut self, path: impl AsRef<Path>) -> Self {
        self.samples = Some(path.as_ref().into());
        self
    }

    /// Sets `model`.
    #[must_use]
    pub fn with_model(mut self, model: impl Into<String>) -> Self {
        self.model = model.into();
        self
    }

    /// The examples that `task` gets.
    pub fn shots_of(&self, task: &Task) -> usize {
        self.shots.unwrap_or_else(|| task.default_shots())
    }

    /// Asks `scorer` about the documents of all tasks.
    ///
    /// # Errors
    /// [`Error::Option`] for an option out of range or two tasks of one name; [`Task::prepare`]'s errors;
    /// [`Error::Document`] for a document that `scorer` can't answer, before anything is computed where it is the
    /// document's fault; [`Error::File`] for a log of another run; the scorer's own.
    pub fn evaluate<S: Scorer>(&self, scorer: &S, tasks: &[(Task, TaskData)]) -> Result<Report> {
        self.evaluate_with(scorer, tasks, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`evaluate`](Self::evaluate), with a callback that may end it.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and [`Error::Interrupted`].
    pub fn evaluate_with<S: Scorer>(
        &self,
        scorer: &S,
        tasks: &[(Task, TaskData)],
        on_progress: OnTaskProgress,
    ) -> Result<Report> {
        let start = Instant::now();
        let prepared = self.prepare(tasks)?;
        let header = Header {
            protocol: super::PROTOCOL.into(),
            model: self.model.clone(),
            settings: scorer.settings(),
        };
        let mut log = self.samples.as_deref().map(|path| SampleLog::open(path, &header)).transpose()?;
        let mut scores: Vec<Vec<Option<Scores>>> =
            prepared.iter().map(|list| vec![None; list.len()]).collect();
        let mut pending = Vec::new();
        for (task, documents) in prepared.iter().enumerate() {
            for document in documents {
                match self.earlier(log.as_ref(), &tasks[task].0, document)? {
                    Some(found) => scores[task][document.index] = Some(found),
                    None => {
                        let count = document.requests.pairs().len().max(1);
                        pending.push(Pending { task, document, responses: vec![None; count] });
                    }
                }
            }
        }
        let total: usize = prepared.iter().map(Vec::len).sum();
        let fresh = pending.len();
        let resumed = total - fresh;
        let mut documents = resumed;
        let mut on_document = |pending: &Pending| {
            let (task, document) = (&tasks[pending.task].0, pending.document);
            let responses: Vec<Response> = pending.responses.iter().flatten().cloned().collect();
            let scored = task.score(document, &responses);
            if let Some(log) = &mut log {
                log.write(&Sample {
                    task: task.name().into(),
                    shots: self.shots_of(task),
                    document: document.index,
                    id: document.id.clone(),
                    requests: document.requests.clone(),
                    responses,
                    prediction: scored.prediction.clone(),
                    answer: Sample::answer(&document.gold),
                    scores: Sample::scores(&scored),
                })?;
            }
            scores[pending.task][document.index] = Some(scored.scores);
            documents += 1;
            Ok(on_progress(TaskProgress { documents, total, resumed }))
        };
        ask(scorer, tasks, &mut pending, &mut on_document)?;
        if documents < total {
            return Err(Error::Interrupted { documents, total });
        }
        let seconds = start.elapsed().as_secs_f64();
        let reports = tasks.iter().zip(&prepared).zip(scores).map(|(((task, _), documents), scores)| {
            let scores: Vec<Scores> = scores.into_iter().flatten().collect();
            TaskReport::new(task, self.shots_of(task), documents, &scores, self.resamples)
        });
        Ok(Report::new(self, header.settings, reports.collect(), fresh as f64 / seconds.max(1e-9)))
    }

    /// Whether options and tasks make sense, before anything is asked.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), but for the scorer's and a log's.
    pub fn check(&self, tasks: &[(Task, TaskData)]) -> Result<()> {
        self.prepare(tasks).map(|_| ())
    }

    /// The documents of each task.
    fn prepare(&self, tasks: &[(Task, TaskData)]) -> Result<Vec<Vec<PreparedDocument>>> {
        self.check_options(tasks)?;
        let prepared =
            tasks.iter().map(|(task, data)| task.prepare(data, self.shots_of(task), self.limit, self.seed));
        prepared.collect()
    }

    fn check_options(&self, tasks: &[(Task, TaskData)]) -> Result<()> {
        if self.limit == Some(0) {
            return Err(Error::option("Evaluation.limit", "at least 1", 0));
        }
        if self.resamples == 1 {
            return Err(Error::option("Evaluation.resamples", "0, or at least 2", 1));
        }
        let mut names = HashSet::new();
        match tasks.iter().find(|(task, _)| !names.insert(task.name())) {
            Some((task, _)) => Err(Error::option("tasks", "each task once", task.name())),
            None if tasks.is_empty() => Err(Error::option("tasks", "at least one", 0)),
            None => Ok(()),
        }
    }

    /// The scores that an earlier run found for a document.
    fn earlier(
        &self,
        log: Option<&SampleLog>,
        task: &Task,
        document: &PreparedDocument,
    ) -> Result<Option<Scores>> {
        let key = (task.name().to_owned(), self.shots_of(task), document.index);
        let Some(sample) = log.and_then(|log| log.earlier.get(&key)) else { return Ok(None) };
        let expected = document.requests.pairs().len().max(1);
        if sample.requests != document.requests || sample.responses.len() != expected {
            let field = format!("task {}, document {}", task.name(), document.index);
            let path = self.samples.clone().unwrap_or_default();
            return Err(Error::file(path, field, "this run's requests", "others"));
        }
        let fits = |response: &Response| {
            matches!(
                (&document.requests, response),
                (Requests::Pairs { .. }, Response::Pair(..))
                    | (Requests::Rolling { .. }, Response::Rolling(_))
                    | (Requests::Generate { .. }, Response::Text(_))
            )
        };
        if !sample.responses.iter().all(fits) {
            let field = format!("task {}, document {}", task.name(), document.index);
            let path = self.samples.clone().unwrap_or_default();
            return Err(Error::file(path, field, "answers of the requests' kind", "others"));
        }
        Ok(Some(task.score(document, &sample.responses).scores))
    }
}

/// Asks for what is pending, kind by kind, until all is answered or `on_document` ends it.
fn ask<S: Scorer>(
    scorer: &S,
    tasks: &[(Task, TaskData)],
    pending: &mut [Pending],
    on_document: &mut dyn FnMut(&Pending) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let (mut pairs, mut texts, mut generated) = (Vec::new(), Vec::new(), Vec::new());
    let mut places: [Vec<(usize, usize)>; 3] = Default::default();
    for (index, one) in pending.iter().enumerate() {
        match &one.document.requests {
            Requests::Rolling { text } => {
                texts.push(text.clone());
                places[1].push((index, 0));
            }
            Requests::Generate { context, until, max_gen_toks } => {
                let (context, until) = (context.clone(), until.clone());
                generated.push(GenerateRequest { context, until, max_gen_toks: *max_gen_toks });
                places[2].push((index, 0));
            }
            requests => {
                for (choice, (context, continuation)) in requests.pairs().into_iter().enumerate() {
                    pairs.push((context.to_owned(), continuation.to_owned()));
                    places[0].push((index, choice));
                }
            }
        }
    }
    for (kind, places) in places.iter().enumerate().filter(|(_, places)| !places.is_empty()) {
        let mut ended = false;
        let mut on_answer = |request: usize, response: Response| {
            let (index, choice) = places[request];
            let one = &mut pending[index];
            one.responses[choice] = Some(response);
            if one.responses.iter().any(Option::is_none) {
                return Ok(ControlFlow::Continue(()));
            }
            let flow = on_document(one)?;
            ended |= flow.is_break();
            Ok(flow)
        };
        let answered = match kind {
            0 => scorer.loglikelihood(&pairs, &mut on_answer),
            1 => scorer.loglikelihood_rolling(&texts, &mut on_answer),
            _ => scorer.generate_until(&generated, &mut on_answer),
        };
        answered.map_err(|error| of_document(error, tasks, pending, places))?;
        if ended {
            break;
        }
    }
    Ok(())
}

/// A request's error as the error of its document.
fn of_document(
    error: Error,
    tasks: &[(Task, TaskData)],
    pending: &[Pending],
    places: &[(usize, usize)],
) -> Error {
    match error {
        Error::Request { request, what, expected, found } if request < places.len() => {
            let (index, choice) = places[request];
            let one = &pending[index];
            let task = tasks[one.task].0.name().to_owned();
            let field = if one.responses.len() > 1 { format!("choice {choice}, {what}") } else { what };
            Error::Document { task, split: "evaluated", document: one.document.index, field, expected, found }
        }
        other => other,
    }
}
