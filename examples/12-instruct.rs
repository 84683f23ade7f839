//! Instruction tuning: chat rows, a validation part, early stop, answers before and after, a loss curve.
//!
//! Without arguments: the embedded model at 4 bits on rows that come with the repository.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode, sync::Arc};

use clap::Parser;
use kiln::{
    adapters::AdapterConfig,
    eval::Evaluation,
    quant::files::OutputFolder,
    training::{Event, Message, Observer, ScheduleKind},
};
use kiln_examples::{
    Bar, BaseArgs, Result, check_outputs, open_tasks, say, testdata, write_curve, write_json,
};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    base: BaseArgs,
    /// Rows of chats, instructions, or prompts and completions: .jsonl, .json or .parquet.
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// At most so many steps.
    #[arg(long, default_value_t = 200)]
    steps: u64,
    #[arg(long, default_value_t = 8)]
    batch: usize,
    #[arg(long, default_value_t = 128)]
    seq_len: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps between validations.
    #[arg(long, default_value_t = 20)]
    every: u64,
    /// Tasks that the model is asked at each validation, as 09-evaluate has them; the loss decides which model is kept.
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// A folder with the tasks' data as JSON lines; tasks that name their own files need none.
    #[arg(long, default_value = "data")]
    task_data: PathBuf,
    /// Documents of each task.
    #[arg(long, default_value_t = 200)]
    task_limit: usize,
    /// Ends the run after so many validations without a lower loss.
    #[arg(long, default_value_t = 3)]
    patience: u64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Goes on from the last checkpoint below --out.
    #[arg(long)]
    resume: bool,
    /// Gets the adapter folder (adapter/), the loss curve (loss.svg), figures (figures/) and checkpoints.
    #[arg(long, default_value = "target/kiln-instruct")]
    out: PathBuf,
    /// Where the figures of the run go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn run(options: Options) -> Result<()> {
    let out = Arc::new(OutputFolder::claim(&options.out)?);
    check_outputs([&options.json])?;
    let base = options.base.load()?;
    let path = options.data.unwrap_or_else(|| testdata("training/instruct.jsonl"));
    let data = base.data(&path, options.seq_len)?;
    say!("{}: {}", path.display(), data.report());
    say!("a row: {}", base.preview(&data, 0)?);
    let (train, validation) = data.split(0.1, options.seed)?;
    let before = base.evaluate(&validation)?.nll;
    say!("validation loss before: {before:.4}");
    let questions = ["What is the first letter of table?", "Repeat the word window twice."];
    let messages = questions.map(|question| [Message::new("user", question)]);
    let mut untuned = Vec::new();
    for messages in &messages {
        untuned.push(base.chat(messages, 16)?);
    }

    let asked = Evaluation::new().with_limit(options.task_limit);
    let tasks = open_tasks(&options.tasks, &options.task_data, &asked)?;
    let mut answers = BTreeMap::new();
    let mut bar = Bar::new(options.steps)?;
    let adapters = AdapterConfig::lora(options.rank, options.alpha).with_seed(options.seed);
    let mut tuning = base
        .finetune(adapters, train)
        .with_steps(options.steps)
        .with_batch(options.batch)
        .with_lr(options.lr)
        .with_warmup(options.steps / 20)
        .with_schedule(ScheduleKind::Cosine { final_ratio: 0.1 })
        .with_held_out(validation.clone(), options.every)
        .with_patience(options.patience)
        .with_claimed(out, options.every)
        .with_metrics(options.out.join("figures"))
        .on_event(|event: &Event<'_>| {
            if let Event::Figure { steps, name, value } = event {
                answers.entry((*name).to_owned()).or_insert_with(Vec::new).push((*steps, *value));
            }
            Observer::<()>::on_event(&mut bar, event)
        });
    if !tasks.is_empty() {
        tuning = tuning.with_tasks(tasks, asked, options.every);
    }
    if options.resume {
        tuning = tuning.with_resume();
    }
    let tuned = tuning.run()?;
    bar.finish(&format!("--resume goes on from {}", options.out.join("last").display()))?;

    let after = tuned.evaluate(&validation)?.nll;
    let report = tuned.report().ok_or("a run has a report")?;
    say!("validation loss after: {after:.4}; {}", report.end);
    let adapter = options.out.join("adapter");
    tuned.save_peft(&adapter)?;
    for ((question, messages), before) in questions.iter().zip(&messages).zip(untuned) {
        say!("{question}\n  before: {}\n  after: {}", before.trim(), tuned.chat(messages, 16)?.trim());
    }
    let best = report.evaluations.iter().rev().find(|evaluation| evaluation.is_best);
    if !report.steps.is_empty() {
        write_curve(&options.out.join("loss.svg"), report)?;
    }
    for (name, values) in &answers {
        let values = values.iter().map(|(steps, value)| format!("{value:.3} after {steps}"));
        say!("{name}: {}", values.collect::<Vec<_>>().join(", "));
    }
    say!("adapter written to {}", adapter.display());
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "validation_before": before,
            "validation_after": after,
            "tasks": answers,
            "best_step": best.map(|evaluation| evaluation.steps),
            "steps": report.steps.last().map(|step| step.step + 1),
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
