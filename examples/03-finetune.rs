//! The main job: fine-tunes adapters on a packed base, with perplexity before and after and a sample.
//!
//! Without arguments: the embedded model at 4 bits, its recipe, a text that it was not trained on.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Parser, ValueEnum};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, InitLoraWeights, Method},
    eval::peak_rss_bytes,
    models::{CausalLm, Decoder, GenerateOptions, Recompute, generate},
    quant::{QuantLinear, files::OutputFolder, trained_values},
    training::{BatchOptions, Order, RunOptions, ScheduleKind, Trainer, TrainerConfig},
};
use kiln_examples::{
    Bar, ModelArgs, Result, check_outputs, open_data, perplexity, read_ids, say, testdata, write_json,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Adapter {
    /// Low-rank adapters.
    Lora,
    /// Low-rank adapters with trained magnitudes.
    Dora,
    /// Low-rank adapters that start as the weights' largest singular values.
    Pissa,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Schedule {
    Constant,
    /// Down to a tenth on a straight line.
    Linear,
    /// Down to a tenth along half a cosine wave.
    Cosine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Recomputed {
    None,
    /// A block's inputs are kept, the rest is computed again: less memory, a third more time.
    Block,
}

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// What is trained.
    #[arg(long, value_enum, default_value = "lora")]
    method: Adapter,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Names of the linears to adapt, separated by commas; all of the blocks' if left out.
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Rows of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Batches whose gradients are summed for a step.
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps over which the rate rises.
    #[arg(long, default_value_t = 10)]
    warmup: u64,
    /// How the rate falls.
    #[arg(long, value_enum, default_value = "linear")]
    schedule: Schedule,
    /// What is computed twice to save memory.
    #[arg(long, value_enum, default_value = "none")]
    recompute: Recomputed,
    /// Steps between checkpoints; 0 for one at the end.
    #[arg(long, default_value_t = 0)]
    save_every: u64,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// .txt, .jsonl or .u16le; the embedded model's shifted text if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Held-out text, .txt or .u16le.
    #[arg(long)]
    eval: Option<PathBuf>,
    /// Tokens of an evaluation window; the sequence length if left out.
    #[arg(long)]
    window: Option<usize>,
    /// Goes on from the last checkpoint below --out.
    #[arg(long)]
    resume: bool,
    /// Gets the adapter folder (adapter/) and the last checkpoint (last/).
    #[arg(long, default_value = "target/kiln-finetune")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    fn adapters(&self) -> AdapterConfig {
        let method = match self.method {
            Adapter::Lora => Method::lora(),
            Adapter::Dora => Method::dora(),
            Adapter::Pissa => Method::Lora { init: InitLoraWeights::Pissa { iterations: None } },
        };
        let mut config =
            AdapterConfig::new(method, self.rank, self.alpha).with_dropout(self.dropout).with_seed(self.seed);
        if !self.targets.is_empty() {
            config = config.with_targets(self.targets.clone());
        }
        // The name only: the folder may be published, and paths of this machine mean nothing elsewhere.
        match self.model.model.as_ref().and_then(|path| path.file_name()) {
            Some(name) => config.with_base_model(name.to_string_lossy()),
            None => config,
        }
    }

    fn trainer(&self) -> TrainerConfig {
        let mut batch = BatchOptions::new(self.batch);
        (batch.seed, batch.order) = (self.seed, Order::Shuffled);
        // Short rows share a sequence.
        batch.packing =
            self.data.as_ref().is_some_and(|path| path.extension().is_some_and(|found| found == "jsonl"));
        let mut config = TrainerConfig::new(self.steps, batch);
        (config.lr, config.warmup, config.accumulate) = (self.lr, self.warmup, self.accumulate);
        config.schedule = match self.schedule {
            Schedule::Constant => ScheduleKind::Constant,
            Schedule::Linear => ScheduleKind::Linear { final_ratio: 0.1 },
            Schedule::Cosine => ScheduleKind::Cosine { final_ratio: 0.1 },
        };
        config.recompute = match self.recompute {
            Recomputed::None => Recompute::None,
            Recomputed::Block => Recompute::Block,
        };
        config
    }
}

fn run(mut options: Options) -> Result<()> {
    if options.model.model.is_none() {
        options.model.scheme.get_or_insert("affine4:64".parse()?);
    }
    // Before the work: nobody else writes there, and it can be written.
    let out = Arc::new(OutputFolder::claim(&options.out)?);
    check_outputs([&options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let (base, report) = options.model.load(&checkpoint)?;
    say!("base: {} values in {} bytes", report.storage.total_values(), report.storage.total_bytes());

    let text = |path: &Option<PathBuf>, name: &str| path.clone().unwrap_or_else(|| testdata(name));
    let data = text(&options.data, "models/tiny-llama/text/shift_train_moby.txt");
    let data = Arc::new(open_data(&data, &checkpoint, options.seq_len, base.vocab_size())?);
    let held_out = text(&options.eval, "models/tiny-llama/text/shift_test_moby.u16le");
    let held_out = read_ids(&held_out, &tokenizer)?;
    let window = options.window.unwrap_or(options.seq_len);

    let tuned = Tuned::attach(base, &options.adapters())?;
    let mut identity = tuned.identity();
    identity.insert("tokenizer".into(), tokenizer.fingerprint()?);
    let (model, adapters) = tuned.into_parts();
    let before = perplexity(&model, &held_out, window)?;
    say!("perplexity before: {:.3} over {} tokens", before.perplexity, before.tokens);

    let mut trainer = Trainer::new(model, data, options.trainer())?.with_identity(identity);
    if options.resume {
        trainer = trainer.resumed(options.out.join("last"))?;
    }
    let trainable = trained_values(trainer.model());
    say!("training {trainable} parameters");
    let mut bar = Bar::new(options.steps)?;
    let saving = RunOptions::new().with_claimed(out).with_save_every(options.save_every);
    let steps = trainer.run_with(&saving, &mut bar)?.steps;
    let last = options.out.join("last");
    bar.finish(&format!("the checkpoint is in {}, --resume goes on from it", last.display()))?;

    let tuned = Tuned::<Decoder<QuantLinear>>::from_parts(trainer.into_model(), adapters);
    let after = perplexity(tuned.model(), &held_out, window)?;
    let tokens: usize = steps.iter().map(|step| step.tokens).sum();
    // A run that was done already has no steps.
    let rate = tokens as f64 / steps.iter().map(|step| step.seconds).sum::<f64>().max(f64::MIN_POSITIVE);
    say!("perplexity after: {:.3}; {rate:.0} tokens/s", after.perplexity);
    let adapter = options.out.join("adapter");
    tuned.save_peft(&adapter)?;
    say!("adapter written to {}", adapter.display());

    let prompt = "The whale";
    let stop = GenerateOptions::new(24).with_stop(tokenizer.special().eos.clone());
    let ids = tokenizer.encode(prompt, true)?;
    let sample = generate(tuned.model(), &ids, &stop)?;
    say!("sample: {prompt}{}", tokenizer.decode(&sample.ids, true)?);
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "losses": steps.iter().map(|step| step.loss).collect::<Vec<_>>(),
            "nll_before": before.nll,
            "nll_after": after.nll,
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "tokens_per_second": rate,
            "peak_rss_bytes": peak_rss_bytes(),
            "trainable_parameters": trainable,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
