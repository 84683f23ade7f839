//! Prunes heads and MLP channels by several criteria and repairs each result by training LoRA adapters on it.
//!
//! Without arguments: the embedded model at one ratio, on held-out text of the kind that it was trained on, whose first
//! part calibrates and repairs and whose last third is evaluated.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Parser;
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    models::{CausalLm, Checkpoint, Decoder, Recompute, Windows},
    pruning::{
        BlockPruning, Criterion, CutOptions, HeadRounding, Pruned, PruningRecord, SaveFormat, save_pruned,
    },
    quant::{QuantLinear, files::OutputFolder},
    training::{BatchOptions, DataOptions, Dataset, Order, RunOptions, ScheduleKind, Trainer, TrainerConfig},
};
use kiln_examples::{ModelArgs, Result, check_outputs, perplexity, say, split_ids, write_json};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Shares of heads and channels to remove from the inner blocks, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "0.38")]
    ratio: Vec<f64>,
    /// What is measured, separated by commas: random, l1, l2, taylor_vector, taylor_first, taylor_second, taylor_mixed,
    /// wanda, flap_wifv, flap_ifv, flap_wifn. FLAP's also get its biases.
    #[arg(
        long,
        value_delimiter = ',',
        value_parser = criterion,
        default_value = "random,l2,taylor_first,wanda,flap_wifv"
    )]
    criterion: Vec<Criterion>,
    /// Seed of random choices: calibration windows, the random criterion, adapters, batches.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// MLP widths become multiples of it.
    #[arg(long, default_value_t = 64)]
    round_to: usize,
    /// Windows and tokens of a window that importance is measured on.
    #[arg(long, default_value_t = 32)]
    windows: usize,
    #[arg(long, default_value_t = 64)]
    window_length: usize,
    /// Steps of repair.
    #[arg(long, default_value_t = 100)]
    steps: u64,
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    #[arg(long, default_value_t = 8)]
    rank: usize,
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Text to calibrate, repair and evaluate on, .txt or .u16le; held-out text of the embedded model if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Gets a folder with the pruned checkpoint for each row.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn criterion(name: &str) -> std::result::Result<Criterion, String> {
    serde_json::from_value(name.into()).map_err(|error: serde_json::Error| error.to_string())
}

fn name(criterion: Criterion) -> Result<String> {
    let name = serde_json::to_value(criterion)?;
    Ok(name.as_str().unwrap_or_default().to_string())
}

/// Trains LoRA on all linears of the pruned model; returns the perplexity after that.
fn repair(model: Decoder<QuantLinear>, options: &Options, train: &[u32], held_out: &[u32]) -> Result<f64> {
    let dataset = Dataset::from_ids(train.to_vec(), &DataOptions::new(options.seq_len, model.vocab_size()))?;
    let adapters = AdapterConfig::lora(options.rank, 2.0 * options.rank as f64).with_seed(options.seed);
    let model = Tuned::attach(model, &adapters)?.into_model();
    let mut batch = BatchOptions::new(4);
    (batch.seed, batch.order) = (options.seed, Order::Shuffled);
    let mut config = TrainerConfig::new(options.steps, batch);
    (config.lr, config.warmup) = (options.lr, options.steps / 10);
    config.schedule = ScheduleKind::Linear { final_ratio: 0.1 };
    config.clip = Some(1.0);
    config.recompute = Recompute::None;
    let mut trainer = Trainer::new(model, Arc::new(dataset), config)?;
    trainer.run(&RunOptions::new())?;
    Ok(perplexity(&trainer.into_model(), held_out, options.seq_len)?.perplexity)
}

fn save(checkpoint: &Checkpoint, pruning: &BlockPruning, pruned: &Pruned, folder: &Path) -> Result<()> {
    let record = PruningRecord::new(checkpoint.config().clone(), pruning, &pruned.report)?;
    let saved = save_pruned(&pruned.model, &record, checkpoint, &SaveFormat::AsIs, folder)?;
    say!("{} written, {} bytes", folder.display(), saved.report.bytes);
    Ok(())
}

fn run(options: Options) -> Result<()> {
    let _claim = options.out.as_ref().map(OutputFolder::claim).transpose()?;
    check_outputs([&options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let (model, _) = options.model.load(&checkpoint)?;
    let (train, held_out) = split_ids(options.data.as_deref(), &checkpoint.tokenizer()?)?;
    let calibration = Windows::disjoint(&train, options.window_length, options.windows, options.seed)?;
    let dense = perplexity(&model, &held_out, options.seq_len)?.perplexity;
    say!("dense: perplexity {dense:.2}");
    say!(
        "{:<14} {:>6} {:>12} {:>12} {:>10} {:>10}",
        "criterion",
        "ratio",
        "parameters",
        "bytes",
        "pruned",
        "repaired"
    );

    let mut rows = Vec::new();
    for &criterion in &options.criterion {
        for &ratio in &options.ratio {
            let mut pruning = BlockPruning::new(criterion, ratio);
            (pruning.round_to, pruning.head_rounding) = (options.round_to, HeadRounding::Nearest);
            pruning.seed = options.seed;
            pruning.bias_compensation = name(criterion)?.starts_with("flap");
            let pruned = pruning.prune(model.clone(), Some(&calibration), &CutOptions::default())?;
            let before = perplexity(&pruned.model, &held_out, options.seq_len)?.perplexity;
            if let Some(out) = &options.out {
                let folder = out.join(format!("{}-{ratio}", name(criterion)?));
                save(&checkpoint, &pruning, &pruned, &folder)?;
            }
            let report = pruned.report;
            let after = repair(pruned.model, &options, &train, &held_out)?;
            let (criterion, parameters, bytes) =
                (name(criterion)?, report.parameters_after, report.bytes_after);
            say!("{criterion:<14} {ratio:>6} {parameters:>12} {bytes:>12} {before:>10.2} {after:>10.2}");
            rows.push(serde_json::json!({
                "criterion": criterion,
                "ratio": ratio,
                "parameters_before": report.parameters_before,
                "parameters_after": report.parameters_after,
                "bytes_before": report.bytes_before,
                "bytes_after": report.bytes_after,
                "perplexity_dense": dense,
                "perplexity_pruned": before,
                "perplexity_recovered": after,
                "kept": report.kept,
            }));
        }
    }
    write_json(options.json.as_deref(), &serde_json::json!({ "rows": rows }))
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
