//! What studies share: models with three texts, the choice of rates, and the lines of a table.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use kiln::{
    Base,
    models::{CausalLm, Recompute, Windows},
    quant::Scheme,
    training::{BatchOptions, DataOptions, Dataset, DatasetLoss, ScheduleKind, TrainerConfig},
};
use kiln_examples::{Result, embedded_model, read_ids, testdata};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    log::{Line, Log},
    numbers::{deviation, mean, significant},
};

/// Options of the studies that run on both models.
#[derive(Debug, Args)]
pub(crate) struct StudyOptions {
    /// The GGUF file that scripts/fetch-smollm2 fetches; without it, the embedded model only.
    #[arg(long)]
    pub(crate) smollm2: Option<PathBuf>,
    /// The study's file below docs/results if left out.
    #[arg(long)]
    pub(crate) log: Option<PathBuf>,
    /// Only prints the tables of the log.
    #[arg(long)]
    pub(crate) table: bool,
}

impl StudyOptions {
    /// Makes the runs of a study on each model, unless only its tables are wanted, and prints these.
    pub(crate) fn run(
        &self,
        name: &str,
        version: u32,
        study: impl Fn(&Log, &Case) -> Result<()>,
        table: impl Fn(&[Run], &str) -> String,
    ) -> Result<()> {
        let log = Log::open(self.log.as_deref(), name, version)?;
        if !self.table {
            Case::all(self.smollm2.as_ref()).iter().try_for_each(|case| study(&log, case))?;
        }
        print!("{}{}", tables(&log, table)?, log.time_taken()?);
        Ok(())
    }
}

/// The tables of a log, one of each model that it has runs of.
pub(crate) fn tables(log: &Log, table: impl Fn(&[Run], &str) -> String) -> Result<String> {
    let runs: Vec<Run> = log.runs()?;
    let there = |model: &&str| runs.iter().any(|run| run.model == **model);
    let of = |model| format!("\n{model}\n\n{}", table(&runs, model));
    Ok([EMBEDDED, SMOLLM2].into_iter().filter(there).map(of).collect())
}

/// The head of a table.
pub(crate) fn head(columns: &str) -> String {
    let line = columns.split('|').map(|_| "---").collect::<Vec<_>>().join(" | ");
    format!("| {columns} |\n| {line} |\n")
}

/// A model that things are tried on.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    path: PathBuf,
    /// Tokens of a row, and rows of a step.
    pub(crate) length: usize,
    pub(crate) batch: usize,
    /// What rates of the embedded model are multiplied by.
    pub(crate) rate: f64,
    /// Tokens of the text that chooses; twice as many give figures.
    validation: usize,
}

pub(crate) const EMBEDDED: &str = "tiny-llama";
pub(crate) const SMOLLM2: &str = "smollm2";

impl Case {
    pub(crate) fn embedded() -> Self {
        let path = embedded_model();
        Self { name: EMBEDDED, path, length: 128, batch: 4, rate: 1.0, validation: 8192 }
    }

    /// SmolLM2-135M, from the GGUF file that scripts/fetch-smollm2 fetches.
    pub(crate) fn smollm2(path: PathBuf) -> Self {
        Self { name: SMOLLM2, path, length: 256, batch: 2, rate: 0.1, validation: 4096 }
    }

    /// The embedded model, and SmolLM2 where it is given.
    pub(crate) fn all(smollm2: Option<&PathBuf>) -> Vec<Self> {
        let mut cases = vec![Self::embedded()];
        cases.extend(smollm2.cloned().map(Self::smollm2));
        cases
    }

    pub(crate) fn open(&self, scheme: Scheme) -> Result<Base> {
        Ok(Base::open(&self.path)?.with_scheme(scheme).load()?)
    }

    /// Steps of `batch` rows, linearly down to a tenth of the rate.
    pub(crate) fn trainer(&self, steps: u64, seed: u64, lr: f64) -> TrainerConfig {
        TrainerConfig::new(steps, BatchOptions::new(self.batch).with_seed(seed))
            .with_lr(lr)
            .with_warmup(steps / 10)
            .with_schedule(ScheduleKind::Linear { final_ratio: 0.1 })
            .with_recompute(Recompute::None)
    }
}

/// The three parts of Moby-Dick's chapters: four fifths to calibrate and tune on, then a text for every choice, then one for
/// figures, which nothing is chosen by.
pub(crate) struct Texts {
    ids: Vec<u32>,
    pub(crate) train: Arc<Dataset>,
    pub(crate) validation: Dataset,
    pub(crate) test: Dataset,
}

impl Texts {
    pub(crate) fn of(base: &Base, case: &Case) -> Result<Self> {
        let text = testdata("models/tiny-llama/text/shift_train_moby.txt");
        let mut ids = read_ids(&text, base.tokenizer())?;
        let held_out = ids.split_off(ids.len() / 5 * 4);
        let [validation, test] = [case.validation, 2 * case.validation];
        let Some((validation, test)) = held_out.get(..validation + test).map(|ids| ids.split_at(validation))
        else {
            return Err(
                format!("{}: expected more than {} held-out tokens", text.display(), held_out.len()).into()
            );
        };
        let data = |ids: &[u32]| {
            Dataset::from_ids(ids.to_vec(), &DataOptions::new(case.length, base.model().vocab_size()))
        };
        let (train, validation, test) = (data(&ids)?.into(), data(validation)?, data(test)?);
        Ok(Self { ids, train, validation, test })
    }

    /// Windows of the text to calibrate on.
    pub(crate) fn windows(&self, length: usize, count: usize, seed: u64) -> Result<Windows> {
        Ok(Windows::random(&self.ids, length, count, seed)?)
    }

    /// Losses on the text for choices and on the one for figures.
    pub(crate) fn losses<E: Into<Box<dyn std::error::Error>>>(
        &self,
        evaluate: impl Fn(&Dataset) -> std::result::Result<DatasetLoss, E>,
    ) -> Result<[f64; 2]> {
        let loss = |data| evaluate(data).map(|loss| loss.nll).map_err(Into::into);
        Ok([loss(&self.validation)?, loss(&self.test)?])
    }
}

/// What names a run, and what was found; no losses where it diverged.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Run {
    pub(crate) model: String,
    #[serde(default)]
    pub(crate) bits: u32,
    pub(crate) method: String,
    pub(crate) lr: f64,
    pub(crate) seed: u64,
    /// Loss on the text for figures before training.
    pub(crate) before: Option<f64>,
    pub(crate) validation: Option<f64>,
    pub(crate) test: Option<f64>,
    #[serde(flatten)]
    pub(crate) more: Line,
}

impl Run {
    fn choice(&self) -> f64 {
        self.validation.unwrap_or(f64::INFINITY)
    }
}

/// A method on a model at a width.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell<'a> {
    pub(crate) model: &'a str,
    pub(crate) bits: u32,
    pub(crate) method: &'a str,
}

impl Cell<'_> {
    fn has(&self, run: &Run) -> bool {
        run.model == self.model && run.bits == self.bits && run.method == self.method
    }

    /// Runs every rate with seed 0, and the one of the least loss on the text for choices with the other seeds. What another
    /// process is at is waited for when there is nothing else to do, so that several share a cell's runs.
    pub(crate) fn study(
        &self,
        log: &Log,
        rates: &[f64],
        seeds: u64,
        mut run: impl FnMut(f64, u64) -> Result<Line>,
    ) -> Result<()> {
        let wanted = |lr: f64, seed: u64| {
            let Self { model, bits, method } = *self;
            json!({ "model": model, "bits": bits, "method": method, "lr": lr, "seed": seed })
        };
        let mut run = |lr: f64, seed: u64| match run(lr, seed) {
            Err(error) if error.downcast_ref().is_some_and(kiln::Error::is_not_finite) => {
                Ok(line_of(json!({ "diverged": error.to_string() })))
            }
            other => other,
        };
        let mut all = |runs: &[(f64, u64)]| -> Result<Vec<Run>> {
            for &(lr, seed) in runs {
                log.unless_taken(wanted(lr, seed), || run(lr, seed))?;
            }
            let once = |&(lr, seed): &(f64, u64)| {
                let line = log.once(wanted(lr, seed), || run(lr, seed))?;
                Ok(serde_json::from_value(line.into())?)
            };
            runs.iter().map(once).collect()
        };
        let tried = all(&rates.iter().map(|lr| (*lr, 0)).collect::<Vec<_>>())?;
        let Some(best) = tried.into_iter().min_by(|a, b| a.choice().total_cmp(&b.choice())) else {
            return Ok(());
        };
        all(&(1..seeds).map(|seed| (best.lr, seed)).collect::<Vec<_>>()).map(drop)
    }

    /// The runs of the rate that was best on the text for choices; none if the log has none.
    pub(crate) fn chosen(&self, runs: &[Run]) -> Option<Chosen> {
        let mine: Vec<&Run> = runs.iter().filter(|run| self.has(run)).collect();
        let tried: Vec<&&Run> = mine.iter().filter(|run| run.seed == 0).collect();
        let best = tried.iter().min_by(|a, b| a.choice().total_cmp(&b.choice()))?;
        let rates = || tried.iter().map(|run| run.lr);
        let edge = match (rates().all(|lr| lr <= best.lr), rates().all(|lr| lr >= best.lr)) {
            _ if tried.len() < 2 => "",
            (true, _) => ", the highest",
            (_, true) => ", the lowest",
            _ => "",
        };
        let runs = mine.iter().filter(|run| run.lr == best.lr).map(|run| (*run).clone()).collect();
        Some(Chosen { lr: best.lr, edge, runs })
    }
}

/// The runs that a table's line is of; values of those that didn't diverge.
pub(crate) struct Chosen {
    lr: f64,
    edge: &'static str,
    pub(crate) runs: Vec<Run>,
}

impl Chosen {
    /// The rate, and whether it was the highest or lowest tried.
    pub(crate) fn rate(&self) -> String {
        format!("{}{}", significant(self.lr, 2), self.edge)
    }

    /// A figure of every seed.
    pub(crate) fn values(&self, figure: impl Fn(&Run) -> Option<f64>) -> Vec<f64> {
        self.runs.iter().filter_map(figure).collect()
    }

    /// Mean and deviation of perplexities.
    pub(crate) fn perplexity(&self, loss: impl Fn(&Run) -> Option<f64>) -> String {
        let values = self.values(|run| loss(run).map(f64::exp));
        self.counted(with_deviation(&values, |value| significant(value, 4)), values.len())
    }

    /// Mean and deviation of losses.
    pub(crate) fn nats(&self, loss: impl Fn(&Run) -> Option<f64>) -> String {
        let values = self.values(loss);
        self.counted(with_deviation(&values, |value| format!("{value:.4}")), values.len())
    }

    /// A cell that says how many runs it isn't of.
    fn counted(&self, cell: String, values: usize) -> String {
        match self.runs.len() - values {
            0 => cell,
            diverged => format!("{cell}, {diverged} of {} diverged", self.runs.len()),
        }
    }
}

/// A mean with the deviation of two values or more that differ; `-` of none.
pub(crate) fn with_deviation(values: &[f64], write: impl Fn(f64) -> String) -> String {
    match (values, deviation(values)) {
        ([], _) => "-".into(),
        (_, Some(spread)) if spread > 1e-9 * mean(values).abs() => {
            format!("{} ± {}", write(mean(values)), significant(spread, 2))
        }
        _ => write(mean(values)),
    }
}

pub(crate) fn line_of(found: Value) -> Line {
    match found {
        Value::Object(line) => line,
        other => Line::from_iter([("found".into(), other)]),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::{Duration, Instant},
    };

    use super::*;

    #[test]
    fn processes_share_the_runs_of_a_cell() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let cell = Cell { model: EMBEDDED, bits: 2, method: "method" };
        let rates: Vec<f64> = (1..=6).map(f64::from).collect();
        let begun = AtomicUsize::new(0);
        let made: Vec<usize> = std::thread::scope(|scope| {
            let work = || {
                let log = Log::open(Some(&path), "test", 1).unwrap();
                let mut made = 0;
                let run = |lr: f64, _| {
                    made += 1;
                    begun.fetch_add(1, Ordering::SeqCst);
                    // The other process is at a run too, unless processes wait for each other's.
                    let from = Instant::now();
                    while begun.load(Ordering::SeqCst) < 2 * made {
                        if from.elapsed() > Duration::from_secs(20) {
                            return Err("nobody else is at a run".into());
                        }
                        std::thread::yield_now();
                    }
                    Ok(line_of(json!({ "before": 2.0, "validation": lr, "test": lr })))
                };
                cell.study(&log, &rates, 1, run).unwrap();
                made
            };
            let threads = [scope.spawn(work), scope.spawn(work)];
            threads.map(|thread| thread.join().unwrap()).to_vec()
        });
        assert_eq!(made, [3, 3]);
    }

    #[test]
    fn the_text_for_choices_chooses_and_what_diverged_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(Some(&folder.path().join("log.jsonl")), "test", 1).unwrap();
        let cell = Cell { model: EMBEDDED, bits: 2, method: "method" };
        let mut made = Vec::new();
        cell.study(&log, &[0.1, 0.2, 0.3], 3, |lr, seed| {
            made.push((lr, seed));
            // The highest rate is the worst where nothing may be chosen by it.
            let (validation, test) = (1.0 - lr, 1.0 + lr);
            match seed {
                2 => Err(kiln::Error::from(kiln::training::Error::Diverged {
                    step: 1,
                    quantity: "the loss".into(),
                    value: f64::NAN,
                    checkpoint: None,
                })
                .into()),
                _ => Ok(line_of(json!({ "before": 2.0, "validation": validation, "test": test }))),
            }
        })
        .unwrap();
        assert_eq!(made, [(0.1, 0), (0.2, 0), (0.3, 0), (0.3, 1), (0.3, 2)]);
        let found = cell.chosen(&log.runs().unwrap()).unwrap();
        assert_eq!(found.rate(), "0.3, the highest");
        assert_eq!(found.nats(|run| run.test), "1.3000, 1 of 3 diverged");
        assert!(Cell { bits: 3, ..cell }.chosen(&log.runs().unwrap()).is_none());
    }
}
