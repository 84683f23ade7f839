//! AutoMixQ: prunes a model, searches which projections get how many bits, and fine-tunes the best plan of a memory limit
//! and uniform plans of the same limit.
//!
//! Without arguments: the embedded model pruned at ratio 0.25, 120 evaluations of KL on 1024 tokens, and fine-tunes of 40
//! steps, in about two minutes on two cores. `--exhaustive` measures all 6561 plans on other tokens and says how much of
//! their front the search found. `--full` takes a larger budget; docs/accuracy.md says which
//! options its tables were made with.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use burn::module::Module;
use clap::{Args, ValueEnum};
use kiln::{
    adapters::AdapterConfig,
    calibration::{ApiqConfig, LoftqConfig, Method},
    eval::WindowedPerplexity,
    mixq::{Choices, FineTune, KlOptions, ModelObjective, TrainingShape, Variants, space_of},
    mixq_search::{
        Config, Fidelity, Finalists, Front, FrontPoint, Granularity, Halving, METHODS, MemoryAxis, Objective,
        Outcome, SearchMethod, SearchSettings, SearchSpace, Session, TrialLog, hypervolume, method, search,
    },
    models::{
        CausalLm, Decoder, DriverOptions, Recompute, Windows,
        memory::{Halves, ProcessConstants, Step},
    },
    pruning::{BlockPruning, Criterion, CutOptions, HeadRounding},
    quant::{QuantLinear, Scheme, write_atomically},
    training::{BatchOptions, DataOptions, Dataset, ScheduleKind, TrainerConfig},
};
use kiln_examples::{ModelArgs, Result, split_ids, write_json};
use serde::Serialize;
use serde_json::json;

/// Rows of a fine-tune's batch.
const BATCH: usize = 4;

/// Most plans that `--exhaustive` measures.
const MAX_PLANS: u128 = 1 << 17;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Units {
    /// Each projection for itself.
    Projection,
    /// Attention and MLP of each layer.
    Block,
    /// Each layer.
    Layer,
    /// Each kind of projection.
    Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Start {
    /// Rounding to nearest, and LoRA's own start.
    Lora,
    /// LoftQ, five steps.
    Loftq,
    /// ApiQ, block by block.
    Apiq,
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// How to search: klmix, paper, released, nsga2, bo, amq, random or uniform.
    #[arg(long, default_value = "klmix", value_parser = clap::builder::PossibleValuesParser::new(METHODS))]
    method: String,
    /// Memory limit of the search; none if left out.
    #[arg(long)]
    budget_bytes: Option<u64>,
    /// Plans that may be measured.
    #[arg(long)]
    evaluations: Option<usize>,
    /// Seed of the search, pruning, adapters and batches.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Keeps every measured plan; a search that was killed goes on behind it.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Measures every plan too, on tokens that the search doesn't see.
    #[arg(long)]
    exhaustive: bool,
    /// Formats to choose from, separated by commas; affine8:64 is one more in the full run.
    #[arg(long, value_delimiter = ',')]
    schemes: Vec<Scheme>,
    /// Which projections decide together.
    #[arg(long, value_enum, default_value = "block")]
    units: Units,
    /// Share of heads and channels to prune first; 0 leaves the model as it is.
    #[arg(long, default_value_t = 0.25)]
    ratio: f64,
    /// Uniform plans whose bytes are the limits of the comparison, separated by commas.
    #[arg(long, value_delimiter = ',')]
    compare: Vec<Scheme>,
    /// Where codes and adapters start.
    #[arg(long, value_enum, default_value = "loftq")]
    start: Start,
    /// Steps of the fine-tunes; 0 leaves them out.
    #[arg(long)]
    steps: Option<u64>,
    /// Steps of successive halving, growing, separated by commas: before the comparison, the best plans of each limit are
    /// tuned for the first number of steps, the better half for the second, and so on, scored on text of their own; the
    /// best two once more under two fresh seeds. None takes the best plan by KL; the full run has 50,200.
    #[arg(long, value_delimiter = ',')]
    rungs: Vec<u64>,
    /// Windows of the search, and tokens of every window.
    #[arg(long, default_value_t = 8)]
    windows: usize,
    #[arg(long, default_value_t = 128)]
    length: usize,
    #[arg(long, default_value_t = 8)]
    rank: usize,
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Text to prune, search, tune and evaluate on, .txt or .u16le; held-out text of the embedded model if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// A larger budget: 300 evaluations, rungs of 50 and 200 steps, 8 bits too, 200 steps of comparison.
    #[arg(long)]
    full: bool,
    /// Gets front.json, front.md, front.svg, tuned.md and tuned.json.
    #[arg(long, default_value = "target/kiln-automixq")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

impl Options {
    /// `given`, or the value of the short or the full run.
    fn budget<T>(&self, given: Option<T>, short: T, full: T) -> T {
        given.unwrap_or(if self.full { full } else { short })
    }

    /// Schemes given, or those of the short or the full run.
    fn schemes(&self, given: &[Scheme], short: &[&str], full: &[&str]) -> Result<Vec<Scheme>> {
        let names = if self.full { full } else { short };
        match given {
            [] => Ok(names.iter().map(|name| name.parse()).collect::<std::result::Result<_, _>>()?),
            given => Ok(given.to_vec()),
        }
    }

    fn choices(&self) -> Result<Choices> {
        let short = ["affine2:64", "affine3:64", "affine4:64"];
        let full = ["affine2:64", "affine3:64", "affine4:64", "affine8:64"];
        Ok(Choices::new(self.schemes(&self.schemes, &short, &full)?).with_granularity(match self.units {
            Units::Projection => Granularity::Projection,
            Units::Block => Granularity::Block,
            Units::Layer => Granularity::Layer,
            Units::Kind => Granularity::Kind,
        }))
    }

    fn steps(&self) -> u64 {
        self.budget(self.steps, 40, 200)
    }

    fn rungs(&self) -> Vec<u64> {
        if self.rungs.is_empty() && self.full { vec![50, 200] } else { self.rungs.clone() }
    }

    /// Uniform plans to compare with: name, space of that one plan.
    fn limits(&self, model: &Decoder<QuantLinear>) -> Result<Vec<(Scheme, SearchSpace)>> {
        let schemes = self.schemes(&self.compare, &["affine3:64"], &["affine3:64", "affine4:64"])?;
        schemes.into_iter().map(|scheme| Ok((scheme, space_of(model, &Choices::new([scheme]))?))).collect()
    }

    /// What plans of `bytes` may take within `--budget-bytes`.
    fn limit(&self, bytes: u64) -> u64 {
        self.budget_bytes.unwrap_or(u64::MAX).min(bytes)
    }

    /// Hypervolumes end at the limit and at `worst`, the score of the smallest plan.
    fn settings(
        &self,
        evaluations: usize,
        objective: &ModelObjective,
        space: &SearchSpace,
        worst: f64,
    ) -> SearchSettings {
        let limit = self.limit(space.largest());
        let settings = SearchSettings::new(evaluations, Fidelity::kl(objective.tokens()))
            .with_seed(self.seed)
            .with_reference(limit as f64, worst);
        match self.budget_bytes {
            Some(bytes) => settings.with_max_bytes(bytes),
            None => settings,
        }
    }

    fn start(&self) -> Option<Method> {
        match self.start {
            Start::Lora => None,
            Start::Loftq => Some(Method::Loftq(LoftqConfig::default())),
            Start::Apiq => {
                let epochs = if self.full { 10 } else { 3 };
                Some(Method::ApiqBlock(ApiqConfig { epochs, ..ApiqConfig::default() }))
            }
        }
    }
}

/// The first windows of a text.
fn windows(ids: &[u32], options: &Options) -> Result<Windows> {
    Ok(Windows::leading(ids, options.length, options.windows)?)
}

fn prune(model: Decoder<QuantLinear>, options: &Options, ids: &[u32]) -> Result<Decoder<QuantLinear>> {
    if options.ratio == 0.0 {
        return Ok(model);
    }
    let calibration = Windows::disjoint(ids, 64, 32, options.seed)?;
    let mut pruning = BlockPruning::new(Criterion::TaylorFirst, options.ratio);
    (pruning.round_to, pruning.head_rounding, pruning.seed) = (64, HeadRounding::Nearest, options.seed);
    let pruned = pruning.prune(model, Some(&calibration), &CutOptions::default())?;
    let report = &pruned.report;
    println!("pruned: {} of {} parameters stay", report.parameters_after, report.parameters_before);
    Ok(pruned.model)
}

fn run_search(options: &Options, space: &SearchSpace, objective: &mut ModelObjective) -> Result<Outcome> {
    let worst = score(objective, space, &space.lowest())?;
    let evaluations = options.budget(options.evaluations, 120, 300);
    let mut settings = options.settings(evaluations, objective, space, worst);
    let rungs = options.rungs();
    if !rungs.is_empty() {
        let limits = options.limits(objective.variants().original())?;
        let budgets = limits.iter().map(|(_, uniform)| uniform.smallest()).collect();
        let fidelity = rungs.last().copied().map(Fidelity::finetune);
        let finalists = Finalists { top: 2, fidelity, budgets, ..Finalists::default() };
        let budgets = finalists.budgets.clone();
        settings = settings.with_halving(Halving { rungs, budgets, ..Halving::default() });
        settings = settings.with_finalists(finalists);
    }
    let mut log = match &options.log {
        Some(path) => TrialLog::open(path, space, &objective.fingerprint())?,
        None => TrialLog::in_memory(space),
    };
    if log.skipped() > 0 {
        println!("{} lines of the log are no trials of this space; they stay, unread", log.skipped());
    }
    let start = Instant::now();
    let outcome = search(space, objective, &mut log, &*method(&options.method)?, &settings)?;
    let (name, seconds) = (&options.method, start.elapsed().as_secs_f64());
    println!("{name}: {} evaluations in {seconds:.1} s\n", outcome.evaluations);
    Ok(outcome)
}

/// Measures every plan within the limit.
struct EveryPlan(indicatif::ProgressBar);

impl SearchMethod for EveryPlan {
    fn name(&self) -> &'static str {
        "exhaustive"
    }

    fn run(&self, session: &mut Session<'_>) -> kiln::mixq_search::Result<()> {
        let plans: Vec<Config> = session.space().enumerate().filter(|plan| session.fits(plan)).collect();
        self.0.set_length(plans.len() as u64);
        for plans in plans.chunks(64) {
            session.evaluate(plans)?;
            self.0.inc(plans.len() as u64);
        }
        self.0.finish_and_clear();
        Ok(())
    }
}

/// Fails early where the comparison or `--exhaustive` could not be made after the search.
fn check(options: &Options, model: &Decoder<QuantLinear>, space: &SearchSpace) -> Result<()> {
    if options.exhaustive && space.size().is_none_or(|size| size > MAX_PLANS) {
        return Err(format!("--exhaustive: expected at most {MAX_PLANS} plans, found more").into());
    }
    if options.steps() > 0 || !options.rungs().is_empty() {
        for (scheme, uniform) in options.limits(model)? {
            let (limit, smallest) = (options.limit(uniform.smallest()), space.smallest());
            if limit < smallest {
                let found = format!("at least {smallest} of every plan");
                return Err(
                    format!("--compare {scheme}: expected plans of {limit} bytes, found {found}").into()
                );
            }
        }
    }
    Ok(())
}

/// The front of all plans on tokens that the search didn't see, and the share of its hypervolume that the search's plans
/// have there. The scores are kept in the output folder, for searches by other methods and seeds.
fn exhaustive(
    options: &Options,
    space: &SearchSpace,
    objective: &mut ModelObjective,
    found: &Outcome,
) -> Result<(Front, f64)> {
    let plans = space.size().map_or(usize::MAX, |size| size as usize);
    let worst = score(objective, space, &space.lowest())?;
    let settings = options.settings(plans, objective, space, worst);
    let fingerprint = objective.fingerprint();
    let name = format!("exhaustive-{}-{}.jsonl", &fingerprint[..8], &space.fingerprint()[..8]);
    let mut log = TrialLog::open(options.out.join(name), space, &fingerprint)?;
    let style = indicatif::ProgressStyle::with_template("all plans {bar:30} {pos}/{len} {eta}")?;
    let method = EveryPlan(indicatif::ProgressBar::new(0).with_style(style));
    let all = search(space, objective, &mut log, &method, &settings)?;
    let ours = found.front.points.iter();
    let ours = ours.map(|point| Ok([point.bytes as f64, score(objective, space, &point.config)?]));
    let ours = hypervolume(&ours.collect::<Result<Vec<_>>>()?, &all.reference);
    Ok((all.front, ours / all.hypervolume))
}

fn score(objective: &mut ModelObjective, space: &SearchSpace, config: &Config) -> Result<f64> {
    let tokens = objective.tokens();
    Ok(objective.kl(&space.plan(config), tokens, &mut |_, _| true)?.score)
}

/// A fine-tuned plan.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    bytes: u64,
    /// Of the process while it trains, on the CPU.
    predicted_peak_bytes: u64,
    /// Of the plan's weights rounded to nearest, without adapters.
    perplexity_rounded: f64,
    perplexity_tuned: f64,
}

/// Fine-tunes plans on the pruned model.
struct Tuning<'a> {
    options: &'a Options,
    variants: &'a mut Variants,
    held_out: &'a [u32],
    calibration: Windows,
    plain: FineTune,
    steps: u64,
}

impl Tuning<'_> {
    fn row(
        &mut self,
        name: String,
        choices: &Choices,
        config: &Config,
        start: Option<Method>,
    ) -> Result<Row> {
        let (rank, seq_len) = (self.options.rank as u32, self.options.length);
        let logit_rows = DriverOptions::default().logit_rows;
        // The linears of the model that is tuned are packed.
        let halves = match Halves::of(self.variants.original()) {
            Halves::None => Halves::None,
            _ => Halves::Operands,
        };
        let step = Step { batch: BATCH, seq_len, recompute: Recompute::None, logit_rows, halves };
        let shape = TrainingShape { rank, step, process: ProcessConstants::CPU };
        let choices = choices.clone().with_training(shape, MemoryAxis::Storage);
        let space = space_of(self.variants.original(), &choices)?;
        let (plan, bytes) = (space.plan(config), space.bytes(config));
        let predicted_peak_bytes = space.report(config).peak;
        let quantized = self.variants.model(&plan)?;
        let protocol = WindowedPerplexity::new(self.options.length);
        let rounded = protocol.evaluate(&quantized.valid(), self.held_out)?;
        let tuning = match start {
            Some(method) => self.plain.clone().with_start(method, self.calibration.clone()),
            None => self.plain.clone(),
        };
        let original = self.variants.original().clone();
        let (steps, seed) = (self.steps, self.options.seed);
        let tuned = tuning.run(&original, quantized, &plan, steps, seed, &mut |_, _| true)?;
        let (perplexity_rounded, perplexity_tuned) = (rounded.perplexity, tuned.loss.exp());
        Ok(Row { name, bytes, predicted_peak_bytes, perplexity_rounded, perplexity_tuned })
    }
}

/// LoRA on `train`, scored on `held_out`.
fn fine_tune(
    options: &Options,
    model: &Decoder<QuantLinear>,
    train: &[u32],
    held_out: &[u32],
) -> Result<FineTune> {
    let data = Dataset::from_ids(train.to_vec(), &DataOptions::new(options.length, model.vocab_size()))?;
    // The run's own number of steps counts, a tenth of them for warming up.
    let mut config = TrainerConfig::new(1, BatchOptions::new(BATCH));
    (config.lr, config.warmup, config.recompute) = (options.lr, 100, Recompute::None);
    config.schedule = ScheduleKind::Linear { final_ratio: 0.1 };
    let adapters = AdapterConfig::lora(options.rank, 2.0 * options.rank as f64);
    Ok(FineTune::new(Arc::new(data), held_out.to_vec(), options.length, config, adapters)?)
}

/// The plan of a limit: of those that halving left, the best mean under fresh seeds; without halving the best by KL.
fn winner(outcome: &Outcome, limit: u64) -> Result<Config> {
    Ok(match outcome.finalists.iter().find(|finalist| finalist.budget == limit) {
        Some(finalist) => finalist.config.clone(),
        None => outcome.front.select(limit)?.config.clone(),
    })
}

/// The best plan of each limit beside the uniform one of the same bytes, and the dense model.
fn tune(
    options: &Options,
    objective: &mut ModelObjective,
    outcome: &Outcome,
    train: &[u32],
    held_out: &[u32],
) -> Result<Vec<Row>> {
    let steps = options.steps();
    if steps == 0 {
        return Ok(Vec::new());
    }
    let variants = objective.variants();
    let plain = fine_tune(options, variants.original(), train, held_out)?;
    let limits = options.limits(variants.original())?;
    let calibration = windows(train, options)?;
    let mut tuning = Tuning { options, variants, held_out, calibration, plain, steps };
    let dense = Choices::new([Scheme::Dense]);
    let only = space_of(tuning.variants.original(), &dense)?.lowest();
    let mut rows = vec![tuning.row("dense, LoRA".into(), &dense, &only, None)?];
    for (scheme, uniform) in limits {
        let (choices, config) = (Choices::new([scheme]), uniform.lowest());
        rows.push(tuning.row(format!("{scheme}, LoRA"), &choices, &config, None)?);
        if let Some(start) = options.start() {
            let name = format!("{scheme}, {:?}", options.start);
            rows.push(tuning.row(name, &choices, &config, Some(start))?);
        }
        let best = winner(outcome, options.limit(uniform.bytes(&config)))?;
        let name = format!("mixed within {scheme}, {:?}", options.start);
        rows.push(tuning.row(name, &options.choices()?, &best, options.start())?);
    }
    Ok(rows)
}

fn table(rows: &[Row]) -> String {
    let mut table =
        String::from("| plan | bytes | predicted training peak, MB | perplexity rounded | tuned |\n");
    table += "| --- | ---: | ---: | ---: | ---: |\n";
    for Row { name, bytes, predicted_peak_bytes, perplexity_rounded, perplexity_tuned } in rows {
        let peak = *predicted_peak_bytes as f64 / 1e6;
        table +=
            &format!("| {name} | {bytes} | {peak:.1} | {perplexity_rounded:.3} | {perplexity_tuned:.3} |\n");
    }
    table
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(write_atomically(path, |file| std::io::Write::write_all(file, text.as_bytes()))?)
}

/// A front as the figures have it.
fn points(front: &Front) -> serde_json::Value {
    let point =
        |point: &FrontPoint| json!({ "bytes": point.bytes, "score": point.score, "plan": point.plan });
    front.points.iter().map(point).collect()
}

pub(crate) fn run(options: Options) -> Result<()> {
    let checkpoint = options.model.checkpoint()?;
    let (model, _) = options.model.load(&checkpoint)?;
    let (train, held_out) = split_ids(options.data.as_deref(), &checkpoint.tokenizer()?)?;
    let model = prune(model, &options, &train)?;
    let space = space_of(&model, &options.choices()?)?;
    let plans = space.size().map_or("more than 2^128".into(), |size| size.to_string());
    println!("{plans} plans of {} to {} bytes", space.smallest(), space.largest());

    check(&options, &model, &space)?;
    let kl_options = KlOptions::default();
    let measured = windows(&train, &options)?;
    let mut objective = ModelObjective::new(Variants::new(model.clone()), &measured, &kl_options)?;
    if !options.rungs().is_empty() {
        // Plans are chosen on text that is not the final score's.
        let (train, validation) = train.split_at(train.len() * 3 / 4);
        let tuning = fine_tune(&options, &model, train, validation)?;
        objective = objective.with_fine_tune(match options.start() {
            Some(method) => tuning.with_start(method, measured.clone()),
            None => tuning,
        });
    }
    let outcome = run_search(&options, &space, &mut objective)?;
    outcome.front.save(&options.out, &outcome.trials)?;
    println!("{}", outcome.front.to_markdown());
    let mut figures = json!({
        "front": points(&outcome.front),
        "evaluations": outcome.evaluations,
        "hypervolume": outcome.hypervolume,
    });
    if options.exhaustive {
        let mut unseen =
            ModelObjective::new(Variants::new(model), &windows(&held_out, &options)?, &kl_options)?;
        let (all, fraction) = exhaustive(&options, &space, &mut unseen, &outcome)?;
        println!("{fraction:.4} of the hypervolume of all plans, on tokens that the search didn't see\n");
        (figures["exhaustive_front"], figures["hypervolume_fraction"]) = (points(&all), json!(fraction));
    }
    // Before the long part.
    write_json(options.json.as_deref(), &figures)?;
    let rows = tune(&options, &mut objective, &outcome, &train, &held_out)?;
    println!("{}", table(&rows));
    write(&options.out.join("tuned.md"), &table(&rows))?;
    write(&options.out.join("tuned.json"), &serde_json::to_string_pretty(&rows)?)?;
    println!("plans, tables and plot written to {}", options.out.display());
    figures["tuned"] = json!(rows);
    write_json(options.json.as_deref(), &figures)
}
