//! A model at 2 bits: rounded to nearest, and calibrated by ApiQ, each with LoRA before and after the same fine-tune.
//!
//! Without arguments: the embedded model, 16 windows and 6 epochs, in about a minute.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{
    convert::Infallible,
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Parser;
use kiln::{
    Tuned,
    adapters::{Adapted, AdapterConfig, Lora, LoraAttacher},
    calibration::{ApiqConfig, CalibrationConfig, Calibrator, Method, Progress, Rounding},
    models::{CausalLm, Checkpoint, Decoder, Slots, Windows, export::save_model},
    quant::{Plan, QuantLinear, Scheme, files::OutputFolder},
    training::{RunOptions, Trainer, TrainerConfig},
};
use kiln_examples::{
    Bar, ModelArgs, Result, check_outputs, model_folder, open_data, perplexity, read_ids, save_replacing,
    say, testdata, write_json,
};

/// What is compared.
const METHODS: [&str; 2] = ["rounding", "apiq"];

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// The format of both bases.
    #[arg(long, default_value = "affine2:64")]
    bits: Scheme,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// Text to calibrate and tune on, .txt; the embedded model's shifted training text if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Held-out text, .txt or .u16le.
    #[arg(long)]
    eval: Option<PathBuf>,
    /// Calibration windows.
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Tokens of a window and of a row.
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Passes of ApiQ over the windows.
    #[arg(long, default_value_t = 6)]
    epochs: usize,
    /// Steps of the fine-tunes.
    #[arg(long, default_value_t = 40)]
    steps: u64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Gets a folder for each method, with the base (model/) and the tuned adapter (adapter/).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Writes base and adapter.
fn save(
    model: Decoder<Adapted<QuantLinear, Lora>>,
    adapters: &AdapterConfig,
    checkpoint: &Checkpoint,
    folder: &Path,
) -> Result<()> {
    let base = model.clone().try_map(|_, slot| Ok::<_, Infallible>(slot.into_base()))?;
    save_replacing(&folder.join("model"), |folder| save_model(&base, checkpoint, folder))?;
    let model = model.try_map(|_, slot| Ok::<_, Infallible>(slot.into_any()))?;
    Tuned::<Decoder<QuantLinear>>::from_parts(model, adapters.clone()).save(folder.join("adapter"))?;
    say!("written to {}", folder.display());
    Ok(())
}

fn run(options: Options) -> Result<()> {
    let out = options.out.as_ref().map(OutputFolder::claim).transpose()?;
    check_outputs([&options.json])?;
    if let Some(out) = &out {
        METHODS.iter().try_for_each(|method| {
            model_folder(&out.path().join(method), options.model.model.as_deref()).map(drop)
        })?;
    }
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let text = |path: &Option<PathBuf>, name: &str| path.clone().unwrap_or_else(|| testdata(name));
    let train = text(&options.data, "models/tiny-llama/text/shift_train_moby.txt");
    let held_out = text(&options.eval, "models/tiny-llama/text/shift_test_moby.u16le");
    let held_out = read_ids(&held_out, &tokenizer)?;
    let ids = read_ids(&train, &tokenizer)?;
    let windows = Windows::random(&ids, options.length, options.windows, options.seed)?;
    let adapters = AdapterConfig::lora(options.rank, options.rank as f64).with_seed(options.seed);
    let Scheme::Packed(scheme) = options.bits else {
        return Err(format!("--bits: expected a packed format, found {}", options.bits).into());
    };
    let apiq = ApiqConfig::for_budget(scheme.bits(), options.windows, options.epochs);

    say!("{:<10} {:>8} {:>8}", "method", "before", "after");
    let mut rows = Vec::new();
    for (name, method) in METHODS.into_iter().zip([Method::Rtn(Rounding::MinMax), Method::ApiqBlock(apiq)]) {
        let (base, _) = options.model.load(&checkpoint)?;
        let data = open_data(&train, &checkpoint, options.length, base.vocab_size())?;
        let attacher = LoraAttacher::new(&adapters, &base.slot_shapes())?;
        let config = CalibrationConfig::new(method, Plan::uniform(options.bits));
        let blocks = indicatif::ProgressBar::new(base.num_blocks() as u64);
        let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher);
        let (model, _) = calibrator.run_with(base, &mut |progress| {
            if let Progress::Block { .. } = progress {
                blocks.inc(1);
            }
            ControlFlow::Continue(())
        })?;
        blocks.finish_and_clear();
        let before = perplexity(&model, &held_out, options.length)?.perplexity;

        let recipe = TrainerConfig::new(options.steps, 4).with_lr(1e-3);
        let mut trainer = Trainer::new(model, Arc::new(data), recipe)?;
        let mut bar = Bar::new(options.steps)?;
        trainer.run_with(&RunOptions::new(), &mut bar)?;
        bar.finish("what was tuned so far is lost")?;
        let model = trainer.into_model();
        let after = perplexity(&model, &held_out, options.length)?.perplexity;
        if let Some(out) = &out {
            save(model, &adapters, &checkpoint, &out.path().join(name))?;
        }
        say!("{name:<10} {before:>8.2} {after:>8.2}");
        rows.push(serde_json::json!({
            "method": name,
            "perplexity_before": before,
            "perplexity_after": after,
        }));
    }
    write_json(options.json.as_deref(), &serde_json::json!({ "rows": rows }))
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
