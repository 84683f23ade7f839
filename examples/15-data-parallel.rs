//! Several ranks share a run: threads of this process, or processes that `mpirun` or `srun` starts. Losses and adapter are
//! those of one rank, bit for bit.
//!
//! Without arguments: the embedded model at 4 bits on rows that come with the repository, two threads. With the feature
//! `mpi`: `mpirun -n 2 15-data-parallel --ranks mpi`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use burn::tensor::Device;
use clap::Parser;
use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{CalibrationConfig, GptqConfig, Method},
    distributed::{Alone, Communicator, Sharing, agreed},
    models::{Recompute, Windows},
    quant::{Plan, Scheme, files::OutputFolder},
    training::{BatchOptions, Dataset, Event, Observer, TrainerConfig},
};
use kiln_examples::{Bar, BaseArgs, Result, check_outputs, read_ids, say, testdata, write_json};

/// Who shares the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ranks {
    Threads(usize),
    Mpi,
}

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match (text, text.parse()) {
            ("mpi", _) => Ok(Self::Mpi),
            (_, Ok(count @ 1..=1024)) => Ok(Self::Threads(count)),
            _ => Err(format!("expected mpi, or a number of threads from 1 to 1024, found {text:?}")),
        }
    }
}

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    base: BaseArgs,
    /// A number of threads, or mpi.
    #[arg(long, default_value = "2")]
    ranks: Ranks,
    /// Seconds after which a rank that doesn't answer is given up; of MPI only.
    #[arg(long, default_value_t = 600)]
    patience: u64,
    /// Rows of chats, instructions, or prompts and completions: .jsonl, .json or .parquet.
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 40)]
    steps: u64,
    /// Rows of a micro-batch.
    #[arg(long, default_value_t = 2)]
    batch: usize,
    /// Micro-batches of a step, of all ranks together: a multiple of their number.
    #[arg(long, default_value_t = 4)]
    accumulate: usize,
    #[arg(long, default_value_t = 128)]
    seq_len: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps between validations and checkpoints.
    #[arg(long, default_value_t = 10)]
    every: u64,
    /// Calibrates the model by GPTQ to this format first, windows and projections shared by the ranks: affine3:64, with
    /// --scheme dense or the checkpoint's own weights.
    #[arg(long)]
    gptq: Option<Scheme>,
    /// The text that --gptq looks at.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Windows of --seq-len tokens of it.
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Parts in which --gptq's sums are made, at least as many as ranks: what the last bits depend on.
    #[arg(long, default_value_t = 4)]
    parts: usize,
    /// Keeps blocks' inputs only, and computes the rest again.
    #[arg(long)]
    recompute: bool,
    /// Goes on from the last checkpoint below --out, with whatever number of ranks.
    #[arg(long)]
    resume: bool,
    /// Gets the adapter folder (adapter/), figures (figures/) and checkpoints, from the first rank.
    #[arg(long, default_value = "target/kiln-data-parallel")]
    out: PathBuf,
    /// Where the first rank's figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[cfg(feature = "mpi")]
fn mpi(patience: Duration) -> Result<Arc<dyn Communicator>> {
    Ok(Arc::new(kiln::distributed::Mpi::start(patience)?))
}

#[cfg(not(feature = "mpi"))]
fn mpi(_: Duration) -> Result<Arc<dyn Communicator>> {
    Err("this program was built without MPI: add `--features mpi` to the command".into())
}

fn run(options: Options) -> Result<()> {
    let (ranks, threads) = match options.ranks {
        Ranks::Mpi => (mpi(Duration::from_secs(options.patience))?, 1),
        Ranks::Threads(count) => (Arc::new(Alone) as Arc<dyn Communicator>, count),
    };
    let is_first = ranks.rank() == 0;
    // What fails on one rank alone, the others hear of, and don't wait for it.
    let claimed = agreed(&*ranks, if is_first { claim(&options).map(Some) } else { Ok(None) })?;
    let (claimed, mut bar) = claimed.unzip();
    let (base, path, data) = agreed(&*ranks, read(&options))?;
    if is_first {
        say!("{} ranks; {}: {}", ranks.size() * threads, path.display(), data.report());
    }
    let (train, validation) = data.split(0.1, 0)?;
    let recompute = if options.recompute { Recompute::Block } else { Recompute::None };
    let config = TrainerConfig::new(options.steps, BatchOptions::new(options.batch))
        .with_lr(options.lr)
        .with_accumulate(options.accumulate)
        .with_recompute(recompute);
    let adapters = AdapterConfig::lora(options.rank, options.rank as f64);
    let base = base.with_sharing(Sharing::new(ranks.clone(), options.parts));
    let calibrated =
        options.gptq.map(|scheme| calibrated(&base, adapters.clone(), scheme, &options)).transpose()?;
    let start = match &calibrated {
        Some(calibrated) => calibrated.finetune(train),
        None => base.finetune(adapters, train),
    };
    let mut tuning = start
        .with_trainer(config)
        .with_held_out(validation, options.every)
        .with_ranks(ranks.clone())
        .with_devices(vec![Device::flex(); threads - 1])
        .on_event(|event: &Event<'_>| match &mut bar {
            Some(bar) => Observer::<()>::on_event(bar, event),
            None => ControlFlow::Continue(()),
        });
    tuning = match claimed {
        Some(out) => tuning.with_claimed(out, options.every).with_metrics(options.out.join("figures")),
        None => tuning.with_checkpoints(&options.out, options.every),
    };
    if options.resume {
        tuning = tuning.with_resume();
    }
    let tuned = tuning.run()?;
    agreed(&*ranks, bar.map_or(Ok(()), |bar| finish(&options, &tuned, bar, ranks.size() * threads)))
}

/// The first rank's folder and bar, before the work.
fn claim(options: &Options) -> Result<(Arc<OutputFolder>, Bar)> {
    check_outputs([&options.json])?;
    Ok((Arc::new(OutputFolder::claim(&options.out)?), Bar::new(options.steps)?))
}

/// The model, and the rows with their file.
fn read(options: &Options) -> Result<(Base, PathBuf, Dataset)> {
    let base = options.base.load()?;
    let path = options.data.clone().unwrap_or_else(|| testdata("training/instruct.jsonl"));
    let data = base.data(&path, options.seq_len)?;
    Ok((base, path, data))
}

/// The model's weights by GPTQ, which all ranks make together.
fn calibrated(base: &Base, adapters: AdapterConfig, scheme: Scheme, options: &Options) -> Result<FineTuned> {
    let ranks = base.sharing().ranks();
    let windows = || -> Result<Windows> {
        let text =
            options.text.clone().unwrap_or_else(|| testdata("models/tiny-llama/text/shift_train_moby.txt"));
        let ids = read_ids(&text, base.tokenizer())?;
        Ok(Windows::random(&ids, options.seq_len, options.windows, 0)?)
    };
    let windows = agreed(ranks, windows())?;
    let config = CalibrationConfig::new(Method::Gptq(GptqConfig::default()), Plan::uniform(scheme));
    let start = Instant::now();
    let found = base.calibrate(adapters, &config, &windows)?;
    if ranks.rank() == 0 {
        say!("calibrated in {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(found)
}

/// What the first rank writes and says.
fn finish(options: &Options, tuned: &FineTuned, bar: Bar, ranks: usize) -> Result<()> {
    bar.finish(&format!("--resume goes on from {}", options.out.join("last").display()))?;
    let report = tuned.report().ok_or("a run has a report")?;
    let adapter = options.out.join("adapter");
    tuned.save_peft(&adapter)?;
    say!("adapter written to {}", adapter.display());
    let seconds: f64 = report.steps.iter().map(|step| step.seconds).sum();
    let exchange: f64 = report.steps.iter().map(|step| step.exchange_seconds).sum();
    let tokens: usize = report.steps.iter().map(|step| step.tokens).sum();
    say!(
        "{:.0} tokens/s; {:.1} % of the time between ranks",
        tokens as f64 / seconds,
        100.0 * exchange / seconds
    );
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "ranks": ranks,
            "losses": report.steps.iter().map(|step| step.loss).collect::<Vec<_>>(),
            "validation": report.evaluations.iter().map(|evaluation| evaluation.score).collect::<Vec<_>>(),
            "tokens_per_second": tokens as f64 / seconds,
            "exchange_seconds": exchange,
            "seconds": seconds,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
