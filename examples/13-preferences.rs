//! Preference tuning: pairs of a better and a worse answer, compared with what the model thought of them before.
//!
//! Without arguments: the embedded model at 4 bits on pairs that come with the repository, by ORPO, which trains on the
//! better answers, too. DPO wants a model that answers already, such as what 12-instruct makes.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Parser, ValueEnum};
use kiln::{
    adapters::AdapterConfig,
    quant::files::OutputFolder,
    training::{Event, Message, Observer, PreferenceLoss, ScheduleKind, TrainerConfig},
};
use kiln_examples::{Bar, BaseArgs, Result, check_outputs, say, testdata, write_curve, write_json};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loss {
    /// Direct preference optimization.
    Dpo,
    /// Its form on means over tokens, without a sigmoid.
    Ipo,
    /// Without a reference, on means over tokens, with a margin.
    Simpo,
    /// Without a reference, beside plain training on the better answers.
    Orpo,
    /// On single answers with labels.
    Kto,
}

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    base: BaseArgs,
    /// Rows with prompt, chosen and rejected, for kto with prompt, completion and label: .jsonl, .json or .parquet.
    #[arg(long, required_if_eq("loss", "kto"))]
    data: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "orpo")]
    loss: Loss,
    /// How dear it is to move away from the reference.
    #[arg(long, default_value_t = 0.1)]
    beta: f64,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    /// At most so many steps.
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Pairs of a step.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    #[arg(long, default_value_t = 128)]
    seq_len: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps between validations.
    #[arg(long, default_value_t = 15)]
    every: u64,
    /// Ends the run after so many validations without a lower loss.
    #[arg(long, default_value_t = 3)]
    patience: u64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Goes on from the last checkpoint below --out.
    #[arg(long)]
    resume: bool,
    /// Gets the adapter folder (adapter/), the loss curve (loss.svg), figures (figures/) and checkpoints.
    #[arg(long, default_value = "target/kiln-preferences")]
    out: PathBuf,
    /// Where the figures of the run go.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    fn loss(&self) -> PreferenceLoss {
        let beta = self.beta;
        match self.loss {
            Loss::Dpo => PreferenceLoss::Dpo { beta, label_smoothing: 0.0 },
            Loss::Ipo => PreferenceLoss::Ipo { beta },
            Loss::Simpo => PreferenceLoss::SimPo { beta, margin: beta / 2.0 },
            Loss::Orpo => PreferenceLoss::Orpo { beta },
            Loss::Kto => PreferenceLoss::Kto { beta, desirable: 1.0, undesirable: 1.0 },
        }
    }
}

fn run(options: Options) -> Result<()> {
    let out = Arc::new(OutputFolder::claim(&options.out)?);
    check_outputs([&options.json])?;
    let base = options.base.load()?;
    let path = options.data.clone().unwrap_or_else(|| testdata("training/preferences.jsonl"));
    let data = base.data(&path, options.seq_len)?;
    say!("{}: {}", path.display(), data.report());
    for index in 0..2.min(data.len()) {
        let what = match (data.is_pairs(), index) {
            (true, 0) => "a better answer",
            (true, _) => "a worse one",
            (false, _) => "an answer",
        };
        say!("{what}: {}", base.preview(&data, index)?);
    }
    let (train, validation) = data.split(0.1, options.seed)?;
    let question = [Message::new("user", "What comes to your mind when you hear the word window?")];
    let before = base.chat(&question, 24)?;

    let mut bar = Bar::new(options.steps)?;
    let adapters = AdapterConfig::lora(options.rank, options.alpha).with_seed(options.seed);
    let trainer = TrainerConfig::new(options.steps, options.batch)
        .with_lr(options.lr)
        .with_warmup(options.steps / 20)
        .with_schedule(ScheduleKind::Linear { final_ratio: 0.1 })
        .with_preference(options.loss());
    let mut tuning = base
        .finetune(adapters, train)
        .with_trainer(trainer)
        .with_held_out(validation, options.every)
        .with_patience(options.patience)
        .with_claimed(out, options.every)
        .with_metrics(options.out.join("figures"))
        .on_event(|event: &Event<'_>| Observer::<()>::on_event(&mut bar, event));
    if options.resume {
        tuning = tuning.with_resume();
    }
    let tuned = tuning.run()?;
    bar.finish(&format!("--resume goes on from {}", options.out.join("last").display()))?;

    let report = tuned.report().ok_or("a run has a report")?;
    for evaluation in &report.evaluations {
        let accuracy = evaluation.preference.and_then(|preference| preference.accuracy);
        let accuracy = accuracy.map_or(String::new(), |share| format!(", {:.0} % right", 100.0 * share));
        say!("after {} steps: validation loss {:.4}{accuracy}", evaluation.steps, evaluation.score);
    }
    let adapter = options.out.join("adapter");
    tuned.save_peft(&adapter)?;
    say!("before: {}\nafter: {}", before.trim(), tuned.chat(&question, 24)?.trim());
    if !report.steps.is_empty() {
        write_curve(&options.out.join("loss.svg"), report)?;
    }
    say!("adapter written to {}", adapter.display());
    let best = report.evaluations.iter().rev().find(|evaluation| evaluation.is_best);
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "loss_first": report.steps.first().map(|step| step.loss),
            "validation_after": best.map(|evaluation| evaluation.score),
            "accuracy_after": best.and_then(|evaluation| evaluation.preference).and_then(|preference| preference.accuracy),
            "best_step": best.map(|evaluation| evaluation.steps),
            "steps": report.steps.last().map(|step| step.step + 1),
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
