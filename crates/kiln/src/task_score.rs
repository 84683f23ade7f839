//! How well a model in training does on tasks.

use std::sync::Arc;

use kiln_eval::{Evaluation, ModelScorer, Report, Task, TaskData, TaskReport};
use kiln_models::{CausalLm, Tokenizer};
use kiln_quant_core::hash::Fnv1a;
use kiln_training::Figure;

use crate::{Error, Result};

/// Tasks with their data, and how they are asked.
pub(crate) struct TaskScore {
    tasks: Arc<[(Task, TaskData)]>,
    how: Evaluation,
}

impl TaskScore {
    pub(crate) fn new(tasks: Arc<[(Task, TaskData)]>, how: Evaluation) -> Self {
        // Standard errors aren't told.
        Self { tasks, how: how.with_resamples(0) }
    }

    /// What must be the same for two scores to be compared.
    pub(crate) fn identity(&self) -> String {
        let Evaluation { limit, seed, .. } = &self.how;
        let tasks = self.tasks.iter().map(|(task, data)| {
            let documents = Fnv1a::of(format!("{data:?}").bytes()).text();
            format!("{} with {} shots of {documents}", task.name(), self.how.shots_of(task))
        });
        format!("{}; at most {limit:?} documents, seed {seed}", tasks.collect::<Vec<_>>().join(", "))
    }

    /// Whether there is something to be asked, and `model` can be: before the first step, not after an hour.
    pub(crate) fn check<M: CausalLm>(&self, model: &M, tokenizer: &Tokenizer) -> Result<()> {
        if let Some(log) = &self.how.samples {
            let expected = "none: a log is of one model, and here it changes";
            return Err(Error::argument("samples", expected, log.display()));
        }
        self.how.check(&self.tasks)?;
        ModelScorer::new(model, tokenizer)?;
        Ok(())
    }

    /// What `model` says, `batch` rows at a time.
    pub(crate) fn report<M: CausalLm>(
        &self,
        model: &M,
        tokenizer: &Tokenizer,
        batch: usize,
    ) -> Result<Report> {
        let scorer = ModelScorer::new(model, tokenizer)?.with_batch(batch)?;
        Ok(self.how.evaluate(&scorer, &self.tasks)?)
    }

    /// The mean over tasks of what their first metric lacks of 1; of one of which less is better, the metric itself.
    pub(crate) fn mean_miss(&self, report: &Report) -> f64 {
        let firsts = self.tasks.iter().zip(&report.tasks);
        let firsts = firsts.filter_map(|((task, _), found)| found.metric(task.first_metric()?));
        let misses = firsts.map(|found| if found.higher_is_better { 1.0 - found.value } else { found.value });
        misses.sum::<f64>() / report.tasks.len() as f64
    }
}

/// All figures, as `task metric`.
pub(crate) fn figures(report: &Report) -> Vec<Figure> {
    let of_task = |task: &TaskReport| -> Vec<Figure> {
        let figures = task.metrics.iter();
        figures
            .map(|found| Figure { name: format!("{} {}", task.task, found.key()), value: found.value })
            .collect()
    };
    report.tasks.iter().flat_map(of_task).collect()
}
