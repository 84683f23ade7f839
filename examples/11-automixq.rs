//! AutoMixQ: searches how many bits each layer's attention and MLP get, starts the best plan of a memory limit by LoftQ, tunes
//! it on a task, and evaluates it there before and after.
//!
//! Without arguments: the embedded model, 120 evaluations of KL on 1024 tokens, the bytes of uniform 3 bits as the limit, and
//! 120 steps on the letters in testdata, in about two minutes.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use clap::Parser;
use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{CalibrationConfig, LoftqConfig, Method},
    eval::disk_bytes,
    mixq::{Choices, KlOptions, ModelObjective, Variants, schemes, space_of},
    mixq_search::{Fidelity, Granularity, Objective, Plan, SearchSettings, TrialLog, method, search},
    models::Windows,
    quant::{Scheme, files::OutputFolder},
    training::{BatchOptions, Event, Observer, ScheduleKind},
};
use kiln_examples::{
    Bar, DeviceName, Questions, Result, check_outputs, model_folder, model_path, perplexity, save_replacing,
    say, split_ids, write_json,
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
    /// Where to compute: flex, wgpu, vulkan, metal, cuda, rocm or cpu, of several one by its number, as cuda:1.
    #[arg(long, default_value = "flex")]
    device: DeviceName,
    /// Formats to choose from, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "affine2:64,affine3:64,affine4:64")]
    schemes: Vec<Scheme>,
    /// The uniform plan whose bytes are the limit.
    #[arg(long, default_value = "affine3:64")]
    within: Scheme,
    /// How to search: klmix, paper, released, nsga2, bo, amq, random or uniform.
    #[arg(long, default_value = "klmix")]
    method: String,
    /// Plans that may be measured.
    #[arg(long, default_value_t = 120)]
    evaluations: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens of a window; eight of them are measured.
    #[arg(long, default_value_t = 128)]
    length: usize,
    /// Text to search and evaluate on, .txt or .u16le; held-out text of the embedded model if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// A task of multiple choice: a name of the harness or a description file, with a training split; letters if left out.
    #[arg(long)]
    task: Option<String>,
    /// The folder with the task's data, unless it names its own files.
    #[arg(long, default_value = "data")]
    task_data: PathBuf,
    /// Documents that are scored, and that are learned, at most.
    #[arg(long, default_value_t = 1000)]
    limit: usize,
    /// Steps of the fine-tune on the task.
    #[arg(long, default_value_t = 120)]
    steps: u64,
    /// Rows of a step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[arg(long, default_value_t = 16)]
    rank: usize,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Gets the front (front.json, front.md, front.svg), the model of the plan that was chosen (model/), its tuned adapter
    /// (adapter/), the fine-tune's checkpoints, and every measured plan (search.jsonl), behind which a search that was killed
    /// goes on.
    #[arg(long, default_value = "target/kiln-automixq")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn run(options: Options) -> Result<()> {
    let out = Arc::new(OutputFolder::claim(&options.out)?);
    check_outputs([&Some(options.out.join("front.json")), &options.json])?;
    let folder = model_folder(out.path(), options.model.as_deref())?;
    let questions = Questions::open(options.task.as_deref(), &options.task_data, options.limit)?;
    let base = Base::open(model_path(options.model.as_deref(), options.download)?)?;
    let base = base.with_device(options.device.open()?).load()?;
    let (train, held_out) = split_ids(options.data.as_deref(), base.tokenizer())?;
    let windows = Windows::leading(&train, options.length, 8)?;

    let choices = Choices::new(options.schemes.iter().copied()).with_granularity(Granularity::Block);
    let space = space_of(base.model(), &choices)?;
    let limit = space_of(base.model(), &Choices::new([options.within]))?.smallest();
    let plans = space.size().map_or("more than 2^128".into(), |size| size.to_string());
    say!("{plans} plans of {} to {} bytes; at most {limit} wanted", space.smallest(), space.largest());

    let adapters = AdapterConfig::lora(options.rank, options.rank as f64).with_seed(options.seed);
    let loftq = Method::Loftq(LoftqConfig::default());
    let variants = Variants::new(base.model().clone());
    let mut objective = ModelObjective::new(variants, &windows, &KlOptions::default())?
        .with_start(loftq.clone(), adapters.clone())?;
    let mut log = TrialLog::open(options.out.join("search.jsonl"), &space, &objective.fingerprint())?;
    if log.skipped() > 0 {
        eprintln!("note: {} lines of search.jsonl are no trials of this space", log.skipped());
    }
    let settings =
        SearchSettings::new(options.evaluations, Fidelity::kl(objective.tokens())).with_seed(options.seed);
    let found = search(&space, &mut objective, &mut log, &*method(&options.method)?, &settings)?;
    found.front.save(&options.out, &found.trials)?;
    say!("{}", found.front.to_markdown());

    let best = found.front.select(limit)?;
    let started = |plan: &Plan| -> Result<FineTuned> {
        let config = CalibrationConfig::new(loftq.clone(), schemes(plan)?);
        Ok(base.calibrate(adapters.clone(), &config, &windows)?)
    };
    let perplexity_of = |start: &FineTuned| {
        Ok::<_, Box<dyn std::error::Error>>(perplexity(start.model(), &held_out, options.length)?.perplexity)
    };
    let uniform = space_of(base.model(), &Choices::new([options.within]))?;
    let uniform = perplexity_of(&started(&uniform.plan(&uniform.lowest()))?)?;
    let start = started(&best.plan)?;
    let mixed = perplexity_of(&start)?;
    say!(
        "started by LoftQ, within {limit} bytes: perplexity {uniform:.2} uniform, {mixed:.2} mixed ({} bytes)",
        best.bytes
    );

    save_replacing(&folder, |folder| start.without_adapters().save(folder))?;
    let logs = tempfile::tempdir()?;
    let before = questions.accuracy(start.model(), base.tokenizer(), &logs.path().join("start.jsonl"))?;
    say!("{}: accuracy {before:.3}", questions.name());
    let mut bar = Bar::new(options.steps)?;
    let tuned = start
        .finetune(questions.dataset(&base, options.length, |_| true)?)
        .with_steps(options.steps)
        .with_batch(BatchOptions::new(options.batch).with_seed(options.seed))
        .with_lr(options.lr)
        .with_warmup(options.steps / 20)
        .with_schedule(ScheduleKind::Cosine { final_ratio: 0.1 })
        .with_claimed(out.clone(), 0)
        .on_event(|event: &Event<'_>| Observer::<()>::on_event(&mut bar, event))
        .run()?;
    bar.finish(&format!("{} has the model, and last/ what was tuned", out.path().display()))?;
    let after = questions.accuracy(tuned.model(), base.tokenizer(), &logs.path().join("tuned.jsonl"))?;
    let adapter = out.path().join("adapter");
    tuned.save(&adapter)?;
    let stored = disk_bytes(&folder)? + disk_bytes(&adapter)?;
    say!("tuned: accuracy {after:.3}; front, model and adapter written to {}", out.path().display());
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "evaluations": found.evaluations,
            "limit": limit,
            "bytes": best.bytes,
            "plan": best.plan,
            "perplexity_uniform": uniform,
            "perplexity_mixed": mixed,
            "accuracy_before": before,
            "accuracy_after": after,
            "stored_bytes": stored,
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
