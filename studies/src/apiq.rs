//! Calibrated quantization: a model at few bits by several methods, with perplexity before and after the same
//! fine-tuning, and the activations' error block by block.
//!
//! Without arguments: the embedded model at 2 bits in about two minutes. `--full` takes a larger budget;
//! docs/accuracy.md says which options its tables were made with.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::{Args, ValueEnum};
use kiln::{
    adapters::{Adapted, AdapterConfig, Lora, LoraAttacher},
    calibration::{
        ApiqConfig, ApiqLoss, AwqConfig, CalibrationConfig, CalibrationReport, Calibrator, GptqConfig,
        LoftqConfig, Method, Progress, Rounding, block_errors,
    },
    eval::peak_rss_bytes,
    models::{CausalLm, Checkpoint, Decoder, Recompute, Slots, Windows},
    quant::{Plan, QuantLinear, Scheme},
    training::{BatchOptions, Order, RunOptions, ScheduleKind, Trainer, TrainerConfig},
};
use kiln_examples::{ModelArgs, Result, open_data, perplexity, read_ids, testdata, write_json};
use serde::Serialize;

use crate::plot::Plot;

/// Windows on which errors are measured.
const MEASURED: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodName {
    /// LoRA on the weights as they were: what the others are measured against.
    Dense,
    /// Round to nearest; with LoRA, QLoRA's start.
    Rtn,
    /// NormalFloat, as published for QLoRA; 2 to 4 bits.
    Nf,
    /// AWQ's scaling, then round to nearest.
    Awq,
    /// GPTQ, layer after layer.
    Gptq,
    /// LoftQ, five steps.
    Loftq,
    /// Learned clipping alone, as in OmniQuant.
    Clipping,
    /// ApiQ, layer by layer.
    ApiqLw,
    /// ApiQ, block by block.
    ApiqBw,
}

impl MethodName {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Loss {
    /// The mean square, as published.
    MeanSquared,
    /// Each token's error relative to its length.
    Relative,
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Which methods, in this order.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [
        MethodName::Rtn, MethodName::Gptq, MethodName::Loftq, MethodName::ApiqLw, MethodName::ApiqBw,
    ])]
    methods: Vec<MethodName>,
    #[arg(long, default_value_t = 2)]
    bits: u32,
    /// Inputs that share a scale.
    #[arg(long, default_value_t = 64)]
    group: usize,
    /// Zero points are codes, as in GPTQ's files, rather than real offsets; not for `nf`.
    #[arg(long)]
    int: bool,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Text for evaluation, .txt or .u16le; the embedded model's shifted test text if left out.
    #[arg(long)]
    eval: Option<PathBuf>,
    /// Another text, for calibration and fine-tuning; the embedded model's shifted training text if left out.
    #[arg(long)]
    calibration: Option<PathBuf>,
    #[arg(long, default_value_t = 2)]
    seed: u64,
    /// A larger budget: 32 windows of 512 tokens, 10 epochs, 100 steps.
    #[arg(long)]
    full: bool,
    /// Calibration windows.
    #[arg(long)]
    windows: Option<usize>,
    /// Tokens of a window: of calibration, of evaluation, of the fine-tuning's rows.
    #[arg(long)]
    length: Option<usize>,
    /// Leaves the original's perplexity out; as a row it is that of `dense`.
    #[arg(long)]
    no_original: bool,
    /// Passes of ApiQ over the windows.
    #[arg(long)]
    epochs: Option<usize>,
    /// Learning rate of ApiQ's clipping; the published rate is for eight times the steps.
    #[arg(long, default_value_t = 1e-2)]
    lr_clipping: f64,
    /// Learning rate of ApiQ's factors.
    #[arg(long, default_value_t = 2e-3)]
    lr_lora: f64,
    /// The part of both rates that is left at the end of a block; 1 is constant, as published.
    #[arg(long, default_value_t = 1.0)]
    final_ratio: f64,
    /// What ApiQ brings down.
    #[arg(long, value_enum, default_value_t = Loss::MeanSquared)]
    loss: Loss,
    /// Whether ApiQ has its second target; at 2 bits only if left out, as published.
    #[arg(long)]
    augmented: Option<bool>,
    /// Where ApiQ's clipping logits start: a range is the part `1 / (1 + exp(-logit))` of the group's. The published 4 is
    /// nearly the whole range, from where it takes thousands of steps to move; left out, it is 1 at 2 bits, 2 at 3, 4
    /// above.
    #[arg(long, allow_negative_numbers = true)]
    initial_logit: Option<f32>,
    /// AWQ's scaling before every method, not just before `awq`.
    #[arg(long)]
    scaling: bool,
    /// Steps of the fine-tuning; 0 leaves it out.
    #[arg(long)]
    steps: Option<u64>,
    /// Rows of `--length` tokens in a step of the fine-tuning.
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Learning rate of the fine-tuning.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Gets the plot (apiq.svg) and, with --resume, finished blocks by method.
    #[arg(long, default_value = "target/kiln-apiq")]
    out: PathBuf,
    /// Saves finished blocks and goes on behind those of an earlier run.
    #[arg(long)]
    resume: bool,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    /// `given`, or the value of the short or the full run.
    fn budget<T>(&self, given: Option<T>, short: T, full: T) -> T {
        given.unwrap_or(if self.full { full } else { short })
    }

    fn length(&self) -> usize {
        self.budget(self.length, 128, 512)
    }

    fn config(&self, method: MethodName) -> Result<CalibrationConfig> {
        let scheme: Scheme = match method {
            MethodName::Dense => "dense".into(),
            MethodName::Nf => format!("nf{}:{}", self.bits, self.group),
            _ => format!("affine{}:{}{}", self.bits, self.group, if self.int { ":int" } else { "" }),
        }
        .parse()?;
        let apiq = ApiqConfig {
            epochs: self.budget(self.epochs, 6, 10),
            lr_clipping: self.lr_clipping,
            lr_lora: self.lr_lora,
            final_ratio: self.final_ratio,
            loss: match self.loss {
                Loss::MeanSquared => ApiqLoss::MeanSquared,
                Loss::Relative => ApiqLoss::Relative,
            },
            initial_logit: self.initial_logit.unwrap_or(match self.bits {
                2 => 1.0,
                3 => 2.0,
                _ => 4.0,
            }),
            augmented: self.augmented.unwrap_or(self.bits == 2),
            ..ApiqConfig::default()
        };
        let scaling = (self.scaling || method == MethodName::Awq).then(AwqConfig::default);
        let method = match method {
            MethodName::Dense | MethodName::Rtn | MethodName::Nf | MethodName::Awq => {
                Method::Rtn(Rounding::MinMax)
            }
            MethodName::Gptq => Method::Gptq(GptqConfig::default()),
            MethodName::Loftq => Method::Loftq(LoftqConfig::default()),
            MethodName::Clipping => Method::Clipping(ApiqConfig { weight_decay: 0.0, ..apiq }),
            MethodName::ApiqLw => Method::ApiqLayer(apiq),
            MethodName::ApiqBw => Method::ApiqBlock(apiq),
        };
        let mut config = CalibrationConfig::new(method, Plan::uniform(scheme));
        (config.scaling, config.measured_windows) = (scaling, MEASURED);
        Ok(config)
    }

    fn trainer(&self, steps: u64) -> TrainerConfig {
        let mut batch = BatchOptions::new(self.batch);
        (batch.seed, batch.order) = (self.seed, Order::Shuffled);
        let mut config = TrainerConfig::new(steps, batch);
        (config.lr, config.warmup) = (self.lr, steps / 10);
        config.schedule = ScheduleKind::Cosine { final_ratio: 0.0 };
        (config.clip, config.recompute) = (Some(1.0), Recompute::None);
        config
    }
}

/// Figures of one method.
#[derive(Debug, Serialize)]
struct Row {
    method: String,
    /// 32 for dense weights.
    bits: u32,
    perplexity_before: f64,
    perplexity_after: Option<f64>,
    /// Of the evaluation text, after each block.
    activation_error: Vec<f64>,
    /// Calibration only, all blocks.
    seconds: f64,
    /// Of each block, measuring included; those read by --resume as they took when they were made.
    block_seconds: Vec<f64>,
    /// The process's peak so far: run methods one by one to compare them.
    peak_rss_bytes: Option<u64>,
    /// The same when each block was done.
    block_peak_rss_bytes: Vec<Option<u64>>,
}

type LoraModel = Decoder<Adapted<QuantLinear, Lora>>;

/// A calibrated model and what it took.
struct Calibrated {
    model: LoraModel,
    report: CalibrationReport,
    block_peaks: Vec<Option<u64>>,
}

/// What all methods share.
struct Study<'a> {
    options: &'a Options,
    checkpoint: Checkpoint,
    original: Decoder<QuantLinear>,
    calibration: PathBuf,
    windows: Windows,
    held_out: Vec<u32>,
}

impl Study<'_> {
    fn calibrate(&self, method: MethodName) -> Result<Calibrated> {
        let (base, _) = self.options.model.load(&self.checkpoint)?;
        let adapters = AdapterConfig::lora(self.options.rank, self.options.rank as f64);
        let attacher = LoraAttacher::new(&adapters.with_seed(self.options.seed), &base.slot_shapes())?;
        let config = self.options.config(method)?;
        let mut calibrator = Calibrator::new(&config, &self.windows).with_adapters(&attacher);
        if self.options.resume {
            calibrator = calibrator.with_folder(self.options.out.join(method.name()));
        }
        let bar = indicatif::ProgressBar::new(base.num_blocks() as u64)
            .with_style(indicatif::ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} {msg} {eta}")?)
            .with_prefix(method.name());
        let mut block_peaks = Vec::new();
        let (model, report) = calibrator.run_with(base, &mut |progress| {
            if let Progress::Block { report, .. } = progress {
                block_peaks.push(peak_rss_bytes());
                bar.set_position(report.index as u64 + 1);
                bar.set_message(format!("error {:.3}", report.activation_error));
            }
            ControlFlow::Continue(())
        })?;
        bar.finish_and_clear();
        Ok(Calibrated { model, report, block_peaks })
    }

    fn fine_tune(&self, model: LoraModel, steps: u64) -> Result<LoraModel> {
        let dataset =
            open_data(&self.calibration, &self.checkpoint, self.options.length(), model.vocab_size())?;
        let mut trainer = Trainer::new(model, Arc::new(dataset), self.options.trainer(steps))?;
        trainer.run(&RunOptions::new())?;
        Ok(trainer.into_model())
    }

    fn row(&self, method: MethodName) -> Result<Row> {
        let Calibrated { model, report, block_peaks } = self.calibrate(method)?;
        let block_seconds: Vec<f64> = report.blocks.iter().map(|block| block.seconds).collect();
        let peak = peak_rss_bytes();
        let window = self.options.length();
        let before = perplexity(&model, &self.held_out, window)?.perplexity;
        let measured = Windows::leading(&self.held_out, window, MEASURED)?;
        let activation_error = block_errors(&self.original, &model, &measured)?;
        let steps = self.options.budget(self.options.steps, 40, 100);
        let after = match steps {
            0 => None,
            steps => Some(perplexity(&self.fine_tune(model, steps)?, &self.held_out, window)?.perplexity),
        };
        Ok(Row {
            method: method.name(),
            bits: if method == MethodName::Dense { 32 } else { self.options.bits },
            perplexity_before: before,
            perplexity_after: after,
            activation_error,
            seconds: block_seconds.iter().sum(),
            block_seconds,
            peak_rss_bytes: peak,
            block_peak_rss_bytes: block_peaks,
        })
    }
}

/// Errors by block, a line a method.
fn plot(path: &Path, rows: &[Row]) -> Result<()> {
    let series = rows.iter().map(|row| {
        let points = row.activation_error.iter().enumerate().map(|(block, error)| (block as f64, *error));
        (row.method.clone(), points.collect())
    });
    let caption = "Residual stream: norm of the error over norm";
    Plot { caption, x: "after block", logarithmic: false }.draw(path, &series.collect::<Vec<_>>())
}

fn print(rows: &[Row]) {
    println!(
        "{:10} {:>4} {:>12} {:>12} {:>11} {:>11} {:>8}",
        "method", "bits", "ppl before", "ppl after", "error first", "error last", "seconds"
    );
    for row in rows {
        let after = row.perplexity_after.map_or("-".to_string(), |after| format!("{after:.2}"));
        let error = |error: Option<&f64>| error.map_or("-".to_string(), |error| format!("{error:.3}"));
        println!(
            "{:10} {:>4} {:>12.2} {after:>12} {:>11} {:>11} {:>8.1}",
            row.method,
            row.bits,
            row.perplexity_before,
            error(row.activation_error.first()),
            error(row.activation_error.last()),
            row.seconds
        );
    }
}

pub(crate) fn run(options: Options) -> Result<()> {
    std::fs::create_dir_all(&options.out).map_err(|error| format!("{}: {error}", options.out.display()))?;
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let (original, _) = options.model.load(&checkpoint)?;
    let text = |path: &Option<PathBuf>, embedded: &str| path.clone().unwrap_or_else(|| testdata(embedded));
    let calibration = text(&options.calibration, "models/tiny-llama/text/shift_train_moby.txt");
    let eval = text(&options.eval, "models/tiny-llama/text/shift_test_moby.txt");
    let ids = read_ids(&calibration, &tokenizer)?;
    let count = options.budget(options.windows, 16, 32);
    let windows = Windows::random(&ids, options.length(), count, options.seed)?;
    let held_out = read_ids(&eval, &tokenizer)?;
    if !options.no_original {
        println!(
            "original: perplexity {:.2}",
            perplexity(&original, &held_out, options.length())?.perplexity
        );
    }
    let methods = options.methods.clone();
    let study = Study { options: &options, checkpoint, original, calibration, windows, held_out };
    let rows = methods.into_iter().map(|method| study.row(method)).collect::<Result<Vec<Row>>>()?;
    print(&rows);
    let path = options.out.join("apiq.svg");
    plot(&path, &rows)?;
    println!("plot written to {}", path.display());
    write_json(options.json.as_deref(), &serde_json::json!({ "rows": rows }))
}
