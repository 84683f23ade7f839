//! Adapters that trade resolution for rank, at about equal numbers of trained values on one GPTQ base, and what is left of
//! them in a model of N bits: merged without loss, or LoRA merged and quantized again.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    rc::Rc,
};

use burn::module::Module;
use kiln::{
    Base, FineTuned,
    adapters::{AdapterConfig, Method as AdapterMethod, Pooling, QBara, QaHira, QaLora},
    calibration::{CalibrationConfig, GptqConfig, Method as Calibration},
    models::Windows,
    quant::{Plan, Scheme, trained_values},
};
use kiln_examples::Result;
use serde_json::json;

use crate::{
    bench::{Case, Cell, EMBEDDED, Run, SMOLLM2, StudyOptions, Texts, head, line_of},
    log::{Line, Log},
};

pub(crate) const NAME: &str = "balanced-rank";
pub(crate) const VERSION: u32 = 1;
const GROUP: usize = 32;
const WINDOWS: usize = 32;
/// Rates that every method is tried with at every width, times the case's.
const RATES: [f64; 4] = [5e-3, 1e-2, 3e-2, 6e-2];
const WIDTHS: [u32; 3] = [4, 3, 2];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Lora,
    Qbara,
    Qalora,
    Qahira,
    /// LoRA on an NF4 base, merged, and quantized again by GPTQ.
    QloraGptq,
}

impl Method {
    const ALL: [Self; 5] = [Self::Qahira, Self::QloraGptq, Self::Qalora, Self::Lora, Self::Qbara];

    fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Qbara => "Q-BaRA, λ = 2",
            Self::Qalora => "QA-LoRA, merged",
            Self::Qahira => "QA-HiRA, merged",
            Self::QloraGptq => "QLoRA, merged, GPTQ",
        }
    }

    /// Ranks at which the numbers of trained values come closest (QA-HiRA has none: the rank only scales it).
    fn rank(self, model: &str) -> usize {
        match (self, model == SMOLLM2) {
            (Self::Qalora, false) => 7,
            (Self::Qalora, true) => 21,
            (Self::Qahira, _) => 1,
            (_, false) => 4,
            (_, true) => 11,
        }
    }

    /// Scaled so that a step moves the weights about as far as LoRA's does.
    fn adapters(self, model: &str, seed: u64) -> AdapterConfig {
        let rank = self.rank(model);
        let (method, alpha) = match self {
            Self::Lora | Self::QloraGptq => (AdapterMethod::lora(), rank),
            Self::Qbara => (AdapterMethod::QBara(QBara { lambda: 2 }), 2 * rank),
            Self::Qalora => (AdapterMethod::QaLora(QaLora { pool: GROUP, pooling: Pooling::Sum }), rank),
            Self::Qahira => (AdapterMethod::QaHira(QaHira::for_tiles(1, GROUP)), GROUP),
        };
        AdapterConfig::new(method, rank, alpha as f64).with_seed(seed)
    }
}

struct Bench<'a> {
    case: &'a Case,
    steps: u64,
    dense: Base,
    nf4: Base,
    texts: Texts,
    windows: Windows,
    /// Of NF4's LoRA, which all widths share: rate, seed, and the model.
    qlora: Vec<(f64, u64, Rc<FineTuned>)>,
}

impl Bench<'_> {
    /// Rounds `base` to `bits` by GPTQ.
    fn gptq(&self, base: &Base, bits: u32) -> Result<Base> {
        let scheme: Scheme = format!("affine{bits}:{GROUP}").parse()?;
        let method = Calibration::Gptq(GptqConfig::default());
        let mut config = CalibrationConfig::new(method, Plan::uniform(scheme));
        config.measured_windows = 0;
        Ok(base.calibrate(AdapterConfig::lora(1, 1.0), &config, &self.windows)?.without_adapters())
    }

    fn tuned(&self, base: &Base, method: Method, lr: f64, seed: u64) -> Result<FineTuned> {
        let adapters = method.adapters(self.case.name, seed);
        let trainer = self.case.trainer(self.steps, seed, lr);
        Ok(base.finetune(adapters, self.texts.train.clone()).with_trainer(trainer).run()?)
    }

    /// NF4's LoRA of this rate and seed.
    fn qlora(&mut self, lr: f64, seed: u64) -> Result<Rc<FineTuned>> {
        if let Some((_, _, found)) = self.qlora.iter().find(|(rate, of, _)| (*rate, *of) == (lr, seed)) {
            return Ok(found.clone());
        }
        let tuned = Rc::new(self.tuned(&self.nf4, Method::QloraGptq, lr, seed)?);
        self.qlora.push((lr, seed, tuned.clone()));
        Ok(tuned)
    }

    fn run(&mut self, base: &Base, method: Method, bits: u32, lr: f64, seed: u64) -> Result<Line> {
        let from = match method {
            Method::QloraGptq => &self.nf4,
            _ => base,
        };
        let before = from.evaluate(&self.texts.test)?.nll;
        let tuned = match method {
            Method::QloraGptq => self.qlora(lr, seed)?,
            _ => self.tuned(base, method, lr, seed)?.into(),
        };
        let unmerged = tuned.evaluate(&self.texts.test)?.nll;
        let [validation, test] = match method {
            Method::Lora | Method::Qbara => self.texts.losses(|data| tuned.evaluate(data))?,
            Method::Qalora | Method::Qahira => {
                let merged = tuned.merge_packed()?;
                self.texts.losses(|data| merged.evaluate(data))?
            }
            Method::QloraGptq => {
                let merged = self.gptq(&tuned.merge_dense(), bits)?;
                self.texts.losses(|data| merged.evaluate(data))?
            }
        };
        Ok(line_of(json!({
            "before": before, "validation": validation, "test": test, "unmerged": unmerged,
            "trained": trained_values(&tuned.model().clone().train()), "steps": self.steps,
        })))
    }
}

fn study(log: &Log, case: &Case) -> Result<()> {
    let (dense, nf4) = (case.open(Scheme::Dense)?, case.open("nf4:64:double".parse()?)?);
    let texts = Texts::of(&dense, case)?;
    let (steps, widths, seeds): (_, &[u32], _) = match case.name {
        EMBEDDED => (200, &WIDTHS, 3),
        _ => (60, &[3, 2], 1),
    };
    let windows = texts.windows(case.length, WINDOWS, 0)?;
    let mut bench = Bench { case, steps, dense, nf4, texts, windows, qlora: Vec::new() };
    let mut bases: BTreeMap<u32, Base> = BTreeMap::new();
    for method in Method::ALL {
        for &bits in widths {
            let cell = Cell { model: case.name, bits, method: method.name() };
            cell.study(log, &RATES.map(|rate| rate * case.rate), seeds, |lr, seed| {
                let base = match bases.entry(bits) {
                    Entry::Occupied(found) => found.into_mut(),
                    Entry::Vacant(place) => place.insert(bench.gptq(&bench.dense, bits)?),
                };
                bench.run(base, method, bits, lr, seed)
            })?;
        }
    }
    Ok(())
}

pub(crate) fn table(runs: &[Run], model: &str) -> String {
    let mut text = head("bits | method | trained values | before | after | rate");
    for bits in WIDTHS {
        for method in Method::ALL {
            let Some(chosen) = (Cell { model, bits, method: method.name() }).chosen(runs) else { continue };
            let trained = chosen.values(|run| run.more.get("trained")?.as_f64());
            text += &format!(
                "| {bits} | {} | {} | {} | {} | {} |\n",
                method.name(),
                trained.first().copied().unwrap_or_default(),
                chosen.nats(|run| run.before),
                chosen.nats(|run| run.test),
                chosen.rate(),
            );
        }
    }
    text
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    options.run(NAME, VERSION, study, table)
}
