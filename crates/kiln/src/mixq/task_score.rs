//! A task's score as an objective.

use kiln_eval::{Evaluation, ModelScorer, Task, TaskData};
use kiln_models::{CausalLm, Tokenizer};

use super::{Error, Result};

/// How plans are scored on a task.
#[derive(Debug)]
pub struct TaskScore {
    asked: [(Task, TaskData); 1],
    tokenizer: Tokenizer,
    tokenizer_hash: String,
    steps: u64,
}

impl TaskScore {
    /// Scores `data` of `task`: zero-shot, as the harness does, by the task's first metric.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a task whose first metric isn't better the higher it is; a tokenizer that can't be told from
    /// others.
    pub fn new(task: Task, data: TaskData, tokenizer: Tokenizer) -> Result<Self> {
        match task.first_metric() {
            Some(metric) if metric.higher_is_better() => {
                let tokenizer_hash = tokenizer.fingerprint()?;
                Ok(Self { asked: [(task, data)], tokenizer, tokenizer_hash, steps: 0 })
            }
            found => {
                let found = found.map_or("none".into(), |metric| format!("{metric:?}"));
                Err(Error::argument(task.name(), "a metric that is better the higher it is", found))
            }
        }
    }

    /// Fine-tunes each plan for so many steps before; needs the objective's [`FineTune`](super::FineTune). Without, plans are
    /// scored as they are quantized, or as a fine-tune would start.
    #[must_use]
    pub fn with_steps(mut self, steps: u64) -> Self {
        self.steps = steps;
        self
    }

    /// How many documents there are.
    pub(super) fn documents(&self) -> u64 {
        self.asked[0].1.evaluated.len() as u64
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Everything that decides a score but the model and the number of documents.
    pub(super) fn describe(&self) -> String {
        let [(task, data)] = &self.asked;
        format!("{:?} {data:?} {} {}", task.description(), self.tokenizer_hash, self.steps)
    }

    /// The metric on the first `documents`.
    pub(super) fn of<M: CausalLm>(&self, model: &M, documents: u64) -> Result<f64> {
        let mut evaluation = Evaluation::new().with_shots(0);
        (evaluation.limit, evaluation.resamples) =
            (Some(usize::try_from(documents).unwrap_or(usize::MAX)), 0);
        let report = evaluation.evaluate(&ModelScorer::new(model, &self.tokenizer)?, &self.asked)?;
        let metric = report.tasks.first().and_then(|task| task.metrics.first());
        Ok(metric.ok_or_else(|| Error::argument("task", "a metric", "none"))?.value)
    }
}
