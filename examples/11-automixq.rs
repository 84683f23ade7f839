//! AutoMixQ: prunes a model, searches which projections get how many bits, and fine-tunes the best plan of a memory limit
//! beside uniform plans of the same limit.
//!
//! Without arguments: the embedded model pruned at ratio 0.25, 120 evaluations of KL on 1024 tokens, and fine-tunes of 40
//! steps, in about two minutes on two cores. `--exhaustive` measures all 6561 plans on other tokens and says how much of
//! their front the search found. `--full` takes the budget of the tables in docs/accuracy.md.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use burn::module::Module;
use clap::{Parser, ValueEnum};
use kiln::{
    adapters::{PeftConfig, TargetModules},
    calibration::{ApiqConfig, LoftqConfig, Method},
    eval::WindowedPerplexity,
    mixq::{Choices, FineTune, KlOptions, ModelObjective, Variants, space_of},
    mixq_search::{
        Config, Fidelity, Front, FrontPoint, Granularity, Halving, METHODS, Objective, Outcome, SearchMethod,
        SearchSettings, SearchSpace, Session, TrialLog, hypervolume, method, search,
    },
    models::{AnyModel, CausalLm, Recompute},
    pruning::{BlockPruning, Calibration, Criterion, CutOptions, HeadRounding},
    quant::{QuantLinear, Scheme},
    training::{BatchOptions, DataOptions, Dataset, ScheduleKind, TrainerConfig},
};
use kiln_examples::{ModelArgs, Result, split_ids, write_json};
use serde::Serialize;
use serde_json::json;

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

#[derive(Parser)]
#[command(about)]
struct Options {
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
    /// tuned for the first number of steps, the better half for the second, and so on, scored on text of their own. None
    /// takes the best plan by KL; the full run has 50,200.
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
    /// The budget of the documented tables.
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
    fn limits(&self, model: &AnyModel<QuantLinear>) -> Result<Vec<(Scheme, SearchSpace)>> {
        let schemes = self.schemes(&self.compare, &["affine3:64"], &["affine3:64", "affine4:64"])?;
        schemes.into_iter().map(|scheme| Ok((scheme, space_of(model, &Choices::new([scheme]))?))).collect()
    }

    /// Hypervolumes end at the limit and at `worst`, the score of the smallest plan.
    fn settings(
        &self,
        evaluations: usize,
        objective: &ModelObjective,
        space: &SearchSpace,
        worst: f64,
    ) -> SearchSettings {
        let limit = self.budget_bytes.unwrap_or(u64::MAX).min(space.largest());
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
fn windows(ids: &[u32], options: &Options) -> Result<Vec<Vec<u32>>> {
    let found: Vec<Vec<u32>> =
        ids.chunks_exact(options.length.max(1)).take(options.windows).map(<[u32]>::to_vec).collect();
    match found.len() == options.windows && options.windows > 0 {
        true => Ok(found),
        false => {
            let (windows, length) = (options.windows, options.length);
            Err(format!(
                "text: expected {windows} windows of {length} tokens, at least one, found {}",
                found.len()
            )
            .into())
        }
    }
}

fn prune(model: AnyModel<QuantLinear>, options: &Options, ids: &[u32]) -> Result<AnyModel<QuantLinear>> {
    if options.ratio == 0.0 {
        return Ok(model);
    }
    let calibration = Calibration::sample(ids, 32, 64, options.seed)?;
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
        settings = settings.with_halving(Halving { rungs, budgets, ..Halving::default() });
    }
    let mut log = match &options.log {
        Some(path) => TrialLog::open(path, space, &objective.fingerprint())?,
        None => TrialLog::in_memory(space),
    };
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

/// The front of all plans on tokens that the search didn't see, and the share of its hypervolume that the search's plans
/// have there. The scores are kept in the output folder, for searches by other methods and seeds.
fn exhaustive(
    options: &Options,
    space: &SearchSpace,
    objective: &mut ModelObjective,
    found: &Outcome,
) -> Result<(Front, f64)> {
    let plans = space.size().filter(|&size| size <= MAX_PLANS);
    let plans =
        plans.ok_or_else(|| format!("--exhaustive: expected at most {MAX_PLANS} plans, found more"))?;
    let worst = score(objective, space, &space.lowest())?;
    let settings = options.settings(plans as usize, objective, space, worst);
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
    /// Of the plan's weights rounded to nearest, without adapters.
    perplexity_rounded: f64,
    perplexity_tuned: f64,
}

/// Fine-tunes plans on the pruned model.
struct Tuning<'a> {
    options: &'a Options,
    variants: &'a mut Variants,
    held_out: &'a [u32],
    calibration: Vec<Vec<u32>>,
    plain: FineTune,
    steps: u64,
}

impl Tuning<'_> {
    fn row(
        &mut self,
        name: String,
        space: &SearchSpace,
        config: &Config,
        start: Option<Method>,
    ) -> Result<Row> {
        let (plan, bytes) = (space.plan(config), space.bytes(config));
        let quantized = self.variants.model(&plan)?;
        let protocol = WindowedPerplexity::new(self.options.length);
        let rounded =
            protocol.evaluate(&quantized.valid(), self.held_out, &mut |_| ControlFlow::Continue(()))?;
        let tuning = match start {
            Some(method) => self.plain.clone().with_start(method, self.calibration.clone()),
            None => self.plain.clone(),
        };
        let original = self.variants.original().clone();
        let (steps, seed) = (self.steps, self.options.seed);
        let tuned = tuning.run(&original, quantized, &plan, steps, seed, &mut |_, _| true)?;
        Ok(Row { name, bytes, perplexity_rounded: rounded.perplexity, perplexity_tuned: tuned.loss.exp() })
    }
}

/// LoRA on `train`, scored on `held_out`.
fn fine_tune(
    options: &Options,
    model: &AnyModel<QuantLinear>,
    train: &[u32],
    held_out: &[u32],
) -> Result<FineTune> {
    let data = Dataset::from_ids(train.to_vec(), &DataOptions::new(options.length, model.vocab_size()))?;
    // The run's own number of steps counts, a tenth of them for warming up.
    let mut config = TrainerConfig::new(1, BatchOptions::new(4));
    (config.lr, config.warmup, config.recompute) = (options.lr, 100, Recompute::None);
    config.schedule = ScheduleKind::Linear { final_ratio: 0.1 };
    let peft = PeftConfig::new(options.rank, 2.0 * options.rank as f64, TargetModules::AllLinear);
    Ok(FineTune::new(Arc::new(data), held_out.to_vec(), options.length, config, peft)?)
}

/// The plan of a limit: the winner of its halving, or the best by KL.
fn winner(outcome: &Outcome, limit: u64) -> Result<Config> {
    let rung = outcome.rungs.iter().rev().find(|rung| rung.budget == limit);
    Ok(match rung.and_then(|rung| rung.ranking.first()) {
        Some((config, _)) => config.clone(),
        None => outcome.front.select(limit)?.config.clone(),
    })
}

/// The best plan of each limit beside the uniform one of the same bytes, and the dense model.
fn tune(
    options: &Options,
    objective: &mut ModelObjective,
    space: &SearchSpace,
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
    let dense = space_of(variants.original(), &Choices::new([Scheme::Dense]))?;
    let limits = options.limits(variants.original())?;
    let calibration = windows(train, options)?;
    let mut tuning = Tuning { options, variants, held_out, calibration, plain, steps };
    let mut rows = vec![tuning.row("dense, LoRA".into(), &dense, &dense.lowest(), None)?];
    for (scheme, uniform) in limits {
        let config = uniform.lowest();
        rows.push(tuning.row(format!("{scheme}, LoRA"), &uniform, &config, None)?);
        if let Some(start) = options.start() {
            let name = format!("{scheme}, {:?}", options.start);
            rows.push(tuning.row(name, &uniform, &config, Some(start))?);
        }
        let best = winner(outcome, uniform.bytes(&config))?;
        let name = format!("mixed within {scheme}, {:?}", options.start);
        rows.push(tuning.row(name, space, &best, options.start())?);
    }
    Ok(rows)
}

fn table(rows: &[Row]) -> String {
    let mut table =
        String::from("| plan | bytes | perplexity rounded | tuned |\n| --- | ---: | ---: | ---: |\n");
    for Row { name, bytes, perplexity_rounded, perplexity_tuned } in rows {
        table += &format!("| {name} | {bytes} | {perplexity_rounded:.3} | {perplexity_tuned:.3} |\n");
    }
    table
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// A front as the figures have it.
fn points(front: &Front) -> serde_json::Value {
    let point =
        |point: &FrontPoint| json!({ "bytes": point.bytes, "score": point.score, "plan": point.plan });
    front.points.iter().map(point).collect()
}

fn main() -> Result<()> {
    let options = Options::parse();
    let checkpoint = options.model.checkpoint()?;
    let (model, _) = options.model.load(&checkpoint)?;
    let (train, held_out) = split_ids(options.data.as_deref(), &checkpoint.tokenizer()?)?;
    let model = prune(model, &options, &train)?;
    let space = space_of(&model, &options.choices()?)?;
    let plans = space.size().map_or("more than 2^128".into(), |size| size.to_string());
    println!("{plans} plans of {} to {} bytes", space.smallest(), space.largest());

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
    let rows = tune(&options, &mut objective, &space, &outcome, &train, &held_out)?;
    println!("{}", table(&rows));
    write(&options.out.join("tuned.md"), &table(&rows))?;
    write(&options.out.join("tuned.json"), &serde_json::to_string_pretty(&rows)?)?;
    println!("plans, tables and plot written to {}", options.out.display());
    write_json(options.json.as_deref(), &figures)
}
