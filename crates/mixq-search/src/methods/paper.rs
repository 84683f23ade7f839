//! The performance-model loop of the AutoMixQ paper, as the specification reconstructs it.

use super::{
    SearchMethod,
    pool::{Candidate, Model, candidates, first_design, pick, reference, staircase},
};
use crate::{Config, Error, Result, Session, SurrogateKind, hypervolume, moves::stream, pareto_front};

/// Fit a performance model, keep the candidates that are non-dominated in memory and predicted score, measure those
/// with the largest predicted growth of the hypervolume, repeat.
///
/// The paper (arXiv 2411.13814) names "lightweight performance models" and Pareto optimality; the rest follows the
/// group's other work. `picks: 1` is RankAdaptor's loop.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `initial` | 16 | first plans: the smallest, the largest, random ones |
/// | `picks` | 4 | plans measured per round |
/// | `crossovers` | 200 | candidates from pairs of front members |
/// | `random` | 500 | random candidates, spread over memory |
/// | `surrogate` | MLP | the performance model |
/// | `tolerance` | none | stop when the last 8 predictions were this close and the hypervolume grew by less than 0.1 % over 3 rounds; in units of the score (the specification: 0.3 points) |
#[derive(Debug, Clone, PartialEq)]
pub struct Paper {
    /// First plans.
    pub initial: usize,
    /// Plans measured per round.
    pub picks: usize,
    /// Candidates from pairs.
    pub crossovers: usize,
    /// Random candidates.
    pub random: usize,
    /// The performance model.
    pub surrogate: SurrogateKind,
    /// When to trust the model and stop.
    pub tolerance: Option<f64>,
}

impl Default for Paper {
    fn default() -> Self {
        Self {
            initial: 16,
            picks: 4,
            crossovers: 200,
            random: 500,
            surrogate: SurrogateKind::Mlp,
            tolerance: None,
        }
    }
}

/// Observations that the performance model is fitted to, the latest.
const MAX_FIT: usize = 500;

impl SearchMethod for Paper {
    fn name(&self) -> &'static str {
        "paper"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        if self.initial < 2 || self.picks == 0 {
            let found = format!("{} and {}", self.initial, self.picks);
            return Err(Error::option("Paper.initial and Paper.picks", "at least 2 and 1", found));
        }
        let seed = session.settings().seed;
        let design = first_design(session, self.initial, &mut stream(seed, "paper start", 0));
        session.evaluate(&design)?;
        let reference = reference(session);
        let (mut errors, mut volumes) = (Vec::new(), Vec::new());
        let mut round = 0;
        while session.remaining() >= 1.0 {
            round += 1;
            let picked = self.propose(session, reference, round)?;
            if picked.is_empty() {
                break;
            }
            let plans: Vec<_> = picked.iter().map(|(config, _)| config.clone()).collect();
            let losses = session.evaluate(&plans)?;
            let measured = picked.iter().zip(losses);
            errors.extend(measured.filter_map(|((_, predicted), loss)| Some((predicted - loss?).abs())));
            let points: Vec<[f64; 2]> =
                session.archive().iter().map(|seen| [seen.bytes as f64, seen.loss]).collect();
            volumes.push(hypervolume(&points, &reference));
            if self.settled(&errors, &volumes) {
                break;
            }
        }
        Ok(())
    }
}

impl Paper {
    fn propose(&self, session: &Session<'_>, reference: [f64; 2], round: u64) -> Result<Vec<(Config, f64)>> {
        let seed = session.settings().seed;
        if !session.archive().iter().any(|seen| seen.loss.is_finite()) {
            // Nothing to learn from yet.
            let mut rng = stream(seed, "paper blind", round);
            let plans = candidates(session, 0, self.picks, &mut rng);
            return Ok(plans.into_iter().map(|plan| (plan, f64::INFINITY)).collect());
        }
        let model = Model::fit(session, self.surrogate, MAX_FIT, seed.wrapping_add(round))?;
        let mut rng = stream(seed, "paper pool", round);
        let pool = candidates(session, self.crossovers, self.random, &mut rng);
        let predicted: Vec<_> = pool
            .into_iter()
            .map(|config| {
                let belief = model.predict(&config);
                Candidate::new(session, config, belief)
            })
            .collect();
        let points: Vec<[f64; 2]> =
            predicted.iter().map(|candidate| [candidate.bytes, candidate.belief.typical()]).collect();
        let front: Vec<_> = pareto_front(&points).into_iter().map(|index| predicted[index].clone()).collect();
        let count = self.picks.min(session.remaining() as usize);
        Ok(pick(staircase(session, reference), &front, count, false))
    }

    fn settled(&self, errors: &[f64], volumes: &[f64]) -> bool {
        let Some(tolerance) = self.tolerance else { return false };
        let trusted = errors.len() >= 8 && errors[errors.len() - 8..].iter().all(|error| *error <= tolerance);
        let last = volumes.len().saturating_sub(1);
        trusted && last >= 3 && volumes[last] - volumes[last - 3] < 1e-3 * volumes[last - 3].abs()
    }
}
