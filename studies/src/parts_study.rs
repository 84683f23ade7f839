//! What repairs few bits: LoRA or the weights' own scales, at about as many trained values; and the text alone or a teacher
//! beside it, from ApiQ's start at 2 bits.

use std::sync::Arc;

use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{ApiqConfig, CalibrationConfig, Method as Calibration},
    quant::{Plan, Scheme, Slots, TrainedParts},
    training::{Distillation, RunOptions, TokenLoss},
};
use kiln_examples::Result;
use serde_json::json;

use crate::{
    bench::{Case, Cell, EMBEDDED, Run, SMOLLM2, StudyOptions, Texts, head, line_of},
    log::{Line, Log},
};

pub(crate) const NAME: &str = "trained-parts";
pub(crate) const VERSION: u32 = 2;
const GROUP: usize = 64;
const WINDOWS: usize = 32;
const WIDTHS: [u32; 2] = [3, 2];
/// The teacher's share of the loss.
const TEACHER: Distillation = Distillation { weight: 0.5, temperature: 1.0 };

#[derive(Debug, Clone, Copy, PartialEq)]
enum Method {
    Lora,
    Parts(TrainedParts),
    /// LoRA from ApiQ's start.
    Apiq {
        taught: bool,
    },
}

impl Method {
    const ALL: [Self; 5] = [
        Self::Lora,
        Self::Parts(TrainedParts::Scales),
        Self::Parts(TrainedParts::ScalesAndOffsets),
        Self::Apiq { taught: false },
        Self::Apiq { taught: true },
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Lora => "LoRA",
            Self::Parts(TrainedParts::Scales) => "scales",
            Self::Parts(TrainedParts::ScalesAndOffsets) => "scales and offsets",
            Self::Apiq { taught: false } => "LoRA from ApiQ",
            Self::Apiq { taught: true } => "the same, half of the loss a teacher's",
        }
    }

    /// Rates, as many for each method: those of factors are larger.
    fn rates(self, model: &str) -> [f64; 5] {
        match (self, model == SMOLLM2) {
            (Self::Parts(_), false) => [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
            (Self::Parts(_), true) => [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
            (_, false) => [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
            (_, true) => [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        }
    }
}

/// What a case may spend.
struct Budget {
    steps: u64,
    epochs: usize,
    seeds: u64,
}

/// A model of a width with its texts.
struct Bench<'a> {
    case: &'a Case,
    budget: &'a Budget,
    bits: u32,
    base: Base,
    texts: Texts,
    /// The dense model, and ApiQ's start from it, which all rates and seeds share.
    calibrated: Option<(Base, FineTuned)>,
}

impl<'a> Bench<'a> {
    fn new(case: &'a Case, budget: &'a Budget, bits: u32) -> Result<Self> {
        let base = case.open(scheme(bits)?)?;
        let texts = Texts::of(&base, case)?;
        Ok(Self { case, budget, bits, base, texts, calibrated: None })
    }

    /// Scales of all linears.
    fn scales(&self) -> usize {
        let shapes = self.base.model().slot_shapes();
        shapes.iter().map(|(_, [input, output])| input.div_ceil(GROUP) * output).sum()
    }

    /// Values that LoRA trains for each rank.
    fn of_rank(&self) -> usize {
        self.base.model().slot_shapes().iter().map(|(_, [input, output])| input + output).sum()
    }

    /// The rank at which LoRA trains about as many values as there are scales.
    fn rank(&self) -> usize {
        (self.scales() as f64 / self.of_rank() as f64).round().max(1.0) as usize
    }

    fn trained(&self, method: Method) -> usize {
        match method {
            Method::Lora | Method::Apiq { .. } => self.rank() * self.of_rank(),
            Method::Parts(TrainedParts::Scales) => self.scales(),
            Method::Parts(TrainedParts::ScalesAndOffsets) => 2 * self.scales(),
        }
    }

    fn run(&mut self, method: Method, lr: f64, seed: u64) -> Result<Line> {
        let trainer = self.case.trainer(self.budget.steps, seed, lr);
        let adapters = self.adapters(seed);
        let train: Arc<_> = self.texts.train.clone();
        let before = |base: &Base| base.evaluate(&self.texts.test);
        let (before, [validation, test]) = match method {
            Method::Parts(parts) => {
                let run = RunOptions::new();
                let (tuned, _) = self.base.tune_scales(parts, train, trainer, &run, &mut ())?;
                (before(&self.base)?, self.texts.losses(|data| tuned.evaluate(data))?)
            }
            Method::Lora => {
                let tuned = self.base.finetune(adapters, train).with_trainer(trainer).run()?;
                (before(&self.base)?, self.texts.losses(|data| tuned.evaluate(data))?)
            }
            Method::Apiq { taught } => {
                let (teacher, start) = match self.calibrated.take() {
                    Some(found) => self.calibrated.insert(found),
                    None => self.calibrated.insert(self.calibrate()?),
                };
                let loss = TokenLoss::new().with_distillation(TEACHER);
                let tuned = match taught {
                    true => {
                        let tuning = start.finetune(train).with_trainer(trainer.with_loss(loss));
                        tuning.with_reference(teacher).run()?
                    }
                    false => start.finetune(train).with_trainer(trainer).run()?,
                };
                let before = start.evaluate(&self.texts.test)?;
                (before, self.texts.losses(|data| tuned.evaluate(data))?)
            }
        };
        Ok(line_of(json!({
            "trained": self.trained(method), "before": before.nll, "validation": validation, "test": test,
            "steps": self.budget.steps, "windows": WINDOWS, "epochs": self.budget.epochs,
        })))
    }

    fn adapters(&self, seed: u64) -> AdapterConfig {
        let rank = self.rank();
        AdapterConfig::lora(rank, rank as f64).with_seed(seed)
    }

    /// The dense model, and ApiQ's start from it.
    fn calibrate(&self) -> Result<(Base, FineTuned)> {
        let teacher = self.case.open(Scheme::Dense)?;
        let apiq = ApiqConfig::for_budget(self.bits, WINDOWS, self.budget.epochs);
        let plan = Plan::uniform(scheme(self.bits)?);
        let mut config = CalibrationConfig::new(Calibration::ApiqBlock(apiq), plan);
        config.measured_windows = 0;
        let windows = self.texts.windows(self.case.length, WINDOWS, 0)?;
        let start = teacher.calibrate(self.adapters(0), &config, &windows)?;
        Ok((teacher, start))
    }
}

/// Scales and offsets in f32, which may be trained.
fn scheme(bits: u32) -> Result<Scheme> {
    Ok(format!("affine{bits}:{GROUP}").parse()?)
}

fn study(log: &Log, case: &Case) -> Result<()> {
    let budget = match case.name {
        EMBEDDED => Budget { steps: 120, epochs: 14, seeds: 3 },
        _ => Budget { steps: 30, epochs: 4, seeds: 1 },
    };
    for bits in WIDTHS {
        let mut bench = Bench::new(case, &budget, bits)?;
        for method in Method::ALL {
            if matches!(method, Method::Apiq { .. }) && bits != 2 {
                continue;
            }
            let cell = Cell { model: case.name, bits, method: method.name() };
            cell.study(log, &method.rates(case.name), budget.seeds, |lr, seed| bench.run(method, lr, seed))?;
        }
    }
    Ok(())
}

pub(crate) fn table(runs: &[Run], model: &str) -> String {
    let mut text = head("bits | trained | values | before | after | rate");
    for bits in WIDTHS {
        for method in Method::ALL {
            let Some(chosen) = (Cell { model, bits, method: method.name() }).chosen(runs) else { continue };
            let trained = chosen.values(|run| run.more.get("trained")?.as_f64());
            text += &format!(
                "| {bits} | {} | {} | {} | {} | {} |\n",
                method.name(),
                trained.first().copied().unwrap_or_default(),
                chosen.perplexity(|run| run.before),
                chosen.perplexity(|run| run.test),
                chosen.rate(),
            );
        }
    }
    text
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    options.run(NAME, VERSION, study, table)
}
