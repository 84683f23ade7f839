//! The main job: fine-tunes adapters on a packed base, with perplexity before and after and a sample.
//!
//! Without arguments: the embedded model at 4 bits, its recipe, a text that it was not trained on.

use std::{ops::ControlFlow, path::PathBuf, process::ExitCode, sync::Arc};

use clap::{Parser, ValueEnum};
use kiln::{
    adapters::{AdapterConfig, InitLoraWeights, Method, PeftConfig, TargetModules},
    eval::peak_rss_bytes,
    models::{CausalLm, GenerateOptions, generate},
    quant::trained_values,
    training::{BatchOptions, Order, RunOptions, ScheduleKind, Trainer, TrainerConfig},
};
use kiln_examples::{Bar, ModelArgs, Result, open_data, perplexity, read_ids, testdata, write_json};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Adapter {
    /// Low-rank adapters.
    Lora,
    /// Low-rank adapters with trained magnitudes.
    Dora,
    /// Low-rank adapters that start as the weights' largest singular values.
    Pissa,
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
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
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
        let targets = match self.targets.as_slice() {
            [] => TargetModules::AllLinear,
            names => TargetModules::Names(names.to_vec()),
        };
        let mut config = PeftConfig::new(self.rank, self.alpha, targets);
        (config.lora_dropout, config.use_dora) = (self.dropout, self.method == Adapter::Dora);
        // The name only: the folder may be published, and paths of this machine mean nothing elsewhere.
        let base = self.model.model.as_ref().and_then(|path| path.file_name());
        config.base_model_name_or_path = base.map(|name| name.to_string_lossy().into_owned());
        if self.method == Adapter::Pissa {
            config.init_lora_weights = InitLoraWeights::Pissa { iterations: None };
        }
        AdapterConfig::new(Method::Lora, config)
    }

    fn trainer(&self) -> TrainerConfig {
        let mut batch = BatchOptions::new(self.batch);
        (batch.seed, batch.order) = (self.seed, Order::Shuffled);
        // Short rows share a sequence.
        batch.packing =
            self.data.as_ref().is_some_and(|path| path.extension().is_some_and(|found| found == "jsonl"));
        let mut config = TrainerConfig::new(self.steps, batch);
        (config.lr, config.warmup) = (self.lr, 10);
        config.schedule = ScheduleKind::Linear { final_ratio: 0.1 };
        config
    }
}

fn run(mut options: Options) -> Result<()> {
    if options.model.model.is_none() {
        options.model.scheme.get_or_insert("affine4:64".parse()?);
    }
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let (base, report) = options.model.load(&checkpoint)?;
    println!("base: {} values in {} bytes", report.storage.total_values(), report.storage.total_bytes());

    let text = |path: &Option<PathBuf>, name: &str| path.clone().unwrap_or_else(|| testdata(name));
    let data = text(&options.data, "models/tiny-llama/text/shift_train_moby.txt");
    let data = Arc::new(open_data(&data, &checkpoint, options.seq_len, base.vocab_size())?);
    let held_out = text(&options.eval, "models/tiny-llama/text/shift_test_moby.u16le");
    let held_out = read_ids(&held_out, &tokenizer)?;
    let window = options.window.unwrap_or(options.seq_len);

    let (model, attacher) = kiln::attach_adapters(base, &options.adapters(), options.seed)?;
    let before = perplexity(&model, &held_out, window)?;
    println!("perplexity before: {:.3} over {} tokens", before.perplexity, before.tokens);

    let mut trainer = match options.resume {
        true => Trainer::resume(model, data, options.trainer(), &options.out.join("last"))?,
        false => Trainer::new(model, data, options.trainer())?,
    };
    let trainable = trained_values(trainer.model());
    println!("training {trainable} parameters");
    let mut bar = Bar::new(options.steps);
    let checkpoints = RunOptions { folder: Some(options.out.clone()), ..RunOptions::default() };
    let steps = trainer.run(&checkpoints, &mut bar)?;
    bar.finish();

    let model = trainer.into_model();
    let after = perplexity(&model, &held_out, window)?;
    let tokens: usize = steps.iter().map(|step| step.tokens).sum();
    let rate = tokens as f64 / steps.iter().map(|step| step.seconds).sum::<f64>();
    println!("perplexity after: {:.3}; {rate:.0} tokens/s", after.perplexity);
    let adapter = options.out.join("adapter");
    kiln::save_peft(&model, attacher.adapter_config(), &adapter)?;
    println!("adapter written to {}", adapter.display());

    let prompt = "The whale";
    let stop = GenerateOptions::new(24).with_stop(tokenizer.special().eos.clone());
    let ids = tokenizer.encode(prompt, true)?;
    let sample = generate(&model, &ids, &stop, &mut |_| ControlFlow::Continue(()))?;
    println!("sample: {prompt}{}", tokenizer.decode(&sample.ids, true)?);
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "losses": steps.iter().map(|step| step.loss).collect::<Vec<_>>(),
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
