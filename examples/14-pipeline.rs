//! The whole way: prune, search bits, start by ApiQ, tune on a task, evaluate, save, reload, ask again.
//!
//! Without arguments: the embedded model and a task that comes with the repository, in less than two minutes.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::Parser;
use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{ApiqConfig, CalibrationConfig, Method},
    eval::disk_bytes,
    mixq::{Choices, schemes, space_of},
    mixq_search::Granularity,
    models::Windows,
    pruning::{BlockPruning, Criterion, HeadRounding},
    quant::{Scheme, files::OutputFolder},
    training::{Event, Observer, ScheduleKind},
};
use kiln_examples::{
    Bar, Questions, Result, check_outputs, model_folder, model_path, read_ids, save_replacing, say, testdata,
    write_curve, write_json,
};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// A checkpoint folder, a .gguf file, or a name of the Hugging Face hub that is in its cache; the embedded model if left out.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Fetch a model of the hub that isn't in its cache.
    #[arg(long)]
    download: bool,
    /// A task of multiple choice: a name of the harness or a description file, with a training split.
    #[arg(long)]
    task: Option<String>,
    /// The folder with the task's data, unless it names its own files.
    #[arg(long, default_value = "data")]
    data: PathBuf,
    /// Documents that are scored, and that are learned, at most.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    /// Text to measure importance and layers on, .txt or .u16le.
    #[arg(long)]
    text: Option<PathBuf>,
    /// The share of heads and channels to remove from the inner blocks; 0 removes none.
    #[arg(long, default_value_t = 0.2)]
    prune: f64,
    /// Formats to choose from for each block's attention and MLP, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "affine2:64,affine3:64,affine4:64")]
    schemes: Vec<Scheme>,
    /// The uniform plan whose bytes are the limit.
    #[arg(long, default_value = "affine3:64")]
    within: Scheme,
    /// Plans that may be measured.
    #[arg(long, default_value_t = 40)]
    evaluations: usize,
    /// Windows for all of that, and their tokens.
    #[arg(long, default_value_t = 16)]
    windows: usize,
    #[arg(long, default_value_t = 64)]
    length: usize,
    /// Tokens of a training row.
    #[arg(long, default_value_t = 128)]
    seq_len: usize,
    /// Passes of ApiQ over the windows.
    #[arg(long, default_value_t = 3)]
    epochs: usize,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 200)]
    steps: u64,
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Gets the model (model/), the adapter (adapter/), the loss curve (loss.svg) and checkpoints.
    #[arg(long, default_value = "target/kiln-pipeline")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Prunes, searches bits, and quantizes and starts adapters by ApiQ.
fn compressed(base: &Base, windows: &Windows, options: &Options) -> Result<FineTuned> {
    let pruned = match options.prune {
        0.0 => base.with_model(base.model().clone()),
        ratio => {
            let mut pruning = BlockPruning::new(Criterion::TaylorFirst, ratio);
            (pruning.round_to, pruning.head_rounding, pruning.seed) =
                (64, HeadRounding::Nearest, options.seed);
            let (pruned, report) = base.prune(&pruning, Some(windows))?;
            say!("pruned: {} of {} parameters stay", report.parameters_after, report.parameters_before);
            pruned
        }
    };
    let choices = Choices::new(options.schemes.iter().copied()).with_granularity(Granularity::Block);
    let limit = space_of(pruned.model(), &Choices::new([options.within]))?.smallest();
    let found = pruned.search(&choices, windows, options.evaluations)?;
    let best = found.front.select(limit)?;
    say!("searched: {} plans measured; {} bytes, where {limit} are allowed", found.evaluations, best.bytes);
    // One set of values for all widths of the plan: those of the limit's.
    let bits = match options.within {
        Scheme::Packed(scheme) => scheme.bits(),
        Scheme::Dense => 8,
    };
    let apiq = ApiqConfig::for_budget(bits, options.windows, options.epochs);
    let adapters = AdapterConfig::lora(options.rank, options.rank as f64).with_seed(options.seed);
    let config = CalibrationConfig::new(Method::ApiqBlock(apiq), schemes(&best.plan)?);
    Ok(pruned.calibrate(adapters, &config, windows)?)
}

fn run(options: Options) -> Result<()> {
    let out = Arc::new(OutputFolder::claim(&options.out)?);
    check_outputs([&Some(out.path().join("loss.svg")), &options.json])?;
    let (model, adapter) = (model_folder(out.path(), options.model.as_deref())?, out.path().join("adapter"));
    let questions = Questions::open(options.task.as_deref(), &options.data, options.limit)?;
    let base = Base::open(model_path(options.model.as_deref(), options.download)?)?.load()?;
    let text = options
        .text
        .clone()
        .unwrap_or_else(|| testdata("models/tiny-llama/text/indomain_heldout_sotu_2011.u16le"));
    let ids = read_ids(&text, base.tokenizer())?;
    let windows = Windows::random(&ids, options.length, options.windows, options.seed)?;
    let logs = tempfile::tempdir()?;
    let [of_base, of_start, of_tuned, of_reloaded] =
        ["base", "start", "tuned", "reloaded"].map(|name| logs.path().join(name).with_extension("jsonl"));
    let data = questions.dataset(&base, options.seq_len, |_| true)?;
    say!("training split: {}", data.report());
    let of_original = questions.accuracy(base.model(), base.tokenizer(), &of_base)?;
    say!("{}: accuracy {of_original:.3}", questions.name());

    let start = compressed(&base, &windows, &options)?;
    let before = questions.accuracy(start.model(), base.tokenizer(), &of_start)?;
    say!("compressed: accuracy {before:.3}");
    // Before the steps, which can be told to end.
    save_replacing(&model, |folder| start.without_adapters().save(folder))?;
    let mut bar = Bar::new(options.steps)?;
    let tuned = start
        .finetune(data)
        .with_steps(options.steps)
        .with_batch(options.batch)
        .with_lr(options.lr)
        .with_warmup(options.steps / 20)
        .with_schedule(ScheduleKind::Cosine { final_ratio: 0.1 })
        .with_claimed(out.clone(), 0)
        .on_event(|event: &Event<'_>| Observer::<()>::on_event(&mut bar, event))
        .run()?;
    bar.finish(&format!("{} has the model, and last/ what was tuned", out.path().display()))?;
    let after = questions.accuracy(tuned.model(), base.tokenizer(), &of_tuned)?;
    say!("tuned: accuracy {after:.3}");

    tuned.save(&adapter)?;
    if let Some(report) = tuned.report() {
        write_curve(&out.path().join("loss.svg"), report)?;
    }
    let stored = disk_bytes(&model)? + disk_bytes(&adapter)?;
    let reloaded = Base::open(&model)?.load()?.load_adapters(&adapter)?;
    let again = questions.accuracy(reloaded.model(), base.tokenizer(), &of_reloaded)?;
    let equal = std::fs::read(&of_tuned)? == std::fs::read(&of_reloaded)?;
    say!("reloaded: accuracy {again:.3}, answers equal: {equal}; {stored} bytes in {}", out.path().display());
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "accuracy_original": of_original,
            "accuracy_before": before,
            "accuracy_after": after,
            "stored_bytes": stored,
            "original_bytes": disk_bytes(base.checkpoint().path())?,
            "answers_equal_after_reload": equal,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
