//! Tasks of the lm-evaluation-harness on a model: the embedded model and a quiz, or yours and your data.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{ops::ControlFlow, path::PathBuf, process::ExitCode};

use clap::Parser;
use kiln::eval::{Evaluation, ModelScorer, Probe, Report, Scorer, Task, TaskData, disk_bytes};
use kiln_examples::{ModelArgs, Result, check_outputs, open_tasks, quiz, say, write_json};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Names of the harness (boolq, mmlu_astronomy, mmlu for all its subjects, ..) or description files, with commas;
    /// the quiz in testdata/eval if left out.
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// A folder with the tasks' data as JSON lines; tasks that name their own files need none.
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Examples before each question; each task's own number if left out.
    #[arg(long)]
    shots: Option<usize>,
    /// Documents of each task.
    #[arg(long)]
    limit: Option<usize>,
    /// Rows in a forward pass.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of input; the model's positions if left out.
    #[arg(long)]
    max_length: Option<usize>,
    /// Where the log of all documents goes; beside --json if left out.
    #[arg(long)]
    samples: Option<PathBuf>,
    /// Goes on after the log of an interrupted run.
    #[arg(long)]
    resume: bool,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    /// The tasks with their documents.
    fn tasks(&self, evaluation: &Evaluation) -> Result<Vec<(Task, TaskData)>> {
        let quiz = ["quiz_letters", "quiz_words"].map(quiz);
        open_tasks(if self.tasks.is_empty() { &quiz } else { &self.tasks }, &self.data, evaluation)
    }

    fn samples(&self) -> Option<PathBuf> {
        self.samples.clone().or_else(|| Some(self.json.as_ref()?.with_extension("samples.jsonl")))
    }

    /// What the log and the report call the model.
    fn model_name(&self) -> String {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let scheme = self.model.scheme.map(|scheme| scheme.to_string());
        let parts =
            [path(&self.model.model).or(Some("tiny-llama".into())), path(&self.model.adapter), scheme];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" + ")
    }
}

/// Figures by task and metric.
fn results(report: &Report) -> serde_json::Value {
    let mut results = serde_json::Map::new();
    for task in &report.tasks {
        let figures = task
            .metrics
            .iter()
            .map(|found| (found.key(), serde_json::json!({"value": found.value, "stderr": found.stderr})));
        results.insert(task.task.clone(), serde_json::Value::Object(figures.collect()));
    }
    for group in &report.groups {
        let figures = serde_json::json!({
            "micro": {"value": group.micro, "stderr": group.micro_stderr},
            "macro": {"value": group.macro_, "stderr": group.macro_stderr},
        });
        results.insert(group.group.clone(), figures);
    }
    results.into()
}

fn run(options: Options) -> Result<()> {
    let mut evaluation = Evaluation::new().with_model(options.model_name());
    (evaluation.shots, evaluation.limit, evaluation.samples) =
        (options.shots, options.limit, options.samples());
    if let Some(log) = evaluation.samples.as_ref().filter(|log| !options.resume && log.exists()) {
        let log = log.display();
        return Err(format!(
            "{log}: expected no log yet: --resume goes on after it, --samples names another"
        )
        .into());
    }
    check_outputs([&options.json])?;
    let tasks = options.tasks(&evaluation)?;
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let (model, loaded) = options.model.load_adapted(&checkpoint)?;
    let mut scorer = ModelScorer::new(&model, &tokenizer)?.with_batch(options.batch)?;
    if let Some(max_length) = options.max_length {
        scorer = scorer.with_max_length(max_length)?;
    }
    let probe = Probe::start();
    let bar = indicatif::ProgressBar::new(0);
    let report = evaluation.evaluate_with(&scorer, &tasks, &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.documents as u64);
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let usage = probe.finish(scorer.tokens());
    say!("{report}");
    say!(
        "{:.2} documents a second, {:.0} tokens a second, {:.1} s",
        report.documents_per_second,
        usage.tokens_per_second,
        usage.seconds
    );
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "results": results(&report),
            "samples": evaluation.samples,
            "documents_per_second": report.documents_per_second,
            "tokens_per_second": usage.tokens_per_second,
            "seconds": usage.seconds,
            "peak_rss_bytes": usage.peak_rss_bytes,
            "energy_joules": usage.energy_joules,
            "model_disk_bytes": disk_bytes(checkpoint.path())?,
            "model_memory_bytes": loaded.storage.total_bytes(),
            "report": report,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
