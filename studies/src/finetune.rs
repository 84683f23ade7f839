//! One fine-tune with every option of every adapter: perplexity before and after, speed and memory.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use clap::{Args, ValueEnum};
use kiln::{
    Tuned,
    adapters::{
        AdapterConfig, InitLoraWeights, Method as AdapterMethod, Pooling, QBara, QaBlora, QaHira, QaLora,
    },
    eval::peak_rss_bytes,
    models::{CausalLm, Decoder, GenerateOptions, Recompute, Tokenizer, generate},
    quant::{QuantLinear, Scheme, files::OutputFolder, trained_values},
    training::{BatchOptions, Order, RunOptions, ScheduleKind, Trainer, TrainerConfig},
};
use kiln_examples::{
    Bar, ModelArgs, Result, check_outputs, open_data, perplexity, read_ids, testdata, write_json,
};

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Method {
    /// Low-rank adapters.
    Lora,
    /// Low-rank adapters scaled by alpha / sqrt(rank).
    Rslora,
    /// Low-rank adapters with trained magnitudes.
    Dora,
    /// Low-rank adapters that start as the weights' largest singular values.
    Pissa,
    /// Low-rank adapters that start as a part of the weights' QR decomposition.
    Olora,
    /// Q-BaRA: inputs and outputs joined by --lambda, the rank raised by it.
    Qbara,
    /// QA-LoRA: groups of --pool inputs joined by --pooling.
    Qalora,
    /// QA-HiRA: a single matrix between groups of --pool inputs and of --repeat outputs.
    Qahira,
    /// QA-BLoRA: two factors between groups of --pool inputs and of --repeat outputs.
    Qablora,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PoolingName {
    Average,
    Sum,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Schedule {
    Constant,
    /// Down to a tenth.
    Linear,
    /// Down to zero.
    Cosine,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RecomputeName {
    None,
    Block,
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// What is trained.
    #[arg(long, value_enum, default_value = "lora")]
    method: Method,
    /// Q-BaRA's compression factor.
    #[arg(long, default_value_t = 2)]
    lambda: usize,
    /// Neighbouring inputs that QA-LoRA, QA-HiRA and QA-BLoRA join: a multiple of the base's group, for exact merging.
    #[arg(long, default_value_t = 64)]
    pool: usize,
    /// Neighbouring outputs that QA-HiRA and QA-BLoRA make alike.
    #[arg(long, default_value_t = 1)]
    repeat: usize,
    /// What QA-LoRA makes of a group of inputs.
    #[arg(long, value_enum, default_value = "average")]
    pooling: PoolingName,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 16.0)]
    alpha: f64,
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Names of the linears to adapt, separated by commas, or all-linear.
    #[arg(long, default_value = "all-linear")]
    targets: String,
    #[arg(long, default_value_t = 100)]
    steps: u64,
    /// Rows of a micro-batch.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    #[arg(long, value_enum, default_value = "linear")]
    schedule: Schedule,
    #[arg(long, default_value_t = 10)]
    warmup: u64,
    /// Largest global gradient norm; 0 leaves gradients as they are.
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
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
    #[arg(long, value_enum, default_value = "none")]
    recompute: RecomputeName,
    /// Goes on from the last checkpoint below --out.
    #[arg(long)]
    resume: bool,
    /// Steps between checkpoints; 0 saves at the end only.
    #[arg(long, default_value_t = 0)]
    save_every: u64,
    /// Gets the adapter folder (adapter/) and checkpoints (last/).
    #[arg(long, default_value = "target/kiln-finetune")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    fn adapters(&self) -> AdapterConfig {
        let Self { lambda, pool, repeat, .. } = *self;
        let pooling = match self.pooling {
            PoolingName::Average => Pooling::Average,
            PoolingName::Sum => Pooling::Sum,
        };
        let method = match self.method {
            Method::Qbara => AdapterMethod::QBara(QBara { lambda }),
            Method::Qalora => AdapterMethod::QaLora(QaLora { pool, pooling }),
            Method::Qahira => AdapterMethod::QaHira(QaHira::for_tiles(repeat, pool)),
            Method::Qablora => AdapterMethod::QaBlora(QaBlora { pool, repeat, rank: None }),
            Method::Dora => AdapterMethod::dora(),
            Method::Lora | Method::Rslora => AdapterMethod::lora(),
            Method::Pissa => AdapterMethod::Lora { init: InitLoraWeights::Pissa { iterations: None } },
            Method::Olora => AdapterMethod::Lora { init: InitLoraWeights::Olora },
        };
        let mut config =
            AdapterConfig::new(method, self.rank, self.alpha).with_dropout(self.dropout).with_seed(self.seed);
        if matches!(self.method, Method::Rslora) {
            config = config.with_rslora();
        }
        if self.targets != "all-linear" {
            config = config.with_targets(self.targets.split(',').collect::<Vec<_>>());
        }
        // The name only: the folder may be published, and paths of this machine mean nothing elsewhere.
        match self.model.model.as_ref().and_then(|path| path.file_name()) {
            Some(name) => config.with_base_model(name.to_string_lossy()),
            None => config,
        }
    }

    fn trainer(&self) -> TrainerConfig {
        let mut batch = BatchOptions::new(self.batch);
        (batch.seed, batch.packing) =
            (self.seed, self.data.as_ref().is_some_and(|path| has_extension(path, "jsonl")));
        batch.order = Order::Shuffled;
        let mut config = TrainerConfig::new(self.steps, batch);
        config.accumulate = self.accumulate;
        (config.lr, config.warmup) = (self.lr, self.warmup);
        config.schedule = match self.schedule {
            Schedule::Constant => ScheduleKind::Constant,
            Schedule::Linear => ScheduleKind::Linear { final_ratio: 0.1 },
            Schedule::Cosine => ScheduleKind::Cosine { final_ratio: 0.0 },
        };
        config.clip = (self.clip > 0.0).then_some(self.clip);
        config.recompute = match self.recompute {
            RecomputeName::None => Recompute::None,
            RecomputeName::Block => Recompute::Block,
        };
        config
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found == extension)
}

/// Held-out ids.
fn evaluation_ids(path: Option<&Path>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    read_ids(path.unwrap_or(&testdata("models/tiny-llama/text/shift_test_moby.u16le")), tokenizer)
}

pub(crate) fn run(mut options: Options) -> Result<()> {
    if options.model.model.is_none() {
        options.model.scheme.get_or_insert("affine4:64".parse::<Scheme>()?);
    }
    let out = Arc::new(OutputFolder::claim(&options.out)?);
    check_outputs([&options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let tokenizer = checkpoint.tokenizer()?;
    let (base, report) = options.model.load(&checkpoint)?;
    println!("base: {} values in {} bytes", report.storage.total_values(), report.storage.total_bytes());

    let data =
        options.data.clone().unwrap_or_else(|| testdata("models/tiny-llama/text/shift_train_moby.txt"));
    let dataset = open_data(&data, &checkpoint, options.seq_len, base.vocab_size())?;
    let held_out = evaluation_ids(options.eval.as_deref(), &tokenizer)?;
    let window = options.window.unwrap_or(options.seq_len);

    let tuned = Tuned::attach(base, &options.adapters())?;
    let mut identity = tuned.identity();
    identity.insert("tokenizer".into(), tokenizer.fingerprint()?);
    let (model, adapters) = tuned.into_parts();
    let before = perplexity(&model, &held_out, window)?;
    println!("perplexity before: {:.3} over {} tokens", before.perplexity, before.tokens);

    let (dataset, config) = (Arc::new(dataset), options.trainer());
    let mut trainer = Trainer::new(model, dataset, config)?.with_identity(identity);
    if options.resume {
        trainer = trainer.resumed(options.out.join("last"))?;
    }
    let trainable = trained_values(trainer.model());
    println!("training {trainable} parameters");
    let mut bar = Bar::new(options.steps)?;
    let run = RunOptions::new().with_save_every(options.save_every).with_claimed(out);
    let start = Instant::now();
    let reports = trainer.run_with(&run, &mut bar)?.steps;
    let seconds = start.elapsed().as_secs_f64();
    let last = options.out.join("last");
    bar.finish(&format!("the checkpoint is in {}, --resume goes on from it", last.display()))?;

    let tuned = Tuned::<Decoder<QuantLinear>>::from_parts(trainer.into_model(), adapters);
    let after = perplexity(tuned.model(), &held_out, window)?;
    let tokens: usize = reports.iter().map(|report| report.tokens).sum();
    println!("perplexity after: {:.3}; {:.0} tokens/s", after.perplexity, tokens as f64 / seconds);
    let folder = options.out.join("adapter");
    match tuned.config().to_peft() {
        Ok(_) => tuned.save_peft(&folder)?,
        // PEFT has no such adapters; the own folder holds them.
        Err(_) => tuned.save(&folder)?,
    }
    println!("adapter written to {}", folder.display());
    let prompt = "The whale";
    let stop = GenerateOptions::new(24).with_stop(tokenizer.special().eos.clone());
    let sample = generate(tuned.model(), &tokenizer.encode(prompt, true)?, &stop)?;
    println!("sample: {prompt}{}", tokenizer.decode(&sample.ids, true)?);
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "losses": reports.iter().map(|report| report.loss).collect::<Vec<_>>(),
            "perplexity_before": before.perplexity,
            "perplexity_after": after.perplexity,
            "nll_before": before.nll,
            "nll_after": after.nll,
            "tokens_per_second": tokens as f64 / seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "trainable_parameters": trainable,
        }),
    )
}
