//! A search from start to end.

use serde_json::{Map, Value};

use crate::{
    Error, Fidelity, Finalist, Finalists, Front, Halving, Objective, Result, Rung, SearchMethod, SearchSpace,
    Session, Trial, TrialLog, hypervolume,
};

/// What a search may spend and how it measures.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `evaluations` | required | measurements at full fidelity |
/// | `fidelity` | required | what a measurement is |
/// | `seed` | 0 | the method's random choices |
/// | `evaluation_seed` | 0 | the objective's; the same for every plan |
/// | `max_bytes` | none | memory limit on the space's axis |
/// | `reference` | none | `[bytes, score]` up to which the hypervolume counts; none is the limit (or the largest plan) and the worst score measured, which can't be compared between searches |
/// | `stop_early` | false | ends trials whose score on the way is worse than the median of earlier ones of at most their bytes |
/// | `halving` | none | recoverability by short fine-tunes |
/// | `finalists` | none | re-scoring under fresh seeds |
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SearchSettings {
    /// Measurements at full fidelity.
    pub evaluations: usize,
    /// What a measurement is.
    pub fidelity: Fidelity,
    /// Seed of the method.
    pub seed: u64,
    /// Seed of the measurements.
    pub evaluation_seed: u64,
    /// Memory limit.
    pub max_bytes: Option<u64>,
    /// Where the hypervolume ends, `[bytes, score]`.
    pub reference: Option<[f64; 2]>,
    /// Whether hopeless trials are ended.
    pub stop_early: bool,
    /// The recoverability check.
    pub halving: Option<Halving>,
    /// The final re-scoring.
    pub finalists: Option<Finalists>,
}

impl SearchSettings {
    /// So many evaluations at this fidelity.
    pub fn new(evaluations: usize, fidelity: Fidelity) -> Self {
        Self {
            evaluations,
            fidelity,
            seed: 0,
            evaluation_seed: 0,
            max_bytes: None,
            reference: None,
            stop_early: false,
            halving: None,
            finalists: None,
        }
    }

    /// The same with another seed of the method.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The same with another seed of the measurements.
    #[must_use]
    pub fn with_evaluation_seed(mut self, seed: u64) -> Self {
        self.evaluation_seed = seed;
        self
    }

    /// The same with a memory limit.
    #[must_use]
    pub fn with_max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// The same with a fixed reference point.
    #[must_use]
    pub fn with_reference(mut self, bytes: f64, score: f64) -> Self {
        self.reference = Some([bytes, score]);
        self
    }

    /// The same, ending hopeless trials.
    #[must_use]
    pub fn with_early_stopping(mut self) -> Self {
        self.stop_early = true;
        self
    }

    /// The same with a recoverability check.
    #[must_use]
    pub fn with_halving(mut self, halving: Halving) -> Self {
        self.halving = Some(halving);
        self
    }

    /// The same with re-scored finalists.
    #[must_use]
    pub fn with_finalists(mut self, finalists: Finalists) -> Self {
        self.finalists = Some(finalists);
        self
    }
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Outcome {
    /// The front of this search's measurements; [`Front::of_trials`] of the log's has those of other searches too.
    pub front: Front,
    /// Evaluations that the method spent, in measurements at full fidelity.
    pub evaluations: f64,
    /// Area that the front dominates.
    pub hypervolume: f64,
    /// Where that ends: bytes and score.
    pub reference: [f64; 2],
    /// Every trial that this search asked for, in its order.
    pub trials: Vec<Trial>,
    /// The recoverability check.
    pub rungs: Vec<Rung>,
    /// Re-scored plans, best first within each limit.
    pub finalists: Vec<Finalist>,
    /// What the method noted, such as sensitivities.
    pub notes: Map<String, Value>,
}

/// Runs a method on a space.
///
/// Stopped at any point and called again with the same log and settings, it measures what is missing and ends with
/// the same outcome. With more `evaluations` it goes on: what the log knows costs no time. Methods whose steps depend
/// on the number of evaluations may then ask for other plans, and what only the earlier search measured is in the log
/// alone. Several processes may
/// run the same search on one log file; they share the measurements of each batch and all end with the same outcome.
///
/// # Errors
/// [`Error::Limit`] if no plan meets the memory limit, [`Error::Option`] for options out of range, [`Error::Log`] for
/// a log of another space or objective, the objective's errors, the log's errors.
pub fn search(
    space: &SearchSpace,
    objective: &mut dyn Objective,
    log: &mut TrialLog,
    method: &dyn SearchMethod,
    settings: &SearchSettings,
) -> Result<Outcome> {
    if settings.evaluations == 0 || settings.fidelity.amount == 0 {
        let found = format!("{} and {}", settings.evaluations, settings.fidelity.amount);
        return Err(Error::option("SearchSettings.evaluations and fidelity.amount", "at least 1", found));
    }
    space.check_limit(settings.max_bytes)?;
    log.check(space, &objective.fingerprint())?;
    if let Some(finalists) = &settings.finalists {
        let measure = finalists.fidelity.unwrap_or(settings.fidelity).measure;
        if !objective.has_seeds(measure) {
            let expected = "a measure whose scores depend on the seed";
            return Err(Error::option("Finalists.fidelity", expected, format!("{measure:?}")));
        }
    }
    let direction = objective.direction();
    let mut session = Session::new(space, objective, log, settings, method.name());
    method.run(&mut session)?;
    let evaluations = session.spent();
    session.end_search();
    let rungs =
        settings.halving.as_ref().map(|halving| halving.run(&mut session)).transpose()?.unwrap_or_default();
    let finalists =
        settings.finalists.as_ref().map(|finalists| finalists.run(&mut session, &rungs)).transpose()?;
    let (notes, trials) = session.into_notes();
    let front = Front::of_trials(
        space,
        direction,
        &trials,
        settings.fidelity,
        settings.evaluation_seed,
        settings.max_bytes,
    );
    let worst =
        trials.iter().filter(|trial| trial.fidelity == settings.fidelity).filter_map(|trial| trial.score);
    let worst = worst.map(|score| direction.loss(score)).fold(f64::NEG_INFINITY, f64::max);
    let memory = settings.max_bytes.unwrap_or(u64::MAX).min(space.largest()) as f64;
    let reference =
        settings.reference.unwrap_or([memory, if worst.is_finite() { direction.loss(worst) } else { 0.0 }]);
    let volume = hypervolume(&front.losses(), &[reference[0], direction.loss(reference[1])]);
    let finalists = finalists.unwrap_or_default();
    Ok(Outcome { front, evaluations, hypervolume: volume, reference, trials, rungs, finalists, notes })
}
