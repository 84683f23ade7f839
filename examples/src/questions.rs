//! A task of multiple choice: what is asked, and what is learned.

use std::path::Path;

use kiln::{
    Base,
    eval::{DataFolder, Evaluation, ModelScorer, Task, TaskData},
    models::{CausalLm, Tokenizer},
    training::Dataset,
};

use crate::{Result, testdata};

/// A task with a training split of its own.
#[derive(Debug)]
pub struct Questions {
    /// The task, with what is scored.
    asked: [(Task, TaskData); 1],
    rows: Vec<(String, String)>,
    limit: usize,
}

impl Questions {
    /// A description file, a name of the harness, or the letters in testdata if left out; `data` has the files of tasks that
    /// don't name their own. At most `limit` documents are scored, and as many learned.
    ///
    /// # Errors
    /// Files that can't be read, a task without a training split of its own, or whose first metric isn't better the higher it is.
    pub fn open(task: Option<&str>, data: &Path, limit: usize) -> Result<Self> {
        let task = match task {
            None => Task::from_file(testdata("eval/letters.json"))?,
            Some(file) if file.ends_with(".json") => Task::from_file(file)?,
            Some(name) => Task::builtin(name)?,
        };
        let training = task.description().training_split.as_deref();
        if training.is_none()
            || training != Some(task.fewshot_split())
            || training == Some(task.evaluated_split())
        {
            let name = task.name();
            return Err(format!("task {name}: expected a training split of its own, found none").into());
        }
        if task.first_metric().is_none_or(|metric| !metric.higher_is_better()) {
            let name = task.name();
            return Err(format!("task {name}: expected a metric that is better the higher it is").into());
        }
        let TaskData { evaluated, fewshot } = DataFolder::new(data).load(&task, 1)?;
        let mut rows = task.rows(&fewshot)?;
        rows.truncate(limit);
        let asked = [(task, TaskData { evaluated, fewshot: Vec::new() })];
        Ok(Self { asked, rows, limit })
    }

    /// The task's name.
    pub fn name(&self) -> &str {
        self.asked[0].0.name()
    }

    /// The task's first metric, the share of right answers in most; the answers go to `log`.
    ///
    /// # Errors
    /// A log that can't be written, and what the model refuses.
    pub fn accuracy<M: CausalLm>(&self, model: &M, tokenizer: &Tokenizer, log: &Path) -> Result<f64> {
        let mut evaluation = Evaluation::new();
        (evaluation.shots, evaluation.limit) = (Some(0), Some(self.limit));
        evaluation.samples = Some(log.into());
        let scorer = ModelScorer::new(model, tokenizer)?;
        let report = evaluation.evaluate(&scorer, &self.asked)?;
        let metric = report.tasks.first().and_then(|task| task.metrics.first());
        Ok(metric.ok_or("expected a task with a metric, found none")?.value)
    }

    /// The rows of the training split that `chosen` takes by their place, of which the answers are learned: as prompt and completion, which are tokenised together, as
    /// the task's requests are.
    ///
    /// # Errors
    /// Rows that can't be written or read.
    pub fn dataset(&self, base: &Base, seq_len: usize, chosen: impl Fn(usize) -> bool) -> Result<Dataset> {
        let rows = self.rows.iter().enumerate().filter(|(place, _)| chosen(*place)).map(|(_, row)| row);
        let rows = rows.map(|(prompt, answer)| {
            serde_json::json!({"prompt": prompt, "completion": answer}).to_string() + "\n"
        });
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("rows.jsonl");
        std::fs::write(&file, rows.collect::<String>())?;
        Ok(base.data(file, seq_len)?)
    }
}
