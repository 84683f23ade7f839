//! Quantized side tuning, full fine-tuning, LoRA, QLoRA and ladder side tuning: time and memory of a step with and
//! without recomputation, held-out loss after the same tokens, and what the models of memory and arithmetic predict.
//!
//! Each row is measured in a process of its own, because peak memory belongs to a process; it gets token ids from the
//! first one, so that no tokenizer counts.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Instant,
};

use clap::Args;
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    eval::peak_rss_bytes,
    models::{CausalLm, Recompute, Tokenizer},
    quant::{Scheme, trained_values},
    side_tuning::{
        Downsample, HiddenCache, SideConfig, SideTuned, StatePrecision,
        memory::{Halves, Method, ProcessConstants, Step, estimate, step_macs},
    },
    training::{BatchOptions, DataOptions, Dataset, Order, Trainer, TrainerConfig},
};
use kiln_examples::{ModelArgs, Result, perplexity, testdata, write_json};
use serde::{Deserialize, Serialize};

const METHODS: [&str; 5] = ["full", "lora", "qlora", "lst", "qst"];
const LORA_RANK: usize = 16;

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a row.
    #[arg(long, default_value_t = 256)]
    seq_len: usize,
    /// Steps of each row.
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// Backbone width over side width of QST; LST has half of it, as in the papers.
    #[arg(long, default_value_t = 16)]
    reduction: usize,
    /// Trains over the same `steps` batches so many times instead, with and without a cache of the backbone's states: what each
    /// epoch takes.
    #[arg(long, conflicts_with_all = ["json", "row"])]
    epochs: Option<u64>,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Measures one row, `METHOD none` or `METHOD block`, and prints it.
    #[arg(long, hide = true, requires = "ids")]
    row: Option<String>,
    /// Where the first process wrote the ids.
    #[arg(long, hide = true)]
    ids: Option<PathBuf>,
}

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    method: String,
    recompute: String,
    trainable_parameters: usize,
    /// Median over all steps but the first.
    step_seconds: f64,
    peak_rss_bytes: u64,
    predicted_peak_bytes: u64,
    /// Held-out, in nats a token.
    loss: f64,
    /// Multiply-add pairs of a token.
    macs: f64,
    /// Activations and what exists beside them, as predicted.
    predicted_activation_bytes: f64,
}

impl Options {
    fn method(&self, name: &str) -> Method {
        match name {
            "full" => Method::Full,
            "lora" | "qlora" => Method::Lora { rank: LORA_RANK },
            "lst" => Method::Side(SideConfig::lst().with_reduction((self.reduction / 2).max(1))),
            _ => Method::Side(SideConfig::qst().with_reduction(self.reduction)),
        }
    }

    fn trainer(&self, name: &str, recompute: Recompute) -> TrainerConfig {
        let mut batch = BatchOptions::new(self.batch);
        batch.order = Order::Shuffled;
        let mut config = TrainerConfig::new(self.steps, batch);
        config.recompute = recompute;
        // Side networks start at random and take larger steps than weights that were trained before.
        config.lr = match name {
            "full" => 1e-4,
            "lora" | "qlora" => 1e-3,
            _ => 3e-3,
        };
        config
    }
}

/// Ids of the embedded model's texts, for training and held out, in a folder that is removed in the end.
struct Ids(PathBuf);

impl Ids {
    fn write(tokenizer: &Tokenizer, window: usize) -> Result<Self> {
        let ids = Self(std::env::temp_dir().join(format!("kiln-side-tuning-{}", std::process::id())));
        std::fs::create_dir_all(&ids.0)?;
        for (name, most) in [("train", usize::MAX), ("test", 16 * window)] {
            let path = testdata(&format!("models/tiny-llama/text/shift_{name}_moby.txt"));
            let text =
                std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let values = tokenizer.encode(&text, false)?;
            let bytes: Vec<u8> = values.iter().take(most).flat_map(|id| id.to_le_bytes()).collect();
            std::fs::write(ids.0.join(name), bytes)?;
        }
        Ok(ids)
    }

    fn read(folder: &Path, name: &str) -> Result<Vec<u32>> {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
    }
}

impl Drop for Ids {
    fn drop(&mut self) {
        // A folder that stays behind is in the system's temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Trains, and returns trainable parameters, median step time, peak memory and held-out loss.
fn train<M: CausalLm>(
    model: M,
    dataset: Arc<Dataset>,
    config: TrainerConfig,
    held_out: &[u32],
) -> Result<(usize, f64, u64, f64)> {
    let window = dataset.options().seq_len;
    let mut trainer = Trainer::new(model, dataset, config.clone())?;
    let trainable = trained_values(trainer.model());
    let mut seconds = Vec::new();
    for _ in 0..config.steps {
        seconds.push(trainer.step()?.seconds);
    }
    let peak = peak_rss_bytes().unwrap_or(0);
    let mut later = seconds.split_off(seconds.len().min(1));
    later.sort_by(f64::total_cmp);
    let median = later.get(later.len() / 2).or(seconds.first()).copied().unwrap_or(0.0);
    let model = trainer.into_model();
    let loss = perplexity(&model, held_out, window)?.nll;
    Ok((trainable, median, peak, loss))
}

fn measure(options: &mut Options, name: &str, recompute: Recompute) -> Result<Row> {
    let packed = ["qlora", "qst"].contains(&name);
    options.model.scheme = Some((if packed { "nf4:64:double" } else { "dense" }).parse::<Scheme>()?);
    // The checkpoint's header may be large; it is gone before training.
    let (base, report, shape) = {
        let checkpoint = options.model.checkpoint()?;
        let (base, report) = options.model.load(&checkpoint)?;
        (base, report, checkpoint.config().clone())
    };
    let data = DataOptions::new(options.seq_len, base.vocab_size());
    let ids = options.ids.clone().ok_or("--row needs --ids")?;
    let dataset = Arc::new(Dataset::from_ids(Ids::read(&ids, "train")?, &data)?);
    let held_out = Ids::read(&ids, "test")?;
    let (method, config) = (options.method(name), options.trainer(name, recompute));
    let step = Step {
        batch: options.batch,
        seq_len: options.seq_len,
        recompute,
        logit_rows: config.logit_rows,
        halves: Halves::of(&base),
    };
    // Predicted before anything is measured.
    let predicted = estimate(&shape, report.storage.total_bytes(), &method, &step)?;
    let macs = step_macs(&shape, &method, recompute, options.seq_len)?;
    let (trainable, step_seconds, peak, loss) = match &method {
        Method::Full => train(burn::module::Module::unfreeze(base), dataset, config, &held_out)?,
        Method::Lora { rank } => {
            let tuned = Tuned::attach(base, &AdapterConfig::lora(*rank, *rank as f64))?;
            train(tuned.into_model(), dataset, config, &held_out)?
        }
        Method::Side(side) => train(SideTuned::new(base, side, 0)?, dataset, config, &held_out)?,
        other => return Err(format!("{other:?}: not a row of this program").into()),
    };
    Ok(Row {
        method: name.into(),
        recompute: recompute_name(recompute).into(),
        trainable_parameters: trainable,
        step_seconds,
        peak_rss_bytes: peak,
        predicted_peak_bytes: predicted.peak_rss(&ProcessConstants::CPU) as u64,
        loss,
        macs,
        predicted_activation_bytes: predicted.activations + predicted.transient,
    })
}

/// Prints the seconds of each epoch over the same rows, with and without a cache, and the cache's bytes.
fn measure_epochs(options: &mut Options, epochs: u64) -> Result<()> {
    options.model.scheme = Some("nf4:64:double".parse()?);
    let checkpoint = options.model.checkpoint()?;
    let ids = Ids::write(&checkpoint.tokenizer()?, options.seq_len)?;
    let mut train = Ids::read(&ids.0, "train")?;
    train.truncate(options.steps as usize * options.batch * options.seq_len);
    let steps = options.steps;
    println!("downsampling | cache | MB on disk | seconds of each epoch of {steps} steps | last loss");
    for downsample in [SideConfig::qst().downsample, Downsample::AvgPool] {
        for precision in [None, Some(StatePrecision::Bf16), Some(StatePrecision::F32)] {
            let (base, _) = options.model.load(&checkpoint)?;
            let dataset =
                Dataset::from_ids(train.clone(), &DataOptions::new(options.seq_len, base.vocab_size()))?;
            let mut model = SideTuned::new(
                base,
                &SideConfig::qst().with_reduction(options.reduction).with_downsample(downsample),
                0,
            )?;
            let folder = tempfile::tempdir()?;
            let cache = match precision {
                Some(precision) => {
                    Some(Arc::new(HiddenCache::open(&model, folder.path(), u64::MAX, precision)?))
                }
                None => None,
            };
            if let Some(cache) = &cache {
                model = model.with_hidden_cache(cache.clone());
            }
            let mut config = options.trainer("qst", Recompute::None);
            config.steps = steps * epochs;
            let mut trainer = Trainer::new(model, Arc::new(dataset), config)?;
            let mut loss = 0.0;
            let mut seconds = Vec::new();
            for _ in 0..epochs {
                let start = Instant::now();
                for _ in 0..steps {
                    loss = trainer.step()?.loss;
                }
                seconds.push(format!("{:.2}", start.elapsed().as_secs_f64()));
            }
            let (name, bytes) = match (precision, &cache) {
                (Some(precision), Some(cache)) => (format!("{precision:?}"), cache.report().bytes),
                _ => ("none".into(), 0),
            };
            let seconds = seconds.join(", ");
            println!("{downsample:?} | {name} | {:.1} | {seconds} | {loss:.5}", bytes as f64 / 1e6);
        }
    }
    Ok(())
}

fn recompute_name(recompute: Recompute) -> &'static str {
    match recompute {
        Recompute::None => "none",
        Recompute::Block => "block",
    }
}

/// Runs this program again, for one row.
fn child(row: &str, ids: &Ids) -> Result<Row> {
    let output = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .args(["--row", row, "--ids"])
        .arg(&ids.0)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("ROW ")).ok_or_else(|| {
        format!("{row}: the process gave no figures: {}", String::from_utf8_lossy(&output.stderr))
    })?;
    Ok(serde_json::from_str(line)?)
}

fn print_ratios(rows: &[Row]) {
    let find = |method: &str, recompute: &str| {
        rows.iter().find(|row| row.method == method && row.recompute == recompute)
    };
    let Some(qst) = find("qst", "none") else { return };
    println!("\nover QST without recomputation: time (multiplications predict), peak memory");
    for (method, recompute, paper) in [
        ("full", "none", "memory 7 x"),
        ("qlora", "none", "memory up to 2.3 x"),
        ("qlora", "block", "time up to 3 x"),
        ("lst", "none", "memory 2.2 x"),
    ] {
        if let Some(row) = find(method, recompute) {
            println!(
                "{method:>6} {recompute:<5} {:5.2} ({:.2})  {:5.2}   paper: {paper}",
                row.step_seconds / qst.step_seconds,
                row.macs / qst.macs,
                row.peak_rss_bytes as f64 / qst.peak_rss_bytes as f64,
            );
        }
    }
    if let Some(qlora) = find("qlora", "none") {
        let ratio = qlora.predicted_activation_bytes / qst.predicted_activation_bytes;
        println!("activations of QLoRA over those of QST, by the memory model: {ratio:.2}");
    }
}

pub(crate) fn run(mut options: Options) -> Result<()> {
    if let Some(row) = options.row.clone() {
        let (method, recompute) = row.split_once(' ').ok_or("--row takes a method and none or block")?;
        let recompute = if recompute == "block" { Recompute::Block } else { Recompute::None };
        let row = measure(&mut options, method, recompute)?;
        println!("ROW {}", serde_json::to_string(&row)?);
        return Ok(());
    }
    if let Some(epochs) = options.epochs {
        return measure_epochs(&mut options, epochs);
    }
    println!(
        "{:>6} {:<9} {:>10} {:>9} {:>10} {:>12} {:>8}",
        "method", "recompute", "trainable", "s/step", "peak MB", "predicted MB", "loss"
    );
    let ids = Ids::write(&options.model.checkpoint()?.tokenizer()?, options.seq_len)?;
    let mut rows = Vec::new();
    for method in METHODS {
        for recompute in [Recompute::None, Recompute::Block] {
            let row = child(&format!("{method} {}", recompute_name(recompute)), &ids)?;
            println!(
                "{:>6} {:<9} {:>10} {:>9.3} {:>10.1} {:>12.1} {:>8.4}",
                row.method,
                row.recompute,
                row.trainable_parameters,
                row.step_seconds,
                row.peak_rss_bytes as f64 / 1e6,
                row.predicted_peak_bytes as f64 / 1e6,
                row.loss,
            );
            rows.push(row);
        }
    }
    print_ratios(&rows);
    write_json(options.json.as_deref(), &serde_json::json!({ "rows": rows }))
}
