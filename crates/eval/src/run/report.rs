//! What an evaluation found.

use std::{collections::BTreeMap, fmt, path::Path};

use kiln_quant_core::hash::hex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::Evaluation;
use crate::{
    Error, Group, Metric, PreparedDocument, Result, Score, Task,
    metrics::{aggregate, pooled, standard_error, unweighted},
};

/// The rules that tasks are scored by.
pub const PROTOCOL: &str = "lm-evaluation-harness 0.4.13";

/// What an evaluation of tasks found; shown as a Markdown table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`PROTOCOL`].
    pub protocol: String,
    /// What [`Evaluation`] calls the model.
    pub model: String,
    /// The scorer's [`settings`](crate::Scorer::settings).
    pub settings: Value,
    /// Of the generator that drew examples.
    pub seed: u64,
    /// Documents of each task at most.
    pub limit: Option<usize>,
    /// Task by task.
    pub tasks: Vec<TaskReport>,
    /// Groups of which every task is there.
    pub groups: Vec<GroupReport>,
    /// Documents scored by this run in a second, from preparing them to their last score.
    pub documents_per_second: f64,
}

/// What was found on one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// The task.
    pub task: String,
    /// Examples shown.
    pub shots: usize,
    /// Documents scored.
    pub documents: usize,
    /// SHA-256 of all request texts, in hexadecimal: equal where two runs asked the same.
    pub requests: String,
    /// Figure by figure.
    pub metrics: Vec<MetricReport>,
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricReport {
    /// Which.
    pub metric: Metric,
    /// Of which filter of generated texts; `none` of anything else.
    pub filter: String,
    /// The figure.
    pub value: f64,
    /// Its standard error, where it has one.
    pub stderr: Option<f64>,
    /// Whether more is better.
    pub higher_is_better: bool,
    /// What each document contributed, in the order of the split.
    pub scores: Vec<Score>,
}

/// Figures of several tasks together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The group.
    pub group: String,
    /// Examples shown.
    pub shots: usize,
    /// Documents scored.
    pub documents: usize,
    /// Which figure.
    pub metric: Metric,
    /// Mean over documents: the harness's own.
    pub micro: f64,
    /// Its standard error.
    pub micro_stderr: Option<f64>,
    /// Mean over tasks.
    #[serde(rename = "macro")]
    pub macro_: f64,
    /// Its standard error.
    pub macro_stderr: Option<f64>,
}

impl MetricReport {
    /// The metric, and behind a comma the filter, if there is one: `acc`, `exact_match,strict-match`.
    pub fn key(&self) -> String {
        match self.filter.as_str() {
            "none" => self.metric.to_string(),
            filter => format!("{},{filter}", self.metric),
        }
    }
}

impl TaskReport {
    pub(super) fn new(
        task: &Task,
        shots: usize,
        documents: &[PreparedDocument],
        scores: &[BTreeMap<(Metric, String), Score>],
        resamples: usize,
    ) -> Self {
        let mut hash = Sha256::new();
        for text in documents.iter().flat_map(|document| document.requests.texts()) {
            hash.update(text.as_bytes());
            hash.update([0]);
        }
        let requests = hex(hash.finalize());
        let keys = scores.first().into_iter().flat_map(BTreeMap::keys);
        let metrics = keys.map(|key| {
            let (metric, filter) = key;
            let scores: Vec<Score> = scores.iter().filter_map(|scores| scores.get(key).copied()).collect();
            MetricReport {
                metric: *metric,
                filter: filter.clone(),
                value: aggregate(*metric, &scores),
                stderr: standard_error(*metric, &scores, resamples),
                higher_is_better: metric.higher_is_better(),
                scores,
            }
        });
        let metrics = metrics.collect();
        Self { task: task.name().into(), shots, documents: documents.len(), requests, metrics }
    }

    /// A figure of the task; of several filters' the one whose name is first in the alphabet.
    pub fn metric(&self, metric: Metric) -> Option<&MetricReport> {
        self.metrics.iter().find(|report| report.metric == metric)
    }
}

impl GroupReport {
    /// Puts tasks together, as the harness does for metrics that are means.
    fn new(group: &str, tasks: &[&TaskReport]) -> Option<Self> {
        let first = tasks.first()?;
        let metric = first.metrics.first()?.metric;
        let values: Option<Vec<_>> = tasks
            .iter()
            .map(|task| task.metric(metric).map(|found| (found.value, found.stderr, task.documents)))
            .collect();
        let values = values?;
        let ((micro, micro_stderr), (macro_, macro_stderr)) = (pooled(&values), unweighted(&values));
        let documents = tasks.iter().map(|task| task.documents).sum();
        let (group, shots) = (group.to_owned(), first.shots);
        Some(Self { group, shots, documents, metric, micro, micro_stderr, macro_, macro_stderr })
    }
}

impl Report {
    pub(super) fn new(
        evaluation: &Evaluation,
        settings: Value,
        tasks: Vec<TaskReport>,
        documents_per_second: f64,
    ) -> Self {
        let mut report = Self {
            protocol: PROTOCOL.into(),
            model: evaluation.model.clone(),
            settings,
            seed: evaluation.seed,
            limit: evaluation.limit,
            tasks,
            groups: Vec::new(),
            documents_per_second,
        };
        for group in Group::builtin() {
            report.add_group(&group);
        }
        report
    }

    /// Adds the figures of a group, if all of its tasks are there, and says whether they are.
    pub fn add_group(&mut self, group: &Group) -> bool {
        let tasks: Option<Vec<&TaskReport>> = group.tasks.iter().map(|task| self.task(task)).collect();
        let found = tasks.and_then(|tasks| GroupReport::new(&group.group, &tasks));
        self.groups.extend(found.clone());
        found.is_some()
    }

    /// The report of a task.
    pub fn task(&self, name: &str) -> Option<&TaskReport> {
        self.tasks.iter().find(|task| task.task == name)
    }

    /// Writes the report as JSON; the file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Model`] with the operating system's refusal.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::file(path, "report", "what JSON can hold", error))?;
        let written = kiln_quant_core::write_atomically(path, |file| std::io::Write::write_all(file, &bytes));
        Ok(written.map_err(kiln_models::Error::from)?)
    }

    /// Reads what [`write`](Self::write) wrote.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] for what isn't a report.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        serde_json::from_slice(&bytes).map_err(|error| Error::file(path, "JSON", "a report", error))
    }

    /// The report as a Markdown table, a line a figure; arrows say which direction is better.
    pub fn to_markdown(&self) -> String {
        let mut table = String::from(
            "| task | shots | documents | metric | filter | | value | | stderr |\n\
             | --- | ---: | ---: | --- | --- | --- | ---: | --- | ---: |\n",
        );
        let mut line = |name: &str,
                        shots: usize,
                        documents: usize,
                        metric: (&str, &str),
                        up,
                        value: f64,
                        error| {
            let (metric, filter) = metric;
            let arrow = if up { "↑" } else { "↓" };
            let error: String = match error {
                Some(error) => format!("± | {error:.4}"),
                None => "| N/A".into(),
            };
            table += &format!(
                "| {name} | {shots} | {documents} | {metric} | {filter} | {arrow} | {value:.4} | {error} |\n"
            );
        };
        for task in &self.tasks {
            for found in &task.metrics {
                let metric = crate::task::name(&found.metric);
                let names = (metric.as_str(), found.filter.as_str());
                let up = found.higher_is_better;
                line(&task.task, task.shots, task.documents, names, up, found.value, found.stderr);
            }
        }
        for group in &self.groups {
            let metric = crate::task::name(&group.metric);
            let up = group.metric.higher_is_better();
            let (name, shots, documents) = (&group.group, group.shots, group.documents);
            line(
                name,
                shots,
                documents,
                (&format!("{metric}, micro"), "none"),
                up,
                group.micro,
                group.micro_stderr,
            );
            line(
                name,
                shots,
                documents,
                (&format!("{metric}, macro"), "none"),
                up,
                group.macro_,
                group.macro_stderr,
            );
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_markdown())
    }
}
