//! What repairs few bits: LoRA or the weights' own scales, at about as many trained values; and the text alone or a teacher
//! beside it, from ApiQ's start at 2 bits.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{ApiqConfig, CalibrationConfig, Method as Calibration},
    models::{CausalLm, Recompute},
    quant::{Plan, Scheme, Slots, TrainedParts},
    training::{
        BatchOptions, DataOptions, Dataset, Distillation, RunOptions, ScheduleKind, TokenLoss, TrainerConfig,
    },
};
use kiln_examples::{Result, embedded_model, read_ids, testdata};
use serde::Deserialize;
use serde_json::json;

use crate::{
    bench::StudyOptions,
    log::{Line, Log},
    numbers::{deviation, mean, significant},
};

const GROUP: usize = 64;
/// Rates are chosen on the validation text with a seed of their own.
const TUNING_SEED: u64 = 1000;
const SEEDS: u64 = 3;

/// What is tried on a model.
struct Case<'a> {
    name: &'static str,
    path: &'a Path,
    /// Held-out text; its first third chooses rates, the rest gives figures.
    text: PathBuf,
    length: usize,
    batch: usize,
    steps: u64,
    seeds: u64,
    rates_of_adapters: [f64; 3],
    rates_of_scales: [f64; 3],
    windows: usize,
    epochs: usize,
}

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
            Self::Apiq { taught: false } => "ApiQ, text",
            Self::Apiq { taught: true } => "ApiQ, text and teacher",
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
struct Run {
    model: String,
    bits: u32,
    method: String,
    seed: u64,
    trained: usize,
    before: f64,
    validation: f64,
    test: f64,
}

/// A model with its texts.
struct Bench<'a> {
    case: &'a Case<'a>,
    bits: u32,
    base: Base,
    train: Arc<Dataset>,
    validation: Dataset,
    test: Dataset,
    /// ApiQ's start, once it was asked for.
    calibrated: Option<FineTuned>,
    teacher: Option<Base>,
}

impl<'a> Bench<'a> {
    fn new(case: &'a Case<'a>, bits: u32) -> Result<Self> {
        let base = Base::open(case.path)?.with_bits(bits).load()?;
        let options = || DataOptions::new(case.length, base.model().vocab_size());
        let train = testdata("models/tiny-llama/text/shift_train_moby.txt");
        let train = Dataset::from_ids(read_ids(&train, base.tokenizer())?, &options())?;
        let mut ids = read_ids(&case.text, base.tokenizer())?;
        let test = ids.split_off(ids.len() / 3);
        let (validation, test) = (Dataset::from_ids(ids, &options())?, Dataset::from_ids(test, &options())?);
        Ok(Self { case, bits, base, train: train.into(), validation, test, calibrated: None, teacher: None })
    }

    /// The rank at which LoRA trains about as many values as there are scales.
    fn rank(&self) -> usize {
        let shapes = self.base.model().slot_shapes();
        let scales: usize = shapes.iter().map(|(_, [input, output])| input.div_ceil(GROUP) * output).sum();
        let of_rank: usize = shapes.iter().map(|(_, [input, output])| input + output).sum();
        (scales as f64 / of_rank as f64).round().max(1.0) as usize
    }

    fn run(&mut self, method: Method, seed: u64, lr: f64) -> Result<Line> {
        let Case { batch, steps, .. } = *self.case;
        let trainer = TrainerConfig::new(steps, BatchOptions::new(batch).with_seed(seed))
            .with_lr(lr)
            .with_warmup(steps / 10)
            .with_schedule(ScheduleKind::Linear { final_ratio: 0.1 })
            .with_recompute(Recompute::None);
        let rank = self.rank();
        let (before, after) = match method {
            Method::Parts(parts) => {
                let run = RunOptions::new();
                let (tuned, _) = self.base.tune_scales(parts, self.train.clone(), trainer, &run, &mut ())?;
                (
                    self.base.evaluate(&self.test)?.nll,
                    [tuned.evaluate(&self.validation)?, tuned.evaluate(&self.test)?],
                )
            }
            Method::Lora => {
                let adapters = AdapterConfig::lora(rank, rank as f64).with_seed(seed);
                let tuned = self.base.finetune(adapters, self.train.clone()).with_trainer(trainer).run()?;
                (
                    self.base.evaluate(&self.test)?.nll,
                    [tuned.evaluate(&self.validation)?, tuned.evaluate(&self.test)?],
                )
            }
            Method::Apiq { taught } => {
                self.prepare()?;
                let (Some(start), Some(teacher)) = (&self.calibrated, &self.teacher) else {
                    return Err("a start and a teacher".into());
                };
                let loss = TokenLoss::new().with_distillation(Distillation { weight: 0.5, temperature: 1.0 });
                let tuning = start.finetune(self.train.clone());
                let tuned = match taught {
                    true => tuning.with_trainer(trainer.with_loss(loss)).with_reference(teacher).run()?,
                    false => tuning.with_trainer(trainer).run()?,
                };
                (
                    start.evaluate(&self.test)?.nll,
                    [tuned.evaluate(&self.validation)?, tuned.evaluate(&self.test)?],
                )
            }
        };
        let trained = match method {
            Method::Lora | Method::Apiq { .. } => self
                .base
                .model()
                .slot_shapes()
                .iter()
                .map(|(_, [input, output])| rank * (input + output))
                .sum(),
            Method::Parts(parts) => {
                let scales: usize = self
                    .base
                    .model()
                    .slot_shapes()
                    .iter()
                    .map(|(_, [input, output])| input.div_ceil(GROUP) * output)
                    .sum();
                if parts == TrainedParts::Scales { scales } else { 2 * scales }
            }
        };
        let found = json!({
            "trained": trained, "before": before, "validation": after[0].nll, "test": after[1].nll, "steps": steps,
        });
        match found {
            serde_json::Value::Object(line) => Ok(line),
            other => Err(format!("an object, not {other}").into()),
        }
    }

    /// Calibrates, and loads the model as it is stored.
    fn prepare(&mut self) -> Result<()> {
        if self.calibrated.is_some() {
            return Ok(());
        }
        let teacher = Base::open(self.case.path)?.with_scheme(Scheme::Dense).load()?;
        let scheme: Scheme = format!("affine{}:{GROUP}", self.bits).parse()?;
        let rank = self.rank();
        let apiq = ApiqConfig {
            epochs: self.case.epochs,
            lr_clipping: 1e-2,
            lr_lora: 2e-3,
            initial_logit: 1.0,
            augmented: true,
            ..ApiqConfig::default()
        };
        let config = CalibrationConfig::new(Calibration::ApiqBlock(apiq), Plan::uniform(scheme));
        let windows = self.train.windows(self.case.windows)?;
        let calibrated = teacher.calibrate(AdapterConfig::lora(rank, rank as f64), &config, &windows)?;
        (self.calibrated, self.teacher) = (Some(calibrated), Some(teacher));
        Ok(())
    }
}

fn study(log: &Log, case: &Case<'_>) -> Result<()> {
    for bits in [3, 2] {
        let mut bench = Bench::new(case, bits)?;
        for method in Method::ALL {
            if matches!(method, Method::Apiq { .. }) && bits != 2 {
                continue;
            }
            let rates = match method {
                Method::Parts(_) => case.rates_of_scales,
                _ => case.rates_of_adapters,
            };
            let mut once = |seed: u64, lr: f64| -> Result<Run> {
                let wanted = json!({
                    "model": case.name, "bits": bits, "method": method.name(), "seed": seed, "lr": lr,
                });
                let line = log.once(wanted, || bench.run(method, seed, lr))?;
                Ok(serde_json::from_value(line.into())?)
            };
            let mut best = (f64::INFINITY, rates[0]);
            for lr in rates {
                let found = once(TUNING_SEED, lr)?.validation;
                if found < best.0 {
                    best = (found, lr);
                }
            }
            for seed in 0..case.seeds {
                once(seed, best.1)?;
            }
        }
    }
    Ok(())
}

fn table(log: &Log, model: &str) -> Result<()> {
    let runs: Vec<Run> = log.runs::<Run>()?.into_iter().filter(|run| run.model == model).collect();
    if runs.is_empty() {
        return Ok(());
    }
    println!(
        "\n{model}\n\n| bits | trained | values | before | after | spread |\n| --- | --- | --- | --- | --- | --- |"
    );
    for bits in [3, 2] {
        for method in Method::ALL {
            let of_method =
                |run: &&Run| run.bits == bits && run.method == method.name() && run.seed < TUNING_SEED;
            let found: Vec<&Run> = runs.iter().filter(of_method).collect();
            let Some(first) = found.first() else { continue };
            let perplexities: Vec<f64> = found.iter().map(|run| run.test.exp()).collect();
            let spread = deviation(&perplexities).map_or(String::new(), |spread| significant(spread, 2));
            let (before, after) = (significant(first.before.exp(), 4), significant(mean(&perplexities), 4));
            println!("| {bits} | {} | {} | {before} | {after} | {spread} |", method.name(), first.trained);
        }
    }
    Ok(())
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    let log = Log::open(options.log.as_deref(), "trained-parts", 1)?;
    let embedded = embedded_model();
    let mut cases = vec![Case {
        name: "tiny-llama",
        path: &embedded,
        text: testdata("models/tiny-llama/text/shift_test_moby.u16le"),
        length: 256,
        batch: 8,
        steps: 60,
        seeds: SEEDS,
        rates_of_adapters: [3e-3, 1e-2, 3e-2],
        rates_of_scales: [3e-4, 1e-3, 3e-3],
        windows: 32,
        epochs: 6,
    }];
    cases.extend(options.smollm2.as_deref().map(|path| Case {
        name: "smollm2",
        path,
        text: testdata("text/moby_ch100_smollm2_10240.u16le"),
        length: 256,
        batch: 2,
        steps: 30,
        seeds: 1,
        rates_of_adapters: [1e-3, 3e-3, 1e-2],
        rates_of_scales: [3e-4, 1e-3, 3e-3],
        windows: 8,
        epochs: 3,
    }));
    for case in &cases {
        if !options.table {
            study(&log, case)?;
        }
        table(&log, case.name)?;
    }
    Ok(())
}
