//! What a method sees of a search: it asks for measurements, and the log answers where it can.

use std::{
    collections::{HashMap, HashSet},
    fmt, thread,
    time::{Duration, Instant},
};

use serde_json::{Map, Value};

use crate::{
    Config, Direction, Error, Fidelity, Objective, Request, Result, SearchSettings, SearchSpace, Trial,
    TrialKey, TrialLog,
};

/// Curves that the median rule needs before it stops anything.
const MIN_CURVES: usize = 5;

/// A plan measured at the search's full fidelity, its score as a loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// The plan.
    pub config: Config,
    /// Its bytes.
    pub bytes: u64,
    /// What is minimised; infinite for a plan that failed.
    pub loss: f64,
    /// Whether the trial was stopped early.
    pub stopped: bool,
}

/// A running search. Methods are functions of what they read here, so a search that is run again with the log of its
/// first run takes the same way, without measuring anything twice: that is how it resumes.
pub struct Session<'a> {
    space: &'a SearchSpace,
    objective: &'a mut dyn Objective,
    log: &'a mut TrialLog,
    settings: &'a SearchSettings,
    method: &'static str,
    spent: f64,
    counting: bool,
    asked: HashMap<TrialKey, f64>,
    archive: Vec<Observation>,
    /// Bytes and curves of finished trials at full fidelity, for the median rule.
    curves: Vec<(u64, Vec<(u64, f64)>)>,
    trials: Vec<TrialKey>,
    notes: Map<String, Value>,
    suggestions: Vec<Config>,
}

impl fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("method", &self.method)
            .field("spent", &self.spent)
            .field("trials", &self.trials.len())
            .finish_non_exhaustive()
    }
}

impl<'a> Session<'a> {
    pub(crate) fn new(
        space: &'a SearchSpace,
        objective: &'a mut dyn Objective,
        log: &'a mut TrialLog,
        settings: &'a SearchSettings,
        method: &'static str,
    ) -> Self {
        Self {
            space,
            objective,
            log,
            settings,
            method,
            spent: 0.0,
            counting: true,
            asked: HashMap::new(),
            archive: Vec::new(),
            curves: Vec::new(),
            trials: Vec::new(),
            notes: Map::new(),
            suggestions: Vec::new(),
        }
    }

    /// The space.
    pub fn space(&self) -> &'a SearchSpace {
        self.space
    }

    /// The search's settings.
    pub fn settings(&self) -> &'a SearchSettings {
        self.settings
    }

    /// Whether a plan is within the memory limit.
    pub fn fits(&self, config: &Config) -> bool {
        self.settings.max_bytes.is_none_or(|limit| self.space.bytes(config) <= limit)
    }

    /// Evaluations left, in measurements at full fidelity.
    pub fn remaining(&self) -> f64 {
        self.settings.evaluations as f64 - self.spent
    }

    /// Evaluations spent.
    pub fn spent(&self) -> f64 {
        self.spent
    }

    /// What was measured at full fidelity, in the order it was asked for.
    pub fn archive(&self) -> &[Observation] {
        &self.archive
    }

    /// Whether a plan was measured at full fidelity in this search.
    pub fn known(&self, config: &Config) -> bool {
        self.asked.contains_key(&self.key(config, self.settings.fidelity, self.settings.evaluation_seed))
    }

    /// Keeps something for the outcome's notes.
    pub fn note(&mut self, name: &str, value: Value) {
        self.notes.insert(name.into(), value);
    }

    /// Proposes a plan for the recoverability check.
    pub fn suggest(&mut self, config: Config) {
        if !self.suggestions.contains(&config) {
            self.suggestions.push(config);
        }
    }

    /// From here on measurements are not counted as the method's.
    pub(crate) fn end_search(&mut self) {
        self.counting = false;
    }

    pub(crate) fn suggestions(&self) -> &[Config] {
        &self.suggestions
    }

    pub(crate) fn direction(&self) -> Direction {
        self.objective.direction()
    }

    pub(crate) fn into_notes(self) -> (Map<String, Value>, Vec<Trial>) {
        let trials = self.trials.iter().filter_map(|key| self.log.get(key).cloned()).collect();
        (self.notes, trials)
    }

    /// Counts evaluations that measure nothing new.
    pub(crate) fn charge(&mut self, evaluations: f64) {
        self.spent += evaluations;
    }

    /// Measures plans at full fidelity, each once: a repeated one costs nothing. Losses in the order of `configs`;
    /// `None` where the evaluations ran out. A batch may be shared with other processes on the same log.
    ///
    /// # Errors
    /// Those of the objective and the log.
    pub fn evaluate(&mut self, configs: &[Config]) -> Result<Vec<Option<f64>>> {
        self.evaluate_at(configs, self.settings.fidelity, self.settings.evaluation_seed)
    }

    /// The same at another fidelity or seed. Of the same measure, a share of the amount (as the objective rounds it)
    /// costs that share of an evaluation; another measure or seed costs none (the outcome counts its trials).
    ///
    /// # Errors
    /// Those of the objective and the log.
    pub fn evaluate_at(
        &mut self,
        configs: &[Config],
        fidelity: Fidelity,
        seed: u64,
    ) -> Result<Vec<Option<f64>>> {
        let full = self.settings.fidelity;
        let main = seed == self.settings.evaluation_seed && fidelity.measure == full.measure;
        let amount = |fidelity| self.objective.rounded(fidelity).amount as f64;
        let price = if main && self.counting { amount(fidelity) / amount(full).max(1.0) } else { 0.0 };
        let mut affordable = Vec::new();
        let mut taken = HashSet::new();
        for config in configs {
            let key = self.key(config, fidelity, seed);
            if self.asked.contains_key(&key) || taken.contains(&key) {
                continue;
            }
            // Shares of an evaluation don't add up exactly.
            if self.spent + price > self.settings.evaluations as f64 + 1e-9 {
                break;
            }
            self.spent += price;
            taken.insert(key.clone());
            affordable.push(key);
        }
        self.measure(&affordable)?;
        for key in affordable {
            self.record(key, main && fidelity == full);
        }
        Ok(configs.iter().map(|config| self.asked.get(&self.key(config, fidelity, seed)).copied()).collect())
    }

    fn key(&self, config: &Config, fidelity: Fidelity, seed: u64) -> TrialKey {
        TrialKey { config: config.clone(), fidelity, seed }
    }

    /// Takes a measured trial from the log into the archive.
    fn record(&mut self, key: TrialKey, full: bool) {
        let Some(trial) = self.log.get(&key) else { return };
        let loss = self.objective.direction().loss(trial.score.unwrap_or(f64::NAN));
        if full {
            let config = key.config.clone();
            self.archive.push(Observation { config, bytes: trial.bytes, loss, stopped: trial.stopped });
            if !trial.stopped {
                self.curves.push((trial.bytes, trial.curve.clone()));
            }
        }
        self.trials.push(key.clone());
        self.asked.insert(key, loss);
    }

    /// Has every key measured: by this process, or by others that claimed it first.
    fn measure(&mut self, keys: &[TrialKey]) -> Result<()> {
        let mut pause = Duration::from_millis(5);
        loop {
            let missing: Vec<&TrialKey> = keys.iter().filter(|key| self.missing(key)).collect();
            if missing.is_empty() {
                return Ok(());
            }
            let mut progress = false;
            for key in missing {
                let Some(claim) = self.log.claim(key)? else { continue };
                // Whoever had the claim before may have finished in between.
                self.log.refresh()?;
                if self.missing(key) {
                    let trial = self.run(key)?;
                    self.log.append(&trial)?;
                }
                drop(claim);
                progress = true;
            }
            if !progress {
                thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_secs(1));
                self.log.refresh()?;
            }
        }
    }

    /// Whether a trial is to be measured. One that another search stopped early is no measurement for a search that
    /// stops nothing.
    fn missing(&self, key: &TrialKey) -> bool {
        self.log.get(key).is_none_or(|trial| trial.stopped && !self.settings.stop_early)
    }

    fn run(&mut self, key: &TrialKey) -> Result<Trial> {
        let plan = self.space.plan(&key.config);
        let request = Request { config: &key.config, plan: &plan, fidelity: key.fidelity, seed: key.seed };
        let (direction, bytes) = (self.objective.direction(), self.space.bytes(&key.config));
        let (median_rule, curves) =
            (self.settings.stop_early && key.fidelity == self.settings.fidelity, &self.curves);
        let (mut curve, mut stopped) = (Vec::new(), false);
        let start = Instant::now();
        let mut keep_going = |amount: u64, score: f64| {
            if score.is_finite() {
                curve.push((amount, score));
            }
            stopped |= median_rule && worse_than_median(curves, bytes, amount, score, direction);
            !stopped
        };
        let measured = self
            .objective
            .evaluate(&request, &mut keep_going)
            .map_err(|source| Error::Objective { plan: format!("{:?}", key.config.0), source })?;
        tracing::debug!(config = ?key.config.0, score = measured.score, "measured a plan");
        Ok(Trial {
            config: key.config.clone(),
            fidelity: key.fidelity,
            seed: key.seed,
            score: Some(measured.score).filter(|score| score.is_finite()),
            bytes,
            seconds: start.elapsed().as_secs_f64(),
            method: self.method.into(),
            figures: measured.figures.into_iter().filter(|(_, figure)| figure.is_finite()).collect(),
            curve,
            stopped,
            plan,
        })
    }
}

/// Whether a running trial is worse than the median of the finished ones of at most its bytes at the same point.
fn worse_than_median(
    curves: &[(u64, Vec<(u64, f64)>)],
    bytes: u64,
    amount: u64,
    score: f64,
    direction: Direction,
) -> bool {
    let rivals = curves.iter().filter(|(known, _)| *known <= bytes).flat_map(|(_, curve)| curve);
    let mut losses: Vec<f64> =
        rivals.filter(|(known, _)| *known == amount).map(|(_, score)| direction.loss(*score)).collect();
    if losses.len() < MIN_CURVES {
        return false;
    }
    losses.sort_by(f64::total_cmp);
    direction.loss(score) > losses[losses.len() / 2]
}
