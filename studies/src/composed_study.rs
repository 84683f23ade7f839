//! Everything composed, within one limit of bytes: pruned, bits chosen by a search, started by ApiQ, tuned; and the same with one
//! of these left out, or ended otherwise, by a merge or by a side network. What is saved counts, and is read again.

use std::rc::Rc;

use burn::module::Module;
use kiln::{
    Base, FineTuned,
    adapters::{AdapterConfig, Method as AdapterMethod, QaHira},
    calibration::{ApiqConfig, GptqConfig, Method as Calibration},
    eval::disk_bytes,
    mixq::{Prunings, schemes},
    mixq_search::Plan,
    models::Windows,
    quant::{Plan as Schemes, Scheme, trained_values},
    side_tuning::{SideConfig, SideTuned},
    training::{Trainer, evaluate},
};
use kiln_examples::Result;
use serde_json::json;

use crate::{
    bench::{Case, Cell, EMBEDDED, Run, StudyOptions, Texts, head, line_of},
    compress::{bytes_of, loftq, lora, pruned, prunings, rounding, searched, space_by_block, started_by},
    log::{Line, Log},
};

pub(crate) const NAME: &str = "composed";
pub(crate) const VERSION: u32 = 1;
const RATIO: f64 = 0.2;
/// Ratios of which a search chooses one for each block's heads and channels.
const RATIOS: [f64; 2] = [0.25, 0.5];
const GROUP: usize = 64;
const SCHEMES: [&str; 3] = ["affine2:64:int:f16", "affine3:64:int:f16", "affine4:64:int:f16"];
/// Scales and offsets in f32, which take what is merged.
const MERGEABLE: [&str; 3] = ["affine2:64", "affine3:64", "affine4:64"];
/// Whose bytes, of the pruned model, are the limit of every search.
const WITHIN: &str = "affine3:64:int:f16";
const BESIDE: &str = "beside_bytes";

/// What is done to the model, and what is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Dense,
    Qlora,
    Everything,
    Unpruned,
    /// With the ratio of each block's heads and channels searched beside its bits.
    Ratios,
    Unsearched,
    FromLoftq,
    FromRounding,
    Merged,
    Side,
}

impl Method {
    const ALL: [Self; 10] = [
        Self::Dense,
        Self::Qlora,
        Self::Everything,
        Self::Unpruned,
        Self::Ratios,
        Self::Unsearched,
        Self::FromLoftq,
        Self::FromRounding,
        Self::Merged,
        Self::Side,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Dense => "LoRA on dense weights",
            Self::Qlora => "QLoRA (`nf4:64:double`)",
            Self::Everything => "pruned, searched, ApiQ, LoRA",
            Self::Unpruned => "not pruned",
            Self::Ratios => "ratios searched too",
            Self::Unsearched => "3 bits throughout",
            Self::FromLoftq => "LoftQ for ApiQ",
            Self::FromRounding => "rounding for ApiQ",
            Self::Merged => "pruned, searched, GPTQ, QA-HiRA, merged",
            Self::Side => "pruned, searched, GPTQ, QST",
        }
    }

    fn is_pruned(self) -> bool {
        !matches!(self, Self::Dense | Self::Qlora | Self::Unpruned | Self::Ratios)
    }

    fn adapters(self, seed: u64) -> AdapterConfig {
        match self {
            Self::Merged => {
                let method = AdapterMethod::QaHira(QaHira::for_tiles(1, GROUP));
                AdapterConfig::new(method, 1, GROUP as f64).with_seed(seed)
            }
            _ => lora(seed),
        }
    }
}

/// What a case may spend.
struct Budget {
    windows: usize,
    evaluations: usize,
    /// Passes of ApiQ over the windows.
    epochs: usize,
    steps: u64,
    seeds: u64,
}

struct Bench<'a> {
    case: &'a Case,
    budget: &'a Budget,
    dense: Base,
    pruned: Base,
    limit: u64,
    texts: Texts,
    windows: Windows,
    /// Plans by what they depend on, and the last start, which all rates share.
    plans: Vec<(bool, &'static [&'static str], Plan)>,
    start: Option<(Method, u64, Rc<FineTuned>)>,
}

impl<'a> Bench<'a> {
    fn new(case: &'a Case, budget: &'a Budget) -> Result<Self> {
        let dense = case.open(Scheme::Dense)?;
        let texts = Texts::of(&dense, case)?;
        let windows = texts.windows(case.length, budget.windows, 0)?;
        let pruned = pruned(&dense, RATIO, &windows)?;
        let limit = bytes_of(&pruned, WITHIN)?;
        Ok(Self { case, budget, dense, pruned, limit, texts, windows, plans: Vec::new(), start: None })
    }

    fn base(&self, method: Method) -> &Base {
        if method.is_pruned() { &self.pruned } else { &self.dense }
    }

    fn plan(&mut self, method: Method) -> Result<Plan> {
        let formats: &'static [&'static str] = if method == Method::Merged { &MERGEABLE } else { &SCHEMES };
        let of = |(pruned, of, _): &&(bool, &[&str], Plan)| *pruned == method.is_pruned() && *of == formats;
        if let Some((_, _, plan)) = self.plans.iter().find(of) {
            return Ok(plan.clone());
        }
        let plan = self.search(self.base(method), formats, None)?;
        self.plans.push((method.is_pruned(), formats, plan.clone()));
        Ok(plan)
    }

    fn search(&self, base: &Base, formats: &[&str], prunings: Option<&Prunings>) -> Result<Plan> {
        let space = space_by_block(base, formats, prunings)?;
        searched(base, &space, &self.windows, self.budget.evaluations, self.limit, prunings)
    }

    /// The model before quantization, and its formats.
    fn compressed(&mut self, method: Method) -> Result<(Base, Schemes<Scheme>)> {
        let formats = match method {
            Method::Dense => Schemes::uniform(Scheme::Dense),
            Method::Qlora => Schemes::uniform("nf4:64:double".parse()?),
            Method::Unsearched => Schemes::uniform(WITHIN.parse()?),
            Method::Ratios => {
                let prunings = prunings(&self.dense, &RATIOS, &self.windows)?;
                let (model, plan) =
                    prunings.apply(&self.search(&self.dense, &SCHEMES, Some(&prunings))?)?;
                return Ok((self.dense.with_model(model), schemes(&plan)?));
            }
            _ => schemes(&self.plan(method)?)?,
        };
        let base = self.base(method);
        Ok((base.with_model(base.model().clone()), formats))
    }

    /// The compressed model with adapters as they start.
    fn start(&mut self, method: Method, seed: u64) -> Result<Rc<FineTuned>> {
        if let Some((of, from, start)) = &self.start
            && (*of, *from) == (method, seed)
        {
            return Ok(start.clone());
        }
        let (base, plan) = self.compressed(method)?;
        let by = match method {
            Method::Dense | Method::Qlora | Method::FromRounding => rounding(),
            Method::FromLoftq => loftq(),
            Method::Merged | Method::Side => Calibration::Gptq(GptqConfig::default()),
            // One set of values for all widths: those of the limit's.
            Method::Everything | Method::Unpruned | Method::Ratios | Method::Unsearched => {
                Calibration::ApiqBlock(ApiqConfig::for_budget(3, self.budget.windows, self.budget.epochs))
            }
        };
        let start = started_by(&base, plan, by, method.adapters(seed), &self.windows)?;
        let start = Rc::new(start);
        self.start = Some((method, seed, start.clone()));
        Ok(start)
    }

    fn run(&mut self, method: Method, lr: f64, seed: u64) -> Result<Line> {
        let start = self.start(method, seed)?;
        let trainer = self.case.trainer(self.budget.steps, seed, lr);
        let (texts, batch) = (&self.texts, self.case.batch);
        let before = start.evaluate(&texts.test)?.nll;
        let folder = tempfile::tempdir()?;
        let [model, beside] = ["model", "beside"].map(|name| folder.path().join(name));
        let (found, again, trained) = match method {
            Method::Side => {
                let base = start.without_adapters();
                let side = SideTuned::new(base.model().clone(), &SideConfig::qst(), seed)?;
                let mut trainer =
                    Trainer::new(side, texts.train.clone(), trainer).map_err(kiln::Error::from)?;
                while trainer.steps_done() < self.budget.steps {
                    trainer.step().map_err(kiln::Error::from)?;
                }
                let side = trainer.model();
                base.save(&model)?;
                side.save(&beside)?;
                let reloaded = SideTuned::load(Base::open(&model)?.load()?.into_model(), &beside)?;
                let of = |data: &_| evaluate(&side.valid(), data, batch).map_err(kiln::Error::from);
                let again =
                    evaluate(&reloaded.valid(), &texts.validation, batch).map_err(kiln::Error::from)?;
                (texts.losses(of)?, again, trained_values(side))
            }
            _ => {
                let tuned = start.finetune(texts.train.clone()).with_trainer(trainer).run()?;
                let trained = trained_values(&tuned.model().clone().train());
                let (found, again) = match method {
                    Method::Merged => {
                        let merged = tuned.merge_packed()?;
                        merged.save(&model)?;
                        let of = |data: &_| merged.evaluate(data);
                        (texts.losses(of)?, Base::open(&model)?.load()?.evaluate(&texts.validation)?)
                    }
                    _ => {
                        tuned.without_adapters().save(&model)?;
                        tuned.save(&beside)?;
                        let reloaded = Base::open(&model)?.load()?.load_adapters(&beside)?;
                        let of = |data: &_| tuned.evaluate(data);
                        (texts.losses(of)?, reloaded.evaluate(&texts.validation)?)
                    }
                };
                (found, again, trained)
            }
        };
        let [validation, test] = found;
        let beside = if beside.exists() { disk_bytes(&beside)? } else { 0 };
        Ok(line_of(json!({
            "before": before, "validation": validation, "test": test, "trained": trained,
            "model_bytes": disk_bytes(&model)?, BESIDE: beside, "reloaded": again.nll,
            "steps": self.budget.steps,
        })))
    }
}

fn study(log: &Log, case: &Case) -> Result<()> {
    let budget = match case.name {
        EMBEDDED => Budget { windows: 32, evaluations: 120, epochs: 14, steps: 120, seeds: 3 },
        _ => Budget { windows: 16, evaluations: 60, epochs: 4, steps: 60, seeds: 1 },
    };
    let mut bench = Bench::new(case, &budget)?;
    for method in Method::ALL {
        let cell = Cell { model: case.name, bits: 0, method: method.name() };
        let rates = [3e-3, 1e-2, 3e-2].map(|rate| rate * case.rate);
        cell.study(log, &rates, budget.seeds, |lr, seed| bench.run(method, lr, seed))?;
    }
    Ok(())
}

pub(crate) fn table(runs: &[Run], model: &str) -> String {
    let mut text = head("what | MB: model | beside it | trained values | before | after | rate");
    for method in Method::ALL {
        let Some(chosen) = (Cell { model, bits: 0, method: method.name() }).chosen(runs) else { continue };
        let first = |key: &str| chosen.values(|run| run.more.get(key)?.as_f64()).first().copied();
        let megabytes = |key: &str| first(key).map_or("-".into(), |bytes| format!("{:.3}", bytes / 1e6));
        text += &format!(
            "| {} | {} | {} | {} | {} | {} | {} |\n",
            method.name(),
            megabytes("model_bytes"),
            megabytes(BESIDE),
            first("trained").unwrap_or_default(),
            chosen.perplexity(|run| run.before),
            chosen.perplexity(|run| run.test),
            chosen.rate(),
        );
    }
    text
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    options.run(NAME, VERSION, study, table)
}
