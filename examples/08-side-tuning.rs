//! A side network (QST) and LoRA on the same 4-bit backbone: trained values, time of a step, held-out loss, and the memory
//! that each step is predicted to take.
//!
//! Without arguments: the embedded model, 20 steps of each, in about half a minute.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::Parser;
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    models::{CausalLm, DriverOptions, Recompute},
    quant::{Scheme, files::OutputFolder, trained_values},
    side_tuning::{
        SideConfig, SideTuned,
        memory::{Halves, Method, ProcessConstants, Step, estimate},
    },
    training::{Dataset, RunOptions, Trainer, TrainerConfig},
};
use kiln_examples::{
    Bar, ModelArgs, Result, check_outputs, open_data, perplexity, read_ids, say, testdata, write_json,
};

const RANK: usize = 16;

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a row.
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Backbone width over side width.
    #[arg(long, default_value_t = 16)]
    reduction: usize,
    /// Gets the folder of the side network (side/).
    #[arg(long, default_value = "target/kiln-side")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

struct Trained<M> {
    model: M,
    values: usize,
    /// Of the fastest step.
    seconds: f64,
    loss: f64,
}

fn train<M: CausalLm>(
    model: M,
    lr: f64,
    data: &Arc<Dataset>,
    held_out: &[u32],
    options: &Options,
) -> Result<Trained<M>> {
    let recipe = TrainerConfig::new(options.steps, options.batch).with_lr(lr);
    let mut trainer = Trainer::new(model, data.clone(), recipe)?;
    let values = trained_values(trainer.model());
    let mut bar = Bar::new(options.steps)?;
    let steps = trainer.run_with(&RunOptions::new(), &mut bar)?.steps;
    bar.finish("nothing was written")?;
    let seconds = steps.iter().map(|step| step.seconds).fold(f64::INFINITY, f64::min);
    let model = trainer.into_model();
    let loss = perplexity(&model, held_out, options.seq_len)?.nll;
    Ok(Trained { model, values, seconds, loss })
}

fn run(mut options: Options) -> Result<()> {
    options.model.scheme.get_or_insert("nf4:64:double".parse::<Scheme>()?);
    let out = OutputFolder::claim(&options.out)?;
    check_outputs([&options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let text = |name: &str| testdata(&format!("models/tiny-llama/text/{name}.txt"));
    let (backbone, report) = options.model.load(&checkpoint)?;
    let data =
        Arc::new(open_data(&text("shift_train_moby"), &checkpoint, options.seq_len, backbone.vocab_size())?);
    let mut held_out = read_ids(&text("shift_test_moby"), &checkpoint.tokenizer()?)?;
    held_out.truncate(16 * options.seq_len);

    let bytes = report.storage.total_bytes();
    let step = Step {
        batch: options.batch,
        seq_len: options.seq_len,
        recompute: Recompute::None,
        logit_rows: DriverOptions::default().logit_rows,
        halves: Halves::of(&backbone),
    };
    let predict = |method| estimate(checkpoint.config(), bytes, &method, &step);
    let side = SideConfig::qst().with_reduction(options.reduction);
    let predicted = [predict(Method::Lora { rank: RANK })?, predict(Method::Side(side.clone()))?]
        .map(|memory| memory.peak_rss(&ProcessConstants::CPU));

    let adapted = Tuned::attach(backbone.clone(), &AdapterConfig::lora(RANK, RANK as f64))?.into_model();
    let lora = train(adapted, 1e-3, &data, &held_out, &options)?;
    // A side network starts at random and takes larger steps than weights that were trained before.
    let qst = train(SideTuned::new(backbone, &side, 0)?, 3e-3, &data, &held_out, &options)?;
    qst.model.save(out.path().join("side"))?;

    say!("{:<5} {:>10} {:>8} {:>12} {:>8}", "what", "trained", "s/step", "predicted MB", "loss");
    let row = |name, values, seconds, peak: f64, loss| {
        say!("{name:<5} {values:>10} {seconds:>8.3} {:>12.1} {loss:>8.4}", peak / 1e6);
        serde_json::json!({
            "method": name,
            "trainable_parameters": values,
            "step_seconds": seconds,
            "predicted_peak_bytes": peak,
            "loss": loss,
        })
    };
    let rows = [
        row("lora", lora.values, lora.seconds, predicted[0], lora.loss),
        row("qst", qst.values, qst.seconds, predicted[1], qst.loss),
    ];
    say!("side network written to {}", out.path().join("side").display());
    write_json(options.json.as_deref(), &serde_json::json!({ "rows": rows }))
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
