//! Quantization at 4, 3 and 2 bits by all methods, before and after the same fine-tune: affine ones on one grid, with zero points
//! that are codes, and NormalFloat, which takes a quarter bit less.

use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{
        ApiqConfig, AwqConfig, CalibrationConfig, GptqConfig, LoftqConfig, Method as Calibration, Rounding,
        block_errors,
    },
    quant::{Plan, Scheme},
};
use kiln_examples::Result;
use serde_json::json;

use crate::{
    bench::{Case, Cell, EMBEDDED, Run, StudyOptions, Texts, head, line_of},
    log::{Line, Log},
    numbers::{mean, significant},
};

pub(crate) const NAME: &str = "quantization";
pub(crate) const VERSION: u32 = 1;
const GROUP: usize = 64;
/// Bits of what isn't quantized, in the log.
const DENSE: u32 = 32;
const RANK: usize = 16;
/// Windows of the text that calibrates, others than those by chance, on which the error of the residual stream is measured.
const MEASURED: usize = 4;
/// Rates that every method is tried with, times the case's.
const RATES: [f64; 3] = [3e-3, 1e-2, 3e-2];
const WIDTHS: [u32; 3] = [4, 3, 2];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Method {
    Dense,
    Rtn,
    Nf,
    Awq,
    Gptq,
    /// OmniQuant's.
    Clipping,
    Loftq,
    NfLoftq,
    ApiqLayer,
    ApiqBlock,
    /// A seventh of the passes: as many steps as block by block.
    ApiqLayerShort,
}

impl Method {
    const ALL: [Self; 10] = [
        Self::Rtn,
        Self::Nf,
        Self::Awq,
        Self::Gptq,
        Self::Clipping,
        Self::Loftq,
        Self::NfLoftq,
        Self::ApiqLayer,
        Self::ApiqBlock,
        Self::ApiqLayerShort,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Dense => "LoRA on dense weights",
            Self::Rtn => "RTN",
            Self::Nf => "NF (QLoRA)",
            Self::Awq => "AWQ",
            Self::Gptq => "GPTQ",
            Self::Clipping => "learned clipping (OmniQuant)",
            Self::Loftq => "LoftQ",
            Self::NfLoftq => "NF, LoftQ",
            Self::ApiqLayer => "ApiQ-lw",
            Self::ApiqBlock => "ApiQ-bw",
            Self::ApiqLayerShort => "ApiQ-lw, as many steps as bw",
        }
    }

    fn scheme(self, bits: u32) -> Result<Scheme> {
        Ok(match self {
            Self::Dense => Scheme::Dense,
            Self::Nf | Self::NfLoftq => format!("nf{bits}:{GROUP}:f16").parse()?,
            _ => format!("affine{bits}:{GROUP}:int:f16").parse()?,
        })
    }

    /// Bits of a weight with its share of scale and offset, in f16 each.
    fn stored(self, bits: u32) -> f64 {
        let share = 16.0 / GROUP as f64;
        f64::from(bits)
            + match self {
                Self::Dense => 0.0,
                Self::Nf | Self::NfLoftq => share,
                _ => 2.0 * share,
            }
    }

    fn calibration(self, bits: u32, budget: &Budget) -> Result<CalibrationConfig> {
        let apiq = |epochs: usize| ApiqConfig::for_budget(bits, budget.windows, epochs);
        let method = match self {
            Self::Dense | Self::Rtn | Self::Nf | Self::Awq => Calibration::Rtn(Rounding::MinMax),
            Self::Gptq => Calibration::Gptq(GptqConfig::default()),
            Self::Clipping => {
                let config = ApiqConfig { epochs: budget.epochs, ..ApiqConfig::omniquant(bits) };
                Calibration::Clipping(config)
            }
            Self::Loftq | Self::NfLoftq => Calibration::Loftq(LoftqConfig::default()),
            Self::ApiqLayer => Calibration::ApiqLayer(apiq(budget.epochs)),
            Self::ApiqBlock => Calibration::ApiqBlock(apiq(budget.epochs)),
            Self::ApiqLayerShort => Calibration::ApiqLayer(apiq(budget.epochs / 7)),
        };
        let mut config = CalibrationConfig::new(method, Plan::uniform(self.scheme(bits)?));
        config.scaling = (self == Self::Awq).then(AwqConfig::default);
        config.measured_windows = 0;
        Ok(config)
    }
}

/// What a case may spend.
struct Budget {
    windows: usize,
    length: usize,
    epochs: usize,
    steps: u64,
    seeds: u64,
    methods: &'static [Method],
    widths: &'static [u32],
}

impl Budget {
    fn of(case: &Case) -> Self {
        match case.name {
            EMBEDDED => Self {
                windows: 32,
                length: 128,
                epochs: 14,
                steps: 120,
                seeds: 3,
                methods: &Method::ALL,
                widths: &WIDTHS,
            },
            _ => Self {
                windows: 32,
                length: 256,
                epochs: 7,
                steps: 60,
                seeds: 1,
                methods: &Method::ALL[..9],
                widths: &[2, 3, 4],
            },
        }
    }
}

/// Where fine-tunes begin.
struct Start {
    seed: u64,
    model: FineTuned,
    loss: f64,
    /// Of the residual stream behind each block.
    errors: Vec<f64>,
    seconds: f64,
}

struct Bench<'a> {
    case: &'a Case,
    budget: Budget,
    base: Base,
    texts: Texts,
}

impl Bench<'_> {
    fn start(&self, method: Method, bits: u32, seed: u64) -> Result<Start> {
        let adapters = AdapterConfig::lora(RANK, RANK as f64).with_seed(seed);
        let windows = self.texts.windows(self.budget.length, self.budget.windows, seed)?;
        let from = std::time::Instant::now();
        let model = self.base.calibrate(adapters, &method.calibration(bits, &self.budget)?, &windows)?;
        let seconds = from.elapsed().as_secs_f64();
        let measured = self.texts.windows(self.budget.length, MEASURED, u64::MAX)?;
        let errors = block_errors(self.base.model(), model.model(), &measured)?;
        Ok(Start { seed, loss: model.evaluate(&self.texts.test)?.nll, model, errors, seconds })
    }

    fn tuned(&self, start: &Start, lr: f64) -> Result<Line> {
        let trainer = self.case.trainer(self.budget.steps, start.seed, lr);
        let tuned = start.model.finetune(self.texts.train.clone()).with_trainer(trainer).run()?;
        let [validation, test] = self.texts.losses(|data| tuned.evaluate(data))?;
        Ok(line_of(json!({
            "before": start.loss, "validation": validation, "test": test, "errors": start.errors,
            "seconds": start.seconds, "steps": self.budget.steps, "windows": self.budget.windows,
            "length": self.budget.length, "epochs": self.budget.epochs,
        })))
    }

    fn method(&self, log: &Log, method: Method, bits: u32) -> Result<()> {
        let cell = Cell { model: self.case.name, bits, method: method.name() };
        let mut start: Option<Start> = None;
        cell.study(log, &RATES.map(|rate| rate * self.case.rate), self.budget.seeds, |lr, seed| {
            let start = match start.take() {
                Some(found) if found.seed == seed => start.insert(found),
                _ => start.insert(self.start(method, bits, seed)?),
            };
            self.tuned(start, lr)
        })
    }
}

pub(crate) fn table(runs: &[Run], model: &str) -> String {
    let mut text = head(
        "bits | method | stored bits | before | after | rate | error behind the first, last block | seconds",
    );
    let line = |bits: &str, of: u32, method: Method| {
        let Some(chosen) = (Cell { model, bits: of, method: method.name() }).chosen(runs) else {
            return String::new();
        };
        let error = |last: bool| {
            let values = chosen.values(|run| {
                let errors = run.more.get("errors")?.as_array()?;
                if last { errors.last() } else { errors.first() }.and_then(serde_json::Value::as_f64)
            });
            significant(mean(&values), 3)
        };
        let seconds = mean(&chosen.values(|run| run.more.get("seconds")?.as_f64()));
        format!(
            "| {bits} | {} | {} | {} | {} | {} | {}, {} | {seconds:.0} |\n",
            method.name(),
            if of == DENSE { "-".into() } else { method.stored(of).to_string() },
            chosen.perplexity(|run| run.before),
            chosen.perplexity(|run| run.test),
            chosen.rate(),
            error(false),
            error(true),
        )
    };
    text += &line("dense", DENSE, Method::Dense);
    for bits in WIDTHS {
        for method in Method::ALL {
            text += &line(&bits.to_string(), bits, method);
        }
    }
    text
}

fn study(log: &Log, case: &Case) -> Result<()> {
    let base = case.open(Scheme::Dense)?;
    let texts = Texts::of(&base, case)?;
    let bench = Bench { case, budget: Budget::of(case), base, texts };
    bench.method(log, Method::Dense, DENSE)?;
    for bits in bench.budget.widths {
        for method in bench.budget.methods {
            bench.method(log, *method, *bits)?;
        }
    }
    Ok(())
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    options.run(NAME, VERSION, study, table)
}
