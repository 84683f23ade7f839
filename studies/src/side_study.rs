//! Side networks beside LoRA on the same 4-bit base, at equal tokens: loss after every few steps, alpha, and every way of
//! downsampling.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln::{
    Base, Tuned,
    adapters::AdapterConfig,
    models::CausalLm,
    quant::trained_values,
    side_tuning::{Downsample, GateShape, HeadMix, SideConfig, SideTuned},
    training::{ParameterGroup, Trainer, TrainerConfig, evaluate},
};
use kiln_examples::Result;
use serde_json::json;

use crate::{
    bench::{Case, Cell, Chosen, EMBEDDED, Run, StudyOptions, Texts, head, line_of},
    log::{Line, Log},
    plot::{Plot, Series},
};

pub(crate) const NAME: &str = "side-tuning";
pub(crate) const VERSION: u32 = 1;
const RANK: usize = 16;
/// Losses on the text for choices that a curve has.
const POINTS: u64 = 8;
const BITS: u32 = 4;
/// Windows that say which of the backbone's weights a side network starts from.
const WINDOWS: usize = 64;

/// What is trained on which base.
struct Method {
    name: &'static str,
    scheme: &'static str,
    /// None is LoRA on all linears.
    side: Option<SideConfig>,
    /// What the rate of alpha is multiplied by.
    alpha: f64,
    /// What the steps are multiplied by.
    longer: u64,
    /// Whether side blocks start from the backbone's weights.
    pruned: bool,
}

impl Method {
    fn new(name: &'static str, side: impl Into<Option<SideConfig>>) -> Self {
        Self { name, scheme: "nf4:64:double", side: side.into(), alpha: 1.0, longer: 1, pruned: false }
    }

    /// What both models are tried with.
    fn main() -> Vec<Self> {
        let additive = || SideConfig::qst().with_mix(HeadMix::Additive, GateShape::Scalar);
        vec![
            Self::new("QLoRA", None),
            Self::new("QST, added", additive()),
            Self { alpha: 10.0, ..Self::new("QST, alpha at ten times the rate", SideConfig::qst()) },
            Self::new("QST, as published", SideConfig::qst()),
            Self::new("LST", SideConfig::lst()),
            Self { pruned: true, ..Self::new("LST, from the backbone's weights", SideConfig::lst()) },
        ]
    }

    /// What the embedded model is tried with besides.
    fn more() -> Vec<Self> {
        let additive = || SideConfig::qst().with_mix(HeadMix::Additive, GateShape::Scalar);
        let by = |downsample| additive().with_downsample(downsample);
        vec![
            Self::new("QST, added, linear", by(Downsample::Linear)),
            Self::new("QST, added, low rank", by(Downsample::Lora)),
            Self::new("QST, added, largest of 16", by(Downsample::MaxPool)),
            Self::new("QST, added, mean of 16", by(Downsample::AvgPool)),
            Self::new("QST, added, reduction 8", additive().with_reduction(8)),
            Self::new("QST, added, reduction 4", additive().with_reduction(4)),
            Self::new("QST, as published, reduction 4", SideConfig::qst().with_reduction(4)),
            Self { scheme: "fp4:64:double", ..Self::new("QST, added, FP4", additive()) },
            Self {
                pruned: true,
                ..Self::new("LST, from there, without the first block", SideConfig::lst().with_dropped([0]))
            },
            Self { longer: 4, ..Self::new("QLoRA, four times as long", None) },
            Self { longer: 4, ..Self::new("QST, as published, four times as long", SideConfig::qst()) },
            Self {
                longer: 4,
                ..Self::new("QST, added, reduction 4, four times as long", additive().with_reduction(4))
            },
            Self {
                longer: 4,
                ..Self::new(
                    "QST, as published, reduction 4, four times as long",
                    SideConfig::qst().with_reduction(4),
                )
            },
        ]
    }
}

/// Trains, with losses in between.
fn trained<M: CausalLm>(
    model: M,
    config: TrainerConfig,
    texts: &Texts,
    alpha: impl Fn(&M) -> Option<f32>,
) -> Result<Line> {
    let (steps, batch) = (config.steps, config.batch.batch);
    let mut trainer = Trainer::new(model, texts.train.clone(), config).map_err(kiln::Error::from)?;
    let trained = trained_values(trainer.model());
    let losses = |model: &M| {
        let model = model.valid();
        texts.losses(|data| evaluate(&model, data, batch).map_err(kiln::Error::from))
    };
    let [mut validation, before] = losses(trainer.model())?;
    let mut curve = vec![json!([0, validation, alpha(trainer.model())])];
    while trainer.steps_done() < steps {
        trainer.step().map_err(kiln::Error::from)?;
        let done = trainer.steps_done();
        if done.is_multiple_of((steps / POINTS).max(1)) {
            validation =
                evaluate(&trainer.model().valid(), &texts.validation, batch).map_err(kiln::Error::from)?.nll;
            curve.push(json!([done, validation, alpha(trainer.model())]));
        }
    }
    let [validation, test] = losses(trainer.model())?;
    Ok(line_of(json!({
        "before": before, "validation": validation, "test": test, "curve": curve, "trained": trained,
        "steps": steps,
    })))
}

fn run_one(
    case: &Case,
    base: &Base,
    texts: &Texts,
    method: &Method,
    steps: u64,
    lr: f64,
    seed: u64,
) -> Result<Line> {
    let config = case.trainer(steps, seed, lr);
    let Some(side) = &method.side else {
        let adapters = AdapterConfig::lora(RANK, RANK as f64).with_seed(seed);
        let tuned = Tuned::attach(base.model().clone(), &adapters)?;
        return trained(tuned.into_model(), config, texts, |_| None);
    };
    let group = ParameterGroup::new(r"mix\.alpha$")?.with_lr_factor(method.alpha);
    let config = if method.alpha == 1.0 { config } else { config.with_group(group) };
    let mut model = SideTuned::new(base.model().clone(), side, seed)?;
    if method.pruned {
        model = model.with_pruned_start(&texts.windows(case.length, WINDOWS, 0)?)?;
    }
    trained(model, config, texts, |model| {
        let alpha = model.side.mix.alpha.as_ref()?.val().inner();
        alpha.into_data().try_to_vec::<f32>().ok()?.first().copied()
    })
}

fn study(log: &Log, case: &Case) -> Result<()> {
    let (methods, steps, seeds, rates): (_, _, _, &[f64]) = match case.name {
        EMBEDDED => {
            let methods = Method::main().into_iter().chain(Method::more()).collect();
            (methods, 400, 3, &[3e-3, 1e-2, 3e-2, 1e-1])
        }
        _ => (Method::main(), 120, 1, &[1e-3, 3e-3, 1e-2, 3e-2]),
    };
    for method in methods {
        let mut opened: Option<(Base, Texts)> = None;
        let cell = Cell { model: case.name, bits: BITS, method: method.name };
        // Longer runs want lower rates.
        let rates: Vec<f64> = (method.longer > 1).then_some(1e-3).into_iter().chain(rates.to_vec()).collect();
        cell.study(log, &rates, seeds, |lr, seed| {
            if opened.is_none() {
                let base = case.open(method.scheme.parse()?)?;
                let texts = Texts::of(&base, case)?;
                opened = Some((base, texts));
            }
            let Some((base, texts)) = &opened else { return Err("a base that was opened".into()) };
            run_one(case, base, texts, &method, method.longer * steps, lr, seed)
        })?;
    }
    Ok(())
}

/// Steps, and losses on the text for choices, mean over seeds, at each point of the curve.
fn curve(runs: &[Run]) -> Vec<(f64, f64)> {
    let points = |run: &Run| -> Option<Vec<(f64, f64)>> {
        let point = |point: &serde_json::Value| Some((point.get(0)?.as_f64()?, point.get(1)?.as_f64()?));
        run.more.get("curve")?.as_array()?.iter().map(point).collect()
    };
    let curves: Vec<Vec<(f64, f64)>> = runs.iter().filter_map(points).collect();
    let count = curves.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |at: usize| curves.iter().map(|curve| curve[at].1).sum::<f64>() / curves.len() as f64;
    (0..count).map(|at| (curves[0][at].0, mean(at))).collect()
}

fn chosen(runs: &[Run], model: &str, method: &str) -> Option<Chosen> {
    (Cell { model, bits: BITS, method }).chosen(runs)
}

pub(crate) fn table(runs: &[Run], model: &str) -> String {
    let mut text = head("method | trained values | before | after | rate | curve");
    for Method { name, .. } in Method::main().into_iter().chain(Method::more()) {
        let Some(chosen) = chosen(runs, model, name) else { continue };
        let trained = chosen.values(|run| run.more.get("trained")?.as_f64());
        text += &format!(
            "| {name} | {} | {} | {} | {} | {} |\n",
            trained.first().copied().unwrap_or_default(),
            chosen.nats(|run| run.before),
            chosen.nats(|run| run.test),
            chosen.rate(),
            curve(&chosen.runs).iter().map(|(_, loss)| format!("{loss:.3}")).collect::<Vec<_>>().join(", "),
        );
    }
    text
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    study: StudyOptions,
    /// Draws the curves of the embedded model as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

/// The curves of the published methods, and of longer runs.
fn plot(path: &Path, log: &Log) -> Result<()> {
    let runs = log.runs()?;
    let names = [
        "QLoRA",
        "QST, as published",
        "QST, as published, reduction 4",
        "QST, added, reduction 4",
        "LST",
        "LST, from the backbone's weights",
    ];
    let longer = names.map(|name| format!("{name}, four times as long"));
    let series: Vec<Series> = names
        .into_iter()
        .map(str::to_owned)
        .chain(longer)
        .filter_map(|name| {
            let points = curve(&chosen(&runs, EMBEDDED, &name)?.runs);
            Some((name, points.into_iter().skip(1).collect()))
        })
        .collect();
    let caption = "Side tuning beside QLoRA, the embedded model: nats a token on the text for choices";
    Plot { caption, x: "step of 512 tokens", logarithmic: false }.draw(path, &series)
}

pub(crate) fn run(options: &Options) -> Result<()> {
    options.study.run(NAME, VERSION, study, table)?;
    match &options.plot {
        Some(path) => plot(path, &Log::open(options.study.log.as_deref(), NAME, VERSION)?),
        None => Ok(()),
    }
}
